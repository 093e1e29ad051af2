import pytest
import torch
from shared_kernels.bench import Arm, Ceilings, ceilings


@pytest.fixture
def known():
    """Ceilings with round rates, as if measured."""
    made = Ceilings("cpu")
    rates = {"device_copy": 100.0, "gemm_fp32": 1000.0, "gemm_bf16": 4000.0}
    made._measured |= rates | {"h2d": 10.0, "d2h": 20.0, "duplex": 16.0}
    return made


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(ceilings, "_CPU_COPY_BYTES", 1 << 24)
    monkeypatch.setattr(ceilings, "_REPEATS", 5)


@pytest.mark.parametrize(
    ("counts", "seconds", "by"),
    [
        ({"bytes": 300}, 3.0, "memory"),
        ({"flops": 2000}, 2.0, "compute"),
        ({"flops": 2000, "flops_dtype": "bf16"}, 0.5, "compute"),
        ({"bytes": 300, "flops": 2000}, 3.0, "memory"),
        ({"bytes": 100, "flops": 2000}, 2.0, "compute"),
        ({"h2d_bytes": 30}, 3.0, "h2d"),
        ({"d2h_bytes": 30}, 1.5, "d2h"),
        ({"bytes": 500, "h2d_bytes": 30}, 5.0, "memory"),
        # 16 bytes of each direction at the duplex rate, 14 more upwards alone.
        ({"h2d_bytes": 30, "d2h_bytes": 16}, 2.0 + 1.4, "duplex"),
        # 16 bytes of each direction at the duplex rate, 40 more downwards alone.
        ({"h2d_bytes": 16, "d2h_bytes": 56}, 2.0 + 2.0, "duplex"),
    ],
)
def test_limit_is_the_largest_term(known, counts, seconds, by):
    assert known.limit(Arm(name="a", fn=int, **counts)) == (pytest.approx(seconds), by)


def test_an_arm_that_counts_nothing_has_no_limit(known):
    assert known.limit(Arm(name="a", fn=int)) is None


def test_rates_are_measured_once_and_only_when_asked(small):
    made = Ceilings("cpu")
    assert made.as_dict() == {}
    first = made.device_copy()
    assert made.device_copy() == made.host_copy() == first
    assert made.as_dict() == {"device_copy": first}
    # Between a slow disk and any cache.
    assert 1e8 < first < 1e13


def test_gemm_rate(small):
    made = Ceilings("cpu")
    assert 1e8 < made.gemm("fp32") < 1e15
    assert list(made.as_dict()) == ["gemm_fp32"]


def test_measuring_leaves_the_matmul_precision_alone(small):
    before = torch.get_float32_matmul_precision()
    Ceilings("cpu").gemm("tf32")
    assert torch.get_float32_matmul_precision() == before


def test_bad_input():
    with pytest.raises(ValueError, match=r"expected a dtype of .*'bf16'.*; got 'int3'"):
        Ceilings("cpu").gemm("int3")
    with pytest.raises(ValueError, match=r"expected a CUDA device.*got cpu"):
        Ceilings("cpu").h2d()


@pytest.mark.gpu
def test_gpu_rates_are_in_their_order(cuda):
    made = Ceilings("cuda")
    assert made.device_copy() > 5e10
    assert made.gemm("bf16") > made.gemm("fp32") > made.gemm("fp64") / 2
    assert 1e9 < made.h2d() < made.device_copy()
    assert 1e9 < made.d2h() < made.device_copy()
    # Both directions at once are never slower than one, within noise.
    assert made.duplex() > 0.8 * max(made.h2d(), made.d2h())
    assert made.host_copy() > 1e9
    # The buffers are gone; cuBLAS keeps a workspace.
    assert torch.cuda.memory_allocated() < 256 << 20
