"""What commands work on: models by name, and pairs by name or from files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pahq.finder import CircuitFinder
    from pahq.tasks import Task


def check_find(
    out: Path,
    method: str,
    *,
    ablation: str,
    threshold: float | None,
    direct_edges: bool,
    order: str,
    precision: str,
    ig_steps: int | None,
    max_rows: int,
    memory_budget: float | None,
    top: int | None,
) -> None:
    """Refuse flags of `pahq find` that do not go together, before anything is loaded.

    Raises:
        ValueError: A folder that is not empty, or a flag that another method has.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out: {out} exists and is not empty; choose another folder")
    if method in ("eap", "eap-ig") and ablation != "patch":
        raise ValueError(f"--ablation: gradients know patch only, got {ablation}")
    for flag, given, owner in (
        ("--threshold", threshold is not None, "acdc"), ("--direct-edges", direct_edges, "acdc"),
        ("--order", order != "acdc", "acdc"), ("--precision", precision != "auto", "acdc"),
        ("--ig-steps", ig_steps is not None, "eap-ig"),
    ):  # fmt: skip
        if given and method != owner:
            raise ValueError(f"{flag}: only {owner} has it, and --method is {method}")
    for flag, given in (
        ("--max-rows", max_rows != 64), ("--memory-budget", memory_budget is not None)
    ):  # fmt: skip
        if given and method in ("eap", "eap-ig"):
            raise ValueError(f"{flag}: gradients have no rows, and --method is {method}")
    if memory_budget is not None and not memory_budget > 0:
        raise ValueError(f"--memory-budget: expected GiB above 0, got {memory_budget}")
    if top is not None and method == "acdc":
        raise ValueError("--top: acdc has a threshold; give --method eap-ig, or leave it out")


def load_model(name: str, device: str | None, dtype: str) -> tuple[Any, Any]:
    """Return a model and its tokenizer; on a GPU if there is one and nothing else is said."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(_place(device)).eval()
    return model, AutoTokenizer.from_pretrained(name)


def make_finder(
    name: str, device: str | None, dtype: str, kv: str, offload: bool = False
) -> tuple[CircuitFinder, Any]:
    """Return a finder of a model, and its tokenizer; with others of a launch, in their group."""
    import torch
    from torch import distributed

    from pahq.finder import CircuitFinder

    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized():
        if torch.cuda.is_available() and device is None:
            # where a process gathers what it sends to others
            torch.cuda.set_device(_place(None))
        distributed.init_process_group()
    if offload:
        model, tokenizer = load_model(name, "cpu", dtype)
        return CircuitFinder(model, kv=kv, offload="cpu", device=_place(device)), tokenizer
    model, tokenizer = load_model(name, device, dtype)
    return CircuitFinder(model, kv=kv), tokenizer


def _place(device: str | None) -> str:
    """Return a device: if nothing is said a GPU, of a launch the process's own."""
    import torch

    if device is not None or not torch.cuda.is_available():
        return device or "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"


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
