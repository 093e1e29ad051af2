"""Small measurements of this machine: what ``zo2 bench`` prints.

They answer "what can I expect here"; the package's published numbers come from ``benchmarks/``.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["pcie", "rng", "step"]


def rng(*, elements: int = 1 << 24, device: str | None = None, repeats: int = 5) -> dict[str, Any]:
    """Measure noise: draws per second of both distributions, beside ``torch.randn``.

    Args:
        elements: Draws in one call.
        device: Default: CUDA if there.
        repeats: Calls; the median counts.
    """
    from shared_kernels.random import noise

    on = _device(device)
    if elements < 1 or repeats < 1:
        raise ValueError(f"expected elements and repeats of at least 1, got {elements}, {repeats}")
    arms: dict[str, Callable[[], Any]] = {
        dist: lambda dist=dist: noise(elements, seed=1, uid=1, dist=dist, device=on)
        for dist in ("gaussian", "rademacher")
    }
    arms["torch.randn"] = lambda: torch.randn(elements, device=on)
    rates = {name: elements / _median(call, on, repeats) for name, call in arms.items()}
    return {"device": str(on), "elements": elements, "draws_per_second": rates}


def pcie(*, device: str | None = None) -> dict[str, Any]:
    """Measure the rates a step is bound by: transfers, copies on the device, matrix products.

    Args:
        device: Default: CUDA if there.
    """
    from shared_kernels.offload import measure_bandwidth

    on = _device(device)
    return {"device": str(on), **measure_bandwidth(on).to_dict()}


def step(
    model: str,
    *,
    tokens: int,
    gpu: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    repeats: int = 5,
) -> dict[str, Any]:
    """Time steps of a model with random weights, streamed and resident.

    Args:
        model: Folder or name of a model; only its config is read.
        tokens: Tokens of the batch, one sequence.
        gpu: GPU budget of the streamed arm; default: stream every block.
        dtype: Compute dtype; "auto" takes the config's.
        device: Default: CUDA if there.
        repeats: Steps after a first one; the median counts.

    Raises:
        ValueError: No tokens or no repeats.
    """
    import transformers

    from zo2 import OffloadConfig, ZOConfig, prepare

    on = _device(device)
    if tokens < 2 or repeats < 1:
        raise ValueError(
            f"expected at least 2 tokens and 1 repeat, got tokens={tokens}, repeats={repeats}"
        )
    config = transformers.AutoConfig.from_pretrained(model)
    kind = (config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype)
    ids = torch.randint(config.get_text_config().vocab_size, (1, tokens))
    found: dict[str, Any] = {"device": str(on), "model": model, "tokens": tokens}
    for name, offload in (("streamed", OffloadConfig(gpu=gpu)), ("resident", None)):
        made = transformers.AutoModelForCausalLM.from_config(config, dtype=kind).eval()
        with prepare(made, ZOConfig(), offload, device=on) as engine:
            run = lambda: engine.step({"input_ids": ids, "labels": ids}, lr=0.0)  # noqa: E731
            found[name] = {
                "seconds_per_step": _median(run, on, repeats),
                "blocks_streamed": engine.stats()["blocks_streamed"],
            }
        del made
    return found


def _device(device: str | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _median(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    def seconds() -> float:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    seconds()
    return statistics.median(seconds() for _ in range(repeats))
