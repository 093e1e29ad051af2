"""What a call of the sampler is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shared_kernels._checks import check_range, message

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass
class Request:
    """What is to be sampled: unique prompts, and for every sample which is its.

    Attributes:
        prompts: Token ids of each unique prompt.
        unique: Of each sample, the number of its prompt among those.
        prompt_index: Of each sample, the number of its prompt among those that were given.
        sample_index: Of each sample, its number among all of its prompt.
        limits: Of each sample, its tokens at most.
        places: Of each sample, its place among all that are asked for.
        rows_of: Of each unique prompt, its samples.
    """

    prompts: list[list[int]]
    unique: list[int]
    prompt_index: list[int]
    sample_index: list[int]
    limits: list[int]
    places: list[int]
    rows_of: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self.rows_of = [[] for _ in self.prompts]
        for row, unique in enumerate(self.unique):
            self.rows_of[unique].append(row)

    @classmethod
    def of(
        cls,
        prompts: Sequence[Sequence[int]],
        counts: Sequence[int],
        sample_ids: Sequence[int] | None,
        forced: Sequence[int] | None,
        most: int,
    ) -> Request:
        """Number all samples; arguments as those of `InfiniteSampler.generate`."""
        known: dict[tuple[int, ...], int] = {}
        seen: list[int] = []
        unique: list[int] = []
        prompt_index: list[int] = []
        sample_index: list[int] = []
        for given, (ids, count) in enumerate(zip(prompts, counts, strict=True)):
            number = known.setdefault(tuple(ids), len(known))
            if number == len(seen):
                seen.append(0)
            unique += [number] * count
            prompt_index += [given] * count
            sample_index += range(seen[number], seen[number] + count)
            seen[number] += count
        if sample_ids is not None:
            sample_index = _as_integers("sample_ids", sample_ids, len(unique), 0)
            if len(set(zip(unique, sample_index, strict=True))) < len(unique):
                raise ValueError(
                    "sample_ids: two samples of one prompt have the same number, and would be the "
                    "same; number the samples of a prompt over all ranks"
                )
        limits = [most] * len(unique)
        if forced is not None:
            limits = _as_integers("forced_lengths", forced, len(unique), 1)
            if max(limits, default=1) > most:
                raise ValueError(
                    message("forced_lengths", f"at most max_new_tokens={most}", max(limits),
                            "raise max_new_tokens")
                )  # fmt: skip
        listed = [list(ids) for ids in known]
        return cls(listed, unique, prompt_index, sample_index, limits, list(range(len(unique))))

    def part(self, prompts: range) -> Request:
        """Return the request for some of the prompts."""
        rows = [row for unique in prompts for row in self.rows_of[unique]]
        return Request(
            self.prompts[prompts.start : prompts.stop],
            [self.unique[row] - prompts.start for row in rows],
            *(
                [values[row] for row in rows]
                for values in (self.prompt_index, self.sample_index, self.limits, self.places)
            ),
        )


def _as_integers(name: str, values: Sequence[int], count: int, least: int) -> list[int]:
    found = [int(value) for value in values]
    if len(found) != count:
        raise ValueError(message(name, f"{count} numbers, one per sample", len(found), "see them"))
    for value in found:
        check_range(name, value, least, 1 << 32, "see InfiniteSampler.generate")
    return found


def counts_of(num_generations: int | Sequence[int], prompts: int) -> list[int]:
    """Return the number of samples of each prompt."""
    if isinstance(num_generations, int):
        num_generations = [num_generations] * prompts
    return _as_integers("num_generations", num_generations, prompts, 0)
