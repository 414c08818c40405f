"""Operators of a made-up engine, whose every call is known: by matrices alone, by the hook for all, by mul_mat."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from llmtraced import elf
from llmtraced.probes.tracer import Tracer
from llmtraced.schema import Detail, Kind, Phase, Probe
from llmtraced.target import Symbol

pytestmark = pytest.mark.kernel

GRAPHS, OPERATORS = 13, 37  # primes; 37 is not a multiple of what becomes records at once
MUL_MAT, ADD = 29, 2
HOOK = "ggml_cpu_extra_compute_forward"
FUSED = "ggml_compute_forward_rms_norm_mul_fused"
METHOD = "_ZN4ggml3cpu6repack13tensor_traitsI4testE15compute_forwardEP19ggml_compute_paramsP11ggml_tensor"

# Each graph is evaluated by THREADS threads, of which one calls ggml_graph_compute; all call every operator. Operator i
# is a matrix if i is even (repacked if i % 4 == 0), else an addition; its first source is 1000 * caller + i. Two more
# are computed together, without asking.
SOURCE = f"""
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
typedef struct {{ char data[512]; }} tensor;
#define FIELD(t, type, offset) (*(type *)((t)->data + (offset)))
#define FUNCTION __attribute__((noinline, used)) int
#define BODY {{ __asm__ volatile("push %%rbx; pop %%rbx" ::: "memory", "rbx"); return 0; }}
FUNCTION ggml_compute_forward_mul_mat(void *params, tensor *dst) BODY
FUNCTION method(void *self, void *params, tensor *dst) __asm__("{METHOD}");
FUNCTION method(void *self, void *params, tensor *dst) BODY
FUNCTION {HOOK}(void *params, tensor *dst) {{
    __asm__ volatile("" ::: "rbx");
    return FIELD(dst, unsigned long, 152) % 1000 % 4 == 0 ? method(0, params, dst), 1 : 0;
}}
FUNCTION {FUSED}(void *params, tensor *norm, tensor *mul) BODY
static int cut; // end in the middle of the next graph
static void operators(tensor *t, int ith) {{
    for (int i = 0; i < {OPERATORS}; i++) {{
        int params[4] = {{ith}};
        if (!{HOOK}(params, t + i) && i % 2 == 0)
            ggml_compute_forward_mul_mat(params, t + i);
        if (cut && i == 20 && ith == 0) {{ puts("cut"); fflush(stdout); getchar(); _exit(0); }}
    }}
    int params[4] = {{ith}};
    {FUSED}(params, t + {OPERATORS}, t + {OPERATORS} + 1);
}}
static void *helper(void *t) {{ operators(t, 1); return 0; }}
FUNCTION ggml_graph_compute(tensor *t) {{
    pthread_t other;
    pthread_create(&other, 0, helper, t);
    operators(t, 0);
    pthread_join(other, 0);
    return 0;
}}
static void *caller(void *number) {{
    tensor *t = calloc({OPERATORS} + 2, sizeof(tensor));
    for (int i = 0; i < {OPERATORS} + 2; i++) {{
        FIELD(t + i, long, 24) = i + 1;
        FIELD(t + i, int, 80) = i % 2 || i > {OPERATORS} ? {ADD} : {MUL_MAT};
        FIELD(t + i, long, 152) = 1000 * (long)number + i;
        FIELD(t + i, long, 160) = 7;
    }}
    for (int i = 0; i < {GRAPHS}; i++)
        ggml_graph_compute(t);
    return 0;
}}
int main(int argc, char **argv) {{
    int callers = atoi(argv[1]);
    pthread_t threads[8];
    cut = 0;
    getchar();
    for (long i = 0; i < callers; i++) pthread_create(threads + i, 0, caller, (void *)(i + 1));
    for (int i = 0; i < callers; i++) pthread_join(threads[i], 0);
    puts("done"); fflush(stdout);
    getchar();
    cut = 1;
    caller((void *)9);
    return 0;
}}
"""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    (folder / "engine.c").write_text(SOURCE)
    command = ["cc", "-O1", "-fno-omit-frame-pointer", "-pthread", "-o", folder / "engine", folder / "engine.c"]
    subprocess.run(command, check=True)
    return folder / "engine"


def run(
    engine: Path, detail: Detail, hidden: tuple[str, ...], callers: int, cut: bool
) -> tuple[set[str], NDArray, int]:  # type: ignore[type-arg]
    """Return what was attached, the operators' records, and how many the kernel counted (none is dropped)."""
    found = elf.functions(str(engine), b"ggml_", b"_ZN4ggml3cpu")
    symbols = {name: Symbol(str(engine), offset) for name, offset in found.items() if name not in hidden}
    tracer = Tracer()
    with subprocess.Popen([engine, str(callers)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin
        assert child.stdout
        slot = tracer.add_process(child.pid, Phase.UNKNOWN)
        one = tracer.slots[slot : slot + 1]
        one["tensor_op"], one["tensor_ne"], one["tensor_src"], one["op_mul_mat"] = 80, 16, 152, MUL_MAT
        one["layout"] = 1
        tracer.set_detail(slot, detail, symbols)
        attached = set(tracer.uprobes(slot))
        for answer in ("done\n", "cut\n") if cut else ("done\n",):
            child.stdin.write("\n")
            child.stdin.flush()
            assert child.stdout.readline() == answer
        tracer.remove_process(slot)
        records = np.concatenate(tracer.read())
        account = tracer.account(slot, tracer.epoch)[Probe.OPS]
        pid = child.pid
        child.kill()
    tracer.close()
    records = records[records["kind"] == Kind.OP]
    assert set(records["pid"]) == {pid}
    assert account["dropped"] == 0
    return attached, records, int(account["counted"])


MATRICES = list(range(0, OPERATORS, 2))
ALONE = "uprobe ggml_compute_forward_mul_mat and methods"
WAYS = {
    "matrices": (Detail.OPS, (), MATRICES),
    "hook": (Detail.OPS, (METHOD,), MATRICES),  # a build whose methods have no symbol
    "mul_mat": (Detail.OPS, (METHOD, HOOK), [i for i in MATRICES if i % 4]),
    "full": (Detail.FULL, (), list(range(OPERATORS + 2))),
    "full, nothing fused": (Detail.FULL, (FUSED,), list(range(OPERATORS))),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("callers", [1, 5])
def test_each_operator_of_each_graph_once(engine: Path, way: str, callers: int) -> None:
    """Also of graphs that several threads of a process evaluate at the same time; of the first thread, in order."""
    detail, hidden, expected = WAYS[way]
    attached, records, counted = run(engine, detail, hidden, callers, cut=False)
    assert (ALONE in attached) == (way == "matrices")
    assert counted == len(records) == callers * GRAPHS * len(expected)
    assert len(set(records["tid"])) == callers
    for thread in set(records["tid"]):
        mine = records[records["tid"] == thread]
        number = int(mine["a"][0]) // 1000
        assert mine["a"].tolist() == [1000 * number + i for i in expected] * GRAPHS
        kinds = [ADD if i % 2 or i > OPERATORS else MUL_MAT for i in expected]
        assert mine["d"].tolist() == [kind | (i + 1) << 32 for kind, i in zip(kinds, expected, strict=True)] * GRAPHS
        assert (mine["b"] == 7).all()
        first = mine["a"] % 1000 == OPERATORS  # of the two together: the time of both is the second's
        assert ((mine["c"] > 0) == ~first).all()
        assert ((np.diff(mine["ts"].astype(np.int64)) > 0) == ~first[:-1]).all()
        assert (mine["ts"][1:] >= mine["ts"][:-1] + mine["c"][:-1]).all(), "an operator ends before the next begins"


@pytest.mark.parametrize("way", ["matrices", "full"])
def test_a_graph_that_is_cut_off(engine: Path, way: str) -> None:
    """What waited to become records is delivered when the process is removed, and counted."""
    detail, hidden, expected = WAYS[way]
    _, records, counted = run(engine, detail, hidden, 1, cut=True)
    done = [i for i in expected if i < 20]
    assert counted == len(records) == GRAPHS * len(expected) + len(done)
    assert records["a"][-len(done) :].tolist() == [9000 + i for i in done]
