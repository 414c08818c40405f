// For `llmtraced bench events`: copies prepared records, in their order, into a ring of the tracer's kind.
//
// Compiled on its own by llmtraced/bench/events.py, which fills `records` through its mapping, sets `cursor` and runs
// the program with BPF_PROG_TEST_RUN until all have been sent. A full ring stops it, so that nothing is lost and the
// reader alone is timed.

struct record {
    u64 word[7]; // schema.EVENT without the ring's own header
};
BPF_RINGBUF_OUTPUT(ring, BENCH_RING_PAGES);
BPF_F_TABLE("array", u32, struct record, records, BENCH_RECORDS, BPF_F_MMAPABLE);
BPF_F_TABLE("array", u32, u64, cursor, 2, BPF_F_MMAPABLE); // [0] next record to send, [1] how many there are

int emit(void *ctx) {
    u32 first = 0, second = 1;
    u64 *next = cursor.lookup(&first), *end = cursor.lookup(&second);
    if (!next || !end)
        return 0;
    _Pragma("clang loop unroll(disable)") for (int i = 0; i < BENCH_BATCH; i++) {
        u32 key = *next;
        struct record *record = records.lookup(&key);
        if (key >= *end || !record)
            break;
        struct record *sent = ring.ringbuf_reserve(sizeof(struct record));
        if (!sent)
            break;
        *sent = *record;
        ring.ringbuf_submit(sent, BPF_RB_NO_WAKEUP);
        *next = key + 1;
    }
    return 0;
}
