"""Two ranks against one process: the same noise, once, and the same weights."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch
from shared_kernels.testing.models import tiny_model

STEPS, BATCH = 3, 4
#: What is broken, and what the model is wrapped in.
CASES = (
    *(("", wrap) for wrap in ("", "ddp", "fsdp")),
    *((fault, "") for fault in ("own key", "own noise")),
    *((fault, "fsdp") for fault in ("no offset", "not summed", "leak")),
)

pytestmark = pytest.mark.slow


def wrapped(model, how):
    """The model under DDP or FSDP2."""
    if how == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    if how == "fsdp":
        from torch.distributed.fsdp import fully_shard

        first = model.model.layers[0]
        for module in (first.mlp.down_proj, *model.model.layers, model.model.norm):
            fully_shard(module)
        fully_shard(model)
    return model


def local(tensor):
    """This rank's part."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def faulty(fault, rank, world):
    """Break one thing, as a context manager."""
    from flashdp import collector, engine
    from flashdp.noise import NoiseSource
    from torch import distributed

    reduce, own = distributed.all_reduce, torch.Generator().manual_seed(rank)
    return {
        "": nullcontext,
        "leak": nullcontext,
        "own key": lambda: mock.patch.object(NoiseSource, "agree", lambda self: None),
        "own noise": lambda: mock.patch.object(
            distributed, "all_reduce", lambda t: reduce(t.add_(torch.randn(t.shape, generator=own)))
        ),
        "no offset": lambda: mock.patch.object(engine, "first_element", lambda param: 0),
        "not summed": lambda: mock.patch.object(
            collector, "reduce_scatter", lambda total, param: total.chunk(world)[rank]
        ),
    }[fault]()


def train(rank, world, *, fault="", wrap="", device="cpu"):
    """Run an empty step and STEPS real ones; every rank takes its part of each logical batch."""
    from flashdp.engine import PrivacyEngine
    from flashdp.errors import PrivacyError
    from flashdp.losses import unit_loss
    from shared_kernels.testing.models import tiny_inputs

    # A vocabulary that two ranks cannot share evenly.
    model = tiny_model("llama", vocab_size=97).to(device)
    called = wrapped(model, wrap)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    secure = fault == "own key"
    engine = PrivacyEngine(secure_rng=secure, seed=None if secure else 7)
    engine.make_private(
        called, optimizer, noise_multiplier=0.5, max_grad_norm=1.0, expected_batch_size=BATCH
    )
    sums, noises, drawn = [], [], engine.noise.noised

    def noised(parts, **kwargs):
        parts = list(parts)
        sums.extend(part.total.clone() for part in parts)
        for out in drawn(parts, **kwargs):
            noises.append(out.clone())
            yield out

    engine.noise.noised = noised
    share = BATCH // world
    if fault == "leak":
        # A weight is used past its layer.
        model.model.layers[0].register_forward_hook(
            lambda layer, _, out: out + 1e-3 * layer.input_layernorm.weight.sum(), prepend=True
        )
        inputs = tiny_inputs("llama", batch=BATCH)
        try:
            called(**inputs).loss.backward()
        except PrivacyError as error:
            return {"error": str(error)}
        return {"error": "none"}
    with faulty(fault, rank, world):
        # Nothing was drawn: what is released is noise alone, and can be compared bit by bit.
        optimizer.step()
        empty, first = list(noises), len(noises)
        for step in range(STEPS):
            inputs = tiny_inputs("llama", batch=BATCH, seed=step)
            part = slice(rank * share, (rank + 1) * share)
            mine = {k: v[part].to(device) for k, v in inputs.items()}
            logits = called(mine["input_ids"]).logits
            unit_loss(logits, mine["labels"]).backward()
            optimizer.step()
    return {
        "noise": empty,
        "sums": sums[first : 2 * first],
        "weights": [local(p).detach() for p in model.parameters()],
    }


