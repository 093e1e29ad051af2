"""Projections of one input in one launch, while few rows are decoded."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from shared_kernels.ops.skinny import MOST_ROWS, skinny_linears
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Generator

#: Submodules that transformers' decoder layers call with the same tensor.
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class _Group:
    """Linear layers that are computed when the first of them is called."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        self.layers = layers
        self.forwards = [partial(self.call, index) for index in range(len(layers))]
        self.x: Tensor | None = None
        self.parts: list[Tensor] = []
        self.left = 0

    def call(self, index: int, x: Tensor) -> Tensor:
        if x.numel() > MOST_ROWS * x.shape[-1]:
            layer = self.layers[index]
            return nn.functional.linear(x, layer.weight, layer.bias)
        if self.x is not x:
            biases = [layer.bias.detach() for layer in self.layers if layer.bias is not None]
            found = skinny_linears(
                x.reshape(-1, x.shape[-1]), [layer.weight.detach() for layer in self.layers],
                biases or None,
            )  # fmt: skip
            self.parts = [part.view(*x.shape[:-1], -1) for part in found]
            self.x, self.left = x, len(self.layers)
        part = self.parts[index]
        self.left -= 1
        if not self.left:
            # nothing is held from one layer to the next
            self.x, self.parts = None, []
        return part


def _together(model: nn.Module) -> Generator[list[nn.Linear]]:
    for module in model.modules():
        for names in _TOGETHER:
            layers: list[Any] = [getattr(module, name, None) for name in names]
            first = layers[0]
            # a layer that was exchanged or adapted has a forward of its own
            if all(type(layer) is nn.Linear and "forward" not in vars(layer) for layer in layers):
                alike = {(x.in_features, x.weight.dtype, x.weight.device, x.bias is None)
                         for x in layers}  # fmt: skip
                if len(alike) == 1 and first.weight.element_size() == 2:
                    yield layers


class FusedProjections:
    """Lets queries, keys and values, and gate and up, be one product each for up to 64 rows.

    The modules, their parameters and hooks stay as they are; a call with more rows is computed as
    ever. Only for 16-bit weights, where reading them is what a step waits for. No gradients.

    Args:
        model: Whose layers; what can be joined is looked up anew each time.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._groups: dict[tuple[int, ...], _Group] = {}

    @contextmanager
    def __call__(self) -> Generator[int]:
        """Join them within this context.

        Yields:
            How many groups of layers the model has.
        """
        known, self._groups = self._groups, {}
        for layers in _together(self.model):
            key = tuple(map(id, layers))
            # the same objects each time: a compiled step is compiled for them
            self._groups[key] = known.get(key) or _Group(layers)
        groups = [*self._groups.values()]
        try:
            for group in groups:
                for layer, forward in zip(group.layers, group.forwards, strict=True):
                    layer.__dict__["forward"] = forward
            yield len(groups)
        finally:
            for group in groups:
                for layer in group.layers:
                    layer.__dict__.pop("forward", None)
