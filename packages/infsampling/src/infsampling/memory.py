"""How many slots fit, and how many pay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels.offload.memory import memory_limits
from shared_kernels.units import format_bytes

from infsampling.scheduling.bounds import free_slots

if TYPE_CHECKING:
    from collections.abc import Sequence

    from infsampling.config import SamplingConfig

#: Bodies of the logits that a step holds at a time: of the model, and in float32.
_LOGITS_BYTES = 8
_PLAN_WITHIN = 1.02
#: Other slots are another shape to compile and record for: not worth it for less than this.
_KEEP_WITHIN = 1.15
_MULTIPLE = 8


@dataclass(frozen=True)
class MemoryPlan:
    """Where the memory goes, in bytes, and how many slots that gives.

    Attributes:
        slots: Samples decoded at once.
        weights: Of the model, which is there already.
        kv_per_token: Keys and values of one token, all layers.
        prefixes: Keys and values of the unique prompts of a round.
        slot: Keys and values of one slot, and its logits.
        outputs: Tokens and log-probabilities of the samples of a round.
        budget: That prefixes, slots and outputs may take.
        full_group: What keys and values of all samples, each with its own prompt, would take.
        rounds: The unique prompts that are held at once, of each round.
    """

    slots: int
    weights: int
    kv_per_token: int
    prefixes: int
    slot: int
    outputs: int
    budget: int
    full_group: int
    rounds: list[range]

    @property
    def total(self) -> int:
        """Bytes that sampling takes on top of the weights."""
        return self.prefixes + self.slots * self.slot + self.outputs

    def __str__(self) -> str:
        """Return a line to read."""
        rounds = f"; {len(self.rounds)} rounds" if len(self.rounds) > 1 else ""
        return (
            f"{self.slots} slots of {format_bytes(self.slot)}, prompts "
            f"{format_bytes(self.prefixes)}, outputs {format_bytes(self.outputs)}: "
            f"{format_bytes(self.total)} on top of {format_bytes(self.weights)} of weights; a full "
            f"group would take {format_bytes(self.full_group)}{rounds}"
        )


def kv_bytes(model: Any) -> int:
    """Return the bytes of keys and values of one token, over all layers."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    size = next(model.parameters()).dtype.itemsize
    return 2 * config.num_hidden_layers * key_heads * width * size


