"""SAM as an optimizer, against its formula written out parameter by parameter."""

import copy
import math
import warnings

import pytest
import torch
from sam_if import SAM
from torch.nn.functional import cross_entropy


def network(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    layers = (torch.nn.Linear(6, 8), torch.nn.GELU(), torch.nn.Linear(8, 3))
    return torch.nn.Sequential(*layers).to(dtype)


def batches(count, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randn(5, 6, generator=generator, dtype=dtype)
        yield x, torch.randint(3, (5,), generator=generator)


def gradients(model, batch):
    x, y = batch
    return torch.autograd.grad(cross_entropy(model(x), y), list(model.parameters()))


def written_out(model, data, rho, adaptive, lr, momentum, decay, perturb_decay=False):
    """SGD with momentum at moved weights, as the papers have it."""
    buffers = None
    for batch in data:
        before = [p.detach().clone() for p in model.parameters()]
        grads = gradients(model, batch)
        if perturb_decay:
            grads = [g + decay * p for g, p in zip(grads, before, strict=True)]
        scales = [p.abs() if adaptive else torch.ones_like(p) for p in before]
        norm = math.sqrt(
            sum(float(((t * g) ** 2).sum()) for t, g in zip(scales, grads, strict=True))
        )
        with torch.no_grad():
            for p, t, g in zip(model.parameters(), scales, grads, strict=True):
                p += rho * t**2 * g / (norm + 1e-12)
        grads = gradients(model, batch)
        grads = [g + decay * p for g, p in zip(grads, before, strict=True)]
        buffers = grads if buffers is None else [
            momentum * b + g for b, g in zip(buffers, grads, strict=True)
        ]  # fmt: skip
        with torch.no_grad():
            for p, old, b in zip(model.parameters(), before, buffers, strict=True):
                p.copy_(old - lr * b)


def train(model, optimizer, data):
    for x, y in data:
        cross_entropy(model(x), y).backward()
        optimizer.first_step(zero_grad=True)
        cross_entropy(model(x), y).backward()
        optimizer.second_step(zero_grad=True)


@pytest.mark.parametrize("perturb_decay", [False, True])
@pytest.mark.parametrize(("rho", "adaptive"), [(0.05, False), (1.0, True), (0.0, False)])
def test_a_hundred_steps_of_the_formula(rho, adaptive, perturb_decay):
    one, other = network(torch.float64), network(torch.float64)
    optimizer = SAM(
        one.parameters(), torch.optim.SGD, rho, adaptive, perturb_decay=perturb_decay, lr=0.1,
        momentum=0.9, weight_decay=0.01,
    )  # fmt: skip
    train(one, optimizer, batches(100, torch.float64))
    data = batches(100, torch.float64)
    written_out(other, data, rho, adaptive, 0.1, 0.9, 0.01, perturb_decay)
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_without_a_radius_it_is_the_base():
    one, other = network(), network()
    train(one, SAM(one.parameters(), torch.optim.AdamW, 0.0, lr=0.01), batches(20))
    base = torch.optim.AdamW(other.parameters(), lr=0.01)
    for x, y in batches(20):
        cross_entropy(other(x), y).backward()
        base.step()
        base.zero_grad()
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adaptive", [False, True])
def test_weights_are_put_back_bit_for_bit(dtype, adaptive):
    model = network(dtype)
    optimizer = SAM(model.parameters(), torch.optim.SGD, 0.7, adaptive, lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    x, y = next(batches(1, dtype))
    cross_entropy(model(x), y).backward()
    kept = [p.grad.clone() for p in model.parameters()]
    optimizer.first_step()
    assert optimizer.perturbed
    far = math.sqrt(sum(
        float((p.detach().double() - q.double()).square().sum())
        for p, q in zip(model.parameters(), before, strict=True)
    ))  # fmt: skip
    if not adaptive:
        assert far == pytest.approx(0.7, rel=1e-5 if dtype == torch.float32 else 1e-2)
    # the gradient is as it was
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), kept, strict=True))
    optimizer.restore()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_groups_have_radii_of_their_own_and_one_norm():
    model = network(torch.float64)
    first, last = list(model.parameters())[:2], list(model.parameters())[2:]
    optimizer = SAM(
        [{"params": first, "rho": 0.1}, {"params": last, "rho": 0.4}], torch.optim.SGD, lr=0.1
    )
    before = [p.detach().clone() for p in model.parameters()]
    grads = gradients(model, next(batches(1, torch.float64)))
    for p, g in zip(model.parameters(), grads, strict=True):
        p.grad = g.clone()
    norm = math.sqrt(sum(float((g**2).sum()) for g in grads))
    assert float(optimizer.grad_norm()) == pytest.approx(norm)
    optimizer.first_step()
    for index, (p, q, g) in enumerate(zip(model.parameters(), before, grads, strict=True)):
        rho = 0.1 if index < 2 else 0.4
        torch.testing.assert_close(p.detach() - q, rho * g / norm)


