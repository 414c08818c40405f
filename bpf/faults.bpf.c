// Page faults of traced processes on their models.
//
// exceptions:page_fault_user and page_fault_kernel say when a fault begins; the software events PAGE_FAULTS_MIN and
// PAGE_FAULTS_MAJ when it is accounted, in the kernel's own words, with its address. One of each makes a record. A
// fault that begins but is never accounted (its page is gone, a signal came first) is recorded with an unknown outcome
// when its thread faults again.

// A thread's fault, and what is remembered from its last one: threads fault again in the same mapping and tensor, and
// under pressure 10^4 times a token, so each look-up that is saved counts.
struct in_flight {
    u64 since;
    u64 address;
    u64 offset;
    u32 process, slot;
    u32 file, active;
    u64 window; // the slot's, when range was found
    struct model_range range;
    u64 extent_start, extent_end;
    u32 extent;
};
BPF_TABLE("lru_hash", u32, struct in_flight, in_flight, LT_THREADS); // thread -> its fault

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

INLINE void emit_fault(u64 task, struct slot *slot, u32 slot_no, u64 ts, u8 outcome, u64 address, u64 latency,
                       u64 offset, u32 file_no) {
    u32 epoch = slot->epoch;
    bool wake = count(slot_no, epoch, PROBE_FAULTS, 1);
    struct event *event = reserve_detail(slot, slot_no, epoch, PROBE_FAULTS, 1);
    if (!event)
        return;
    stamp(event, task, ts, slot, slot_no, epoch, KIND_FAULT, outcome);
    event->a = address;
    event->b = latency;
    event->c = offset;
    event->d = file_no;
    submit(event, wake);
}

// The current thread's entry, if it has one that holds: threads' numbers are used again.
INLINE struct in_flight *current_fault(u32 thread, u32 process) {
    struct in_flight *fault = in_flight.lookup(&thread);
    return fault && fault->process == process ? fault : 0;
}

INLINE int fault_begins(u64 address) {
    UNLESS_BARE;
    u64 task = this_task();
    u32 thread = task, process = task >> 32, number = 0;
    struct in_flight *fault = current_fault(thread, process);
    if (fault) {
        number = fault->slot;
    } else {
        u32 *slot_no = targets.lookup(&process);
        if (!slot_no)
            return 0;
        number = *slot_no;
    }
    struct slot *slot = slots.lookup(&number);
    if (!slot || slot->process != process)
        return 0;
    bool known = fault && fault->window == slot->window && address >= fault->range.start && address < fault->range.end;
    if (!known) {
        struct model_range *range = find_range(slot, address);
        if (!range)
            return 0;
        struct in_flight first = {.process = process, .slot = number};
        if (!fault) {
            in_flight.update(&thread, &first);
            fault = in_flight.lookup(&thread);
            if (!fault)
                return 0; // more threads than LT_THREADS: this fault's latency will be unknown
        }
        fault->range = *range;
        fault->window = slot->window;
    }
    if (fault->active)
        emit_fault(task, slot, number, fault->since, OUTCOME_UNKNOWN, fault->address, NONE, fault->offset, fault->file);
    u64 now = bpf_ktime_get_ns();
    fault->since = now;
    fault->address = address;
    fault->offset = fault->range.offset + (address - fault->range.start);
    fault->file = fault->range.file;
    if (fault->active)
        return 0; // still in a fault: in_fault stands
    fault->active = 1;
    if (__sync_fetch_and_add(&slot->in_fault, 1) == 0)
        slot->stall_since = now;
    return 0;
}

// Add a fault to the totals of its extent; entry remembers which extent that was.
INLINE void total_fault(struct in_flight *entry, u32 file_no, u64 offset, u8 outcome, u64 latency) {
    u32 extent = entry ? entry->extent : 0;
    if (!entry || offset < entry->extent_start || offset >= entry->extent_end) {
        struct model_file *file = files.lookup(&file_no);
        if (!file)
            return;
        extent = find_bound(file->byte_base, file->byte_count, offset);
        if (entry) {
            u32 next = extent + 1;
            u64 *start = bounds.lookup(&extent), *end = bounds.lookup(&next);
            entry->extent = extent;
            entry->extent_start = start ? *start : NONE;
            entry->extent_end = end && next < file->byte_base + file->byte_count ? *end : NONE;
        }
    }
    struct counter *counter = counters.lookup(&extent);
    if (!counter)
        return;
    __sync_fetch_and_add(outcome == OUTCOME_MAJOR ? &counter->major : &counter->minor, 1);
    if (latency != NONE)
        __sync_fetch_and_add(&counter->fault_ns, latency);
}

INLINE int fault_ends(struct bpf_perf_event_data *ctx, u8 outcome) {
    UNLESS_BARE;
    u64 task = this_task(), address = ctx->addr;
    u32 thread = task, process = task >> 32;
    struct in_flight *fault = current_fault(thread, process);
    if (fault && fault->active && fault->address == address) {
        u32 number = fault->slot;
        struct slot *slot = slots.lookup(&number);
        if (!slot || slot->process != process)
            return 0;
        u64 now = bpf_ktime_get_ns();
        fault->active = 0;
        // Whoever is last out adds the time. stall_since is read first: only while in_fault is 0 can it be rewritten.
        u64 stall_since = slot->stall_since;
        if (__sync_fetch_and_add(&slot->in_fault, -1) == 1)
            __sync_fetch_and_add(&slot->stall_ns, now - stall_since);
        if (fault->extent_end && fault->window != slot->window)
            fault->extent_start = fault->extent_end = 0;
        total_fault(fault, fault->file, fault->offset, outcome, now - fault->since);
        emit_fault(task, slot, number, fault->since, outcome, address, now - fault->since, fault->offset, fault->file);
        return 0;
    }
    // Its beginning was not seen.
    u32 number = 0;
    struct slot *slot = current_slot(&number);
    if (!slot)
        return 0;
    struct model_range *range = find_range(slot, address);
    if (!range)
        return 0;
    u64 offset = range->offset + (address - range->start);
    total_fault(0, range->file, offset, outcome, NONE);
    emit_fault(task, slot, number, bpf_ktime_get_ns(), outcome, address, NONE, offset, range->file);
    return 0;
}

// page_fault_user(unsigned long address, struct pt_regs *, unsigned long error_code), page_fault_kernel likewise
int on_fault_user(struct bpf_raw_tracepoint_args *ctx) {
    return fault_begins(ctx->args[0]);
}

int on_fault_kernel(struct bpf_raw_tracepoint_args *ctx) {
    return fault_begins(ctx->args[0]);
}

int on_minor_fault(struct bpf_perf_event_data *ctx) {
    return fault_ends(ctx, OUTCOME_MINOR);
}

int on_major_fault(struct bpf_perf_event_data *ctx) {
    return fault_ends(ctx, OUTCOME_MAJOR);
}
