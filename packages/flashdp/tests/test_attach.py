"""Rules are compared with autograd once for equal modules, and for each that differs."""

from __future__ import annotations

import pytest
import torch
from flashdp import attach
from torch import nn


@pytest.fixture
def probes(monkeypatch):
    """Modules that were probed."""
    seen, probe = [], attach._probe

    def spy(module, rule, own):
        seen.append(module)
        return probe(module, rule, own)

    monkeypatch.setattr(attach, "_probe", spy)
    return seen


def test_equal_modules_are_probed_once(probes):
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)), nn.Linear(4, 5), nn.LayerNorm(5))
    model[1].bias = None
    assert attach.find_issues(model) == []
    assert probes == [model[0], model[1], model[5], model[6]]


def test_a_changed_forward_is_probed_by_itself(probes):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    plain = model[1].forward
    model[1].forward = lambda x: plain(x.flip(0))
    model[2].register_forward_hook(lambda module, args, out: 2 * out)
    issues = attach.find_issues(model)
    assert probes == list(model)
    assert [issue.name for issue in issues] == ["1"]


def test_what_is_sharded_otherwise_is_refused():
    """Stand-ins: a parameter that is offloaded needs a GPU to be made."""
    from types import SimpleNamespace

    from flashdp.sharding import trouble
    from torch.distributed.tensor import Replicate, Shard

    def param(placements, device="cpu", used="cpu"):
        mesh = SimpleNamespace(device_type=used)
        return SimpleNamespace(placements=placements, device=torch.device(device), device_mesh=mesh)

    assert trouble(param([Shard(0)])) is None
    assert trouble(param([Replicate(), Shard(0)])) is None
    assert "Shard(dim=1)" in trouble(param([Shard(1)]))
    assert "used on cuda (CPUOffloadPolicy)" in trouble(param([Shard(0)], used="cuda"))
