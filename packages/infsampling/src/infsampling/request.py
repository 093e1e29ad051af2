"""What a call of the sampler is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shared_kernels._checks import check_range, message

if TYPE_CHECKING:
    from collections.abc import Sequence


class Request:
    """What is to be sampled: unique prompts, and for every sample which is its."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        counts: Sequence[int],
        sample_ids: Sequence[int] | None,
        forced: Sequence[int] | None,
        most: int,
    ) -> None:
        self.prompts: list[list[int]] = []
        known: dict[tuple[int, ...], int] = {}
        seen: list[int] = []
        self.unique: list[int] = []
        self.prompt_index: list[int] = []
        self.sample_index: list[int] = []
        for given, (ids, count) in enumerate(zip(prompts, counts, strict=True)):
            key = tuple(ids)
            unique = known.setdefault(key, len(known))
            if unique == len(self.prompts):
                self.prompts.append(list(key))
                seen.append(0)
            self.unique += [unique] * count
            self.prompt_index += [given] * count
            self.sample_index += range(seen[unique], seen[unique] + count)
            seen[unique] += count
        if sample_ids is not None:
            self.sample_index = _as_integers("sample_ids", sample_ids, len(self.unique), 0)
            pairs = set(zip(self.unique, self.sample_index, strict=True))
            if len(pairs) < len(self.unique):
                raise ValueError(
                    "sample_ids: two samples of one prompt have the same number, and would be the "
                    "same; number the samples of a prompt over all ranks"
                )
        self.limits = [most] * len(self.unique)
        if forced is not None:
            self.limits = _as_integers("forced_lengths", forced, len(self.unique), 1)
            if max(self.limits, default=1) > most:
                raise ValueError(
                    message("forced_lengths", f"at most max_new_tokens={most}", max(self.limits),
                            "raise max_new_tokens")
                )  # fmt: skip
        self.rows_of: list[list[int]] = [[] for _ in self.prompts]
        for row, unique in enumerate(self.unique):
            self.rows_of[unique].append(row)


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
