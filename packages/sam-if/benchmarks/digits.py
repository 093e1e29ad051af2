"""Scores of all training samples beside training again, on handwritten digits.

A network of 2,410 weights learns real digits by SAM at rho = 0.2, in float64. Scores are held
against training again without a sample, with its places in batches left empty; the correlations are
in the parameters, with those of scores that leave something out.
"""

import math

import torch
from sam_if import SAM, Trajectory, TrajectoryInfluence, classification
from scipy.stats import spearmanr
from shared_kernels.bench import Arm, Workload, benchmark
from sklearn.datasets import load_digits
from torch.func import grad, jvp, vmap

RHO, BATCH, TRIED = 0.2, 50, 60


def digits():
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return torch.from_numpy(x)[order] / 16, torch.from_numpy(y).long()[order]


def shifted(x, y, count):
    """Digits moved by a pixel in each direction, until there are enough."""
    images = x.view(-1, 8, 8)
    moves = [(0, 0), (0, 1), (0, -1), (1, 0), (-1, 0), (1, 1)]
    parts = [images.roll(move, (1, 2)) for move in moves]
    return torch.cat(parts).flatten(1)[:count], y.repeat(len(moves))[:count]


def trained(data, steps, device):
    """A recorded run with a cosine schedule."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 32), torch.nn.GELU(), torch.nn.Linear(32, 10)
    ).to(device, torch.float64)  # fmt: skip
    optimizer = SAM(model.parameters(), torch.optim.SGD, RHO, lr=0.1, momentum=0.9,
                    weight_decay=5e-4)  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: (1 + math.cos(math.pi * t / steps)) / 2
    )
    run = Trajectory(model, classification(), optimizer)
    draws, orders = torch.Generator().manual_seed(1), []
    while len(orders) < steps:
        orders += torch.randperm(len(data[1]), generator=draws).split(BATCH)
    for samples in orders[:steps]:
        run.step(tuple(part[samples].to(device) for part in data), samples)
        schedule.step()
    run.finish()
    return run


def explicit(run, query):
    """The same adjoint with a gradient of each sample, and products with both Hessians apart."""
    vector = run.vector
    w = grad(lambda at: vector.losses(at, query).mean())(run.weights)
    found, back = w.new_zeros(run.count), run.dynamics.reverse()
    for step in run.backwards():
        loss = run.loss(step)
        moved = run.perturbation(step, loss)
        at = step.weights + moved.epsilon
        batch, _, count = step.batches[0]

        def each(weights, batch=batch):
            return vmap(
                lambda one, label: grad(lambda p: vector.losses(p, (one[None], label[None]))[0])(
                    weights
                )
            )(*batch)

        def product(weights, x, loss=loss):
            return jvp(loss.gradient, (weights,), (x,))[1]

        v, w = back(step, None, w)
        y = product(at, v)
        z, _ = moved.adjoint(y)
        w = w + y + product(step.weights, z)
        dots = (each(at) @ v + each(step.weights) @ z) / count
        found.index_add_(0, torch.tensor(step.samples, device=w.device), dots)
    return -found


def workload(name, data, query, steps, device, **params):
    query = tuple(part.to(device) for part in query)
    run = trained(data, steps, device)
    influence = TrajectoryInfluence(run)

    def scores():
        return influence.scores([query], mean=True).values[0]

    def check():
        torch.testing.assert_close(scores(), explicit(run, query), rtol=1e-8, atol=1e-14)

    return Workload(
        name=f"digits/{name}", device=device, check=check, clock="wall",
        baseline="training again, once",
        params={"samples": len(data[1]), "steps": steps, "batch": BATCH, "rho": RHO,
                "dtype": "float64", **params},
        arms=[Arm(name="training again, once", fn=lambda: run.retrain([0])),
              Arm(name="scores of all samples", fn=scores),
              Arm(name="the same, by gradients of samples", fn=lambda: explicit(run, query))],
    )  # fmt: skip


@benchmark
def leave_one_out(device):
    """500 digits, a tenth of them with wrong labels; 60 are left out in turn."""
    x, y = digits()
    query, (x, y) = (x[-20:], y[-20:]), (x[:500], y[:500].clone())
    draws = torch.Generator().manual_seed(5)
    flipped = torch.randperm(500, generator=draws)[:50]
    y[flipped] = (y[flipped] + torch.randint(1, 10, (50,), generator=draws)) % 10
    run = trained((x, y), 240, device)
    asked = tuple(part.to(device) for part in query)

    def measured(weights):
        with torch.no_grad():
            return float(run.vector.losses(weights, asked).mean())

    whole = measured(run.weights)
    truth = [measured(run.retrain([n])) - whole for n in range(TRIED)]
    agreement = {}
    for kind, told in (("full", "all terms"), ("frozen", "frozen perturbations"),
                       ("none", "no Hessians")):  # fmt: skip
        found = TrajectoryInfluence(run, kind, check=False).scores([asked], mean=True).values[0]
        agreement[told] = round(float(spearmanr(found[:TRIED].cpu(), truth).statistic), 3)
    told = {"left out": TRIED, "rank correlation with retraining": agreement}
    yield workload("500", (x, y), query, 240, device, **told)


@benchmark
def ten_thousand(device):
    """10,000 digits, most of them moved by a pixel, in two epochs."""
    x, y = digits()
    query = (x[-20:], y[-20:])
    yield workload("10,000", shifted(x[:-20], y[:-20], 10_000), query, 400, device)
