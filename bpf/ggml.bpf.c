// What ggml computes: graph evaluations (the token clock), operators with their weights, and the experts chosen.
//
// Uprobes on the traced process's own ggml. Where fields lie in ggml_tensor and ggml_cgraph differs from build to
// build: user space works it out from the first graph (llmtraced/ggml_layout.py) and writes it into the slot. Until
// then only the clock runs.

// Follow graph->nodes[i]->ne[1], the rows of a node's result; 0 if something cannot be read.
INLINE u64 node_rows(struct slot *slot, u64 nodes, s64 i) {
    u64 node = 0, rows = 0;
    bpf_probe_read_user(&node, sizeof(node), (void *)(nodes + i * 8));
    bpf_probe_read_user(&rows, sizeof(rows), (void *)(node + slot->tensor_ne + 8));
    return rows;
}

// ggml_graph_compute(struct ggml_cgraph *, struct ggml_cplan *)
int on_graph(struct pt_regs *ctx) {
    u32 number = 0;
    struct slot *slot = current_slot(&number);
    if (!slot)
        return 0;
    u64 graph = PT_REGS_PARM1(ctx), tokens = 0, outputs = 0, nodes = 0, now = bpf_ktime_get_ns();
    s32 n_nodes = 0;
    if (slot->layout) {
        bpf_probe_read_user(&n_nodes, sizeof(n_nodes), (void *)(graph + slot->graph_n_nodes));
        bpf_probe_read_user(&nodes, sizeof(nodes), (void *)(graph + slot->graph_nodes));
        if (n_nodes > 0) {
            tokens = node_rows(slot, nodes, 0);
            outputs = node_rows(slot, nodes, n_nodes - 1);
        }
        // Each token of a decode batch wants its logits; of a prompt only the last does.
        slot->phase = tokens == outputs ? PHASE_DECODE : PHASE_PROMPT;
    } else if (slot->token) {
        slot->phase = PHASE_UNKNOWN; // the very first graph is the warm-up, part of the load
    }
    slot->graph_start = now;
    __sync_fetch_and_add(&slot->token, 1);
    u64 phase = slot->phase;
    if (phase < PHASE_COUNT)
        __sync_fetch_and_add(&slot->tokens[phase], tokens);
    u32 epoch = current_epoch();
    count(number, epoch, PROBE_TOKENS, 1);
    struct event *event = reserve(number, epoch, PROBE_TOKENS, 1);
    if (!event)
        return 0;
    stamp(event, bpf_get_current_pid_tgid(), now, slot, number, epoch, KIND_TOKEN, 0);
    event->a = graph;
    event->b = (tokens & 0xffffffff) | outputs << 32;
    event->c = (u32)n_nodes;
    event->d = slot->stall_ns;
    if (slot->layout)
        submit(event);
    else
        ring.ringbuf_submit(event, BPF_RB_FORCE_WAKEUP); // user space is to look at this graph while it is there
    return 0;
}

// What the first thread of a graph evaluation is computing. Hit hundreds of times a token, so nothing is looked up or
// copied twice: the operator's struct ggml_tensor is read in one go and taken apart when the operator has ended.
struct op {
    u64 since; // 0: none
    u32 process, slot;
    u8 tensor[LT_TENSOR_BYTES];
};
BPF_TABLE("lru_hash", u32, struct op, ops, LT_SLOTS * 16); // thread -> its operator
BPF_ARRAY(no_op, struct op, 1);                            // zeros, larger than a program's stack should hold

INLINE u64 tensor_u64(struct op *op, u64 offset) {
    return *(u64 *)(op->tensor + (offset & (LT_TENSOR_BYTES - 8)));
}

INLINE u32 tensor_op(struct op *op, struct slot *slot) {
    return *(u32 *)(op->tensor + (slot->tensor_op & (LT_TENSOR_BYTES - 4)));
}

INLINE void end_op(u64 task, struct slot *slot, struct op *op, u64 now) {
    if (!op->since)
        return;
    u32 epoch = current_epoch(), number = op->slot;
    count(number, epoch, PROBE_OPS, 1);
    struct event *event = reserve(number, epoch, PROBE_OPS, 1);
    if (event) {
        stamp(event, task, op->since, slot, number, epoch, KIND_OP, 0);
        event->a = tensor_u64(op, slot->tensor_src);
        event->b = tensor_u64(op, slot->tensor_src + 8);
        event->c = now - op->since;
        event->d = tensor_op(op, slot) | tensor_u64(op, slot->tensor_ne + 8) << 32; // its rows
        submit(event);
    }
    op->since = 0;
}

