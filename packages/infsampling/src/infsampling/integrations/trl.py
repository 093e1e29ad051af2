"""Rollouts for TRL's `GRPOTrainer`, through its own `rollout_func`.

```python
from infsampling.integrations.trl import SamplingConfig, make_rollout_func

rollout = make_rollout_func(SamplingConfig(max_slots="auto"))
trainer = GRPOTrainer(..., rollout_func=rollout)
```
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from infsampling.config import SamplingConfig
from infsampling.keys import prompt_uid
from infsampling.sampler import InfiniteSampler

if TYPE_CHECKING:
    from collections.abc import Callable

    from infsampling.length_prediction import LengthPredictor
    from infsampling.output import SamplingStats

__all__ = ["RolloutFunction", "SamplingConfig", "make_rollout_func"]

#: What decides the samples comes from the trainer, all else from the configuration.
_OURS = {
    "max_slots", "max_prompt_tokens", "logprobs", "policy", "turn", "park_limit", "memory_budget",
    "max_resident_prompts", "sync_every", "rerank_every", "prefill_chunk", "compile", "cuda_graph",
}  # fmt: skip


def make_rollout_func(
    config: SamplingConfig | None = None, length_predictor: LengthPredictor | None = None
) -> RolloutFunction:
    """Return a ``rollout_func`` for `trl.GRPOTrainer`.

    Temperature, filters, the completion's length and the seed are those of the trainer's
    `GRPOConfig`; slots, memory and policy those of the configuration.

    Args:
        config: Settings of the sampler.
        length_predictor: Decides the order of samples.

    Raises:
        ImportError: TRL is not installed.
    """
    if importlib.util.find_spec("trl") is None:
        raise ImportError("make_rollout_func needs TRL; pip install 'infsampling[trl]'")
    return RolloutFunction(config or SamplingConfig(), length_predictor)


class RolloutFunction:
    """What `make_rollout_func` returns: called with prompts, each repeated for its completions.

    Attributes:
        stats: `SamplingStats` of the last call.
    """

    def __init__(self, config: SamplingConfig, length_predictor: LengthPredictor | None) -> None:
        self.config, self.length_predictor = config, length_predictor
        self.stats: SamplingStats | None = None
        self._sampler: InfiniteSampler | None = None
        self._step: tuple[int, bool] | None = None
        self._drawn: Counter[int] = Counter()

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        """Sample one completion for each of the prompts.

        Raises:
            ValueError: Prompts with images, FSDP, or sampling options that the sampler lacks.
        """
        from trl.models import unwrap_model_for_generation

        if getattr(trainer, "is_fsdp_enabled", False):
            raise ValueError(
                "rollout_func: the model is sharded by FSDP, which is not supported; use DDP, or "
                "leave rollout_func out"
            )
        ids = self._tokenize(prompts, trainer)
        config = self._settings(trainer)
        step = (int(trainer.state.global_step), bool(trainer.model.training))
        numbers = self._number(ids, step, trainer.accelerator)
        args = trainer.args
        with unwrap_model_for_generation(
            trainer.model_wrapped,
            trainer.accelerator,
            gather_deepspeed3_params=getattr(args, "ds3_gather_for_generation", True),
        ) as model:
            sampler = self._sampler
            if sampler is None or sampler.model is not model or sampler.config != config:
                self._sampler = None
                sampler = InfiniteSampler(model, config, length_predictor=self.length_predictor)
                self._sampler = sampler
            # an evaluation at a step draws other samples than the training step
            found = sampler.generate(ids, 1, step=2 * step[0] + step[1], sample_ids=numbers)
            # keys and values make room for activations; recording a step anew is quick
            sampler.close()
        self.stats = found.stats
        return {
            "prompt_ids": ids,
            "completion_ids": found.completion_ids,
            "logprobs": found.logprobs,
        }

    def _settings(self, trainer: Any) -> SamplingConfig:
        ours = {
            field.name: getattr(self.config, field.name)
            for field in fields(SamplingConfig)
            if field.name in _OURS
        }
        eos = self.config.eos_token_id or getattr(trainer, "eos_token_ids", None)
        if eos is None:
            eos = trainer.processing_class.eos_token_id
        return SamplingConfig.from_trl(trainer.args, **ours, eos_token_id=eos)

    def _tokenize(self, prompts: list[Any], trainer: Any) -> list[list[int]]:
        from trl.data_utils import is_conversational

        tokenizer: Callable[..., Any] = trainer.processing_class
        if not prompts or not is_conversational({"prompt": prompts[0]}):
            return [list(line) for line in tokenizer(text=prompts)["input_ids"]] if prompts else []
        for prompt in prompts:
            for turn in prompt:
                parts = turn.get("content")
                if isinstance(parts, list) and any(p.get("type") != "text" for p in parts):
                    raise ValueError(
                        "rollout_func: a prompt has a part that is no text, which is not "
                        "supported; leave rollout_func out for such data"
                    )
        made = trainer.processing_class.apply_chat_template(
            prompts, tools=getattr(trainer, "tools", None) or None,
            chat_template=getattr(trainer, "chat_template", None), add_generation_prompt=True,
            tokenize=True, return_dict=True,
            **(getattr(trainer, "chat_template_kwargs", None) or {}),
        )  # fmt: skip
        return [list(line) for line in made["input_ids"]]

    def _number(self, ids: list[list[int]], step: tuple[int, bool], accelerator: Any) -> list[int]:
        """Number the samples of each prompt over all processes, and over the calls of one step."""
        if step != self._step:
            self._step, self._drawn = step, Counter()
        uids = [prompt_uid(line) for line in ids]
        below: Counter[int] = Counter()
        everybody = [uids]
        if accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            everybody = gather_object([uids])
            for other in everybody[: accelerator.process_index]:
                below.update(other)
        numbers = []
        for uid in uids:
            numbers.append(self._drawn[uid] + below[uid])
            below[uid] += 1
        for other in everybody:
            self._drawn.update(other)
        return numbers
