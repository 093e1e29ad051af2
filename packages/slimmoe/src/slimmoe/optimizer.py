"""State of an optimizer, for the weights that come out of a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from shared_kernels._checks import message

from slimmoe.rewrite import Rewriter
from slimmoe.weights import Source

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from slimmoe.planning import CompressionPlan

#: Moments of gradients, and to what power a gradient is in them.
_MOMENTS = {"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2, "momentum_buffer": 1}


class _Moments:
    """Moments of one kind in the place of a model's weights."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str, index: Any = ...) -> Tensor:
        return self.tensors[name][index]


@torch.no_grad()
def slice_optimizer_state(
    optimizer: torch.optim.Optimizer, model: Any, compressed: Any, plan: CompressionPlan
) -> dict[str, dict[str, Any]]:
    """Return the state of an optimizer for a compressed model.

    Moments of kept weights are kept, and those of averaged experts are averaged as they are. A norm
    that is scaled by c has gradients that are 1/c of those before. The paper leaves open whether
    moments are carried over between stages.

    Args:
        optimizer: Of the model's parameters; Adam, AdamW or SGD with momentum.
        model: As it was.
        compressed: Of `slimmoe.compress_model`.
        plan: It was compressed by.

    Returns:
        By the names of the compressed model's parameters, what ``optimizer.state`` has of each.

    Raises:
        ValueError: State of another kind, or a parameter that is not the model's.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    state: dict[str, dict[str, Any]] = {}
    for parameter, found in optimizer.state.items():
        if id(parameter) not in names:
            remedy = "state of this model's parameters"
            raise ValueError(message("optimizer", remedy, tuple(parameter.shape), "another model?"))
        state[names[id(parameter)]] = found
    if unknown := sorted({k for s in state.values() for k in s} - {*_MOMENTS, "step"}):
        known = f"only {[*_MOMENTS, 'step']}"
        raise ValueError(message("optimizer", known, unknown, "see slice_optimizer_state"))
    made: dict[str, dict[str, Any]] = {}
    # neurons are in the order that their weights, not their moments, were put into
    aligned = Rewriter(Source(model), plan)
    for kind, power in _MOMENTS.items():
        tensors = {name: s[kind] for name, s in state.items() if s.get(kind) is not None}
        if not tensors:
            continue
        source = Source(model)
        source.weights = _Moments(tensors)
        source.matches = {name: source.matches[name] for name in tensors}
        for out in Rewriter(source, plan, power, aligned).outputs():
            # averages and slices of those that share storage with the old state
            made.setdefault(out.name, {})[kind] = out.make().clone()
    steps = {s["step"] for s in state.values() if isinstance(s.get("step"), int | float)}
    steps |= {float(s["step"]) for s in state.values() if isinstance(s.get("step"), torch.Tensor)}
    parameters = dict(compressed.named_parameters())
    if wrong := sorted(name for name in made if name not in parameters):
        raise ValueError(message("compressed", "what the plan gives", wrong[:3], "another plan?"))
    for name, found in made.items():
        for kind, tensor in found.items():
            if tensor.shape != parameters[name].shape:
                remedy = "give the model that compress_model made by this plan"
                raise ValueError(message("compressed", f"{name}.{kind} of its shape",
                                         tuple(tensor.shape), remedy))  # fmt: skip
        if steps:
            found["step"] = torch.tensor(max(map(float, steps)))
    return made
