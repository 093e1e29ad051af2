"""Capitals of countries, as in Hanna et al. (arXiv:2403.17806)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pahq.tasks.sampling import collect

if TYPE_CHECKING:
    import random

    from pahq.tasks.base import Task

CAPITALS = {
    "Austria": "Vienna", "Belgium": "Brussels", "Bulgaria": "Sofia", "Canada": "Ottawa",
    "Chile": "Santiago", "China": "Beijing", "Croatia": "Zagreb", "Cuba": "Havana",
    "Denmark": "Copenhagen", "Egypt": "Cairo", "England": "London", "Finland": "Helsinki",
    "France": "Paris", "Germany": "Berlin", "Ghana": "Accra", "Greece": "Athens",
    "Hungary": "Budapest", "Iran": "Tehran", "Iraq": "Baghdad", "Ireland": "Dublin",
    "Italy": "Rome", "Jamaica": "Kingston", "Japan": "Tokyo", "Jordan": "Amman",
    "Kenya": "Nairobi", "Lebanon": "Beirut", "Nepal": "Kathmandu", "Norway": "Oslo",
    "Peru": "Lima", "Poland": "Warsaw", "Portugal": "Lisbon", "Romania": "Bucharest",
    "Russia": "Moscow", "Scotland": "Edinburgh", "Serbia": "Belgrade", "Spain": "Madrid",
    "Sweden": "Stockholm", "Syria": "Damascus", "Thailand": "Bangkok", "Turkey": "Ankara",
    "Venezuela": "Caracas", "Vietnam": "Hanoi",
}  # fmt: skip
TEMPLATE = "The capital of {country} is the city of"


def capital_country(tokenizer: Any, n: int = 64, *, seed: int = 0, bos: bool | None = None) -> Task:
    """Make statements about a country, up to the name of its capital.

    The corrupted prompt is about another country of as many tokens.

    Args:
        tokenizer: The model's.
        n: Pairs.
        seed: Of the choice.
        bos: Whether prompts begin with a BOS token; None leaves it to the tokenizer.

    Raises:
        ValueError: Fewer than one pair, or more than there are.
    """

    def draw(draws: random.Random) -> tuple[str, str, str, str]:
        right, wrong = draws.sample(sorted(CAPITALS), 2)
        clean, corrupted = (TEMPLATE.format(country=country) for country in (right, wrong))
        return clean, corrupted, f" {CAPITALS[right]}", f" {CAPITALS[wrong]}"

    return collect(tokenizer, draw, n, name="capital_country", seed=seed, bos=bos)
