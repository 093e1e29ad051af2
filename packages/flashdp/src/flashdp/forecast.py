"""What a private step of a model would do, layer by layer, before anything is trained."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from flashdp.check import check_model
from flashdp.errors import PrivacyError
from flashdp.planner import costs, measure_rates

if TYPE_CHECKING:
    from flashdp.planner import Rates

__all__ = ["Forecast", "LayerForecast", "forecast"]

_FLOAT32 = 4


@dataclass(frozen=True)
class LayerForecast:
    """A kind of layer in a private step.

    Attributes:
        name: Of its modules, numbers replaced by ``*``.
        count: Of its modules.
        rule: That covers it.
        strategy: How its norms are taken: ``"gram"``, ``"recompute"`` or ``"spill"`` for a matrix,
            ``"tokens"`` for a table, ``"per unit"`` for what is as small as a norm layer.
        flops: Of an ordinary step in these modules: forward and both products of backward.
        extra_flops: More than that, with privacy.
        extra_bytes: Moved to and from memory beyond an ordinary step, by ``"spill"``.
        slowdown: Time of these products over an ordinary step's, at the device's rates.
        workspace: Bytes that one of the modules needs for a moment on top of its sum.
    """

    name: str
    count: int
    rule: str
    strategy: str
    flops: int
    extra_flops: int
    extra_bytes: int
    slowdown: float
    workspace: int


@dataclass(frozen=True)
class Forecast:
    """What `forecast` found; an estimate by counting, not a measurement.

    Attributes:
        units: Units of the physical batch.
        tokens: Of each.
        device: Whose rates chose the strategies.
        layers: Every kind of layer that is trained.
        frozen_flops: Of an ordinary step in frozen matrices: forward, and backward to their inputs.
        parameters: Trainable parameters.
        sums: Bytes of the float32 sums that stand in for gradients.
        workspace: Bytes of the largest layer's workspace; layers take turns.
        per_sample: Bytes of one float32 gradient per unit, which are *not* kept.
    """

    units: int
    tokens: int
    device: str
    layers: tuple[LayerForecast, ...]
    frozen_flops: int
    parameters: int
    sums: int
    workspace: int
    per_sample: int

    @property
    def flops(self) -> int:
        """Of an ordinary step, attention's own products left out."""
        return self.frozen_flops + sum(layer.flops for layer in self.layers)

    @property
    def extra_flops(self) -> int:
        """Of a private step, beyond that."""
        return sum(layer.extra_flops for layer in self.layers)

    @property
    def flops_ratio(self) -> float:
        """FLOPs of a private step over those of an ordinary one."""
        return 1 + self.extra_flops / self.flops if self.flops else 1.0

    @property
    def slowdown(self) -> float:
        """Time of all layers' products over an ordinary step's, at the device's rates."""
        times = sum(layer.slowdown * layer.flops for layer in self.layers)
        return (self.frozen_flops + times) / self.flops if self.flops else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            **asdict(self),
            "flops": self.flops,
            "extra_flops": self.extra_flops,
            "flops_ratio": self.flops_ratio,
            "slowdown": self.slowdown,
        }


def forecast(
    model: nn.Module, *, units: int, tokens: int, device: str = "cpu", dtype: Any = None
) -> Forecast:
    """Count what a private step costs, with the strategies that the planner would choose.

    Matrices are `nn.Linear` and tables `nn.Embedding`, at clipping by modules. FLOPs are those of
    their products; attention's own, convolutions' and elementwise work are left out on both sides.

    Args:
        model: May be on the meta device; see `flashdp.check.check_model`.
        units: Units of a physical batch, one row each.
        tokens: Of each row.
        device: ``"cpu"``, whose rates are typical ones, or a GPU, whose rates are measured, which
            takes a moment.
        dtype: Of the activations on a GPU; bfloat16 by default.

    Raises:
        PrivacyError: The model cannot be trained privately as it is.
        ValueError: ``units`` or ``tokens`` is below 1, or there is no such device.
    """
    for name, value in (("units", units), ("tokens", tokens)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"device: expected 'cpu', torch sees no GPU here; got {device!r}")
    checked = check_model(model)
    if checked.issues:
        raise PrivacyError(
            "the model cannot be trained privately as it is:\n"
            + "\n".join(f"- {issue}" for issue in checked.issues)
        )
    aligned = tokens % 16 == 0
    rates = measure_rates(torch.device(device), dtype or torch.bfloat16, aligned=aligned)
    layers = tuple(
        _layer(layer, units, tokens, rates, aligned=aligned, cuda=device != "cpu")
        for layer in checked.layers
    )
    return Forecast(
        units=units,
        tokens=tokens,
        device=device,
        layers=layers,
        frozen_flops=4 * units * tokens * _frozen_matrices(model),
        parameters=checked.parameters,
        sums=_FLOAT32 * checked.parameters,
        workspace=max((layer.workspace for layer in layers), default=0),
        per_sample=_FLOAT32 * checked.parameters * units,
    )


def _frozen_matrices(model: nn.Module) -> int:
    """Number of weights in linear layers that are not trained."""
    return sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, nn.Linear) and not module.weight.requires_grad
    )


def _layer(
    layer: Any, units: int, tokens: int, rates: Rates, *, aligned: bool, cuda: bool
) -> LayerForecast:
    # Products of a unit's tokens in pairs: a GPU takes tiles of one triangle, a CPU the square.
    pairs = tokens * (-(-tokens // 128) * 128 + 128) // 2 if cuda else tokens**2
    flops = extra = moved = workspace = 0
    slowdown, strategy = 1.0, "per unit"
    if layer.rule == "table":
        strategy, extra = "tokens", 2 * units * pairs * layer.shape[1]
        workspace = 0 if cuda else _FLOAT32 * tokens**2
    elif layer.rule == "matrix":
        # Which of the two is the input does not matter: all counts are symmetric in them.
        p, d = layer.shape
        product, size = 2 * units * tokens * d * p, _FLOAT32 * d * p
        flops = 3 * product
        estimate = costs(units, tokens, d, p, rates, aligned=aligned)
        strategy = min(estimate, key=estimate.__getitem__)
        plain = product / rates.scaled
        slowdown = (2 * plain + estimate[strategy]) / (3 * plain)
        if strategy == "gram":
            extra = 2 * units * pairs * (d + p)
            workspace = 0 if cuda else 2 * _FLOAT32 * tokens**2
        elif strategy == "recompute":
            extra, workspace = product, 0 if cuda else size
        else:
            # A chunk of units writes its products, reads them, and the sum is read and written;
            # as many units as fit 1 GiB, at least one; the CPU takes one at a time.
            chunk = min(units, max(1, (1 << 30) // size)) if cuda else 1
            moved = 2 * size * units + 2 * size * -(-units // chunk)
            workspace = size * chunk
    else:
        workspace = _FLOAT32 * units * layer.parameters // layer.count
    return LayerForecast(
        name=layer.name,
        count=layer.count,
        rule=layer.rule,
        strategy=strategy,
        flops=flops * layer.count,
        extra_flops=extra * layer.count,
        extra_bytes=moved * layer.count,
        slowdown=slowdown,
        workspace=workspace,
    )
