// The sidecar's clock: where in the token a server is, for a reader without BCC, numpy or privileges.
//
// Uprobes on the server's ggml, of one process. What is said is little: a graph begins, a graph ends, and an operator
// begins whose first source is a weight at which the reader asked to be woken (`wakes`). Of some (a mixture's
// routers) the input, too, and of a merged matrix of experts, which of them are used. Everything is in mapped arrays,
// so that the reader changes its mind without a system call.
#include <uapi/linux/ptrace.h>

#define INLINE static __always_inline

struct tick {
    u64 ts;    // CLOCK_MONOTONIC, ns
    u32 token; // graphs so far, this one included
    u32 mark;  // number of the weight's address in marks, or TICK_BEGIN, TICK_END
    u64 value; // TICK_BEGIN: address of the graph while the layout is not known, then tokens in the batch, and << 32
               // those with outputs; TICK_END: operators with weights in marks: 0 where the graph is another model's;
               // an input: its address, and from bit 48 on its rows; experts: how many a row, and << 32 rows
};

struct input {
    struct tick tick;
    u32 values[TICK_WIDTH]; // float32; a batch of one token only. It is there now; microseconds later it may not be
};

struct choice {
    struct tick tick;
    s32 experts[TICK_ROWS * TICK_EXPERTS]; // of the first rows, if each has few enough
};
BPF_RINGBUF_OUTPUT(ticks, LT_TICK_PAGES);

struct clock {
    u64 n_marks;
    u64 tensor_src, tensor_data; // offsets in struct ggml_tensor; 0: not known yet, only graphs are told
    u64 mark;                    // the last one seen
    u64 token;
    u64 lost; // ticks for which the ring had no room
    u64 graph_nodes, tensor_ne, tensor_nb;
    u64 graph_n_nodes;
    u64 nothing; // 0, which the verifier does not know: it would follow every single way through the search
    u64 hits;    // operators of this graph with weights in marks
};
BPF_F_TABLE("array", u32, struct clock, clocks, 1, BPF_F_MMAPABLE);
BPF_F_TABLE("array", u32, u64, marks, LT_MARKS, BPF_F_MMAPABLE); // addresses of weights' data, sorted
BPF_F_TABLE("array", u32, u64, wakes, LT_MARKS, BPF_F_MMAPABLE); // 0, or what the reader is to be told

INLINE void fill(struct tick *tick, struct clock *clock, u32 mark, u64 value) {
    tick->ts = bpf_ktime_get_ns();
    tick->token = clock->token;
    tick->mark = mark;
    tick->value = value;
}

INLINE void tell(struct clock *clock, u32 mark, u64 value) {
    struct tick *tick = ticks.ringbuf_reserve(sizeof(struct tick));
    if (!tick) {
        __sync_fetch_and_add(&clock->lost, 1);
        return;
    }
    fill(tick, clock, mark, value);
    ticks.ringbuf_submit(tick, BPF_RB_FORCE_WAKEUP);
}

// An operator over a merged matrix of experts: its third source is which of them, one row a token of the batch.
INLINE void tell_experts(struct clock *clock, u32 mark, u64 node) {
    u64 which = 0, from = 0, stride = 0, shape[2] = {};
    bpf_probe_read_user(&which, sizeof(which), (void *)(node + clock->tensor_src + 16));
    bpf_probe_read_user(&from, sizeof(from), (void *)(which + clock->tensor_data));
    bpf_probe_read_user(&shape, sizeof(shape), (void *)(which + clock->tensor_ne));
    bpf_probe_read_user(&stride, sizeof(stride), (void *)(which + clock->tensor_nb + 8));
    if (shape[0] > TICK_EXPERTS || shape[1] > TICK_ROWS) { // a prompt: as good as all of them
        tell(clock, mark, shape[0] & 0xFFFFFFFF | shape[1] << 32);
        return;
    }
    struct choice *choice = ticks.ringbuf_reserve(sizeof(struct choice));
    if (!choice) {
        __sync_fetch_and_add(&clock->lost, 1);
        return;
    }
    fill(&choice->tick, clock, mark, shape[0] | shape[1] << 32);
    // All rows that could be, as long as they could be: what is more than there are is not looked at, and a branch for
    // each would be too many paths for the verifier.
#pragma unroll
    for (int row = 0; row < TICK_ROWS; row++)
        bpf_probe_read_user(&choice->experts[row * TICK_EXPERTS], TICK_EXPERTS * 4, (void *)(from + row * stride));
    ticks.ringbuf_submit(choice, BPF_RB_FORCE_WAKEUP);
}

