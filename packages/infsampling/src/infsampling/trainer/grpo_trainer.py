"""GRPO inside `transformers.Trainer`: sample, reward, and learn from packed completions.

The stock loop keeps all that is not about the policy: optimizers, schedules, clipping, logging,
callbacks, checkpoints, resumption, several processes. Of it, one step asks for the batches that it
accumulates over; here they are made then: one rollout, its rewards, and micro batches.
"""

from __future__ import annotations

import copy
import time
from collections import Counter, defaultdict
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import torch
from shared_kernels._checks import message
from shared_kernels.models import attention_of, configs_of
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from infsampling.attention import NAME
from infsampling.config import SamplingConfig
from infsampling.sampler import InfiniteSampler
from infsampling.trainer.batches import Samples, StepSampler, micro_batches
from infsampling.trainer.logprobs import packed_logprobs
from infsampling.trainer.losses import group_advantages, grpo_loss, loss_items

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from infsampling.length_prediction import LengthPredictor
    from infsampling.trainer.config import GRPOConfig

    Reward = Callable[..., Sequence[float | None]]

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


class GRPOTrainer(Trainer):
    """Trains a policy on the rewards of its own completions.

    Each prompt is computed once, in sampling and in training. Gradients are those of the whole
    step, whatever the micro batches: sums are divided by what the step has over all processes.
    Dropout is off. Completions are a function of the weights, the seed and the step, so that a run
    that is resumed goes on as it would have.

    Args:
        model: A causal language model, or one that peft wrapped.
        reward_funcs: One or more functions, called as TRL calls them: with lists ``prompts``,
            ``completions`` (texts, or messages where the prompt is a conversation) and
            ``completion_ids``, and each further column of the data set by its name. They return a
            number for each completion; None does not count.
        args: Settings.
        train_dataset: Rows with a ``prompt``, a text or a list of messages.
        eval_dataset: The same.
        processing_class: The tokenizer.
        peft_config: Adapters to train instead of the model.
        length_predictor: Decides the order in which completions are sampled.
        **kwargs: Further arguments of `transformers.Trainer`.

    Raises:
        ValueError: Rows without a prompt, or too few of them for a step.
        UnsupportedModelError: The model cannot be sampled.
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: Reward | Sequence[Reward],
        args: GRPOConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        length_predictor: LengthPredictor | None = None,
        **kwargs: Any,
    ) -> None:
        if processing_class is None:
            raise ValueError(
                message("processing_class", "the model's tokenizer", None,
                        "AutoTokenizer.from_pretrained loads it")
            )  # fmt: skip
        if args.n_gpu > 1:
            raise ValueError(
                f"args: one process sees {args.n_gpu} GPUs, and copies of the model in one process "
                "are not supported; start a process for each with `accelerate launch`, or set "
                "CUDA_VISIBLE_DEVICES"
            )
        functions: Any = [reward_funcs] if callable(reward_funcs) else reward_funcs
        self.reward_funcs: list[Reward] = list(functions)
        weights = args.reward_weights or [1.0] * len(self.reward_funcs)
        if len(weights) != len(self.reward_funcs) or not self.reward_funcs:
            wanted = f"{len(self.reward_funcs)} numbers, one for each function"
            raise ValueError(message("reward_weights", wanted, weights, "or leave it out"))
        self.reward_weights = torch.tensor(weights, dtype=torch.float64)
        self.reference: Any = None
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        elif args.beta and not hasattr(model, "disable_adapter"):
            self.reference = copy.deepcopy(model).requires_grad_(requires_grad=False).eval()
        for module in model.modules():
            if isinstance(module, _DROPOUTS):
                module.p = 0.0
        as_they_are: Any = list
        super().__init__(
            model=model, args=args, data_collator=as_they_are, train_dataset=train_dataset,
            eval_dataset=eval_dataset, processing_class=processing_class, **kwargs,
        )  # fmt: skip
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "args: sharded weights (FSDP, DeepSpeed) are not supported; use plain data "
                "parallelism, or TRL's trainer with infsampling.integrations.trl"
            )
        # losses are divided by what the whole step has; the two names are of two versions
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True
        inner = getattr(model, "get_base_model", lambda: model)()
        self.inner = inner
        if self.reference is not None:
            self.reference.to(self.args.device)
        eos = getattr(inner.generation_config, "eos_token_id", None)
        eos = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        if processing_class.eos_token_id is not None:
            eos.append(processing_class.eos_token_id)
        self.sampler = InfiniteSampler(
            inner,
            SamplingConfig.from_trl(
                args, max_slots=args.max_slots or "auto", memory_budget=args.memory_budget,
                policy=args.policy, eos_token_id=tuple(dict.fromkeys(eos)),
            ),
            length_predictor=length_predictor,
        )  # fmt: skip
        self.tokenizer: Any = processing_class
        self._metrics: dict[str, list[float]] = defaultdict(list)
        # of the last rollout: its step, what is learned from, and log-probabilities before any step
        self._learned: tuple[int, list[Any], Tensor] | None = None
        self._old_logps: dict[int, Tensor] = {}

    # --- data --------------------------------------------------------------------------------

    @property
    def grpo(self) -> GRPOConfig:
        """The settings, as what they are."""
        return cast("GRPOConfig", self.args)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return batches of prompts: see `StepSampler`."""
        if self.train_dataset is None:
            raise ValueError("train_dataset: expected rows with a prompt, got None")
        data, args = cast("Any", self.train_dataset), self.grpo
        processes = self.accelerator.num_processes
        if len(data) < args.prompts_per_step * processes:
            raise ValueError(
                f"train_dataset: expected at least the {args.prompts_per_step * processes} prompts "
                f"of a step, got {len(data)}; repeat them, or take smaller steps"
            )
        sampler = StepSampler(
            len(data), args.prompts_per_step,
            args.gradient_accumulation_steps * args.num_iterations, processes,
            args.seed if args.data_seed is None else args.data_seed,
        )  # fmt: skip
        loader: Any = DataLoader(data, batch_sampler=sampler, collate_fn=list)
        return cast("DataLoader[Any]", self.accelerator.prepare(loader))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Sample the completions of a step; return its micro batches, and what divides the loss."""
        rows = [*islice(epoch_iterator, num_batches)]
        if not rows:
            return [], None
        args, step = self.grpo, self.state.global_step
        if self._learned is not None:
            rolled, batches, total = self._learned
            if rolled < step and rolled // args.num_iterations == step // args.num_iterations:
                return batches, total
            self._learned = None
        samples, rewards, metrics = self._rollout(rows[0], args.num_generations, training=True)
        everybody = self.accelerator.gather(rewards)
        advantages = group_advantages(
            everybody, args.num_generations, scale_rewards=args.scale_rewards
        )
        mine = self.accelerator.process_index * len(rewards)
        counted = [not (args.mask_truncated_completions and cut) for cut in samples.cut]
        batches = micro_batches(
            samples, advantages[mine : mine + len(rewards)].float().cpu(), counted,
            args.gradient_accumulation_steps,
        )  # fmt: skip
        items = sum(
            loss_items(batch["mask"], args.loss_type, args.max_completion_length)
            for batch in batches
        )
        total = self.accelerator.reduce(torch.tensor(items, device=device, dtype=torch.float64))
        groups = everybody.view(-1, args.num_generations)
        metrics |= {
            "reward": float(everybody.mean()),
            "reward_std": float(groups.std(1).mean()),
            "frac_reward_zero_std": float((groups.std(1) < 1e-6).double().mean()),
        }
        self._note(metrics)
        batches = [self._prepare_inputs(batch) for batch in batches]
        if args.beta:
            with torch.no_grad():
                for batch in batches:
                    batch["ref_logps"] = self._reference_logprobs(batch)
        self._old_logps.clear()
        if args.num_iterations > 1:
            self._learned = step, batches, total
        return batches, total

    def _rollout(
        self, rows: Sequence[dict[str, Any]], count: int, *, training: bool
    ) -> tuple[Samples, Tensor, dict[str, float]]:
        """Sample and reward completions of some rows' prompts."""
        texts: list[Any] = [row.get("prompt") for row in rows]
        for number, text in enumerate(texts):
            if not text or not isinstance(text, str | list):
                raise ValueError(
                    message(f"prompt of row {number}", "a text, or a list of messages", text,
                            "name the column 'prompt'")
                )  # fmt: skip
        ids = [self._tokenize(text) for text in texts]
        began = time.perf_counter()
        with self.accelerator.autocast():
            found = self.sampler.generate(
                ids, count, step=2 * self.state.global_step + training,
                sample_ids=self._numbers(ids, count),
            )  # fmt: skip
        # keys and values make room for activations; recording a step anew is quick
        self.sampler.close()
        seconds = time.perf_counter() - began
        per = [index for index in range(len(rows)) for _ in range(count)]
        samples = Samples(
            [ids[i] for i in per], found.completion_ids, found.logprobs,
            [reason == "length" for reason in found.finish_reason],
        )  # fmt: skip
        texts_out = self.tokenizer.batch_decode(found.completion_ids, skip_special_tokens=True)
        columns = {name: [rows[i].get(name) for i in per] for name in rows[0] if name != "prompt"}
        completions = [
            [{"role": "assistant", "content": out}] if isinstance(texts[i], list) else out
            for i, out in zip(per, texts_out, strict=True)
        ]
        rewards, metrics = self._rewards(
            prompts=[texts[i] for i in per], completions=completions,
            completion_ids=found.completion_ids, **columns,
        )  # fmt: skip
        lengths = [len(tokens) for tokens in found.completion_ids]
        metrics |= {
            "completions/mean_length": sum(lengths) / len(lengths),
            "completions/max_length": float(max(lengths)),
            "completions/clipped_ratio": sum(samples.cut) / len(lengths),
            "sampling/seconds": seconds,
            "sampling/tokens_per_second": sum(lengths) / seconds,
            "sampling/steps": float(found.stats.decode_steps),
            "sampling/slots": float(found.stats.slots),
        }
        return samples, rewards.to(self.args.device), metrics

    def _numbers(self, ids: list[list[int]], count: int) -> list[int]:
        """Number the samples of each prompt, which several processes may have."""
        first = self.accelerator.process_index * len(ids) * count
        drawn: Counter[tuple[int, ...]] = Counter()
        numbers = []
        for line in ids:
            seen = first + drawn[tuple(line)]
            numbers += range(seen, seen + count)
            drawn[tuple(line)] += count
        return numbers

    def _tokenize(self, prompt: str | list[dict[str, Any]]) -> list[int]:
        if isinstance(prompt, str):
            return list(self.tokenizer(text=prompt)["input_ids"])
        made = self.tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=True, return_dict=True,
            **(self.grpo.chat_template_kwargs or {}),
        )  # fmt: skip
        return list(made["input_ids"])

    def _rewards(self, **columns: Any) -> tuple[Tensor, dict[str, float]]:
        """Return the weighted sum of all functions, float64 ``(N,)``, and their means."""
        count, metrics, parts = len(columns["completions"]), {}, []
        for function in self.reward_funcs:
            name = getattr(function, "__name__", type(function).__name__)
            values = function(**columns)
            if len(values) != count:
                wanted = f"{count} numbers from {name}, one for each completion"
                raise ValueError(message("reward_funcs", wanted, len(values), "see GRPOTrainer"))
            part = torch.tensor(
                [float("nan") if value is None else float(value) for value in values],
                dtype=torch.float64,
            )
            metrics[f"rewards/{name}/mean"] = float(part.nanmean())
            parts.append(part)
        together = torch.stack(parts, 1)
        if bool(together.isnan().all(1).any()):
            raise ValueError(
                "reward_funcs: expected a number from at least one function for each completion, "
                "got None from all; return 0 where there is nothing to reward"
            )
        return (together * self.reward_weights).nansum(1), metrics

    # --- learning --------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Go forward and backward, both attending by our function."""
        # what checkpoints recompute in backward must attend as it did before
        with attention_of(configs_of(self.inner), NAME):
            return super().training_step(*args, **kwargs)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return this micro batch's part of the step's loss, times the number of processes."""
        args = self.grpo
        if num_items_in_batch is None:
            raise ValueError("compute_loss: expected num_items_in_batch, of get_batch_samples")
        logps, entropies = packed_logprobs(model, self.inner, inputs, args.temperature)
        mask = inputs["mask"]
        items = float(num_items_in_batch)
        old = self._old_logps.get(inputs["number"])
        if old is None and args.num_iterations > 1:
            self._old_logps[inputs["number"]] = logps.detach()
        loss = grpo_loss(
            logps, old, inputs.get("ref_logps"), inputs["advantages"].to(logps.dtype), mask,
            # nothing counts where all completions were cut
            num_items=items or 1.0, loss_type=args.loss_type, epsilon=args.epsilon,
            epsilon_high=args.epsilon_high, beta=args.beta,
            use_bias_correction_kl=args.use_bias_correction_kl,
        )  # fmt: skip
        with torch.no_grad():
            there = torch.zeros_like(mask, dtype=torch.bool)
            for row, length in enumerate(inputs["lengths"]):
                there[row, :length] = True
            noted = {"entropy": float(entropies[there].mean())}
            if old is None:
                gap = (logps - inputs["logprobs"].to(logps.dtype))[there].abs().mean()
                noted["sampling/logprob_gap"] = float(gap)
            else:
                ratio, gain = (logps - old).exp(), inputs["advantages"][:, None]
                high = args.epsilon if args.epsilon_high is None else args.epsilon_high
                cut = (ratio < 1 - args.epsilon) & (gain < 0) | (ratio > 1 + high) & (gain > 0)
                noted["clip_ratio/region_mean"] = float(cut[there].double().mean())
            if args.beta:
                d = (inputs["ref_logps"] - logps)[there]
                noted["kl"] = float((d.exp() - d - 1).mean())
            self._note(noted)
        # data parallelism takes the mean over processes
        loss = loss * self.accelerator.num_processes
        return (loss, {"logps": logps}) if return_outputs else loss

    def _reference_logprobs(self, batch: dict[str, Any]) -> Tensor:
        temperature = self.grpo.temperature
        reference = self.reference
        if reference is not None:
            with attention_of(configs_of(reference), NAME), self.accelerator.autocast():
                return packed_logprobs(reference, reference, batch, temperature)[0]
        model = cast("Any", self.model)
        with model.disable_adapter(), attention_of(configs_of(self.inner), NAME):
            return packed_logprobs(self.inner, self.inner, batch, temperature)[0]

    # --- evaluation and logs -------------------------------------------------------------------

    def evaluation_loop(
        self, dataloader: DataLoader[Any], description: str, *args: Any,
        metric_key_prefix: str = "eval", **kwargs: Any,
    ) -> EvalLoopOutput:  # fmt: skip
        """Sample a group for each prompt, and return the mean reward."""
        found, count = [], 0
        sums: dict[str, list[float]] = defaultdict(list)
        for rows in dataloader:
            _, rewards, metrics = self._rollout(rows, self.grpo.num_generations, training=False)
            found.append(self.accelerator.gather(rewards))
            count += len(rows) * self.accelerator.num_processes
            for name, value in metrics.items():
                sums[name].append(value)
        together = {name: sum(values) / len(values) for name, values in sums.items()}
        together["reward"] = float(torch.cat(found).mean()) if found else float("nan")
        nothing: Any = None
        return EvalLoopOutput(
            predictions=nothing, label_ids=None, num_samples=count,
            metrics={f"{metric_key_prefix}_{name}": value for name, value in together.items()},
        )  # fmt: skip

    def _note(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._metrics[name].append(value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the means of what was noted since the last time, too."""
        if "loss" in logs:
            logs |= {name: sum(v) / len(v) for name, v in self._metrics.items()}
            self._metrics.clear()
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return the operations of the packed tokens."""
        return 6 * inputs["input_ids"].numel() * self.inner.num_parameters()
