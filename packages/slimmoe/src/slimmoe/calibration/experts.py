"""Experts that show what they computed.

Experts modules of transformers dispatch through a registry of functions, which a forward hook on
the modules inside cannot see: there are none. The function here stands in for the implementation
that a model uses, runs the same operations in the same order, and hands the results of every
assignment of a token to an expert to a recorder. No expert sees a token that is not routed to it.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping

NAME = "slimmoe_statistics"


class Assignments(NamedTuple):
    """What the S assignments of one call computed, sorted by expert.

    Attributes:
        count: ``[E]`` int64, how many are each expert's.
        token: ``[S]`` int64, row of the experts module's input.
        place: ``[S]`` int64, where the assignment is in the flattened weights ``[T, k]``.
        activation: ``[S, I]`` What the down projection is applied to.
        output: ``[S, H]`` Before weighting.
    """

    count: Tensor
    token: Tensor
    place: Tensor
    activation: Tensor
    output: Tensor


_recorders: WeakKeyDictionary[nn.Module, tuple[str, Callable[..., None]]] = WeakKeyDictionary()


@contextmanager
def recording(
    model: Any, recorders: Mapping[Any, Callable[[Tensor, Assignments], None]]
) -> Generator[None]:
    """Have experts modules call recorders, with the weights ``[T, k]`` and the assignments.

    The outputs are those of the implementation that the model is set to: bit for bit for
    ``eager``, ``grouped_mm`` and ``batched_mm``. For any other, and for ``grouped_mm`` in float64,
    which torch does not compute, they are equal to rounding: ``grouped_mm`` and ``eager`` run.

    Args:
        model: A PreTrainedModel; its implementation is set back afterwards, also on an error.
        recorders: By experts module. All of the model's experts must be among them that run.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    before = model.get_experts_implementation()
    # modules that the model does not know of have a configuration of their own
    own = {id(module.config) for module in model.modules() if hasattr(module, "config")}
    configs = {id(m.config): m.config for m in recorders if id(m.config) not in own}
    apart = [(config, config._experts_implementation) for config in configs.values()]
    ALL_EXPERTS_FUNCTIONS.register(NAME, _observed_experts)
    try:
        for module, recorder in recorders.items():
            _recorders[module] = (module.config._experts_implementation, recorder)
        model.set_experts_implementation(NAME)
        for config, _ in apart:
            config._experts_implementation = NAME
        yield
    finally:
        model.set_experts_implementation(before)
        for config, implementation in apart:
            config._experts_implementation = implementation
        for module in recorders:
            _recorders.pop(module, None)


def _observed_experts(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    implementation, record = _recorders[self]
    if implementation == "eager" or hidden_states.dtype is torch.float64:
        run = _eager
    else:
        run = _batched if implementation == "batched_mm" else _grouped
    output, assignments = run(self, hidden_states, top_k_index, top_k_weights)
    record(top_k_weights, assignments)
    return output


def _eager(self: Any, x: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, Assignments]:
    """One expert after the other; its rows are ordered by slot, then by token."""
    tokens, k = index.shape
    expert, order = torch.sort(index.t().reshape(-1), stable=True)
    slot, token = order // tokens, order % tokens
    count = _bounds(expert, self.num_experts).diff()
    result = torch.zeros_like(x)
    activations, outputs = [], []
    at = 0
    for e, size in enumerate(count.tolist()):
        if not size:
            continue
        rows = slice(at, at + size)
        at += size
        activation = self._apply_gate(_linear(self, "gate_up_proj", e, x[token[rows]]))
        output = _linear(self, "down_proj", e, activation)
        weighted = output * weights[token[rows], slot[rows], None]
        result.index_add_(0, token[rows], weighted.to(result.dtype))
        activations.append(activation)
        outputs.append(output)
    place = token * k + slot
    return result, Assignments(count, token, place, torch.cat(activations), torch.cat(outputs))


def _bounds(expert: Tensor, experts: int) -> Tensor:
    """Where the assignments of each expert begin, among sorted ones, and the end: ``[E + 1]``.

    A bincount says as much, but waits for the device.
    """
    return torch.searchsorted(
        expert, torch.arange(experts + 1, dtype=expert.dtype, device=expert.device)
    )


def _linear(self: Any, name: str, expert: int, x: Tensor) -> Tensor:
    weight = getattr(self, name)[expert]
    out = x @ weight if self.is_transposed else nn.functional.linear(x, weight)
    return out + getattr(self, f"{name}_bias")[expert] if self.has_bias else out


def _grouped(self: Any, x: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, Assignments]:
    """One grouped product over rows that are sorted by expert."""
    tokens, k = index.shape
    expert, order = torch.sort(index.reshape(-1))
    bounds = _bounds(expert, self.num_experts)
    ends, token = bounds[1:].to(torch.int32), order // k

    def linear(name: str, x: Tensor) -> Tensor:
        weight = getattr(self, name)
        weight = weight if self.is_transposed else weight.transpose(-2, -1)
        out = nn.functional.grouped_mm(x.to(weight.dtype), weight, offs=ends)
        return out.add_(getattr(self, f"{name}_bias")[expert]) if self.has_bias else out

    activation = self._apply_gate(linear("gate_up_proj", x[token]))
    output = linear("down_proj", activation)
    weighted = output * weights.reshape(-1)[order, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    result = weighted[back].view(tokens, k, -1).sum(1).to(x.dtype)
    return result, Assignments(bounds.diff(), token, order, activation, output)


def _batched(self: Any, x: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, Assignments]:
    """One product per row, with a copy of its expert's weights."""
    tokens, k = index.shape
    expert = index.reshape(-1)

    def linear(name: str, x: Tensor) -> Tensor:
        weight = getattr(self, name)[expert]
        if self.is_transposed:
            out = torch.bmm(x.unsqueeze(1), weight).squeeze(1)
        else:
            out = torch.bmm(weight, x.unsqueeze(-1)).squeeze(-1)
        return out.add_(getattr(self, f"{name}_bias")[expert]) if self.has_bias else out

    activation = self._apply_gate(linear("gate_up_proj", x.repeat_interleave(k, dim=0)))
    output = linear("down_proj", activation)
    weighted = output * weights.reshape(-1, 1)
    result = weighted.view(tokens, k, -1).sum(1).to(x.dtype)
    expert, order = torch.sort(expert, stable=True)
    count = _bounds(expert, self.num_experts).diff()
    return result, Assignments(count, order // k, order, activation[order], output[order])
