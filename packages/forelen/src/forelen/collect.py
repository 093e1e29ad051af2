"""From prompts to features and lengths: the training data of a predictor."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels._checks import check_range, message
from torch import Tensor

from forelen.fingerprint import digest, model_fingerprint, sampling_of, tokenizer_fingerprint
from forelen.pooling import FeatureSpec
from forelen.reading import ModelReader, read_prompts
from forelen.store import FeatureStore
from forelen.streaming import StepFeatures
from forelen.tap import tapped
from forelen.template import ChatSpan

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Sequence

#: Features of a growing answer are kept at powers of two up to this many tokens, and then at every
#: multiple of it.
STEP_STRIDE = 16
#: Copies to the host that may be under way.
_IN_FLIGHT = 8


@dataclass(frozen=True)
class Prompt:
    """Something to ask.

    Attributes:
        text: What the user says.
        family: The kind of task, to split by.
        scenario: The group that reports show apart.
    """

    text: str
    family: str = ""
    scenario: str = ""


class _Ring:
    """Tensors on their way to the host: at most a few at a time, the device never waited for."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Tensor, Any]] = []
        self.done: list[Tensor] = []

    def push(self, tensor: Tensor) -> None:
        """Send a tensor; it may be overwritten by work that is queued later."""
        if tensor.device.type != "cuda":
            self.done.append(tensor.clone())
            return
        if len(self.waiting) >= _IN_FLIGHT:
            self._settle()
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.waiting.append((host, event))

    def _settle(self) -> None:
        host, event = self.waiting.pop(0)
        event.synchronize()
        # pinned memory is scarce
        self.done.append(host.clone())

    def finish(self) -> list[Tensor]:
        """Wait for all, and return them in order."""
        while self.waiting:
            self._settle()
        return self.done