def test_parameters_without_a_gradient_stay():
    model = network()
    model[0].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    train(model, SAM(model.parameters(), torch.optim.SGD, lr=0.1), batches(3))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("0.")


def test_nothing_moves_without_a_gradient():
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    before = copy.deepcopy(model.state_dict())
    optimizer.first_step()
    optimizer.second_step()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.first_step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_what_stopped_half_way_is_restored(monkeypatch):
    model = network()
    groups = [{"params": list(part.parameters())} for part in (model[0], model[2])]
    optimizer = SAM(groups, torch.optim.SGD, 0.5, lr=0.1)
    before, add = copy.deepcopy(model.state_dict()), torch._foreach_add_
    calls = []

    def once(*args):
        calls.append(1)
        if len(calls) > 1:
            raise MemoryError
        add(*args)

    x, y = next(batches(1))
    cross_entropy(model(x), y).backward()
    monkeypatch.setattr(torch, "_foreach_add_", once)
    with pytest.raises(MemoryError):
        optimizer.first_step()
    assert not torch.equal(model[0].weight, before["0.weight"])
    optimizer.restore()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_closure_takes_the_second_gradient():
    one, other = network(), network()
    train(one, SAM(one.parameters(), torch.optim.SGD, lr=0.1), batches(4))
    optimizer = SAM(other.parameters(), torch.optim.SGD, lr=0.1)
    for x, y in batches(4):

        def closure(x=x, y=y):
            loss = cross_entropy(other(x), y)
            loss.backward()
            return loss

        first = closure()
        assert optimizer.step(closure) > first
        optimizer.zero_grad()
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    with pytest.raises(ValueError, match="closure: expected what takes the second gradient"):
        optimizer.step()


def test_what_is_saved_goes_on():
    one = network()
    optimizer = SAM(one.parameters(), torch.optim.AdamW, 0.1, lr=0.01)
    train(one, optimizer, list(batches(10))[:5])
    other = copy.deepcopy(one)
    again = SAM(other.parameters(), torch.optim.AdamW, 0.1, lr=0.5)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model, made in ((one, optimizer), (other, again)):
        train(model, made, list(batches(10))[5:])
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    # state is there once, and holds nothing of the moved weights
    assert again.state is again.base_optimizer.state
    kinds = {key for state in again.state_dict()["state"].values() for key in state}
    assert kinds == {"step", "exp_avg", "exp_avg_sq"}


def test_an_optimizer_that_is_there():
    one, other = network(), network()
    made = torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9)
    train(one, SAM(made.param_groups, lambda groups: made, 0.2), batches(4))
    made = SAM(other.parameters(), torch.optim.SGD, 0.2, lr=0.1, momentum=0.9)
    train(other, made, batches(4))
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_schedules_change_the_rate_of_both():
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in batches(3):
            train(model, optimizer, [batch])
            schedule.step()
    assert optimizer.base_optimizer.param_groups[0]["lr"] == pytest.approx(0.0125)


def test_steps_come_in_their_order():
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(RuntimeError, match="call first_step before"):
        optimizer.second_step()
    x, y = next(batches(1))
    cross_entropy(model(x), y).backward()
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="call second_step first"):
        optimizer.first_step()
    with pytest.raises(RuntimeError, match="state_dict: the weights are moved"):
        optimizer.state_dict()


@pytest.mark.parametrize("rho", [-0.1, math.inf, math.nan])
def test_a_radius_that_is_none(rho):
    with pytest.raises(ValueError, match="rho: expected a number of at least 0"):
        SAM(network().parameters(), torch.optim.SGD, rho, lr=0.1)


def test_sparse_gradients_are_refused_before_anything_moves():
    model = torch.nn.Embedding(5, 3, sparse=True)
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    before = model.weight.detach().clone()
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match="dense gradients"):
        optimizer.first_step()
    assert torch.equal(model.weight, before)
    assert not optimizer.perturbed
