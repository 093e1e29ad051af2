"""A Trainer of transformers whose loss is a language model's and that of distillation."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels._checks import message
from shared_kernels.ops.distill import fused_linear_distillation_heads, sparse_distillation
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, Trainer

from slimmoe.distillation.logit_cache import INDEX, TeacherLogitCache
from slimmoe.distillation.rows import IGNORED, documents, labels_of, targets
from slimmoe.distillation.schedules import cosine, linear
from slimmoe.distillation.teacher import Teacher, check_head
from slimmoe.mtp.files import write_modules
from slimmoe.mtp.modeling_mtp import MTPHead

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping

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
    accumulated batches are as one.

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
        ValueError: Weights that are sharded over processes, which is not supported.
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
        if isinstance(model, str | Path):
            folder = model
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
        super().__init__(model, args, **options)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("args: weights that are sharded over processes are not supported")
        if mtp is not None:
            self._student.add_module(_NAME, mtp.to(self.args.device))
        self.teacher = teacher.to(self.args.device) if isinstance(teacher, Teacher) else teacher
        # losses are sums over what `num_items_in_batch` counts
        self.model_accepts_loss_kwargs = True
        self._seen: dict[str, list[Tensor]] = {}

    @property
    def _student(self) -> Any:
        """The model, without what processes wrap it into."""
        return self.model

    @property
    def mtp(self) -> MTPHead | None:
        """Modules of multi-token prediction that are trained."""
        return getattr(self._student, _NAME, None)

    # --- the loss --------------------------------------------------------------------------------

    @property
    def weights(self) -> tuple[float, float]:
        """Weights of distillation and of modules now."""
        args: Any = self.args
        begin, end = args.schedule_span
        share = self.state.global_step / max(1, self.state.max_steps)
        share = begin + (end - begin) * min(1.0, share)
        return linear(share, *args.kd_weight), cosine(share, *args.mtp_weight)

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

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        counted = [self._targets(batch, 0)[0].ne(IGNORED).sum() for batch in batch_samples]
        if not counted:
            return None
        found = torch.stack(counted).sum().to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            found = self.accelerator.gather(found).sum()
        return found

    @staticmethod
    def _targets(inputs: Mapping[str, Any], depth: int) -> tuple[Tensor, Tensor]:
        return targets(labels_of(inputs), documents(inputs), depth)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the loss of a batch; see ``Trainer.compute_loss``."""
        args: Any = self.args
        student: Any = self.accelerator.unwrap_model(model)
        known = {key: value for key, value in inputs.items() if key not in ("labels", INDEX)}
        with _last_hidden(student) as seen:
            outputs = model(**known, use_cache=False, logits_to_keep=1)
        hidden, head = [seen[0]], self.mtp
        kd_weight, mtp_weight = self.weights
        if head is not None and mtp_weight:
            mask = known.get("attention_mask")
            hidden += head(seen[0], known["input_ids"], mask, known.get("position_ids"))
        pairs = [self._targets(inputs, depth) for depth in range(len(hidden))]
        common: dict[str, Any] = {
            "temperature": args.temperature, "num_items": num_items_in_batch,
            "kd_weight": kd_weight,
        }  # fmt: skip
        head_weights = [1.0, *[mtp_weight] * (len(hidden) - 1)]
        states = [given.flatten(0, 1) for given in hidden]
        weight = student.get_output_embeddings().weight
        if isinstance(self.teacher, TeacherLogitCache):
            size = known["input_ids"].shape[1]
            said = self._said(inputs, size, weight.device)
            heads = [
                self._sparse(given, weight, said, labels, rows, common)
                for given, (labels, rows) in zip(states, pairs, strict=True)
            ]
            terms = [share * head.loss for share, head in zip(head_weights, heads, strict=True)]
            loss = torch.stack(terms).sum()
        else:
            found = fused_linear_distillation_heads(
                states, weight, self.teacher(known).flatten(0, 1), self.teacher.weight,
                [labels for labels, _ in pairs], rows=[rows for _, rows in pairs],
                head_weights=head_weights, **common,
            )  # fmt: skip
            loss, heads = found.loss, found.heads
        if not torch.isfinite(loss.detach()):
            raise FloatingPointError(
                f"loss: {float(loss.detach())} at step {self.state.global_step}; look for a rate "
                "of learning that is too high, or for data or weights that are not finite"
            )
        if model.training:
            self._note(heads, num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # what processes have is averaged afterwards
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

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

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        if INDEX not in columns:
            columns.append(INDEX)

    def _note(self, heads: Any, num_items: Any) -> None:
        steps = 1 if num_items is not None else self.args.gradient_accumulation_steps
        for depth, head in enumerate(heads):
            before = f"mtp{depth}_" if depth else ""
            # of drawn tokens only the cross entropy is known
            terms = ("kl", "entropy", "agreement") if head.kl is not None else ("cross_entropy",)
            for name in ("lm", *terms):
                value = getattr(head, name).detach() / steps
                self._seen.setdefault(before + name, []).append(value)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the terms of the loss, too, each a mean over steps since the last time."""
        if "loss" in logs and self._seen:
            steps = max(1, len(self._seen["lm"]) // self.args.gradient_accumulation_steps)
            for name, values in self._seen.items():
                logs[name] = float(torch.stack(values).sum()) / steps
            logs["kd_weight"], mtp_weight = self.weights
            if self.mtp is not None:
                logs["mtp_weight"] = mtp_weight
            self._seen.clear()
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
            write_modules(output_dir or str(self.args.output_dir), head)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        target: Any = self._student if model is None else model
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            resume_from_checkpoint, dtype=target.dtype
        )
        state = loaded.state_dict()
        if self.mtp is not None:
            head = MTPHead.from_pretrained(resume_from_checkpoint, loaded)
            state |= {f"{_NAME}.{key}": value for key, value in head.state_dict().items()}
        target.load_state_dict(state)


def _later(rate: Callable[[int], float], first: int, step: int) -> float:
    return rate(first + step)


@contextmanager
def _last_hidden(model: Any) -> Generator[list[Tensor]]:
    """Give a list that the model's last hidden states are put into when it runs."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        seen.append(output.last_hidden_state)

    handle = model.get_decoder().register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()
