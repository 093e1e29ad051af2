"""Definitions of a zeroth-order step in plain torch, on a model that fits in memory.

`mezo_step` is MeZO's own step, with its in-place arithmetic; `exact_step` is the step that
`zo2.ZOEngine` must equal bit for bit, with offload or without: counter-based noise, out-of-place
perturbation, float32 masters, two separate full forwards, nothing deferred. Both are slow and
short, meant to be read and tested against.

Source: Malladi, Gao, Nichani, Damian, Lee, Chen, Arora, "Fine-Tuning Language Models with Just
Forward Passes", NeurIPS 2023, algorithms 1 and 2.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Generator, Iterator, Sequence

    from torch import Tensor, nn

    LossFn = Callable[[nn.Module], Tensor]


class ReferenceStep(NamedTuple):
    """What one step measured.

    Attributes:
        loss_plus: Loss of each direction at θ + eps·z, (q,).
        loss_minus: Loss of each direction at θ - eps·z, (q,).
        g: Projected gradient of each direction, (q,).
    """

    loss_plus: Tensor
    loss_minus: Tensor
    g: Tensor


def mezo_decays(name: str) -> bool:
    """Whether MeZO applies weight decay to the parameter of this name."""
    return not any(part in name for part in ("bias", "layer_norm", "layernorm"))


def trainable_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters with ``requires_grad``, in module order, tied ones once.

    Raises:
        ValueError: Nothing requires a gradient.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError(
            f"no parameter of {type(model).__name__} requires a gradient, so there is nothing to "
            "train; call requires_grad_(True) on the parameters to train"
        )
    return named


@torch.no_grad()
def mezo_perturb(
    named: Sequence[tuple[str, Tensor]], *, seed: int, scale: float, eps: float
) -> None:
    """Add ``scale``·eps·z to every parameter in place, as MeZO does.

    z is drawn by torch in the parameter's dtype and on its device, one generator over all
    parameters in order. Each product and the sum are rounded to the parameter's dtype.
    """
    for (_, param), z in zip(named, _torch_noise(named, seed), strict=True):
        param.add_(z.mul_(scale).mul_(eps))


@torch.no_grad()
def mezo_update(
    named: Sequence[tuple[str, Tensor]],
    *,
    seed: int,
    g: float,
    lr: float,
    weight_decay: float,
    decay: Collection[str] | None = None,
) -> None:
    """Apply θ ← θ - lr·(g·z + λ·θ) in place, in MeZO's order of arithmetic.

    ``decay`` names the parameters to which λ applies; ``None`` takes `mezo_decays`.
    """
    for (name, param), z in zip(named, _torch_noise(named, seed), strict=True):
        direction = z.mul_(g)
        if mezo_decays(name) if decay is None else name in decay:
            direction = direction + weight_decay * param
        param.sub_(lr * direction)


def mezo_step(
    model: nn.Module,
    loss_fn: LossFn,
    *,
    seed: int,
    eps: float = 1e-3,
    lr: float = 1e-6,
    weight_decay: float = 0.0,
) -> ReferenceStep:
    """Do one step of MeZO-SGD in place: +eps, forward, -2 eps, forward, +eps, update.

    What the in-place additions fail to restore stays in the weights, as in the original. The
    global random state is left alone; the noise equals that of ``torch.manual_seed(seed)``.

    Args:
        model: The model; its trainable parameters share one device and are updated in place.
        loss_fn: Maps the model to a scalar loss; called twice, without gradients.
        seed: Seed of the step's direction.
        eps: Perturbation scale.
        lr: Learning rate.
        weight_decay: λ; names with "bias", "layer_norm" or "layernorm" are left out.

    Returns:
        Both losses and g, each of shape (1,).
    """
    named = trainable_parameters(model)
    with _evaluating(model):
        mezo_perturb(named, seed=seed, scale=1, eps=eps)
        loss_plus = _loss(model, loss_fn)
        mezo_perturb(named, seed=seed, scale=-2, eps=eps)
        loss_minus = _loss(model, loss_fn)
        mezo_perturb(named, seed=seed, scale=1, eps=eps)
    g = (loss_plus - loss_minus) / (2 * eps)
    mezo_update(named, seed=seed, g=g.item(), lr=lr, weight_decay=weight_decay)
    return ReferenceStep(loss_plus.reshape(1), loss_minus.reshape(1), g.reshape(1))


def exact_step(
    model: nn.Module,
    loss_fn: LossFn,
    *,
    seed: int,
    eps: float = 1e-3,
    lr: float = 1e-6,
    weight_decay: float = 0.0,
    q: int = 1,
    dist: str = "gaussian",
    masters: dict[str, Tensor] | None = None,
    decay: Collection[str] | None = None,
) -> ReferenceStep:
    """Do one step of the exact arithmetic: what `zo2.ZOEngine` must equal bit for bit.

    Per element, with y the float32 master and z the counter-based noise of direction k:
    the forwards run at round(y + eps·z) and round(y - eps·z) in the parameter's dtype; then, for
    each direction in order, y ← a·y - b·z with b = (lr/q)·g_k, a = 1 - lr·λ for the first
    direction of a decaying parameter and 1 otherwise. Each operation is rounded to float32.

    Args:
        model: The model; its parameters end as the rounded new masters.
        loss_fn: Maps the model to a scalar loss; called 2q times, without gradients.
        seed: 64-bit seed of the step.
        eps: Perturbation scale.
        lr: Learning rate.
        weight_decay: λ.
        q: Directions.
        dist: ``"gaussian"`` or ``"rademacher"``.
        masters: Float32 masters by name, updated in place; empty at first, then carried from
            step to step. ``None`` starts from the parameters, which loses nothing in float32.
        decay: Names that weight decay applies to; ``None`` takes the engine's default, which is
            that of ``transformers.Trainer``.

    Returns:
        Losses and g of every direction, each of shape (q,).
    """
    from zo2._prepare import decay_parameters

    named = trainable_parameters(model)
    decaying = decay_parameters(model, "exact") if decay is None else set(decay)
    masters = {} if masters is None else masters
    losses: dict[int, list[Tensor]] = {1: [], -1: []}
    with torch.no_grad(), _evaluating(model):
        for name, param in named:
            if name not in masters:
                masters[name] = param.detach().to(torch.float32, copy=True)
        for k in range(q):
            for sign, found in losses.items():
                for name, param in named:
                    shift = _noise(name, param, seed, k, dist).mul_(eps)
                    param.copy_(masters[name] + shift if sign > 0 else masters[name] - shift)
                loss = _loss(model, loss_fn)
                found.append(loss.to(torch.promote_types(loss.dtype, torch.float32)))
        loss_plus, loss_minus = torch.stack(losses[1]), torch.stack(losses[-1])
        g = ((loss_plus - loss_minus) / (2 * eps)).float()
        rate = torch.tensor(lr, dtype=torch.float32)
        shrink = 1 - rate * torch.tensor(weight_decay, dtype=torch.float32)
        for name, param in named:
            y = masters[name]
            if name in decaying:
                y.mul_(shrink)
            for k in range(q):
                y.sub_(_noise(name, param, seed, k, dist).mul_(rate / q * g[k]))
            param.copy_(y)
    return ReferenceStep(loss_plus, loss_minus, g)


def _noise(name: str, param: Tensor, seed: int, direction: int, dist: str) -> Tensor:
    from shared_kernels.random import noise, param_uid

    z = noise(
        param.numel(),
        seed=seed,
        uid=param_uid(name),
        direction=direction,
        dist=dist,
        device=param.device,
    )
    return z.view(param.shape)


def _torch_noise(named: Sequence[tuple[str, Tensor]], seed: int) -> Iterator[Tensor]:
    device = named[0][1].device
    generator = torch.Generator(device).manual_seed(seed)
    for name, param in named:
        if param.device != device:
            raise ValueError(
                f"expected all trainable parameters on {device}, got {name} on {param.device}; "
                "move the model to one device"
            )
        yield torch.normal(
            0.0, 1.0, tuple(param.shape), generator=generator, device=device, dtype=param.dtype
        )


def _loss(model: nn.Module, loss_fn: LossFn) -> Tensor:
    with torch.no_grad():
        loss = torch.as_tensor(loss_fn(model))
    if loss.numel() != 1:
        raise ValueError(
            f"expected loss_fn to return a scalar, got shape {tuple(loss.shape)}; reduce it with "
            "mean() or sum()"
        )
    return loss.detach().reshape(())


@contextmanager
def _evaluating(model: nn.Module) -> Generator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
