"""A Trainer of transformers whose loss is a language model's and that of distillation."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels._checks import message
from shared_kernels.ops.distill import fused_linear_distillation_heads, sparse_distillation
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, Trainer

from slimmoe.distillation.alignment import (
    TeacherCheck,
    diagnosis,
    tokenizer_of,
    warn_of_student,
)
from slimmoe.distillation.balancing import LoadBalancing, row_masks
from slimmoe.distillation.balancing import not_finite as router_not_finite
from slimmoe.distillation.head import in_place_of_head
from slimmoe.distillation.logit_cache import TeacherLogitCache
from slimmoe.distillation.rows import IGNORED, INDEX, documents, labels_of, targets
from slimmoe.distillation.schedules import cosine, linear
from slimmoe.distillation.teacher import Teacher, check_head
from slimmoe.mtp.files import write_modules
from slimmoe.mtp.modeling_mtp import MTPHead

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from shared_kernels.ops.distill.api import Distillation
    from torch import Tensor

    from slimmoe.distillation.arguments import DistillationArguments

#: What modules of MTP are called in the model while it is trained.
_NAME = "mtp_head"


class DistillationTrainer(Trainer):
    """Trains a student on its data and on what a teacher says of it.

    ``(1 - lambda) LM + lambda KD``, and for each module of multi-token prediction as much times
    beta (arXiv:2605.08738, section 3.3). The teacher's logits are made once for all of them, and
    none are there as a whole. Sums are divided by the number of predicted tokens of a step, so that
    accumulated batches, and those of several processes, are as one. The load of a student's experts
    is evened out by a loss of its own; see `LoadBalancing`. With several processes, DDP and FSDP2
    are supported (``fsdp`` of the arguments); a teacher is there as a whole in each of them.

    Args:
        model: The student: a folder, a name on the Hub, or a model of transformers. Modules of MTP
            of a folder are trained with it.
        teacher_model: A folder or a name, a model, a `Teacher`, or a `TeacherLogitCache` whose
            ``attach`` has made the dataset.
        args: Options.
        mtp: Modules of a model that is in memory.
        options: Of ``Trainer``.

    Raises:
        UnsupportedModelError: Logits of either are scaled, capped or have a bias.
        ValueError: Weights that are sharded by DeepSpeed or by FSDP's first version, or copied to
            several GPUs by one process, which is not supported; a teacher whose tokens have other
            ids; or a coefficient for experts that have no such loss.
    """

    def __init__(
        self,
        model: Any,
        teacher_model: Any,
        args: DistillationArguments,
        *,
        mtp: MTPHead | None = None,
        **options: Any,
    ) -> None:
        folder = model if isinstance(model, str | Path) else None
        if folder is not None:
            model = AutoModelForCausalLM.from_pretrained(folder)
            if mtp is None and Path(folder).is_dir() and MTPHead.is_in(folder, model.config):
                mtp = MTPHead.from_pretrained(folder, model)
        check_head(model, "model")
        teacher = teacher_model
        if isinstance(teacher, TeacherLogitCache):
            if teacher.temperature != args.temperature:
                remedy = "its law was written down at another"
                raise ValueError(
                    message("temperature", teacher.temperature, args.temperature, remedy)
                )
        elif not isinstance(teacher, Teacher):
            loads = isinstance(teacher, str | Path)
            teacher = Teacher.from_pretrained(teacher) if loads else Teacher(teacher)
        if args.check_teacher:
            known = tokenizer_of(options.get("processing_class") or folder)
            teacher.check_tokenizer(known)
        super().__init__(model, args, **options)
        if self.is_deepspeed_enabled:
            raise ValueError("args: DeepSpeed is not supported; FSDP2 shards weights as well: fsdp")
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            raise ValueError(message("fsdp_config", "version 2", 1, "version 1 is not supported"))
        if self.args.n_gpu > 1:
            raise ValueError("args: several GPUs need as many processes; start with torchrun")
        if mtp is not None:
            self._student.add_module(_NAME, mtp.to(self.args.device))
            if not any(args.mtp_weight):
                # processes wait for the gradients of all that has one
                mtp.requires_grad_(False)
        self.teacher = teacher.to(self.args.device) if isinstance(teacher, Teacher) else teacher
        # losses are sums over what `num_items_in_batch` counts
        self.model_accepts_loss_kwargs = True
        self.balancing = LoadBalancing(
            self._student, self._trained, args.router_aux_loss_coef, self._add_up
        )
        self._check = TeacherCheck() if args.check_teacher else None
        self._first = args.check_teacher
        self._seen: dict[str, list[Tensor]] = {}
        self._steps = 0

    @property
    def _student(self) -> Any:
        """The model, without what processes wrap it into."""
        return self.model

    @property
    def mtp(self) -> MTPHead | None:
        """Modules of multi-token prediction that are saved with the model."""
        return getattr(self._student, _NAME, None)

    @property
    def _trained(self) -> MTPHead | None:
        args: Any = self.args
        return self.mtp if any(args.mtp_weight) else None

    def _add_up(self, tensor: Tensor) -> Tensor:
        """Return the sum over processes."""
        return self.accelerator.reduce(tensor, "sum") if self.args.world_size > 1 else tensor

    # --- schedules -------------------------------------------------------------------------------

    @property
    def weights(self) -> tuple[float, float, float]:
        """Weights now: of distillation, of modules, and of distillation in them."""
        args: Any = self.args
        begin, end = args.schedule_span
        share = self.state.global_step / max(1, self.state.max_steps)
        share = begin + (end - begin) * min(1.0, share)
        inside = args.kd_weight if args.mtp_kd_weight is None else args.mtp_kd_weight
        return (
            linear(share, *args.kd_weight), cosine(share, *args.mtp_weight), linear(share, *inside),
        )  # fmt: skip

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Return a schedule of the rate of learning: that of the whole run, from where this begins.

        Args:
            num_training_steps: Of this run.
            optimizer: Whose rate it is.
        """
        args: Any = self.args
        begin, end = args.schedule_span
        if (begin, end) == (0.0, 1.0) or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        whole = round(num_training_steps / (end - begin))
        made = super().create_scheduler(whole, optimizer)
        if not isinstance(made, LambdaLR):
            remedy = "a schedule that depends on the step alone, such as cosine"
            raise ValueError(
                message("lr_scheduler_type", remedy, type(made).__name__, "for stages")
            )
        first = round(begin * whole)
        rates: list[Any] = [partial(_later, rate, first) for rate in made.lr_lambdas]
        for group in made.optimizer.param_groups:
            # what the first schedule has set it to
            group["lr"] = group.pop("initial_lr")
        self.lr_scheduler = LambdaLR(made.optimizer, rates)
        return self.lr_scheduler

    # --- batches ---------------------------------------------------------------------------------

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """Return the batches of a step and their number of tokens; see ``Trainer``."""
        batches, count = super().get_batch_samples(*args, **kwargs)
        if batches:
            self._steps += 1
        if batches and self.balancing.coefficient:
            self._begin(batches)
        return batches, count

    def _begin(self, batches: list[Any]) -> None:
        """Tell the load of experts what step begins."""
        args: Any = self.args
        masks = [torch.stack([mask.sum() for mask in self._masks(batch)]) for batch in batches]
        rows = torch.stack(masks).sum(0).to(args.device)
        if args.average_tokens_across_devices:
            rows = self._add_up(rows)
        ahead = list(map(self._chosen, batches[1:])) if args.balance_ahead else []
        self.balancing.begin(rows.tolist(), len(batches), ahead or None)

    @torch.no_grad()
    def _chosen(self, batch: Any) -> Tensor:
        """Return how often a batch's tokens choose each expert."""
        inputs: Any = self._prepare_inputs(batch)
        self._student.train()
        with self.balancing.watching() as routed:
            self._with_head(self._student, inputs, lambda hidden: hidden[0].new_zeros(()))
        return self.balancing.counts(routed, self._masks(inputs))

    def _masks(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        return row_masks(inputs, 0 if self._trained is None else len(self._trained.modules_))

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        counted = [self._targets(batch, 0)[0].ne(IGNORED).sum() for batch in batch_samples]
        if not counted:
            return None
        found = torch.stack(counted).sum().to(device)
        return self._add_up(found) if self.args.average_tokens_across_devices else found

    @staticmethod
    def _targets(inputs: Mapping[str, Any], depth: int) -> tuple[Tensor, Tensor]:
        return targets(labels_of(inputs), documents(inputs), depth)

    # --- the loss --------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the loss of a batch; see ``Trainer.compute_loss``."""
        pairs: list[tuple[Tensor, Tensor]] = []
        heads: list[Distillation] = []

        def distil(hidden: list[Tensor]) -> Tensor:
            pairs[:] = [self._targets(inputs, depth) for depth in range(len(hidden))]
            states = [given.flatten(0, 1) for given in hidden]
            found, heads[:] = self._distilled(inputs, states, pairs, num_items_in_batch)
            return found

        with self.balancing.watching() as routed:
            outputs, loss = self._with_head(model, inputs, distil)
        if not torch.isfinite(loss.detach()):
            asked = isinstance(self.teacher, Teacher)
            raise FloatingPointError(diagnosis(
                float(loss.detach()), self.state.global_step,
                self.teacher(inputs) if asked else None, router_not_finite(routed),
            ))  # fmt: skip
        if model.training:
            self._note(heads, num_items_in_batch)
            balance = self.balancing.loss(routed, self._masks(inputs))
            if self.balancing.coefficient:
                loss = loss + self.balancing.coefficient * balance.to(loss)
                self._note_one("load_balancing", balance, num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # what processes have is averaged afterwards
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _with_head(
        self, model: Any, inputs: Mapping[str, Any], function: Callable[[list[Tensor]], Tensor]
    ) -> tuple[Any, Tensor]:
        known = {key: value for key, value in inputs.items() if key not in ("labels", INDEX)}
        head = self._student.get_output_embeddings()
        return in_place_of_head(model, head, self._trained, known, function)

    def _distilled(
        self, inputs: Mapping[str, Any], states: list[Tensor],
        pairs: list[tuple[Tensor, Tensor]], num_items: Any,
    ) -> tuple[Tensor, Sequence[Distillation]]:  # fmt: skip
        """Return the loss of all heads together, and of each."""
        args: Any = self.args
        kd_weight, mtp_weight, inside = self.weights
        common: dict[str, Any] = {"temperature": args.temperature, "num_items": num_items}
        kd_weights = [kd_weight, *[inside] * (len(states) - 1)]
        head_weights = [1.0, *[mtp_weight] * (len(states) - 1)]
        weight = self._student.get_output_embeddings().weight
        if isinstance(self.teacher, TeacherLogitCache):
            said = self._said(inputs, inputs["input_ids"].shape[1], weight.device)
            heads = [
                self._sparse(given, weight, said, labels, rows, common | {"kd_weight": share})
                for given, (labels, rows), share in zip(states, pairs, kd_weights, strict=True)
            ]
            terms = [share * head.loss for share, head in zip(head_weights, heads, strict=True)]
            return torch.stack(terms).sum(), heads
        theirs = self.teacher(inputs).flatten(0, 1)
        if self._check is not None and not self._check.over:
            self._check.see(theirs, self.teacher.weight, pairs[0][0], IGNORED)
        found = fused_linear_distillation_heads(
            states, weight, theirs, self.teacher.weight,
            [labels for labels, _ in pairs], rows=[rows for _, rows in pairs],
            head_weights=head_weights, kd_weight=kd_weights, **common,
        )  # fmt: skip
        if self._first:
            self._first = False
            kl: Any = found.heads[0].kl
            if num_items is not None:
                # of this batch alone
                kl = kl * num_items / (pairs[0][0] != IGNORED).sum().clamp(min=1)
            warn_of_student(float(kl), len(weight))
        return found.loss, found.heads

    def _said(
        self, inputs: Mapping[str, Any], size: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        assert isinstance(self.teacher, TeacherLogitCache)
        if INDEX not in inputs:
            remedy = "cache.attach(dataset) gives them"
            raise ValueError(message("train_dataset", "rows of the cache", sorted(inputs), remedy))
        return self.teacher.rows(inputs[INDEX], size, device)

    def _sparse(
        self, states: Tensor, weight: Tensor, said: tuple[Tensor, Tensor], labels: Tensor,
        rows: Tensor, common: Mapping[str, Any],
    ) -> Distillation:  # fmt: skip
        """Return the loss of a head whose teacher is on disk."""
        assert isinstance(self.teacher, TeacherLogitCache)
        # rows without a teacher's have no label either
        tokens, numbers = (part[rows.clamp(min=0)] for part in said)
        sampled = self.teacher.sampled
        return sparse_distillation(
            states, weight, tokens, None if sampled else numbers, labels,
            weights=numbers if sampled else None, **common,
        )  # fmt: skip

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Evaluate rows without labels, too; see ``Trainer.prediction_step``."""
        return super().prediction_step(
            model, {**inputs, "labels": labels_of(inputs)}, *args, **kwargs
        )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        if INDEX not in columns:
            columns.append(INDEX)

    def _note(self, heads: Any, num_items: Any) -> None:
        for depth, head in enumerate(heads):
            before = f"mtp{depth}_" if depth else ""
            # of drawn tokens only the cross entropy is known
            terms = ("kl", "entropy", "agreement") if head.kl is not None else ("cross_entropy",)
            for name in ("lm", *terms):
                self._note_one(before + name, getattr(head, name), num_items)

    def _note_one(self, name: str, value: Tensor, num_items: Any) -> None:
        steps = 1 if num_items is not None else self.args.gradient_accumulation_steps
        self._seen.setdefault(name, []).append(value.detach() / steps)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the terms of the loss, too, each a mean over steps since the last time."""
        if "loss" in logs and self._seen:
            sums = self._add_up(torch.stack([torch.stack(v).sum() for v in self._seen.values()]))
            if not self.args.average_tokens_across_devices:
                sums = sums / self.accelerator.num_processes
            for name, value in zip(self._seen, sums.tolist(), strict=True):
                logs[name] = value / max(1, self._steps)
            logs |= self.balancing.load()
            logs["kd_weight"], mtp_weight, inside = self.weights
            if self.mtp is not None:
                logs |= {"mtp_weight": mtp_weight, "mtp_kd_weight": inside}
            self._seen.clear()
            self._steps = 0
        super().log(logs, *args, **kwargs)

    # --- files -----------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        head = self.mtp
        if head is None:
            super()._save(output_dir, state_dict)
            return
        whole = self._student.state_dict() if state_dict is None else state_dict
        plain = {key: value for key, value in whole.items() if not key.startswith(f"{_NAME}.")}
        # the plain class has no such part
        del self._student._modules[_NAME]
        try:
            super()._save(output_dir, plain)
        finally:
            self._student.add_module(_NAME, head)
        if self.args.should_save:
            before = f"{_NAME}."
            state = {key.removeprefix(before): value for key, value in whole.items()
                     if key.startswith(before)}  # fmt: skip
            write_modules(output_dir or str(self.args.output_dir), head, state)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        target: Any = self._student if model is None else model
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            resume_from_checkpoint, dtype=target.dtype
        )
        state = loaded.state_dict()
        if self.mtp is not None:
            head = MTPHead.from_pretrained(resume_from_checkpoint, loaded)
            state |= {f"{_NAME}.{key}": value for key, value in head.state_dict().items()}
        # of weights that are sharded, each process takes its part
        set_model_state_dict(target, state, options=StateDictOptions(full_state_dict=True))


def _later(rate: Callable[[int], float], first: int, step: int) -> float:
    return rate(first + step)
