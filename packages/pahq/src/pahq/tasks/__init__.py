"""Pairs of inputs on which a model does something and does not do it."""

from pahq.tasks.base import Task
from pahq.tasks.baseline import baseline
from pahq.tasks.capital_country import capital_country
from pahq.tasks.docstring import docstring
from pahq.tasks.gendered_pronoun import gendered_pronoun
from pahq.tasks.greater_than import greater_than
from pahq.tasks.induction import induction
from pahq.tasks.ioi import ioi
from pahq.tasks.pairs import from_ids, from_pairs
from pahq.tasks.registry import NAMES, make
from pahq.tasks.sva import sva

__all__ = [
    "NAMES", "Task", "baseline", "capital_country", "docstring", "from_ids", "from_pairs",
    "gendered_pronoun", "greater_than", "induction", "ioi", "make", "sva",
]  # fmt: skip
