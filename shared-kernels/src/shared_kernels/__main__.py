"""``python -m shared_kernels``: the command line."""

from shared_kernels.cli import main

main()
