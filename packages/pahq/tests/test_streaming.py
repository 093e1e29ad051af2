"""Models whose layers are in the host's memory."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from pahq import CircuitFinder, UnsupportedModelError
from pahq.streaming import Streamer

sys.path.insert(0, str(Path(__file__).parent))
from patching_cases import family, lively, logits, pairs

FAMILIES = ["llama", "gpt2", "gpt_neox", "qwen3", "gemma2", "olmo2"]


def both(name, device="cpu", dtype=torch.float64, **options):
    """Finders of the same model, resident and offloaded."""
    model = family(name).to(dtype)
    resident = copy.deepcopy(model).to(device)
    return CircuitFinder(resident), CircuitFinder(
        model, offload="cpu", device=torch.device(device), **options
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_all_is_as_with_resident_weights(name):
    resident, streamed = both(name)
    task = pairs()
    tau = 0.001
    for search in (
        lambda f: f.acdc(task, tau, progress=False),
        lambda f: f.acdc(task, tau, direct_edges=True, max_rows=3, progress=False),
        lambda f: f.eap(task),
        lambda f: f.eap(task, ig_steps=3, metric="kl"),
        lambda f: f.edge_effects(task, progress=False),
        lambda f: f.acdc(task, tau, precision="fp8-rtn", progress=False),
    ):
        wanted, found = search(resident), search(streamed)
        assert torch.equal(found.present, wanted.present)
        assert torch.equal(found.scores.nan_to_num(7), wanted.scores.nan_to_num(7))
        assert not found.scores[found.present].isnan().any()
        assert found.provenance == wanted.provenance
    args = (wanted, task.clean, task.corrupted)
    assert torch.equal(streamed.run(*args), resident.run(*args))
    assert streamed.evaluate(wanted, task) == resident.evaluate(wanted, task)


@pytest.mark.parametrize("precision", ["bf16-delta", "fp8-delta"])
def test_low_precision(precision):
    resident, streamed = both("llama", dtype=torch.float32)
    task = pairs()
    wanted, found = (
        f.acdc(task, 0.01, precision=precision, progress=False) for f in (resident, streamed)
    )
    assert torch.equal(found.present, wanted.present)
    assert torch.equal(found.scores.nan_to_num(7), wanted.scores.nan_to_num(7))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_model_can_be_called_and_is_given_back(name):
    model, task = family(name), pairs()
    was = {key: value.clone() for key, value in model.state_dict().items()}
    wanted = logits(model, task.clean)
    finder = CircuitFinder(model, offload="cpu", device="cpu")
    weight = finder.adapter.blocks[0]
    inside = [p for p in weight.parameters() if p.ndim > 1]
    finder.adapter.load(1)
    assert all(p.isnan().all() and p.untyped_storage().nbytes() <= 8 for p in inside)
    assert torch.equal(logits(model, task.clean), wanted)
    finder.close()
    assert all(p.requires_grad for p in model.parameters())
    now = model.state_dict()
    assert now.keys() == was.keys()
    assert all(torch.equal(now[key], value) for key, value in was.items())
    assert torch.equal(logits(model, task.clean), wanted)
    again = CircuitFinder(model)
    assert again.acdc(task, 0.01, progress=False).provenance["weights"] == finder._weights


def test_the_next_layer_is_copied_ahead():
    finder = CircuitFinder(lively("llama", layers=4), offload="cpu", device="cpu")
    streamer = finder.adapter.streamer
    assert isinstance(streamer, Streamer)
    streamer.load(0)
    for layer in range(3):
        streamer.load(layer)
        assert streamer._ring.holds(layer + 1)
    # what followed the last time: the layers behind a receiver are run again and again
    for layer in (2, 3, 2, 3):
        streamer.load(layer)
    assert streamer._ring.holds(2)
    loads = dict(streamer._ring.uploads)
    for layer in (2, 3, 2):
        streamer.load(layer)
    assert streamer._ring.uploads == loads


def test_gradients_of_more_layers_than_there_are_places():
    model, task = lively("llama", layers=5), pairs()
    wanted = CircuitFinder(copy.deepcopy(model)).eap(task, ig_steps=2, metric="kl")
    found = CircuitFinder(model, offload="cpu", device="cpu").eap(task, ig_steps=2, metric="kl")
    assert torch.equal(found.scores, wanted.scores)
    assert float(found.scores.abs().max()) > 1e-3


def test_what_writes_has_its_own_weights():
    resident, streamed = both("llama")
    z = torch.randn(4, 3, 5, 8, dtype=torch.float64)
    wanted = resident.adapter.write(0, range(4), z)
    streamed.adapter.load(1)
    assert torch.equal(streamed.adapter.write(0, range(4), z), wanted)


def test_what_is_refused():
    model = family("llama")
    with pytest.raises(ValueError, match=r"device: expected none without offload"):
        CircuitFinder(model, device="cpu")
    with pytest.raises(ValueError, match=r"offload: expected .* got str 'disk'"):
        CircuitFinder(model, offload="disk")
    model.model.layers[0].mlp.to("meta")
    with pytest.raises(UnsupportedModelError, match=r"meta device.* offload='cpu'"):
        CircuitFinder(model)


def alike(found, wanted):
    """The same edges; scores as near as products of batches of other sizes are."""
    assert torch.equal(found.present, wanted.present)
    torch.testing.assert_close(found.scores, wanted.scores, rtol=1e-3, atol=1e-6, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16-delta", "fp8-delta"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "qwen3"])
def test_on_a_gpu(name, precision, cuda):
    resident, streamed = both(name, cuda, torch.float32)
    task = pairs()
    for direct in (False, True):
        wanted, found = (
            f.acdc(task, 0.01, precision=precision, direct_edges=direct, progress=False)
            for f in (resident, streamed)
        )
        alike(found, wanted)
    alike(streamed.eap(task), resident.eap(task))
    alike(streamed.edge_effects(task, progress=False), resident.edge_effects(task, progress=False))


@pytest.mark.gpu
def test_weights_of_16_bits_on_a_gpu(cuda):
    resident, streamed = both("llama", cuda, torch.bfloat16)
    task = pairs()
    wanted, found = (f.acdc(task, 0.01, progress=False) for f in (resident, streamed))
    alike(found, wanted)
