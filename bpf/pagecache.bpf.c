// Pages of model files that come into and go out of the page cache, and reads through it, by whichever process.
//
// Raw tracepoints hand over the kernel's own structures, and no record is made of them for each page; where their
// fields lie (LT_FOLIO_*, LT_MAPPING_*, LT_INODE_*, LT_SB_*) comes from the kernel's BTF (llmtraced/probes/btf.py).
// on_add and on_evict are loaded with the tracepoint's BTF type: the verifier then knows the folio for what it is, and
// its fields are plain loads, where a helper that copies them takes 24 ns (measured, 6.18).
//
// Adds and evictions of consecutive pages in one context become one record (a run): a readahead of 8 MB is 2,048
// events but a few records. Under pressure a token can move 10^5 pages, so what is done for each must be next to
// nothing: a page that continues its CPU's run is a comparison and an addition, and all else (cause, totals, account,
// record) is done once for the run. on_flush, run on each CPU before the ring or the totals are read, ends the runs.

#define RUN_PAGES 1024    // most pages in a run, so that it has a place in time and can be totalled in one program
#define RUN_GAP_JIFFIES 3 // a run ends when nothing was added for this long: jiffies are the cheapest clock

struct run {
    // What a page must have to continue the run.
    u64 next;    // page index; NONE: nothing continues it
    u64 mapping; // the file's struct address_space, which stays while a target has the file mapped
    u64 task;
    u64 wanted; // the page that the thread's fault is about has a cause of its own; NONE: no such page
    u64 last;   // jiffies at the last page
    u64 pages;  // 0: no run
    u32 token;
    u8 slot, mark, code, busy;
    // What else the record and the totals need.
    u64 first; // page index
    u64 ts;
    u32 file, segment; // the segment that was counted in last, and its page indices: a cache of find_bound,
    u64 segment_base;  // good for the file whose segments begin here
    u64 segment_start, segment_end;
    u64 comm[2];
    u64 sent;        // records
    u64 index, left; // used by total(): here and not in registers, whose every value the verifier follows
};
BPF_PERCPU_ARRAY(runs, struct run, 2); // 0: adds, 1: evictions

// The system call that the current thread is in, from its saved registers; -1: none (it faulted). Costs nothing until
// a page of a model is added, which tracing system calls would not.
INLINE s64 current_syscall(void) {
    u64 saved[3] = {}; // orig_ax, ip, cs
    u64 regs = (u64)bpf_task_pt_regs((void *)bpf_get_current_task_btf());
    bpf_probe_read_kernel(&saved, sizeof(saved), (void *)(regs + LT_SYSCALL_OFFSET));
    return (saved[2] & 3) == 3 ? (s64)saved[0] : -1; // a kernel thread came from no user code: its registers say 0
}

// Whether the current thread, of no owner of the model, is in a preadv2(2) that does not wait: for what is missing it
// only asks.
#define RWF_NOWAIT 8
INLINE bool only_asks(bool owner) {
    if (owner)
        return false;
    u64 flags = 0, regs = (u64)bpf_task_pt_regs((void *)bpf_get_current_task_btf());
    bpf_probe_read_kernel(&flags, sizeof(flags), (void *)(regs + LT_SIXTH_OFFSET));
    return current_syscall() == SYSCALL_preadv2 && flags & RWF_NOWAIT;
}

