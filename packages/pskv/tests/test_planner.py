"""Packing rows as a tree: nothing is lost, nothing shared is computed twice."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pskv import plan
from pskv.planner import sort_rows


def visible(layout, row):
    """The tokens that stand before and in a packed row, in the order of the keys."""
    low, high = layout.cu_seqlens[row : row + 2]
    before = [layout.tokens[start : start + n] for start, n in layout.segments[row]]
    return np.concatenate([*before, layout.tokens[low:high]])


def assert_sound(rows, layout, max_depth):
    rebuilt = layout.rebuild()
    assert [row.tolist() for row in rebuilt] == [list(row) for row in rows]
    naive = sum(map(len, rows))
    assert len(layout.tokens) <= naive
    assert all(len(chain) < max_depth for chain in layout.segments)
    positions = layout.layout(5).position_ids().numpy() - 5
    assert np.array_equal(positions, layout.positions)
    # what a token sees is the beginning of the row it comes from
    for packed in range(len(layout.segments)):
        first = layout.cu_seqlens[packed]
        row, _ = layout.source[first]
        seen = visible(layout, packed)
        assert seen.tolist() == list(rows[row])[: len(seen)]
    return naive


ROWS = st.lists(st.lists(st.integers(0, 2), max_size=12), max_size=12)


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(rows=ROWS, max_depth=st.integers(1, 4))
def test_random_rows(rows, max_depth):
    layout = plan(rows, max_depth=max_depth)
    naive = assert_sound(rows, layout, max_depth)
    unique = {tuple(row) for row in rows if row}
    starts = {(row[: i + 1]) for row in unique for i in range(len(row))}
    assert len(layout.tokens) >= len(starts)
    if len(starts) == naive:
        assert len(layout.tokens) == naive


def test_ten_thousand_random_sets():
    generator = np.random.default_rng(0)
    for _ in range(10_000):
        base = generator.integers(0, 4, 10)
        rows = []
        for _ in range(generator.integers(1, 7)):
            row = base[: generator.integers(0, 11)].copy()
            if len(row):
                row[generator.integers(len(row))] = generator.integers(4)
            rows.append(row)
        layout = plan(rows)
        assert all(np.array_equal(a, b) for a, b in zip(layout.rebuild(), rows, strict=True))
        assert len(layout.tokens) <= sum(map(len, rows))


def candidates(n, suffix, tail, seed=0):
    generator = np.random.default_rng(seed)
    parent = generator.integers(0, 1000, suffix + tail)
    rows = [parent]
    for i in range(n - 1):
        row = parent.copy()
        row[i % suffix] = 1000 + i
        rows.append(row)
    return rows


def test_candidates_of_a_coordinate_search_hang_on_their_parent():
    rows = candidates(401, 20, 25)
    layout = plan(rows)
    assert_sound(rows, layout, 3)
    # each of 20 places is changed 20 times, and a candidate is computed from there on
    assert len(layout.tokens) == 45 + sum(20 * (45 - place) for place in range(20))
    assert max(map(len, layout.segments)) == 1
    assert len({chain[0][0] for chain in layout.segments if chain}) == 1


@pytest.mark.parametrize("max_depth", [2, 3, 5])
def test_rows_that_part_again_and_again(max_depth):
    generator = np.random.default_rng(1)
    deepest = 0
    for _ in range(50):
        rows = [generator.integers(0, 50, 12)]
        for _ in range(3):
            # each row goes on in two or three ways, twelve tokens or more at a time
            rows = [
                np.concatenate([row, generator.integers(0, 50, generator.integers(12, 20))])
                for row in rows
                for _ in range(generator.integers(2, 4))
            ]
        layout = plan(rows, max_depth=max_depth)
        assert_sound(rows, layout, max_depth)
        deepest = max(deepest, *map(len, layout.segments))
    assert deepest == min(max_depth - 1, 3)


def test_equal_rows_are_computed_once():
    layout = plan([[1, 2, 3], [1, 2, 3], [1, 2], []])
    assert layout.tokens.tolist() == [1, 2, 3]
    assert layout.place(np.array([2]), np.array([1])).tolist() == [1]


def test_a_few_tokens_are_not_worth_a_look_up():
    layout = plan([[1, 2, 3], [1, 2, 4]])
    assert len(layout.tokens) == 6
    assert layout.segments == [[], []]


def test_no_rows_and_tensors():
    assert len(plan([]).tokens) == 0
    layout = plan(torch.tensor([[1, 2], [3, 4]]))
    assert sorted(layout.tokens.tolist()) == [1, 2, 3, 4]


def test_bad_input():
    with pytest.raises(TypeError, match=r"rows\[1\]: expected one dimension of token ids"):
        plan([[1], [0.5]])
    with pytest.raises(ValueError, match="max_depth"):
        plan([[1]], max_depth=0)


@settings(deadline=None, max_examples=80, derandomize=True, database=None)
@given(rows=st.lists(st.lists(st.integers(0, 2), max_size=5), max_size=9))
def test_rows_are_sorted_as_lists_are(rows):
    order, common = sort_rows([np.array(row, dtype=np.int64) for row in rows])
    found = [rows[place] for place in order]
    assert found == sorted(rows)
    for place in range(1, len(found)):
        pairs = zip(found[place - 1], found[place], strict=False)
        assert common[place] == sum(1 for _ in itertools.takewhile(lambda p: p[0] == p[1], pairs))
