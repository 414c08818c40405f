"""Pages of model files into and out of the page cache, and buffered reads (bpf/pagecache.bpf.c, docs/pagecache.md)."""

from __future__ import annotations

from llmtraced.probes.points import Kprobe, Tracepoint

__all__ = ["POINTS"]

POINTS = (
    Tracepoint("on_add", "mm_filemap_add_to_page_cache", "what is read from disk is not recorded", typed=True),
    Tracepoint("on_evict", "mm_filemap_delete_from_page_cache", "what is evicted is not recorded", typed=True),
    Tracepoint(
        "on_read",
        "mm_filemap_get_pages",
        "reads by read() and pread() are not recorded",
        required=False,
        otherwise=Kprobe("on_read_call", "filemap_read"),
    ),
)
