"""The second engine's process: libllama.so in a Python process, driven over a pipe.

Run by :class:`llmtraced.bench.engine.SyncEngine` as ``python -P sync_driver.py MODEL …`` with one of the packages of
:data:`BINDINGS` on PYTHONPATH. It prints ``{"state": "ready", "pid": …}`` when the model is loaded, then for every line
``{"prompt": [ids], "n_predict": N, "temperature": T, "seed": S}`` on stdin generates N tokens and prints
``{"state": "done", "tokens": [ids], "times_ns": […], …}`` (CLOCK_MONOTONIC at the end of each evaluation; the first
is the prompt's). It ends when stdin does. It calls llama.cpp's C interface, in which one ``llama_decode`` is one
evaluated graph, or llama-cpp-python's class ``Llama``, whose ``eval`` is: the prompt and N - 1 tokens after it make N
graphs.
"""

from __future__ import annotations

import argparse
import atexit
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


def _load(lib: Any, args: argparse.Namespace) -> Any:
    """Load the model and return a context for it; both are let go of at the end."""
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
    atexit.register(lib.llama_model_free, model)
    settings = lib.llama_context_default_params()
    settings.n_ctx = args.ctx
    settings.n_threads = settings.n_threads_batch = args.threads
    context = lib.llama_init_from_model(model, settings)
    if not context:
        raise SystemExit(f"libllama cannot make a context of {args.ctx} tokens")
    atexit.register(lib.llama_free, context)  # before the model
    return context


def _sampler(lib: Any, temperature: float, seed: int) -> Any:
    """Return a sampler chain: greedy at temperature 0, else the whole distribution."""
    chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
    if temperature > 0:
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_temp(temperature))
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_dist(seed))
    else:
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_greedy())
    return chain


Generator = Callable[[dict[str, Any]], dict[str, Any]]
"""Evaluates a prompt from an empty context, then token by token; returns ids and times."""


def _by_functions(interface: Interface, args: argparse.Namespace) -> Generator:
    context = _load(interface[0], args)
    return lambda request: _generate(interface, context, request)


def _by_class(args: argparse.Namespace) -> Generator:
    """Use llama-cpp-python as its README does; it has no option for repacking."""
    threads = {"n_threads": args.threads, "n_threads_batch": args.threads}
    llama = __import__("llama_cpp").Llama(model_path=args.model, n_ctx=args.ctx, verbose=False, **threads)

    def generate(request: dict[str, Any]) -> dict[str, Any]:
        llama.reset()
        if request["temperature"] > 0:
            llama.set_seed(request["seed"])
        tokens: list[int] = []
        times: list[int] = []
        start = time.monotonic_ns()
        whole = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temp": request["temperature"]}
        for token in llama.generate(request["prompt"], **whole):
            tokens.append(int(token))
            times.append(time.monotonic_ns())
            if len(tokens) == request["n_predict"]:
                break
        return {"state": "done", "tokens": tokens, "start_ns": start, "times_ns": times}

    return generate


BINDINGS: Final[dict[str, Callable[[argparse.Namespace], Generator]]] = {
    "llama_cpp_py_sync": lambda args: _by_functions(_by_cffi(), args),
    "llama_cpp": lambda args: _by_functions(_by_ctypes(), args),
    "llama_cpp.Llama": _by_class,
}
"""By package: llama-cpp-py-sync (0.8233 and later), llama-cpp-python. A null pointer of either is false."""


def _generate(interface: Interface, context: Any, request: dict[str, Any]) -> dict[str, Any]:
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
    generate = BINDINGS[args.bindings](args)
    print(json.dumps({"state": "ready", "pid": os.getpid()}), flush=True)
    for line in sys.stdin:
        print(json.dumps(generate(json.loads(line))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
