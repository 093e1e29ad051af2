"""Runs on disk and in part: the same bits, and what happens to damaged and interrupted ones."""

import itertools
import json
import shutil

import pytest
import torch
from sam_if import (
    SAM,
    Trajectory,
    TrajectoryError,
    TrajectoryInfluence,
    causal_lm,
    classification,
    regression,
)
from sam_if.records import fingerprint
from shared_kernels.testing.models import tiny_model
from torch.nn.functional import cross_entropy

F64 = torch.float64
SAMPLES, BATCH = 12, 4
BASES = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.02}),
    "plain": (torch.optim.SGD, {}),
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "adam": (torch.optim.Adam, {"weight_decay": 0.02, "eps": 1e-3}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1, "eps": 1e-3, "foreach": False}),
}


def network(dtype=F64, seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(4, 5), torch.nn.GELU(), torch.nn.Linear(5, 3)
    ).to(dtype)  # fmt: skip


def data(dtype=F64):
    draws = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, 4, generator=draws, dtype=dtype)
    return x, torch.randint(3, (SAMPLES,), generator=draws)


QUERY = [tuple(part[:3] for part in data())]


def orders(steps):
    draws = torch.Generator().manual_seed(2)
    return [torch.randperm(SAMPLES, generator=draws)[:BATCH] for _ in range(steps)]


