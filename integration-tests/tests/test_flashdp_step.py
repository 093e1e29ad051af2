"""The tour's private training: fair arms, equal documents, and what is missing is told."""

import json
import math
from dataclasses import replace

import pytest
import torch
from shared_kernels.testing.models import tiny_model
from tenfold import private_steps as steps
from tenfold.plots import PALETTE
from tenfold.step import Context, StepFailed
from tenfold.steps import flashdp as step

IDS = torch.randint(0, 30, (3, 10), generator=torch.Generator().manual_seed(0))
QUICK = Context(quick=True, folder=None)


def model(rank=0):
    torch.manual_seed(0)
    return tiny_model("llama", tie_word_embeddings=False)


@pytest.fixture
def data():
    rows = [[k % 29 + 1 for k in range(i, i + 5 + i % 4)] for i in range(60)]
    from tenfold.tasks import docstrings

    return step.Data(rows[:40], [docstrings.batch(rows[40:50]), docstrings.batch(rows[50:])])


@pytest.fixture
def plan():
    return step.Plan(steps=3, batch=6, rate=6 / 40, sigma=0.5, epsilon=(0.0, 1.0, 1.5, 2.0))


# -- the arms that are timed -----------------------------------------------------------------------


@pytest.mark.peer
@pytest.mark.skipif(not steps.has_opacus(), reason="opacus is missing")
def test_every_arm_moves_every_weight_and_only_privacy_adds_noise(monkeypatch):
    monkeypatch.setattr(steps, "_LR", 0.1)
    made = []

    def make():
        # Opacus's hooks do nothing in eval mode.
        made.append(model().train())
        return made[-1]

    work = steps.workload("tiny", make, IDS)
    names = [arm.name for arm in work.arms]
    assert names == [steps.ORDINARY, steps.FLASHDP, steps.HOOKS, steps.GHOST]
    before = model().state_dict()
    moved = {}
    for arm, trained in zip(work.arms, made, strict=True):
        arm.fn()
        arm.fn()
        after = {n.removeprefix("_module."): v for n, v in trained.state_dict().items()}
        assert all(torch.isfinite(v).all() for v in after.values()), arm.name
        same = [n for n in before if torch.equal(after[n], before[n])]
        # Without noise a weight's gradient may be too small to move it.
        assert len(same) < len(before) if arm.name == steps.ORDINARY else not same, arm.name
        moved[arm.name] = math.sqrt(
            sum(float((after[n] - before[n]).square().sum()) for n in before)
        )
    # Noise of multiplier 1 over a clipped sum is most of a step, the same in all private arms.
    count = sum(p.numel() for p in model().parameters())
    expected = 0.1 * math.sqrt(2 * count)
    # Opacus does not divide a sum by the batch size; we do.
    for name, divisor in ((steps.FLASHDP, len(IDS)), (steps.HOOKS, 1), (steps.GHOST, 1)):
        assert moved[name] == pytest.approx(expected / divisor, rel=0.1), name
    assert moved[steps.ORDINARY] != pytest.approx(expected / len(IDS), rel=0.1)


def test_the_check_passes_and_can_fail(monkeypatch):
    steps._check(model(), IDS)
    from flashdp.noise import NoiseSource

    honest = NoiseSource.noised

    def wrong(self, sums, **options):
        return honest(self, (replace(s, total=s.total * 1.01) for s in sums), **options)

    monkeypatch.setattr(NoiseSource, "noised", wrong)
    with pytest.raises(AssertionError, match=r"off by 1\.00e-02"):
        steps._check(model(), IDS)


def test_without_opacus_the_rest_is_timed(monkeypatch):
    monkeypatch.setattr(steps, "has_opacus", lambda: False)
    monkeypatch.setattr(step, "_untied", model)
    monkeypatch.setattr(step, "VOCABULARY", 90)
    work = steps.workload("tiny", model, IDS)
    assert [arm.name for arm in work.arms] == [steps.ORDINARY, steps.FLASHDP]
    speed = step._speed(replace(step.RECIPES[1]), QUICK)
    assert set(speed.tokens) == {steps.ORDINARY, steps.FLASHDP}
    assert all(rate > 0 for rate in speed.tokens.values())


def test_a_step_that_computes_something_else_is_not_timed(monkeypatch):
    def refused(model, ids):
        raise AssertionError("our gradient is off")

    monkeypatch.setattr(steps, "_check", refused)
    monkeypatch.setattr(step, "_untied", model)
    monkeypatch.setattr(step, "VOCABULARY", 90)
    with pytest.raises(StepFailed, match="all weights: our gradient is off"):
        step._speed(step.RECIPES[1], QUICK)


