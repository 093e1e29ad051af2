"""Prompts from JSON lines, and completions to them, so that a stopped run goes on."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from shared_kernels.files import write_text
from tqdm import tqdm

from infsampling.sampler import InfiniteSampler

if TYPE_CHECKING:
    from pathlib import Path

    from infsampling.config import SamplingConfig

Prompt = str | list[dict[str, Any]]


def read_prompts(path: Path) -> list[Prompt]:
    """Read prompts: texts or conversations.

    Raises:
        ValueError: A line that is none of these, with its number, or no line.
    """
    found: list[Prompt] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            value = None
        prompt = value.get("prompt") if isinstance(value, dict) else value
        chat = isinstance(prompt, list) and prompt and all(
            isinstance(turn, dict) and isinstance(turn.get("content"), str) and "role" in turn
            for turn in prompt
        )  # fmt: skip
        if not chat and not isinstance(prompt, str):
            raise ValueError(
                f'--prompts: line {number} of {path}: expected a text, {{"prompt": "..."}} or '
                f'{{"prompt": [{{"role": "user", "content": "..."}}]}}, got {line[:60]!r}'
            )
        found.append(prompt)
    if not found:
        raise ValueError(f"--prompts: expected at least one line in {path}")
    return found


def encode(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Return the token ids of a prompt, of a conversation by the chat template."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    made = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
    return list(made["input_ids"])


def sample_to_file(
    model: Any,
    tokenizer: Any,
    config: SamplingConfig,
    prompts: list[Prompt],
    group: int,
    out: Path,
    *,
    name: str,
) -> dict[str, int]:
    """Sample what is missing in a file, and append it as it ends.

    Args:
        model: A causal language model of transformers.
        tokenizer: The model's.
        config: Settings.
        prompts: Texts or conversations.
        group: Completions of each.
        out: JSON lines; settings go beside it, with ``.settings.json`` appended.
        name: Of the model, for the settings.

    Returns:
        How many completions were there, were made, and of how many tokens, in how many steps.

    Raises:
        ValueError: The file was begun with other settings.
    """
    ids = [encode(tokenizer, prompt) for prompt in prompts]
    # slots and policy change no token
    free = ("max_slots", "policy", "turn", "park_limit", "memory_budget",
            "max_resident_prompts", "sync_every", "rerank_every", "prefill_chunk", "compile",
            "cuda_graph")  # fmt: skip
    settings = {k: v for k, v in asdict(config).items() if k not in free}
    settings |= {"model": name, "group": group, "prompts": ids}
    beside = out.with_name(out.name + ".settings.json")
    text = json.dumps(settings)
    if out.exists() and out.stat().st_size:
        if not beside.exists() or json.loads(beside.read_text()) != json.loads(text):
            raise ValueError(
                f"--out: {out} was begun with another model, other prompts or other settings; "
                "choose another file, or delete it"
            )
    else:
        write_text(beside, text)
    there = _repair(out)
    seen: Counter[tuple[int, ...]] = Counter()
    counts, numbers, places = [], [], []
    for index, line in enumerate(ids):
        key = tuple(line)
        missing = [n for n in range(group) if (index, n) not in there]
        counts.append(len(missing))
        numbers += [seen[key] + n for n in missing]
        places += [(index, n) for n in missing]
        seen[key] += group
    sampler = InfiniteSampler(model, config, processing_class=tokenizer)
    sample_of = {(index, number): n for (index, n), number in zip(places, numbers, strict=True)}
    tokens = 0
    with (
        out.open("a", encoding="utf-8") as file,
        tqdm(total=len(prompts) * group, initial=len(there), unit="sample", disable=None) as bar,
    ):
        for found in sampler.stream(ids, counts, sample_ids=numbers):
            index = found.prompt_index
            file.write(
                json.dumps(
                    {
                        "prompt_index": index,
                        "sample_index": sample_of[index, found.sample_index],
                        "completion": tokenizer.decode(found.ids, skip_special_tokens=True),
                        "tokens": len(found.ids),
                        "logprob": float(found.logprobs.double().sum()),
                        "finish_reason": found.finish_reason,
                    }
                )
                + "\n"
            )
            file.flush()
            tokens += len(found.ids)
            bar.update()
    return {"there_before": len(there), "sampled": len(places), "tokens": tokens}


def _repair(out: Path) -> set[tuple[int, int]]:
    """Return which samples a file holds; a line that was cut off is taken out."""
    if not out.exists():
        return set()
    whole, found = [], set()
    lines = out.read_text(encoding="utf-8").splitlines(keepends=True)
    for line in lines:
        try:
            value = json.loads(line)
            place = (value["prompt_index"], value["sample_index"])
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
        if line.endswith("\n") and place not in found:
            found.add(place)
            whole.append(line)
    if len(whole) < len(lines):
        write_text(out, "".join(whole))
    return found
