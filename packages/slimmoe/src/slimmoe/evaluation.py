"""How good a model is: perplexity of texts, tasks of lm-eval, and drafts that it accepts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels._checks import check_range, message
from shared_kernels.models import Head

from slimmoe.calibration.data import make_sequences
from slimmoe.calibration.engine import evaluating
from slimmoe.compression import fetched

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from slimmoe.mtp.acceptance import Acceptance


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts texts.

    Attributes:
        tokens: That were predicted: all of a block but its first.
        nats_per_token: Mean of -log p over these.
        nats_per_byte: That times tokens for each byte of the texts; None of token ids.
    """

    tokens: int
    nats_per_token: float
    nats_per_byte: float | None

    @property
    def perplexity(self) -> float:
        """``exp(nats_per_token)``."""
        return math.exp(self.nats_per_token)


@torch.no_grad()
def perplexity(
    model: Any,
    data: Iterable[Any],
    *,
    block: int = 2048,
    batch_tokens: int = 16384,
    tokenizer: Any = None,
    device: torch.device | str | None = None,
) -> Perplexity:
    """Measure how well a model predicts texts, as one-shot compression is judged by.

    Texts are joined, each with the end-of-sequence token behind it, and cut into blocks of one
    length, of which none sees another; what is left behind the last is not used. Every token of a
    block but its first is predicted, and all count alike. Logits are made some rows at a time, and
    summed up in float32 at least.

    Args:
        model: Folder or name on the Hub, or a causal language model of transformers.
        data: Texts, or sequences of token ids, which are joined as they are.
        block: Tokens of a block.
        batch_tokens: Tokens that are run at a time, one block at least.
        tokenizer: For texts; the folder's own by default.
        device: To load a folder to; by default a GPU if there is one.

    Raises:
        ValueError: No data, fewer tokens than a block, or token ids outside the vocabulary.
    """
    check_range("block", block, 2, 1 << 31, "tokens of which all but the first are predicted")
    check_range("batch_tokens", batch_tokens, 1, 1 << 40, "choose what fits into memory")
    items = list(data)
    tokenizer = _reader(model, items, tokenizer)
    model = load(model, device)
    stream = _joined(items, tokenizer)
    count = len(stream) // block
    if not count:
        raise ValueError(message("block", f"at most {len(stream)} tokens, which there are", block,
                                 "give more text, or shorter blocks"))  # fmt: skip
    _check_ids(stream, model)
    head, total = Head.of(model), 0.0
    blocks = stream[: count * block].view(count, block)
    with evaluating(model):
        for some in blocks.split(max(1, batch_tokens // block)):
            ids = some.to(model.device)
            ran = model.get_decoder()(ids, use_cache=False).last_hidden_state
            rows, wanted = ran[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
            found = head.logprobs(rows, wanted, torch.arange(len(rows), device=rows.device))
            total -= float(found.logprob.double().sum())
    mean, per_byte = total / (count * (block - 1)), None
    if isinstance(items[0], str):
        per_byte = mean * len(stream) / sum(len(text.encode()) for text in items)
    return Perplexity(count * (block - 1), mean, per_byte)


def task_manager(include_path: str | Path | None = None) -> Any:
    """Return the index of tasks of lm-eval, which takes seconds to make.

    Args:
        include_path: Folder of further tasks in YAML; their data may be files of JSON.

    Raises:
        ImportError: lm-eval is not there.
        FileNotFoundError: There is no such folder.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError("lm-eval is not installed: pip install 'slimmoe[eval]'") from error
    if include_path is not None and not Path(include_path).is_dir():
        raise FileNotFoundError(f"include_path: {include_path} is no folder; give one with YAML")
    return TaskManager(include_path=None if include_path is None else str(include_path))


def evaluate(
    model: Any,
    tasks: Sequence[str | dict[str, Any]],
    *,
    include_path: str | Path | None = None,
    tokenizer: Any = None,
    batch_size: int | str = 8,
    device: str | None = None,
    **lm_eval_kwargs: Any,
) -> dict[str, dict[str, Any]]:
    """Run tasks of lm-eval on a model.

    Args:
        model: Folder or name on the Hub, or a model of transformers.
        tasks: Names of tasks, groups or tags, YAML files, or what such a file has as a dict.
        include_path: Folder of further tasks, as `task_manager` takes it.
        tokenizer: Of a model in memory.
        batch_size: Of requests.
        device: To load a folder to; by default a GPU if there is one.
        lm_eval_kwargs: Of ``lm_eval.simple_evaluate``, such as ``limit`` and ``num_fewshot``, or
            ``task_manager`` for several calls.

    Returns:
        By task and group what lm-eval measured, such as ``acc,none`` and ``acc_stderr,none``, and
        ``samples``, the number of questions; None for what is not a number. It is empty in all
        processes but the first.

    Raises:
        ImportError: lm-eval is not there.
        ValueError: No tasks, or some that there are not.
        FileNotFoundError: There is no such folder of tasks.
    """
    if not tasks:
        raise ValueError(message("tasks", "at least one", tasks, "`lm-eval ls tasks` lists them"))
    manager = lm_eval_kwargs.pop("task_manager", None) or task_manager(include_path)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    unknown = [task for task in tasks if isinstance(task, str)
               and task not in manager.task_index and not Path(task).is_file()]  # fmt: skip
    if unknown:
        remedy = "`lm-eval ls tasks` lists them; include_path has others"
        raise ValueError(message("tasks", "tasks of lm-eval or YAML files", unknown, remedy))
    tokenizer = _reader(model, [""], tokenizer)
    loaded = load(model, device)
    with evaluating(loaded):
        ran = HFLM(pretrained=loaded, tokenizer=tokenizer, batch_size=batch_size)
        told = simple_evaluate(ran, tasks=list(tasks), task_manager=manager, **lm_eval_kwargs)
    found = {}
    for task, values in (told or {"results": {}})["results"].items():
        numbers = {key: value for key, value in values.items() if key not in ("alias", "name")}
        found[task] = {key: _number(value) for key, value in numbers.items()}
        if task in told["n-samples"]:
            found[task]["samples"] = told["n-samples"][task]["effective"]
    return found


def acceptance(
    model: Any,
    data: Iterable[Any],
    *,
    prompts: int = 16,
    prompt_tokens: int = 64,
    depth: int = 4,
    new_tokens: int = 64,
    tokenizer: Any = None,
    device: torch.device | str | None = None,
) -> Acceptance | None:
    """Measure how many drafts of its modules of MTP a model accepts, behind pieces of texts.

    Args:
        model: Folder or name on the Hub.
        data: Texts, or sequences of token ids; they are joined as by `perplexity`.
        prompts: How many are cut from them, one behind the other.
        prompt_tokens: Of each.
        depth: Drafts of a position.
        new_tokens: Of an answer at most.
        tokenizer: For texts; the folder's own by default.
        device: To run it on; by default a GPU if there is one.

    Returns:
        What `slimmoe.mtp.acceptance_rate` does; None where the folder has no modules.

    Raises:
        ValueError: Fewer tokens than one prompt, or answers that are shorter than drafts.
    """
    from slimmoe.mtp import MTPHead, acceptance_rate

    check_range("prompts", prompts, 1, 1 << 20, "pieces of the texts")
    check_range("prompt_tokens", prompt_tokens, 1, 1 << 31, "of each prompt")
    items, folder = list(data), fetched(model)
    loaded = load(folder, device)
    if not MTPHead.is_in(folder, loaded.config):
        return None
    stream = _joined(items, _reader(folder, items, tokenizer))
    if len(stream) < prompt_tokens:
        remedy = "give more text, or shorter prompts"
        raise ValueError(message("prompt_tokens", f"at most {len(stream)}", prompt_tokens, remedy))
    _check_ids(stream, loaded)
    count = min(prompts, len(stream) // prompt_tokens)
    pieces = list(stream[: count * prompt_tokens].view(count, prompt_tokens))
    head = MTPHead.from_pretrained(folder, loaded)
    return acceptance_rate(loaded, head, pieces, depth=depth, new_tokens=new_tokens)


def load(model: Any, device: torch.device | str | None = None) -> Any:
    """Return a model: one in memory as it is, a folder's in the dtype of its files.

    Args:
        model: Folder or name on the Hub, or a model of transformers.
        device: For a folder; by default a GPU if there is one.
    """
    if not isinstance(model, str | Path):
        return model
    from transformers import AutoModelForCausalLM

    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    found = AutoModelForCausalLM.from_pretrained(fetched(model), dtype="auto")
    return found.to(torch.device(place))


def _reader(model: Any, items: Sequence[Any], tokenizer: Any) -> Any:
    """Return a tokenizer where texts need one and the model is a folder."""
    if not items:
        raise ValueError(message("data", "texts or token ids", items, "none there"))
    if tokenizer is not None or not isinstance(items[0], str) or not isinstance(model, str | Path):
        return tokenizer
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(fetched(model))


def _joined(items: list[Any], tokenizer: Any) -> Tensor:
    """Return the tokens of all items, one behind the other."""
    return torch.cat(make_sequences(items, 1 << 31, tokenizer))


def _check_ids(stream: Tensor, model: Any) -> None:
    size = model.config.get_text_config().vocab_size
    low, high = int(stream.min()), int(stream.max())
    if low < 0 or high >= size:
        remedy = "use the model's own tokenizer"
        raise ValueError(
            message("data", f"token ids in [0, {size})", low if low < 0 else high, remedy)
        )


def _number(value: Any) -> Any:
    """Return a number that JSON has; None for another, or for what is none."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return value if plain and math.isfinite(value) else None
