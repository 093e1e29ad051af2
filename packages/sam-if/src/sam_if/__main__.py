"""``python -m sam_if``: the command line."""

import sys

from sam_if.cli import main

sys.exit(main())
