"""A private training step of a causal language model beside an ordinary one and Opacus's.

All arms get the same model, batch and objective: the sum over rows of each row's mean loss. A step
is forward, backward, clipping, noise, and plain SGD.
"""

from __future__ import annotations

import importlib.util
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from shared_kernels.bench import Workload
    from torch import Tensor, nn

ORDINARY, FLASHDP = "without privacy", "flashdp"
HOOKS, GHOST = "Opacus, hooks", "Opacus, ghost clipping"

_LR, _CLIP, _SIGMA, _SEED = 1e-6, 1.0, 1.0, 0
_MOST_ERROR = 1e-4


def has_opacus() -> bool:
    """Whether Opacus is installed."""
    return importlib.util.find_spec("opacus") is not None


def workload(name: str, make: Callable[[], nn.Module], ids: Tensor) -> Workload:
    """Return one step in every way that is installed, for `shared_kernels.bench.measure`.

    Its check holds what is timed to be right: without clipping and without noise, our step's
    gradient is the ordinary one, on the first tokens of the batch.

    Args:
        name: Of the workload.
        make: Returns the model anew; its trainable parameters must not be tied, for Opacus.
        ids: int64 (rows, tokens); a row is a privacy unit.
    """
    from shared_kernels.bench import Arm, Workload

    steps = {ORDINARY: _ordinary, FLASHDP: _flashdp}
    if has_opacus():
        steps |= {HOOKS: _hooks, GHOST: _ghost}
    return Workload(
        name=name,
        arms=[Arm(name=arm, fn=build(make(), ids)) for arm, build in steps.items()],
        baseline=ORDINARY,
        check=lambda: _check(make(), ids[:2, :8]),
        params={"rows": len(ids), "tokens": ids.shape[1], "dtype": "float32"},
    )


def _losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean next-token loss of each row, (rows,)."""
    from flashdp import per_sample_loss

    return per_sample_loss(model(input_ids=ids, use_cache=False).logits[:, :-1], ids[:, 1:])


def _sgd(model: nn.Module, lr: float | None = None) -> Any:
    import torch

    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(trained, lr=_LR if lr is None else lr)


def _stepper(model: nn.Module, optimizer: Any, ids: Tensor) -> Callable[[], None]:
    def step() -> None:
        _losses(model, ids).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _ordinary(model: nn.Module, ids: Tensor) -> Callable[[], None]:
    return _stepper(model, _sgd(model), ids)


def _flashdp(model: nn.Module, ids: Tensor) -> Callable[[], None]:
    import flashdp

    optimizer = _sgd(model)
    engine = flashdp.PrivacyEngine()
    engine.make_private(
        model, optimizer, noise_multiplier=_SIGMA, max_grad_norm=_CLIP,
        expected_batch_size=len(ids),
    )  # fmt: skip
    step = _stepper(model, optimizer, ids)

    def keeps_engine() -> None:
        assert engine.collector is not None
        step()

    return keeps_engine


def _hooks(model: nn.Module, ids: Tensor) -> Callable[[], None]:
    """Every parameter has a threshold of its own, as ours have: Opacus's ``per_layer``."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPPerLayerOptimizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = GradSampleModule(model, loss_reduction="sum")
    count = sum(p.requires_grad for p in model.parameters())
    optimizer = DPPerLayerOptimizer(
        _sgd(model), noise_multiplier=_SIGMA, max_grad_norm=[_CLIP / count**0.5] * count,
        expected_batch_size=len(ids), loss_reduction="sum",
    )  # fmt: skip
    return _quiet(_stepper(wrapped, optimizer, ids))


def _ghost(model: nn.Module, ids: Tensor) -> Callable[[], None]:
    """One threshold for everything, which is all that Opacus's ghost clipping has."""
    from flashdp import per_sample_loss
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = GradSampleModuleFastGradientClipping(
            model, max_grad_norm=_CLIP, use_ghost_clipping=True, loss_reduction="sum"
        )
    optimizer = DPOptimizerFastGradientClipping(
        _sgd(model), noise_multiplier=_SIGMA, max_grad_norm=_CLIP,
        expected_batch_size=len(ids), loss_reduction="sum",
    )  # fmt: skip

    def rows(logits: Tensor, labels: Tensor) -> Tensor:
        return per_sample_loss(logits, labels)

    # What Opacus asks of a criterion besides one loss per row.
    rows.reduction = "sum"  # ty: ignore[missing-attribute]
    loss = DPLossFastGradientClipping(wrapped, optimizer, rows, loss_reduction="sum")

    def step() -> None:
        loss(wrapped(input_ids=ids, use_cache=False).logits[:, :-1], ids[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()

    return _quiet(step)


def _quiet(step: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            step()

    return run


def _check(model: nn.Module, ids: Tensor) -> None:
    """Compare our gradient, unclipped and without noise, with autograd's.

    Raises:
        AssertionError: They differ.
    """
    import flashdp

    params: list[Any] = [p for p in model.parameters() if p.requires_grad]
    _losses(model, ids).sum().backward()
    plain = [None if p.grad is None else p.grad.clone() for p in params]
    optimizer, ours = _sgd(model, lr=0.0), []
    optimizer.zero_grad()
    engine = flashdp.PrivacyEngine(secure_rng=False, seed=_SEED)
    engine.make_private(
        model, optimizer, noise_multiplier=0.0, max_grad_norm=float("inf"), expected_batch_size=1.0
    )
    # After the engine's own hook, which puts the gradients there.
    optimizer.register_step_pre_hook(lambda *_: ours.extend(p.grad.clone() for p in params))
    _losses(model, ids).sum().backward()
    optimizer.step()
    engine.detach()
    error = (
        sum(
            float((a if b is None else a - b).square().sum())
            for a, b in zip(ours, plain, strict=True)
        )
        ** 0.5
    )
    size = sum(float(b.square().sum()) for b in plain if b is not None) ** 0.5
    assert error <= _MOST_ERROR * size, f"our gradient is off by {error / size:.2e} of its norm"
