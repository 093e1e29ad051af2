"""A check says before the weights are there what `make_private` says when they are."""

import pytest
import torch
from flashdp.attach import find_issues, find_layers
from flashdp.check import check_model, outline
from shared_kernels.testing.models import tiny_model
from torch import nn


def outlined(tmp_path, family):
    tiny_model(family).config.save_pretrained(tmp_path)
    return outline(str(tmp_path))


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_a_model_without_weights_is_judged_as_one_with_them(tmp_path, family):
    found = check_model(outlined(tmp_path, family))
    model = tiny_model(family)
    assert found.passed
    assert [str(issue) for issue in find_issues(model)] == []
    # Two layers of one kind are one entry, and no layer is left out.
    assert sum(layer.count for layer in found.layers) == len(find_layers(model))
    assert {layer.rule for layer in found.layers} == {r.name for _, r in find_layers(model)}
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert sum(layer.parameters for layer in found.layers) == found.parameters
    assert found.frozen == 0


def test_a_model_of_any_size_takes_no_memory():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(60_000, 8), nn.Linear(8, 700_000_000))
    model[1].requires_grad_(False)
    found = check_model(model)
    assert found.passed
    assert found.frozen == 9 * 700_000_000
    assert [layer.shape for layer in found.layers] == [(8, 60_000)]


def test_what_is_refused_is_listed_with_remedies_and_has_no_rule():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(5))

        def forward(self, x):
            return x * self.weight

    model = nn.Sequential(nn.Linear(5, 5), Scale(), nn.BatchNorm1d(5))
    found = check_model(model)
    assert not found.passed
    assert [issue.name for issue in found.issues] == ["2", "1.weight"]
    assert {layer.kind: layer.rule for layer in found.layers} == {
        "Linear": "matrix", "Scale": "", "BatchNorm1d": "",
    }  # fmt: skip
    assert found.to_dict()["issues"][1]["remedy"].startswith("freeze it")
    covered = check_model(nn.Sequential(model[0], model[1]), fallback=True)
    assert covered.passed
    assert [layer.rule for layer in covered.layers] == ["matrix", "vmap fallback"]


def test_what_is_no_causal_language_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.*no such file"):
        outline(str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match="causal language model"):
        outline(str(tmp_path))
