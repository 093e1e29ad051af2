"""``python -m flashdp``: the command line."""

import sys

from flashdp.cli import main

sys.exit(main())
