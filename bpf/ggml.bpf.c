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

// The slot of the process whose function this is: user space attaches with its number as cookie, which saves a look-up
// in a hash map. 0 for a process that shares the memory of one that is traced (vfork).
INLINE struct slot *probed_slot(struct pt_regs *ctx, u64 task, u32 *number) {
    *number = bpf_get_attach_cookie(ctx) & (LT_SLOTS - 1);
    struct slot *slot = slots.lookup(number);
    return slot && slot->process == task >> 32 ? slot : 0;
}

// A thread that evaluates a graph: what it is computing, and the operators that it is done with. LT_OPS of them
// together become records, since reserving and submitting one touches half a dozen lines of the processor's cache. The
// thread that calls ggml_graph_compute is the first of the pool and speaks for all; the others find no entry and are
// gone at once: that is asked without a helper, for the code of each is not in the cache either.
struct op_record {
    struct event event;
    u64 header; // of the next record in the ring
};
struct op {
    u64 thread; // 0: the entry is free
    u64 since;  // of the operator being computed; 0: none
    u32 more;   // a thread whose place this is had to take one of the next
    u32 slot;
    u32 done;  // records that wait; the next one has been begun where since is not 0
    u32 epoch; // of those that wait
    u64 spares[4];
    struct op_record records[LT_OPS];
};
BPF_F_TABLE("array", u32, struct op, ops, LT_OP_THREADS, BPF_F_MMAPABLE);
#define OP_PLACES 8 // a thread is in one of that many, the first of which its number's last bits give

// The thread's entry, if it evaluates a graph of a traced process.
INLINE struct op *current_op(u32 thread) {
    u32 key = thread & (LT_OP_THREADS - 1);
    struct op *op = ops.lookup(&key);
    if (!op || op->thread == thread)
        return op;
    if (op->more)
        LOOP for (u32 i = 1; i < OP_PLACES; i++) {
            key = (thread + i) & (LT_OP_THREADS - 1);
            op = ops.lookup(&key);
            if (op && op->thread == thread)
                return op;
        }
    return 0;
}

// Give the thread an entry; 0 if others have all of its places.
INLINE struct op *claim_op(u32 thread, u32 slot) {
    struct op *op = current_op(thread);
    LOOP for (u32 i = 0; !op && i < OP_PLACES; i++) {
        u32 key = (thread + i) & (LT_OP_THREADS - 1);
        struct op *place = ops.lookup(&key);
        if (place && !__sync_val_compare_and_swap(&place->thread, 0, thread))
            op = place;
        else if (place)
            place->more = 1;
    }
    if (op) {
        op->since = op->done = 0;
        op->slot = slot;
    }
    return op;
}

// ggml_graph_compute(struct ggml_cgraph *, struct ggml_cplan *)
int on_graph(struct pt_regs *ctx) {
    u64 task = this_task();
    u32 number = 0;
    struct slot *slot = probed_slot(ctx, task, &number);
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
    if (slot->detail > DETAIL_FAULTS && !claim_op(task, number)) { // its operators will be missing: say so
        count(number, slot->epoch, PROBE_OPS, 1);
        drop(number, slot->epoch, PROBE_OPS, 1);
    }
    slot->graph_start = now;
    __sync_fetch_and_add(&slot->token, 1);
    u32 phase = slot->phase, epoch = slot->epoch;
    if (phase < PHASE_COUNT)
        __sync_fetch_and_add(&slot->tokens[phase], tokens);
    bool wake = count(number, epoch, PROBE_TOKENS, 1);
    struct event *event = reserve(number, epoch, PROBE_TOKENS, 1);
    if (!event)
        return 0;
    stamp(event, task, now, slot, number, epoch, KIND_TOKEN, 0);
    event->a = graph;
    event->b = (tokens & 0xffffffff) | outputs << 32;
    event->c = (u32)n_nodes;
    event->d = slot->stall_ns;
    submit(event, wake || !slot->layout); // user space is to look at the first graph while it is there
    return 0;
}

// Make records of the operators that wait: one stretch in the ring, which its reader takes for single records.
INLINE void send_ops(struct slot *slot, u32 number, struct op *op) {
    u32 epoch = slot->epoch;
    if (!op->done)
        return;
    u64 last = (op->done - 1) & (LT_OPS - 1); // so the verifier knows its range
    if (op->epoch != epoch)                   // they are counted now
        LOOP for (u32 i = 0; i < LT_OPS; i++) op->records[i].event.mark = (op->records[i].event.mark & 15) | epoch << 4;
    bool wake = count(number, epoch, PROBE_OPS, last + 1);
    u64 bytes = last * sizeof(struct op_record) + sizeof(struct event);
    if (ring.ringbuf_output(&op->records[0], bytes, wake ? BPF_RB_FORCE_WAKEUP : BPF_RB_NO_WAKEUP))
        drop(number, epoch, PROBE_OPS, last + 1);
    op->done = 0;
}

