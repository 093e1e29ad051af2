"""``python -m pahq``: the command line."""

import sys

from pahq.cli import main

sys.exit(main())
