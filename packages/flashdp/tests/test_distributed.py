"""Two ranks against one process: the same noise, once, and the same weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

STEPS, BATCH = 3, 4

pytestmark = pytest.mark.slow


def train(rank, world, *, fault="", wrap=False):
    """Run an empty step and STEPS real ones; every rank takes its part of each logical batch."""
    from flashdp.engine import PrivacyEngine
    from flashdp.losses import unit_loss
    from flashdp.noise import NoiseSource
    from shared_kernels.testing.models import tiny_inputs, tiny_model
    from torch import distributed

    if fault == "own key":
        NoiseSource.agree = lambda self: None
    if fault == "own noise":
        reduce, own = distributed.all_reduce, torch.Generator().manual_seed(rank)
        distributed.all_reduce = lambda t: reduce(t.add_(torch.randn(t.shape, generator=own)))
    model = tiny_model("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    secure = fault == "own key"
    engine = PrivacyEngine(secure_rng=secure, seed=None if secure else 7)
    called = torch.nn.parallel.DistributedDataParallel(model) if wrap else model
    engine.make_private(
        called, optimizer, noise_multiplier=0.5, max_grad_norm=1.0, expected_batch_size=BATCH
    )
    sums, noises, drawn = [], [], engine.noise.noised

    def noised(total, **kwargs):
        sums.append(total.clone())
        noises.append(drawn(total, **kwargs).clone())
        return noises[-1]

    engine.noise.noised = noised
    # Nothing was drawn: what is released is noise alone, and can be compared bit by bit.
    optimizer.step()
    empty, first = list(noises), len(noises)
    share = BATCH // world
    for step in range(STEPS):
        inputs = tiny_inputs("llama", batch=BATCH, seed=step)
        mine = {k: v[rank * share : (rank + 1) * share] for k, v in inputs.items()}
        logits = called(mine["input_ids"]).logits
        unit_loss(logits, mine["labels"]).backward()
        optimizer.step()
    return {
        "noise": empty,
        "sums": sums[first : 2 * first],
        "weights": [p.detach() for p in model.parameters()],
    }


def two_ranks(tmp_path, fault="", wrap=""):
    """Results of both ranks."""
    paths = [tmp_path / f"{rank}.pt" for rank in range(2)]
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path / "meet"), str(path), fault, wrap]
        )
        for rank, path in enumerate(paths)
    ]
    try:
        assert [process.wait(timeout=240) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
    return [torch.load(path) for path in paths]


@pytest.fixture(scope="module")
def alone():
    return train(0, 1)


def assert_one_noise(found, expected):
    assert len(found["noise"]) == len(expected["noise"]) > 1
    for one, other in zip(found["noise"], expected["noise"], strict=True):
        assert torch.equal(one, other), "the noise differs"


def assert_same_weights(one, other):
    for a, b in zip(one["weights"], other["weights"], strict=True):
        assert torch.equal(a, b), "the weights of the ranks differ"


@pytest.mark.parametrize("wrap", ["", "wrap"])
def test_two_ranks_are_one_process(tmp_path, alone, wrap):
    ranks = two_ranks(tmp_path, wrap=wrap)
    for found in ranks:
        assert_one_noise(found, alone)
        for one, other in zip(found["sums"], alone["sums"], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    assert_same_weights(*ranks)


def test_noise_of_each_ranks_own_is_found_out(tmp_path, alone):
    ranks = two_ranks(tmp_path, fault="own noise")
    with pytest.raises(AssertionError, match="the noise differs"):
        assert_one_noise(ranks[0], alone)


def test_keys_that_differ_are_found_out(tmp_path):
    ranks = two_ranks(tmp_path, fault="own key")
    with pytest.raises(AssertionError, match="weights of the ranks differ"):
        assert_same_weights(*ranks)


def _rank(rank, meet, path, fault, wrap):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=Path(meet).as_uri(), rank=int(rank), world_size=2
    )
    torch.save(train(int(rank), 2, fault=fault, wrap=bool(wrap)), path)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _rank(*sys.argv[1:])
