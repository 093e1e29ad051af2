"""``python -m zo2``: the command line."""

import sys

from zo2.cli import main

sys.exit(main())