def in_two_processes(folder, device):
    """Results of both ranks by fault and wrapper, all from one pair of processes."""
    paths = [folder / f"{rank}.pt" for rank in range(2)]
    meet = str(folder / "meet")
    processes = [
        subprocess.Popen([sys.executable, __file__, str(rank), meet, str(path), device])
        for rank, path in enumerate(paths)
    ]
    try:
        assert [process.wait(timeout=240) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    found = [torch.load(path, map_location="cpu") for path in paths]
    return {case: [one[case] for one in found] for case in found[0]}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return in_two_processes(tmp_path_factory.mktemp("ranks"), "cpu")


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


@pytest.mark.parametrize("wrap", ["", "ddp"])
def test_two_ranks_are_one_process(ranks, alone, wrap):
    for found in ranks["", wrap]:
        assert_one_noise(found, alone)
        for one, other in zip(found["sums"], alone["sums"], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    assert_same_weights(*ranks["", wrap])


def whole(halves):
    """What two ranks hold the halves of."""
    return {
        key: [torch.cat(parts) for parts in zip(*(found[key] for found in halves), strict=True)]
        for key in halves[0]
    }


def test_sharded_ranks_are_one_process(ranks, alone):
    # Each holds a part of every parameter, and neither an equal one of the embedding.
    assert [len(found["weights"][0]) for found in ranks["", "fsdp"]] == [49, 48]
    found = whole(ranks["", "fsdp"])
    assert_one_noise(found, alone)
    for key in ("sums", "weights"):
        for one, other in zip(found[key], alone[key], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_shards_with_equal_noise_are_found_out(ranks, alone):
    with pytest.raises(AssertionError, match="the noise differs"):
        assert_one_noise(whole(ranks["no offset", "fsdp"]), alone)


def test_shards_of_one_ranks_sum_are_found_out(ranks, alone):
    found = whole(ranks["not summed", "fsdp"])
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(found["sums"][0], alone["sums"][0], rtol=0, atol=1e-6)


def test_a_gradient_past_its_layer_is_found_in_a_shard(ranks):
    for found in ranks["leak", "fsdp"]:
        assert "past its private layer" in found["error"]
        assert "layers.0.input_layernorm.weight" in found["error"]


def test_noise_of_each_ranks_own_is_found_out(ranks, alone):
    with pytest.raises(AssertionError, match="the noise differs"):
        assert_one_noise(ranks["own noise", ""][0], alone)


def test_keys_that_differ_are_found_out(ranks):
    with pytest.raises(AssertionError, match="weights of the ranks differ"):
        assert_same_weights(*ranks["own key", ""])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_are_one(tmp_path):
    alone = {
        key: [value.cpu() for value in values]
        for key, values in train(0, 1, device="cuda:0").items()
    }
    ranks = in_two_processes(tmp_path, "cuda")
    for wrap in ("", "ddp", "fsdp"):
        both = ranks["", wrap]
        for found in [whole(both)] if wrap == "fsdp" else both:
            assert_one_noise(found, alone)
            for one, other in zip(found["sums"], alone["sums"], strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert_same_weights(*ranks["", ""])


def _rank(rank, meet, path, device):
    torch.set_num_threads(1)
    cases, backend = CASES, "gloo"
    if device == "cuda":
        # What is broken on purpose needs no GPU.
        cases, backend, device = [case for case in CASES if not case[0]], "nccl", f"cuda:{rank}"
        torch.cuda.set_device(device)
    # what a model imports takes the group as a default if there is one (torch.distributed.nn),
    # and a group that outlives destroy_process_group may abort the process at its end
    tiny_model("llama")
    torch.distributed.init_process_group(
        backend, init_method=Path(meet).as_uri(), rank=int(rank), world_size=2
    )
    torch.save(
        {
            (fault, wrap): train(int(rank), 2, fault=fault, wrap=wrap, device=device)
            for fault, wrap in cases
        },
        path,
    )
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _rank(*sys.argv[1:])
