"""Logs opened late, closed and opened again; weights overwritten from outside."""

import pytest
import torch
import zo2
from shared_kernels.testing.models import tiny_inputs, tiny_model
from zo2 import LogError, OffloadConfig, ZOConfig

ZO, STREAMED = ZOConfig(seed=3), OffloadConfig(prefetch=1)
LAYERS = {"num_hidden_layers": 2}
INPUTS = tiny_inputs("llama")


def make(offload=STREAMED, **kwargs):
    model = tiny_model("llama", **LAYERS | kwargs)
    return zo2.prepare(model, ZO, offload, device="cpu")


def test_a_log_may_be_opened_late_closed_and_opened_again(tmp_path):
    engine, whole = make(), make()
    whole.open_log(tmp_path / "whole.zolog")
    engine.open_log(tmp_path / "a.zolog")
    with pytest.raises(RuntimeError, match="is open"):
        engine.open_log(tmp_path / "b.zolog")
    for t in range(4):
        if t == 2:
            engine.close_log()
            engine.open_log(tmp_path / "a.zolog")
        engine.step(INPUTS, lr=1e-3)
        whole.step(INPUTS, lr=1e-3)
    for each in (engine, whole):
        each.close_log()
    assert (tmp_path / "a.zolog").read_bytes() == (tmp_path / "whole.zolog").read_bytes()
    engine.step(INPUTS, lr=1e-3)
    with pytest.raises(LogError, match="holds 4 updates, this engine has made 5"):
        engine.open_log(tmp_path / "a.zolog")
    assert engine.log is None


def test_a_log_cannot_start_in_mid_run_or_on_other_weights(tmp_path):
    engine = make()
    engine.open_log(tmp_path / "a.zolog")
    engine.check_log(tmp_path / "a.zolog")
    with pytest.raises(LogError, match="differs in value"):
        make(seed=5).check_log(tmp_path / "a.zolog")
    late = make()
    late.step(INPUTS, lr=1e-3)
    with pytest.raises(RuntimeError, match="without one"):
        late.open_log(tmp_path / "b.zolog")


@pytest.mark.parametrize("offload", [None, STREAMED], ids=["resident", "streamed"])
def test_overwritten_weights_are_used_at_once_and_trained_on(tmp_path, offload):
    engine, other = make(offload), tiny_model("llama", seed=5, **LAYERS)
    for _ in range(2):
        engine.step(INPUTS, lr=1e-2)
    # Everything is folded and the resident part is bound: nothing but the order to forget it
    # tells the engine that its copies are old.
    engine.flush()
    engine.model(**INPUTS)
    engine.rewrite(lambda model: model.load_state_dict(other.state_dict()))
    with torch.no_grad():
        assert torch.equal(engine.model(**INPUTS).loss, other(**INPUTS).loss)
    fresh = zo2.prepare(other, ZO.replace(seed=9), offload, device="cpu")
    left = engine.estimate(lambda m: m(**INPUTS).loss)
    assert left.loss.item() == pytest.approx(fresh.estimate(INPUTS).loss.item(), rel=1e-2)
    engine.step(INPUTS, lr=0.0)
    assert all(torch.equal(v, fresh.state_dict()[k]) for k, v in engine.state_dict().items())
    with pytest.raises(RuntimeError, match="prepare it anew"):
        engine.open_log(tmp_path / "a.zolog")


def test_weights_are_not_overwritten_under_a_log_or_by_halves(tmp_path):
    engine = make()
    engine.open_log(tmp_path / "a.zolog")
    with pytest.raises(RuntimeError, match="call close_log"):
        engine.rewrite(lambda model: None)
    engine.close_log()
    before = engine.state_dict()

    def spoil(model):
        model.lm_head.weight.zero_()
        raise OSError("disk")

    def replace(model):
        model.model.norm.weight = torch.nn.Parameter(torch.zeros(32))

    with pytest.raises(OSError, match="disk"):
        engine.rewrite(spoil)
    assert all(torch.equal(v, before[k]) for k, v in engine.state_dict().items())
    engine.open_log(tmp_path / "a.zolog")
    engine.close_log()
    with pytest.raises(RuntimeError, match="in place"):
        engine.rewrite(replace)


def test_weighted_objectives_add_up():
    engine = make()
    whole = engine.estimate(lambda m: m(**INPUTS).loss)
    loss = lambda m: m(**INPUTS).loss  # noqa: E731
    parts = engine.estimate([(loss, 0.25), (loss, 0.5)])
    torch.testing.assert_close(parts.loss, whole.loss * 0.75)
    torch.testing.assert_close(parts.g, whole.g * 0.75, rtol=0, atol=1e-3)
    for wrong in ([], [loss], 3):
        with pytest.raises(TypeError, match="pairs of functions and weights"):
            engine.estimate(wrong)
    micro = zo2.prepare(tiny_model("llama", **LAYERS), ZO.replace(micro_batch_size=2), device="cpu")
    with pytest.raises(ValueError, match="cannot be split"):
        micro.estimate(loss)


def test_a_part_without_labels_counts_for_nothing():
    inputs = {k: v.clone() for k, v in INPUTS.items()}
    inputs["labels"][1] = -100
    whole = make().estimate(inputs)
    zo = ZO.replace(micro_batch_size=1)
    parts = zo2.prepare(tiny_model("llama", **LAYERS), zo, device="cpu").estimate(inputs)
    torch.testing.assert_close(parts.loss, whole.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(parts.g, whole.g, rtol=0, atol=2e-3)
    inputs["labels"][:] = -100
    with pytest.raises(ValueError, match="no label"):
        zo2.prepare(tiny_model("llama", **LAYERS), zo, device="cpu").estimate(inputs)
