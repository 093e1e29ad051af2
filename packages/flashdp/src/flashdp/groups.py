"""Clipping groups, the thresholds that share C, and the noise that covers them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from flashdp.collector import Group, Part

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor, nn

    from flashdp.collector import PrivateLayer
    from flashdp.config import Grouping

__all__ = ["AdaptiveThresholds", "Calibration", "make_groups"]


def make_groups(
    model: nn.Module, layers: Sequence[PrivateLayer], grouping: Grouping = "module"
) -> list[Group]:
    """Divide the private parameters into groups that are clipped together.

    Args:
        model: The model.
        layers: Its private layers.
        grouping: ``"param"`` single tensors, ``"module"`` weight and bias together, ``"block"``
            one repeated block (layers outside blocks stand alone), ``"flat"`` everything. Larger
            groups waste less of C and hold activations longer.

    Raises:
        ValueError: ``"block"`` was asked for and the model has no repeated blocks.
    """
    for layer in layers:
        names = [(n,) for n in layer.names] if grouping == "param" else [tuple(layer.names)]
        layer.parts = [Part(layer, n) for n in names]
    if grouping == "flat":
        parts = [part for layer in layers for part in layer.parts]
        return [Group(0, "all", parts, late=True)]
    if grouping == "block":
        from shared_kernels.offload import discover_blocks

        prefixes = [unit.name + "." for unit in discover_blocks(model).blocks]
        named: dict[str, list[Part]] = {}
        for layer in layers:
            block = next((p[:-1] for p in prefixes if layer.name.startswith(p)), layer.name)
            named.setdefault(block, []).extend(layer.parts)
        return [Group(k, name, parts) for k, (name, parts) in enumerate(named.items())]
    pairs = [(layer, part) for layer in layers for part in layer.parts]
    return [
        Group(
            k,
            f"{layer.name}.{part.names[0]}" if grouping == "param" else layer.name,
            [part],
        )
        for k, (layer, part) in enumerate(pairs)
    ]


@dataclass(frozen=True, kw_only=True)
class AdaptiveThresholds:
    """Thresholds that follow a quantile of the norms (Andrew et al., 2021; He et al., 2023).

    After each step ``C_k <- C_k exp(-eta (b_k / B - quantile))``, where b_k is the number of units
    under C_k, released with Gaussian noise that is paid for out of the same budget.

    Attributes:
        quantile: Fraction of units to leave unclipped.
        eta: Step in the exponent.
        share: Fraction of sigma^-2 that the counts may use.
    """

    quantile: float = 0.5
    eta: float = 0.2
    share: float = 0.01

    def __post_init__(self) -> None:
        """Check every field."""
        for name, low, high in (("quantile", 0, 1), ("share", 0, 1), ("eta", 0, math.inf)):
            value = getattr(self, name)
            if not low < value < high:
                raise ValueError(
                    f"AdaptiveThresholds.{name}: expected a number above {low} and below {high}, "
                    f"got {value}"
                )


class Calibration:
    """Thresholds of the groups, their joint sensitivity, and each parameter's noise.

    Groups that share a parameter (tied embeddings) form a *cluster*: what they add to it adds up,
    so the cluster's sensitivity is the sum of their thresholds, not the root of the squares. Over
    clusters squares add up, ``C^2 = sum_c D_c^2``. With public weights w the noise of cluster c has
    the standard deviation ``sigma w_c sqrt(sum_j D_j^2 / w_j^2)``, and then
    ``sum_c D_c^2 / std_c^2 = sigma^-2``: one Gaussian mechanism of multiplier sigma, whatever the
    weights (He et al., 2023, section 4).

    Attributes:
        thresholds: C_k, float32 (groups,), on the model's device.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        max_grad_norm: float | Sequence[float],
        *,
        allocation: str = "global",
        device: torch.device | str = "cpu",
    ) -> None:
        """Share C over the groups.

        Args:
            groups: The groups.
            max_grad_norm: C, shared so that every cluster gets the same, C / sqrt(clusters), and
                its groups equal parts of that; or one threshold per group.
            allocation: Weights of the noise: ``"global"`` the same noise on every coordinate,
                ``"equal_budget"`` w = D, ``"dimension"`` w = D / sqrt(dimension).
            device: Where the thresholds live.

        Raises:
            ValueError: A threshold is not positive, or there are not as many as groups.
        """
        self.groups, self.allocation = list(groups), allocation
        self.clusters = _clusters(self.groups)
        if isinstance(max_grad_norm, (int, float)):
            each = max_grad_norm / math.sqrt(len(self.clusters))
            values = [0.0] * len(self.groups)
            for cluster in self.clusters:
                for k in cluster:
                    values[k] = each / len(cluster)
        else:
            values = [float(value) for value in max_grad_norm]
            if len(values) != len(self.groups):
                raise ValueError(
                    f"expected one threshold for each of {len(self.groups)} groups, got "
                    f"{len(values)}: {[g.name for g in self.groups][:4]}..."
                )
        if not all(value > 0 for value in values):
            raise ValueError(f"expected thresholds above 0, got {sorted(values)[:3]}")
        self.thresholds = torch.tensor(values, dtype=torch.float32, device=device)
        self._values: list[float] = []
        self._values_of: tuple[int, int] | None = None

    @property
    def sensitivity(self) -> float:
        """C: how far one unit can move all sums together."""
        return math.sqrt(sum(d * d for d in self._sensitivities()))

    def _sensitivities(self) -> list[float]:
        # Read only when they have changed: that waits for all of a GPU's work.
        version = (id(self.thresholds), self.thresholds._version)
        if self._values_of != version:
            self._values, self._values_of = self.thresholds.double().tolist(), version
        values = self._values
        return [sum(values[k] for k in cluster) for cluster in self.clusters]

    def _parameters(self, cluster: Iterable[int]) -> dict[nn.Parameter, None]:
        return dict.fromkeys(
            part.layer.parameter(local)
            for k in cluster
            for part in self.groups[k].parts
            for local in part.names
        )

    def noise_std(self, sigma: float) -> dict[nn.Parameter, float]:
        """Return the noise's standard deviation of each parameter's sum."""
        reach = self._sensitivities()
        if not sigma:
            # Thresholds may be infinite then, and zero times that is no number.
            return dict.fromkeys(self._parameters(range(len(self.groups))), 0.0)
        params = [self._parameters(cluster) for cluster in self.clusters]
        weights = [1.0] * len(reach)
        if self.allocation == "equal_budget":
            weights = list(reach)
        elif self.allocation == "dimension":
            weights = [
                d / math.sqrt(sum(p.numel() for p in own))
                for d, own in zip(reach, params, strict=True)
            ]
        norm = math.sqrt(sum((d / w) ** 2 for d, w in zip(reach, weights, strict=True)))
        return {
            param: sigma * weight * norm
            for weight, own in zip(weights, params, strict=True)
            for param in own
        }

    def adapt(self, below: Tensor, rule: AdaptiveThresholds) -> None:
        """Move the thresholds.

        Args:
            below: (groups,) noisy fraction of units under each threshold.
            rule: Quantile and step.
        """
        self.thresholds *= torch.exp(-rule.eta * (below.to(self.thresholds) - rule.quantile))


def _clusters(groups: Sequence[Group]) -> list[list[int]]:
    """Indices of groups, joined where they share a parameter."""
    root = list(range(len(groups)))

    def find(k: int) -> int:
        while root[k] != k:
            k = root[k]
        return k

    owner: dict[nn.Parameter, int] = {}
    for group in groups:
        for part in group.parts:
            for local in part.names:
                first = owner.setdefault(part.layer.parameter(local), group.index)
                root[find(group.index)] = find(first)
    joined: dict[int, list[int]] = {}
    for group in groups:
        joined.setdefault(find(group.index), []).append(group.index)
    return list(joined.values())