// Why this thread adds or removes the run's first pages. A system call that asks for pages ahead of need counts as
// readahead where the server itself makes it, and as a prefetcher where another process does.
INLINE u8 find_cause(struct run *run, bool owner) {
    u32 thread = run->task;
    run->wanted = NONE;
    if (owner) {
        struct in_flight *fault = in_flight.lookup(&thread);
        if (fault && fault->active) {
            u64 wanted = fault->offset >> LT_PAGE_SHIFT;
            if (wanted - run->first < run->pages)
                return CAUSE_FAULT;
            run->wanted = wanted;
            return CAUSE_READAHEAD;
        }
    }
    if (only_asks(owner))
        return CAUSE_PREFETCHER;
    switch (current_syscall()) {
    case SYSCALL_read:
    case SYSCALL_pread64:
    case SYSCALL_readv:
    case SYSCALL_preadv:
    case SYSCALL_preadv2:
    case SYSCALL_sendfile:
    case SYSCALL_splice:
    case SYSCALL_copy_file_range:
        return CAUSE_READ;
    case SYSCALL_io_uring_enter:
        return owner ? CAUSE_READ : CAUSE_PREFETCHER;
    case SYSCALL_mmap:
    case SYSCALL_mlock:
    case SYSCALL_mlock2:
    case SYSCALL_mlockall:
    case SYSCALL_madvise:
    case SYSCALL_process_madvise:
    case SYSCALL_fadvise64:
    case SYSCALL_readahead:
        return owner ? CAUSE_READAHEAD : CAUSE_PREFETCHER;
    }
    return CAUSE_OTHER;
}

INLINE u64 bits_set(u64 x) {
    x -= x >> 1 & 0x5555555555555555ULL;
    x = (x & 0x3333333333333333ULL) + (x >> 2 & 0x3333333333333333ULL);
    x = (x + (x >> 4)) & 0x0f0f0f0f0f0f0f0fULL;
    return x * 0x0101010101010101ULL >> 56;
}

INLINE void enter_segment(struct run *run, struct model_file *file, u32 segment) {
    u32 next = segment + 1;
    u64 *start = bounds.lookup(&segment), *end = bounds.lookup(&next);
    run->segment = segment;
    run->segment_start = start ? *start : 0;
    run->segment_end = next < file->page_base + file->page_count && end ? *end : NONE;
}

// Add the run's pages to the totals of the segments that they lie in, in chunks that stay within one segment and one
// word of the bitmap.
INLINE void total(struct run *run, struct model_file *file, u8 kind) {
    run->index = run->first;
    run->left = run->pages;
    if (run->index < run->segment_start || run->index >= run->segment_end)
        enter_segment(run, file, find_bound(file->page_base, file->page_count, run->index));
    LOOP for (int i = 0; i < LT_RUN_CHUNKS; i++) {
        if (!run->left)
            break;
        if (run->index >= run->segment_end)
            enter_segment(run, file, run->segment + 1);
        u64 index = run->index, chunk = 64 - (index & 63);
        if (chunk > run->left)
            chunk = run->left;
        if (chunk > run->segment_end - index)
            chunk = run->segment_end - index;
        run->index = index + chunk;
        run->left -= chunk;
        u32 segment = run->segment;
        struct counter *counter = counters.lookup(&segment);
        if (!counter)
            continue;
        if (kind == KIND_EVICT) {
            __sync_fetch_and_add(&counter->evicted, chunk);
            continue;
        }
        u8 cause = run->code;
        if (cause < CAUSE_COUNT)
            __sync_fetch_and_add(&counter->added[cause], chunk);
        u32 word = file->seen_base + (index >> 6);
        u64 mask = (chunk == 64 ? NONE : (1ULL << chunk) - 1) << (index & 63);
        u64 *bits = index < file->pages ? seen.lookup(&word) : 0;
        u64 again = bits ? __sync_fetch_and_or(bits, mask) & mask : 0;
        if (again)
            __sync_fetch_and_add(&counter->again, bits_set(again));
    }
    u32 key = CONFIG_UNPLACED;
    u64 *unplaced = config.lookup(&key);
    if (run->left && unplaced) // a run with more tensors in it than one program may loop over
        __sync_fetch_and_add(unplaced, run->left);
}

#define READ_KERNEL(to, from) bpf_probe_read_kernel(&(to), sizeof(to), (void *)(from))

// The model that a struct address_space is of, by device and inode number.
INLINE struct model_file *find_file(u64 mapping, u32 *target, u32 *number) {
    struct file_id id = {};
    u64 inode = 0, sb = 0;
    u32 dev = 0;
    READ_KERNEL(inode, mapping + LT_MAPPING_HOST);
    READ_KERNEL(id.ino, inode + LT_INODE_INO);
    READ_KERNEL(sb, inode + LT_INODE_SB);
    READ_KERNEL(dev, sb + LT_SB_DEV);
    id.dev = dev;
    u32 *found = file_ids.lookup(&id);
    if (!found)
        return 0;
    *number = *found;
    if (target) {
        u32 key = *target * LT_FILES + *found;
        u64 *own = aliases.lookup(&key);
        if (own && *own)
            *number = *own - 1;
    }
    return files.lookup(number);
}

