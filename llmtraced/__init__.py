"""Which tensor, layer and expert an LLM server waits for when its model is larger than RAM."""

__version__ = "0.1.0"
