"""``python -m llmtraced``: the same as the console script."""

import sys

from llmtraced.commands import main

sys.exit(main())
