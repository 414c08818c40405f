"""A mixture's router, worked out in the sidecar: which experts would these activations choose? Bare interpreter.

A router is one small matrix: logits = W x, and the experts with the largest ones are chosen. W is in the model file;
x, the layer's normalised activations, is read from the server the moment it begins to multiply them itself. The same x
says much about the *next* layer's choice, too: a layer changes the residual stream only a little. What differs
otherwise are the weights of the two norms, which is what ``scale`` is for.

An interpreter needs milliseconds for a matrix of that size, and a library of numbers tens of megabytes of the server's
memory. So the launcher has llvmlite make a hundred bytes of machine code (:func:`machine_code`), which take
microseconds. They are handed over in a file that is only ever mapped to be read and executed.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Sequence
from typing import Any

__all__ = ["LANES", "Router", "machine_code"]

LANES = 32
"""The length of x must be a multiple of this."""

_PROT_READ, _PROT_EXEC, _MAP_PRIVATE = 1, 4, 2


def machine_code() -> bytes:
    """Return code for this machine: void (float *w, float *x, float *scale, float *out, int64 rows, int64 n).

    out[r] = sum over i of w[r n + i] x[i] scale[i]; n a multiple of :data:`LANES`, rows above 0. The order of the sum
    is not that of the server: logits agree to some parts in 10^6, so that only experts that are as good as equal can
    be told apart wrongly.

    Raises:
        ImportError: no llvmlite.
        RuntimeError: the code made is not self-contained.
    """
    import llvmlite.binding as llvm
    from llvmlite import ir

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    single, wide, vector = ir.FloatType(), ir.IntType(64), ir.VectorType(ir.FloatType(), 8)
    pointer = single.as_pointer()
    module = ir.Module("router")
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [pointer] * 4 + [wide, wide]), "logits")
    w, x, scale, out, rows, n = function.args
    entry, row, column, done, end = (function.append_basic_block() for _ in range(5))
    build = ir.IRBuilder(entry)
    zero, one = ir.Constant(wide, 0), ir.Constant(wide, 1)
    nothing = ir.Constant(vector, None)
    build.branch(row)

    build.position_at_end(row)
    r = build.phi(wide)
    r.add_incoming(zero, entry)
    first = build.mul(r, n)
    build.branch(column)

    build.position_at_end(column)
    i = build.phi(wide)
    i.add_incoming(zero, row)
    sums = [build.phi(vector) for _ in range(LANES // 8)]

    def load(base: Any, at: Any) -> Any:
        place = build.bitcast(build.gep(base, [at]), vector.as_pointer())
        value = build.load(place)
        value.align = 4
        return value

    following = []
    for number, total in enumerate(sums):
        total.add_incoming(nothing, row)
        at = build.add(i, ir.Constant(wide, 8 * number))
        scaled = build.fmul(load(x, at), load(scale, at), flags=["fast"])
        product = build.fmul(load(w, build.add(first, at)), scaled, flags=["fast"])
        following.append(build.fadd(total, product, flags=["fast"]))
        total.add_incoming(following[-1], column)
    following_i = build.add(i, ir.Constant(wide, LANES))
    i.add_incoming(following_i, column)
    build.cbranch(build.icmp_signed("<", following_i, n), column, done)

    build.position_at_end(done)
    both = following[0]
    for total in following[1:]:
        both = build.fadd(both, total, flags=["fast"])
    result = build.extract_element(both, ir.Constant(ir.IntType(32), 0))
    for lane in range(1, 8):
        more = build.extract_element(both, ir.Constant(ir.IntType(32), lane))
        result = build.fadd(result, more, flags=["fast"])
    build.store(result, build.gep(out, [r]))
    following_r = build.add(r, one)
    r.add_incoming(following_r, done)
    build.cbranch(build.icmp_signed("<", following_r, rows), row, end)
    build.position_at_end(end)
    build.ret_void()

    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=3,
        reloc="pic",
        codemodel="small",
    )
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    made = llvm.ObjectFileRef.from_data(machine.emit_object(parsed))
    sections = {bytes(section.name() or b""): section.data() for section in made.sections()}
    if any(name.startswith((b".rela.text", b".rodata")) and data for name, data in sections.items()):
        raise RuntimeError("the router's code needs data that cannot be handed over")
    return bytes(sections[b".text"])


class Router:
    """The routers of a model, and the code that multiplies.

    Args:
        fd: a file with what :func:`machine_code` returned.
        n: length of x.
        n_experts: of each layer.
        n_used: experts that a token uses in a layer.
        sigmoid: probabilities are the logits' sigmoid, not their softmax.
        groups: how many groups of neighbours the experts are in, and from how many of these they are chosen.

    Attributes:
        gap: by how much the best exceeded the best that was not chosen, the last time.
    """

    def __init__(
        self, fd: int, n: int, n_experts: int, n_used: int, *, sigmoid: bool = False, groups: Sequence[int] = (1, 1)
    ) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.mmap.argtypes = [
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_long,
        ]
        size = os.fstat(fd).st_size
        address = self._libc.mmap(None, size, _PROT_READ | _PROT_EXEC, _MAP_PRIVATE, fd, 0)
        if address == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        kind = ctypes.CFUNCTYPE(None, *(ctypes.c_void_p,) * 4, ctypes.c_int64, ctypes.c_int64)
        self._code: Any = kind(address)
        self.n, self.n_experts, self.n_used, self.sigmoid = n, n_experts, n_used, sigmoid
        self._groups, self._groups_used = groups
        self.gap = 0.0
        self._logits = (ctypes.c_float * n_experts)()

    def choose(
        self,
        weights: int,
        x: int,
        scale: int,
        bias: Sequence[float] | None = None,
        correction: Sequence[float] | None = None,
        least: float = 0.0,
    ) -> list[int]:
        """Return the ``n_used`` experts that are chosen, ascending; :attr:`gap` tells how clear the choice is.

        Args:
            weights: address of the router's float32 [n_experts, n].
            x: address of float32 [n].
            scale: address of float32 [n], what each element of x is multiplied with.
            bias: added to the logits.
            correction: added to the probabilities before the choice.
            least: by how much they must exceed the best that is not chosen; others are left out.
        """
        self._code(weights, x, scale, ctypes.addressof(self._logits), self.n_experts, self.n)
        scores: list[float] = self._logits[:]
        if bias is not None:
            scores = [score + more for score, more in zip(scores, bias, strict=True)]
        if correction is not None or self._groups > 1:
            scores = self._probabilities(scores)
        if correction is not None:
            scores = [p + more for p, more in zip(scores, correction, strict=True)]
        order = sorted(self._admitted(scores), key=scores.__getitem__, reverse=True)
        chosen = order[: self.n_used]
        if len(order) == len(chosen):
            return sorted(chosen)
        bar = scores[order[len(chosen)]]
        self.gap = scores[order[0]] - bar
        return sorted(one for one in chosen if scores[one] - bar >= least)

    def _admitted(self, scores: list[float]) -> Sequence[int]:
        """Return the experts of the groups whose two best add up to the most (DeepSeek-V3, arXiv 2412.19437, 2.1.2)."""
        size = self.n_experts // self._groups
        if self._groups == 1:
            return range(self.n_experts)
        starts = range(0, self.n_experts, size)
        best = sorted(starts, key=lambda at: sum(sorted(scores[at : at + size])[-2:]), reverse=True)
        return [expert for at in best[: self._groups_used] for expert in range(at, at + size)]

    def _probabilities(self, logits: list[float]) -> list[float]:
        most = max(logits)
        if self.sigmoid:
            return [1 / (1 + math.exp(-min(max(x, -80.0), 80.0))) for x in logits]
        powers = [math.exp(x - most) for x in logits]
        total = sum(powers)
        return [x / total for x in powers]
