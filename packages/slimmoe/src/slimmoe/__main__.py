"""``python -m slimmoe``: the command line."""

import sys

from slimmoe.cli import main

sys.exit(main())
