"""How the states of a prompt become one vector."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from shared_kernels._checks import check_choice, check_range, check_tensor, message
from shared_kernels.ops.pool import segment_softmax_pool

if TYPE_CHECKING:
    from torch import Tensor

POOLINGS = ("entropy", "last", "mean", "max", "entropy+last")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class FeatureSpec:
    """Which vector of a prompt.

    Attributes:
        pooling: ``entropy`` weighs states by ``e^H`` (arXiv:2602.11812); ``last`` takes that of the
            last token, ``mean`` and ``max`` of each dimension; ``entropy+last`` is two vectors.
        layer: -1 for the last, after its norm; k for the output of block k, 0 for the embeddings.
        content_only: Leave out the tokens of the chat template. ``last`` takes the prompt's very
            last token all the same: it is the one that the answer follows.
        entropy_shift: 0 weighs a state by the entropy of what it predicts, 1 by the entropy of
            what predicted its token.
    """

    pooling: str = "entropy"
    layer: int = -1
    content_only: bool = True
    entropy_shift: int = 0

    def __post_init__(self) -> None:
        check_choice("pooling", self.pooling, POOLINGS)
        check_range("layer", self.layer, -1, 1 << 16, "-1 is the last")
        check_range("entropy_shift", self.entropy_shift, 0, 2, "0 or 1")

    @property
    def key(self) -> str:
        """The name its tensors are stored by."""
        parts = [self.pooling, str(self.layer), "content" if self.content_only else "all"]
        return ".".join([*parts, *(["shifted"] if self.entropy_shift else [])])

    @classmethod
    def from_key(cls, key: str) -> FeatureSpec:
        """Return the one that has this name.

        Raises:
            ValueError: No name of a vector.
        """
        if not re.fullmatch(r"[a-z+]+\.-?\d+\.(content|all)(\.shifted)?", key):
            remedy = "entropy.-1.content, or last.15.all, say"
            raise ValueError(message("features", "POOLING.LAYER.content or .all", key, remedy))
        pooling, layer, tokens, *shift = key.split(".")
        return cls(pooling, int(layer), tokens == "content", int(bool(shift)))

    @property
    def parts(self) -> int:
        """How many vectors it is."""
        return 2 if self.pooling == "entropy+last" else 1

    @property
    def needs_entropy(self) -> bool:
        """Whether a prompt's entropies are needed, which costs the head at every token."""
        return self.pooling.startswith("entropy")


def entropy_pool(
    hidden: Tensor,
    entropy: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    attention_mask: Tensor | None = None,
    content_mask: Tensor | None = None,
) -> Tensor:
    """Pool the hidden states of prompts: ``sum_i e^(H_i) h_i / sum_i e^(H_i)``.

    Tokens that are masked out are never read: their states may hold anything.

    Args:
        hidden: float ``(B, T, d)``, or ``(T, d)`` packed.
        entropy: float ``(B, T)``, or ``(T,)``, in nats.
        cu_seqlens: int64 ``(B + 1,)``, bounds of packed prompts.
        attention_mask: ``(B, T)``, 0 at padding.
        content_mask: As ``entropy``, 0 at tokens to leave out, such as a template's.

    Returns:
        ``(B, d)``, float32, or float64 for float64; zeros for a prompt without tokens.

    Raises:
        TypeError: A dtype that is not listed.
        ValueError: Shapes that do not fit together.
    """
    packed = cu_seqlens is not None
    shape = (None, None) if packed else (None, None, None)
    check_tensor("hidden", hidden, dtypes=_FLOATS, shape=shape, strided=True)
    check_tensor("entropy", entropy, dtypes=_FLOATS, shape=hidden.shape[:-1], strided=True)
    keep = torch.ones(hidden.shape[:-1], dtype=torch.bool, device=hidden.device)
    for name, mask in (("attention_mask", attention_mask), ("content_mask", content_mask)):
        if mask is not None:
            if mask.shape != keep.shape:
                remedy = "give one number for each token"
                raise ValueError(message(name, f"shape {tuple(keep.shape)}", mask, remedy))
            keep = keep & mask.bool()
    if cu_seqlens is None:
        cu_seqlens = even_bounds(keep)
    elif not len(cu_seqlens) or int(cu_seqlens[0]) or int(cu_seqlens[-1]) != len(hidden):
        remedy = "begin with 0 and end with the number of tokens"
        expected = f"bounds of {len(hidden)} tokens"
        raise ValueError(message("cu_seqlens", expected, cu_seqlens, remedy))
    flat = hidden.reshape(-1, hidden.shape[-1])
    score = entropy.reshape(-1).contiguous()
    return segment_softmax_pool(flat, score, cu_seqlens, keep.reshape(-1)).pooled()


def even_bounds(mask: Tensor) -> Tensor:
    """Return the bounds of the rows of ``(B, T)``, int64 ``(B + 1,)``."""
    rows, tokens = mask.shape
    return torch.arange(rows + 1, device=mask.device) * tokens


def pool(
    hidden: Tensor, spec: FeatureSpec, attention: Tensor, keep: Tensor, entropy: Tensor | None
) -> Tensor:
    """Pool states ``(B, T, d)`` of tokens ``keep (B, T)`` into float32 ``(B, parts d)``."""
    attention, keep = attention.bool(), keep.bool() & attention.bool()
    found = []
    if spec.needs_entropy:
        assert entropy is not None
        if spec.entropy_shift:
            # nothing predicted the first token
            first = attention & (attention.long().cumsum(-1) == 1)
            entropy, keep = entropy.roll(1, -1), keep & ~first
        found.append(entropy_pool(hidden, entropy, attention_mask=keep))
    if spec.pooling.endswith("last"):
        places = torch.arange(hidden.shape[1], device=hidden.device)
        last = torch.where(attention, places, -1).amax(-1).clamp(min=0)
        found.append(hidden[torch.arange(len(hidden), device=hidden.device), last].float())
    if spec.pooling == "mean":
        zeros = torch.zeros_like(keep, dtype=torch.float32)
        found.append(entropy_pool(hidden, zeros, attention_mask=keep))
    if spec.pooling == "max":
        lowest = torch.where(keep[..., None], hidden.float(), float("-inf")).amax(1)
        found.append(torch.where(keep.any(-1)[:, None], lowest, 0.0))
    return torch.cat(found, -1).float()
