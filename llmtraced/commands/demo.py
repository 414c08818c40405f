"""The whole story on a small real model, end to end.

Gets llama-server and the Gemma 3 270M model where they are missing (minutes, the first time), starts the server in a
memory cgroup at 70 % of the model, lets it write real text while the daemon traces it, then again with the sidecar
beside it, and prints which tensors were read again, what each token waited for, how much faster the sidecar made it,
and where the Parquet and the metrics are.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="folder for trace and logs (an earlier demo in it is replaced)"
    )
    parser.add_argument("-n", "--n-predict", type=int, default=32, metavar="N", help="tokens per answer (default 32)")


def run(args: argparse.Namespace) -> int:
    """Run the demo and print its answers."""
    from llmtraced.analysis.reread import reread
    from llmtraced.analysis.tokens import tokens
    from llmtraced.analysis.trace import open_trace
    from llmtraced.bench.demo import tell
    from llmtraced.errors import printable
    from llmtraced.reporters import reread as show_reread
    from llmtraced.reporters import text
    from llmtraced.reporters import tokens as show_tokens

    story = tell(args.output, n_predict=args.n_predict)
    trace = open_trace(story.trace, story.session)
    style = text.Style(shutil.get_terminal_size((120, 24)).columns, sys.stdout.isatty())
    for prompt, answer in story.texts:
        print(f"\n{prompt} … {printable(answer, 2000)}")
    print(f"\n{show_reread.render(reread(trace), 10, style)}")
    print(show_tokens.render(tokens(trace), 12, style))
    ahead = f", readahead {story.read_ahead_kb} KB" if story.read_ahead_kb is not None else ""
    print(
        f"{story.tokens_per_second:.2f} tokens/s with {story.limit_bytes / 1e6:.0f} MB for a model of "
        f"{story.model_bytes / 1e6:.0f} MB and {story.own_bytes / 1e6:.0f} MB of the server's own{ahead}\n"
        f"{story.sidecar_tokens_per_second:.2f} tokens/s with `llmtraced prefetch` beside it\n"
        f"trace    {story.trace}   (Parquet; try: llmtraced report summary {story.trace})\n"
        f"metrics  {story.metrics}   (as Prometheus scraped them)"
    )
    return 0
