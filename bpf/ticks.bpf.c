// The sidecar's clock: where in the token a server is, for a reader without BCC, numpy or privileges.
//
// Uprobes on the server's ggml, of one process. What is said is little: a graph begins, a graph ends, and an operator
// begins whose first source is a weight at which the reader asked to be woken (`wakes`). Everything is in mapped
// arrays, so that the reader changes its mind without a system call.
#include <uapi/linux/ptrace.h>

#define INLINE static __always_inline

struct tick {
    u64 ts;    // CLOCK_MONOTONIC, ns
    u32 token; // graphs so far, this one included
    u32 mark;  // number of the weight's address in marks, or TICK_BEGIN, TICK_END
    u64 value; // TICK_BEGIN: address of the graph while the layout is not known, then tokens in the batch
};
BPF_RINGBUF_OUTPUT(ticks, LT_TICK_PAGES);

// One line of the cache: what an operator's program reads and writes.
struct clock {
    u64 n_marks;
    u64 tensor_src, tensor_data; // offsets in struct ggml_tensor; 0: not known yet, only graphs are told
    u64 mark;                    // the last one seen
    u64 token;
    u64 lost; // ticks for which the ring had no room
    u64 graph_nodes, tensor_ne;
};
BPF_F_TABLE("array", u32, struct clock, clocks, 1, BPF_F_MMAPABLE);
BPF_F_TABLE("array", u32, u64, marks, LT_MARKS, BPF_F_MMAPABLE); // addresses of weights' data, sorted
BPF_F_TABLE("array", u32, u64, wakes, LT_MARKS, BPF_F_MMAPABLE); // 1: the reader is to be told

INLINE void tell(struct clock *clock, u32 mark, u64 value) {
    struct tick *tick = ticks.ringbuf_reserve(sizeof(struct tick));
    if (!tick) {
        __sync_fetch_and_add(&clock->lost, 1);
        return;
    }
    tick->ts = bpf_ktime_get_ns();
    tick->token = clock->token;
    tick->mark = mark;
    tick->value = value;
    ticks.ringbuf_submit(tick, BPF_RB_FORCE_WAKEUP);
}

// ggml_graph_compute(struct ggml_cgraph *, struct ggml_cplan *)
int on_begin(struct pt_regs *ctx) {
    u32 zero = 0;
    struct clock *clock = clocks.lookup(&zero);
    if (!clock)
        return 0;
    u64 graph = PT_REGS_PARM1(ctx), value = graph;
    if (clock->tensor_src) { // the rows of the first node's result are the tokens in the batch
        u64 nodes = 0, node = 0;
        value = 0;
        bpf_probe_read_user(&nodes, sizeof(nodes), (void *)(graph + clock->graph_nodes));
        bpf_probe_read_user(&node, sizeof(node), (void *)nodes);
        bpf_probe_read_user(&value, sizeof(value), (void *)(node + clock->tensor_ne + 8));
    }
    clock->token++;
    tell(clock, TICK_BEGIN, value);
    return 0;
}

int on_end(struct pt_regs *ctx) {
    u32 zero = 0;
    struct clock *clock = clocks.lookup(&zero);
    if (clock)
        tell(clock, TICK_END, 0);
    return 0;
}

// ggml_cpu_extra_compute_forward(params, dst), asked for every operator, or ggml_compute_forward_mul_mat(params, dst).
int on_operator(struct pt_regs *ctx) {
    u32 zero = 0, at = 0, first = 0;
    s32 ith = -1;
    bpf_probe_read_user(&ith, sizeof(ith), (void *)PT_REGS_PARM1(ctx)); // each thread comes by; the first one speaks
    struct clock *clock = ith == 0 ? clocks.lookup(&zero) : 0;
    if (!clock || !clock->tensor_src)
        return 0;
    u64 source = 0, data = 0, count = clock->n_marks;
    bpf_probe_read_user(&source, sizeof(source), (void *)(PT_REGS_PARM2(ctx) + clock->tensor_src));
    bpf_probe_read_user(&data, sizeof(data), (void *)(source + clock->tensor_data));
#pragma unroll
    for (int step = 1 << (LT_MARK_STEPS - 1); step; step >>= 1) {
        u32 next = at + step;
        u64 *mark = next < count ? marks.lookup(&next) : 0;
        if (mark && *mark <= data)
            at = next;
    }
    u64 *mark = marks.lookup(&at), *wake = wakes.lookup(&at);
    if (!mark || *mark != data)
        return 0;
    clock->mark = at;
    if (wake && *wake)
        tell(clock, at, 0);
    return 0;
}
