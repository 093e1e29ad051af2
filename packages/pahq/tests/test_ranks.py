"""Rows over processes."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pahq import CircuitFinder
from pahq.ranks import Ranks

sys.path.insert(0, str(Path(__file__).parent))
from patching_cases import family, pairs
from ranks_worker import CASES


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """What each of three processes has found."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=3",
        f"--master-port={port}", str(Path(__file__).parent / "ranks_worker.py"), str(folder),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(3)]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_all_decide_alike_and_as_one_process(ran, number):
    name, dtype, options = CASES[number]
    finder, task = CircuitFinder(family(name).to(dtype)), pairs()
    wanted = finder.acdc(task, 0.001, progress=False, **options)
    alone = finder.edge_effects(task, progress=False).scores.nan_to_num(7)
    for found in ran:
        found = found[f"{name} {options}"]
        assert found == ran[0][f"{name} {options}"]
        assert torch.equal(torch.tensor(found["present"]).bool(), wanted.present)
        assert found["value"] == pytest.approx(wanted.provenance["value"], rel=1e-4)
        torch.testing.assert_close(torch.tensor(found["effects"]), alone, rtol=1e-3, atol=1e-6)
    # a batch of all has as many rows as each may have, times their number
    assert ran[0][f"{name} {options}"]["rows"] >= wanted.provenance["rows"] > 0


def test_searches_go_on_and_unlike_ones_are_refused(ran):
    wanted = CircuitFinder(family("llama")).acdc(pairs(), 0.001, progress=False)
    for rank, found in enumerate(ran):
        assert torch.equal(torch.tensor(found["resumed"]).bool(), wanted.present)
        other = 1 if rank == 0 else 0
        assert f"processes {rank} and {other} differ in threshold" in found["refused"]


def test_shares():
    ranks = Ranks()
    assert ranks.share(7) == slice(0, 7)
    ranks.count, cut = 3, []
    for ranks.index in range(3):
        cut.append(ranks.share(4))
    assert cut == [slice(0, 2), slice(2, 4), slice(4, 4)]
