"""The engine runs unchanged models whose blocks live elsewhere."""

from __future__ import annotations

import pytest
import torch
from shared_kernels.offload import (
    DecodeMaterializer,
    OffloadEngine,
    WeightStore,
    discover_blocks,
    layout_unit,
)
from shared_kernels.testing.models import ARCHITECTURES, tiny_inputs, tiny_model
from torch import nn


def stream(
    model: nn.Module, *, prefetch: int = 1, codec: str = "fp32", resident=()
) -> OffloadEngine:
    plan = discover_blocks(model)
    layouts = [layout_unit(u, codec) for u in plan.units]
    store = WeightStore(layouts, torch.device("cpu"), {plan.resident.index, *resident})
    for unit, layout in zip(plan.units, layouts, strict=True):
        layout.write(store.home(unit.index).flat, {p.name: p.parameter for p in unit.params})
    return OffloadEngine(model, plan, store, prefetch=prefetch)


def loss_of(model, inputs):
    with torch.no_grad():
        return model(**inputs).loss


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_streamed_model_equals_itself(name):
    model, inputs = tiny_model(name), tiny_inputs(name)
    expected = loss_of(model, inputs)
    engine = stream(model)
    assert torch.equal(loss_of(model, inputs), expected)
    before = dict(engine.visits)
    assert set(before.values()) == {1}
    losses = engine.lockstep([(lambda: model(**inputs).loss, None)] * 4, training=False)
    assert all(torch.equal(x, expected) for x in losses)
    assert {k: engine.visits[k] - before[k] for k in before} == dict.fromkeys(before, 1)


@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if n != "bert"])
def test_generate_is_token_equal(name):
    model, inputs = tiny_model(name), tiny_inputs(name)
    kwargs = {"max_new_tokens": 8, "do_sample": False, "use_cache": True}
    expected = model.generate(inputs["input_ids"], **kwargs)
    engine = stream(model, prefetch=2)
    assert torch.equal(model.generate(inputs["input_ids"], **kwargs), expected)
    assert engine.visits


@pytest.mark.parametrize("prefetch", [1, 2])
def test_every_block_is_uploaded_once_a_pass(prefetch):
    model, inputs = tiny_model("llama", num_hidden_layers=6), tiny_inputs("llama")
    engine = stream(model, prefetch=prefetch)
    loss_of(model, inputs)
    for _ in range(3):
        before = dict(engine.ring.uploads)
        loss_of(model, inputs)
        assert {k: engine.ring.uploads[k] - before[k] for k in before} == dict.fromkeys(before, 1)


def test_a_weight_read_outside_a_visit_is_nan():
    model = tiny_model("llama")
    stream(model)
    assert torch.isnan(model.model.layers[0].mlp.up_proj.weight).all()


def test_state_dict_is_refused():
    model = tiny_model("llama")
    engine = stream(model)
    with pytest.raises(RuntimeError, match=r"engine\.state_dict"):
        model.state_dict()
    engine.close()


def test_probe_failure_ends_the_others_and_is_raised():
    model, inputs = tiny_model("llama"), tiny_inputs("llama")
    engine = stream(model)

    def bad():
        model(**inputs)
        raise ZeroDivisionError("objective")

    with pytest.raises(ZeroDivisionError, match="objective"):
        engine.lockstep([(lambda: model(**inputs).loss, None), (bad, None)])
    expected = loss_of(model, inputs)
    assert torch.isfinite(expected)


def test_probes_of_different_length_share_what_they_can():
    model, inputs = tiny_model("llama"), tiny_inputs("llama")
    engine = stream(model)
    short = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None}
    long = short | {"max_new_tokens": 6}
    with torch.no_grad():
        a, b = engine.lockstep(
            [
                (lambda: model.generate(inputs["input_ids"], **short), None),
                (lambda: model.generate(inputs["input_ids"], **long), None),
            ],
            training=False,
        )
    assert torch.equal(a, b[:, : a.shape[1]])
    assert set(engine.visits.values()) == {6}


def test_thread_settings_follow_the_caller():
    model, inputs = tiny_model("llama"), tiny_inputs("llama")
    engine = stream(model)
    seen = []

    def look():
        seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return model(**inputs).logits.dtype

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert engine.lockstep([(look, None)] * 2) == [torch.bfloat16] * 2
    assert seen == [(False, True)] * 2


def test_autocast_does_not_keep_the_weights_of_another_probe():
    """Side by side, variants with different weights give what each gives alone."""

    class Scaled(DecodeMaterializer):
        def groups(self, variants):
            return [[v] for v in dict.fromkeys(variants)]

        def materialize(self, unit, buffer, group, *, training):
            views, changed = super().materialize(unit, buffer, group, training=training)
            return {v: [w * (v or 1.0) for w in ws] for v, ws in views.items()}, changed

    model, inputs = tiny_model("llama"), tiny_inputs("llama")
    engine = stream(model)
    engine.materializer = Scaled()

    def losses(*scales):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return engine.lockstep([(lambda: model(**inputs).loss, s) for s in scales])

    assert losses(1.0, 2.0) == [*losses(1.0), *losses(2.0)]


def test_dropout_masks_agree_between_probes():
    model, inputs = tiny_model("bert"), tiny_inputs("bert")
    engine = stream(model)
    model.train()
    torch.manual_seed(3)
    with torch.no_grad():
        a, b = engine.lockstep([(lambda: model(**inputs).loss, None)] * 2, training=False)
        c, _ = engine.lockstep([(lambda: model(**inputs).loss, None)] * 2, training=False)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_close_gives_forward_back():
    model = tiny_model("llama")
    layer = model.model.layers[0]
    engine = stream(model)
    assert "forward" in vars(layer)
    engine.close()
    assert "forward" not in vars(layer)
