"""The privacy engine: makes a model, an optimizer and a loader private."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from flashdp.accounting import Accountant, Mechanism, adaptive_split, calibrate, mechanism_of
from flashdp.attach import find_layers, private_parameters, restore, take_over
from flashdp.collector import Collector
from flashdp.errors import PrivacyError
from flashdp.groups import AdaptiveThresholds, Calibration, make_groups
from flashdp.independence import Independence
from flashdp.losses import LossReplacement
from flashdp.noise import ClippedSum, NoiseSource
from flashdp.optim import AdamWBC
from flashdp.report import report_of
from flashdp.sharding import empty_sum, first_element, is_sharded, like_parameter
from flashdp.units import units_of_call

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from flashdp.config import AccountantKind, Grouping
    from flashdp.report import PrivacyReport

__all__ = ["PrivacyEngine"]

BATCH_KEYS = ("dp_mask", "dp_rows", "dp_last", "dp_batch")


class PrivacyEngine:
    """Trains with differential privacy: per-layer clipping inside the backward pass, one Gaussian.

    Three lines make an ordinary loop private::

        engine = PrivacyEngine()
        model, optimizer, loader = engine.make_private_with_epsilon(
            model, optimizer, loader, target_epsilon=8, target_delta=1e-6, steps=1000,
            max_grad_norm=1.0, expected_batch_size=256, sample_rate=256 / 1_000_000,
        )
        for batch in loader:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    The loss must be a sum over units (or, with ``loss_reduction="mean"``, their mean over the rows
    of the batch). Losses of transformers' causal language models are replaced by one that is.
    """

    def __init__(
        self,
        *,
        accountant: AccountantKind = "pld",
        secure_rng: bool = True,
        seed: int | None = None,
    ) -> None:
        """Make an engine for one run.

        Args:
            accountant: ``"pld"`` or ``"rdp"``.
            secure_rng: Draw noise from ChaCha20 with a key of the operating system.
            seed: For repeatable runs, with ``secure_rng=False``; such a run is not private.
        """
        self.accountant = Accountant(accountant)
        self.noise = NoiseSource(secure=secure_rng, seed=seed)
        self.collector: Collector | None = None
        # Of the last step's noise in each parameter's gradient.
        self.noise_std: dict[nn.Parameter, float] = {}
        self._model: nn.Module | None = None
        self._removers: list[Any] = []
        self._loader: Any = None
        self._last = True
        self._started = False

    # -- attaching -------------------------------------------------------------------------------

    def make_private(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        data_loader: Any = None,
        *,
        noise_multiplier: float,
        max_grad_norm: float | Sequence[float],
        expected_batch_size: float,
        sample_rate: float | None = None,
        mechanism: Mechanism | None = None,
        grouping: Grouping = "module",
        clipping: str = "abadi",
        stability: float = 0.01,
        thresholds: AdaptiveThresholds | None = None,
        noise_allocation: str = "global",
        loss_reduction: str = "sum",
        strategy: str = "auto",
        fallback: bool = False,
        check_independence: bool = True,
    ) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        """Attach to a model and its optimizer; all three are returned as given, changed in place.

        Args:
            model: The model. Its trainable parameters must all be covered by a rule.
            optimizer: Any optimizer of exactly those parameters.
            data_loader: A Poisson loader (`flashdp.poisson_data_loader`); its mask and unit rows
                are read at every batch, and none counts twice. None: batches come from elsewhere,
                and that each is run backward once is up to the caller.
            noise_multiplier: sigma, noise over sensitivity.
            max_grad_norm: C for one unit's whole contribution, or one threshold per group.
            expected_batch_size: B, the public constant by which sums are divided.
            sample_rate: q of Poisson sampling. None, without a loader that knows it, claims no
                amplification: every unit may be in every step.
            mechanism: What the accountant counts, instead of the two above.
            grouping: ``"param"``, ``"module"``, ``"block"`` or ``"flat"``.
            clipping: ``"abadi"``: min(1, C/n); ``"automatic"``: C / (n + stability).
            stability: Of automatic clipping.
            thresholds: Let the thresholds follow a quantile.
            noise_allocation: ``"global"``, ``"equal_budget"`` or ``"dimension"``.
            loss_reduction: ``"sum"`` if the loss is a sum over units, ``"mean"`` if it is the mean
                over the rows of the physical batch.
            strategy: How matrices' norms are taken: ``"gram"``, ``"recompute"``, ``"spill"``, or
                ``"auto"``.
            fallback: Allow one gradient per row where no rule fits.
            check_independence: Run :meth:`validate` on the first batch. The report says if not.

        Raises:
            PrivacyError: Something trainable is not covered, or mixes units.
            ValueError: An option is out of range, or the optimizer holds other parameters.
        """
        if self._model is not None:
            raise RuntimeError("this engine has a model already; make one engine per run")
        _check(noise_multiplier=noise_multiplier, expected_batch_size=expected_batch_size)
        for name, value, choices in (
            ("loss_reduction", loss_reduction, ("sum", "mean")),
            ("grouping", grouping, ("param", "module", "block", "flat")),
            ("clipping", clipping, ("abadi", "automatic")),
            ("noise_allocation", noise_allocation, ("global", "equal_budget", "dimension")),
            ("strategy", strategy, ("auto", "gram", "recompute", "spill")),
        ):
            if value not in choices:
                raise ValueError(f"{name}: {value!r} is none of {', '.join(choices)}")
        found = find_layers(model, fallback=fallback)
        layers = [layer for layer, _ in found]
        self._parameters = private_parameters(layers, optimizer)
        groups = make_groups(model, layers, grouping)
        device = next(iter(self._parameters)).device
        self.calibration = Calibration(
            groups, max_grad_norm, allocation=noise_allocation, device=device
        )
        self.noise_multiplier, self.expected_batch_size = noise_multiplier, expected_batch_size
        self.loss_reduction, self.adaptive = loss_reduction, thresholds
        self.grouping, self.clipping = grouping, clipping
        self._sigma, self._sigma_counts = noise_multiplier, 0.0
        if thresholds is not None and noise_multiplier:
            self._sigma, self._sigma_counts = adaptive_split(
                noise_multiplier, len(groups), thresholds.share
            )
        self.mechanism = mechanism or mechanism_of(noise_multiplier, sample_rate, data_loader)
        self.collector = Collector(
            layers,
            groups,
            clipping=clipping,
            stability=stability,
            strategy=_strategy(strategy),
            count=thresholds is not None,
        )
        self.collector.thresholds = self.calibration.thresholds
        take_over(found, self.collector)
        self._model, self._loader = model, data_loader
        self.independence = Independence(self, wanted=check_independence)
        self._hook(model, optimizer)
        return model, optimizer, data_loader

    def make_private_with_epsilon(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        data_loader: Any = None,
        *,
        target_epsilon: float,
        target_delta: float,
        steps: int,
        sample_rate: float | None = None,
        **kwargs: Any,
    ) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        """As :meth:`make_private`, with the noise that ``steps`` steps need.

        Args:
            model: The model.
            optimizer: Its optimizer.
            data_loader: A Poisson loader, or None.
            target_epsilon: To be reached after ``steps`` steps.
            target_delta: Its delta.
            steps: Number of optimizer steps.
            sample_rate: q; default: the loader's.
            **kwargs: See :meth:`make_private`.
        """
        rate = sample_rate if sample_rate is not None else getattr(data_loader, "sample_rate", None)
        # The loader knows whether it cuts large draws, which costs something.
        as_drawn = mechanism_of(1.0, rate, data_loader)
        sigma = calibrate(
            target_epsilon,
            target_delta,
            sample_rate=as_drawn.sample_rate,
            steps=steps,
            kind=self.accountant.kind,
            sampling=as_drawn.sampling,
            dataset_size=as_drawn.dataset_size,
            truncated_batch_size=as_drawn.truncated_batch_size,
        )
        return self.make_private(
            model, optimizer, data_loader, noise_multiplier=sigma, sample_rate=rate, **kwargs
        )

    def _hook(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        def before_forward(module: nn.Module, args: Any, kwargs: Any) -> Any:
            return self._before_forward(args, kwargs)

        def before_step(optimizer: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            # The optimizer itself is the first argument.
            if any(value is not None for value in (*args[1:], *kwargs.values())):
                raise PrivacyError("a closure would run the batch again unaccounted; pass none")
            held = (p for group in optimizer.param_groups for p in group["params"])
            if strangers := [p for p in held if p.grad is not None and p not in self._parameters]:
                raise PrivacyError(
                    f"{len(strangers)} parameters of the optimizer, the first of shape "
                    f"{tuple(strangers[0].shape)}, have a gradient that was not made private: they "
                    "were unfrozen or added after make_private; decide what trains before it"
                )
            self._before_step()
            inner = getattr(optimizer, "optimizer", optimizer)
            if isinstance(inner, AdamWBC):
                inner.set_noise(self.noise_std)

        def after_step(*_: Any) -> None:
            for param in self._parameters:
                param.grad = None

        # Before hooks that gather a sharded model: it is called within, to be probed.
        self._removers.append(
            model.register_forward_pre_hook(before_forward, with_kwargs=True, prepend=True)
        )
        for param, name in self._parameters.items():
            param.grad = None
            hook = functools.partial(_leaked, name=name)
            self._removers.append(param.register_post_accumulate_grad_hook(hook))
        self._removers.append(optimizer.register_step_pre_hook(before_step))
        self._removers.append(optimizer.register_step_post_hook(after_step))
        self.loss = LossReplacement(model)
        self._removers.append(self.loss)

    def validate(
        self, batch: Any, *, loss: Callable[[Any, Any], Tensor] | None = None, other: Any = None
    ) -> None:
        """Check by numbers that no unit's data moves another unit's gradients.

        Half of the units get other data, then the other half; the rest's gradients of every layer
        may move by rounding only. Runs in the model's present mode, changes neither model, engine
        nor random state. Unasked, the first batch is checked so, up to a loss outside the model.

        Args:
            batch: What the model is called with, of 2 units or more: a mapping, a tuple or a
                tensor, rows first; or what ``loss`` takes.
            loss: ``loss(model, batch)``; default: the output's loss, or a sum over its rows.
            other: A batch of the same shapes to take other data from; default: rows turned around.

        Raises:
            PrivacyError: Units are coupled; layers, units, cause and remedy are named.
            ValueError: The batch has one unit, or cannot show anything.
        """
        self.independence.validate(batch, loss, other)

    def detach(self) -> None:
        """Give the model and the optimizer back as they were; what was gathered is dropped."""
        if self._model is None:
            return
        for remover in self._removers:
            remover.remove()
        restore(self._model)
        self._removers, self._model, self.collector = [], None, None

    # -- a step ----------------------------------------------------------------------------------

    def _before_forward(self, args: Any, kwargs: dict[str, Any]) -> Any:
        given = {key: kwargs[key] for key in BATCH_KEYS if key in kwargs}
        rest = {key: value for key, value in kwargs.items() if key not in given}
        if not torch.is_grad_enabled() or self.collector is None:
            return args, rest
        mean = self.loss_reduction == "mean"
        if self.independence.running:
            # Padding rows are rows too: what they do to others would be seen.
            given.pop("dp_mask", None)
            self.collector.begin(units_of_call(args, rest, given, mean=mean))
            return args, rest
        current = getattr(self._loader, "current", None)
        if not given and current is not None:
            given = {
                "dp_mask": current.mask, "dp_rows": current.rows, "dp_last": current.last,
                "dp_batch": current.serial,
            }  # fmt: skip
            if current.first and self.collector.batch != current.serial:
                # A step that was broken off is drawn anew.
                self.collector.abandon()
        self._last = bool(given.get("dp_last", True))
        units = units_of_call(args, rest, given, mean=mean)
        self.independence.before(args, rest, units, given.get("dp_rows"))
        self.collector.begin(units, given.get("dp_batch"))
        return args, rest

    @torch.no_grad()
    def _before_step(self) -> None:
        """Account for a step and put noised means into ``p.grad``.

        In the middle of a logical batch there is nothing to do: without gradients an optimizer
        leaves its parameters alone.
        """
        if self.collector is None or not self._last:
            return
        if _distributed() and not self._started:
            self.noise.agree()
        self._started = True
        step = self.accountant.steps
        # Counted before anything is released, so that no crash can forget it.
        self.accountant.step(self.mechanism)
        sums, below = self.collector.take(), self.collector.below
        self.collector.below = None
        std = self.calibration.noise_std(self._sigma)
        self.noise_std = {p: s / self.expected_batch_size for p, s in std.items()}
        parts = (self._part(p, sums, uid, std[p]) for uid, p in enumerate(self._parameters))
        grads = self.noise.noised(parts, step=step, divisor=self.expected_batch_size)
        for param, grad in zip(self._parameters, grads, strict=True):
            param.grad = like_parameter(grad, param) if is_sharded(param) else grad
        if self.adaptive is not None:
            self._adapt(below, step)

    def _part(
        self, param: nn.Parameter, sums: dict[nn.Parameter, Tensor], uid: int, std: float
    ) -> ClippedSum:
        """Take a parameter's sum over all ranks, or this rank's part of it, out of ``sums``."""
        total, sharded = sums.pop(param, None), is_sharded(param)
        if total is None:
            total = empty_sum(param)
        if _distributed() and not sharded:
            torch.distributed.all_reduce(total)
        start = first_element(param) if sharded else 0
        return ClippedSum(total, uid, std, param.dtype, start)

    def _adapt(self, below: Tensor | None, step: int) -> None:
        assert self.adaptive is not None
        thresholds = self.calibration.thresholds
        total = torch.zeros_like(thresholds) if below is None else below
        if _distributed():
            torch.distributed.all_reduce(total)
        # Centred counts: half of the expected batch is what zero stands for.
        counts = [ClippedSum(total, 0, self._sigma_counts, total.dtype)]
        (share,) = self.noise.noised(
            counts, step=step, divisor=self.expected_batch_size, counts=True
        )
        self.calibration.adapt(share + 0.5, self.adaptive)

    # -- what was spent --------------------------------------------------------------------------

    def get_epsilon(self, delta: float) -> float:
        """Return epsilon of the steps taken so far."""
        return self.accountant.epsilon(delta)

    def report(self, delta: float, **kwargs: Any) -> PrivacyReport:
        """Return what the steps so far guarantee; see :func:`flashdp.report.report_of`."""
        return report_of(self, delta, **kwargs)

    @property
    def coverage(self) -> dict[str, str]:
        """The rule that covers each private parameter, by name."""
        assert self.collector is not None
        return {
            full: layer.rule for layer in self.collector.layers for full in layer.names.values()
        }

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold: the steps accounted for, and the thresholds. No key."""
        return {
            "accountant": self.accountant.state_dict(),
            "thresholds": self.calibration.thresholds.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a run: its past steps stay accounted for, its noise key is a fresh one.

        Raises:
            PrivacyError: The state has other clipping groups, or this engine uses a seed.
        """
        if not self.noise.secure:
            raise PrivacyError(
                "a resumed run with the same seed would use the same noise again on other data: "
                "give the engine another seed and build the state anew, or use secure_rng=True"
            )
        thresholds = torch.tensor(state["thresholds"]).to(self.calibration.thresholds)
        if thresholds.shape != self.calibration.thresholds.shape:
            raise PrivacyError(
                f"the state has {len(thresholds)} clipping groups, this run "
                f"{len(self.calibration.thresholds)}"
            )
        self.accountant.load_state_dict(state["accountant"])
        self.calibration.thresholds.copy_(thresholds)


def _leaked(param: Tensor, name: str) -> None:
    if param.grad is None:
        return
    param.grad = None
    raise PrivacyError(
        f"autograd put a gradient into {name!r} past its private layer: the parameter is "
        "used outside the module that owns it; freeze it, or register a rule"
    )


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _strategy(name: str) -> Any:
    from flashdp.planner import choose

    return choose if name == "auto" else lambda record, units: name


def _check(*, noise_multiplier: float, expected_batch_size: float) -> None:
    if not (0 <= noise_multiplier < math.inf):
        raise ValueError(f"noise_multiplier: expected at least 0, got {noise_multiplier}")
    if not (0 < expected_batch_size < math.inf):
        raise ValueError(
            f"expected_batch_size: expected above 0, got {expected_batch_size}; it is the public "
            "constant that sums are divided by"
        )
