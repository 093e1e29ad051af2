"""What a bug report needs to know of this machine, and whether the kernels work on it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psutil

from shared_kernels.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

_PINNED_PROBE_BYTES = 1 << 30
_TRITON_PROBE = """
import torch
from shared_kernels.random import noise
device = "cuda" if torch.cuda.is_available() else "cpu"
for dist in ("rademacher", "gaussian"):
    arguments = dict(seed=7, uid=3, dist=dist, start=1000)
    ours = noise(9000, device=device, impl="triton", **arguments).cpu()
    reference = noise(9000, impl="reference", **arguments)
    # The interpreter rounds a fused multiply-add twice, so only the GPU is exact.
    tolerance = 1e-5 if device == "cpu" and dist == "gaussian" else 0.0
    torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance)
"""


@dataclass(frozen=True)
class Check:
    """Outcome of one check.

    Attributes:
        name: What was checked.
        status: ``"ok"``, ``"warn"`` (works, but slower or smaller than it could) or ``"fail"``.
        detail: What was found.
        remedy: What to do about it; empty when there is nothing to do.
    """

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    remedy: str = ""


def environment() -> dict[str, object]:
    """Return versions, flags, processors and memory limits as JSON values."""
    from shared_kernels.bench import provenance

    return {
        "versions": provenance.versions(),
        "flags": provenance.flags(),
        "cpu": provenance.cpu(),
        "gpu": provenance.gpu(),
        "memory": memory(),
    }


def memory() -> dict[str, int | None]:
    """Return the bytes of host memory: what there is and what this process may have.

    Returns:
        ``total`` and ``available`` of the machine; ``cgroup_free``, what this process's control
        group leaves; ``memlock``, how much it may lock. ``None`` means no limit.
    """
    from shared_kernels.offload import memory_limits

    return {"total": psutil.virtual_memory().total, **asdict(memory_limits())}


def run_checks() -> list[Check]:
    """Run every check; none of them raises."""
    checks: tuple[tuple[str, Callable[[], Check]], ...] = (
        ("torch", check_torch),
        ("GPU", check_gpu),
        ("triton kernels", check_triton),
        ("CPU kernels", check_cpu_kernels),
        ("pinned memory", check_pinned_memory),
        ("host memory", check_host_memory),
    )
    results = []
    for name, check in checks:
        try:
            results.append(check())
        except Exception as error:
            remedy = "report this, with the output of 'shared-kernels env'"
            results.append(Check(name, "fail", f"{type(error).__name__}: {error}", remedy))
    return results


def check_torch() -> Check:
    """Does torch import, in a version that is supported?"""
    import torch

    version = torch.__version__
    release = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    if release < (2, 11):
        return Check("torch", "fail", f"torch {version}", "pip install -U 'torch>=2.11'")
    return Check("torch", "ok", f"torch {version}")


def check_gpu() -> Check:
    """Does torch see the GPU that is in the machine?"""
    import torch

    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        count = torch.cuda.device_count()
        detail = f"{count} x {torch.cuda.get_device_name()}, capability {major}.{minor}"
        if (major, minor) < (8, 0):
            remedy = "the kernels are tested from capability 8.0 on; run the tests"
            return Check("GPU", "warn", detail, remedy)
        return Check("GPU", "ok", detail)
    if not Path("/proc/driver/nvidia/version").exists():
        return Check("GPU", "warn", "none: everything runs on the CPU")
    if torch.version.cuda is None:
        remedy = "this torch is built without CUDA: install a CUDA build of torch"
    else:
        remedy = (
            f"torch is built for CUDA {torch.version.cuda}: update the NVIDIA driver, or install a "
            "torch for an older CUDA; look at CUDA_VISIBLE_DEVICES"
        )
    return Check("GPU", "fail", "an NVIDIA driver is loaded but torch sees no GPU", remedy)


def check_triton() -> Check:
    """Does a Triton kernel compile, run and agree with the reference?

    Runs in a process of its own, so that a crash of the compiler or of the driver is a result: on
    the GPU if there is one, else in Triton's interpreter.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    if importlib.util.find_spec("triton") is None:
        remedy = "install triton (it comes with torch's Linux wheels)"
        return Check("triton kernels", "fail" if on_gpu else "warn", "not installed", remedy)
    env = {**os.environ, "TRITON_INTERPRET": "0" if on_gpu else "1"}
    where = "on the GPU" if on_gpu else "in Triton's interpreter"
    try:
        done = subprocess.run(
            [sys.executable, "-c", _TRITON_PROBE],
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    except subprocess.TimeoutExpired:
        remedy = "look for a C compiler (CC) and for a writable TRITON_CACHE_DIR"
        return Check("triton kernels", "fail", f"no answer {where} after 300 s", remedy)
    if done.returncode == 0:
        return Check("triton kernels", "ok", f"noise equals the reference {where}")
    last_line = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    remedy = (
        "Triton needs a C compiler (set CC) and a writable TRITON_CACHE_DIR; "
        "'shared-kernels env' shows whether its version fits torch's"
    )
    return Check("triton kernels", "fail", f"{where}: {last_line}", remedy)


def check_cpu_kernels() -> Check:
    """Do the compiled CPU kernels agree with the reference bit for bit?"""
    if importlib.util.find_spec("numba") is None:
        remedy = "pip install numba: the references that run instead are much slower"
        return Check("CPU kernels", "warn", "numba is not installed", remedy)
    import numba
    import torch

    from shared_kernels.random import noise

    for dist in ("gaussian", "rademacher"):
        ours, reference = (
            noise(9000, seed=7, uid=3, dist=dist, start=1000, impl=impl)
            for impl in ("numba", "reference")
        )
        if not torch.equal(ours, reference):
            worst = (ours - reference).abs().max().item()
            remedy = "report this: numba compiles the noise differently on this CPU"
            return Check(
                "CPU kernels", "fail", f"{dist} noise differs from the reference by {worst}", remedy
            )
    return Check("CPU kernels", "ok", f"noise equals the reference (numba {numba.__version__})")


def check_pinned_memory() -> Check:
    """Can host memory be locked for asynchronous copies?"""
    import torch

    from shared_kernels.offload import HostBuffer, HostMemoryError

    if not torch.cuda.is_available():
        return Check("pinned memory", "ok", "not needed without a GPU")
    size = min(_PINNED_PROBE_BYTES, psutil.virtual_memory().available // 4)
    try:
        HostBuffer(size, pin="register").close()
    except HostMemoryError as error:
        remedy = "raise 'ulimit -l' (docker: --ulimit memlock=-1); until then copies are staged"
        return Check("pinned memory", "warn", str(error), remedy)
    return Check("pinned memory", "ok", f"{format_bytes(size)} registered with the driver")


def check_host_memory() -> Check:
    """Does a control group leave less memory than the machine has available?"""
    found = memory()
    available, cgroup_free = found["available"] or 0, found["cgroup_free"]
    if cgroup_free is None or cgroup_free >= available:
        detail = f"{format_bytes(available)} available, no tighter cgroup"
        return Check("host memory", "ok", detail)
    return Check(
        "host memory",
        "warn",
        f"{format_bytes(available)} available, of which the cgroup leaves "
        f"{format_bytes(cgroup_free)}",
        "plan offloading by what the cgroup leaves, or raise it (docker: --memory)",
    )
