"""What is said beforehand is what it takes."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from sam_if import SAM, Trajectory, UnsupportedOptimizerError, classification, plan, planning

BATCH = 4


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.GELU(), torch.nn.Linear(8, 3))


def made(base=torch.optim.SGD, **options):
    model = network()
    return model, SAM(model.parameters(), base, 0.1, lr=0.1, **options)


def batch():
    return torch.randn(BATCH, 6), torch.randint(3, (BATCH,))


@pytest.mark.parametrize("storage", ["all", "sqrt"])
@pytest.mark.parametrize("steps", [1, 5, 17])
@pytest.mark.parametrize("base", ["sgd", "momentum", "adamw"])
def test_bytes_are_those_of_the_run(base, steps, storage, tmp_path):
    kind = torch.optim.AdamW if base == "adamw" else torch.optim.SGD
    model, optimizer = made(kind, **({"momentum": 0.9} if base == "momentum" else {}))
    before = [p.clone() for p in model.parameters()]
    told = plan(model, classification(), optimizer, batch(), steps=steps, storage=storage,
                folder=tmp_path / "run")  # fmt: skip
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert not list(tmp_path.iterdir())
    assert not optimizer.state
    run = Trajectory(model, classification(), optimizer, storage=storage, folder=tmp_path / "run")
    for _ in range(steps):
        run.step(batch(), range(BATCH))
    held = run._snapshots.held()
    # the first step has no moments yet
    weights = sum(part.nbytes for index in held[1:] for part in run._snapshots.get(index).values())
    moments = {"sgd": 0, "momentum": 1, "adamw": 2}[base]
    assert told.parameters == sum(p.numel() for p in model.parameters())
    assert told.weight_bytes == weights + (1 + moments) * told.parameters * 4
    assert told.batch_bytes == steps * (BATCH * 6 * 4 + BATCH * 8)
    assert told.place == "disk"
    assert told.free_bytes > 0
    assert not told.problems
    again = steps - len(held)
    assert told.replay_seconds == pytest.approx(again * told.training_seconds / steps)
    assert told.adjoint_seconds > 0
    told.require()


def test_more_than_there_is_is_refused(monkeypatch, tmp_path):
    model, optimizer = made()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    told = plan(model, classification(), optimizer, batch(), steps=100, folder=tmp_path / "a" / "b")
    assert told.problems[0].startswith("the run takes")
    with pytest.raises(MemoryError, match=r"of disk, and there are 1000 B; storage='sqrt'"):
        told.require()
    small = plan(model, classification(), optimizer, batch(), steps=2, folder=tmp_path,
                 keep_batches=False)  # fmt: skip
    assert not small.problems
    assert small.batch_bytes == 0
    monkeypatch.setattr(planning, "memory_limits", lambda: SimpleNamespace(free=0))
    with pytest.raises(MemoryError, match="of host memory, and there are 0 B"):
        plan(model, classification(), optimizer, batch(), steps=100).require()


def test_queries_go_together():
    model, optimizer = made()
    one, many = (
        plan(model, classification(), optimizer, batch(), steps=10, queries=queries, together=4,
             storage="sqrt")
        for queries in (4, 13)
    )  # fmt: skip
    step = one.training_seconds / 10
    assert one.replay_seconds == pytest.approx(step * 7)
    assert many.replay_seconds == pytest.approx(many.training_seconds / 10 * 7 * 4)


def test_bad_input():
    model, optimizer = made()
    for options, match in (
        ({"steps": 0}, "steps: expected"), ({"steps": 1, "queries": 0}, "queries: expected"),
        ({"steps": 1, "together": 0}, "together: expected"),
        ({"steps": 1, "storage": "log"}, "storage: expected one of all, sqrt"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            plan(model, classification(), optimizer, batch(), **options)
    with pytest.raises(UnsupportedOptimizerError, match="RMSprop"):
        plan(*(lambda m, o: (m, classification(), o, batch()))(*made(torch.optim.RMSprop)), steps=1)
