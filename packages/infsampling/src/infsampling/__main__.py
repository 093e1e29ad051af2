"""``python -m infsampling``: the command line."""

import sys

from infsampling.cli import main

sys.exit(main())
