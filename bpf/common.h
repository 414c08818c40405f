// What the probe families share: the record, the ring, the account, and which process and which file are ours.
//
// Compiled by BCC together with the three *.bpf.c files into one object. The LT_*, KIND_*, PROBE_*, PHASE_*, CAUSE_*,
// OUTCOME_* and DETAIL_* names are generated from llmtraced/schema.py, the sizes from llmtraced/probes/loader.py.
#include <uapi/linux/bpf_perf_event.h>
#include <uapi/linux/ptrace.h>

#define INLINE static __always_inline
#define NONE (~0ULL)
// For `llmtraced bench overhead`: programs that are entered and left again, to tell what that alone costs.
#if LT_BARE
#define UNLESS_BARE return 0
#else
#define UNLESS_BARE
#endif
#define LOOP _Pragma("clang loop unroll(disable)") // unrolled, the verifier has more to read than it accepts

// One ring record; schema.EVENT describes it. 56 bytes, 64 with the ring's header, so that a ring of a power of two
// always holds whole records and user space views it as one array.
struct event {
    u64 ts;
    u32 token;
    u32 tid;
    u32 pid;
    u8 kind;
    u8 code;
    u8 slot;
    u8 mark; // phase in the low, epoch in the high four bits
    u64 a;
    u64 b;
    u64 c;
    u64 d;
};
BPF_RINGBUF_OUTPUT(ring, LT_RING_PAGES);

// A traced process. What programs ask for at every event is in the first 64 bytes, one line of the processor's cache:
// between two operators ggml streams megabytes of weights, so each line that a program touches is a miss, and costs
// more than its instructions. Every field has one writer; (u): it is user space, through the same mapping.
struct slot {
    u64 token;                     // graph evaluations so far
    u64 window;                    // (u) ranges of this process: first << 32 | count
    u32 phase;                     // Phase
    u32 epoch;                     // (u) the account's generation
    u32 process;                   // (u) 0: the slot is free
    u32 detail;                    // (u) Detail
    u32 layout;                    // (u) 0: not known yet; else tensor_*, graph_* and op_* hold
    u32 op_mul_mat, op_mul_mat_id; // (u) values of enum ggml_op in this build
    u32 tensor_op, tensor_ne, tensor_src;
    u64 spare;
    // the second line
    u64 in_fault;    // threads that are in a page fault on the model
    u64 stall_since; // when in_fault left 0
    u64 stall_ns;    // time with at least one thread in such a fault
    u64 eval_ns;     // time in graph evaluations
    u64 graph_start;
    u64 graph_n_nodes, graph_nodes; // (u)
    u64 tensor_nb;                  // (u)
    // the third
    u64 tokens[PHASE_COUNT];      // tokens evaluated, by phase
    u64 tensor_data, tensor_name; // (u)
    u64 rest[2];
};
BPF_F_TABLE("array", u32, struct slot, slots, LT_SLOTS, BPF_F_MMAPABLE);
BPF_HASH(targets, u32, u32, LT_SLOTS); // process -> slot

// Mapped stretches of model files, sorted by address within a slot's window.
struct model_range {
    u64 start;
    u64 end;
    u64 offset; // in the file, of start
    u64 file;
};
BPF_F_TABLE("array", u32, struct model_range, ranges, LT_RANGES, BPF_F_MMAPABLE);

// Model files. Bounds are the sorted starts of extents: byte extents (tensors and what lies between) for faults,
// page segments (runs of pages with the same tensors in them) for the page cache.
struct file_id {
    u64 ino;
    u64 dev;
};
struct model_file {
    u64 slot; // whose, where the acting process is not a target itself
    u64 byte_base, byte_count;
    u64 page_base, page_count;
    u64 seen_base; // first word of the bitmap of pages that were added before
    u64 pages;
    u64 spare;
};
BPF_HASH(file_ids, struct file_id, u32, LT_FILES); // -> the number it has for a process that is no target
// Processes that share a file each have a number of their own for it: slot * LT_FILES + number above -> own number + 1.
BPF_F_TABLE("array", u32, u64, aliases, LT_SLOTS *LT_FILES, BPF_F_MMAPABLE);
BPF_F_TABLE("array", u32, struct model_file, files, LT_FILES, BPF_F_MMAPABLE);
BPF_F_TABLE("array", u32, u64, bounds, LT_BOUNDS, BPF_F_MMAPABLE);
BPF_F_TABLE("array", u32, u64, seen, LT_SEEN_WORDS, BPF_F_MMAPABLE);