INLINE void begin_run(struct run *run, u64 mapping, u64 index, u64 pages, u64 task) {
    u32 file_no = 0, *target = current_slot_no();
    struct model_file *file = find_file(mapping, target, &file_no);
    if (!file)
        return;
    u32 slot_no = file->slot; // whose model it is; processes that share it have each their own number for it
    struct slot *slot = slots.lookup(&slot_no);
    if (!slot)
        return;
    if (run->mapping != mapping || run->segment_base != file->page_base)
        run->segment_start = run->segment_end = 0;
    run->mapping = mapping;
    run->segment_base = file->page_base;
    run->task = task;
    run->first = index;
    run->pages = pages;
    run->file = file_no;
    run->token = slot->token;
    run->slot = slot_no;
    run->mark = (slot->phase & 15) | slot->epoch << 4;
    run->ts = bpf_ktime_get_ns();
    run->code = find_cause(run, target && *target == slot_no);
    run->next = run->code == CAUSE_FAULT ? NONE : index + pages; // what a fault is about is a run of its own
    bpf_get_current_comm(&run->comm, sizeof(run->comm));
}

INLINE void end_run(struct run *run, u8 kind) {
    u32 file_no = run->file, epoch = run->mark >> 4;
    struct model_file *file = files.lookup(&file_no);
    if (file)
        total(run, file, kind);
    count(run->slot, epoch, PROBE_PAGECACHE, run->pages);
    u32 slot_no = run->slot;
    struct slot *slot = slots.lookup(&slot_no);
    struct event *event = reserve_detail(slot, slot_no, epoch, PROBE_PAGECACHE, run->pages);
    if (event) {
        event->ts = run->ts;
        event->token = run->token;
        event->tid = run->task;
        event->pid = run->task >> 32;
        event->kind = kind;
        event->code = run->code;
        event->slot = run->slot;
        event->mark = run->mark;
        event->a = run->first | (u64)run->file << 48;
        event->b = run->pages;
        event->c = run->comm[0];
        event->d = run->comm[1];
        submit(event, (++run->sent & (LT_WAKE_EVENTS - 1)) == 0);
    }
    run->pages = 0;
}

#define FOLIO(type, offset) (*(volatile type *)(folio + offset))

INLINE int page_cache_changes(u64 folio, u8 kind) {
    UNLESS_BARE;
    u32 which = kind == KIND_ADD ? 0 : 1;
    struct run *run = runs.lookup(&which);
    if (!run)
        return 0;
    u64 mapping = FOLIO(u64, LT_FOLIO_MAPPING), index = FOLIO(u64, LT_FOLIO_INDEX);
    u64 pages = 1, now = bpf_jiffies64();
#ifdef LT_FOLIO_ORDER
    if (FOLIO(u64, LT_FOLIO_FLAGS) >> LT_PG_HEAD & 1)
        pages = 1ULL << (FOLIO(u8, LT_FOLIO_ORDER) & 31);
#endif
    run->busy = 1; // on_flush may come by interrupt
    u64 task = this_task();
    if (run->pages) {
        u32 slot_no = run->slot;
        struct slot *slot = slots.lookup(&slot_no);
        if (run->next == index && run->mapping == mapping && run->task == task && run->wanted - index >= pages &&
            run->pages < RUN_PAGES && now - run->last < RUN_GAP_JIFFIES && slot && run->token == (u32)slot->token &&
            run->mark >> 4 == slot->epoch) {
            run->next = index + pages;
            run->pages += pages;
            run->last = now;
            run->busy = 0;
            return 0;
        }
        end_run(run, kind);
    }
    begin_run(run, mapping, index, pages, task);
    run->last = now;
    run->busy = 0;
    return 0;
}