class _Recorder:
    """Hears of ``generate`` and keeps the features of some steps."""

    def __init__(self, reader: ModelReader, sampling: dict[str, Any], pad: int | None) -> None:
        self.reader = reader
        self.eos = list(sampling["eos_token_id"] or [])
        self.stops = [*self.eos, *([] if pad is None else [pad])]
        self.steps: StepFeatures | None = None
        self.times: list[int] = []
        self.ring, self.active = _Ring(), _Ring()

    def begin(self, options: dict[str, Any]) -> None:
        """Nothing yet."""

    def prompt(
        self,
        states: dict[int, Tensor],
        ids: Tensor | None,
        attention: Tensor,
        siblings: int,
        logits: Tensor,
    ) -> None:
        """Begin with no tokens."""
        width = states[-1].shape[-1]
        self.steps = StepFeatures(
            len(logits), width, eos=self.eos, stops=self.stops, device=logits.device
        )

    def token(self, ids: Tensor, states: dict[int, Tensor], logits: Tensor) -> None:
        """Keep this step, if it is one to keep."""
        assert self.steps is not None
        self.steps.update(ids, states[-1], logits)
        time = self.steps.time
        if time % STEP_STRIDE == 0 or (time < STEP_STRIDE and time & (time - 1) == 0):
            self.times.append(time)
            self.ring.push(self.steps.features.bfloat16())
            self.active.push(self.steps.active)

    def end(self, sequences: Tensor) -> None:
        """All is known."""

    def found(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return samples, times and features of the steps at which answers went on."""
        features, active = self.ring.finish(), self.active.finish()
        samples = [a.nonzero()[:, 0] for a in active]
        times = [torch.full_like(s, t) for s, t in zip(samples, self.times, strict=True)]
        kept = [f[s] for f, s in zip(features, samples, strict=True)]
        assert self.steps is not None
        width = self.steps.features.shape[1]
        none = torch.empty(0, dtype=torch.int64)
        return (
            torch.cat([none, *samples]),
            torch.cat([none, *times]),
            torch.cat([torch.empty(0, width, dtype=torch.bfloat16), *kept]),
        )


class FeatureCollector:
    """Asks a model prompts and keeps its states and the lengths of its answers.

    Answers that the cap on tokens stops are kept, marked as such. A collection that was stopped
    goes on where it was: each batch of prompts has a seed of its own.

    Args:
        model: A transformers decoder with a language-model head.
        tokenizer: Its tokenizer; with a chat template, prompts are the user's messages.
        store: The folder to write.
        num_samples: Answers to each prompt.
        features: Vectors of the prompt to keep.
        batch_size: Prompts at a time.
        seed: Of the sampling.
        max_prompt_tokens: Longer prompts are left out.
        steps: Keep features of growing answers.
        **generation: Options of ``generate``: ``max_new_tokens``, ``temperature``, ...

    Raises:
        ValueError: A cap on the tokens is missing, or an option is out of range.
        UnsupportedModelError: A model whose states cannot be read.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        store: FeatureStore | str | os.PathLike[str],
        *,
        num_samples: int = 8,
        features: Sequence[FeatureSpec] = (FeatureSpec(),),
        batch_size: int = 8,
        seed: int = 0,
        max_prompt_tokens: int = 1024,
        steps: bool = True,
        **generation: Any,
    ) -> None:
        check_range("num_samples", num_samples, 1, 1 << 16, "8 tell a floor well")
        check_range("batch_size", batch_size, 1, 1 << 16, "as many as fit")
        check_range("max_prompt_tokens", max_prompt_tokens, 1, 1 << 31, "those of the context")
        if not features:
            raise ValueError(message("features", "at least one", features, "the default is EGTP"))
        if not generation.get("max_new_tokens"):
            remedy = "512, say; an answer that never ends would never be collected"
            raise ValueError(message("max_new_tokens", "a cap on the tokens", None, remedy))
        self.model, self.tokenizer = model, tokenizer
        self.store = store if isinstance(store, FeatureStore) else FeatureStore(store)
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.features, self.max_prompt_tokens, self.steps = list(features), max_prompt_tokens, steps
        generation.setdefault("do_sample", num_samples > 1)
        self.generation = generation
        self.reader = ModelReader(model, [spec.layer for spec in features])
        self.span = ChatSpan.of(tokenizer)
        self.sampling = sampling_of(model, generation)

    def collect(
        self, prompts: Iterable[str | Prompt], *, progress: bool = True, limit: int | None = None
    ) -> FeatureStore:
        """Collect, or go on collecting.

        Args:
            prompts: What to ask; equal ones are asked once.
            progress: Show a progress bar.
            limit: Batches to collect now; by default all that are missing.

        Returns:
            The store.

        Raises:
            StoreError: The folder holds features of other prompts or settings.
            ValueError: No prompts.
        """
        from tqdm.auto import tqdm

        batches, header = self._plan(prompts)
        self.store.open(header)
        missing = [index for index in range(len(batches)) if not self.store.has(index)]
        bar = tqdm(missing[:limit], desc="collect", unit="batch", disable=not progress)
        was_training = self.model.training
        self.model.eval()
        try:
            for index in bar:
                tensors, metadata = self._batch(index, batches[index])
                self.store.write(index, tensors, metadata)
                bar.set_postfix(mean=f"{float(tensors['lengths'].float().mean()):.0f} tokens")
        finally:
            self.model.train(was_training)
        return self.store

    def _plan(
        self, prompts: Iterable[str | Prompt]
    ) -> tuple[list[list[tuple[Prompt, list[int], int]]], dict[str, Any]]:
        """Return prompts with their tokens and hashes in batches of like length, and the header."""
        seen: set[int] = set()
        found: list[tuple[Prompt, list[int], int]] = []
        for prompt in prompts:
            asked = Prompt(prompt) if isinstance(prompt, str) else prompt
            key = int.from_bytes(hashlib.sha256(asked.text.encode()).digest()[:8], "big") >> 1
            ids = encode(self.tokenizer, asked.text)
            if key not in seen and 0 < len(ids) <= self.max_prompt_tokens:
                seen.add(key)
                found.append((asked, ids, key))
        if not found:
            raise ValueError(
                message("prompts", "some that fit max_prompt_tokens", prompts, "raise the limit")
            )
        found.sort(key=lambda item: (len(item[1]), item[2]))
        size = self.batch_size
        batches = [found[low : low + size] for low in range(0, len(found), size)]
        # prompts that are alike in length but not in kind: any part of the batches is a fair sample
        order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(self.seed))
        header = {
            "model": model_fingerprint(self.model),
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "sampling": self.sampling,
            "span": {"before": list(self.span.before), "after": list(self.span.after)},
            "features": [spec.key for spec in self.features],
            "num_samples": self.num_samples,
            "batch_size": size,
            "seed": self.seed,
            "prompts": digest([key for _, _, key in found]),
            "batches": len(batches),
        }
        return [batches[place] for place in order.tolist()], header

    def _batch(
        self, index: int, batch: list[tuple[Prompt, list[int], int]]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        device = self.model.get_input_embeddings().weight.device
        rows = [ids for _, ids, _ in batch]
        longest = max(map(len, rows))
        config = self.model.generation_config
        pad = self.generation.get("pad_token_id", config.pad_token_id)
        if pad is None:
            pad = (self.sampling["eos_token_id"] or [0])[0]
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows], device=device)
        found = read_prompts(self.reader, self.features, ids, mask, self.span)
        recorder = _Recorder(self.reader, self.sampling, pad)
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.seed * 1_000_003 + index)
            options = {
                **self.generation, "num_return_sequences": self.num_samples, "pad_token_id": pad,
            }  # fmt: skip
            if self.steps:
                with tapped(self.reader, recorder):
                    out = self.model.generate(input_ids=ids, attention_mask=mask, **options)
            else:
                out = self.model.generate(input_ids=ids, attention_mask=mask, **options)
        answers = out[:, longest:].cpu()
        lengths, censored = count_tokens(answers, self.sampling["eos_token_id"] or [])
        none = torch.empty(0, dtype=torch.int64)
        width = self.model.config.get_text_config().hidden_size
        samples, times, steps = none, none, torch.empty(0, 2 * width + 4, dtype=torch.bfloat16)
        if self.steps and recorder.steps is not None:
            samples, times, steps = recorder.found()
        shape = (len(batch), self.num_samples)
        tensors = {
            **{f"prompts.{key}": value.cpu() for key, value in found.items()},
            "hashes": torch.tensor([key for _, _, key in batch]),
            "prompt_tokens": torch.tensor([len(row) for row in rows]),
            "lengths": lengths.view(shape),
            "censored": censored.view(shape),
            "step_sample": samples,
            "step_time": times,
            "steps": steps,
        }
        metadata = {
            "families": [prompt.family for prompt, _, _ in batch],
            "scenarios": [prompt.scenario for prompt, _, _ in batch],
        }
        return tensors, metadata


def count_tokens(answers: Tensor, eos: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the length of each answer ``(B, T)``, end token included, and which were stopped."""
    ends = torch.isin(answers, torch.tensor(list(eos), dtype=answers.dtype))
    total = answers.shape[1]
    places = torch.where(ends, torch.arange(1, total + 1), total + 1).amin(-1)
    return places.clamp(max=total), places > total


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a user's message, framed by the chat template if there is one."""
    if getattr(tokenizer, "chat_template", None) is None:
        return list(tokenizer(text)["input_ids"])
    chat = [{"role": "user", "content": text}]
    return list(
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
    )