INLINE void end_op(u64 task, struct slot *slot, u32 number, struct op *op, u64 now) {
    struct event *event = &op->records[op->done & (LT_OPS - 1)].event;
    u32 epoch = slot->epoch;
    event->token = slot->token;
    event->tid = task;
    event->pid = task >> 32;
    event->kind = KIND_OP;
    event->code = 0;
    event->slot = number;
    event->mark = (slot->phase & 15) | epoch << 4;
    event->c = now - op->since;
    op->since = 0;
    if (op->done == 0)
        op->epoch = epoch;
    if (++op->done >= LT_OPS || op->epoch != epoch)
        send_ops(slot, number, op);
}

// The operator at dst begins, if it is to be recorded. now: 0 if not known yet.
INLINE void begin_op(struct slot *slot, struct op *op, u64 dst, u64 now) {
    u32 kind = 0, at_src = slot->tensor_src & 0xf8, at_op = slot->tensor_op & 0xfc,
        at_rows = (slot->tensor_ne + 8) & 0xf8;
    if (slot->detail < DETAIL_FULL) { // most are none of ours, and a word tells
        bpf_probe_read_user(&kind, sizeof(kind), (void *)(dst + at_op));
        if (kind != slot->op_mul_mat && (!slot->op_mul_mat_id || kind != slot->op_mul_mat_id))
            return;
    }
    // All that is asked for in one go: fields one by one would be one cache miss after the other.
    char tensor[LT_TENSOR_BYTES];
    if (bpf_probe_read_user(tensor, sizeof(tensor), (void *)dst) || at_src > LT_TENSOR_BYTES - 16 ||
        at_op > LT_TENSOR_BYTES - 4 || at_rows > LT_TENSOR_BYTES - 8)
        return;
    kind = *(u32 *)(tensor + at_op);
    struct event *event = &op->records[op->done & (LT_OPS - 1)].event;
    event->a = *(u64 *)(tensor + at_src);
    event->b = *(u64 *)(tensor + at_src + 8);
    event->d = kind | *(u64 *)(tensor + at_rows) << 32;
    event->ts = now ? now : bpf_ktime_get_ns();
    op->since = event->ts;
}

int on_graph_return(struct pt_regs *ctx) {
    u64 task = this_task();
    u32 number = 0;
    struct slot *slot = probed_slot(ctx, task, &number);
    if (!slot || !slot->graph_start)
        return 0;
    u64 now = bpf_ktime_get_ns();
    struct op *op = current_op(task);
    if (op) {
        if (op->since)
            end_op(task, slot, number, op, now);
        send_ops(slot, number, op);
        op->since = 0;
        op->thread = 0;
    }
    __sync_fetch_and_add(&slot->eval_ns, now - slot->graph_start);
    u32 epoch = slot->epoch;
    bool wake = count(number, epoch, PROBE_TOKENS, 1);
    struct event *event = reserve(number, epoch, PROBE_TOKENS, 1);
    if (!event)
        return 0;
    stamp(event, task, now, slot, number, epoch, KIND_TOKEN_END, 0);
    event->a = 0;
    event->b = now - slot->graph_start;
    event->c = 0;
    event->d = slot->stall_ns;
    submit(event, wake);
    return 0;
}

INLINE struct slot *slot_of(struct op *op, u32 *number) {
    *number = op->slot;
    struct slot *slot = slots.lookup(number);
    return slot && slot->layout ? slot : 0;
}

// The thread comes to its next operator: f(params, dst), or a C++ method with these arguments (LT_COOKIE_METHOD). f is
// ggml_cpu_extra_compute_forward, which ggml asks first for every operator, whoever computes it; or a function for one
// kind of them. An operator ends where the thread comes to another function that is probed, recorded or not, so its
// time has waiting for the other threads in it.
int on_operator(struct pt_regs *ctx) {
    UNLESS_BARE;
    u64 task = this_task(), now = 0;
    u32 number = 0;
    struct op *op = current_op(task);
    struct slot *slot = op ? slot_of(op, &number) : 0;
    if (!slot)
        return 0;
    if (op->since) {
        now = bpf_ktime_get_ns();
        end_op(task, slot, number, op, now);
    }
    u64 dst = PT_REGS_PARM2(ctx), method_dst = PT_REGS_PARM3(ctx);
    __asm__ volatile("" : "+r"(dst), "+r"(method_dst)); // else one load, from an address that the verifier refuses
    begin_op(slot, op, bpf_get_attach_cookie(ctx) & LT_COOKIE_METHOD ? method_dst : dst, now);
    return 0;
}

