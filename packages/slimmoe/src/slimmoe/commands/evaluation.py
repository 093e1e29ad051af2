"""The command ``eval``."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path  # noqa: TC003 - cyclopts reads it
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from shared_kernels.console import JsonFlag, print_json, print_table

if TYPE_CHECKING:
    from collections.abc import Iterator


def evaluate(
    models: Annotated[list[str], Parameter(name="MODELS", consume_multiple=True)],
    /,
    *,
    tasks: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    include_path: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    texts: Annotated[list[Path] | None, Parameter(consume_multiple=True)] = None,
    block: int = 2048,
    acceptance: Annotated[bool, Parameter(negative="")] = False,
    prompts: int = 16,
    new_tokens: int = 64,
    device: str | None = None,
    json_output: JsonFlag = False,
) -> int:
    """Say how good models are, side by side: tasks of lm-eval, perplexity of texts, drafts.

    Args:
        models: Folders or names on the Hugging Face Hub.
        tasks: Of lm-eval, by name or as files of YAML; they need `slimmoe[eval]`.
        include_path: Folder of further tasks in YAML, whose data may be files of JSON.
        limit: Questions of each task.
        num_fewshot: Examples before each question, where the task leaves it open.
        batch_size: Of questions.
        texts: Files of text, of JSON lines with `text` or `input_ids`, or folders of these.
        block: Tokens of the pieces that texts are cut into.
        acceptance: Draft with modules of multi-token prediction behind pieces of the texts.
        prompts: How many of these.
        new_tokens: Of an answer that is drafted in.
        device: To run on; by default a GPU if there is one.
        json_output: Print JSON.
    """
    if not (tasks or texts or acceptance):
        raise ValueError("eval: nothing is measured; give --tasks or --texts")
    if acceptance and not texts:
        raise ValueError("--acceptance: it drafts behind pieces of texts; give --texts")
    if not tasks and (limit is not None or num_fewshot is not None or include_path is not None):
        raise ValueError("--limit, --num-fewshot, --include-path: they are of --tasks; give some")
    from slimmoe.datafiles import read_data
    from slimmoe.evaluation import task_manager

    data = read_data(texts) if texts else []
    options: dict[str, Any] = {"limit": limit, "num_fewshot": num_fewshot, "batch_size": batch_size}
    if tasks:
        options["task_manager"] = task_manager(include_path)
    told: dict[str, dict[str, Any]] = {}
    for model in models:
        with redirect_stdout(sys.stderr):
            # results alone are for stdout
            told[model] = _measured(
                model, data, tasks or [], block=block, device=device,
                drafts={"prompts": prompts, "prompt_tokens": min(64, block),
                        "new_tokens": new_tokens} if acceptance else None,
                options=options,
            )  # fmt: skip
    if json_output:
        return print_json(told)
    columns = [dict(_rows(found)) for found in told.values()]
    names = dict.fromkeys(name for column in columns for name in column)
    print_table([(name, *(column.get(name, "-") for column in columns)) for name in names],
                ("", *told))  # fmt: skip
    return 0


def _measured(
    model: str, data: list[Any], tasks: list[str], *, block: int, device: str | None,
    drafts: dict[str, int] | None, options: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    from transformers import AutoTokenizer

    from slimmoe.compression import fetched
    from slimmoe.evaluation import acceptance, evaluate, load, perplexity

    found: dict[str, Any] = {}
    folder = fetched(model)
    if drafts is not None:
        made = acceptance(folder, data, device=device, **drafts)
        found["acceptance"] = None if made is None else asdict(made)
    loaded, reads = load(folder, device), bool(tasks) or isinstance(data[0], str)
    tokenizer = AutoTokenizer.from_pretrained(folder) if reads else None
    if data:
        said = perplexity(loaded, data, block=block, tokenizer=tokenizer)
        found = {"texts": {**asdict(said), "perplexity": said.perplexity}, **found}
    if tasks:
        found["tasks"] = evaluate(loaded, tasks, tokenizer=tokenizer, **options)
    return found


def _rows(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Return names and values as they are shown."""
    for name, value in (found.get("texts") or {}).items():
        if value is not None:
            shown = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
            yield f"texts: {name.replace('_', ' ')}", shown
    if drafted := found.get("acceptance"):
        for count, rate in enumerate(drafted["rates"], 1):
            yield f"{count} {'draft' if count == 1 else 'drafts'} accepted", f"{rate:.1%}"
        yield "tokens for each run of the model", f"{drafted['mean_length']:.2f}"
    for task, values in (found.get("tasks") or {}).items():
        for name, value in values.items():
            if not isinstance(value, float) or "_stderr," in name:
                continue
            error = values.get(name.replace(",", "_stderr,", 1))
            yield f"{task}: {name}", f"{value:.4f}" + (f" ± {error:.4f}" if error else "")
        yield f"{task}: questions", f"{values.get('samples', '-')}"
