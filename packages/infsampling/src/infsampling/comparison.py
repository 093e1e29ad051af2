"""A group of completions by this package and by transformers, timed in turn."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

import torch

from infsampling.config import SamplingConfig
from infsampling.sampler import InfiniteSampler

if TYPE_CHECKING:
    from collections.abc import Callable


def compare(
    model: Any,
    tokenizer: Any,
    prompt: str,
    group: int,
    max_new: int,
    max_slots: int | None,
    rounds: int,
) -> dict[str, dict[str, Any]]:
    """Return seconds, tokens and tokens a second of each way, medians.

    A way that fails has its error under ``failed``, and zeros.
    """
    if getattr(tokenizer, "chat_template", None):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
    else:
        ids = tokenizer(prompt)["input_ids"]
    config = SamplingConfig(max_slots=max_slots or "auto", max_new_tokens=max_new)
    sampler = InfiniteSampler(model, config, processing_class=tokenizer)
    eos = sampler.eos_token_ids()
    steps = iter(range(1 << 30))

    def ours() -> int:
        return sampler.generate([ids], group, step=next(steps)).stats.new_tokens

    def generate() -> int:
        lines = torch.tensor([ids] * group, device=model.device)
        with torch.no_grad():
            found = model.generate(
                lines, attention_mask=torch.ones_like(lines), do_sample=True, temperature=1.0,
                top_k=0, top_p=1.0, max_new_tokens=max_new, eos_token_id=eos or None,
                pad_token_id=0,
            )[:, len(ids) :]  # fmt: skip
        ended = torch.isin(found, torch.tensor(eos or [-1], device=model.device)).int()
        return int((ended.cumsum(1) - ended == 0).sum())

    def batched() -> int:
        from transformers import GenerationConfig

        settings = GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max_new,
            eos_token_id=eos or -1, pad_token_id=0,
        )  # fmt: skip
        found = model.generate_batch(
            inputs=[list(ids)] * group, generation_config=settings, progress_bar=False
        )
        if len(found) < group:
            raise RuntimeError(f"{len(found)} of {group} results came back")
        return sum(len(output.generated_tokens) for output in found.values())

    ways: dict[str, Callable[[], int]] = {"infsampling": ours, "generate": generate}
    if model.device.type == "cuda":
        # on a CPU each call sets up for minutes
        ways["generate_batch"] = batched
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    tokens: dict[str, list[int]] = {name: [] for name in ways}
    failed: dict[str, str] = {}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            if name in failed:
                continue
            _wait(model)
            began = time.perf_counter()
            try:
                made = way()
            except Exception as error:
                # a peer that cannot run here takes nothing from the others
                if name == "infsampling":
                    raise
                failed[name] = f"{type(error).__name__}: {error}"[:200]
                continue
            _wait(model)
            if turn:
                seconds[name].append(time.perf_counter() - began)
                tokens[name].append(made)
    return {name: _summary(seconds[name], tokens[name], failed.get(name)) for name in ways}


def _summary(seconds: list[float], tokens: list[int], failed: str | None) -> dict[str, Any]:
    if failed is not None:
        return {"seconds": 0.0, "tokens": 0, "tokens_per_second": 0.0, "failed": failed}
    rates = [n / s for n, s in zip(tokens, seconds, strict=True)]
    return {
        "seconds": statistics.median(seconds),
        "tokens": statistics.median(tokens),
        "tokens_per_second": statistics.median(rates),
        "failed": None,
    }


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
