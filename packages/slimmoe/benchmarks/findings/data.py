"""From documents to blocks of tokens, and questions with four answers."""

from __future__ import annotations

import hashlib
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from shared_kernels.files import write_text
from tqdm.auto import tqdm

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from findings.corpus import Document

VOCABULARY = 8192
BLOCK = 512
DOMAINS = ("dictionary", "books", "manuals", "code")
_END = "<|endoftext|>"
#: Of a thousand documents, those for curves while training and those for the numbers at the end.
_CURVE, _TEST = 4, 16
_QUESTIONS = 1000


@dataclass(frozen=True)
class Data:
    """What `prepare` wrote.

    Attributes:
        train: uint16 ``(N, BLOCK)``.
        curve: int64 ``(N, BLOCK)``, of other documents.
        test: int64 ``(N, BLOCK)``, of yet others.
        domain: int64 ``(N,)`` of each test block, a place in `DOMAINS`.
        questions: By kind, of a prompt and four answers, of which the first is right.
        folder: Of it, with a tokenizer.
    """

    train: Tensor
    curve: Tensor
    test: Tensor
    domain: Tensor
    questions: dict[str, list[dict[str, object]]]
    folder: Path


def prepare(documents: Sequence[Document], folder: str | Path, *, sample: int = 40_000_000) -> None:
    """Train a tokenizer, split by document, and write blocks of tokens.

    Args:
        documents: Of `corpus.documents`.
        folder: For ``data.safetensors``, ``questions.json`` and a tokenizer.
        sample: Characters that the tokenizer is trained on.
    """
    from transformers import PreTrainedTokenizerFast

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, list[Document]] = {"train": [], "curve": [], "test": []}
    for document in documents:
        parts[_part(document.text)].append(document)
    random.Random(0).shuffle(parts["train"])
    raw = _tokenizer([d.text for d in parts["train"]], sample)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=_END, bos_token=_END)
    tokenizer.save_pretrained(folder)
    tensors = {}
    for name, part in parts.items():
        groups = [part] if name != "test" else [[d for d in part if d.domain == x] for x in DOMAINS]
        blocks = [_blocks(raw, group, name) for group in groups]
        tensors[name] = torch.cat(blocks)
        if name == "test":
            numbers = [torch.full((len(b),), n) for n, b in enumerate(blocks)]
            tensors["domain"] = torch.cat(numbers)
    tensors = {k: v.to(torch.uint16) for k, v in tensors.items()}
    save_file(tensors, folder / "data.safetensors")
    asked = {"knowledge": list(_knowledge(parts["train"])), "code": list(_code(parts["test"]))}
    questions = {kind: some for kind, some in asked.items() if some}
    write_text(folder / "questions.json", json.dumps(questions, indent=1) + "\n")


def load(folder: str | Path) -> Data:
    """Read what `prepare` wrote."""
    folder = Path(folder)
    tensors = load_file(folder / "data.safetensors")
    questions = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    rest = {name: tensors[name].long() for name in ("curve", "test", "domain")}
    return Data(tensors["train"], **rest, questions=questions, folder=folder)


def _part(text: str) -> str:
    place = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) % 1000
    if place < _CURVE:
        return "curve"
    return "test" if place < _CURVE + _TEST else "train"


def _tokenizer(texts: Sequence[str], sample: int):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip

    def some() -> Iterator[str]:
        left = sample
        for text in texts:
            yield text
            left -= len(text)
            if left < 0:
                return

    made.train_from_iterator(some(), trainer)
    return made


def _blocks(tokenizer, documents: Sequence[Document], name: str) -> Tensor:
    """Return ``(N, BLOCK)`` of documents one after the other; the last tokens are left out."""
    end, ids = tokenizer.token_to_id(_END), []
    for at in tqdm(range(0, len(documents), 256), desc=f"{name} tokens"):
        for found in tokenizer.encode_batch([d.text for d in documents[at : at + 256]]):
            ids += [torch.tensor(found.ids, dtype=torch.int32), torch.tensor([end]).int()]
    flat = torch.cat(ids) if ids else torch.zeros(0, dtype=torch.int32)
    return flat[: len(flat) // BLOCK * BLOCK].view(-1, BLOCK)


def _knowledge(documents: Sequence[Document]) -> Iterator[dict[str, object]]:
    """Yield headwords of WordNet, each with its meaning and those of three others."""
    pattern = re.compile(r"^(\w[\w -]{3,24})\n    n 1?: ?([^\n;\[\]]{24,60})", re.MULTILINE)
    entries = [
        match.groups()
        for document in documents
        if document.source.startswith("dict-wn/")
        for match in pattern.finditer(document.text)
    ]
    yield from _choices([(f"{word}\n    n :", f" {said}") for word, said in entries])


def _code(documents: Sequence[Document]) -> Iterator[dict[str, object]]:
    """Yield places in source files, each with the line that follows and three from elsewhere."""
    found, draws = [], random.Random(1)
    for document in documents:
        if document.domain != "code":
            continue
        lines = document.text.split("\n")
        for _ in range(48):
            at = draws.randrange(8, max(9, len(lines)))
            if at < len(lines) and len(lines[at].strip()) >= 16:
                found.append(("\n".join(lines[at - 8 : at]) + "\n", lines[at]))
    yield from _choices(found)


def _choices(pairs: Sequence[tuple[str, str]]) -> Iterator[dict[str, object]]:
    draws = random.Random(0)
    for prompt, answer in draws.sample(pairs, min(_QUESTIONS, len(pairs))):
        others = [said for _, said in draws.sample(pairs, 8) if said != answer][:3]
        yield {"prompt": prompt, "answers": [answer, *others]}
