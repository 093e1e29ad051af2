"""What a patched run needs of a model: pure functions over the parameters of the live module."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels.models import Head

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class Adapter(abc.ABC):
    """Reads a decoder of transformers, one head at a time.

    States are ``(..., T, D)``: any leading dimensions, T tokens, width D. What several heads do at
    once has the heads first, ``(n, ..., T, D)``, for each has an input of its own. Activations are
    float32, or float64 where the model is; weights of fewer bits are widened as they are read.

    Args:
        model: A causal language model in evaluation mode.

    Attributes:
        layers: L.
        heads: H.
        key_heads: Heads of keys and values that the model has.
        parallel: Whether MLPs read what heads of their layer read.
        dtype: Of activations.
    """

    layers: int
    heads: int
    key_heads: int
    parallel = False

    def __init__(self, model: Any) -> None:
        self.model = model
        first = next(model.parameters())
        self.device = first.device
        self.dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        self.head = Head.of(model)
        self._angles: dict[int, tuple[Tensor, Tensor]] = {}

    # --- to be given for a family --------------------------------------------------------------

    @abc.abstractmethod
    def embed(self, ids: Tensor) -> Tensor:
        """Return what enters the residual stream, ``(N, T, D)``, for ids ``(N, T)``."""

    @abc.abstractmethod
    def attention_norm(self, layer: int, x: Tensor) -> Tensor:
        """Normalise what queries, keys and values are made of."""

    @abc.abstractmethod
    def weights(self, layer: int, part: str) -> tuple[Tensor, Tensor | None]:
        """Return weight ``(n, d, D)`` and bias ``(n, d)`` of all heads' ``q``, ``k`` or ``v``."""

    @abc.abstractmethod
    def output(self, layer: int) -> tuple[Tensor, Tensor | None]:
        """Return weight ``(H, D, d)`` and bias ``(D,)`` of what heads write."""

    @abc.abstractmethod
    def mlp(self, layer: int, x: Tensor) -> Tensor:
        """Return what an MLP writes, from the residual stream before its norm."""

    @abc.abstractmethod
    def final_norm(self, x: Tensor) -> Tensor:
        """Normalise what logits are made of."""

    # --- with defaults ---------------------------------------------------------------------------

    def rotate(self, layer: int, x: Tensor) -> Tensor:
        """Return queries or keys ``(n, ..., T, d)`` turned by their positions."""
        return x

    def turned(self, rotary: Any, x: Tensor) -> Tensor:
        """Return queries or keys turned by a rotary embedding of transformers, in pairs of halves.

        Args:
            rotary: Gives cosines and sines ``(1, T, r)``; the rest of the d dimensions stays.
            x: ``(n, ..., T, d)``.
        """
        size = x.shape[-2]
        if size not in self._angles:
            index = torch.arange(size, device=x.device)[None]
            cos, sin = rotary(x[:1].reshape(1, -1, x.shape[-1]), index)
            self._angles[size] = cos[0].to(self.dtype), sin[0].to(self.dtype)
        cos, sin = self._angles[size]
        first, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        half = first.shape[-1] // 2
        first = first * cos + torch.cat([-first[..., half:], first[..., :half]], -1) * sin
        return torch.cat([first, rest], -1) if rest.shape[-1] else first

    def head_norm(self, layer: int, part: str, x: Tensor) -> Tensor:
        """Normalise queries or keys of each head."""
        return x

    def scale(self, layer: int) -> float:
        """Return what scores are multiplied by."""
        return self.weights(layer, "q")[0].shape[1] ** -0.5

    def softcap(self, layer: int) -> float | None:
        """Return the cap of scores."""
        return None

    def window(self, layer: int) -> int | None:
        """Return how many keys a query sees, itself included; None for all."""
        return None

    # --- what runs are made of -------------------------------------------------------------------

    def part(self, layer: int, part: str, heads: Sequence[int], x: Tensor) -> Tensor:
        """Return queries, keys or values ``(n, ..., T, d)`` of some heads, each from its input.

        Args:
            layer: Of the heads.
            part: ``q``, ``k`` or ``v``.
            heads: n of them.
            x: ``(n, ..., T, D)``, what each reads from the residual stream.
        """
        weight, bias = self.weights(layer, part)
        index = torch.as_tensor(list(heads), device=weight.device)
        weight = weight[index].to(self.dtype)
        normed = self.attention_norm(layer, x)
        flat = normed.reshape(len(index), -1, normed.shape[-1])
        found = flat @ weight.transpose(1, 2)
        if bias is not None:
            found = found + bias[index].to(self.dtype)[:, None]
        found = found.view(*normed.shape[:-1], -1)
        if part == "v":
            return found
        return self.rotate(layer, self.head_norm(layer, part, found))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return what heads read, ``(n, ..., T, d)``; leading dimensions of 1 are broadcast."""
        scores = (q @ k.transpose(-1, -2)) * self.scale(layer)
        cap = self.softcap(layer)
        if cap is not None:
            scores = cap * (scores / cap).tanh()
        size = q.shape[-2]
        index = torch.arange(size, device=q.device)
        seen = index[:, None] >= index
        window = self.window(layer)
        if window is not None:
            seen &= index[:, None] - index < window
        return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v

    def write(self, layer: int, heads: Sequence[int], z: Tensor) -> Tensor:
        """Return what some heads write to the residual stream, ``(n, ..., T, D)``, without bias."""
        weight = self.output(layer)[0]
        weight = weight[torch.as_tensor(list(heads), device=weight.device)].to(self.dtype)
        flat = z.reshape(len(weight), -1, z.shape[-1])
        return (flat @ weight.transpose(1, 2)).view(*z.shape[:-1], -1)

    def logits(self, x: Tensor) -> Tensor:
        """Return logits of the residual stream's last states."""
        logits = modules_as(self.dtype, self.head.module, self.final_norm(x)) * self.head.scale
        cap = self.head.softcap
        return logits if cap is None else cap * (logits / cap).tanh()


def modules_as(dtype: torch.dtype, module: Any, x: Tensor) -> Tensor:
    """Call a module whose parameters may have fewer bits on activations of ``dtype``."""
    first = next(module.parameters(), None)
    if first is None or first.dtype == dtype:
        return module(x)
    wide = {name: p.to(dtype) for name, p in module.named_parameters()}
    return torch.func.functional_call(module, wide, (x,))
