"""An optimizer that knows how much of a private gradient is noise."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

__all__ = ["AdamWBC"]


class AdamWBC(Optimizer):
    """AdamW whose second moment is that of the gradient without its noise.

    The noise, whose variance Phi is public, adds Phi to the second moment: where it dominates, Adam
    divides by a constant, and is SGD with momentum. Here ``m / (sqrt(max(v - Phi, f Phi)) + eps)``
    takes the place of ``m / (sqrt(v) + eps)``, both moments corrected for their start. Thresholds
    that move are followed: Phi is averaged as v is. Source: Tang, Shpilevskiy and Lecuyer,
    "DP-AdamBC: Your DP-Adam Is Actually DP-SGD (Unless You Apply Bias Correction)", AAAI 2024, with
    the decay of AdamW and a floor relative to Phi. It only works on what is private already, so it
    costs nothing of the budget.

    Make it, then hand it to `PrivacyEngine.make_private` (or to a trainer,
    ``optimizers=(optimizer, None)``), which tells it the variance at every step. Without noise it
    is AdamW. Moments are kept in float32, also of 16-bit parameters: 8 bytes a parameter.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        floor: float = 0.05,
    ) -> None:
        """As `torch.optim.AdamW`.

        Args:
            params: Parameters, named parameters, or groups.
            lr: Learning rate. What suited AdamW on the same noise is too large: steps grow by up to
                1 / sqrt(floor).
            betas: Decay of the two moments.
            eps: Added to the denominator.
            weight_decay: Decoupled.
            floor: f, the smallest second moment in units of Phi; above 0. The estimate of v has an
                error of about ``sqrt(2 (1 - beta2) / (1 + beta2)) Phi``, 0.03 by default.

        Raises:
            ValueError: An option is out of range.
        """
        for name, value, fine in (
            ("lr", lr, 0 <= lr < math.inf),
            ("betas", betas, all(0 <= beta < 1 for beta in betas)),
            ("eps", eps, 0 < eps < math.inf),
            ("weight_decay", weight_decay, 0 <= weight_decay < math.inf),
            ("floor", floor, 0 < floor < math.inf),
        ):
            if not fine:
                raise ValueError(f"{name}: {value!r} is out of range")
        options = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "floor": floor
        }  # fmt: skip
        self._noise: Mapping[Tensor, float] = {}
        super().__init__(params, options)

    def set_noise(self, std: Mapping[Tensor, float]) -> None:
        """Say how much noise is in the gradients of the next steps.

        Args:
            std: Standard deviation of each parameter's, on every coordinate; 0 for what is missing.
        """
        self._noise = std

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take a step.

        Args:
            closure: Refused: it would run a batch again that is accounted for once.
        """
        if closure is not None:
            raise ValueError("a closure would run the batch again unaccounted; pass none")
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(group, params)

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        (beta1, beta2), lr = group["betas"], group["lr"]
        grads, first, second, starts, noises = [], [], [], [], []
        for param in params:
            state, grad = self.state[param], param.grad
            assert grad is not None
            grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
            if not state:
                state.update(
                    step=0, exp_avg=torch.zeros_like(grad), exp_avg_sq=torch.zeros_like(grad),
                    noise_sq=0.0,
                )  # fmt: skip
            state["step"] += 1
            variance = self._noise.get(param, 0.0) ** 2
            state["noise_sq"] = beta2 * state["noise_sq"] + (1 - beta2) * variance
            grads.append(grad)
            first.append(state["exp_avg"])
            second.append(state["exp_avg_sq"])
            start = 1 - beta2 ** state["step"]
            starts.append(start)
            noises.append(state["noise_sq"] / start)
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        scale: Any = torch._foreach_div(second, starts)
        torch._foreach_sub_(scale, noises)
        torch._foreach_clamp_min_(scale, [group["floor"] * noise for noise in noises])
        torch._foreach_sqrt_(scale)
        torch._foreach_add_(scale, group["eps"])
        update: Any = torch._foreach_div(first, scale)
        rates = [lr / (1 - beta1 ** self.state[p]["step"]) for p in params]
        torch._foreach_mul_(update, rates)
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        for param, change in zip(params, update, strict=True):
            param.sub_(change)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the base class's, which would give moments the dtype of their parameters."""
        super().load_state_dict(state_dict)
        saved, own = state_dict["state"], self.state
        ids = [k for group in state_dict["param_groups"] for k in group["params"]]
        held = [p for group in self.param_groups for p in group["params"]]
        for k, param in zip(ids, held, strict=True):
            for name in ("exp_avg", "exp_avg_sq"):
                if k in saved:
                    own[param][name] = saved[k][name].to(param.device, copy=True)