def trained(
    steps, *, base="sgd", dtype=F64, adaptive=False, stop=None, groups=None, model=None, **options
):  # fmt: skip
    """A run of some steps, with a schedule."""
    x, y = data(dtype)
    model = model or network(dtype)
    kind, given = BASES[base]
    optimizer = SAM(groups(model) if groups else model.parameters(), kind, 0.2, adaptive,
                    lr=0.1, **given)  # fmt: skip
    made = Trajectory(model, classification(), optimizer, **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for number, samples in enumerate(orders(steps)[:stop]):
        for group in optimizer.param_groups:
            group["rho"] = 0.2 - 0.1 * number / steps
            group["weight_decay"] = group["weight_decay"] * 0.95
        made.step((x[samples], y[samples]), samples)
        schedule.step()
    return made, model, optimizer, schedule


def scores(run, **options):
    return TrajectoryInfluence(run, **options).scores(QUERY).values


def batch_of(samples):
    x, y = data()
    return x[list(samples)], y[list(samples)]


@pytest.mark.parametrize("steps", [1, 13])
@pytest.mark.parametrize("base", BASES)
def test_scores_are_the_same_bits_whatever_was_kept(base, steps, tmp_path):
    whole, _, _, _ = trained(steps, base=base)
    assert whole.check() < 1e-11
    wanted = scores(whole)
    for name, options in {
        "part": {"storage": "sqrt"}, "files": {"folder": tmp_path / "files"},
        "part of files": {"folder": tmp_path / "part", "storage": "sqrt"},
        "made": {"storage": "sqrt", "batch_of": batch_of},
    }.items():  # fmt: skip
        run, _, _, _ = trained(steps, base=base, **options)
        before = run.vector.read()
        assert torch.equal(scores(run), wanted), name
        # what is made again is made in the model, which has its weights back afterwards
        assert torch.equal(run.vector.read(), before)
        run.finish()
        assert torch.equal(scores(run), wanted), name
        if "folder" in options:
            found = Trajectory.open(options["folder"], network(seed=7))
            assert torch.equal(scores(found), wanted), name
            assert torch.equal(found.weights, before)
            assert found.check() < 1e-11
            rate = found.records[-1].lr
            assert rate == whole.records[-1].lr


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_steps_made_again_have_the_weights_of_the_run(dtype, adaptive):
    whole, _, _, _ = trained(20, dtype=dtype, adaptive=adaptive, max_grad_norm=0.5)
    part, _, _, _ = trained(
        20, dtype=dtype, adaptive=adaptive, max_grad_norm=0.5, storage="sqrt"
    )  # fmt: skip
    assert part._snapshots.held() == [0, 4, 8, 12, 16]
    assert whole._snapshots.held() == list(range(20))
    for one, other in zip(whole.forwards(), part.forwards(), strict=True):
        assert torch.equal(one.weights, other.weights)
        assert one.moments.keys() == other.moments.keys()
        assert all(torch.equal(part, other.moments[name]) for name, part in one.moments.items())
    for one, other in zip(whole.backwards(), part.backwards(), strict=True):
        assert one.index == other.index
        assert torch.equal(one.weights, other.weights)


@pytest.mark.parametrize("steps", [1, 3, 4, 9, 40])
def test_about_the_root_of_all_steps_are_kept(steps):
    run, _, _, _ = trained(steps, storage="sqrt", base="plain")
    held = run._snapshots.held()
    gaps = {after - before for before, after in itertools.pairwise([*held, steps])}
    assert held[0] == 0
    assert len(held) <= 2 * steps**0.5 + 1
    assert max(gaps) <= 2 * steps**0.5


def test_a_step_is_that_of_a_loop():
    x, y = data()
    model, other, losses, told = network(), network(), [], []
    optimizer = SAM(model.parameters(), torch.optim.SGD, 0.2, lr=0.1, momentum=0.9,
                    weight_decay=0.02)  # fmt: skip
    run = Trajectory(model, classification(), optimizer, max_grad_norm=0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    for samples in orders(4):
        told.append(float(run.step((x[samples], y[samples]), samples)))
        schedule.step()
    optimizer = SAM(other.parameters(), torch.optim.SGD, 0.2, lr=0.1, momentum=0.9,
                    weight_decay=0.02)  # fmt: skip
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    for samples in orders(4):
        for step in (optimizer.first_step, optimizer.second_step):
            loss = cross_entropy(other(x[samples]), y[samples])
            loss.backward()
            if step == optimizer.second_step:
                torch.nn.utils.clip_grad_norm_(other.parameters(), 0.3)
            else:
                losses.append(loss.item())
            step(zero_grad=True)
        schedule.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
    assert len(told) == 4
    assert told == pytest.approx(losses, rel=1e-12)


def test_micro_batches_are_one_batch(tmp_path):
    x, y = data()
    found = {}
    for name, cuts in {"one": [12], "some": [5, 4, 3]}.items():
        model = network()
        optimizer = SAM(model.parameters(), torch.optim.SGD, 0.2, lr=0.1, momentum=0.9)
        run = Trajectory(model, classification(), optimizer, folder=tmp_path / name)
        for order in orders(3):
            rest = torch.tensor([n for n in range(SAMPLES) if n not in order])
            parts = torch.cat([order, rest]).split(cuts)
            loss = run.step_window([((x[part], y[part]), part) for part in parts])
        run.finish()
        opened = Trajectory.open(tmp_path / name, model)
        assert opened.check() < 1e-11
        found[name] = (scores(opened), loss, run.weights)
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("level", ["mean", "token"])
def test_language_models_count_by_sequence_or_by_token(level):
    """Of a step's tokens or of its sequences: as transformers, and as the mean of its losses."""
    torch.manual_seed(0)
    model = tiny_model("llama").to(F64)
    model.config._attn_implementation = "eager"
    ids = torch.randint(3, 60, (4, 7))
    labels = ids.clone()
    labels[0, 3:], labels[1, 5:], labels[3, :4] = -100, -100, -100
    batch = {"input_ids": ids, "labels": labels}
    objective = causal_lm(level=level)
    optimizer = SAM(model.parameters(), torch.optim.SGD, 0.0, lr=0.1)
    run = Trajectory(model, objective, optimizer)
    whole = float(model(input_ids=ids, labels=labels).loss)
    each = [float(model(input_ids=ids[n : n + 1], labels=labels[n : n + 1]).loss)
            for n in range(4)]  # fmt: skip
    pieces = [({k: v[part] for k, v in batch.items()}, range(part.start, part.stop))
              for part in (slice(0, 3), slice(3, 4))]  # fmt: skip
    run.record_window(pieces)
    step = run._segment(0, 1)[0]
    found = float(run.loss(step).loss(step.weights, torch.ones(4, dtype=F64)))
    assert found == pytest.approx(whole if level == "token" else sum(each) / 4, rel=1e-6)
    assert abs(whole - sum(each) / 4) > 1e-4
    asked = run.vector.losses(step.weights, batch, measured=True).tolist()
    assert asked == pytest.approx(each, rel=1e-6)


def test_groups_are_made_again(tmp_path):
    def groups(model):
        return [{"params": list(model.parameters())[:2], "weight_decay": 0.1, "lr": 0.3},
                {"params": list(model.parameters())[2:]}]  # fmt: skip

    wanted = scores(trained(6, groups=groups, base="adamw")[0])
    run, _, _, _ = trained(6, groups=groups, base="adamw", folder=tmp_path / "run", storage="sqrt")
    run.finish()
    assert torch.equal(scores(Trajectory.open(tmp_path / "run", network())), wanted)


@pytest.mark.parametrize("base", BASES)
def test_a_run_is_made_again_without_samples(base, tmp_path):
    """As a loop that has them with weight 0, and bit for bit the run itself without none."""
    run, _, _, _ = trained(9, base=base, folder=tmp_path / "run", storage="sqrt", max_grad_norm=0.5)
    run.finish()
    found = Trajectory.open(tmp_path / "run", network(seed=4))
    before = found.vector.read()
    assert torch.equal(found.retrain([]), found.weights)
    x, y = data()
    removed = torch.tensor([2, 7, 5])
    model = network()
    kind, given = BASES[base]
    optimizer = SAM(model.parameters(), kind, 0.2, lr=0.1, **given)
    weights = torch.ones(SAMPLES, dtype=F64)
    weights[removed] = 0
    for samples, record in zip(orders(9), run.records, strict=True):
        for group in optimizer.param_groups:
            group.update(lr=record.lr[0], weight_decay=record.weight_decay[0], rho=record.rho)
        for step in (optimizer.first_step, optimizer.second_step):
            losses = cross_entropy(model(x[samples]), y[samples], reduction="none")
            (losses * weights[samples]).mean().backward()
            if step == optimizer.second_step:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            step(zero_grad=True)
    wanted = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(found.retrain([7, 2, 5, 5]), wanted, rtol=1e-10, atol=1e-13)
    assert (wanted - found.weights).norm() > 1e-3
    assert torch.equal(found.vector.read(), before)
    with pytest.raises(ValueError, match="removed: expected samples of the recorded batches"):
        found.retrain([SAMPLES])


# --- interruptions -------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["all", "sqrt"])
@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_a_run_goes_on_where_it_was_interrupted(base, storage, tmp_path):
    whole, _, _, _ = trained(11, base=base)
    first, model, optimizer, schedule = trained(
        11, base=base, folder=tmp_path / "run", storage=storage, stop=6
    )
    saved = [{k: v.clone() for k, v in model.state_dict().items()},
             json.loads(json.dumps(schedule.state_dict()))]  # fmt: skip
    state = optimizer.state_dict()
    state = {**state, "state": {k: {n: v.clone() for n, v in s.items()}
                                for k, s in state["state"].items()}}  # fmt: skip
    x, y = data()
    # three steps that are lost
    for samples in orders(11)[:3]:
        first.step((x[samples], y[samples]), samples)
    with (tmp_path / "run" / "steps.jsonl").open("a") as lines:
        lines.write('{"samples": [[1')
    assert len(Trajectory.open(tmp_path / "run", network())) == 8
    model = network(seed=3)
    model.load_state_dict(saved[0])
    kind, given = BASES[base]
    optimizer = SAM(model.parameters(), kind, 0.2, lr=0.1, **given)
    optimizer.load_state_dict(state)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 11)
    schedule.load_state_dict(saved[1])
    run = Trajectory.resume(tmp_path / "run", model, optimizer, at=6)
    for number, samples in enumerate(orders(11)[6:], 6):
        for group in optimizer.param_groups:
            group["rho"] = 0.2 - 0.1 * number / 11
            group["weight_decay"] = group["weight_decay"] * 0.95
        run.step((x[samples], y[samples]), samples)
        schedule.step()
    run.finish()
    assert torch.equal(scores(run), scores(whole))
    assert torch.equal(scores(Trajectory.open(tmp_path / "run", network())), scores(whole))


def test_resuming_elsewhere_is_refused(tmp_path):
    first, model, optimizer, _ = trained(4, folder=tmp_path / "run")
    with pytest.raises(TrajectoryError, match="step 2: the model's weights are not those"):
        Trajectory.resume(tmp_path / "run", model, optimizer, at=2)
    with pytest.raises(ValueError, match="at: expected a step in 0 to 3, got int 9"):
        Trajectory.resume(tmp_path / "run", model, optimizer, at=9)
    other = SAM(model.parameters(), torch.optim.SGD, 0.2, True, lr=0.1)
    first._snapshots.wait()
    third = tmp_path / "run" / "weights" / "00000003.safetensors"
    from safetensors.torch import load_file

    Trajectory.open(tmp_path / "run", model).vector.write(load_file(third)["weights"])
    with pytest.raises(ValueError, match="optimizer: expected the run's adaptive, got bool True"):
        Trajectory.resume(tmp_path / "run", model, other, at=3)


def test_what_is_damaged_is_found_out(tmp_path):
    run, _, _, _ = trained(5, folder=tmp_path / "run")
    run.finish()
    assert scores(Trajectory.open(tmp_path / "run", network())).isfinite().all()

    def broken(name, change, error, match):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(tmp_path / "run", copy)
        change(copy / name)
        with pytest.raises(error, match=match):
            scores(Trajectory.open(copy, network()))

    def flipped(path, place=-3):
        found = bytearray(path.read_bytes())
        found[place] ^= 1
        path.write_bytes(found)

    def moments(path):
        # the first numbers behind the header
        flipped(path, 8 + int.from_bytes(path.read_bytes()[:8], "little"))

    weights = "weights/00000002.safetensors"
    broken(weights, flipped, TrajectoryError, "step 2: what was kept of it is damaged")
    broken(weights, moments, TrajectoryError, "step 2: what was kept of it is damaged")
    broken("weights/00000005.safetensors", flipped, TrajectoryError, "step 5: what was kept")
    broken(weights, lambda p: p.write_bytes(p.read_bytes()[:50]), TrajectoryError,
           "cannot be read")  # fmt: skip
    broken("weights/00000000.safetensors", lambda p: p.unlink(), TrajectoryError,
           "the weights before step 0 are missing")  # fmt: skip
    broken("batches/00000001.safetensors", lambda p: p.unlink(), TrajectoryError, "cannot be read")
    broken("steps.jsonl", lambda p: p.write_text('{"lr": 1}\n'), ValueError, "line 1")
    broken("run.json", lambda p: p.write_text('{"format": "other"}'), ValueError,
           "folder: expected sam-if-trajectory 1")  # fmt: skip
    # a step whose weights are gone is made again
    copy = tmp_path / "less"
    shutil.copytree(tmp_path / "run", copy)
    (copy / weights).unlink()
    assert torch.equal(scores(Trajectory.open(copy, network())), scores(run))


def test_other_bits_are_an_error(tmp_path):
    """A loop of one's own may differ in the last bits, or in all of them."""
    x, y = data()
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, 0.2, lr=0.1)
    run = Trajectory(model, classification(), optimizer, storage="sqrt")
    for samples in orders(7):
        run.record((x[samples], y[samples]), samples)
        for step in (optimizer.first_step, optimizer.second_step):
            (cross_entropy(model(x[samples]), y[samples], reduction="sum") / 4.1).backward()
            step(zero_grad=True)
    with pytest.raises(TrajectoryError, match="made again, it gave other weights"):
        scores(run, check=False)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_batches_that_are_made_again_are_the_same():
    run, _, _, _ = trained(3, batch_of=batch_of)
    assert not run._kept
    run._batch_of = lambda samples: tuple(part + 1 for part in batch_of(samples))
    with pytest.raises(TrajectoryError, match="step 0: batch_of made another batch"):
        scores(run)


