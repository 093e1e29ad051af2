"""What a patched run needs of a model: pure functions over the parameters of the live module."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from shared_kernels.models import Head
from torch.nn import functional

from pahq.errors import UnsupportedModelError
from pahq.streaming import Streamer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

#: Activations by the names that configurations of transformers have for them.
_ACTIVATIONS: Mapping[str, str] = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu",
}  # fmt: skip
_FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


class Norm(NamedTuple):
    """A norm over the width.

    Attributes:
        kind: ``rms`` or ``layer``; ``none`` changes nothing.
        weight: ``(D,)``.
        bias: ``(D,)`` of a layer norm.
        eps: Added to the mean square.
    """

    kind: str
    weight: Tensor
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise ``(..., D)``."""
        if self.kind == "none":
            return x
        weight = self.weight.to(x.dtype)
        if self.kind == "rms":
            return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * weight
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return functional.layer_norm(x, x.shape[-1:], weight, bias, self.eps)

    def scaling(self, x: Tensor) -> tuple[str, Tensor | None, float]:
        """Return all that differences depend on, in the precision of x."""
        return self.kind, None if self.kind == "none" else self.weight.to(x.dtype), self.eps


NO_NORM = Norm("none", torch.empty(0), None, 0.0)


class FeedForward(NamedTuple):
    """``outer act(inner x)``, or, gated, ``outer (act(gate x) * inner x)``, with biases.

    Attributes:
        act: A name in `_FUNCTIONS`.
        inner: ``(F, D)``.
        inner_bias: ``(F,)``.
        outer: ``(D, F)``.
        outer_bias: ``(D,)``.
        gate: ``(F, D)``, of a gated one.
        gate_bias: ``(F,)``.
    """

    act: str
    inner: Tensor
    inner_bias: Tensor | None
    outer: Tensor
    outer_bias: Tensor | None
    gate: Tensor | None = None
    gate_bias: Tensor | None = None

    def before(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what goes into the activation and what it is multiplied by, ``(..., F)``."""
        inner = _linear(x, self.inner, self.inner_bias)
        return (
            (inner, None) if self.gate is None else (_linear(x, self.gate, self.gate_bias), inner)
        )

    def after(self, inside: Tensor, factor: Tensor | None) -> Tensor:
        """Return what is written, from what `before` returned."""
        found = _FUNCTIONS[self.act](inside)
        return _linear(found if factor is None else found * factor, self.outer, self.outer_bias)


def layer_norm(module: Any) -> Norm:
    """Return what a layer norm of torch is."""
    bias = None if module.bias is None else module.bias.detach()
    return Norm("layer", module.weight.detach(), bias, module.eps)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def activation(name: str) -> str:
    """Return the name in `FeedForward` of an activation of transformers.

    Raises:
        UnsupportedModelError: Another one.
    """
    if name not in _ACTIVATIONS:
        known = ", ".join(sorted(_ACTIVATIONS))
        raise UnsupportedModelError(f"model: expected an activation of {known}, got {name!r}")
    return _ACTIVATIONS[name]


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
        blocks: Modules of the layers.
        parallel: Whether MLPs read what heads of their layer read.
        shared_scale: Whether heads of a layer share numbers that each of them changes, such as the
            norm of their sum: what a head writes does not depend on its own inputs alone.
        causal: Whether a query sees the keys up to its own position, in a window if there is one;
            else it sees all.
        dtype: Of activations.
    """

    layers: int
    heads: int
    key_heads: int
    blocks: Sequence[Any]
    parallel = False
    shared_scale = False
    causal = True

    def __init__(self, model: Any) -> None:
        self.model = model
        first = next(model.parameters())
        self.device = first.device
        self.dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        self.head = Head.of(model)
        #: Brings the weights of a layer that is asked for; None if all are there.
        self.streamer: Streamer | None = None
        self._angles: dict[int, tuple[Tensor, Tensor]] = {}
        self._positions = 0

    def stream(self, device: torch.device) -> Streamer:
        """Leave the matrices of layers in the host's memory, and compute on a device."""
        self.streamer = Streamer(self.model, self.blocks, device)
        self.device = device
        return self.streamer

    def load(self, layer: int) -> None:
        """Have a layer's matrices where they are multiplied, until another's are asked for."""
        if self.streamer is not None:
            self.streamer.load(layer)

    # --- to be given for a family --------------------------------------------------------------

    @abc.abstractmethod
    def embed(self, ids: Tensor) -> Tensor:
        """Return what enters the residual stream, ``(N, T, D)``, for ids ``(N, T)``."""

    @abc.abstractmethod
    def norm(self, place: str, layer: int = 0) -> Norm:
        """Return the norm before ``attention`` or ``mlp`` of a layer, or the ``final`` one."""

    @abc.abstractmethod
    def feed_forward(self, layer: int) -> FeedForward:
        """Return what an MLP is made of, behind its norm."""

    @abc.abstractmethod
    def weights(self, layer: int, part: str) -> tuple[Tensor, Tensor | None]:
        """Return weight ``(n, d, D)`` and bias ``(n, d)`` of all heads' ``q``, ``k`` or ``v``."""

    @abc.abstractmethod
    def output(self, layer: int) -> tuple[Tensor, Tensor | None]:
        """Return weight ``(H, D, d)`` and bias ``(D,)`` of what heads write."""

    # --- with defaults ---------------------------------------------------------------------------

    def rotate(self, layer: int, x: Tensor, at: Tensor | None = None) -> Tensor:
        """Return queries or keys ``(n, ..., N, T, d)`` turned by their positions.

        Args:
            layer: Of the heads.
            x: From position 0 on, or of one position of each example, ``(n, ..., N, 1, d)``.
            at: int64 ``(N,)``, that position.
        """
        return x

    def turned(self, rotary: Any, x: Tensor, at: Tensor | None) -> Tensor:
        """Return queries or keys turned by a rotary embedding of transformers, in pairs of halves.

        Args:
            rotary: Gives cosines and sines ``(1, T, r)``; the rest of the d dimensions stays.
            x: ``(n, ..., N, T, d)``.
            at: Of `rotate`.
        """
        if at is None:
            cos, sin = self._turns(rotary, x, x.shape[-2])
        else:
            cos, sin = (y[at][:, None] for y in self._turns(rotary, x, self._positions))
        first, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        half = first.shape[-1] // 2
        first = first * cos + torch.cat([-first[..., half:], first[..., :half]], -1) * sin
        return torch.cat([first, rest], -1) if rest.shape[-1] else first

    def _turns(self, rotary: Any, x: Tensor, size: int) -> tuple[Tensor, Tensor]:
        self._positions = max(self._positions, size)
        if size not in self._angles:
            index = torch.arange(size, device=x.device)[None]
            cos, sin = rotary(x[:1].reshape(1, -1, x.shape[-1]), index)
            self._angles[size] = cos[0].to(self.dtype), sin[0].to(self.dtype)
        return self._angles[size]

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

    def mlp(self, layer: int, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return what an MLP writes, from the residual stream before its norm.

        Args:
            layer: Of the MLP.
            x: ``(..., D)``.
            dtype: Of all that it computes behind its norm; that of x by default.
        """
        self.load(layer)
        block = self.feed_forward(layer)
        normed = self.norm("mlp", layer)(x)
        return block.after(*block.before(normed.to(dtype or x.dtype))).to(x.dtype)

    def part(
        self,
        layer: int,
        part: str,
        heads: Sequence[int],
        x: Tensor,
        rounded: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Return queries, keys or values ``(n, ..., T, d)`` of some heads, each from its input.

        Args:
            layer: Of the heads.
            part: ``q``, ``k`` or ``v``.
            heads: n of them.
            x: ``(n, ..., T, D)``, what each reads from the residual stream.
            rounded: Rounds both operands of the product, ``(n, ...)``.
        """
        found = self.project(layer, part, heads, x, rounded)
        if part == "v":
            return found
        return self.rotate(layer, self.head_norm(layer, part, found))

    def project(
        self,
        layer: int,
        part: str,
        heads: Sequence[int],
        x: Tensor,
        rounded: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Return what `part` does, before its norm and its turn."""
        self.load(layer)
        weight, bias = self.weights(layer, part)
        index = torch.as_tensor(list(heads), device=weight.device)
        weight = weight[index].to(self.dtype)
        normed = self.norm("attention", layer)(x)
        flat = normed.reshape(len(index), -1, normed.shape[-1])
        if rounded is not None:
            flat, weight = rounded(flat), rounded(weight)
        found = flat @ weight.transpose(1, 2)
        if bias is not None:
            found = found + bias[index].to(self.dtype)[:, None]
        return found.view(*normed.shape[:-1], -1)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, at: Tensor | None = None
    ) -> Tensor:
        """Return what heads read, ``(n, ..., N, T, d)``; leading dimensions of 1 are broadcast.

        Args:
            layer: Of the heads.
            q: Queries from position 0 on, or of one position of each example, with T of 1.
            k: Keys from position 0 on.
            v: Values, likewise.
            at: int64 ``(N,)``, that position.
        """
        scores = (q @ k.transpose(-1, -2)) * self.scale(layer)
        cap = self.softcap(layer)
        if cap is not None:
            scores = cap * (scores / cap).tanh()
        if not self.causal:
            return scores.softmax(-1) @ v
        index = torch.arange(k.shape[-2], device=q.device)
        behind = (index if at is None else at)[..., None] - index
        seen = behind >= 0
        window = self.window(layer)
        if window is not None:
            seen &= behind < window
        if at is not None:
            seen = seen[:, None]
        return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v

    def write(
        self,
        layer: int,
        heads: Sequence[int],
        z: Tensor,
        rounded: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Return what some heads write to the residual stream, ``(n, ..., T, D)``, without bias.

        Args:
            layer: Of the heads.
            heads: n of them.
            z: ``(n, ..., T, d)``, what they read.
            rounded: Rounds both operands of the product, ``(n, ...)``.
        """
        self.load(layer)
        weight = self.output(layer)[0]
        weight = weight[torch.as_tensor(list(heads), device=weight.device)].to(self.dtype)
        flat = z.reshape(len(weight), -1, z.shape[-1])
        if rounded is not None:
            flat, weight = rounded(flat), rounded(weight)
        return (flat @ weight.transpose(1, 2)).view(*z.shape[:-1], -1)

    def logits(self, x: Tensor) -> Tensor:
        """Return logits of the residual stream's last states."""
        logits = modules_as(self.dtype, self.head.module, self.norm("final")(x)) * self.head.scale
        cap = self.head.softcap
        return logits if cap is None else cap * (logits / cap).tanh()


def modules_as(dtype: torch.dtype, module: Any, x: Tensor) -> Tensor:
    """Call a module whose parameters may have fewer bits on activations of ``dtype``."""
    first = next(module.parameters(), None)
    if first is None or first.dtype == dtype:
        return module(x)
    wide = {name: p.to(dtype) for name, p in module.named_parameters()}
    return torch.func.functional_call(module, wide, (x,))
