"""Measurements of this tool, and what they run on: engines, models, memory pressure, known workloads."""
