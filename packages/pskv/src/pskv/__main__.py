"""``python -m pskv``: the command line."""

import sys

from pskv.cli import main

sys.exit(main())
