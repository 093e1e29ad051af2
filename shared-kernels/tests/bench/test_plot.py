import sys

import pytest
from shared_kernels.bench import plot_result
from shared_kernels.testing.imports import assert_does_not_load


def arm(name, median, **changes):
    seconds = {"p20": 0.9 * median, "median": median, "p80": 1.1 * median}
    return {"name": name, "error": None, "seconds": seconds} | changes


@pytest.fixture
def result():
    ours = arm("ours", 1e-3, limit={"seconds": 5e-4, "by": "memory"})
    failed = {"name": "peer", "error": "out of device memory"}
    return {
        "workloads": [
            {"name": "noise/gaussian", "arms": [arm("torch", 4e-3), ours, failed]},
            {"name": "noise/rademacher", "arms": [arm("torch", 2e-3), ours]},
        ]
    }


def test_svg_names_workloads_arms_and_times(result, tmp_path):
    plot_result(result, tmp_path / "plots" / "noise.svg")
    text = (tmp_path / "plots" / "noise.svg").read_text()
    for word in ("noise/gaussian", "noise/rademacher", "torch", "ours", "4 ms", "1 ms"):
        assert word in text
    assert "peer" not in text


def test_the_same_result_gives_the_same_bytes(result, tmp_path):
    for suffix in ("svg", "png"):
        for name in ("a", "b"):
            plot_result(result, tmp_path / f"{name}.{suffix}")
        first, second = (tmp_path / f"{name}.{suffix}" for name in ("a", "b"))
        assert first.read_bytes() == second.read_bytes()


def test_png(result, tmp_path):
    plot_result(result, tmp_path / "noise.png")
    assert (tmp_path / "noise.png").read_bytes().startswith(b"\x89PNG")


def test_bad_input(result, tmp_path):
    with pytest.raises(ValueError, match=r"\.svg or \.png; got 'noise\.pdf'"):
        plot_result(result, tmp_path / "noise.pdf")
    with pytest.raises(ValueError, match="at least one timed workload"):
        plot_result({"workloads": []}, tmp_path / "noise.svg")


def test_a_missing_matplotlib_says_what_to_install(result, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'shared-kernels\[plot\]'"):
        plot_result(result, tmp_path / "noise.svg")


def test_matplotlib_loads_only_to_plot():
    assert_does_not_load("from shared_kernels.bench import plot_result", {"matplotlib"})
