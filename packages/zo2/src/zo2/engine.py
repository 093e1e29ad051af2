"""The engine of a zeroth-order run: measure, commit, evaluate, save."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from zo2.fingerprint import hash_tensor
from zo2.history import History
from zo2.log import FLUSH, LogError, UpdateLog
from zo2.objective import Objective, Weighted, as_objectives
from zo2.resume import check_run, open_run, restore_records

if TYPE_CHECKING:
    from shared_kernels.offload import OffloadEngine, WeightStore

    from zo2.config import OffloadConfig, ZOConfig
    from zo2.materializer import Materializer
    from zo2.pending import PendingRecords

__all__ = ["Estimate", "ZOEngine", "ZOStep"]


@dataclass(frozen=True)
class Estimate:
    """A measured step that has not been applied.

    Attributes:
        loss: Mean of the losses at θ ± εz over directions, float32 without dimensions.
        g: Projected gradient of each direction, float32 (q,), g = (ℓ₊ - ℓ₋) / 2ε.
        step: Index of the step whose directions were used.
    """

    loss: torch.Tensor
    g: torch.Tensor
    step: int

    def __add__(self, other: Estimate) -> Estimate:
        """Accumulate: losses and projected gradients add up, under the same directions."""
        if other.step != self.step:
            raise ValueError(
                f"estimates of step {self.step} and step {other.step} use different directions "
                "and cannot be added"
            )
        return Estimate(self.loss + other.loss, self.g + other.g, self.step)

    def scaled(self, factor: float) -> Estimate:
        """Multiply loss and projected gradient."""
        return Estimate(self.loss * factor, self.g * factor, self.step)


@dataclass(frozen=True)
class ZOStep:
    """An applied step: its loss and g (device tensors, read them when you need them), and seed."""

    loss: torch.Tensor
    g: torch.Tensor
    seed: int
    step: int


class ZOEngine:
    """Fine-tunes a model with forward passes alone, its blocks streamed through the device.

    Made by :func:`zo2.prepare` or :func:`zo2.from_pretrained`. The model stays usable: called
    directly, it computes with the current weights, read-only and without gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        zo: ZOConfig,
        offload: OffloadConfig | None,
        *,
        engine: OffloadEngine,
        materializer: Materializer,
        pending: PendingRecords,
        header: Callable[[dict[str, str]], dict[str, Any]],
        decay: set[str],
    ) -> None:
        """Wire the parts together; use :func:`zo2.prepare`."""
        self.model, self.zo, self.offload = model, zo, offload
        self.decay_parameters = decay
        self._engine, self._materializer, self._pending = engine, materializer, pending
        self._history = History()
        self._make_header, self._header = header, None
        self._rewritten = self._closed = False
        self._modules = list(model.modules())

    # -- training --------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self._engine.device

    @property
    def global_step(self) -> int:
        """Number of steps committed."""
        return self._pending.step

    @property
    def shifts_labels(self) -> bool:
        """Whether the model's loss leaves out the first label of a sequence, as decoders do."""
        model: Any = self.model
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        return getattr(base, "loss_type", None) in (None, "ForCausalLM")

    @property
    def log(self) -> UpdateLog | None:
        """The update log, if the run keeps one."""
        return self._history.log

    @torch.no_grad()
    def estimate(
        self,
        objective: Objective | Mapping[str, Any] | Sequence[Weighted],
        *,
        random: bool | None = None,
    ) -> Estimate:
        """Measure the losses at θ ± εz; nothing is applied.

        Args:
            objective: A batch for the model, with labels; or a function that takes the model and
                returns a number, which need not be differentiable (an F1 score, a reward to
                minimise). It runs once for each direction and sign. Or pairs of functions and
                weights, whose weighted sum is measured with one load of each block.
            random: Whether both signs must see the same random draws (dropout, sampling). Default:
                yes, except for a batch in eval mode, where a model draws nothing.

        Raises:
            TypeError: The objective returns something that is not one real number.
        """
        self._check_open()
        micro = as_objectives(
            objective, self.device, self.zo.micro_batch_size, shifted=self.shifts_labels
        )
        probes = [
            (self._measured(function), (direction, sign))
            for direction in range(self.zo.q)
            for function, _ in micro
            for sign in (1, -1)
        ]
        self._materializer.begin_step()
        if random is None:
            random = self.zo.train_mode or not isinstance(objective, Mapping)
        with self._mode():
            losses = self._engine.lockstep(probes, random=random)
        dtype = torch.promote_types(losses[0].dtype, torch.float32)
        # A number times a tensor needs no copy to the device, which the host would wait for.
        weights = [weight for _ in range(self.zo.q) for _, weight in micro for _ in (1, -1)]
        parts = [x.to(dtype) * weight for x, weight in zip(losses, weights, strict=True)]
        pairs = torch.stack(parts).view(self.zo.q, len(micro), 2)
        plus, minus = pairs.sum(1).unbind(-1)
        g = ((plus - minus) / (2 * self.zo.eps)).float()
        return Estimate((plus + minus).mean().float() / 2, g, self.global_step)

    def commit(self, estimate: Estimate, *, lr: float, weight_decay: float | None = None) -> ZOStep:
        """Apply a measured step: record it; blocks take it up at their next visit.

        Args:
            estimate: From :meth:`estimate`, or a sum of such under the same directions.
            lr: Learning rate of this step.
            weight_decay: λ; default the configured one.

        Raises:
            FloatingPointError: The losses of two steps in a row were not finite.
        """
        self._check_open()
        if estimate.step != self.global_step:
            raise ValueError(
                f"the estimate belongs to step {estimate.step}, the engine is at "
                f"{self.global_step}: an estimate can be committed once"
            )
        decay = self.zo.weight_decay if weight_decay is None else weight_decay
        seed = self._pending.seed
        ok = self._pending.append(estimate.g, lr, decay, self.zo.clip_g)
        self._history.add(estimate.step, seed, lr, decay, estimate.g, ok)
        return ZOStep(estimate.loss, estimate.g, seed, estimate.step)

    def step(
        self,
        objective: Objective | Mapping[str, Any] | Sequence[Weighted],
        *,
        lr: float,
        weight_decay: float | None = None,
    ) -> ZOStep:
        """Measure and apply one step; see :meth:`estimate` and :meth:`commit`."""
        return self.commit(self.estimate(objective), lr=lr, weight_decay=weight_decay)

    def _measured(self, function: Objective) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            value = function(self.model)
            if isinstance(value, torch.Tensor):
                if value.numel() != 1 or value.is_complex():
                    raise TypeError(
                        "the objective must return one real number, got a tensor of shape "
                        f"{tuple(value.shape)} and dtype {value.dtype}"
                    )
                return value.detach().reshape(()).to(self.device)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(
                    f"the objective must return one real number, got {type(value).__name__}"
                )
            return torch.full((), float(value), dtype=torch.float64, device=self.device)

        return run

    def _mode(self) -> AbstractContextManager:
        return nullcontext() if self.zo.train_mode else _eval_mode(self._modules)

    # -- reading ---------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, function: Callable[[nn.Module], Any] | list[Callable]) -> Any:
        """Run a function of the model with the current weights, in eval mode.

        Args:
            function: Called with the model; or a list of such functions, one for each
                micro-batch of an evaluation set, which then share every load of a block.

        Returns:
            What the function returns; for a list, the list of their results.
        """
        self._check_open()
        with _eval_mode(self._modules):
            if callable(function):
                return function(self.model)
            probes = [(lambda f=f: f(self.model), None) for f in function]
            return self._engine.lockstep(probes, training=False)

    def generate(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Call the model's ``generate`` with the current weights; the KV cache stays near."""
        generate: Any = self.model.generate
        return self.evaluate(lambda _: generate(*args, **kwargs))

    def flush(self) -> None:
        """Fold all pending updates into the stores and wait until they and the log are written."""
        self._check_open()
        behind = any(v < self.global_step for v in self._store.version)
        if behind:
            self._history.flush_record(self.global_step, self._pending.flush_seed)
        self._engine.flush()
        self._history.drain(wait=True)

    def sync(self) -> None:
        """Wait until every committed step is in the log; raises what those steps raise."""
        self._history.drain(wait=True)

    @property
    def _store(self) -> WeightStore:
        return self._engine.store

    @torch.no_grad()
    def state_dict(
        self, block: int | None = None, *, dtype: torch.dtype | None = None
    ) -> dict[str, torch.Tensor]:
        """Copy the current weights to host tensors.

        Args:
            block: Index of one unit; default the whole model, with its buffers and tied names.
            dtype: Default: each parameter's own. ``torch.float32`` gives the master weights.
        """
        self._check_open()
        units = self._engine.plan.units if block is None else (self._engine.plan.units[block],)
        weights: dict[str, torch.Tensor] = {}
        for unit in units:
            weights |= self._materializer.read(self._engine, unit.index, dtype)
        if block is not None:
            return weights
        named = dict(self.model.named_parameters(remove_duplicate=False))
        canonical = {id(p): n for n, p in self.model.named_parameters()}
        full = {n: weights[canonical[id(p)]] for n, p in named.items()}
        for name, buffer in self.model.named_buffers():
            owner, _, leaf = name.rpartition(".")
            if leaf not in self.model.get_submodule(owner)._non_persistent_buffers_set:
                full[name] = buffer.detach().cpu().clone()
        return full

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:
        """Save as ``model.save_pretrained`` does, with the current weights.

        Adapters of a PEFT model are saved alone, as PEFT does.
        """
        if not hasattr(self.model, "save_pretrained"):
            raise TypeError(
                f"{type(self.model).__name__} has no save_pretrained; use engine.state_dict()"
            )
        self.sync()
        save: Any = self.model.save_pretrained
        save(folder, state_dict=self.state_dict(), **kwargs)

    def stats(self) -> dict[str, Any]:
        """Counts and bytes: steps, skipped steps, visits, uploads, memory of every kind."""
        ring, store = self._engine.ring, self._store
        resident = sum(store.layouts[k].nbytes for k in store.on_device)
        return {
            "step": self.global_step,
            "skipped": self._history.skipped,
            "blocks": len(self._engine.plan.blocks),
            "blocks_streamed": len(store.streamed),
            "block_rule": self._engine.plan.rule,
            "visits": sum(self._engine.visits.values()),
            "uploads": sum(ring.uploads.values()),
            "uploaded_bytes": ring.uploaded_bytes,
            "downloaded_bytes": ring.downloaded_bytes,
            "host_bytes": store.host_nbytes,
            "host_registered": store.registered,
            "ring_bytes": ring.nbytes,
            "resident_bytes": resident,
            "compute_bytes": self._materializer.nbytes,
            "log_bytes": self.log.path.stat().st_size if self.log is not None else 0,
        }

    # -- log and outside changes -----------------------------------------------------------------

    def open_log(self, path: str | Path) -> None:
        """Record the run in a ``.zolog`` from its first step; an existing log is continued.

        An engine at step 0 first replays the log's updates, so its model must be the base the log
        was started from. A log this engine has written before is opened again.

        Raises:
            LogError: The log belongs to another model or run, or its updates are not those this
                engine has made.
            RuntimeError: A log is open, or there is none of the steps made so far.
        """
        self._check_open()
        if self.log is not None:
            raise RuntimeError(f"the log {self.log.path} is open; close it first")
        if self._rewritten or (self._header is None and self.global_step):
            raise RuntimeError(
                "a log must record every change since the base weights, and this engine's weights "
                "were changed without one; save the model and prepare it anew"
            )
        self._history.drain(wait=True)
        log = open_run(Path(path), self._run_header())
        try:
            updates = int(((log.records["flags"] & FLUSH) == 0).sum())
            if self.global_step == 0:
                restore_records(self._engine, self._materializer, log)
            elif updates != self.global_step:
                raise LogError(
                    f"{path} holds {updates} updates, this engine has made {self.global_step}; "
                    "prepare the base model anew to continue the log"
                )
        except BaseException:
            log.close()
            raise
        self._history.log = log

    def check_log(self, path: str | Path) -> None:
        """Check that a log was started from the weights and settings of this engine.

        Raises:
            LogError: It was not; the message says what differs.
        """
        self._check_open()
        with UpdateLog.open(path) as log:
            check_run(log, self._run_header())

    def _run_header(self) -> dict[str, Any]:
        if self._header is None:
            self._header = self._make_header(self._hashes())
        return self._header

    def _hashes(self) -> dict[str, str]:
        found: dict[str, str] = {}
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            for unit in self._engine.plan.units:
                names = [p.name for p in unit.params if p.trainable]
                values = self._materializer.read(self._engine, unit.index, None)
                digests = pool.map(hash_tensor, [values[name] for name in names])
                found.update(zip(names, digests, strict=True))
        return found

    def close_log(self) -> None:
        """Write the steps made so far to the log and close it; the engine goes on without."""
        self._history.close()

    @torch.no_grad()
    def rewrite(self, function: Callable[[nn.Module], Any]) -> Any:
        """Let a function overwrite the model's weights, as ``load_state_dict`` does.

        For its time the parameters hold the current weights in host memory. No log can express
        what it does, so none may be open, and none can be opened afterwards.

        Args:
            function: Called with the model; it must change parameters in place.

        Raises:
            RuntimeError: A log is open, or the function replaced parameters.
        """
        self._check_open()
        if self.log is not None:
            raise RuntimeError("a log cannot express overwritten weights; call close_log() first")
        weights, engine = self.state_dict(), self._engine
        params = dict(self.model.named_parameters())
        # Loaders ask for the state dict, which is refused while weights are elsewhere.
        hooks = self.model._state_dict_pre_hooks
        self.model._state_dict_pre_hooks = type(hooks)()
        try:
            for name, param in params.items():
                param.data = weights[name]
            result = function(self.model)
            now = dict(self.model.named_parameters())
            if {n: id(p) for n, p in now.items()} != {n: id(p) for n, p in params.items()}:
                raise RuntimeError("parameters were replaced; they can only be changed in place")
            engine.ring.evict()
            for unit in engine.plan.units:
                home = self._store.home(unit.index)
                home.layout.write(home.flat, {p.name: p.parameter.detach() for p in unit.params})
                self._store.version[unit.index] = self.global_step
            self._materializer.forget()
            self._rewritten = True
        finally:
            self.model._state_dict_pre_hooks = hooks
            for unit in engine.plan.units:
                engine._unbind(unit.index)
        return result

    # -- the end ---------------------------------------------------------------------------------

    def close(self) -> None:
        """Finish the log and take the engine off the model. The model's weights are gone with it.

        Use :meth:`restore` to get an ordinary model back.
        """
        if self._closed:
            return
        self._history.close()
        self._engine.close()
        self._store.close()
        self._closed = True

    def restore(self, device: torch.device | str = "cpu") -> nn.Module:
        """Put the current weights back into the model as ordinary parameters, and close."""
        weights = {
            p.name: self._materializer.read(self._engine, unit.index, None)[p.name]
            for unit in self._engine.plan.units
            for p in unit.params
        }
        self.close()
        for name, param in self.model.named_parameters():
            param.data = weights[name].to(device)
        return self.model.to(device)

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this engine is closed; prepare the model again")

    def __enter__(self) -> ZOEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _eval_mode(AbstractContextManager):
    """Eval mode for a while; every module's own mode comes back afterwards."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self._training = [m for m in modules if m.training]

    def __enter__(self) -> None:
        for module in self._training:
            module.training = False

    def __exit__(self, *_: object) -> None:
        for module in self._training:
            module.training = True
