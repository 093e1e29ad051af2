"""Importances beside those of llm-compressor, which has an environment of its own."""

import json
import os
import runpy
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
PEERS = Path(__file__).parents[1] / "benchmarks" / "peers.py"
#: Of float32, in a mean of products whose order differs.
ROUNDING = 1e-6
VARIABLE = "SLIMMOE_LLM_COMPRESSOR"


def check(families):
    """All families agree where both measure the model as it is."""
    for name, runs in families.items():
        for run in ("basic", "all experts"):
            told = runs[run]
            assert "refused" not in told, (name, told)
            assert told["layers"] >= 3
            assert told["largest relative difference"] < ROUNDING, (name, run)
            assert told["counts that differ"] == told["layers with other experts kept"] == 0
        # the first layer is that of the model as it is, or of one that sees tokens to the right
        first = runs["sequential"]
        assert (
            min(
                first["largest relative difference, first layer"],
                first["the same, if ours saw tokens to the right"],
            )
            < ROUNDING
        )
        assert first["largest relative difference"] > 1000 * ROUNDING


def test_what_was_recorded():
    peers = runpy.run_path(str(PEERS))
    found = json.loads(peers["RECORD"].read_text(encoding="utf-8"))["llm_compressor"]
    assert tuple(found["families"]) == peers["FAMILIES"]
    assert found["versions"]["llmcompressor"] == "0.14.0"
    check(found["families"])


def test_the_same_averages_were_recorded():
    peers = runpy.run_path(str(PEERS))
    found = json.loads(peers["RECORD"].read_text(encoding="utf-8"))["slimder_man"]
    assert tuple(found["families"]) == peers["FAMILIES"]
    for told in found["families"].values():
        assert told["layers"] >= 9
        assert told["layers with other experts kept"] == told["layers with other groups"] == 0
        assert told["largest difference of averages"] < ROUNDING


@pytest.mark.peer
@pytest.mark.skipif(
    VARIABLE not in os.environ,
    reason=f"{VARIABLE} names no Python with llmcompressor; see benchmarks/peers.py",
)
def test_the_same_importances():
    compared = runpy.run_path(str(PEERS))["compared"]
    check(compared(os.environ[VARIABLE], ("qwen3_moe", "deepseek_v3"))["families"])