def available(device: torch.device) -> int:
    """Return the bytes that may still be allocated."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # what torch's allocator holds and does not use
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return memory_limits().free


def make_plan(
    model: Any,
    config: SamplingConfig,
    prompt_lengths: Sequence[int],
    counts: Sequence[int],
    *,
    mean_length: float | None = None,
    last: int | None = None,
    held: int = 0,
) -> MemoryPlan:
    """Plan a call.

    A step reads the weights once, whatever the slots, and the keys and values of each: with few
    slots there are many steps, with many a step takes longer. Of the slots that fit, the fewest are
    taken that are within 2 % of the best modelled time; or those of the last call, for which the
    step is compiled, if they are within 15 %. Prompts and the outputs of their samples may take
    what those slots leave, or half of the budget (a quarter beside slots that were given); if they
    would take more, there are rounds.

    Args:
        model: Whose weights and geometry count.
        config: With ``max_slots`` given, only rounds are planned.
        prompt_lengths: Tokens of each unique prompt.
        counts: Samples of each.
        mean_length: Expected tokens of a sample; half of ``max_new_tokens`` by default.
        last: Slots of the last call.
        held: Bytes of buffers that are there from the last call, and used again or freed.

    Raises:
        MemoryError: Not even one slot fits into the budget beside one prompt.
    """
    per_token, samples = kv_bytes(model), int(sum(counts))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    vocabulary = model.get_output_embeddings().weight.shape[0]
    slot = config.max_new_tokens * per_token + vocabulary * _LOGITS_BYTES
    prefixes = [length * per_token for length in prompt_lengths]
    outputs = [count * config.max_new_tokens * 8 for count in counts]
    full = sum(n * (p + config.max_new_tokens) for n, p in zip(counts, prompt_lengths, strict=True))
    budget = _budget(config, next(model.parameters()).device, held)
    if config.max_slots == "auto":
        expected = min(mean_length or config.max_new_tokens / 2, config.max_new_tokens)
        wanted = _fastest(
            samples, config.max_new_tokens, expected, weights, sum(prefixes), per_token, last
        )
    else:
        wanted = config.max_slots
    wanted = min(wanted, max(1, samples))
    share = min(budget // 2, budget - slot) if config.max_slots == "auto" else budget // 4
    room = max(budget - wanted * slot, share)
    loads = [a + b for a, b in zip(prefixes, outputs, strict=True)]
    rounds = rounds_of(loads, max(1, room), config.max_resident_prompts)
    heaviest = max(rounds, key=lambda numbers: sum(loads[i] for i in numbers))
    prompts, texts = (sum(sizes[i] for i in heaviest) for sizes in (prefixes, outputs))
    wanted = min(wanted, max(1, *(sum(counts[i] for i in numbers) for numbers in rounds)))
    if config.max_slots == "auto":
        fits = (budget - prompts - texts) // slot
        if fits < 1:
            raise MemoryError(
                f"memory_budget: {format_bytes(budget)} hold {format_bytes(prompts)} of one "
                f"prompt, {format_bytes(texts)} of outputs and no slot of {format_bytes(slot)}; "
                "lower max_new_tokens, sample fewer completions at a time, or free memory"
            )
        wanted = min(wanted, fits)
    return MemoryPlan(
        wanted, weights, per_token, prompts, slot, texts, budget, full * per_token, rounds
    )


def rounds_of(loads: Sequence[int], room: int, most: int | None) -> list[range]:
    """Cut prompts into rounds of similar loads, as few as can be, in their order.

    Args:
        loads: Bytes of each prompt.
        room: Bytes of a round; a prompt with more has one for itself.
        most: Prompts of a round.
    """
    # both limits as one: a round is full when its shares come to 1
    shares = [max(load / room, 0.0 if most is None else 1 / most) for load in loads]

    def cut(limit: float) -> list[range]:
        found, begin, total = [], 0, 0.0
        for number, share in enumerate(shares):
            if number > begin and total + share > limit + 1e-9:
                found.append(range(begin, number))
                begin, total = number, 0.0
            total += share
        return [*found, range(begin, len(shares))]

    fewest = cut(1.0)
    low, high = sum(shares) / len(fewest), 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (low, middle) if len(cut(middle)) <= len(fewest) else (middle, high)
    return cut(high)


def _budget(config: SamplingConfig, device: torch.device, held: int) -> int:
    share = 0.9 if config.memory_budget is None else config.memory_budget
    return int((available(device) + held) * share) if share <= 1 else int(share)


def _fastest(
    samples: int, most: int, mean: float, weights: int, prefixes: int, per_token: int,
    last: int | None,
) -> int:  # fmt: skip
    """Return the fewest slots whose modelled time is close to the best, or the last ones."""

    def seconds(slots: int) -> float:
        steps = max(most, samples * mean / slots)
        return steps * (weights + prefixes + slots * mean / 2 * per_token)

    sizes = [*range(_MULTIPLE, samples, _MULTIPLE), samples]
    least = min(map(seconds, sizes))
    if last is not None and last <= samples and seconds(last) <= _KEEP_WITHIN * least:
        return last
    chosen = next(size for size in sizes if seconds(size) <= _PLAN_WITHIN * least)
    # fewer than these cannot be as quick as one slot for each sample
    chosen = max(chosen, free_slots([most, *[mean] * (samples - 1)]))
    # a batch is padded to such a multiple in any case
    return min(samples, -(-chosen // _MULTIPLE) * _MULTIPLE)
