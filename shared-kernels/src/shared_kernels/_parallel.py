"""Split a CPU loop over the threads that torch is allowed to use."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

import torch

#: Fewer items than this per thread are not worth waking a thread for.
_MIN_ITEMS = 8


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="shared-kernels")


def parallel_for(items: int, body: Callable[[int, int], None]) -> None:
    """Call ``body(begin, end)`` on consecutive ranges that cover ``range(items)``.

    The number of ranges is at most `torch.get_num_threads`; the calling thread runs the first one.
    ``body`` must release the GIL to gain from it, and its result must not depend on the split.

    Args:
        items: Number of items; zero calls nothing.
        body: Work on one range; exceptions propagate after all ranges have ended.
    """
    threads = max(1, min(torch.get_num_threads(), items // _MIN_ITEMS))
    if items <= 0:
        return
    cuts = [items * i // threads for i in range(threads + 1)]
    if threads == 1:
        body(0, items)
        return
    pool = _pool(threads - 1)
    others = [pool.submit(body, a, b) for a, b in pairwise(cuts[1:])]
    try:
        body(cuts[0], cuts[1])
    finally:
        errors = [future.exception() for future in others]
    for error in errors:
        if error is not None:
            raise error
