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
        temperature: Of both laws in distillation, tau; its term is multiplied by its square.
        schedule_span: Of which part of the whole schedule this run is, from 0 to 1: weights of a
            second stage go on where those of the first ended.

    Raises:
        ValueError: A weight outside of its range, or a span that is none.
    """

    kd_weight: tuple[float, float] = field(default=(1.0, 0.75))
    mtp_weight: tuple[float, float] = field(default=(0.3, 0.1))
    temperature: float = field(default=1.0)
    schedule_span: tuple[float, float] = field(default=(0.0, 1.0))

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, most in (("kd_weight", 1), ("mtp_weight", math.inf), ("schedule_span", 1)):
            pair = getattr(self, name)
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