// Totals for an extent, read by a scrape straight from the mapping. Not per CPU: a fault or a page-cache add takes
// microseconds, an uncontended atomic add nanoseconds, and per-CPU arrays cannot be mapped.
struct counter {
    u64 minor;
    u64 major;
    u64 fault_ns;
    u64 added[CAUSE_COUNT]; // pages
    u64 again;              // pages added that had been added before
    u64 evicted;            // pages
};
BPF_F_TABLE("array", u32, struct counter, counters, LT_BOUNDS, BPF_F_MMAPABLE);

// The account, per CPU, slot, epoch and probe. Atomic, since uprobe programs can be preempted.
struct account {
    u64 counted;
    u64 dropped;
};
BPF_F_TABLE("array", u32, struct account, accounts, LT_ACCOUNTS, BPF_F_MMAPABLE);

BPF_F_TABLE("array", u32, u64, config, 8, BPF_F_MMAPABLE);
#define CONFIG_UNPLACED 0 // pages of model files that are in no total (but in the stream)

INLINE struct account *account_of(u32 slot, u32 epoch, u32 probe) {
    u32 key = ((bpf_get_smp_processor_id() * LT_SLOTS + slot) * LT_EPOCHS + epoch) * PROBE_COUNT + probe;
    return accounts.lookup(&key);
}

// Count n events and say whether so many came that the reader should be woken. It looks by itself some times a second.
INLINE bool count(u32 slot, u32 epoch, u32 probe, u64 n) {
    struct account *account = account_of(slot, epoch, probe);
    return account && (__sync_fetch_and_add(&account->counted, n) & (LT_WAKE_EVENTS - 1)) + n >= LT_WAKE_EVENTS;
}

INLINE void drop(u32 slot, u32 epoch, u32 probe, u64 n) {
    struct account *account = account_of(slot, epoch, probe);
    if (account)
        __sync_fetch_and_add(&account->dropped, n);
}

// Reserve a record for n events that were counted before, or count them as dropped.
INLINE struct event *reserve(u32 slot, u32 epoch, u32 probe, u64 n) {
    struct event *event = ring.ringbuf_reserve(sizeof(struct event));
    if (!event)
        drop(slot, epoch, probe, n);
    return event;
}

// The same for what is only counted, and counted as dropped, where the dial is at DETAIL_TOTALS.
INLINE struct event *reserve_detail(struct slot *slot, u32 slot_no, u32 epoch, u32 probe, u64 n) {
    if (slot && slot->detail < DETAIL_FAULTS) {
        drop(slot_no, epoch, probe, n);
        return 0;
    }
    return reserve(slot_no, epoch, probe, n);
}

INLINE void submit(struct event *event, bool wake) {
    ring.ringbuf_submit(event, wake ? BPF_RB_FORCE_WAKEUP : BPF_RB_NO_WAKEUP);
}

INLINE void stamp(struct event *event, u64 task, u64 ts, struct slot *slot, u32 slot_no, u32 epoch, u8 kind, u8 code) {
    event->ts = ts;
    event->token = slot->token;
    event->tid = task;
    event->pid = task >> 32;
    event->kind = kind;
    event->code = code;
    event->slot = slot_no;
    event->mark = (slot->phase & 15) | epoch << 4;
}

// Process << 32 | thread, by the numbers that user space knows: a pid namespace numbers them anew. 0: not in ours.
INLINE u64 this_task(void) {
#if LT_PIDNS_INO
    struct bpf_pidns_info here = {};
    if (bpf_get_ns_current_pid_tgid(LT_PIDNS_DEV, LT_PIDNS_INO, &here, sizeof(here)))
        return 0;
    return (u64)here.tgid << 32 | here.pid;
#else
    return bpf_get_current_pid_tgid();
#endif
}

INLINE u32 *current_slot_no(void) {
    u32 process = this_task() >> 32;
    return targets.lookup(&process);
}

INLINE struct slot *current_slot(u32 *number) {
    u32 *found = current_slot_no();
    if (!found)
        return 0;
    *number = *found;
    return slots.lookup(number);
}

// The last of bounds[base .. base+count) that is <= value; base if none is. One variable moves, by powers of two, so
// that the verifier has few states to follow.
INLINE u32 find_bound(u64 base, u64 count, u64 value) {
    u32 at = base, end = base + count;
#pragma unroll
    for (int step = 1 << (LT_BOUND_STEPS - 1); step; step >>= 1) {
        u32 next = at + step;
        u64 *start = next < end ? bounds.lookup(&next) : 0;
        if (start && *start <= value)
            at = next;
    }
    return at;
}