int on_graph_return(struct pt_regs *ctx) {
    u32 number = 0;
    struct slot *slot = current_slot(&number);
    if (!slot || !slot->graph_start)
        return 0;
    u64 task = bpf_get_current_pid_tgid(), now = bpf_ktime_get_ns();
    u32 thread = task;
    struct op *last = ops.lookup(&thread);
    if (last && last->process == task >> 32)
        end_op(task, slot, last, now);
    __sync_fetch_and_add(&slot->eval_ns, now - slot->graph_start);
    u32 epoch = current_epoch();
    count(number, epoch, PROBE_TOKENS, 1);
    struct event *event = reserve(number, epoch, PROBE_TOKENS, 1);
    if (!event)
        return 0;
    stamp(event, bpf_get_current_pid_tgid(), now, slot, number, epoch, KIND_TOKEN_END, 0);
    event->a = 0;
    event->b = now - slot->graph_start;
    event->c = 0;
    event->d = slot->stall_ns;
    submit(event);
    return 0;
}

// Each thread of the pool calls an operator; the first (params->ith, its first field) speaks for all. That is asked
// before anything else: the others should be gone at once.
INLINE bool first_thread(struct pt_regs *ctx) {
    s32 ith = -1;
    bpf_probe_read_user(&ith, sizeof(ith), (void *)PT_REGS_PARM1(ctx));
    return ith == 0;
}

// The thread's entry, made with its first operator; 0 if the process is not traced (any more).
INLINE struct op *current_op(u64 task) {
    u32 thread = task, process = task >> 32;
    struct op *op = ops.lookup(&thread);
    if (op && op->process == process)
        return op;
    u32 *number = targets.lookup(&process);
    if (!number)
        return 0;
    if (!op) {
        u32 key = 0;
        struct op *none = no_op.lookup(&key);
        if (none)
            ops.update(&thread, none);
        op = ops.lookup(&thread);
        if (!op)
            return 0;
    }
    op->since = 0;
    op->process = process;
    op->slot = *number;
    return op;
}

INLINE struct slot *slot_of(struct op *op) {
    u32 number = op->slot;
    struct slot *slot = slots.lookup(&number);
    return slot && slot->layout && slot->process == op->process ? slot : 0;
}

// The operator at dst if it is to be recorded: its struct ggml_tensor is then in the entry.
INLINE bool read_op(struct slot *slot, struct op *op, u64 dst) {
    u32 kind = 0;
    if (slot->detail < DETAIL_FULL) { // most operators are none of ours: a word tells
        bpf_probe_read_user(&kind, sizeof(kind), (void *)(dst + slot->tensor_op));
        if (kind != slot->op_mul_mat && (!slot->op_mul_mat_id || kind != slot->op_mul_mat_id))
            return false;
    }
    return !bpf_probe_read_user(op->tensor, LT_TENSOR_READ, (void *)dst);
}

// ggml_cpu_extra_compute_forward(params, dst), which ggml asks first for every operator, whoever computes it: one
// probe sees them all. An operator ends where the thread's next begins, so its time includes waiting for the others.
int on_any_op(struct pt_regs *ctx) {
    if (!first_thread(ctx))
        return 0;
    u64 task = bpf_get_current_pid_tgid(), now = 0;
    struct op *op = current_op(task);
    struct slot *slot = op ? slot_of(op) : 0;
    if (!slot)
        return 0;
    if (op->since) {
        now = bpf_ktime_get_ns();
        end_op(task, slot, op, now);
    }
    if (read_op(slot, op, PT_REGS_PARM2(ctx)))
        op->since = now ? now : bpf_ktime_get_ns();
    return 0;
}

// ggml_compute_forward_mul_mat(const struct ggml_compute_params *, struct ggml_tensor *dst)
int on_mul_mat(struct pt_regs *ctx) {
    if (!first_thread(ctx))
        return 0;
    struct op *op = current_op(bpf_get_current_pid_tgid());
    struct slot *slot = op ? slot_of(op) : 0;
    if (slot && read_op(slot, op, PT_REGS_PARM2(ctx)))
        op->since = bpf_ktime_get_ns();
    return 0;
}

