"""The noise step on a GPU: what the interpreter cannot show."""

import math
from typing import Any

import pytest
import torch
from shared_kernels import _autotune
from shared_kernels.ops.dp import gaussian_step
from shared_kernels.ops.dp.noise.op import CONFIGS
from shared_kernels.random.chacha import chacha20_words, key_from_seed
from torch import Tensor

pytestmark = pytest.mark.gpu

F32, F64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
KEY = key_from_seed(7)
OPTIONS = {
    "key": KEY,
    "step": (5 << 32) + 9,
    "uid": 0xFEDCBA98,
    "domain": 200,
    "std": 0.37,
    "divisor": 256.5,
}


def totals(n: int, dtype: torch.dtype = F32) -> Tensor:
    total = torch.randn(n, dtype=dtype, generator=torch.Generator().manual_seed(0))
    total[:4] = torch.tensor([math.inf, math.nan, -0.0, 3e38])
    return total


def run(total: Tensor, dtype: torch.dtype, device: str, **options: Any) -> Tensor:
    out = torch.full(total.shape, math.nan, dtype=dtype, device=device)
    gaussian_step(total.to(device), out, **{**OPTIONS, **options})
    return out.cpu()


def assert_same(actual: Tensor, expected: Tensor) -> None:
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.element_size()]
    same = (actual.view(integer) == expected.view(integer)) | (actual.isnan() & expected.isnan())
    assert bool(same.all()), f"{int((~same).sum())} of {same.numel()} differ"


@pytest.mark.parametrize("dtype", [F32, BF16, FP16, F64])
@pytest.mark.parametrize("source", [F32, F64])
@pytest.mark.parametrize("start", [0, 4093, (1 << 31) - 5, (1 << 35) - 70_000, (1 << 51) - 200_003])
@pytest.mark.parametrize("std", [0.37, 0])
def test_gpu_is_the_cpu_bit_for_bit(cuda, source, dtype, start, std):
    total = totals(200_003, source)
    got = run(total, dtype, cuda, start=start, std=std)
    assert_same(got, run(total, dtype, "cpu", start=start, std=std))
    assert_same(run(total, dtype, cuda, start=start, std=std), got)


def test_gpu_is_the_cpu_on_many_draws(cuda):
    total = torch.zeros(1 << 24, dtype=F64)
    assert_same(run(total, F64, cuda), run(total, F64, "cpu"))


def test_reference_on_the_gpu_is_the_cpu(cuda):
    total = totals(20_000)
    for std in (0.37, 0):
        got = run(total, F32, cuda, std=std, impl="reference")
        assert_same(got, run(total, F32, "cpu", std=std, impl="reference"))


def test_words_on_the_gpu_are_the_cpu(cuda):
    stream = {"key": KEY, "nonce": (1, 0xFFFFFFFF, 3), "counter": (1 << 32) - 100_001}
    got = chacha20_words(100_001, device=cuda, **stream)
    assert torch.equal(got.cpu(), chacha20_words(100_001, **stream))


@pytest.mark.parametrize("config", range(len(CONFIGS)))
def test_every_configuration_gives_the_same_bits(cuda, monkeypatch, config):
    monkeypatch.setattr("shared_kernels.ops.dp.noise.op.CONFIGS", (CONFIGS[config],))
    total = totals(100_003)
    assert_same(run(total, BF16, cuda, start=7), run(total, BF16, "cpu", start=7))


def test_in_place(cuda):
    total = totals(100_003)
    expected = run(total, F32, "cpu", start=7)
    on_gpu = total.to(cuda)
    gaussian_step(on_gpu, on_gpu, start=7, **OPTIONS)
    assert_same(on_gpu.cpu(), expected)


def test_tuning_does_not_add_noise_twice(cuda, monkeypatch):
    monkeypatch.setenv("SHARED_KERNELS_AUTOTUNE", "full")
    monkeypatch.setattr(_autotune, "_measured", {})
    total = totals(100_003)
    expected = run(total, F32, "cpu")
    on_gpu = total.to(cuda)
    gaussian_step(on_gpu, on_gpu, **OPTIONS)
    assert len(_autotune._measured) == 1
    assert_same(on_gpu.cpu(), expected)


def test_a_call_does_not_wait_for_the_device(cuda):
    total = totals(100_003).to(cuda)
    out = torch.empty_like(total)
    gaussian_step(total, out, **OPTIONS)
    try:
        torch.cuda.set_sync_debug_mode("error")
        gaussian_step(total, out, **{**OPTIONS, "step": 1})
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_key_on_the_gpu_is_refused(cuda):
    total = totals(10).to(cuda)
    with pytest.raises(ValueError, match="key: expected device cpu"):
        gaussian_step(total, total, **{**OPTIONS, "key": KEY.to(cuda)})


@pytest.mark.slow
def test_more_than_two_to_the_31_elements(cuda):
    n, start, tail = (1 << 31) + 5003, 1000, 10_007
    total = torch.zeros(n, device=cuda)
    gaussian_step(total, total, start=start, **OPTIONS)
    for low in (0, (1 << 31) - 4000, n - tail):
        part = total[low : low + tail].cpu()
        expected = torch.zeros_like(part)
        gaussian_step(expected, expected, start=start + low, impl="reference", **OPTIONS)
        assert_same(part, expected)
