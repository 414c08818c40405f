"""Answers from a trace: pure functions, lazy frames in, a frame or a dict out; one question a module."""