# -- training --------------------------------------------------------------------------------------


def test_both_kinds_of_training_see_the_same_documents(monkeypatch, data, plan):
    monkeypatch.setattr(step, "_model", model)
    recipe = step.Recipe("tiny", 0, private_lr=0.01, ordinary_lr=0.01)
    private, ordinary = (
        step._train(recipe, data, plan, QUICK, (0.0, 1.0), private=p) for p in (True, False)
    )
    assert len(private.seen) == len(ordinary.seen) == plan.steps
    # Before the first step they are one model on the same documents; later they are not.
    assert private.seen[0] == pytest.approx(ordinary.seen[0], rel=1e-5)
    assert private.seen[-1] != pytest.approx(ordinary.seen[-1], rel=1e-3)
    assert list(private.held) == list(ordinary.held) == [1, 3]
    assert private.groups > 1
    assert ordinary.groups == 0


def test_training_lowers_the_loss_and_noise_without_bound_does_not(monkeypatch, data, plan):
    monkeypatch.setattr(step, "_model", model)
    recipe = step.Recipe("tiny", 0, private_lr=0.02, ordinary_lr=0.02)
    before = step._loss(model(), data)

    def after(sigma, private=True):
        shared = replace(plan, sigma=sigma)
        return step._train(recipe, data, shared, QUICK, (0.0, 1.0), private=private).held[3]

    assert after(1.0, private=False) < before - 0.05
    assert after(1e-3) < before - 0.05
    assert after(1e4) > before - 0.05


def test_the_noise_keeps_to_the_budget():
    plan = step.Plan.make(6000, quick=True)
    assert len(plan.epsilon) == plan.steps + 1
    assert plan.epsilon[0] == 0.0
    assert sorted(plan.epsilon) == list(plan.epsilon)
    assert 0.5 * step.EPSILON < plan.epsilon[-1] <= step.EPSILON


# -- what is told ----------------------------------------------------------------------------------


def runs(after=4.0):
    made = [step.Run({0: 5.0, 1: 4.5, 3: after}, [5.0, 4.5, 4.2], 1_000_000, n) for n in (9, 0)]
    return {recipe.name: (made[0], made[1]) for recipe in step.RECIPES}


def speeds(names=(steps.ORDINARY, steps.FLASHDP, steps.HOOKS, steps.GHOST)):
    tokens = dict(zip(names, (100.0, 80.0, 20.0, 40.0), strict=False))
    return {recipe.name: step.Speed(tokens, 2, 64, 3) for recipe in step.RECIPES}


def test_the_result_states_unit_neighbours_budget_and_both_alternatives(data, plan):
    found = step._result(data, plan, runs(), speeds())
    assert "80 % of the ordinary speed and 2.0 times Opacus's" in found.headline
    assert "5.00 to 4.00" in found.headline
    told = " ".join(found.text)
    for words in ("one document", "neighbours", "δ = 1e-05", "ε = 2.00", "Opacus refuses"):
        assert words in told
    assert "not installed" not in told
    assert len(found.plots) == 2
    assert all(plot.svg.startswith("<svg") for plot in found.plots)
    assert PALETTE[0] in found.plots[0].svg.upper()
    values = json.loads(json.dumps(found.as_json()))
    table = next(t for t in values["tables"] if t["title"] == "Speed of a step")
    assert ["LoRA, Opacus, hooks", "20", "20 %", "4.00"] in table["rows"]
    assert ["all weights, flashdp", "80", "80 %", ""] in table["rows"]


def test_the_result_says_what_is_not_installed(monkeypatch, data, plan):
    monkeypatch.setattr(steps, "has_opacus", lambda: False)
    monkeypatch.setattr(step, "_has_peft", lambda: False)
    only = step.RECIPES[1].name
    found = step._result(
        data, plan, {only: runs()[only]}, {only: speeds((steps.ORDINARY, steps.FLASHDP))[only]}
    )
    told = " ".join(found.text)
    assert "Opacus is not installed" in told
    assert "PEFT is not installed" in told
    assert "Opacus" not in found.headline


def test_a_run_that_does_not_learn_fails_the_step(plan):
    step._judge(runs(5.0 - step.LEAST_GAIN - 0.01), plan)
    for after in (5.0, math.nan):
        with pytest.raises(StepFailed, match=r"private fine-tuning \(LoRA\)"):
            step._judge(runs(after), plan)
