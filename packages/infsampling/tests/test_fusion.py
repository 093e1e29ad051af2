"""Projections of one input in one launch."""

import pytest
import torch
from infsampling.fusion import FusedProjections
from shared_kernels.testing.models import tiny_inputs, tiny_model
from torch._dynamo.testing import CompileCounter


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2"])
def test_logits_stay_and_the_model_is_left_as_it_was(name):
    model = tiny_model(name).bfloat16().eval()
    ids = tiny_inputs(name)["input_ids"]
    before = logits(model, ids)
    kept = {n: m.forward for n, m in model.named_modules()}
    with pytest.raises(RuntimeError, match="stop"), FusedProjections(model)() as count:
        assert (count > 0) == (name != "gpt2")
        # the reference is the matrix library, one product after the other
        assert torch.equal(logits(model, ids), before)
        assert torch.equal(logits(model, ids.repeat(8, 1)), before.repeat(8, 1, 1))
        raise RuntimeError("stop")
    assert not any("forward" in vars(m) for m in model.modules())
    assert {n: m.forward for n, m in model.named_modules()} == kept


def test_each_input_is_computed_once_and_weights_are_read_where_they_are(monkeypatch):
    from infsampling import fusion

    model, calls = tiny_model("llama").bfloat16().eval(), []
    real = fusion.skinny_linears
    monkeypatch.setattr(fusion, "skinny_linears", lambda *a: calls.append(len(a[1])) or real(*a))
    ids = tiny_inputs("llama")["input_ids"]
    with FusedProjections(model)():
        logits(model, ids)
        layers = model.config.num_hidden_layers
        assert calls == [3, 2] * layers
        model.model.layers[0].self_attn.k_proj.weight.data.mul_(3)
        changed = logits(model, ids)
        # more rows than the kernel takes
        calls.clear()
        logits(model, ids.repeat(9, 1))
        assert not calls
    assert torch.equal(changed, logits(model, ids))


def test_adapted_and_wide_layers_are_left_alone():
    model = tiny_model("llama").bfloat16()
    attention = model.model.layers[0].self_attn
    attention.q_proj = torch.nn.Sequential(attention.q_proj)
    with FusedProjections(model)() as count:
        assert count == 2 * model.config.num_hidden_layers - 1
    with FusedProjections(tiny_model("llama"))() as count:
        assert count == 0


def test_a_compiled_step_takes_them_in():
    model = tiny_model("llama").bfloat16().eval()
    ids = tiny_inputs("llama")["input_ids"]
    step = torch.compile(lambda x: model(input_ids=x, use_cache=False).logits, backend="aot_eager",
                         fullgraph=True)  # fmt: skip
    with FusedProjections(model)(), torch.no_grad():
        found = step(ids)
        # nothing of a step is held by the next
        assert torch.equal(step(ids), found)
    assert torch.equal(found, logits(model, ids))


def test_a_step_is_compiled_once():
    model = tiny_model("llama").bfloat16().eval()
    ids, counter = tiny_inputs("llama")["input_ids"], CompileCounter()
    step = torch.compile(lambda x: model(input_ids=x, use_cache=False).logits, backend=counter)
    fused = FusedProjections(model)
    for _ in range(3):
        with fused(), torch.no_grad():
            step(ids)
    assert counter.frame_count == 1
    # another layer at that place
    attention = model.model.layers[0].self_attn
    attention.q_proj = torch.nn.Linear(
        attention.q_proj.in_features, attention.q_proj.out_features, False, dtype=torch.bfloat16
    )
    with fused() as count, torch.no_grad():
        found = step(ids)
    assert counter.frame_count == 2
    # the old one is forgotten
    assert count == 2 * model.config.num_hidden_layers
    assert torch.equal(found, logits(model, ids))


def test_another_input_is_another_product():
    mlp = torch.nn.Module()
    mlp.gate_proj, mlp.up_proj = (torch.nn.Linear(8, n, dtype=torch.bfloat16) for n in (6, 5))
    x, y = torch.randn(2, 3, 8).bfloat16()
    with torch.no_grad():
        expected = [mlp.gate_proj(x), mlp.up_proj(y), mlp.up_proj(x), mlp.gate_proj(y)]
        with FusedProjections(mlp)() as count:
            assert count == 1
            found = [mlp.gate_proj(x), mlp.up_proj(y), mlp.up_proj(x), mlp.gate_proj(y)]
    assert all(map(torch.equal, found, expected))
