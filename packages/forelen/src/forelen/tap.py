"""Listening to ``model.generate`` from outside: states of the prompt, then of each new token."""

from __future__ import annotations

import copy
import functools
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Generator

    from torch import nn

    from forelen.reading import ModelReader


class UnsupportedGenerationError(ValueError):
    """A way of generating whose steps are not those of one answer per row."""


class Listener(Protocol):
    """What hears of a call of ``generate``."""

    def begin(self, options: dict[str, Any]) -> None:
        """A call begins, with these keyword arguments."""

    def prompt(
        self,
        states: dict[int, Tensor],
        ids: Tensor | None,
        attention: Tensor,
        siblings: int,
        logits: Tensor,
    ) -> None:
        """The prompts were read.

        Args:
            states: Of each layer, ``(B, T, d)``.
            ids: int64 ``(B, T)``; None if embeddings were given.
            attention: bool ``(B, T)``.
            siblings: Rows that follow one another have one prompt, so many.
            logits: ``(B, V)``, of the first token.
        """

    def token(self, ids: Tensor, states: dict[int, Tensor], logits: Tensor) -> None:
        """A token ``(B,)`` of each row was read; its states ``(B, d)``, its successor's logits."""

    def end(self, sequences: Tensor) -> None:
        """The call returned these tokens ``(B, ...)``."""


@contextmanager
def tapped(reader: ModelReader, listener: Listener) -> Generator[None]:
    """Within this, the listener hears of every call of the model's ``generate``.

    Tokens come out as without it: passes are observed, not changed. Hooks are Python functions, so
    what does not call them is refused: compiled steps and recorded graphs.

    Raises:
        UnsupportedGenerationError: When ``generate`` is called in a way that cannot be followed, or
            the model is listened to already.
    """
    model = reader.model
    if "generate" in vars(model):
        raise UnsupportedGenerationError(
            "model: its generate is replaced already; leave the other context first"
        )
    tap = _Tap(reader, listener)
    inner = tap.inner = model.generate

    @functools.wraps(inner)
    def generate(*args: Any, **options: Any) -> Any:
        return tap.generate(*args, **options)

    model.generate = generate
    try:
        yield
    finally:
        del model.generate


class _Tap:
    """One model's generate, listened to."""

    def __init__(self, reader: ModelReader, listener: Listener) -> None:
        self.reader, self.listener = reader, listener
        self.inner: Any = None
        self.mask: Tensor | None = None
        self.length = self.seen = self.siblings = 0
        self.pieces: list[dict[int, Tensor]] = []
        self.ids: list[Tensor] = []

    def generate(self, *args: Any, **options: Any) -> Any:
        """Generate, and tell the listener."""
        if args:
            names = ("inputs", "generation_config", "logits_processor", "stopping_criteria")
            options = dict(zip(names, args, strict=False)) | options
        check_generation(self.reader.model, options)
        prompt = options.get("input_ids")
        prompt = options.get("inputs") if prompt is None else prompt
        if options.get("inputs_embeds") is not None:
            prompt = options["inputs_embeds"]
        if prompt is None:
            raise UnsupportedGenerationError(
                "generate: expected input_ids or inputs_embeds, got neither; pass a prompt"
            )
        self.length, self.seen = prompt.shape[1], 0
        self.siblings = int(_setting(self.reader.model, options, "num_return_sequences") or 1)
        self.mask = options.get("attention_mask")
        self.pieces, self.ids = [], []
        self.listener.begin(options)
        with self.reader.hooked():
            handle = self.reader.model.register_forward_hook(self._after, with_kwargs=True)
            try:
                output = self.inner(**options)
            finally:
                handle.remove()
                self.pieces, self.ids, self.mask = [], [], None
        self.listener.end(getattr(output, "sequences", output))
        return output

    @torch.no_grad()
    def _after(self, module: nn.Module, args: Any, options: Any, output: Any) -> None:
        states = dict(self.reader.states)
        ids = options.get("input_ids")
        logits = output.logits[:, -1]
        if self.seen >= self.length:
            self.seen += 1
            self.listener.token(ids[:, -1], {k: h[:, -1] for k, h in states.items()}, logits)
            return
        # a long prompt may come in pieces
        self.pieces.append(states)
        if ids is not None:
            self.ids.append(ids)
        self.seen += states[-1].shape[1]
        if self.seen < self.length:
            return
        whole = {k: torch.cat([piece[k] for piece in self.pieces], 1) for k in states}
        rows = whole[-1].shape[0]
        tokens = torch.cat(self.ids, 1) if self.ids else None
        mask = self.mask
        if mask is None:
            given = options.get("attention_mask")
            usable = isinstance(given, Tensor) and given.dim() == 2
            mask = given[:, : self.length] if usable else None
        if mask is None:
            mask = torch.ones(rows, self.length, device=logits.device)
        if len(mask) != rows:
            mask = mask.repeat_interleave(rows // len(mask), 0)
        self.pieces, self.ids = [], []
        self.listener.prompt(whole, tokens, mask.bool().to(logits.device), self.siblings, logits)


def _setting(model: Any, options: dict[str, Any], name: str) -> Any:
    """Return an option of ``generate``, whoever sets it."""
    if name in options:
        return options[name]
    config = options.get("generation_config") or model.generation_config
    return getattr(config, name, None)


def check_generation(model: Any, options: dict[str, Any]) -> None:
    """Refuse a call of ``generate`` that cannot be followed.

    Raises:
        UnsupportedGenerationError: Beams, a draft model, a prompt that is partly in the cache
            already, or steps that are compiled.
    """
    from transformers.generation.configuration_utils import GenerationMode

    config = copy.deepcopy(options.get("generation_config") or model.generation_config)
    config.update(**{k: v for k, v in options.items() if hasattr(config, k)})
    mode = config.get_generation_mode(options.get("assistant_model"))
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise UnsupportedGenerationError(
            f"generate: expected greedy search or sampling, got {mode.value}; its rows are not one "
            "answer each that grows by a token a step; leave the context, or generate otherwise"
        )
    past = options.get("past_key_values")
    if past is not None and getattr(past, "get_seq_length", lambda: 0)():
        raise UnsupportedGenerationError(
            f"past_key_values: {past.get_seq_length()} tokens of the prompt are in the cache, and "
            "their states are not computed again; pass the whole prompt without it"
        )
    kind = _setting(model, options, "cache_implementation")
    if kind == "paged":
        raise UnsupportedGenerationError(
            "cache_implementation: a paged cache packs rows; use generate_batch with "
            "forelen.schedule.transformers_cb"
        )
    static = kind is not None and kind not in ("dynamic", "dynamic_full", "offloaded", "quantized")
    compiled = static or getattr(past, "is_compileable", False)
    on_gpu = next(model.parameters()).device.type == "cuda"
    if compiled and on_gpu and not _setting(model, options, "disable_compile"):
        raise UnsupportedGenerationError(
            f"cache_implementation: {kind or type(past).__name__} compiles the steps, and compiled "
            "code calls no hooks; pass disable_compile=True"
        )
