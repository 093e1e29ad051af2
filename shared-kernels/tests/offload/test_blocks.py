"""Which modules become blocks, and which parameters travel with them."""

from __future__ import annotations

import pytest
import torch
from shared_kernels.offload import discover_blocks
from shared_kernels.testing.models import ARCHITECTURES, tiny_model
from torch import nn


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_parameter_is_in_one_unit(name):
    model = tiny_model(name)
    plan = discover_blocks(model)
    names = [p.name for unit in plan.units for p in unit.params]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())
    assert len(plan.blocks) == (6 if name == "t5" else 4)
    assert plan.rule == "GradientCheckpointingLayer"
    assert plan.resident.module is None
    assert [u.index for u in plan.units] == list(range(len(plan.units)))


def test_tied_weights_have_one_canonical_name_and_stay_resident():
    plan = discover_blocks(tiny_model("llama"))
    assert "model.embed_tokens.weight" in {p.name for p in plan.resident.params}
    assert plan.unit_of()["model.layers.2.mlp.up_proj.weight"] == 2


def test_a_parameter_shared_by_two_blocks_stays_resident():
    layers = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])
    layers[2].weight = layers[0].weight
    plan = discover_blocks(nn.Sequential(layers, nn.Linear(2, 2)))
    assert [len(unit.params) for unit in plan.blocks] == [1, 2, 1]
    assert {p.name for p in plan.resident.params} >= {"0.0.weight"}


def test_one_block_used_under_two_names_is_one_block():
    shared = nn.Linear(2, 2)
    plan = discover_blocks(nn.ModuleList([shared, shared, nn.Linear(2, 2)]), spec="[0-9]")
    assert [unit.name for unit in plan.blocks] == ["0", "2"]


def test_no_split_modules_then_the_largest_list():
    class Block(nn.Linear):
        pass

    class Marked(nn.Module):
        _no_split_modules = ("Block",)

        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleDict({"a": Block(2, 2), "b": Block(2, 2)})

    assert discover_blocks(Marked()).rule == "_no_split_modules"
    lists = nn.ModuleDict(
        {
            "small": nn.ModuleList([nn.Linear(2, 2)] * 1 + [nn.Linear(2, 2)]),
            "large": nn.ModuleList([nn.Linear(9, 9) for _ in range(3)]),
        }
    )
    plan = discover_blocks(lists)
    assert plan.rule == "ModuleList"
    assert [unit.name for unit in plan.blocks] == ["large.0", "large.1", "large.2"]


def test_patterns_name_blocks_and_exceptions():
    model = tiny_model("llama")
    plan = discover_blocks(model, r"model\.layers\.\d+\.mlp")
    assert [unit.name for unit in plan.blocks] == [f"model.layers.{k}.mlp" for k in range(4)]
    plan = discover_blocks(model, resident=[r"model\.layers\.0"])
    assert [unit.name for unit in plan.blocks] == [f"model.layers.{k}" for k in (1, 2, 3)]
    both = discover_blocks(model, [r"model\.layers\.\d", r"model\.layers\.\d\.mlp"])
    assert len(both.blocks) == 4, "nested matches belong to the outer block"
    with pytest.raises(ValueError, match="matches no module"):
        discover_blocks(model, "layer")
    with pytest.raises(ValueError, match="matches none of the blocks"):
        discover_blocks(model, resident=["layer"])


def test_refusals_say_what_to_do():
    with pytest.raises(ValueError, match="no repeated blocks found in Linear; name them"):
        discover_blocks(nn.Linear(2, 2))
    model = nn.ModuleList([nn.Linear(2, 2).double(), nn.Linear(2, 2).double()])
    with pytest.raises(ValueError, match=r"float64.*requires_grad_\(False\)"):
        discover_blocks(model)
    assert discover_blocks(model.requires_grad_(False)).blocks
    views = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    views[1].weight = nn.Parameter(views[0].weight.data.T)
    with pytest.raises(ValueError, match="different tensors over the same memory"):
        discover_blocks(views)


def test_meta_parameters_are_fine():
    with torch.device("meta"):
        model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    assert sum(unit.nbytes for unit in discover_blocks(model).units) == 2 * 6 * 4
