"""Fine-tune from files: what ``zo2 train`` does."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from pathlib import Path
from typing import Any

import zo2
from zo2.config import TrainConfig

__all__ = ["encode", "load_config", "plan_run", "read_rows", "train"]

logger = logging.getLogger(__name__)

IGNORED = -100


def load_config(
    path: Path | None, options: dict[str, Any], settings: list[str] | None = None
) -> TrainConfig:
    """Put a run's configuration together: file, then options, then settings.

    Args:
        path: YAML (or JSON) file with the fields of `zo2.TrainConfig`; or None.
        options: Top-level fields; those that are None are not given.
        settings: ``KEY=VALUE`` for any field, nested ones with dots: ``zo.eps=1e-2``.

    Raises:
        ValueError: A key that does not exist, a value that is refused, or no YAML.
    """
    import yaml

    values: Any = {}
    if path is not None:
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not YAML: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path}: expected options as 'name: value', got {values!r}")
    values |= {key: value for key, value in options.items() if value is not None}
    for setting in settings or ():
        key, equals, text = setting.partition("=")
        *parents, leaf = key.split(".")
        if not equals or not leaf:
            raise ValueError(f"expected KEY=VALUE, such as zo.eps=1e-2, got {setting!r}")
        inner = values
        for parent in parents:
            inner = inner.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise ValueError(f"{setting!r}: {parent} has no options inside")
        inner[leaf] = yaml.safe_load(text)
    missing = [name for name in ("model", "data") if name not in values]
    if missing:
        raise ValueError(f"{' and '.join(missing)} must be given, as an option or in the config")
    try:
        return TrainConfig.from_dict(_numbers(values))
    except (TypeError, ValueError) as error:
        where = "" if path is None else f"{path}: "
        raise ValueError(f"{where}{error}") from None


def _numbers(value: Any) -> Any:
    """YAML 1.1 reads 1e-6, without a point, as text."""
    if isinstance(value, dict):
        return {k: _numbers(v) for k, v in value.items()}
    if isinstance(value, str) and value[:1] in "0123456789-+." and "e" in value.lower():
        with contextlib.suppress(ValueError):
            return float(value)
    return value


# -- data ----------------------------------------------------------------------------------------


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Read a ``.jsonl``, ``.json`` (a list of objects) or ``.parquet`` file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Another ending, a broken line, or no rows.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no data file {path}")
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError:
            raise ImportError("reading .parquet needs pyarrow: pip install pyarrow") from None
        rows = pyarrow.parquet.read_table(path).to_pylist()
    elif path.suffix in (".jsonl", ".json"):
        text = path.read_text(encoding="utf-8")
        lines = [(1, text)]
        if path.suffix == ".jsonl":
            lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
        rows = []
        for number, line in lines:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON: {error}") from None
        if path.suffix == ".json":
            rows = rows[0]
    else:
        raise ValueError(f"{path}: expected a .jsonl, .json or .parquet file")
    if not isinstance(rows, list) or not rows or not all(isinstance(r, dict) for r in rows):
        raise ValueError(f"{path}: expected a list of objects, at least one")
    return rows


def encode(rows: list[dict[str, Any]], tokenizer: Any, max_length: int) -> list[dict[str, Any]]:
    """Turn rows into token ids and labels.

    A row has ``text``, all of which is learned; or ``prompt`` and ``completion``, texts or lists
    of messages; or ``messages``, whose last is the completion. Of a prompt nothing is learned. An
    end-of-text token closes texts and completions.

    Args:
        rows: The rows.
        tokenizer: A tokenizer of transformers.
        max_length: Most tokens of an example. A text loses its end; a long prompt its beginning,
            its first token excepted, so that the completion is kept.

    Returns:
        For each row ``input_ids`` and ``labels``; rows whose completion does not fit are left out.

    Raises:
        ValueError: A row has none of these forms, or no row is left.
    """
    examples = []
    for number, row in enumerate(rows, 1):
        try:
            prompt, answer = _tokens(row, tokenizer)
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"row {number} of the data: {error}") from error
        if not prompt:
            answer = answer[:max_length]
        excess = len(prompt) + len(answer) - max_length
        if excess > 0:
            prompt = prompt[:1] + prompt[1 + excess :]
        if not answer or len(prompt) + len(answer) > max_length:
            continue
        labels = [IGNORED] * len(prompt) + answer
        examples.append({"input_ids": prompt + answer, "labels": labels})
    dropped = len(rows) - len(examples)
    if dropped:
        logger.warning(
            "%d of %d rows are left out: their completion is empty or does not fit max_length=%d",
            dropped, len(rows), max_length,
        )  # fmt: skip
    if not examples:
        raise ValueError(f"no row of the data fits max_length={max_length}")
    return examples


def _tokens(row: dict[str, Any], tokenizer: Any) -> tuple[list[int], list[int]]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if row.get("messages"):
        return _chat(row["messages"][:-1], row["messages"], tokenizer)
    if "prompt" in row and "completion" in row:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, list):
            return _chat(prompt, prompt + list(completion), tokenizer)
        ids = tokenizer(prompt)["input_ids"]
        if end and ids[-1:] == end:
            ids = ids[:-1]
        return ids, tokenizer(completion, add_special_tokens=False)["input_ids"] + end
    if isinstance(row.get("text"), str):
        ids = tokenizer(row["text"])["input_ids"]
        return [], ids if ids[-1:] == end else ids + end
    raise ValueError(
        f"expected text, or prompt and completion, or messages; it has {sorted(row) or 'nothing'}"
    )


def _chat(prompt: list, whole: list, tokenizer: Any) -> tuple[list[int], list[int]]:
    def ids(messages: list, **kwargs: Any) -> list[int]:
        out = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **kwargs)
        return list(out["input_ids"])

    before, everything = ids(prompt, add_generation_prompt=True), ids(whole)
    if everything[: len(before)] != before:
        raise ValueError(
            "the chat template does not put the reply behind the prompt's tokens; give prompt and "
            "completion as texts"
        )
    return before, everything[len(before) :]


# -- the run -------------------------------------------------------------------------------------


def _tokenizer(config: TrainConfig) -> Any:
    import transformers

    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(config.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def plan_run(config: TrainConfig) -> zo2.Plan:
    """Read data and tokenizer, and predict time and memory of a batch of the longest examples."""
    rows = encode(read_rows(config.data), _tokenizer(config), config.max_length)
    longest = max(len(row["input_ids"]) for row in rows)
    return zo2.plan(
        config.model,
        tokens=config.batch_size * longest,
        batch_size=config.batch_size,
        dtype=config.dtype,
        zo=config.zo,
        offload=config.offload,
    )


def train(config: TrainConfig) -> dict[str, Any]:
    """Fine-tune, and save the model and its tokenizer in ``output_dir``.

    Nothing is printed to the standard output; progress goes to stderr.

    Returns:
        ``output_dir``, ``log``, ``steps``, ``skipped``, ``train_loss``, ``seconds``, and
        ``eval_loss`` if there is ``eval_data``.

    Raises:
        ValueError: The data or an argument is refused.
    """
    import transformers
    from transformers.trainer_utils import get_last_checkpoint

    tokenizer = _tokenizer(config)
    sets = {
        name: None if path is None else encode(read_rows(path), tokenizer, config.max_length)
        for name, path in (("train", config.data), ("eval", config.eval_data))
    }
    given: dict[str, Any] = {
        "output_dir": config.output_dir,
        "learning_rate": config.lr,
        "lr_scheduler_type": config.lr_scheduler,
        "max_steps": config.steps,
        "per_device_train_batch_size": config.batch_size,
        "report_to": "none",
    }
    arguments = transformers.TrainingArguments(**given | config.trainer)
    checkpoint = None
    if config.resume:
        checkpoint = get_last_checkpoint(config.output_dir)
        if checkpoint is None:
            raise ValueError(f"resume: no checkpoint in {config.output_dir}; start without it")
    with contextlib.redirect_stdout(sys.stderr):
        engine = zo2.from_pretrained(
            config.model, config.zo, config.offload, dtype=config.dtype, device=arguments.device
        )
        trainer = zo2.ZOTrainer(
            engine,
            arguments,
            train_dataset=sets["train"],
            eval_dataset=sets["eval"],
            data_collator=transformers.DataCollatorForSeq2Seq(tokenizer),
            processing_class=tokenizer,
        )
        with engine:
            done = trainer.train(resume_from_checkpoint=checkpoint)
            trainer.save_model()
            result: dict[str, Any] = {
                "output_dir": config.output_dir,
                "log": str(trainer.log_path),
                "steps": done.global_step,
                "skipped": engine.stats()["skipped"],
                "train_loss": done.training_loss,
                "seconds": done.metrics["train_runtime"],
            }
            if sets["eval"] is not None:
                result["eval_loss"] = trainer.evaluate()["eval_loss"]
    return result
