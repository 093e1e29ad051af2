"""Batches over processes."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import calibration_ranks
from calibration_oracle import assert_same, exact_model
from slimmoe.calibration import CalibrationStatistics


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What each of two processes has measured."""
    folder = tmp_path_factory.mktemp("ranks")
    # norms of transformers are in float32 whatever the model is
    exact_model("mixtral").save_pretrained(folder / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
        f"--master-port={port}", calibration_ranks.__file__, str(folder),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", ["resident", "modules", "layerwise"])
def test_all_have_the_sums_of_one_process(name, folder):
    call = getattr(calibration_ranks, name)
    wanted = call(folder) if name == "layerwise" else call()
    found = [CalibrationStatistics.from_pretrained(folder / f"{name}-{rank}") for rank in (0, 1)]
    assert_same(found[0], found[1])
    assert_same(found[0], wanted, rtol=1e-12)
    for field in ("tokens", "sequences", "batches", "tokens_sha256", "config_sha256", "dtype"):
        assert getattr(found[0], field) == getattr(found[1], field) == getattr(wanted, field)
    counted = [{place: part.tokens for place, part in told.parts()} for told in (*found, wanted)]
    assert counted[0] == counted[1] == counted[2]
    assert wanted.batches > 2


def test_a_process_alone(folder):
    wanted = calibration_ranks.resident()
    for rank in (0, 1):
        found = CalibrationStatistics.from_pretrained(folder / f"alone-{rank}")
        assert_same(found, wanted)
        assert torch.equal(found.experts[0].count, wanted.experts[0].count)


def test_what_one_refuses_all_refuse(folder):
    told = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert told[0]["nan"].startswith("RuntimeError: process 1: model.")
    assert told[1]["nan"].startswith("FloatingPointError: model.")
    assert told[0]["others"] == told[1]["others"]
    assert "data: expected the same in all processes" in told[0]["others"]
    assert told[0]["few"] == told[1]["few"]
    assert "data: expected at least 2 batches, one for each process, got int 1" in told[0]["few"]
