"""SAM as an optimizer around any other (arXiv:2010.01412, arXiv:2102.11600)."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels._checks import message
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization: step by the gradient of the worst weights nearby.

    A step takes two gradients. `first_step` moves the weights by ``rho T^2 g / (|T g| + c)`` with
    ``T = 1``, or ``|w|`` with ``adaptive``; the gradient is taken there, `second_step` puts the
    weights back, bit for bit, and the base optimizer steps by it:

        loss(model(x), y).backward()
        optimizer.first_step(zero_grad=True)
        loss(model(x), y).backward()
        optimizer.second_step(zero_grad=True)

    or, with the first gradient there, ``optimizer.step(closure)`` where the closure takes the
    second. The norm is over all parameters together, is summed in float32 at least, and stays on
    the device. The base optimizer's weight decay is of the weights, not of the moved ones.

    Names and arguments are those of davda54/sam. State and parameter groups are the base
    optimizer's, so that what is saved goes on, and schedules of the learning rate are seen by both;
    also where the base optimizer is stepped or loaded by itself.

    Args:
        params: Parameters, or groups, which may have ``rho`` and ``adaptive`` of their own.
        base_optimizer: Class of the optimizer that steps, or what else makes it of groups and
            options: ``SAM(made.param_groups, lambda groups: made)`` takes one that is there.
        rho: Radius of the neighbourhood: about 0.05, or 0.5 to 2 with ``adaptive``.
        adaptive: ASAM: each weight is measured by its own size.
        perturb_decay: Move by the gradient of the loss with the groups' ``weight_decay``.
        norm_eps: c.
        base: Options of the base optimizer.

    Attributes:
        base_optimizer: That steps.

    Raises:
        ValueError: A radius that is negative or not finite.
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: Callable[..., torch.optim.Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        perturb_decay: bool = False,
        norm_eps: float = 1e-12,
        **base: Any,
    ) -> None:
        # has the groups until the base optimizer does
        self.base_optimizer: Any = SimpleNamespace()
        super().__init__(params, {"rho": rho, "adaptive": adaptive, **base})
        for group in self.param_groups:
            if not 0 <= group["rho"] < math.inf:
                remedy = "0.05 is usual, and 0.5 to 2 with adaptive"
                raise ValueError(message("rho", "a number of at least 0", group["rho"], remedy))
        self.perturb_decay, self.norm_eps = perturb_decay, norm_eps
        self._saved: list[tuple[Tensor, Tensor]] | None = None
        self.base_optimizer = base_optimizer(self.param_groups, **base)
        self.defaults.update(self.base_optimizer.defaults)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Parameters and their options."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """What the base optimizer keeps of each parameter."""
        return self.base_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base_optimizer.state = state

    @property
    def perturbed(self) -> bool:
        """Whether weights are between the two steps."""
        return self._saved is not None

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> Tensor:
        """Move the weights to the worst ones nearby, by the gradient that is there.

        Args:
            zero_grad: Forget the gradient afterwards.

        Returns:
            The gradient's norm, as `grad_norm` has it; where it is not finite, `restore` puts
            back weights that were moved to nowhere.

        Raises:
            RuntimeError: The weights are moved already.
            ValueError: A sparse gradient.
        """
        if self._saved is not None:
            raise RuntimeError("first_step: the weights are moved already; call second_step first")
        norm = self.grad_norm()
        # before anything moves, so that what is stopped half way can be restored
        saved = self._saved = []
        for group in self.param_groups:
            parameters = _with_gradient(group)
            if not parameters:
                continue
            before = [torch.empty_like(p) for p in parameters]
            torch._foreach_copy_(before, parameters)
            saved += zip(parameters, before, strict=True)
            moves = self._scaled_gradients(group, parameters)
            if group["adaptive"]:
                torch._foreach_mul_(moves, torch._foreach_abs(parameters))
            scale = group["rho"] / (norm + self.norm_eps)
            for place in {p.device for p in parameters}:
                own = [n for n, p in enumerate(parameters) if p.device == place]
                found = [moves[n] for n in own]
                torch._foreach_mul_(found, scale.to(place))
                torch._foreach_add_([parameters[n] for n in own], found)
        if zero_grad:
            self.zero_grad()
        return norm

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Put the weights back, and step by the gradient that is there now.

        Args:
            zero_grad: Forget the gradient afterwards.

        Raises:
            RuntimeError: The weights are not moved.
        """
        self.restore()
        self.base_optimizer.step()
        # schedules look whether an optimizer has stepped
        self._opt_called = True
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def restore(self) -> None:
        """Put the weights back without a step, as where a gradient is not finite.

        Raises:
            RuntimeError: The weights are not moved.
        """
        if self._saved is None:
            raise RuntimeError("second_step: the weights are not moved; call first_step before it")
        if self._saved:
            parameters, before = zip(*self._saved, strict=True)
            torch._foreach_copy_(list(parameters), list(before))
        self._saved = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take both steps, the first by the gradient that is there.

        Args:
            closure: Takes the gradient at the moved weights, and may return the loss.

        Raises:
            ValueError: No closure.
        """
        if closure is None:
            remedy = "or call first_step and second_step"
            raise ValueError(message("closure", "what takes the second gradient", None, remedy))
        self.first_step(zero_grad=True)
        with torch.enable_grad():
            loss = closure()
        self.second_step()
        return loss

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """Return ``|T g|`` over all parameters, 0-dimensional and float32 at least."""
        norms: list[Tensor] = []
        for group in self.param_groups:
            parameters = _with_gradient(group)
            if parameters:
                moves = self._scaled_gradients(group, parameters, copied=group["adaptive"])
                for move in moves:
                    wide = torch.promote_types(move.dtype, torch.float32)
                    norms.append(torch.linalg.vector_norm(move, dtype=wide))
        if not norms:
            return torch.zeros(())
        return torch.linalg.vector_norm(torch.stack([n.to(norms[0]) for n in norms]))

    def _scaled_gradients(
        self, group: dict[str, Any], parameters: list[Tensor], *, copied: bool = True
    ) -> list[Tensor]:
        """Return ``T g`` of a group, with weight decay if it counts; copies if asked for."""
        found = [p.grad for p in parameters if p.grad is not None]
        decay = group.get("weight_decay", 0.0) if self.perturb_decay else 0.0
        if decay:
            found = list(torch._foreach_add(found, parameters, alpha=decay))
        elif copied:
            found = [x.clone() for x in found]
        if group["adaptive"]:
            torch._foreach_mul_(found, torch._foreach_abs(parameters))
        return found

    # --- what is saved ---------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state.

        Raises:
            RuntimeError: The weights are moved, and would be saved so beside it.
        """
        if self._saved is not None:
            raise RuntimeError("state_dict: the weights are moved; call second_step before it")
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the base optimizer's state."""
        self.base_optimizer.load_state_dict(state_dict)


def _with_gradient(group: dict[str, Any]) -> list[Tensor]:
    """Return the parameters of a group that have a gradient.

    Raises:
        ValueError: One is sparse.
    """
    found = [p for p in group["params"] if p.grad is not None]
    for p in found:
        if p.grad.is_sparse:
            remedy = "make the embedding with sparse=False"
            raise ValueError(message("params", "dense gradients", "a sparse one", remedy))
    return found
