"""Settings of the sampler."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from shared_kernels._checks import check_choice, check_range, message

if TYPE_CHECKING:
    from transformers import GenerationConfig

POLICIES = ("auto", "lpt", "fifo", "sjf", "group_sjf", "paper", "lrpt", "turns")

#: Fields of a `GenerationConfig` that change what is drawn and that the sampler does not have, with
#: the values that change nothing.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None,),
    "sequence_bias": (None,),
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "top_h": (None,),
    "penalty_alpha": (None,),
    "guidance_scale": (None, 1.0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
    "exponential_decay_length_penalty": (None,),
    "stop_strings": (None,),
    "watermarking_config": (None,),
    "prompt_lookup_num_tokens": (None,),
    "dola_layers": (None,),
}


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """What is drawn, in how much memory, and in which order.

    Attributes:
        max_slots: Samples that are decoded at once; ``auto`` plans it from ``memory_budget``.
        max_new_tokens: Tokens of a completion at most, its end-of-sequence token included.
        max_prompt_tokens: Longer prompts are refused; by default what the model has positions for.
        temperature: 0 takes the likeliest token.
        top_k: Draw from the k likeliest tokens; 0 from all.
        top_p: Draw from the likeliest tokens that together reach this probability; 1 from all.
        min_p: Draw from tokens at least this many times as likely as the likeliest; 0 from all.
        eos_token_id: Tokens that end a completion; by default those of the model's generation
            configuration and of the tokenizer, if one was given.
        logprobs: ``full`` are log-probabilities under ``softmax(logits / temperature)``, as TRL
            has them; ``filtered`` under the distribution that is drawn from.
        seed: Of all draws. Tokens are a function of the seed, the step, the prompt and the number
            of the sample, whatever the slots, the policy and the other prompts.
        policy: Which waiting sample takes a free slot: see `scheduling.order`. ``lrpt`` and
            ``turns`` also park samples in host memory. ``auto`` is ``turns`` without a length
            predictor, ``lrpt`` with a progressive one, and ``lpt`` with any other.
        turn: Tokens of a turn, for ``turns``.
        park_limit: Samples are taken out of slots once no more than this many times as many are
            left as there are slots; before that, a slot is given away when its sample ends.
        memory_budget: For keys, values and work space: bytes, or a share of what is free; by
            default 0.9 of it. Prompts that do not fit into it beside slots are sampled in rounds.
        max_resident_prompts: Prompts that are held at once; by default what fits.
        sync_every: Steps between two looks of the host at the device.
        rerank_every: Steps between two rankings of running and waiting samples, for policies that
            park; a multiple of ``sync_every``.
        prefill_chunk: Tokens of a prompt that are computed at once; fewer need less memory.
        compile: Compile the model's decoding step with `torch.compile`, once for all calls of one
            shape; None does so on a CUDA device.
        cuda_graph: Record the decoding step as a CUDA graph; None does so on a CUDA device.
    """

    max_slots: int | Literal["auto"] = "auto"
    max_new_tokens: int = 512
    max_prompt_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    eos_token_id: tuple[int, ...] | None = None
    logprobs: Literal["full", "filtered"] = "full"
    seed: int = 0
    policy: Literal["auto", "lpt", "fifo", "sjf", "group_sjf", "paper", "lrpt", "turns"] = "auto"
    turn: int = 64
    park_limit: float = 2.0
    memory_budget: float | None = None
    max_resident_prompts: int | None = None
    sync_every: int = 16
    rerank_every: int = 64
    prefill_chunk: int = 2048
    compile: bool | None = None
    cuda_graph: bool | None = None

    def __post_init__(self) -> None:
        if self.max_slots != "auto":
            check_range("max_slots", self.max_slots, 1, 1 << 20, "or 'auto'")
        check_range("max_new_tokens", self.max_new_tokens, 1, 1 << 24, "a completion has a token")
        if self.max_prompt_tokens is not None:
            check_range("max_prompt_tokens", self.max_prompt_tokens, 1, 1 << 31, "or None")
        for name, low, high in (
            ("temperature", 0.0, 1e4), ("top_p", 0.0, 1.0), ("min_p", 0.0, 1.0),
        ):  # fmt: skip
            value = getattr(self, name)
            if not low <= value <= high or (name == "top_p" and value == 0):
                remedy = "see SamplingConfig"
                raise ValueError(message(name, f"a number from {low} to {high}", value, remedy))
        if self.max_resident_prompts is not None:
            check_range("max_resident_prompts", self.max_resident_prompts, 1, 1 << 31, "or None")
        check_range("top_k", self.top_k, 0, 1 << 31, "0 draws from all tokens")
        check_choice("logprobs", self.logprobs, ("full", "filtered"))
        check_choice("policy", self.policy, POLICIES)
        for name in ("turn", "sync_every", "rerank_every", "prefill_chunk"):
            check_range(name, getattr(self, name), 1, 1 << 31, "at least one token")
        if not self.park_limit >= 1:
            remedy = "1 parks nothing, inf at any time"
            raise ValueError(
                message("park_limit", "a number of at least 1", self.park_limit, remedy)
            )
        if self.rerank_every % self.sync_every:
            raise ValueError(
                message("rerank_every", f"a multiple of sync_every={self.sync_every}",
                        self.rerank_every, "samples can be moved only when the host looks")
            )  # fmt: skip
        budget = self.memory_budget
        if budget is not None and not budget > 0:
            remedy = "give bytes, or a share of the free memory up to 1"
            raise ValueError(message("memory_budget", "a positive number", budget, remedy))
        if self.eos_token_id is not None:
            ids = self.eos_token_id
            object.__setattr__(
                self, "eos_token_id", (ids,) if isinstance(ids, int) else tuple(map(int, ids))
            )

    @classmethod
    def from_generation_config(cls, generation: GenerationConfig, **changes: Any) -> SamplingConfig:
        """Take over what a `GenerationConfig` of transformers says of sampling.

        Args:
            generation: With ``do_sample`` false, the likeliest token is taken.
            **changes: Further fields of this class.

        Raises:
            ValueError: It asks for something that the sampler does not have.
        """
        for name, neutral in _REFUSED.items():
            value = getattr(generation, name, None)
            if value not in neutral and value != []:
                raise ValueError(
                    message(name, f"{neutral[-1]!r}", value,
                            "the sampler has no such option; leave it out, or use `generate`")
                )  # fmt: skip
        eos = generation.eos_token_id
        taken: dict[str, Any] = {
            "max_new_tokens": generation.max_new_tokens,
            "temperature": generation.temperature if generation.do_sample else 0.0,
            "top_k": generation.top_k,
            "top_p": generation.top_p,
            "min_p": generation.min_p,
            "eos_token_id": None if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
        }
        if not generation.do_sample:
            taken |= {"top_k": None, "top_p": None, "min_p": None}
        return cls(**{k: v for k, v in taken.items() if v is not None} | changes)

    @classmethod
    def from_trl(cls, args: Any, **changes: Any) -> SamplingConfig:
        """Take over the fields of a `GRPOConfig` of TRL that are about sampling.

        Args:
            args: Read by attribute: ``temperature``, ``top_p``, ``top_k``, ``min_p``,
                ``max_completion_length``, ``seed`` and ``generation_kwargs``.
            **changes: Fields of this class.

        Raises:
            ValueError: It asks for something that the sampler does not have.
        """
        given = {
            ours: getattr(args, theirs, None)
            for ours, theirs in (
                ("temperature", "temperature"), ("top_p", "top_p"), ("top_k", "top_k"),
                ("min_p", "min_p"), ("max_new_tokens", "max_completion_length"), ("seed", "seed"),
            )
        }  # fmt: skip
        extra = dict(getattr(args, "generation_kwargs", None) or {})
        if getattr(args, "repetition_penalty", None) is not None:
            extra.setdefault("repetition_penalty", args.repetition_penalty)
        ours = {field.name for field in fields(cls)}
        for name, value in extra.items():
            if name in ours:
                given[name] = value
            elif name not in _REFUSED or value not in _REFUSED[name]:
                raise ValueError(
                    message(f"generation_kwargs[{name!r}]", "an option of SamplingConfig", value,
                            "the sampler has no such option; leave it out")
                )  # fmt: skip
        return cls(**{k: v for k, v in given.items() if v is not None} | changes)

    def replace(self, **changes: Any) -> SamplingConfig:
        """Return the same with other values."""
        return replace(self, **changes)
