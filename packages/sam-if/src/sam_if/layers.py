"""What goes into a model's linear layers, and the gradients of what comes out, by sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels._checks import message
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable

    from sam_if.objective import ParameterVector


@dataclass(frozen=True)
class Layer:
    """A linear layer or a convolution whose weight is trained.

    Attributes:
        name: In the model.
        module: Itself.
        weight: Place of its weight in the vector of parameters.
        bias: Of its bias; None if it has none that is trained.
        shape: Of its weight as a matrix, ``(o, i)``.
    """

    name: str
    module: nn.Module
    weight: slice
    bias: slice | None
    shape: tuple[int, int]

    def matrix(self, x: Tensor) -> Tensor:
        """Return a vector's part of the layer as a matrix ``(o, i)``; the bias is a last column."""
        found = x[self.weight].view(self.shape)
        return found if self.bias is None else torch.cat([found, x[self.bias, None]], 1)

    def put(self, x: Tensor, matrix: Tensor) -> None:
        """Write what `matrix` returns into a vector."""
        x[self.weight] = matrix[:, : self.shape[1]].flatten()
        if self.bias is not None:
            x[self.bias] = matrix[:, -1]

    def inputs(self, x: Tensor) -> Tensor:
        """Return inputs as ``(b, t, i)``, of a layer with a bias with a last column of ones."""
        if isinstance(self.module, nn.Conv2d):
            module = self.module
            assert not isinstance(module.padding, str)
            x = functional.unfold(
                x, module.kernel_size, module.dilation, module.padding, module.stride
            ).transpose(1, 2)
        x = x.reshape(len(x), -1, self.shape[1])
        return x if self.bias is None else functional.pad(x, (0, 1), value=1.0)

    def outputs(self, d: Tensor) -> Tensor:
        """Return gradients of outputs as ``(b, t, o)``."""
        if isinstance(self.module, nn.Conv2d):
            d = d.flatten(2).transpose(1, 2)
        return d.reshape(len(d), -1, self.shape[0])


def layers_of(model: nn.Module, vector: ParameterVector) -> tuple[list[Layer], list[str]]:
    """Return a model's trained linear layers, and the names of parameters of no such layer.

    A tied weight counts for the first layer that has it, and for all its calls.
    """
    places, begin = {}, 0
    for name, size in zip(vector.names, vector.sizes, strict=True):
        places[name] = slice(begin, begin + size)
        begin += size
    named = {id(p): name for name, p in model.named_parameters()}
    found, taken = [], set()
    for name, module in model.named_modules():
        plain = isinstance(module, nn.Linear) or (
            isinstance(module, nn.Conv2d)
            and module.groups == 1
            and module.padding_mode == "zeros"
            and not isinstance(module.padding, str)
        )
        if not plain:
            continue
        weight = module.weight
        own = named[id(weight)]
        if own not in places or own in taken:
            continue
        bias = None if module.bias is None else named[id(module.bias)]
        if bias is not None and (bias not in places or bias in taken):
            bias = None
        taken |= {own} | ({bias} if bias else set())
        shape = (weight.shape[0], weight[0].numel())
        found.append(Layer(name, module, places[own], places[bias] if bias else None, shape))
    return found, [name for name in vector.names if name not in taken]


def capture(
    layers: list[Layer], loss: Callable[[Tensor], Tensor], at: Tensor, samples: int
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Run a loss at some weights, and return what each layer saw.

    Args:
        layers: Of the model.
        loss: 0-dimensional, of the vector of parameters.
        at: That vector, ``(p,)``.
        samples: b.

    Returns:
        For each layer its inputs ``(b, t, i)`` and the gradients of its outputs ``(b, t, o)``, and
        the gradient of the loss, ``(p,)``. A layer that was called several times has the tokens
        of all calls; one that was not called has none.

    Raises:
        ValueError: A layer does not have samples in its first dimension.
    """
    seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in layers]
    hooks = []

    def keep(number: int) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if len(output) != samples:
                remedy = "leave it untrained, or take another solver"
                expected = f"layers with {samples} samples in the first dimension"
                got = f"{layers[number].name} with {tuple(output.shape)}"
                raise ValueError(message("model", expected, got, remedy))
            seen[number].append((inputs[0].detach(), output))

        return hook

    try:
        for number, layer in enumerate(layers):
            hooks.append(layer.module.register_forward_hook(keep(number)))
        with torch.enable_grad():
            leaf = at.detach().requires_grad_()
            value = loss(leaf)
            outputs = [output for calls in seen for _, output in calls]
            whole, *grads = torch.autograd.grad(value, [leaf, *outputs], materialize_grads=True)
    finally:
        for hook in hooks:
            hook.remove()
    found, left = [], iter(grads)
    for layer, calls in zip(layers, seen, strict=True):
        parts = [(layer.inputs(x), layer.outputs(next(left))) for x, _ in calls]
        empty = at.new_zeros(samples, 0, layer.shape[1] + (layer.bias is not None))
        x = torch.cat([empty, *[x for x, _ in parts]], 1)
        d = torch.cat([at.new_zeros(samples, 0, layer.shape[0]), *[d for _, d in parts]], 1)
        found.append((x, d))
    return found, whole
