import time

import pytest
import torch
from shared_kernels.bench import Arm, Plan, Workload, measure
from shared_kernels.bench.timing import EventClock, WallClock, make_clock

MIB = 1 << 20


class RecordingClock:
    """Gives every arm the seconds it is told and keeps the order of the calls."""

    def __init__(self, log):
        self.log = log

    def time(self, fn):
        self.log.append("start")
        seconds = fn()
        self.log.append("stop")
        return lambda: seconds


def workload(*arms, **changes):
    return Workload(name="w", arms=arms, baseline=arms[0].name, check=lambda: True, **changes)


def logging_arms(names, log, seconds=1.0):
    def call(name):
        log.append(name)
        return seconds

    return [Arm(name=name, fn=lambda name=name: call(name)) for name in names]


def test_every_round_runs_every_arm_once_in_changing_order():
    log = []
    plan = Plan(warmup=0, min_rounds=40, min_seconds=0.0)
    arms = logging_arms("abc", log)
    measured = measure(workload(*arms), plan, RecordingClock([]))
    calls = log[-3 * 40 :]
    rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) == 6
    assert all(len(m.seconds) == 40 for m in measured.values())


def test_each_arm_gets_its_own_seconds_in_the_order_of_the_workload():
    arms = [Arm(name=name, fn=lambda s=s: s) for name, s in (("b", 2.0), ("a", 5.0))]
    plan = Plan(warmup=0, min_rounds=3, min_seconds=0.0)
    measured = measure(workload(*arms), plan, RecordingClock([]))
    assert list(measured) == ["b", "a"]
    assert measured["b"].seconds == [2.0] * 3
    assert measured["a"].seconds == [5.0] * 3


def test_setup_and_teardown_surround_every_call_outside_the_clock():
    log = []
    one = Arm(
        name="one",
        fn=lambda: log.append("fn") or 1.0,
        setup=lambda: log.append("setup"),
        teardown=lambda: log.append("teardown"),
    )
    plan = Plan(warmup=2, min_rounds=3, min_seconds=0.0)
    measure(workload(one, Arm(name="two", fn=lambda: 1.0)), plan, RecordingClock(log))
    assert log[:6] == ["setup", "fn", "teardown"] * 2
    text = " ".join(log)
    assert text.count("setup start fn stop teardown") == 3
    assert text.count("fn") == text.count("setup") == text.count("teardown")


def test_warmup_rounds_are_not_timed():
    log = []
    plan = Plan(warmup=5, min_rounds=1, max_rounds=1)
    arms = logging_arms("ab", log)
    measured = measure(workload(*arms), plan, RecordingClock([]))
    assert log[:10] == ["a", "b"] * 5
    assert len(measured["a"].seconds) == 1


def test_a_slow_warmup_is_cut_short():
    log = []
    plan = Plan(warmup=5, min_rounds=1, max_rounds=1, max_seconds=0.0)
    measure(workload(*logging_arms("ab", log)), plan, RecordingClock([]))
    # One warm-up round; what follows is the memory pass, which repeats "a" first.
    assert log[:4] == ["a", "b", "a", "a"]


@pytest.mark.parametrize(
    ("rounds", "seconds", "finished"),
    [
        (29, 5.0, False),
        (30, 1.9, False),
        (30, 2.0, True),
        (300, 0.1, True),
        (2, 1000.0, False),
        (3, 59.0, False),
        (3, 60.0, True),
    ],
)
def test_plan(rounds, seconds, finished):
    assert Plan().finished(rounds, seconds) is finished


def test_an_arm_out_of_memory_is_a_result_and_the_others_go_on():
    def too_big():
        raise torch.OutOfMemoryError("64 TiB")

    plan = Plan(warmup=1, min_rounds=3, min_seconds=0.0)
    arms = Arm(name="big", fn=too_big), Arm(name="small", fn=lambda: 1.0)
    measured = measure(workload(*arms), plan, RecordingClock([]))
    assert measured["big"].error == "out of device memory"
    assert measured["big"].seconds == []
    assert measured["small"].error is None
    assert len(measured["small"].seconds) == 3