int on_mul_mat_return(struct pt_regs *ctx) {
    u64 task = bpf_get_current_pid_tgid();
    u32 thread = task;
    struct op *op = ops.lookup(&thread);
    struct slot *slot = op && op->since && op->process == task >> 32 ? slot_of(op) : 0;
    if (slot)
        end_op(task, slot, op, bpf_ktime_get_ns());
    return 0;
}

INLINE bool starts_with_moe(char *name, char *rest, int n) {
    char moe[8] = {'f', 'f', 'n', '_', 'm', 'o', 'e', '_'};
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (name[i] != moe[i])
            return false;
#pragma unroll
    for (int i = 0; i < n; i++)
        if (name[8 + i] != rest[i])
            return false;
    return true;
}

#define IDS_PER_RECORD 12

// ggml_compute_forward_get_rows(params, dst): picks the chosen experts' weights out of the router's probabilities,
// after the choice and before the expert matrices are touched. dst "ffn_moe_weights-N", src[1] "ffn_moe_topk-N": i32
// ids, ne[0] experts for each of ne[1] positions, rows nb[1] bytes apart.
int on_get_rows(struct pt_regs *ctx) {
    u32 number = 0;
    struct slot *slot = first_thread(ctx) ? current_slot(&number) : 0;
    if (!slot || !slot->layout)
        return 0;
    u64 topk = 0, ne[2] = {}, nb[2] = {}, data = 0;
    char name[24] = {}, is_weights[7] = {'w', 'e', 'i', 'g', 'h', 't', 's'}, is_topk[4] = {'t', 'o', 'p', 'k'};
    u64 dst = PT_REGS_PARM2(ctx);
    bpf_probe_read_user(&name, sizeof(name), (void *)(dst + slot->tensor_name));
    if (!starts_with_moe(name, is_weights, 7))
        return 0;
    bpf_probe_read_user(&topk, sizeof(topk), (void *)(dst + slot->tensor_src + 8));
    bpf_probe_read_user(&name, sizeof(name), (void *)(topk + slot->tensor_name));
    if (!starts_with_moe(name, is_topk, 4) || name[12] != '-')
        return 0;
    u64 layer = 0;
#pragma unroll
    for (int i = 13; i < 17; i++) {
        if (name[i] < '0' || name[i] > '9')
            break;
        layer = layer * 10 + (name[i] - '0');
    }
    bpf_probe_read_user(&ne, sizeof(ne), (void *)(topk + slot->tensor_ne));
    bpf_probe_read_user(&nb, sizeof(nb), (void *)(topk + slot->tensor_nb));
    bpf_probe_read_user(&data, sizeof(data), (void *)(topk + slot->tensor_data));
    u64 now = bpf_ktime_get_ns();
    u32 epoch = current_epoch();
    u64 chunks = (ne[0] + IDS_PER_RECORD - 1) / IDS_PER_RECORD, records = chunks * ne[1];
    count(number, epoch, PROBE_ROUTING, records);
    LOOP for (u32 i = 0; i < LT_ROUTE_RECORDS; i++) {
        if (i >= records)
            break;
        u64 position = i / chunks, chunk = i % chunks; // not counted up, so that the verifier sees one state
        struct event *event = reserve(number, epoch, PROBE_ROUTING, 1);
        if (event) {
            s32 ids[IDS_PER_RECORD] = {};
            u64 left = ne[0] - chunk * IDS_PER_RECORD;
            u32 n = left < IDS_PER_RECORD ? left : IDS_PER_RECORD;
            if (n <= IDS_PER_RECORD)
                bpf_probe_read_user(&ids, n * 4, (void *)(data + position * nb[1] + chunk * IDS_PER_RECORD * 4));
            stamp(event, bpf_get_current_pid_tgid(), now, slot, number, epoch, KIND_ROUTE, n);
            u64 packed[3] = {};
#pragma unroll
            for (int j = 0; j < IDS_PER_RECORD; j++)
                packed[j / 4] |= (u64)(ids[j] & 0xffff) << (j % 4 * 16);
            event->a = position | layer << 32;
            event->b = packed[0];
            event->c = packed[1];
            event->d = packed[2];
            submit(event);
        }
    }
    // A batch larger than one program may loop over: what is left out is accounted for, not forgotten.
    struct account *account = account_of(number, epoch, PROBE_ROUTING);
    if (account && records > LT_ROUTE_RECORDS)
        __sync_fetch_and_add(&account->dropped, records - LT_ROUTE_RECORDS);
    return 0;
}
