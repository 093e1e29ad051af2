"""A language model whose answers' lengths follow a known law: what can be predicted is computed.

Each prompt holds one class token among filler; the class decides the law of the answer's length,
through the probability that the next token ends it. States tell the class and the age of an answer,
rotated and with noise, so that nothing can be read off a single dimension.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

EOS, PAD, START = 0, 1, 2
"""End of an answer, padding, and the token between prompt and answer."""


class ControlConfig(PreTrainedConfig):
    """Classes and their laws.

    Args:
        means: Mean length of each class.
        shape: Of the negative binomial: 1 is geometric, larger is narrower.
        longest: No answer is longer.
        fillers: Tokens that mean nothing.
        hidden_size: d; above ``2 * 8``.
        noise: Deviation of the noise in a state, whose class code has length 1.
        seed: Of the rotation, the codes and the noise.
    """

    model_type = "forelen-control"

    def __init__(
        self,
        means: tuple[float, ...] = (8, 16, 32, 64, 128, 256),
        shape: float = 4.0,
        longest: int = 1024,
        fillers: int = 40,
        hidden_size: int = 64,
        noise: float = 0.1,
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.means, self.shape, self.longest = tuple(means), shape, longest
        self.fillers, self.hidden_size, self.noise, self.seed = fillers, hidden_size, noise, seed
        self.vocab_size = 3 + len(self.means) + fillers
        self.num_hidden_layers = 1
        ids: dict[str, Any] = {"eos_token_id": EOS, "pad_token_id": PAD, "use_cache": False}
        super().__init__(**(ids | options))


class _States(nn.Module):
    """From tokens to states."""

    rotation: Tensor
    codes: Tensor
    hazards: Tensor

    def __init__(self, config: ControlConfig) -> None:
        super().__init__()
        self.config = config
        generator = torch.Generator().manual_seed(config.seed)
        width = config.hidden_size
        rotation, _ = torch.linalg.qr(torch.randn(width, width, generator=generator).double())
        codes = torch.randn(len(config.means) + 1, width - 8, generator=generator).double()
        codes = codes / codes.norm(dim=-1, keepdim=True)
        codes[0] = 0
        self.register_buffer("rotation", rotation, persistent=False)
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("hazards", hazards(config), persistent=False)
        self.embed = nn.Embedding(4096, width - 8)
        with torch.no_grad():
            self.embed.weight.copy_(torch.randn(4096, width - 8, generator=generator))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **ignored: Any
    ) -> BaseModelOutputWithPast:
        """Return states float32 ``(B, T, d)``."""
        config = self.config
        count = len(config.means)
        is_class = (input_ids >= 3) & (input_ids < 3 + count)
        kind = torch.where(is_class, input_ids - 2, 0).cummax(-1).values
        started = (input_ids == START).long().cumsum(-1)
        age = (started.cumsum(-1) - 1).clamp(min=0, max=config.longest - 1)
        # the start token cannot end an empty answer: an answer has at least one token
        hazard = torch.where(
            started > 0, self.hazards[(kind - 1).clamp(min=0), age], torch.zeros(()).double()
        )
        filler = (1 - hazard).clamp(min=1e-30).log() - math.log(config.fillers)
        x = torch.zeros(*input_ids.shape, config.hidden_size).double().to(input_ids.device)
        x[..., 0] = hazard.clamp(min=1e-30).log()
        x[..., 1] = filler
        # what is said of a class stands out: elsewhere in a prompt the next token is almost sure
        x[..., 2] = torch.where((started > 0) | is_class, 0.0, 12.0)
        x[..., 3] = -60.0
        x[..., 4] = torch.log1p(age.double())
        # of all that has been read, so that equal tokens differ
        place = input_ids.cumsum(-1) * 131 + torch.arange(input_ids.shape[1], device=x.device)
        place = place % 4096
        x[..., 8:] = self.codes[kind] + config.noise * self.embed(place).double()
        return BaseModelOutputWithPast(last_hidden_state=(x @ self.rotation.T).float())


class ControlLM(PreTrainedModel, GenerationMixin):
    """A model that answers in filler for as long as its law says."""

    config_class = ControlConfig
    config: ControlConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"

    def __init__(self, config: ControlConfig | None = None) -> None:
        config = config or ControlConfig()
        super().__init__(config)
        self.model = _States(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        pick = torch.zeros(config.vocab_size, config.hidden_size).double()
        pick[EOS, 0] = 1
        pick[1 : 3 + len(config.means), 3] = 1
        pick[3 + len(config.means) :, 1] = 1
        pick[3 + len(config.means), 2] = 1
        with torch.no_grad():
            self.lm_head.weight.copy_((pick @ self.model.rotation.T).float())
        self.generation_config = GenerationConfig(
            do_sample=True, eos_token_id=EOS, pad_token_id=PAD, use_cache=False,
            max_new_tokens=config.longest, top_k=0,
        )  # fmt: skip

    def _init_weights(self, module: nn.Module) -> None:
        """Weights are made in the constructor."""

    def get_input_embeddings(self) -> nn.Module:
        """Return what adds noise."""
        return self.model.embed

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.lm_head

    def prepare_inputs_for_generation(  # ty: ignore[incompatible-method-override]
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Pass all tokens at every step."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        logits_to_keep: int = 0,
        **ignored: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits float32 ``(B, T, V)``."""
        states = self.model(input_ids=input_ids).last_hidden_state
        return CausalLMOutputWithPast(logits=self.lm_head(states[:, -logits_to_keep:]))

    def prompts(self, count: int, *, length: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Return prompts int64 ``(count, length)`` and the class of each, int64 ``(count,)``."""
        generator = torch.Generator().manual_seed(seed)
        kinds = len(self.config.means)
        low = 3 + kinds
        ids = torch.randint(low, self.config.vocab_size, (count, length), generator=generator)
        classes = torch.randint(kinds, (count,), generator=generator)
        places = torch.randint(length - 1, (count,), generator=generator)
        ids[torch.arange(count), places] = classes + 3
        ids[:, -1] = START
        return ids, classes

    def law(self, age: int = 0) -> Tensor:
        """Return ``P(L - age = r | L > age)`` of each class, r = 1, 2, ..., float64 ``(C, X)``."""
        pmf = lengths_law(self.config)[:, age:]
        return pmf / pmf.sum(-1, keepdim=True)

    def bayes_error(self, age: int = 0) -> Tensor:
        """Return the least mean absolute error of each class, which its median has: ``(C,)``."""
        pmf = self.law(age)
        x = torch.arange(1, pmf.shape[1] + 1).double()
        median = (pmf.cumsum(-1) < 0.5).sum(-1) + 1.0
        return (pmf * (x - median[:, None]).abs()).sum(-1)


def lengths_law(config: ControlConfig) -> Tensor:
    """Return ``P(L = x)`` for x = 1 .. longest, float64 ``(C, longest)``: 1 + negative binomial."""
    from scipy.stats import nbinom

    x = np.arange(config.longest)
    rows = []
    for mean in config.means:
        pmf = nbinom.pmf(x, config.shape, config.shape / (config.shape + mean - 1))
        rows.append(pmf / pmf.sum())
    return torch.tensor(np.array(rows))


def hazards(config: ControlConfig) -> Tensor:
    """Return ``P(L = t + 1 | L > t)`` for t = 0 .. longest - 1, float64 ``(C, longest)``."""
    pmf = lengths_law(config)
    left = pmf.flip(-1).cumsum(-1).flip(-1)
    found = (pmf / left.clamp(min=1e-300)).clamp(0, 1)
    found[:, -1] = 1.0
    return found