def test_other_errors_of_an_arm_are_raised():
    def broken():
        raise RuntimeError("broken arm")

    with pytest.raises(RuntimeError, match="broken arm"):
        measure(workload(Arm(name="a", fn=broken), Arm(name="b", fn=int)), Plan())


def test_host_memory_peak_is_seen_and_not_invented():
    def allocate():
        # Small steps that take long enough for a sampler of 1 ms.
        block = torch.ones(96 * MIB, dtype=torch.int8)
        block.add_(1)

    arms = Arm(name="big", fn=allocate), Arm(name="nothing", fn=lambda: time.perf_counter())
    measured = measure(workload(*arms), Plan(min_rounds=1, max_rounds=1))
    assert 80 * MIB < measured["big"].peak_host_bytes < 160 * MIB
    assert measured["nothing"].peak_host_bytes < 8 * MIB
    assert measured["big"].peak_device_bytes is None


def test_wall_clock_measures_the_call():
    inside = []

    def work():
        begin = time.perf_counter()
        sum(range(100_000))
        inside.append(time.perf_counter() - begin)

    begin = time.perf_counter()
    read = WallClock("cpu").time(work)
    around = time.perf_counter() - begin
    assert inside[0] <= read() <= around
    assert read() == read()


def test_more_work_takes_longer():
    arms = [
        Arm(name="large", fn=lambda: sum(range(40_000))),
        Arm(name="small", fn=lambda: sum(range(5_000))),
    ]
    measured = measure(workload(*arms), Plan(min_rounds=50, min_seconds=0.2))
    # The minimum, so that a busy machine does not fail the test.
    assert 4 < min(measured["large"].seconds) / min(measured["small"].seconds) < 16


def test_seconds_that_an_arm_returns():
    arms = [Arm(name=name, fn=lambda s=s: s) for name, s in (("a", 2.5), ("b", 0.5))]
    found = measure(workload(*arms, clock="returned"), Plan(min_rounds=4, max_rounds=4))
    assert found["a"].seconds == [2.5] * 4
    assert found["b"].seconds == [0.5] * 4
    arms = [Arm(name=name, fn=lambda: None) for name in "ab"]
    with pytest.raises(TypeError, match=r"returned.*None"):
        measure(workload(*arms, clock="returned"))


def test_the_clock_fits_the_device():
    assert isinstance(make_clock(workload(*logging_arms("ab", []))), WallClock)


@pytest.mark.gpu
def test_gpu_clocks_agree_on_a_long_kernel(cuda):
    x = torch.randn(1 << 26, device="cuda")
    for clock in (EventClock("cuda", flush_l2=True), WallClock("cuda")):
        clock.time(lambda: x.sin_())()
        once = min(clock.time(lambda: x.sin_())() for _ in range(5))
        thrice = min(clock.time(lambda: (x.sin_(), x.sin_(), x.sin_()))() for _ in range(5))
        assert 2.0 < thrice / once < 4.0


@pytest.mark.gpu
def test_gpu_memory_peak_is_exact(cuda):
    plan = Plan(warmup=1, min_rounds=1, max_rounds=1)
    arms = [
        Arm(name="big", fn=lambda: torch.ones(64 * MIB, dtype=torch.int8, device="cuda")),
        Arm(name="nothing", fn=lambda: None),
    ]
    measured = measure(workload(*arms, device="cuda"), plan)
    assert measured["big"].peak_device_bytes == 64 * MIB
    assert measured["nothing"].peak_device_bytes == 0


@pytest.mark.gpu
def test_the_clock_on_a_gpu_is_events_unless_told_otherwise(cuda):
    arms = logging_arms("ab", [])
    assert isinstance(make_clock(workload(*arms, device="cuda")), EventClock)
    assert isinstance(make_clock(workload(*arms, device="cuda", clock="wall")), WallClock)
