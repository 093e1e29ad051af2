"""Models whose layers stay in the host's memory, and come to the device one at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from shared_kernels.offload import ParamRef, Unit, WeightStore, layout_unit, make_transfer
from shared_kernels.offload.store import DeviceRing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn


class Streamer:
    """Takes the matrices of a model's layers over, and has a layer's on a device while it is used.

    What else there is, such as embeddings, norms and biases, is on the device all the time. The
    next layer is copied while one is used; the two places on the device are as large as the largest
    layer. Outside its time a matrix is a NaN of its shape, without memory behind it.

    Args:
        model: In the host's memory.
        layers: Its layers, in the order in which they run.
        device: For computation.

    Attributes:
        itemsize: Bytes of a weight.
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module], device: torch.device) -> None:
        self.model = model
        names = {id(p): name for name, p in model.named_parameters()}
        units = [
            Unit(
                index, f"layer {index}", layer,
                tuple(ParamRef(names[id(p)], p) for p in layer.parameters() if p.ndim > 1),
            )
            for index, layer in enumerate(layers)
        ]  # fmt: skip
        self._params = [[ref.parameter for ref in unit.params] for unit in units]
        self._trained = [p for params in self._params for p in params if p.requires_grad]
        for p in self._trained:
            p.requires_grad_(False)
        self.itemsize = self._params[0][0].element_size()
        layouts = [layout_unit(unit, {}) for unit in units]
        size = sum(layout.nbytes for layout in layouts)
        self._store = WeightStore(layouts, device, (), freed_meanwhile=size)
        self._blank = [[_blank(p, device) for p in params] for params in self._params]
        for unit, layout in zip(units, layouts, strict=True):
            values = {ref.name: ref.parameter.detach() for ref in unit.params}
            layout.write(self._store.home(unit.index).flat, values)
            self._bind(unit.index, self._blank[unit.index])
        self._place(device)
        transfer = make_transfer(device, registered=self._store.registered)
        self._ring = DeviceRing(self._store, transfer, 2)
        self._here: int | None = None
        self._next: dict[int, int] = {}
        self._hooks = [
            layer.register_forward_pre_hook(lambda *_, index=index: self.load(index))
            for index, layer in enumerate(layers)
        ]

    def load(self, layer: int) -> None:
        """Have a layer's matrices on the device, until another's are asked for."""
        last = self._here
        if layer == last:
            return
        if last is not None:
            self._bind(last, self._blank[last])
            self._ring.release()
            self._next[last] = layer
        self._here = layer
        self._bind(layer, self._ring.acquire(layer, ("main",)).frozen)
        # what followed last time
        following = self._next.get(layer, layer + 1)
        if following < len(self._params) and following != layer:
            self._ring.request(following, ("main",))

    def close(self) -> None:
        """Give the model its weights back, in the host's memory."""
        for hook in self._hooks:
            hook.remove()
        for index in range(len(self._params)):
            self._bind(index, [view.clone() for view in self._store.home(index).frozen])
        for p in self._trained:
            p.requires_grad_(True)
        self._place(torch.device("cpu"))
        self._store.close()

    def _bind(self, layer: int, values: Sequence[Tensor]) -> None:
        for p, value in zip(self._params[layer], values, strict=True):
            p.data = value

    def _place(self, device: torch.device) -> None:
        """Move all that is not streamed."""
        streamed = {id(p) for params in self._params for p in params}
        for p in self.model.parameters():
            if id(p) not in streamed:
                p.data = p.data.to(device)
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)


def _blank(p: Any, device: torch.device) -> Tensor:
    return torch.full((), float("nan"), dtype=p.dtype, device=device).expand(p.shape)
