"""Settings of the trainer, under TRL's names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from shared_kernels._checks import check_choice, check_range, message
from transformers import TrainingArguments

from infsampling.config import POLICIES
from infsampling.trainer.losses import LOSS_TYPES, SCALES


@dataclass
class GRPOConfig(TrainingArguments):
    """What `transformers.TrainingArguments` has, and what GRPO needs.

    Names, meanings and defaults are those of TRL's class of this name where it has them. As there,
    ``per_device_train_batch_size`` counts completions of one backward pass, and a step has
    ``per_device_train_batch_size * gradient_accumulation_steps`` of them on each process; this must
    be a multiple of ``num_generations``, as a group stays on one process.

    Attributes:
        num_generations: Completions of each prompt, G.
        max_completion_length: Tokens of a completion at most.
        temperature: Of the draws; also what log-probabilities are taken at.
        top_p: See `SamplingConfig`.
        top_k: See `SamplingConfig`.
        min_p: See `SamplingConfig`.
        chat_template_kwargs: Further arguments of the chat template.
        num_iterations: Optimizer steps that learn from the same completions. A run that is resumed
            between two of them samples anew.
        beta: Weight of the divergence from the model at the start.
        epsilon: Of the clip.
        epsilon_high: Of the clip above; ``epsilon`` by default.
        loss_type: ``grpo``, ``bnpo``, ``dr_grpo`` or ``dapo``; see `grpo_loss`.
        scale_rewards: By the deviation of the ``group``, of the ``batch``, or ``none``.
        reward_weights: One for each reward function.
        mask_truncated_completions: Learn nothing from completions that were cut.
        use_bias_correction_kl: See `grpo_loss`.
        max_slots: Completions decoded at once; by default what fits and pays.
        memory_budget: For sampling; see `SamplingConfig`.
        policy: Which waiting completion takes a free slot.
    """

    learning_rate: float = field(default=1e-6, metadata={"help": "Initial learning rate."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two log lines."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Reward functions may want any column."}
    )
    num_generations: int = field(default=8, metadata={"help": "Completions of each prompt."})
    max_completion_length: int = field(
        default=512, metadata={"help": "Tokens of a completion at most."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Of the draws."})
    top_p: float = field(default=1.0, metadata={"help": "1 draws from all tokens."})
    top_k: int = field(default=0, metadata={"help": "0 draws from all tokens."})
    min_p: float = field(default=0.0, metadata={"help": "0 draws from all tokens."})
    chat_template_kwargs: dict[str, Any] | None = field(
        default=None, metadata={"help": "Further arguments of the chat template."}
    )
    num_iterations: int = field(
        default=1, metadata={"help": "Optimizer steps that learn from the same completions."}
    )
    beta: float = field(default=0.0, metadata={"help": "Weight of the divergence."})
    epsilon: float = field(default=0.2, metadata={"help": "Of the clip."})
    epsilon_high: float | None = field(default=None, metadata={"help": "Of the clip above."})
    loss_type: str = field(default="dapo", metadata={"help": "grpo, bnpo, dr_grpo or dapo."})
    scale_rewards: str = field(default="group", metadata={"help": "group, batch or none."})
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "One for each reward function."}
    )
    mask_truncated_completions: bool = field(
        default=False, metadata={"help": "Learn nothing from completions that were cut."}
    )
    use_bias_correction_kl: bool = field(
        default=True, metadata={"help": "Weigh the divergence by the ratio."}
    )
    max_slots: int | None = field(
        default=None, metadata={"help": "Completions decoded at once; by default what pays."}
    )
    memory_budget: float | None = field(
        default=None, metadata={"help": "Of sampling: bytes, or a share of what is free."}
    )
    policy: str = field(
        default="auto", metadata={"help": "Which waiting completion takes a free slot."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("num_generations", self.num_generations, 2, 1 << 20, "a group has two or more")
        check_range("max_completion_length", self.max_completion_length, 1, 1 << 24, "see it")
        check_range("num_iterations", self.num_iterations, 1, 1 << 20, "each learns once or more")
        check_choice("loss_type", self.loss_type, LOSS_TYPES)
        check_choice("scale_rewards", self.scale_rewards, SCALES)
        check_choice("policy", self.policy, POLICIES)
        if self.completions_per_step % self.num_generations:
            raise ValueError(
                message(
                    "num_generations",
                    "a divisor of per_device_train_batch_size * gradient_accumulation_steps = "
                    f"{self.completions_per_step}",
                    self.num_generations, "a group stays on one process; change one of the three",
                )
            )  # fmt: skip
        if not self.temperature > 0:
            raise ValueError(
                message("temperature", "a positive number", self.temperature,
                        "the likeliest token has no siblings to compare with")
            )  # fmt: skip

    @property
    def completions_per_step(self) -> int:
        """Completions of one optimizer step, on each process."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def prompts_per_step(self) -> int:
        """Prompts of one optimizer step, on each process."""
        return self.completions_per_step // self.num_generations
