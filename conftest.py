"""How the workspace's tests are run: on how many processes, and where their bytecode goes."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

MOST_WORKERS = 4
"""A worker, with the processes its tests start, takes up to 4 GB."""

if sys.dont_write_bytecode:
    # The tests start a hundred interpreters, and without bytecode each of them compiles torch and
    # transformers anew: it goes into a folder that they share and that does not outlive the run.
    if not sys.pycache_prefix:
        sys.pycache_prefix = tempfile.mkdtemp(prefix="tenfold-bytecode-")
        atexit.register(shutil.rmtree, sys.pycache_prefix, ignore_errors=True)
        os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def pays_to_share(config: pytest.Config) -> bool:
    """Whether these tests are better run on several processes, if nobody said how many.

    Whole folders are; a few files, or what ``-k`` leaves, are done sooner than workers have
    started. A GPU's memory and clocks are not to be shared, and a debugger, ``-s`` and
    ``--collect-only`` do not work through workers.
    """
    alone = ("keyword", "lf", "stepwise", "usepdb", "trace", "collectonly")
    if config.getoption("capture") == "no" or any(config.getoption(n, False) for n in alone):
        return False
    if not all((config.invocation_params.dir / arg).is_dir() for arg in map(Path, config.args)):
        return False
    import torch

    return not torch.cuda.is_available()


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Choose the options of pytest-xdist, where it is installed, before it reads them."""
    if not config.pluginmanager.hasplugin("xdist") or hasattr(config, "workerinput"):
        return
    options = config.option
    if options.numprocesses is None and options.dist == "no" and pays_to_share(config):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        options.numprocesses = min(cores or 1, MOST_WORKERS)
    if options.numprocesses:
        if options.dist == "no":
            # By halves, then whoever has nothing left to do takes from the other.
            options.dist = "worksteal"
        # Workers that use every core each would stand in each other's way.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