def test_objectives_are_known_again(tmp_path):
    model = network()
    for number, objective in enumerate((
        classification(label_smoothing=0.1), regression(), causal_lm(level="token"),
    )):  # fmt: skip
        optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
        Trajectory(model, objective, optimizer, folder=tmp_path / str(number))
        assert Trajectory.open(tmp_path / str(number), model).objective.spec == objective.spec

    class Own:
        def losses(self, model, batch):
            return cross_entropy(model(batch[0]), batch[1], reduction="none")

        measure = losses

    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    run = Trajectory(model, Own(), optimizer, folder=tmp_path / "own")
    x, y = data()
    run.step((x, y), range(SAMPLES))
    run.finish()
    with pytest.raises(ValueError, match="objective: expected the run's own"):
        Trajectory.open(tmp_path / "own", model)
    assert torch.equal(scores(Trajectory.open(tmp_path / "own", model, Own())), scores(run))


def test_bad_input(tmp_path):
    run, model, optimizer, _ = trained(2, folder=tmp_path / "run")
    with pytest.raises(FileExistsError, match=r"go on with Trajectory\.resume"):
        trained(1, folder=tmp_path / "run")
    x, y = data()
    for samples, match in (([1, 2], "expected 12 numbers"), ([-1] * 12, "of at least 0")):
        with pytest.raises(ValueError, match=match):
            run.step((x, y), samples)
    with pytest.raises(ValueError, match="batch: expected a mapping or pair of tensors, got str"):
        run.step({"x": "text"}, [1])
    assert len(run) == 2
    run.finish()
    with pytest.raises(RuntimeError, match="record: the run is finished"):
        run.step((x, y), range(SAMPLES))
    with pytest.raises(RuntimeError, match="finish: the run is finished already"):
        run.finish()
    with pytest.raises(FileNotFoundError):
        Trajectory.open(tmp_path / "none", model)
    with pytest.raises(ValueError, match="batch_of: expected no function"):
        Trajectory.open(tmp_path / "run", model, batch_of=batch_of)
    with pytest.raises(ValueError, match="model: expected the run's parameters"):
        Trajectory.open(tmp_path / "run", torch.nn.Linear(4, 3).to(F64))
    with pytest.raises(ValueError, match="storage: expected one of all, sqrt"):
        Trajectory(model, classification(), optimizer, storage="log")
    run, model, optimizer, _ = trained(2)
    cross_entropy(model(x), y).backward()
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="finish: the weights are moved"):
        run.finish()


def test_bits_are_told_apart():
    x = torch.randn(50)
    other = x.clone()
    other[7] = torch.nextafter(other[7], torch.tensor(9.0))
    assert fingerprint(x) == fingerprint(x.clone()) != fingerprint(other)
    assert fingerprint(x, other) != fingerprint(other, x)
    assert 0 <= fingerprint(x) < 1 << 64
