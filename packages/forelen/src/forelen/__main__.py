"""``python -m forelen``: the command line."""

import sys

from forelen.cli import main

sys.exit(main())
