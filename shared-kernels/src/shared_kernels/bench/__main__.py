"""``python -m shared_kernels.bench FILE... --out DIR``: measure and write result files."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, run the files, return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m shared_kernels.bench",
        description="Time the arms of benchmark files against each other and against the limits "
        "of this machine.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write result files there")
    parser.add_argument("--only", metavar="NAME", help="one benchmark function or workload pattern")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if any")
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="time budget of a workload (default 60)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    given = parser.parse_args(argv)
    from shared_kernels.bench.runner import run_files

    return run_files(
        given.files,
        given.out,
        only=given.only,
        device=given.device,
        seconds=given.seconds,
        as_json=given.json,
    )


if __name__ == "__main__":
    sys.exit(main())
