"""Splitting a loop over threads."""

import threading

import pytest
import torch
from shared_kernels._parallel import parallel_for


@pytest.fixture(params=[1, 2, 5])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("items", [0, 1, 7, 8, 40, 97])
def test_ranges_cover_everything_once(threads, items):
    seen, lock = [], threading.Lock()

    def body(low, high):
        with lock:
            seen.append((low, high))

    parallel_for(items, body)
    seen.sort()
    assert sorted(i for low, high in seen for i in range(low, high)) == list(range(items))
    assert len(seen) <= threads
    assert all(low < high for low, high in seen)


def test_work_is_really_shared():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        # no range can pass the barrier before all three have reached it
        barrier = threading.Barrier(3)
        parallel_for(300, lambda low, high: barrier.wait(timeout=20))
    finally:
        torch.set_num_threads(before)


def test_an_error_in_any_range_propagates(threads):
    def body(low, high):
        if high == 100:
            raise ZeroDivisionError("in the last range")

    with pytest.raises(ZeroDivisionError, match="in the last range"):
        parallel_for(100, body)
