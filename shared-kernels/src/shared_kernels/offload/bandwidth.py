"""Measure the rates that decide how a model should be streamed."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from shared_kernels.offload.memory import HostBuffer

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Bandwidth", "measure_bandwidth"]


@dataclass(frozen=True)
class Bandwidth:
    """Rates of one machine; bytes per second, FLOP per second, draws per second.

    Attributes:
        h2d: Host to device from locked memory.
        d2h: Device to host.
        duplex: Sum of both directions at once.
        d2d: Device copy, bytes read plus bytes written.
        gemm: Matrix products in the compute dtype.
        rng: Draws of noise.
    """

    h2d: float
    d2h: float
    duplex: float
    d2d: float
    gemm: float
    rng: float

    def to_dict(self) -> dict[str, float]:
        """As a JSON-ready dictionary."""
        return asdict(self)


def _rate(work: float, call: Callable[[], object], device: torch.device, repeats: int) -> float:
    def timed() -> float:
        if device.type != "cuda":
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    timed()
    return work / statistics.median(timed() for _ in range(repeats))


def measure_bandwidth(
    device: torch.device | str | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    dist: str = "gaussian",
    nbytes: int | None = None,
    repeats: int = 7,
) -> Bandwidth:
    """Measure copies, matrix products and draws of noise; about a second on a GPU.

    Args:
        device: Default: CUDA if there, else the CPU (where "host to device" is a memory copy).
        dtype: Dtype of the matrix products.
        dist: Distribution of the draws.
        nbytes: Size of the copies; default 512 MiB on CUDA, 64 MiB on a CPU.
        repeats: Timings per rate; the median counts.
    """
    from shared_kernels.random import noise

    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cuda = device.type == "cuda"
    nbytes = nbytes or (512 << 20 if cuda else 64 << 20)
    host, back = HostBuffer(nbytes), HostBuffer(nbytes)
    near = torch.ones(nbytes, dtype=torch.uint8, device=device)
    other = torch.empty_like(near)
    side = torch.cuda.Stream(device) if cuda else None

    def up() -> None:
        near.copy_(host.tensor, non_blocking=True)

    def down() -> None:
        back.tensor.copy_(other, non_blocking=True)

    def both() -> None:
        if side is None:
            up()
            down()
            return
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            down()
        up()
        torch.cuda.current_stream().wait_stream(side)

    size = 8192 if cuda else 512
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    draws = 1 << (28 if cuda else 20)
    result = Bandwidth(
        h2d=_rate(nbytes, up, device, repeats),
        d2h=_rate(nbytes, down, device, repeats),
        duplex=_rate(2 * nbytes, both, device, repeats),
        d2d=_rate(2 * nbytes, lambda: other.copy_(near), device, repeats),
        gemm=_rate(2.0 * size**3, lambda: left @ right, device, repeats),
        rng=_rate(
            draws, lambda: noise(draws, seed=1, uid=1, dist=dist, device=device), device, repeats
        ),
    )
    host.close()
    back.close()
    return result
