"""Bins and soft labels."""

import itertools
import math

import pytest
import torch
from forelen import Bins
from hypothesis import given, settings
from hypothesis import strategies as st

F64 = torch.float64


def integer_pmf(bins, last):
    """Probabilities of 1, 2, ... last, one row for each bin, by the definition."""
    rows = []
    for low, high in itertools.pairwise(bins.edges):
        rows.append([1 / (high - low) if low < x <= high else 0.0 for x in range(1, last + 1)])
    if bins.tail is not None:
        stop = 1 / bins.tail
        rows.append([stop * (1 - stop) ** (x - bins.edges[-1] - 1) if x > bins.edges[-1] else 0.0
                     for x in range(1, last + 1)])  # fmt: skip
    return torch.tensor(rows, dtype=F64)


def test_bins_are_what_their_definition_says():
    bins = Bins.log1p(12, 100, tail=7.0)
    assert len(bins) == 12
    law = integer_pmf(bins, 1000)
    lengths = torch.arange(1, 1001, dtype=F64)
    torch.testing.assert_close(law.sum(1), torch.ones(12, dtype=F64))
    torch.testing.assert_close(law @ lengths, bins.centers())
    torch.testing.assert_close(bins.below(lengths).T, law.cumsum(1))
    # one bin has the most of each length
    inside = law.argmax(0)
    assert torch.equal(bins.index(lengths.long()), inside)


def test_a_log_grid_of_short_answers_has_bins_of_one_token():
    bins = Bins.log1p(64, 40)
    assert bins.edges == tuple(range(41))
    assert Bins.log1p(64, 5000).edges[:4] == (0, 1, 2, 3)


def test_fitted_bins():
    lengths = torch.arange(1, 1001)
    bins = Bins.fit(lengths, 64)
    assert bins.edges[-1] == 991
    assert bins.tail >= 4.5
    linear = Bins.fit(lengths, 20, scale="linear")
    assert len(linear) == 20
    assert linear.edges[0] == pytest.approx(10.99)
    assert Bins.from_dict(bins.to_dict()) == bins
    assert Bins.from_dict(linear.to_dict()) == linear


BINS = [Bins.log1p(64, 2000), Bins.log1p(9, 300, tail=50.0), Bins.linear(20, 5.0, 430.0)]


@settings(deadline=None, max_examples=100, derandomize=True, database=None)
@given(length=st.integers(1, 5000), which=st.integers(0, 2))
def test_the_mean_of_a_label_is_the_length(length, which):
    bins = BINS[which]
    centers = bins.centers()
    label = bins.labels(torch.tensor([length]))
    assert float(label.sum()) == pytest.approx(1, abs=1e-12)
    assert float(label.min()) >= 0
    expected = min(max(length, float(centers[0])), float(centers[-1]))
    assert float(label @ centers) == pytest.approx(expected, rel=1e-9)


def test_a_label_falls_off_on_both_sides():
    bins = Bins.log1p(64, 2000)
    label = bins.labels(torch.tensor([200]))[0]
    peak = int(label.argmax())
    assert abs(peak - int(bins.index(torch.tensor([200]))[0])) <= 1
    assert (label[: peak + 1].diff() >= 0).all()
    assert (label[peak:].diff() <= 0).all()
    # close to the kernel: its neighbours have about e^-1 of it
    assert 0.2 < float(label[peak + 2] / label[peak + 1]) < 0.6


def test_the_papers_labels_are_biased_at_the_edges():
    bins = Bins.linear(20, 0.0, 20.0)
    labels = bins.paper_labels(torch.tensor([0.5, 1.5, 2.5, 3.5, 10.5, 19.5]))
    torch.testing.assert_close(labels.sum(1), torch.ones(6, dtype=F64))
    places = labels @ torch.arange(20, dtype=F64)
    shifts = (places - torch.tensor([0, 1, 2, 3, 10, 19])).tolist()
    assert shifts[:4] == pytest.approx([0.582, 0.284, 0.135, 0.062], abs=1e-3)
    assert shifts[0] == pytest.approx(
        sum(k * math.exp(-k) for k in range(20)) / sum(math.exp(-k) for k in range(20)), abs=1e-12
    )
    assert shifts[4] == pytest.approx(0, abs=1e-3)
    assert shifts[5] == pytest.approx(-shifts[0], abs=1e-12)
    # ours are not
    centred = bins.labels(torch.tensor([0.5, 1.5])) @ bins.centers()
    torch.testing.assert_close(centred, torch.tensor([0.5, 1.5], dtype=F64))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Bins((0.0, 2.0, 2.0)), "strictly increasing"),
        (lambda: Bins((0.0, 2.0)), "two bins"),
        (lambda: Bins((0.0, 1.5, 2.0)), "integers"),
        (lambda: Bins((0.0, 1.0, 2.0), tail=0.5), "mean excess above 1"),
        (lambda: Bins.linear(20, 5.0, 5.0), "below 5.0"),
        (lambda: Bins.linear(1, 5.0, 9.0), "count"),
        (lambda: Bins.log1p(64, 1), "longest"),
        (lambda: Bins.fit(torch.zeros(0)), "at least one"),
        (lambda: Bins.fit(torch.ones(3), scale="sqrt"), "log1p or linear"),
    ],
)
def test_bad_bins(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize("tail", [None, 3.5])
def test_what_remains_is_counted_token_by_token(tail):
    bins = Bins((0.0, 1.0, 2.0, 4.0, 9.0, 20.0), tail)
    generator = torch.Generator().manual_seed(0)
    pmf = torch.rand(4, len(bins), generator=generator, dtype=torch.float64)
    pmf /= pmf.sum(-1, keepdim=True)
    seen = torch.tensor([0, 1, 7, 17])
    found = bins.remaining(pmf, seen)
    grid = torch.arange(400).double()
    tokens = (bins.below(grid)[None] @ pmf[..., None])[..., 0].diff(dim=-1)
    for row, count in enumerate(seen.tolist()):
        left = tokens[row, count:] / tokens[row, count:].sum()
        place = bins.index(torch.arange(1, len(left) + 1))
        expected = torch.zeros(len(bins), dtype=torch.float64).index_add_(0, place, left)
        torch.testing.assert_close(found[row], expected, rtol=0, atol=2e-6)
    assert torch.equal(found[0].argsort(), pmf[0].argsort())
    # what has been outlived leaves no preference, and no zero
    outlived = Bins((0.0, 1.0, 2.0)).remaining(torch.tensor([[0.5, 0.5]]), torch.tensor([9]))
    assert outlived.tolist() == [[0.5, 0.5]]
