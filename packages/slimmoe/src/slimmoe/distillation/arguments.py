"""Options of a distillation."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from shared_kernels._checks import message
from transformers import TrainingArguments


@dataclass
class DistillationArguments(TrainingArguments):
    """Those of transformers, and weights of losses.

    Attributes:
        kd_weight: Of distillation against the loss of the language model, lambda, at the begin and
            at the end of the run; between them it moves evenly.
        mtp_weight: Of each module of multi-token prediction, beta, at the begin and at the end;
            between them it moves on half a cosine. 0 and 0 leave the modules as they are.
        mtp_kd_weight: Of distillation in modules of multi-token prediction; None for that of the
            model, as in the paper.
        temperature: Of both laws in distillation, tau; its term is multiplied by its square.
        schedule_span: Of which part of the whole schedule this run is, from 0 to 1: weights of a
            second stage go on where those of the first ended.
        router_aux_loss_coef: Of the loss that evens out the load of experts, alpha; by default that
            of the model's configuration. 0 is without.
        balance_ahead: Whether a step's batches are looked through before the first of them, so that
            loads are those of the whole step for all; see `LoadBalancing`.
        check_teacher: Whether to refuse, at the first step, a teacher that is far worse at the
            labels than an even law, and before that one whose tokens have other ids.

    Raises:
        ValueError: A weight outside of its range, a span that is none, or a search for parameters
            that are not used, which cannot see the loss.
    """

    kd_weight: tuple[float, float] = field(default=(1.0, 0.75))
    mtp_weight: tuple[float, float] = field(default=(0.3, 0.1))
    mtp_kd_weight: tuple[float, float] | None = field(default=None)
    temperature: float = field(default=1.0)
    schedule_span: tuple[float, float] = field(default=(0.0, 1.0))
    router_aux_loss_coef: float | None = field(default=None)
    balance_ahead: bool = field(default=False)
    check_teacher: bool = field(default=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        bounds = {"kd_weight": 1, "mtp_weight": math.inf, "mtp_kd_weight": 1, "schedule_span": 1}
        for name, most in bounds.items():
            pair = getattr(self, name)
            if pair is None:
                continue
            if isinstance(pair, int | float):
                pair = (float(pair), float(pair))
            if len(pair) != 2:
                raise ValueError(message(name, "two numbers", pair, "at the begin and at the end"))
            if not all(0 <= value <= most for value in pair):
                remedy = "at the begin and at the end"
                raise ValueError(message(name, f"numbers from 0 to {most}", pair, remedy))
            setattr(self, name, tuple(map(float, pair)))
        if not self.schedule_span[0] < self.schedule_span[1]:
            remedy = "a part of the run"
            raise ValueError(message("schedule_span", "a rising pair", self.schedule_span, remedy))
        if not self.temperature > 0:
            remedy = "1 in the paper"
            raise ValueError(message("temperature", "a positive number", self.temperature, remedy))
        if self.ddp_find_unused_parameters:
            # what is used behind the model's own forward would be taken for unused
            given, remedy = self.ddp_find_unused_parameters, "all parameters are used"
            raise ValueError(message("ddp_find_unused_parameters", "False", given, remedy))
        self.ddp_find_unused_parameters = False
        given = self.router_aux_loss_coef
        if given is not None and not 0 <= given < math.inf:
            remedy = "0 is without"
            raise ValueError(message("router_aux_loss_coef", "a number from 0", given, remedy))
