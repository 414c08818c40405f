// Page faults of traced processes on their models.
//
// exceptions:page_fault_user and page_fault_kernel say when a fault begins; the software events PAGE_FAULTS_MIN and
// PAGE_FAULTS_MAJ when it is accounted, in the kernel's own words, with its address. One of each makes a record. A
// fault that begins but is never accounted (its page is gone, a signal came first) is recorded with an unknown outcome
// when its thread faults again.

struct in_flight {
    u64 since;
    u64 address;
    u64 offset;
    u32 file;
    u32 active;
};
BPF_HASH(in_flight, u32, struct in_flight, LT_THREADS); // thread -> its fault

INLINE struct model_range *find_range(struct slot *slot, u64 address) {
    u64 window = slot->window;
    u32 low = window >> 32, high = low + (u32)window;
    LOOP for (int i = 0; i < LT_RANGE_STEPS; i++) {
        if (low >= high)
            return 0;
        u32 middle = low + (high - low) / 2;
        struct model_range *range = ranges.lookup(&middle);
        if (!range)
            return 0;
        if (address < range->start)
            high = middle;
        else if (address >= range->end)
            low = middle + 1;
        else
            return range;
    }
    return 0;
}

INLINE void emit_fault(struct slot *slot, u32 slot_no, u64 ts, u8 outcome, u64 address, u64 latency, u64 offset,
                       u32 file_no) {
    u32 epoch = current_epoch();
    count(slot_no, epoch, PROBE_FAULTS, 1);
    struct event *event = reserve(slot_no, epoch, PROBE_FAULTS, 1);
    if (!event)
        return;
    stamp(event, ts, slot, slot_no, epoch, KIND_FAULT, outcome);
    event->a = address;
    event->b = latency;
    event->c = offset;
    event->d = file_no;
    submit(event);
}

INLINE int fault_begins(u64 address) {
    u32 *slot_no = current_slot_no();
    if (!slot_no)
        return 0;
    u32 number = *slot_no;
    struct slot *slot = slots.lookup(&number);
    if (!slot)
        return 0;
    struct model_range *range = find_range(slot, address);
    if (!range)
        return 0;
    u32 thread = bpf_get_current_pid_tgid();
    struct in_flight *before = in_flight.lookup(&thread);
    struct in_flight now = {
        .since = bpf_ktime_get_ns(),
        .address = address,
        .offset = range->offset + (address - range->start),
        .file = range->file,
        .active = 1,
    };
    if (before && before->active) {
        emit_fault(slot, number, before->since, OUTCOME_UNKNOWN, before->address, NONE, before->offset, before->file);
        *before = now; // still in a fault: in_fault stands
        return 0;
    }
    if (before)
        *before = now;
    else if (in_flight.update(&thread, &now))
        return 0; // more threads than LT_THREADS: this fault's latency will be unknown
    if (__sync_fetch_and_add(&slot->in_fault, 1) == 0)
        slot->stall_since = now.since;
    return 0;
}

INLINE int fault_ends(struct bpf_perf_event_data *ctx, u8 outcome) {
    u32 *slot_no = current_slot_no();
    if (!slot_no)
        return 0;
    u32 number = *slot_no;
    struct slot *slot = slots.lookup(&number);
    if (!slot)
        return 0;
    u64 address = ctx->addr;
    struct model_range *range = find_range(slot, address);
    if (!range)
        return 0;
    u64 now = bpf_ktime_get_ns(), since = now, latency = NONE;
    u64 offset = range->offset + (address - range->start);
    u32 thread = bpf_get_current_pid_tgid(), file_no = range->file;
    struct in_flight *fault = in_flight.lookup(&thread);
    if (fault && fault->active && fault->address == address) {
        since = fault->since;
        latency = now - since;
        fault->active = 0;
        // Whoever is last out adds the time. stall_since is read first: only while in_fault is 0 can it be rewritten.
        u64 stall_since = slot->stall_since;
        if (__sync_fetch_and_add(&slot->in_fault, -1) == 1)
            __sync_fetch_and_add(&slot->stall_ns, now - stall_since);
    }
    struct model_file *file = files.lookup(&file_no);
    if (file) {
        u32 extent = find_bound(file->byte_base, file->byte_count, offset);
        struct counter *counter = counters.lookup(&extent);
        if (counter) {
            __sync_fetch_and_add(outcome == OUTCOME_MAJOR ? &counter->major : &counter->minor, 1);
            if (latency != NONE)
                __sync_fetch_and_add(&counter->fault_ns, latency);
        }
    }
    emit_fault(slot, number, since, outcome, address, latency, offset, file_no);
    return 0;
}

int on_fault_user(struct tracepoint__exceptions__page_fault_user *args) {
    return fault_begins(args->address);
}

int on_fault_kernel(struct tracepoint__exceptions__page_fault_kernel *args) {
    return fault_begins(args->address);
}

int on_minor_fault(struct bpf_perf_event_data *ctx) {
    return fault_ends(ctx, OUTCOME_MINOR);
}

int on_major_fault(struct bpf_perf_event_data *ctx) {
    return fault_ends(ctx, OUTCOME_MAJOR);
}
