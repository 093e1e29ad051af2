"""Physical limits of this machine, measured in the same run as the arms they judge.

Rates are medians on random data, since zeros can run faster than real data does. A rate is measured
at its first use and kept for the run.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from shared_kernels.bench.arms import Arm

_DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
_REPEATS = 15
_CPU_COPY_BYTES = 256 << 20
_CUDA_COPY_BYTES = 2 << 30
_LINK_BYTES = 512 << 20


class Ceilings:
    """Bandwidths in bytes per second and matrix-product rates in FLOP/s of one device.

    Args:
        device: ``"cpu"`` or a CUDA device.
    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.on_gpu = self.device.type == "cuda"
        self._measured: dict[str, float] = {}

    def as_dict(self) -> dict[str, float]:
        """Return what was measured so far: ``{"device_copy": bytes/s, "gemm_bf16": FLOP/s, …}``."""
        return dict(self._measured)

    def device_copy(self) -> float:
        """Copy within the device's memory, counting bytes read plus bytes written."""
        return self._once("device_copy", lambda: self._copy(self.device))

    def host_copy(self) -> float:
        """Copy within host memory, counting bytes read plus bytes written."""
        if not self.on_gpu:
            return self.device_copy()
        return self._once("host_copy", lambda: self._copy(torch.device("cpu")))

    def gemm(self, dtype: str) -> float:
        """Rate of a large square matrix product with operands of ``dtype``."""
        if dtype not in _DTYPES:
            raise ValueError(f"expected a dtype of {sorted(_DTYPES)}; got {dtype!r}")
        return self._once(f"gemm_{dtype}", lambda: self._gemm(dtype))

    def h2d(self) -> float:
        """Copy from pinned host memory to the device."""
        return self._once("h2d", lambda: self._link(up=True, down=False))

    def d2h(self) -> float:
        """Copy from the device to pinned host memory."""
        return self._once("d2h", lambda: self._link(up=False, down=True))

    def duplex(self) -> float:
        """Both directions at once on two streams, counting the bytes of both."""
        return self._once("duplex", lambda: self._link(up=True, down=True))

    def limit(self, arm: Arm) -> tuple[float, str] | None:
        """Return the shortest time that ``arm`` can take here and what sets it.

        The terms overlap in the best case, so the limit is the largest of them, not their sum.

        Returns:
            Seconds and one of ``"memory"``, ``"compute"``, ``"h2d"``, ``"d2h"``, ``"duplex"``; or
            ``None`` when the arm counts nothing.
        """
        terms: dict[str, float] = {}
        if arm.bytes:
            terms["memory"] = arm.bytes / self.device_copy()
        if arm.flops:
            terms["compute"] = arm.flops / self.gemm(arm.flops_dtype)
        if arm.h2d_bytes:
            terms["h2d"] = arm.h2d_bytes / self.h2d()
        if arm.d2h_bytes:
            terms["d2h"] = arm.d2h_bytes / self.d2h()
        if arm.h2d_bytes and arm.d2h_bytes:
            # The shorter direction runs beside the longer one and only their common part is duplex.
            common = 2 * min(arm.h2d_bytes, arm.d2h_bytes)
            rest = arm.h2d_bytes + arm.d2h_bytes - common
            alone = self.h2d() if arm.h2d_bytes > arm.d2h_bytes else self.d2h()
            terms["duplex"] = common / self.duplex() + rest / alone
        if not terms:
            return None
        by = max(terms, key=lambda term: terms[term])
        return terms[by], by

    def _once(self, name: str, measure: Callable[[], float]) -> float:
        if name not in self._measured:
            self._measured[name] = measure()
            if self.on_gpu:
                torch.cuda.empty_cache()
        return self._measured[name]

    def _copy(self, device: torch.device) -> float:
        size = _CPU_COPY_BYTES
        if device.type == "cuda":
            size = min(_CUDA_COPY_BYTES, torch.cuda.mem_get_info(device)[0] // 8)
        source = torch.randn(size // 4, device=device)
        target = torch.randn(size // 4, device=device)
        seconds = _median_seconds(lambda: target.copy_(source), device)
        return 2 * source.nbytes / seconds

    def _gemm(self, dtype: str) -> float:
        n = 8192 if self.on_gpu else 1024
        if dtype == "fp64":
            n //= 2
        left = torch.randn(n, n, device=self.device).to(_DTYPES[dtype])
        right = torch.randn(n, n, device=self.device).to(_DTYPES[dtype])
        out = torch.empty_like(left)
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
        try:
            seconds = _median_seconds(lambda: torch.mm(left, right, out=out), self.device)
        finally:
            torch.set_float32_matmul_precision(precision)
        return 2 * n**3 / seconds

    def _link(self, *, up: bool, down: bool) -> float:
        if not self.on_gpu:
            raise ValueError(
                f"expected a CUDA device for the host-to-device rates; got {self.device}: "
                "leave h2d_bytes and d2h_bytes at 0 in arms that run on the CPU"
            )
        count = _LINK_BYTES // 4
        copies = []
        for wanted, upward in ((up, True), (down, False)):
            if wanted:
                host = torch.randn(count).pin_memory()
                device = torch.randn(count, device=self.device)
                target, source = (device, host) if upward else (host, device)
                copies.append((torch.cuda.Stream(self.device), target, source))

        def copy() -> None:
            current = torch.cuda.current_stream(self.device)
            for stream, target, source in copies:
                stream.wait_stream(current)
                with torch.cuda.stream(stream):
                    target.copy_(source, non_blocking=True)
            for stream, _, _ in copies:
                current.wait_stream(stream)

        return len(copies) * _LINK_BYTES / _median_seconds(copy, self.device)


def _median_seconds(fn: Callable[[], object], device: torch.device) -> float:
    """Median time of ``fn`` after three warm-up calls, by events on a GPU."""
    for _ in range(3):
        fn()
    if device.type != "cuda":
        times = []
        for _ in range(_REPEATS):
            start = time.perf_counter()
            fn()
            times.append(time.perf_counter() - start)
        return statistics.median(times)
    events = []
    for _ in range(_REPEATS):
        pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        pair[0].record()
        fn()
        pair[1].record()
        events.append(pair)
    torch.cuda.synchronize(device)
    return statistics.median(start.elapsed_time(end) * 1e-3 for start, end in events)
