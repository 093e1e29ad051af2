"""Trainings side by side against the optimizer's own, one after the other."""

import pytest
import torch
from sam_if import SAM, classification
from sam_if.evaluate import retrain_together
from torch.nn.functional import cross_entropy

F64 = torch.float64
RATES = [0.3, 0.3, 0.2, 0.2, 0.1, 0.1]
REMOVALS = [[], [0], [3, 7], [1, 2, 4, 5]]


def network():
    torch.manual_seed(0)
    layers = (torch.nn.Linear(4, 5), torch.nn.GELU(), torch.nn.Linear(5, 3))
    return torch.nn.Sequential(*layers).to(F64)


def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(11, 4, generator=generator, dtype=F64)
    return x, torch.randint(3, (11,), generator=generator)


def batches(seed=2):
    x, y = data()
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.arange(4), torch.arange(4, 8)]
    orders += [torch.randint(8, (4,), generator=generator) for _ in range(len(RATES) - 2)]
    return [((x[order], y[order]), order) for order in orders]


def alone(removed, rho, adaptive, **options):
    """Train with the optimizer and weights of samples."""
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho, adaptive, lr=1.0, **options)
    for ((x, y), order), rate in zip(batches(), RATES, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        kept = torch.tensor([float(int(n) not in removed) for n in order], dtype=F64)
        for step in (optimizer.first_step, optimizer.second_step):
            losses = cross_entropy(model(x), y, reduction="none")
            ((kept * losses).sum() / 4).backward()
            step(zero_grad=True)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize(("rho", "adaptive"), [(0.0, False), (0.3, False), (0.8, True)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9, "weight_decay": 0.05},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.05},
        {"momentum": 0.9, "dampening": 0.4},
    ],
)
def test_each_comes_out_as_alone(rho, adaptive, options):
    given = {"rho": rho, "adaptive": adaptive, **options}
    model = network()
    before = [p.clone() for p in model.parameters()]
    found = retrain_together(model, classification(), batches(), RATES, REMOVALS, **given)
    wanted = torch.stack([alone(removed, **given) for removed in REMOVALS])
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_parts_and_queries():
    given = {"rho": 0.3, "momentum": 0.9}
    weights = retrain_together(
        network(), classification(), iter(batches()), RATES, REMOVALS, together=3, **given
    )
    whole = retrain_together(network(), classification(), batches(), RATES, REMOVALS, **given)
    torch.testing.assert_close(weights, whole, rtol=1e-12, atol=1e-14)
    x, y = data()
    queries = [(x[8:9], y[8:9]), (x[9:], y[9:])]
    found = retrain_together(
        network(), classification(), batches(), RATES, REMOVALS, queries=queries, **given
    )
    model = network()
    torch.nn.utils.vector_to_parameters(whole[2], model.parameters())
    wanted = cross_entropy(model(x[8:]), y[8:], reduction="none")
    torch.testing.assert_close(found[2], wanted.detach(), rtol=1e-12, atol=1e-14)
    assert found.shape == (4, 3)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"removals": [[8]]}, "removals: expected samples of the batches"),
        ({"removals": [[-1]]}, "removals: expected samples of the batches"),
        ({"removals": []}, "batches: expected some, and removals"),
        ({"batches": []}, "batches: expected some, and removals"),
        ({"rates": RATES[:-1]}, "rates: expected 6 numbers"),
        ({"together": 0}, "together: expected an integer in"),
    ],
)
def test_what_is_refused(change, match):
    given = {"batches": batches(), "rates": RATES, "removals": REMOVALS, "rho": 0.1}
    with pytest.raises(ValueError, match=match):
        retrain_together(network(), classification(), **(given | change))
