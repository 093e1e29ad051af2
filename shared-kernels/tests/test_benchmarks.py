from pathlib import Path

import pytest
import shared_kernels
import torch
from shared_kernels import ops
from shared_kernels.bench import Ceilings, Plan, load_benchmarks, run_workload
from shared_kernels.bench.runner import GateError

ZO = Path(shared_kernels.__file__).parents[2] / "benchmarks" / "zo.py"
ONCE = Plan(warmup=1, min_rounds=1, max_rounds=1)

pytestmark = pytest.mark.skipif(not ZO.is_file(), reason="needs the checkout")


@pytest.fixture
def zo(monkeypatch):
    functions = load_benchmarks(ZO)
    for function in functions.values():
        monkeypatch.setitem(function.__globals__, "_elements", lambda device: 1 << 17)
    return functions


@pytest.fixture
def ceilings():
    made = Ceilings("cpu")
    made._measured["device_copy"] = 1e9
    return made


@pytest.mark.parametrize("name", ["noise", "zo_materialize", "zo_replay"])
def test_workloads_pass_their_gates_and_run(zo, ceilings, name):
    workloads = list(zo[name]("cpu"))
    assert {workload.name.split("/")[0] for workload in workloads} == {name}
    for workload in workloads:
        result = run_workload(workload, ceilings, ONCE)
        assert all(arm["error"] is None and arm["limit"] for arm in result["arms"])


def test_a_wrong_kernel_does_not_pass_the_gate(zo, ceilings, monkeypatch):
    right = ops.zo.zo_materialize

    def wrong(master, *args, plus, impl="auto", **options):
        right(master, *args, plus=plus, impl=impl, **options)
        if impl == "auto" and plus is not None:
            plus[-4096].mul_(1 + 2**-20)

    monkeypatch.setattr(ops.zo, "zo_materialize", wrong)
    with pytest.raises(GateError, match="Mismatched elements: 1 / 4096"):
        run_workload(next(zo["zo_materialize"]("cpu")), ceilings, ONCE)


def test_the_gate_sees_the_folded_master(zo, ceilings, monkeypatch):
    right = ops.zo.zo_materialize

    def never_folds(master, *args, fold, **options):
        right(master, *args, fold=fold and master.numel() == 4096, **options)

    monkeypatch.setattr(ops.zo, "zo_materialize", never_folds)
    with pytest.raises(GateError, match="Mismatched elements"):
        run_workload(next(zo["zo_materialize"]("cpu")), ceilings, ONCE)


def test_wrong_noise_does_not_pass_the_gate(zo, ceilings, monkeypatch):
    from shared_kernels import random

    right = random.noise

    def shifted(numel, *, start=0, impl="auto", **options):
        return right(numel, start=start + (impl == "auto"), impl=impl, **options)

    monkeypatch.setattr(random, "noise", shifted)
    with pytest.raises(GateError, match="Mismatched elements"):
        run_workload(next(zo["noise"]("cpu")), ceilings, ONCE)


def test_the_peer_draws_signs_and_normals(zo):
    draw = zo["noise"].__globals__["_draw"]
    generator = torch.Generator().manual_seed(0)
    like = torch.empty(100_000, dtype=torch.bfloat16)
    signs = draw(like, "rademacher", generator)
    assert signs.dtype == torch.bfloat16
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert abs(signs.float().mean()) < 4 / 100_000**0.5
    normals = draw(like.float(), "gaussian", generator)
    assert abs(normals.std() - 1) < 4 / (2 * 100_000) ** 0.5
