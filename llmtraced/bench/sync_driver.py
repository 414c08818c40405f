"""The second engine's process: libllama.so in a Python process, driven over a pipe.

Run by :class:`llmtraced.bench.engine.SyncEngine` as ``python -P sync_driver.py MODEL …`` with one of the packages of
:data:`BINDINGS` on PYTHONPATH. It prints ``{"state": "ready", "pid": …}`` when the model is loaded, then for every line
``{"prompt": [ids], "n_predict": N, "temperature": T, "seed": S}`` on stdin generates N tokens and prints
``{"state": "done", "tokens": [ids], "times_ns": […], …}`` (CLOCK_MONOTONIC at the end of each evaluation; the first
is the prompt's). It ends when stdin does. It calls llama.cpp's C interface, in which one ``llama_decode`` is one
evaluated graph: the prompt and N - 1 tokens after it make N graphs.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

__all__ = ["BINDINGS", "main"]

Interface = tuple[Any, Callable[[Sequence[int]], Any]]
"""What has llama.cpp's functions as attributes, and what makes an array of ids."""


def _by_cffi() -> Interface:
    bindings = __import__("llama_cpp_py_sync._cffi_bindings", fromlist=["get_ffi", "get_lib"])
    return bindings.get_lib(), lambda ids: bindings.get_ffi().new("llama_token[]", ids)


def _by_ctypes() -> Interface:
    lib = __import__("llama_cpp")
    return lib, lambda ids: (ctypes.c_int32 * len(ids))(*ids)


BINDINGS: Final = {"llama_cpp_py_sync": _by_cffi, "llama_cpp": _by_ctypes}
"""By package: llama-cpp-py-sync (0.8233 and later), llama-cpp-python. A null pointer of either is false."""


def _load(lib: Any, args: argparse.Namespace) -> tuple[Any, Any]:
    """Return the model and a context for it."""
    lib.llama_backend_init()
    params = lib.llama_model_default_params()
    params.use_extra_bufts = not args.no_repack
    if hasattr(params, "load_mode"):
        params.load_mode = 1  # LLAMA_LOAD_MODE_MMAP
    else:  # builds before it
        params.use_mmap, params.use_direct_io = True, False
    model = lib.llama_model_load_from_file(os.fsencode(args.model), params)
    if not model:
        raise SystemExit(f"libllama cannot load {args.model}")
    settings = lib.llama_context_default_params()
    settings.n_ctx = args.ctx
    settings.n_threads = settings.n_threads_batch = args.threads
    context = lib.llama_init_from_model(model, settings)
    if not context:
        raise SystemExit(f"libllama cannot make a context of {args.ctx} tokens")
    return model, context


def _sampler(lib: Any, temperature: float, seed: int) -> Any:
    """Return a sampler chain: greedy at temperature 0, else the whole distribution."""
    chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
    if temperature > 0:
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_temp(temperature))
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_dist(seed))
    else:
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_greedy())
    return chain


def _generate(interface: Interface, context: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Evaluate the prompt from an empty context, then token by token; return ids and times."""
    lib, array = interface
    lib.llama_memory_clear(lib.llama_get_memory(context), True)
    chain = _sampler(lib, request["temperature"], request["seed"])
    batch: list[int] = request["prompt"]
    tokens: list[int] = []
    times: list[int] = []
    start = time.monotonic_ns()
    while len(tokens) < request["n_predict"]:
        ids = array(batch)
        code = lib.llama_decode(context, lib.llama_batch_get_one(ids, len(batch)))
        if code:
            raise SystemExit(f"llama_decode failed with code {code}")
        tokens.append(int(lib.llama_sampler_sample(chain, context, -1)))
        times.append(time.monotonic_ns())
        batch = tokens[-1:]
    lib.llama_sampler_free(chain)
    return {"state": "done", "tokens": tokens, "start_ns": start, "times_ns": times}


def main() -> int:
    """Load the model, then serve requests until stdin ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ctx", type=int, default=2048)
    parser.add_argument("--no-repack", action="store_true")
    parser.add_argument("--bindings", choices=BINDINGS, default="llama_cpp_py_sync")
    args = parser.parse_args()
    interface = BINDINGS[args.bindings]()
    lib = interface[0]
    model, context = _load(lib, args)
    print(json.dumps({"state": "ready", "pid": os.getpid()}), flush=True)
    for line in sys.stdin:
        print(json.dumps(_generate(interface, context, json.loads(line))), flush=True)
    lib.llama_free(context)
    lib.llama_model_free(model)
    return 0


if __name__ == "__main__":
    sys.exit(main())
