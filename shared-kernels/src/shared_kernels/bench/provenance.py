"""Where a result comes from: command, commit, versions, machine, date.

Nothing here names a user, a host or a folder of the machine, so that result files can be
published as they are.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import psutil

_DISTRIBUTIONS = ("torch", "triton", "transformers", "numpy", "numba", "safetensors", "accelerate")
_FLAGS = (
    "SHARED_KERNELS_STRICT",
    "SHARED_KERNELS_AUTOTUNE",
    "TRITON_INTERPRET",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_LAUNCH_BLOCKING",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "NVIDIA_TF32_OVERRIDE",
)


def describe_run(command: str, root: Path | None = None) -> dict[str, object]:
    """Describe this run.

    Args:
        command: What a reader types to repeat it.
        root: A folder of the checkout that the code comes from; the working folder by default.

    Returns:
        JSON values: ``command``, ``commit``, ``dirty``, ``date`` (UTC), ``versions``, ``flags``,
        ``cpu``, ``gpu`` (``None`` without one) and ``load_average``.
    """
    commit, dirty = commit_of(root or Path.cwd())
    return {
        "command": command,
        "commit": commit,
        "dirty": dirty,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "flags": flags(),
        "cpu": cpu(),
        "gpu": gpu(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def commit_of(folder: Path) -> tuple[str | None, bool | None]:
    """Return the commit checked out at ``folder`` and whether tracked files differ from it.

    ``TENFOLD_COMMIT`` speaks for a copy of a checkout, which has no repository or that of another
    commit: a hash, with ``-dirty`` behind it if the tree was changed. ``(None, None)`` if neither
    says anything.
    """
    if given := os.environ.get("TENFOLD_COMMIT", ""):
        return given.removesuffix("-dirty"), given.endswith("-dirty")
    head = _run("git", "-C", str(folder), "rev-parse", "HEAD")
    if not head:
        return None, None
    changes = _run("git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no")
    return head, bool(changes)


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of the libraries that decide speed and results."""
    from shared_kernels.versions import __version__

    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "shared-kernels": __version__,
    }
    for name in _DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def flags() -> dict[str, str]:
    """Return the environment variables that change what runs, as far as they are set."""
    return {name: os.environ[name] for name in _FLAGS if name in os.environ}


def cpu() -> dict[str, object]:
    """Return the CPU's model name, its cores, those this process may use, and torch's threads."""
    import torch

    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": model or platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": usable,
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.machine()}",
    }


def gpu() -> dict[str, object] | None:
    """Return the current GPU's name, memory, processors, driver, power limit and clocks."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    query = "driver_version,power.limit,clocks.max.sm,clocks.max.mem"
    answer = _run("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader") or ""
    fields = [field.strip() for field in answer.partition("\n")[0].split(",")]
    driver, power, sm_clock, memory_clock = fields if len(fields) == 4 else [None] * 4
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "driver": driver or _kernel_driver_version(),
        "power_limit": power,
        "max_sm_clock": sm_clock,
        "max_memory_clock": memory_clock,
    }


def command_line(module: str, arguments: list[str], root: Path) -> str:
    """Return the command to print in a result, with files given relative to the checkout."""
    shown = []
    for argument in arguments:
        path = Path(argument)
        inside = path.exists() and path.resolve().is_relative_to(root.resolve())
        shown.append(path.resolve().relative_to(root.resolve()).as_posix() if inside else argument)
    return " ".join(["python", "-m", module, *shown])


def checkout_root(file: Path) -> Path:
    """Return the top folder of the checkout that holds ``file``, or the file's own folder."""
    for folder in file.resolve().parents:
        if (folder / "uv.lock").is_file() or (folder / ".git").exists():
            return folder
    return file.resolve().parent


def _kernel_driver_version() -> str | None:
    path = Path("/proc/driver/nvidia/version")
    if not path.is_file():
        return None
    words = path.read_text(encoding="utf-8").partition("\n")[0].split()
    return next((word for word in words if word[0].isdigit() and "." in word), None)


def _run(*command: str) -> str | None:
    """Return the command's output, or ``None`` if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
