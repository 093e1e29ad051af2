"""Every implementation of the noise against the definition, and the public function's contract."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_kernels._library import force_impl
from shared_kernels.errors import KernelUnavailableError
from shared_kernels.random import noise
from shared_kernels.random.op import noise_
from shared_kernels.testing import (
    TOLERANCES,
    assert_same_bits,
    assert_within,
    check_op,
)

DISTS = ["gaussian", "rademacher"]
STREAM = {"seed": 0xFEDCBA9876543210, "uid": 0x89ABCDEF, "direction": 0xABCDEF}


@pytest.mark.parametrize("dist", DISTS)
def test_numba_is_the_reference_on_a_million_elements(dist):
    n = (1 << 20) + 4099
    got = noise(n, dist=dist, start=4093, impl="numba", **STREAM)
    assert_same_bits(got, noise(n, dist=dist, start=4093, impl="reference", **STREAM))


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize(
    ("start", "numel"),
    [(0, 0), (0, 1), (1, 4094), (4095, 2), (4096, 4096), (4097, 8191), (1 << 40, 5000), (7, 97)],
)
def test_numba_slices(dist, start, numel):
    got = noise(numel, dist=dist, start=start, impl="numba", **STREAM)
    assert_same_bits(got, noise(numel, dist=dist, start=start, impl="reference", **STREAM))


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 30_000), st.integers(0, 30_000), st.sampled_from(DISTS))
def test_a_slice_is_part_of_the_whole(a, b, dist):
    a, b = sorted((a, b))
    whole = noise(30_000, dist=dist, **STREAM)
    assert_same_bits(noise(b - a, dist=dist, start=a, **STREAM), whole[a:b])


@pytest.mark.parametrize("dist", DISTS)
def test_threads_do_not_change_the_stream(dist):
    one = noise(300_001, dist=dist, start=5, **STREAM)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        assert_same_bits(noise(300_001, dist=dist, start=5, **STREAM), one)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize(("start", "numel"), [(0, 4096), (4093, 4200), (4096 << 31, 1), (5, 4091)])
def test_triton_is_the_reference(kernel_device, dist, start, numel):
    got = noise(numel, dist=dist, start=start, device=kernel_device, impl="triton", **STREAM)
    expected = noise(numel, dist=dist, start=start, impl="reference", **STREAM)
    name = f"random.{dist}"
    if kernel_device == "cpu":
        name = {"random.gaussian": "random.gaussian/interpreter"}.get(name, name)
    assert_within(got.cpu(), expected, TOLERANCES[name])


@pytest.mark.gpu
@pytest.mark.parametrize("dist", DISTS)
def test_gpu_is_the_cpu_bit_for_bit(cuda, dist):
    n = (1 << 22) + 17
    got = noise(n, dist=dist, start=3, device=cuda, **STREAM)
    assert got.device.type == "cuda"
    assert_same_bits(got.cpu(), noise(n, dist=dist, start=3, **STREAM))
    assert_same_bits(noise(n, dist=dist, start=3, device=cuda, **STREAM), got)


@pytest.mark.gpu
@pytest.mark.parametrize("dist", DISTS)
def test_reference_on_the_gpu_is_the_cpu(cuda, dist):
    got = noise(20_000, dist=dist, device=cuda, impl="reference", **STREAM)
    assert_same_bits(got.cpu(), noise(20_000, dist=dist, impl="reference", **STREAM))


@pytest.mark.parametrize("impl", ["reference", "numba"])
def test_op_checklist(impl):
    def make_args(numel):
        return torch.zeros(numel), -5, 7, 0, "gaussian", 4000, impl

    check_op(noise_, make_args, sizes=[4099, 0, 1, 4095, 4097])


def test_the_stream_depends_on_every_argument():
    base = noise(64, **STREAM)
    for change in ({"seed": 1}, {"uid": 1}, {"direction": 1}, {"start": 1}):
        assert not torch.equal(noise(64, **{**STREAM, **change}), base)


def test_seed_is_taken_modulo_two_to_the_64():
    a = noise(64, seed=-1, uid=1)
    assert_same_bits(noise(64, seed=(1 << 64) - 1, uid=1), a)


def test_forced_implementation():
    with force_impl("reference"):
        a = noise(5000, **STREAM)
    assert_same_bits(a, noise(5000, impl="numba", **STREAM))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"numel": -1}, r"numel: expected an integer in \[0, .*got int -1"),
        ({"start": -4}, "start: expected an integer"),
        ({"uid": 1 << 32}, "uid: expected .*use param_uid"),
        ({"direction": 1 << 24}, "direction: expected an integer"),
        ({"dist": "normal"}, "dist: expected one of gaussian, rademacher, got str 'normal'"),
        ({"impl": "cuda"}, "impl: expected one of auto"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"numel": 4, **STREAM, **change}
    with pytest.raises(ValueError, match=message):
        noise(arguments.pop("numel"), **arguments)


def test_non_integer_numel():
    with pytest.raises(TypeError, match="numel: expected an integer, got float"):
        noise(4.0, **STREAM)


def test_an_implementation_that_cannot_run_here(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(KernelUnavailableError, match="triton needs CUDA tensors"):
        noise(4, impl="triton", **STREAM)