INLINE void tell_input(struct clock *clock, u32 mark, u64 where, u64 width, u64 rows) {
    u64 value = (where & 0xFFFFFFFFFFFF) | (rows < 0xFFFF ? rows : 0xFFFF) << 48;
    if (rows != 1 || width != TICK_WIDTH) {
        tell(clock, mark, value);
        return;
    }
    struct input *input = ticks.ringbuf_reserve(sizeof(struct input));
    if (!input) {
        __sync_fetch_and_add(&clock->lost, 1);
        return;
    }
    fill(&input->tick, clock, mark, value);
    bpf_probe_read_user(input->values, sizeof(input->values), (void *)where);
    ticks.ringbuf_submit(input, BPF_RB_FORCE_WAKEUP);
}

// Rows of the result of the node whose address is at `at`: of a graph's first one they are the tokens in the batch, of
// its last one those with outputs.
INLINE u64 rows_of(struct clock *clock, u64 at) {
    u64 node = 0, rows = 0;
    bpf_probe_read_user(&node, sizeof(node), (void *)at);
    bpf_probe_read_user(&rows, sizeof(rows), (void *)(node + clock->tensor_ne + 8));
    return rows & 0xFFFFFFFF;
}

// ggml_graph_compute(struct ggml_cgraph *, struct ggml_cplan *)
int on_begin(struct pt_regs *ctx) {
    u32 zero = 0;
    struct clock *clock = clocks.lookup(&zero);
    if (!clock)
        return 0;
    u64 graph = PT_REGS_PARM1(ctx), value = graph;
    if (clock->tensor_src) {
        u64 nodes = 0;
        u32 n_nodes = 0;
        bpf_probe_read_user(&nodes, sizeof(nodes), (void *)(graph + clock->graph_nodes));
        bpf_probe_read_user(&n_nodes, sizeof(n_nodes), (void *)(graph + clock->graph_n_nodes));
        value = n_nodes ? rows_of(clock, nodes) | rows_of(clock, nodes + (n_nodes - 1) * 8ULL) << 32 : 0;
    }
    clock->hits = 0;
    clock->token++;
    tell(clock, TICK_BEGIN, value);
    return 0;
}

int on_end(struct pt_regs *ctx) {
    u32 zero = 0;
    struct clock *clock = clocks.lookup(&zero);
    if (clock)
        tell(clock, TICK_END, clock->hits);
    return 0;
}

// ggml_cpu_extra_compute_forward(params, dst), asked for every operator, or ggml_compute_forward_mul_mat(params, dst).
int on_operator(struct pt_regs *ctx) {
    u32 zero = 0;
    s32 ith = -1;
    bpf_probe_read_user(&ith, sizeof(ith), (void *)PT_REGS_PARM1(ctx)); // each thread comes by; the first one speaks
    struct clock *clock = ith == 0 ? clocks.lookup(&zero) : 0;
    if (!clock || !clock->tensor_src)
        return 0;
    u32 at = clock->nothing;
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
    clock->hits++; // only the first thread of the one pool comes here
    u64 node = PT_REGS_PARM2(ctx), kind = wake ? *wake : 0;
    if (kind == WAKE_EXPERTS) {
        tell_experts(clock, at, node);
    } else if (kind == WAKE_INPUT) {
        u64 input = 0, where = 0, rows = 0, width = 0;
        bpf_probe_read_user(&input, sizeof(input), (void *)(node + clock->tensor_src + 8));
        bpf_probe_read_user(&where, sizeof(where), (void *)(input + clock->tensor_data));
        bpf_probe_read_user(&rows, sizeof(rows), (void *)(input + clock->tensor_ne + 8));
        bpf_probe_read_user(&width, sizeof(width), (void *)(input + clock->tensor_ne));
        tell_input(clock, at, where, width, rows);
    } else if (kind) {
        tell(clock, at, 0);
    }
    return 0;
}