// mm_filemap_add_to_page_cache(struct folio *), mm_filemap_delete_from_page_cache(struct folio *)
int on_add(u64 *ctx) {
    return page_cache_changes(ctx[0], KIND_ADD);
}

int on_evict(u64 *ctx) {
    return page_cache_changes(ctx[0], KIND_EVICT);
}

// Run on one CPU by user space. Returns how many runs were busy, to be asked for again.
int on_flush(struct bpf_raw_tracepoint_args *ctx) {
    int busy = 0;
    u32 add = 0, evict = 1;
    struct run *run = runs.lookup(&add);
    if (run && run->busy)
        busy++;
    else if (run && run->pages)
        end_run(run, KIND_ADD);
    run = runs.lookup(&evict);
    if (run && run->busy)
        busy++;
    else if (run && run->pages)
        end_run(run, KIND_EVICT);
    return busy;
}

INLINE int record_read(struct model_file *file, u32 file_no, u64 index, u64 last) {
    u32 slot_no = file->slot;
    struct slot *slot = slots.lookup(&slot_no);
    if (!slot)
        return 0;
    u32 epoch = slot->epoch;
    bool wake = count(slot_no, epoch, PROBE_READS, 1);
    struct event *event = reserve_detail(slot, slot_no, epoch, PROBE_READS, 1);
    if (!event)
        return 0;
    stamp(event, this_task(), bpf_ktime_get_ns(), slot, slot_no, epoch, KIND_READ, CAUSE_READ);
    u64 comm[2] = {};
    bpf_get_current_comm(&comm, sizeof(comm));
    event->a = index | (u64)file_no << 48;
    event->b = last - index + 1;
    event->c = comm[0];
    event->d = comm[1];
    submit(event, wake);
    return 0;
}

// A buffered read asks for pages [index, last] in several rounds, each beginning further on: one record for each read.
struct reading {
    u64 index;
    u64 last;
    u64 file;
};
BPF_TABLE("lru_hash", u32, struct reading, reading, LT_THREADS);

// mm_filemap_get_pages(struct address_space *, pgoff_t index, pgoff_t last_index)
int on_read(struct bpf_raw_tracepoint_args *ctx) {
    u32 file_no = 0, *target = current_slot_no();
    struct model_file *file = find_file(ctx->args[0], target, &file_no);
    if (!file || only_asks(target && *target == file->slot))
        return 0;
    u32 thread = this_task();
    struct reading now = {.index = ctx->args[1], .last = ctx->args[2], .file = file_no};
    struct reading *before = reading.lookup(&thread);
    bool same = before && before->file == now.file && before->last == now.last && before->index < now.index;
    if (before)
        *before = now;
    else
        reading.update(&thread, &now);
    return same ? 0 : record_read(file, file_no, now.index, now.last);
}

// For kernels without that tracepoint: filemap_read(struct kiocb *, struct iov_iter *, ssize_t), called once a read.
int on_read_call(struct pt_regs *ctx) {
    u64 request = PT_REGS_PARM1(ctx), iter = PT_REGS_PARM2(ctx);
    u64 opened = 0, mapping = 0, inode = 0, size = 0, position = 0, bytes = 0;
    READ_KERNEL(opened, request + LT_KIOCB_FILE);
    READ_KERNEL(mapping, opened + LT_FILE_MAPPING);
    u32 file_no = 0, *target = current_slot_no();
    struct model_file *file = find_file(mapping, target, &file_no);
    if (!file || only_asks(target && *target == file->slot))
        return 0;
    READ_KERNEL(inode, mapping + LT_MAPPING_HOST);
    READ_KERNEL(size, inode + LT_INODE_SIZE);
    READ_KERNEL(position, request + LT_KIOCB_POS);
    READ_KERNEL(bytes, iter + LT_ITER_COUNT);
    if (!bytes || position >= size) // the read that finds the end asks for no page
        return 0;
    return record_read(file, file_no, position >> LT_PAGE_SHIFT, (position + bytes - 1) >> LT_PAGE_SHIFT);
}
