import json

import numpy as np
import pytest
from shared_kernels.bench import Arm, Ceilings, Workload, markdown_table
from shared_kernels.bench.report import (
    SCHEMA,
    SCHEMA_VERSION,
    caption,
    read_result,
    result_name,
    speedup,
    summarize,
    write_result,
)
from shared_kernels.bench.timing import Measurement


@pytest.fixture
def ceilings():
    made = Ceilings("cpu")
    made._measured["device_copy"] = 1e9
    return made


@pytest.fixture
def result(ceilings):
    workload = Workload(
        name="noise/gaussian",
        params={"elements": 1000},
        baseline="torch",
        check=lambda: True,
        arms=[
            Arm(name="torch", fn=int, bytes=4000),
            Arm(name="ours", fn=int, bytes=4000),
            Arm(name="huge", fn=int),
        ],
    )
    measurements = {
        "torch": Measurement(seconds=[4e-5, 4e-5, 4e-5], peak_host_bytes=2048),
        "ours": Measurement(seconds=[1e-5, 1e-5, 1e-5], peak_device_bytes=3 << 20),
        "huge": Measurement(error="out of device memory"),
    }
    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "benchmark": "noise",
        "device": "cpu",
        "provenance": {
            "command": "python -m shared_kernels.bench noise.py",
            "commit": "0123456789abcdef",
            "dirty": True,
            "date": "2026-01-02T03:04:05+00:00",
            "versions": {"torch": "2.11.0", "triton": "3.6.0"},
            "cpu": {"model": "A CPU", "torch_threads": 2, "usable_cores": 2},
            "gpu": None,
            "load_average": [1.5, 7.0, 7.0],
        },
        "ceilings": {"device_copy": 1e9, "gemm_bf16": 7.7e14},
        "workloads": [summarize(workload, measurements, ceilings)],
        "refused": [],
    }


def test_speedup_of_equal_times_is_one():
    seconds = list(np.random.default_rng(1).uniform(1, 2, 30))
    assert speedup(seconds, seconds) == {"ratio": 1.0, "low": 1.0, "high": 1.0}


def test_speedup_keeps_rounds_together():
    # The machine slows down tenfold during the run and both arms feel it alike.
    drift = np.geomspace(1, 10, 40)
    assert speedup(2 * drift, drift) == {"ratio": 2.0, "low": 2.0, "high": 2.0}


def test_speedup_interval_covers_the_truth_and_shrinks():
    rng = np.random.default_rng(2)
    covered, widths = 0, {20: [], 200: []}
    for rounds in (20, 200):
        for _ in range(50):
            before, after = 3 * rng.lognormal(0, 0.1, rounds), rng.lognormal(0, 0.1, rounds)
            made = speedup(before, after)
            assert made["low"] <= made["ratio"] <= made["high"]
            covered += made["low"] <= 3 <= made["high"]
            widths[rounds].append(made["high"] - made["low"])
    # 95 of 100 expected; 4 sigma below is 86.
    assert covered >= 86
    assert np.mean(widths[200]) < 0.6 * np.mean(widths[20])


def test_speedup_needs_the_same_rounds():
    with pytest.raises(ValueError, match="got 2 and 3"):
        speedup([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="got 0 and 0"):
        speedup([], [])


def test_summary(result):
    torch_arm, ours, huge = result["workloads"][0]["arms"]
    assert ours["seconds"] == dict.fromkeys(("p20", "p25", "median", "p75", "p80"), 1e-5)
    assert ours["speedup"]["ratio"] == 4.0
    assert ours["limit"] == {"seconds": 4e-6, "by": "memory", "fraction": 0.4}
    assert torch_arm["limit"]["fraction"] == 0.1
    assert ours["counts"] == {"bytes": 4000}
    assert ours["rounds"] == 3
    assert huge["error"] == "out of device memory"
    assert "seconds" not in huge
    assert "limit" not in huge


def test_quantiles(ceilings):
    arms = [Arm(name="a", fn=int), Arm(name="b", fn=int)]
    workload = Workload(name="w", arms=arms, baseline="a", check=lambda: True)
    seconds = [float(i) for i in range(101)]
    measurements = dict.fromkeys("ab", Measurement(seconds=seconds[::-1]))
    found = summarize(workload, measurements, ceilings)["arms"][0]["seconds"]
    assert found == {"p20": 20, "p25": 25, "median": 50, "p75": 75, "p80": 80}


def test_no_ratio_without_a_baseline(ceilings):
    arms = [Arm(name="a", fn=int), Arm(name="b", fn=int)]
    workload = Workload(name="w", arms=arms, baseline="a", check=lambda: True)
    measurements = {"a": Measurement(error="out of device memory"), "b": Measurement(seconds=[1.0])}
    assert summarize(workload, measurements, ceilings)["arms"][1]["speedup"] is None


def test_table(result):
    lines = markdown_table(result).splitlines()
    assert lines[2] == (
        "| `noise/gaussian` | torch | 40 µs | 40 µs to 40 µs | 1 (baseline) "
        "| 10.0% (memory) | < 1.00 MiB |"
    )
    assert lines[3] == (
        "|  | ours | 10 µs | 10 µs to 10 µs | **4x** (4 to 4) | 40.0% (memory) | 3.00 MiB |"
    )
    assert lines[4] == "|  | huge | out of device memory |  |  |  |  |"
    assert lines[6] == (
        "A CPU, torch threads: 2; torch 2.11.0; commit 0123456789ab+changes; 2026-01-02; limits "
        "measured in the same run: device_copy 1 GB/s, gemm_bf16 770 TFLOP/s. Remake with "
        "`python -m shared_kernels.bench noise.py`."
    )
    assert len({line.count("|") for line in lines[:5]}) == 1


def test_a_bar_in_a_name_is_no_column(result):
    result["workloads"][0]["arms"][1]["name"] = "paged|sdpa"
    assert "|  | paged\\|sdpa | 10 µs |" in markdown_table(result)


def test_the_caption_tells_of_a_busy_machine(result):
    assert "BUSY" not in caption(result)
    result["provenance"]["load_average"][0] = 4.25
    assert "A CPU, torch threads: 2, BUSY (load 4.2 on 2 cores);" in caption(result)


def test_files_round_trip(result, tmp_path):
    path = tmp_path / "new" / "noise-cpu.json"
    write_result(result, path)
    assert read_result(path) == result
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(result, tmp_path):
    path = tmp_path / "noise-cpu.json"
    write_result(result, path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_result({"not JSON": object()}, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("change", [{"schema": "another"}, {"schema_version": 99}])
def test_other_files_are_refused(result, tmp_path, change):
    path = tmp_path / "noise-cpu.json"
    path.write_text(json.dumps(result | change))
    with pytest.raises(ValueError, match=r"expected schema .* in noise-cpu.json; got"):
        read_result(path)


def test_names_of_result_files():
    assert result_name("zo", "NVIDIA H200") == "zo-nvidia-h200"
    assert result_name("zo", "cpu", "noise/*") == "zo-noise-cpu"
