"""One call of the sampler: as many rounds as its prompts need, and what comes of all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from infsampling import support
from infsampling.output import SamplingOutput, SamplingStats
from infsampling.request import Request, counts_of
from infsampling.run import Run
from infsampling.scheduling import bounds

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from infsampling.output import Completion
    from infsampling.sampler import InfiniteSampler


class Call:
    """One call; arguments and errors as those of `InfiniteSampler.generate`."""

    def __init__(
        self,
        sampler: InfiniteSampler,
        prompt_ids: Sequence[Sequence[int]],
        num_generations: int | Sequence[int],
        step: int,
        sample_ids: Sequence[int] | None,
        forced: Sequence[int] | None,
    ) -> None:
        self.sampler, self.step = sampler, step
        counts = counts_of(num_generations, len(prompt_ids))
        vocabulary = sampler.model.get_input_embeddings().weight.shape[0]
        for number, ids in enumerate(prompt_ids):
            if not len(ids):
                raise ValueError(f"prompt_ids: prompt {number} has no token; begin it with a BOS")
            if min(ids) < 0 or max(ids) >= vocabulary:
                raise ValueError(
                    f"prompt_ids: prompt {number} has token {max(ids)} (least {min(ids)}), and the "
                    f"model knows 0 to {vocabulary - 1}; is the tokenizer the model's?"
                )
        most = sampler.config.max_new_tokens
        longest = max(map(len, prompt_ids), default=0)
        support.check_length(sampler.model, longest, most, sampler.config.max_prompt_tokens)
        self.request = Request.of(prompt_ids, counts, sample_ids, forced, most)
        self.eos = [] if forced is not None else sampler.eos_token_ids()
        self.stats: list[SamplingStats] = []

    def _runs(self) -> Generator[Run]:
        """Yield what is to be gone through, one after the other."""
        request = self.request
        plan = self.sampler.plan(
            [len(ids) for ids in request.prompts], [len(rows) for rows in request.rows_of]
        )
        slots = max(1, plan.slots)
        for prompts in plan.rounds:
            run = Run(self.sampler, request.part(prompts), self.step, self.eos, slots)
            yield run
            self.stats.append(run.stats())
            # what did not fit once is not tried again
            slots = run.slots

    def completions(self) -> Generator[Completion]:
        """Yield completions as they end."""
        for run in self._runs():
            for ended in run.go():
                yield from run.fetch(ended)

    def output(self) -> SamplingOutput:
        """Sample, and return all in the order in which they were asked for."""
        found: dict[int, Completion] = {}
        for run in self._runs():
            for _ in run.go():
                pass
            if run.rows:
                found |= zip(run.request.places, run.fetch(list(range(run.rows))), strict=True)
        listed = [found[place] for place in range(len(found))]
        return SamplingOutput(
            [completion.ids.tolist() for completion in listed],
            [completion.logprobs.tolist() for completion in listed],
            [completion.finish_reason for completion in listed],
            [completion.prompt_index for completion in listed],
            [completion.sample_index for completion in listed],
            together(self.stats, [len(completion.ids) for completion in listed]),
        )


def together(stats: Sequence[SamplingStats], lengths: Sequence[int]) -> SamplingStats:
    """Return the statistics of rounds as those of one call, whose samples had these lengths."""
    if len(stats) == 1:
        return stats[0]

    def total(name: str) -> int:
        return sum(getattr(one, name) for one in stats)

    def most(name: str) -> int:
        return max(getattr(one, name) for one in stats)

    room = sum(one.decode_steps * one.slots for one in stats)
    busy = sum(one.slot_utilisation * one.decode_steps * one.slots for one in stats)
    bound = bounds.preemptive_bound if total("swaps") else bounds.lower_bound
    return SamplingStats(
        policy=stats[0].policy,
        decode_steps=total("decode_steps"),
        lower_bound=bound([max(0, length - 1) for length in lengths], most("slots")),
        slot_utilisation=busy / room if room else 1.0,
        slots=most("slots"),
        prefill_tokens=total("prefill_tokens"),
        new_tokens=total("new_tokens"),
        kv_bytes=most("kv_bytes"),
        parked_bytes=most("parked_bytes"),
        host_syncs=total("host_syncs"),
        swaps=total("swaps"),
        graph_captures=total("graph_captures"),
        prefill_seconds=sum(one.prefill_seconds for one in stats),
        decode_seconds=sum(one.decode_seconds for one in stats),
    )
