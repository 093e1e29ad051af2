import subprocess

import pytest
import torch
from shared_kernels import diagnostics, offload, random
from shared_kernels.diagnostics import (
    check_cpu_kernels,
    check_gpu,
    check_host_memory,
    check_pinned_memory,
    check_torch,
    check_triton,
    run_checks,
)

GIB = 1 << 30


def test_an_error_inside_a_check_is_a_failed_check(monkeypatch):
    def broken():
        raise OSError("libcuda.so is a text file")

    for name in ("check_triton", "check_cpu_kernels", "check_pinned_memory"):
        monkeypatch.setattr(diagnostics, name, lambda: diagnostics.Check("x", "ok", ""))
    monkeypatch.setattr(diagnostics, "check_gpu", broken)
    failed = [check for check in run_checks() if check.status == "fail"]
    assert [check.name for check in failed] == ["GPU"]
    assert failed[0].detail == "OSError: libcuda.so is a text file"
    assert failed[0].remedy


@pytest.mark.parametrize(
    ("version", "status"),
    [("2.10.1", "fail"), ("2.11.0+cu130", "ok"), ("2.15.0", "ok"), ("3.0.0a1", "ok")],
)
def test_torch_versions(monkeypatch, version, status):
    monkeypatch.setattr(torch, "__version__", version)
    assert check_torch().status == status


def pretend_gpu(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)


@pytest.mark.parametrize(("capability", "status"), [((9, 0), "ok"), ((7, 5), "warn")])
def test_gpu(monkeypatch, capability, status):
    pretend_gpu(monkeypatch, capability)
    found = check_gpu()
    assert found.status == status
    assert found.detail.startswith("2 x A GPU")


@pytest.mark.parametrize(
    ("cuda", "status", "remedy"),
    [(None, "fail", "built without CUDA"), ("13.0", "fail", "CUDA_VISIBLE_DEVICES")],
)
def test_a_driver_without_a_visible_gpu_is_a_failure(monkeypatch, cuda, status, remedy):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(diagnostics.Path, "exists", lambda path: True)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    found = check_gpu()
    assert found.status == status
    assert remedy in found.remedy


def test_no_gpu_and_no_driver_is_only_a_warning(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(diagnostics.Path, "exists", lambda path: False)
    assert check_gpu().status == "warn"


def test_triton_that_cannot_be_imported_fails_with_its_message(tmp_path, monkeypatch):
    broken = tmp_path / "triton" / "__init__.py"
    broken.parent.mkdir()
    broken.write_text("raise ImportError('libtriton was built for another Python')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = check_triton()
    assert found.status == "fail"
    assert "libtriton was built for another Python" in found.detail
    assert found.remedy


def test_missing_triton_is_a_warning_on_the_cpu_and_a_failure_on_a_gpu(monkeypatch):
    monkeypatch.setattr(diagnostics.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check_triton().status == "warn"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert check_triton().status == "fail"


def test_triton_that_hangs_is_a_failure(monkeypatch):
    def hang(*args, timeout, **kwargs):
        raise subprocess.TimeoutExpired("triton", timeout)

    monkeypatch.setattr(diagnostics.subprocess, "run", hang)
    assert "no answer" in check_triton().detail


def test_wrong_cpu_kernels_are_found(monkeypatch):
    right = random.noise

    def wrong(*args, impl, **kwargs):
        drawn = right(*args, impl="reference", **kwargs)
        if impl == "numba":
            drawn[-1] = -drawn[-1]
        return drawn

    monkeypatch.setattr(random, "noise", wrong)
    found = check_cpu_kernels()
    assert found.status == "fail"
    assert "gaussian noise differs from the reference by" in found.detail


@pytest.mark.parametrize(("free", "status"), [(None, "ok"), (64 * GIB, "ok"), (8 * GIB, "warn")])
def test_host_memory(monkeypatch, free, status):
    limits = {"available": 16 * GIB, "cgroup_free": free}
    monkeypatch.setattr(diagnostics, "memory", lambda: limits)
    assert check_host_memory().status == status


def test_memory_that_cannot_be_locked_is_a_warning(monkeypatch):
    def refuse(size, pin):
        raise offload.HostMemoryError("the driver could not lock 1.00 GiB")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(offload, "HostBuffer", refuse)
    found = check_pinned_memory()
    assert (found.status, found.detail) == ("warn", "the driver could not lock 1.00 GiB")
    assert "ulimit -l" in found.remedy


@pytest.mark.gpu
def test_every_check_passes_on_a_gpu_machine(cuda):
    assert [check for check in run_checks() if check.status == "fail"] == []
