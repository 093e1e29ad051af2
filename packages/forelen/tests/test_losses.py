"""Losses against float64 autograd of their formulas."""

import math

import pytest
import torch
from forelen import Bins, LengthDistribution, forelen_loss, paper_loss

F64 = torch.float64
LENGTHS = torch.tensor([3, 60, 61, 250, 900])


def make_logits(count, bins, dtype=F64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, bins, generator=generator, dtype=dtype).requires_grad_()


def test_the_papers_loss():
    bins = Bins.linear(20, 10.0, 400.0)
    logits = make_logits(5, 20)
    found = paper_loss(logits, LENGTHS, bins)
    width = 390 / 20
    for row, length in enumerate(LENGTHS.tolist()):
        place = min(19, max(0, math.ceil((length - 10) / width) - 1))
        label = [math.exp(-abs(j - place)) for j in range(20)]
        label = torch.tensor(label, dtype=F64) / sum(label)
        p = logits[row].softmax(-1)
        predicted = sum(float(p[j]) * (10 + width * (j + 0.5)) for j in range(20))
        expected = -0.95 * float((label * p.log()).sum()) + 0.05 * (length - predicted) ** 2
        assert float(found[row]) == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(lambda x: paper_loss(x, LENGTHS, bins), logits)


def test_our_loss():
    bins = Bins.log1p(16, 500, tail=100.0)
    logits = make_logits(5, len(bins))
    stopped = torch.tensor([False, True, False, True, True])
    found = forelen_loss(logits, LENGTHS, bins, censored=stopped)
    p = logits.softmax(-1).detach()
    law = LengthDistribution(p, bins)
    tails = law.sf(LENGTHS)
    plain = forelen_loss(logits, LENGTHS, bins)
    for row in range(5):
        if stopped[row]:
            assert float(found[row]) == pytest.approx(-math.log(float(tails[row])), rel=1e-9)
            continue
        label = bins.labels(LENGTHS[row : row + 1])[0]
        ranked = sum(float(p[row, : j + 1].sum() - label[: j + 1].sum()) ** 2 for j in range(16))
        expected = -0.95 * float((label * p[row].log()).sum()) + 0.05 * ranked
        assert float(found[row]) == pytest.approx(expected, rel=1e-9)
        assert float(found[row]) == float(plain[row])
    assert torch.autograd.gradcheck(
        lambda x: forelen_loss(x, LENGTHS, bins, censored=stopped), logits
    )


def test_units():
    """In other units of length the paper's loss has another optimum; ours has not."""
    values = {}
    for scale in (1, 10):
        logits = make_logits(5, 20)
        linear = Bins.linear(20, 10.0 * scale, 400.0 * scale)
        for name, loss in (("paper", paper_loss), ("ours", forelen_loss)):
            (values[name, scale],) = torch.autograd.grad(
                loss(logits, LENGTHS * scale, linear).sum(), logits
            )
    torch.testing.assert_close(values["ours", 1], values["ours", 10])
    assert (values["paper", 10] - values["paper", 1]).abs().max() > 1


def test_censoring_pulls_upwards():
    bins = Bins.log1p(16, 500)
    logits = torch.zeros(1, len(bins), dtype=F64, requires_grad=True)
    loss = forelen_loss(logits, torch.tensor([100]), bins, censored=torch.tensor([True]))
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    place = int(bins.index(torch.tensor(100)))
    assert (gradient[0, :place] > 0).all()
    assert (gradient[0, place + 1 :] < 0).all()
    # stopped beyond the last edge, and beyond a closed last bin
    closed = Bins.linear(8, 0.0, 50.0)
    for grid, length in ((bins, 5000), (closed, 80)):
        logits = torch.zeros(1, len(grid), dtype=F64, requires_grad=True)
        loss = forelen_loss(logits, torch.tensor([length]), grid, censored=torch.tensor([True]))
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert torch.isfinite(loss).all()
        assert (gradient[0, :-1] > 0).all()
        assert gradient[0, -1] < 0
