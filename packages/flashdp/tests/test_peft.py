"""LoRA adapters of PEFT: only they move, by the sums of a loop over units, and save as ever."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from flashdp.engine import PrivacyEngine
from shared_kernels.testing.models import tiny_inputs, tiny_model

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is missing"),
]
ROWS = 4


def adapted(seed=0):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    torch.manual_seed(seed)
    model = get_peft_model(tiny_model("llama"), config)
    for name, param in model.named_parameters():
        # B starts at zero, where A has no gradient.
        if "lora_B" in name:
            torch.nn.init.normal_(param, std=0.1)
    return model.eval()


def inputs_of_uneven_length():
    inputs = tiny_inputs("llama", batch=ROWS)
    inputs["labels"] = inputs["labels"].clone()
    inputs["labels"][0, :6] = -100
    return inputs


def attach(model, **options):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    engine = PrivacyEngine(secure_rng=False, seed=0)
    defaults = {"noise_multiplier": 0.0, "max_grad_norm": 0.5, "expected_batch_size": 1.0}
    engine.make_private(model, optimizer, **{**defaults, **options})
    return engine, optimizer


def test_sums_are_those_of_a_loop_over_units():
    model = adapted().double()
    plain, inputs = copy.deepcopy(model), inputs_of_uneven_length()
    engine, _ = attach(model)
    model(**inputs).loss.backward()
    found = {engine._parameters[p]: s for p, s in engine.collector.take().items()}
    expected: dict[str, torch.Tensor] = {}
    names = [[p.layer.names[n] for p in g.parts for n in p.names] for g in engine.collector.groups]
    clipped = 0
    for i in range(ROWS):
        plain.zero_grad()
        plain(**{k: v[i : i + 1] for k, v in inputs.items()}).loss.backward()
        grads = {n: p.grad for n, p in plain.named_parameters() if p.requires_grad}
        for group, threshold in zip(names, engine.calibration.thresholds.tolist(), strict=True):
            norm = float(torch.cat([grads[n].flatten() for n in group]).norm())
            clipped += norm > threshold
            factor = min(1.0, threshold / norm) * (1 - 2**-16)
            for n in group:
                expected[n] = expected.get(n, 0) + factor * grads[n]
    assert 0 < clipped < ROWS * len(names)
    assert found.keys() == expected.keys()
    assert all("lora_" in name for name in found)
    for name, value in expected.items():
        # The model's loss is float32.
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5 * float(value.norm()))


def test_only_adapters_move_and_they_survive_a_round_trip(tmp_path):
    from peft import PeftModel

    model, inputs = adapted(), inputs_of_uneven_length()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    classes = [type(m) for m in model.modules()]
    engine, optimizer = attach(model, noise_multiplier=0.3, expected_batch_size=float(ROWS))
    for _ in range(3):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    engine.detach()
    for name, param in model.named_parameters():
        assert torch.equal(param, before[name]) != ("lora_" in name), name
    assert [type(m) for m in model.modules()] == classes
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model("llama"), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)
