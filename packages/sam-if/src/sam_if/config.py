"""How a trainer takes the steps of SAM.

This module imports no torch, because command lines read it to print their help.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

Scope = Literal["global", "per_rank", "per_microbatch"]
RhoSchedule = Literal["constant", "linear", "cosine", "lr"]
BatchNormPolicy = Literal["first", "both", "frozen"]

_CHOICES = {"scope": Scope, "rho_schedule": RhoSchedule, "bn": BatchNormPolicy}


@dataclass(frozen=True, kw_only=True)
class SAMConfig:
    """Sharpness-aware minimization inside a trainer (arXiv:2010.01412, arXiv:2102.11600).

    Attributes:
        rho: Radius of the neighbourhood: about 0.05, or 0.5 to 2 with ``adaptive``.
        adaptive: ASAM: each weight is measured by its own size.
        scope: Whose gradient moves the weights. ``"global"``: that of all of a step's data, over
            accumulated batches and processes, so that neither changes a step. ``"per_rank"``: in
            each process that of its own data. ``"per_microbatch"``: each batch's own, before its
            second gradient is added to those of others: m-sharpness of the batch's size.
        rho_schedule: The radius at step t of T: ``"constant"``; ``"linear"``: times 1 - t / T;
            ``"cosine"``: times (1 + cos(pi t / T)) / 2; ``"lr"``: times the learning rate over
            that of the arguments, so that it follows warm-up and decay.
        bn: Running statistics of batch norm. ``"first"``: updated at the weights, in the first
            pass. ``"both"``: at the moved weights, too. ``"frozen"``: used and not updated, as by
            ``eval()``; the others use the batch's own in both passes.
        perturb_decay: Move by the gradient of the loss with the optimizer's ``weight_decay``.
        norm_eps: What is added to the gradient's norm.

    Raises:
        TypeError: A value of another type.
        ValueError: A value out of range, another choice, or two that exclude one another.
    """

    rho: float = 0.05
    adaptive: bool = False
    scope: Scope = "global"
    rho_schedule: RhoSchedule = "constant"
    bn: BatchNormPolicy = "first"
    perturb_decay: bool = False
    norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        """Check every field."""
        self._number("rho", "0.05 is usual, and 0.5 to 2 with adaptive")
        self._number("norm_eps", "1e-12 is usual")
        for name in ("adaptive", "perturb_decay"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(self._message(name, "true or false", "give a boolean"))
        for name, kind in _CHOICES.items():
            if getattr(self, name) not in get_args(kind):
                listed = ", ".join(map(repr, get_args(kind)))
                raise ValueError(self._message(name, f"one of {listed}", "pick one of these"))
        if self.perturb_decay and self.scope == "per_microbatch":
            remedy = "a batch's gradient is a share of a step's and decay is not: scope='global'"
            raise ValueError(
                self._message("perturb_decay", "False with scope='per_microbatch'", remedy)
            )

    def rho_factor(self, progress: float, lr_ratio: float = 1.0) -> float:
        """Return what a schedule multiplies the radius by.

        Args:
            progress: Steps that were taken, over all that will be.
            lr_ratio: The learning rate over that of the arguments.
        """
        left = 1 - min(progress, 1.0)
        if self.rho_schedule == "linear":
            return left
        if self.rho_schedule == "cosine":
            return (1 - math.cos(math.pi * left)) / 2
        return lr_ratio if self.rho_schedule == "lr" else 1.0

    def _number(self, name: str, remedy: str) -> None:
        value: Any = getattr(self, name)
        expected = "a number of at least 0"
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(self._message(name, expected, remedy))
        if not 0 <= value < math.inf:
            raise ValueError(self._message(name, expected, remedy))
        object.__setattr__(self, name, float(value))

    def _message(self, name: str, expected: str, remedy: str) -> str:
        return f"SAMConfig.{name}: expected {expected}, got {getattr(self, name)!r}; {remedy}"