// ggml_compute_forward_rms_norm_mul_fused(params, norm, mul): two operators in one call, before which ggml asks nobody.
// Both are recorded; what they take is the second's.
int on_fused(struct pt_regs *ctx) {
    UNLESS_BARE;
    u64 task = this_task();
    u32 number = 0;
    struct op *op = current_op(task);
    struct slot *slot = op ? slot_of(op, &number) : 0;
    if (!slot)
        return 0;
    u64 now = bpf_ktime_get_ns(), dst = PT_REGS_PARM2(ctx), second = PT_REGS_PARM3(ctx);
    LOOP for (u32 i = 0; i < 2; i++) {
        if (op->since)
            end_op(task, slot, number, op, now);
        begin_op(slot, op, dst, now);
        dst = second;
    }
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

// 1 if a < b, else 0. The compiler would make a branch of that, and the verifiers of older kernels (6.1) follow what
// comes after a branch twice: in a loop of a thousand rounds, or before it, that is more than they accept.
INLINE u64 less(s64 a, s64 b) {
    u64 difference = a - b;
    asm volatile("" : "+r"(difference));
    return difference >> 63;
}

// ggml_compute_forward_get_rows(params, dst): picks the chosen experts' weights out of the router's probabilities,
// after the choice and before the expert matrices are touched. dst "ffn_moe_weights-N", src[1] "ffn_moe_topk-N": i32
// ids, ne[0] experts for each of ne[1] positions, rows nb[1] bytes apart.
int on_get_rows(struct pt_regs *ctx) {
    UNLESS_BARE;
    u64 task = this_task();
    u32 number = 0;
    struct op *op = current_op(task);
    struct slot *slot = op ? slot_of(op, &number) : 0;
    if (!slot)
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
    u64 layer = 0, digits = 1;
#pragma unroll
    for (int i = 13; i < 17; i++) {
        u64 digit = (u8)(name[i] - '0'); // what is no digit is a large number
        digits &= less(digit, 10);
        layer = layer * (1 + 9 * digits) + digit * digits;
    }
    bpf_probe_read_user(&ne, sizeof(ne), (void *)(topk + slot->tensor_ne));
    bpf_probe_read_user(&nb, sizeof(nb), (void *)(topk + slot->tensor_nb));
    bpf_probe_read_user(&data, sizeof(data), (void *)(topk + slot->tensor_data));
    u32 epoch = slot->epoch;
    u64 chunks = (ne[0] + IDS_PER_RECORD - 1) / IDS_PER_RECORD, records = chunks * ne[1];
    struct account *account = account_of(number, epoch, PROBE_ROUTING);
    if (!account)
        return 0;
    u64 before = __sync_fetch_and_add(&account->counted, records) & (LT_WAKE_EVENTS - 1);
    u64 wake = less(LT_WAKE_EVENTS - 1, before + records), lost = 0;
    struct event event = {};
    stamp(&event, task, bpf_ktime_get_ns(), slot, number, epoch, KIND_ROUTE, 0);
    LOOP for (u32 i = 0; i < LT_ROUTE_RECORDS; i++) {
        if (i >= records)
            break;
        u64 position = i / chunks, chunk = i % chunks; // not counted up, so that the verifier sees one state
        u64 left = ne[0] - chunk * IDS_PER_RECORD, all = less(IDS_PER_RECORD, left);
        u32 n = all * IDS_PER_RECORD + (1 - all) * left;
        s32 ids[16] = {};
        bpf_probe_read_user(&ids, (n & 15) * 4, (void *)(data + position * nb[1] + chunk * IDS_PER_RECORD * 4));
        u64 packed[3] = {};
#pragma unroll
        for (int j = 0; j < IDS_PER_RECORD; j++)
            packed[j / 4] |= (u64)(ids[j] & 0xffff) << (j % 4 * 16);
        event.code = n;
        event.a = position | layer << 32;
        event.b = packed[0];
        event.c = packed[1];
        event.d = packed[2];
        lost += less(ring.ringbuf_output(&event, sizeof(event), BPF_RB_NO_WAKEUP + wake), 0);
        wake = 0;
    }
    // A batch larger than one program may loop over: what is left out is accounted for, not forgotten.
    if (records > LT_ROUTE_RECORDS)
        lost += records - LT_ROUTE_RECORDS;
    if (lost)
        drop(number, epoch, PROBE_ROUTING, lost);
    return 0;
}
