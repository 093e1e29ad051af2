"""What commands work on: models by name, and pairs by name or from files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pahq.finder import CircuitFinder
    from pahq.tasks import Task


def load_model(name: str, device: str | None, dtype: str) -> tuple[Any, Any]:
    """Return a model and its tokenizer; on a GPU if there is one and nothing else is said."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(chosen).eval()
    return model, AutoTokenizer.from_pretrained(name)


def make_finder(name: str, device: str | None, dtype: str, kv: str) -> tuple[CircuitFinder, Any]:
    """Return a finder of a model, and its tokenizer."""
    from pahq.finder import CircuitFinder

    model, tokenizer = load_model(name, device, dtype)
    return CircuitFinder(model, kv=kv), tokenizer


def make_task(task: str, tokenizer: Any, examples: int, seed: int) -> Task:
    """Return pairs by name, or the first ones of a file."""
    from pahq.tasks import NAMES, make
    from pahq.tasks.files import read_pairs

    if examples < 1:
        raise ValueError(f"--examples: expected at least 1, got {examples}")
    if task in NAMES:
        return make(task, tokenizer, examples, seed)
    if not Path(task).is_file():
        listed = ", ".join(NAMES)
        raise ValueError(f"--task: expected one of {listed}, or a file of pairs, got {task}")
    return read_pairs(task, tokenizer, 0, examples)


def held_out(pairs: Task, task: str, tokenizer: Any, examples: int, seed: int) -> Task | None:
    """Return pairs that are not among those, or None where there are no others."""
    from pahq.tasks import NAMES, make
    from pahq.tasks.files import count_pairs, read_pairs

    if task in NAMES:
        found = make(task, tokenizer, examples, seed + 1)
    elif count_pairs(task) <= examples:
        return None
    else:
        found = read_pairs(task, tokenizer, examples, 2 * examples)
    seen = {tuple(ids) for ids in pairs.clean.tolist()}
    rows = [row for row, ids in enumerate(found.clean.tolist()) if tuple(ids) not in seen]
    return found.select(rows) if rows else None
