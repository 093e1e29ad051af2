"""What is said of a run is so."""

import pytest
import torch
from sam_if import (
    SAM,
    DerivativeError,
    Trajectory,
    TrajectoryError,
    TrajectoryInfluence,
    check_run,
    classification,
    regression,
)
from torch.nn.functional import cross_entropy

F64 = torch.float64


def data(count=12):
    draws = torch.Generator().manual_seed(1)
    x = torch.randn(count, 4, generator=draws, dtype=F64)
    return x, torch.randint(3, (count,), generator=draws)


def recorded(steps=6, model=None, own_loop=False, decay=0.05, storage="all", **options):
    torch.manual_seed(0)
    x, y = data()
    model = model or torch.nn.Linear(4, 3).to(F64)
    optimizer = SAM(model.parameters(), torch.optim.SGD, 0.2, lr=0.3, weight_decay=decay)
    run = Trajectory(model, classification(), optimizer, storage=storage, **options)
    for _ in range(steps):
        for half in (torch.arange(6), torch.arange(6, 12)):
            batch = (x[half], y[half])
            if not own_loop:
                run.step(batch, half)
                continue
            run.record(batch, half)
            for move in (optimizer.first_step, optimizer.second_step):
                # the same but for rounding
                cross_entropy(model(batch[0].flip(0)), batch[1].flip(0)).backward()
                move(zero_grad=True)
    run.finish()
    return run


def test_a_good_run():
    found = check_run(recorded(steps=60, max_grad_norm=0.48))
    assert (found.steps, found.samples, found.optimizer) == (120, 12, "SGD")
    assert found.worst_step < 1e-9
    assert found.replayed
    assert found.derivative_error < 1e-6
    assert found.coupling < 1e-12
    assert 0 < found.clipped < 1
    assert found.stationarity > 0
    assert found.kappa > 0
    assert not found.problems


def test_what_is_clipped_is_counted():
    run = recorded(max_grad_norm=0.48)
    longer = 0
    for step in run.forwards():
        run.vector.write(step.weights)
        model, (x, y) = run.model, step.batches[0][0]
        g = torch.autograd.grad(cross_entropy(model(x), y), list(model.parameters()))
        norm = torch.cat([part.flatten() for part in g]).norm()
        with torch.no_grad():
            for p, part in zip(model.parameters(), g, strict=True):
                p += 0.2 * part / norm
        g = torch.autograd.grad(cross_entropy(model(x), y), list(model.parameters()))
        longer += int(torch.cat([part.flatten() for part in g]).norm() > 0.48)
    assert 0 < longer < len(run)
    assert check_run(run).clipped == longer / len(run)
    assert check_run(recorded()).clipped is None


def test_a_loop_of_ones_own_has_other_bits():
    found = check_run(recorded(steps=20, own_loop=True))
    assert found.worst_step < 1e-9
    assert not found.replayed
    assert any("gives other bits" in text for text in found.remarks)


def test_a_run_that_did_not_rest():
    found = check_run(recorded(steps=1))
    assert found.stationarity > 0.05
    assert any("did not come to rest" in text for text in found.remarks)


@pytest.mark.parametrize(("decay", "cycles"), [(0.0, True), (0.1, False)])
def test_two_cycles(decay, cycles):
    """SAM with all data in a batch and no decay ends between two points, with decay in one."""
    x = torch.randn(8, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    y = x @ torch.tensor([[2.0], [-3.0], [1.0]], dtype=F64)
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1, bias=False).to(F64)
    optimizer = SAM(model.parameters(), torch.optim.SGD, 0.05, lr=0.05, weight_decay=decay)
    run = Trajectory(model, regression(), optimizer, storage="sqrt")
    for _ in range(600):
        run.step((x, y), range(8))
    run.finish()
    found = check_run(run)
    assert any("to and fro" in text for text in found.remarks) == cycles
    assert (found.stationarity > 0.05) == cycles


def test_gradients_without_a_direction():
    """A run that is trained on after its losses have vanished."""
    x = torch.eye(3, dtype=F64)
    model = torch.nn.Linear(3, 1, bias=False).to(F64)
    optimizer = SAM(model.parameters(), torch.optim.SGD, 0.05, lr=0.1)
    run = Trajectory(model, regression(), optimizer)
    run.step((x, model(x).detach()), range(3))
    run.finish()
    with pytest.raises(TrajectoryError, match=r"step 0: the gradient .* has norm 0 \(samples \[0"):
        TrajectoryInfluence(run)
    assert "has norm 0" in check_run(run).problems[0]


def test_steep_perturbations_are_told():
    model = torch.nn.Linear(4, 3).to(F64)
    run = recorded(steps=1, model=model)
    from sam_if import diagnostics

    steep = check_run(run).kappa
    limit, diagnostics._STEEP = diagnostics._STEEP, steep / 2
    try:
        assert any("move with the weights" in text for text in check_run(run).remarks)
    finally:
        diagnostics._STEEP = limit


class Centred(torch.nn.Module):
    """What a sample gives depends on the others of its batch."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(4, 3)

    def forward(self, x):
        return self.inner(x - x.mean(0))


def test_samples_that_depend_on_each_other():
    found = check_run(recorded(model=Centred().to(F64)))
    assert found.coupling > 0.01
    assert any("depends on others of its batch" in text for text in found.problems)


class Wrong(torch.autograd.Function):
    """A square whose gradient's derivative is half of what it should be."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.square()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (x + x.detach())

    @staticmethod
    def jvp(ctx, t):
        (x,) = ctx.saved_tensors
        return t * (x + x.detach())


class Squared(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(4, 3)

    def forward(self, x):
        return Wrong.apply(self.inner(x))


def test_wrong_derivatives_are_an_error():
    run = recorded(model=Squared().to(F64))
    found = check_run(run)
    assert found.derivative_error is None
    assert any("from differences of gradients" in text for text in found.problems)
    x, y = data()
    with pytest.raises(DerivativeError, match="no right rule"):
        TrajectoryInfluence(run)
    assert TrajectoryInfluence(run, check=False).scores([(x, y)], mean=True).values.isfinite().all()


def test_a_damaged_run():
    run = recorded()
    run._snapshots.get(3)["weights"][0] += 1
    found = check_run(run)
    assert found.worst_step is None
    assert any("step 3: what was kept of it is damaged" in text for text in found.problems)
