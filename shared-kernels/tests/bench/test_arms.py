import pytest
from shared_kernels.bench import Arm, Workload

ARMS = [Arm(name="a", fn=int), Arm(name="b", fn=int)]


def workload(**changes):
    return Workload(**{"name": "w", "arms": ARMS, "baseline": "a", "check": lambda: True} | changes)


def test_defaults():
    made = workload()
    assert (made.device, made.clock, made.flush_l2, made.params) == ("cpu", "auto", True, {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ARMS[:1]}, r"at least two arms.*\['a'\]"),
        ({"arms": [ARMS[0], ARMS[0]]}, r"different names.*\['a', 'a'\]"),
        ({"baseline": "c"}, r"one of its arms \['a', 'b'\]; got 'c'"),
        ({"clock": "sundial"}, "got 'sundial'"),
        ({"clock": "events"}, "expected a CUDA device.*got 'cpu'"),
    ],
)
def test_bad_workloads_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        workload(**changes)


@pytest.mark.parametrize("count", ["bytes", "flops", "h2d_bytes", "d2h_bytes"])
def test_negative_counts_are_refused(count):
    with pytest.raises(ValueError, match=rf"{count} >= 0 in arm 'x'; got -1"):
        Arm(name="x", fn=int, **{count: -1})
