"""Hidden states and entropies of prompts, without a tensor of logits or of all layers."""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels._checks import message
from shared_kernels.models import Head
from torch import Tensor, nn

from forelen.fingerprint import unwrapped
from forelen.pooling import FeatureSpec, pool

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

    from forelen.template import ChatSpan


class UnsupportedModelError(ValueError):
    """A model whose states or head cannot be read as the method needs them."""


class ModelReader:
    """Reads states of chosen layers off a causal language model while it runs.

    Args:
        model: A transformers decoder with a language-model head.
        layers: As `FeatureSpec.layer`; -1 is always read.

    Raises:
        UnsupportedModelError: No decoder with a head, or it has no such layer.
    """

    def __init__(self, model: Any, layers: Iterable[int] = ()) -> None:
        model = unwrapped(model)
        name = type(model).__name__
        if getattr(model, "_orig_mod", None) is not None:
            raise UnsupportedModelError(
                f"model: {name} is compiled, and hooks are not called in compiled code; pass the "
                "model that was compiled"
            )
        config = getattr(model, "config", None)
        if config is None or getattr(config, "is_encoder_decoder", False):
            raise UnsupportedModelError(
                f"model: expected a decoder of transformers, got {name}; states of a prompt and of "
                "its answer must come from one stack"
            )
        if getattr(model, "get_output_embeddings", lambda: None)() is None:
            raise UnsupportedModelError(
                f"model: {name} has no language-model head; load it by AutoModelForCausalLM"
            )
        self.model = model
        self.base = model.base_model
        self.head = Head.of(model)
        self.layers = tuple(sorted({-1, *layers}))
        self._sources = {layer: self._source(layer) for layer in self.layers}
        self.states: dict[int, Tensor] = {}

    def _source(self, layer: int) -> nn.Module:
        """Return the module whose output is the state of a layer."""
        if layer == -1:
            return self.base
        if layer == 0:
            return self.model.get_input_embeddings()
        count = self.model.config.get_text_config().num_hidden_layers
        stacks = [
            m for m in self.base.modules() if isinstance(m, nn.ModuleList) and len(m) == count
        ]
        if not 0 < layer < count or not stacks:
            raise UnsupportedModelError(
                f"layer: expected -1, or 0 to {count - 1} of {type(self.model).__name__}, got "
                f"{layer}; -1 is the last, after its norm"
            )
        return stacks[0][layer - 1]

    @contextmanager
    def hooked(self) -> Generator[dict[int, Tensor]]:
        """Within this, every forward pass puts its states ``(B, T, d)`` into the dictionary."""

        def keep(layer: int) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                found = getattr(output, "last_hidden_state", None)
                if found is None:
                    found = output[0] if isinstance(output, tuple) else output
                self.states[layer] = found.detach()

            return hook

        handles = [
            source.register_forward_hook(keep(layer)) for layer, source in self._sources.items()
        ]
        try:
            yield self.states
        finally:
            for handle in handles:
                handle.remove()
            self.states.clear()

    def check_head(self, hidden: Tensor, logits: Tensor) -> None:
        """Compare the head as it was read with logits ``(R, V)`` that the model made.

        Raises:
            UnsupportedModelError: They differ by more than rounding.
        """
        with torch.no_grad():
            ours = self.head.logits(hidden).float()
        ours, theirs = ours.to(logits.device), logits.detach().float()
        bound = 1e-3 if hidden.dtype == torch.float32 else 5e-2
        error = (ours - theirs).abs().nan_to_num().amax()
        if not bool(error <= bound * theirs.abs().nan_to_num().amax().clamp(min=1.0)):
            raise UnsupportedModelError(
                f"model: logits of {type(self.model).__name__} are not its head's of the last "
                f"states (they differ by {float(error):.3g}), so entropies cannot be computed"
            )

    def entropies(self, hidden: Tensor, keep: Tensor) -> Tensor:
        """Return the entropy of the next token, float32 ``(B, T)``; NaN outside ``keep``."""
        found = torch.full(keep.shape, float("nan"), dtype=torch.float32, device=hidden.device)
        found[keep] = self.head.entropy(hidden[keep])
        return found

    def features(
        self,
        states: dict[int, Tensor],
        specs: Iterable[FeatureSpec],
        attention: Tensor,
        content: Tensor | None,
    ) -> dict[str, Tensor]:
        """Pool states ``(B, T, d)`` of each layer as each spec says: float32 ``(B, parts d)``."""
        specs = list(specs)
        attention = attention.bool()
        whole = content is None or any(not s.content_only or s.entropy_shift for s in specs)
        entropy = None
        if any(spec.needs_entropy for spec in specs):
            keep = attention if whole or content is None else attention & content
            entropy = self.entropies(states[-1], keep)
        found = {}
        for spec in specs:
            keep = attention if content is None or not spec.content_only else content
            found[spec.key] = pool(states[spec.layer], spec, attention, keep, entropy)
        return found


def position_ids(attention: Tensor) -> Tensor:
    """Return the place of each token in its row, padding left out."""
    return (attention.long().cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
def read_prompts(
    reader: ModelReader,
    specs: Iterable[FeatureSpec],
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    span: ChatSpan | None = None,
) -> dict[str, Tensor]:
    """Run the prompts once, without head and without cache, and pool their states.

    Args:
        reader: Of the model; it must read the layers of ``specs``.
        specs: Which vectors.
        input_ids: int64 ``(B, T)``, padded on either side.
        attention_mask: ``(B, T)``, 0 at padding.
        span: The chat template's tokens.

    Returns:
        float32 ``(B, parts d)`` by the specs' keys.
    """
    states, attention = _run(reader, input_ids, attention_mask)
    content = None if span is None else span.mask(input_ids, attention)
    return reader.features(states, specs, attention, content)


def _run(
    reader: ModelReader, input_ids: Tensor, attention_mask: Tensor | None
) -> tuple[dict[int, Tensor], Tensor]:
    if input_ids.dim() != 2 or not input_ids.numel():
        raise ValueError(
            message("input_ids", "tokens (B, T), at least one", input_ids, "tokenise the prompts")
        )
    attention = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    options: dict[str, Any] = {}
    if "position_ids" in inspect.signature(reader.base.forward).parameters:
        options["position_ids"] = position_ids(attention)
    with reader.hooked() as states:
        reader.base(input_ids=input_ids, attention_mask=attention, use_cache=False, **options)
        return dict(states), attention.bool()


@torch.no_grad()
def token_entropy(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Return the entropy of what each token of a prompt predicts, without its logits.

    ``H_i = -sum_v p(v | x_1..x_i) log p(v | x_1..x_i)``.

    Args:
        model: A transformers decoder with a language-model head.
        input_ids: int64 ``(B, T)``.
        attention_mask: ``(B, T)``, 0 at padding, on either side.

    Returns:
        float32 ``(B, T)`` in nats; NaN at padding.

    Raises:
        UnsupportedModelError: No decoder with a head.
    """
    reader = ModelReader(model)
    states, attention = _run(reader, input_ids, attention_mask)
    return reader.entropies(states[-1], attention)
