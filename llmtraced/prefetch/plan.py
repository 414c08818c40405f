"""The access plan: which bytes of the model a token uses, in order.

Learned from a trace (:mod:`llmtraced.analysis.plan`) or taken from the compute graph of a running server, which has
the whole sequence before the first operator runs (:func:`from_graph`). docs/prefetching.md describes the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

from llmtraced.errors import LlmtracedError, printable
from llmtraced.ggml_layout import Graph, Layout
from llmtraced.gguf_map import Model, Tensor

__all__ = ["VERSION", "Entry", "Plan", "c_header", "from_graph", "from_tensors", "load"]

VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class Entry:
    """One use of a tensor.

    Attributes:
        step: position in the token's sequence, from 0; rises by one an entry.
        tensor_name, layer, component, shard, offset_bytes, size_bytes: as in the tensor map.
        whole: every byte is used (else single rows or experts: which ones is not known before).
        when: share of the token's time (0 to 1) at which it is reached, null where that is not known.
    """

    step: int
    tensor_name: str
    layer: int
    component: str
    shard: int
    offset_bytes: int
    size_bytes: int
    whole: bool
    when: float | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """The learned sequence of one model.

    Attributes:
        model: label of the model (file name of its first shard).
        fingerprint: of the model (gguf_map.Model): a plan is for this model only.
        source: ``graph``, ``ops``, ``faults``, ``pagecache`` (what it was learned from) or ``map`` (assumed).
        tokens: how many tokens it was learned from.
        bytes_per_token: sum over the entries that are used whole, each tensor once.
        entries: in order.
    """

    model: str
    fingerprint: str
    source: str
    tokens: int
    entries: tuple[Entry, ...]

    @property
    def bytes_per_token(self) -> int:
        """Bytes of tensors that each token uses whole, each once."""
        return sum({(e.shard, e.offset_bytes): e.size_bytes for e in self.entries if e.whole}.values())

    def to_json(self) -> dict[str, Any]:
        """Return the plan as it is written to a file."""
        return {
            "version": VERSION,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "source": self.source,
            "tokens": self.tokens,
            "bytes_per_token": self.bytes_per_token,
            "entries": [asdict(entry) for entry in self.entries],
        }


def load(path: Path) -> Plan:
    """Read a plan.

    Raises:
        LlmtracedError: unreadable, not a plan, or of a newer version.
    """
    name = printable(str(path))
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise LlmtracedError(f"{name}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise LlmtracedError(f"{name}: not a plan: {error}") from error
    try:
        if data["version"] > VERSION:
            raise LlmtracedError(f"{name}: a plan of version {data['version']}, this llmtraced reads up to {VERSION}")
        entries = tuple(_entry(one) for one in data["entries"])
        return Plan(str(data["model"]), str(data["fingerprint"]), str(data["source"]), int(data["tokens"]), entries)
    except (KeyError, TypeError, ValueError) as error:
        raise LlmtracedError(f"{name}: not a plan: {error!r}") from error


def _entry(one: Mapping[str, Any]) -> Entry:
    entry = Entry(**{field.name: one[field.name] for field in fields(Entry)})
    if type(entry.tensor_name) is not str or type(entry.whole) is not bool:
        raise ValueError(f"an entry of {entry.tensor_name!r}, whole {entry.whole!r}")
    numbers = (entry.step, entry.layer, entry.shard, entry.offset_bytes, entry.size_bytes)
    if any(type(n) is not int for n in numbers) or min(entry.offset_bytes, entry.shard) < 0 or entry.size_bytes <= 0:
        raise ValueError(f"an entry with {numbers}")
    return entry


def _uses(tensors: Sequence[tuple[Tensor, bool]]) -> tuple[Entry, ...]:
    return tuple(
        Entry(step, t.name, t.layer, t.component, t.shard, t.offset, t.size, whole)
        for step, (t, whole) in enumerate(tensors)
    )


def from_graph(label: str, model: Model, graph: Graph, layout: Layout, tokens: int = 1) -> Plan:
    """Return the plan that a compute graph says: every weight among its nodes' sources, in the order of evaluation.

    Args:
        label: of the model.
        model: whose weights they are.
        graph: read from the server.
        layout: by which it was read; tells which operators use all of a matrix.
        tokens: how many graphs agreed.
    """
    by_name = {tensor.name: tensor for tensor in model.tensors}
    uses: list[tuple[Tensor, bool]] = []
    for node in graph.nodes:
        for place, source in enumerate(node.sources):
            name = graph.weights.get(source, ("", 0))[0]
            tensor = by_name.get(name)
            if tensor is None:
                continue
            # A matrix that is the first source of anything but a multiplication is looked up: single rows are used.
            looked_up = place == 0 and node.op != layout.op_mul_mat and len(tensor.shape) > 1
            uses.append((tensor, not looked_up and not tensor.n_experts))
    return Plan(label, model.fingerprint, "graph", tokens, _uses(uses))


def from_tensors(label: str, model: Model) -> Plan:
    """Return a plan without any observation: all tensors once, in file order, the embedding table looked up."""
    tied = not any(tensor.name == "output.weight" for tensor in model.tensors)
    uses = [(t, not t.n_experts and (tied or t.name != "token_embd.weight")) for t in model.tensors]
    return Plan(label, model.fingerprint, "map", 0, _uses(uses))


def c_header(plan: Plan) -> str:
    """Return the plan as a C array of name, offset and size (a shard's own offset, where a model is split)."""
    lines = [
        f"/* {_comment(plan.model)}, {plan.fingerprint}: learned from {plan.source}, {plan.tokens} tokens. */",
        "#ifndef LLMTRACED_PLAN_H",
        "#define LLMTRACED_PLAN_H",
        "#include <stdint.h>",
        "",
        "struct llmtraced_access {",
        "    const char *name;",
        "    uint64_t offset; /* bytes from the start of the file */",
        "    uint64_t size;   /* bytes */",
        "};",
        "",
        f"#define LLMTRACED_ACCESSES {len(plan.entries)}",
        "",
        "static const struct llmtraced_access llmtraced_plan[] = {",
        *(f'    {{"{_c_string(e.tensor_name)}", {e.offset_bytes}ULL, {e.size_bytes}ULL}},' for e in plan.entries),
        "};",
        "#endif",
    ]
    return "\n".join(lines) + "\n"


def _comment(text: str) -> str:
    return re.sub(r"\*/|/\*", "__", printable(text, 4096))


def _c_string(text: str) -> str:
    """Return ``text`` for between quotes in C: whatever is not plain ASCII as octal, and no trigraphs."""
    plain = re.compile(rb"[ -!#->@-\[\]-~]")  # not ", ? or backslash
    raw = text.encode("utf-8", "surrogateescape")
    return "".join(chr(b) if plain.fullmatch(bytes([b])) else f"\\{b:03o}" for b in raw)
