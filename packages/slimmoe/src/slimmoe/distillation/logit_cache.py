"""What a teacher says of a dataset, on disk: its K likeliest tokens, or K that are drawn.

The likeliest tokens are what can be kept of a law, and no estimate of it; drawn ones are, for their
expectation is that of the whole law (Sparse Logit Sampling, arXiv:2503.16870).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels._checks import check_range, message
from shared_kernels.checkpoint import TensorFolder, TensorInfo, write_safetensors
from shared_kernels.files import write_text
from shared_kernels.ops.distill import sample_teacher
from tqdm.auto import tqdm

from slimmoe.distillation.alignment import (
    TeacherCheck,
    not_finite,
    tokenizer_of,
    vocabulary_sha256,
)
from slimmoe.distillation.rows import IGNORED, INDEX, documents, labels_of, targets
from slimmoe.errors import ResumeError
from slimmoe.streaming import checksum

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from slimmoe.distillation.teacher import Teacher

_RECORD = "cache.json"
#: Rows whose logits are there at a time.
_ROWS = 512


class CachedDataset:
    """A dataset whose rows know their number in a cache.

    Args:
        data: Rows with ``input_ids``.
    """

    def __init__(self, data: Sequence[Any]) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {**self.data[number], INDEX: number}


class TeacherLogitCache:
    """Reads what `build` wrote.

    Args:
        folder: Of it.

    Attributes:
        sampled: Whether tokens were drawn; then numbers beside them are weights, else logarithms of
            probabilities.
        temperature: Of the teacher's law.

    Raises:
        FileNotFoundError: There is none.
        ValueError: A part of it is missing, or of another size.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        told = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        for name, file in told["files"].items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != file["bytes"]:
                remedy = "build it again"
                raise ValueError(message("folder", f"{name} as it was written", folder, remedy))
        self._folder = TensorFolder(folder)
        self.sampled, self.temperature = bool(told["sampled"]), float(told["temperature"])
        self._tokenizer: str | None = told["tokenizer_sha256"]
        self._at: list[int] = told["at"]
        self._firsts: list[int] = told["firsts"]
        self._hashes: list[str] = told["sha256"]

    def __len__(self) -> int:
        return len(self._hashes)

    @classmethod
    @torch.no_grad()
    def build(
        cls,
        folder: str | Path,
        teacher: Teacher,
        data: Sequence[Any],
        *,
        tokens: int = 64,
        sampled: bool = False,
        temperature: float = 1.0,
        seed: int = 0,
        part_tokens: int = 1 << 17,
        resume: bool = True,
        check_teacher: bool = True,
        progress: bool = True,
    ) -> TeacherLogitCache:
        """Run a teacher on a dataset and write down what it says.

        Parts lie in a folder beside the one that is built, which they become at the end. A run
        that was stopped goes on behind the last whole part, and gives the same bytes as one that
        was not.

        Args:
            folder: That is not there yet.
            teacher: To be asked.
            data: Rows with ``input_ids``, one sequence each, without padding; or several, with
                ``position_ids`` that begin anew.
            tokens: K of each row: the likeliest, or as many drawn with repeats.
            sampled: Whether they are drawn.
            temperature: Of its law.
            seed: Of drawing; draws of a sequence depend on its number and on nothing else.
            part_tokens: Of the dataset in a file, which are lost at most when a run is stopped; a
                sequence is never cut.
            resume: Whether to go on with what was begun; else it is begun anew.
            check_teacher: Whether to refuse a teacher that is far worse at the first labels than an
                even law; see `TeacherCheck`.
            progress: Whether to show a bar.

        Raises:
            FileExistsError: The folder is there.
            ResumeError: What was begun was with another teacher, dataset or option.
            ValueError: No sequences, more tokens than the vocabulary has, or a teacher that speaks
                of other tokens.
            FloatingPointError: What a teacher says is not finite.
        """
        vocabulary = len(teacher.weight)
        check_range("tokens", tokens, 1, vocabulary + 1, "of the vocabulary")
        check_range("part_tokens", part_tokens, 1, 1 << 40, "131072 are 64 MiB of 64 likeliest")
        if not len(data):
            raise ValueError(message("data", "sequences", len(data), "give rows with input_ids"))
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise FileExistsError(f"{folder} exists and is not empty; choose another folder")
        hashes = [_hash(row) for row in data]
        firsts, at = _parts([len(row["input_ids"]) for row in data], part_tokens)
        key = {
            "teacher": teacher.fingerprint(),
            "dataset": hashlib.sha256("".join(hashes).encode()).hexdigest(),
            "tokens": tokens, "sampled": sampled, "temperature": temperature,
            "seed": seed if sampled else None, "part_tokens": part_tokens,
        }  # fmt: skip
        begun = folder.parent / f".{folder.name}.slimmoe"
        files = _begin(begun, key, resume)
        asker = _Asker(teacher, tokens, sampled, temperature, seed,
                       TeacherCheck() if check_teacher else None)  # fmt: skip
        with tqdm(total=at[-1], desc="asking the teacher", unit="token", disable=not progress) as b:
            for part, (first, end) in enumerate(zip(firsts, [*firsts[1:], len(data)], strict=True)):
                name = f"part-{part + 1:05d}-of-{len(firsts):05d}.safetensors"
                if name in files:
                    b.update(at[end] - at[first])
                    continue
                said = []
                for number in range(first, end):
                    said.append(asker.ask(number, data[number]))
                    b.update(at[number + 1] - at[number])
                files[name] = _write(begun / name, part, said)
                write_text(begun / _RECORD, json.dumps({**key, "files": files}) + "\n")
        record = {
            **key, "tokenizer_sha256": vocabulary_sha256(tokenizer_of(teacher.path)),
            "files": dict(sorted(files.items())), "firsts": firsts, "at": at, "sha256": hashes,
        }  # fmt: skip
        write_text(begun / _RECORD, json.dumps(record) + "\n")
        if folder.exists():
            folder.rmdir()
        begun.rename(folder)
        return cls(folder)

    def attach(self, data: Sequence[Any]) -> CachedDataset:
        """Return the dataset, whose rows know their number here.

        Raises:
            ValueError: It is another one.
        """
        if len(data) != len(self):
            remedy = "build a cache of this dataset"
            raise ValueError(message("data", f"{len(self)} sequences", len(data), remedy))
        for number, row in enumerate(data):
            if _hash(row) != self._hashes[number]:
                remedy = "build a cache of this dataset, in this order"
                raise ValueError(
                    message("data", f"the same tokens in row {number}", "others", remedy)
                )
        return CachedDataset(data)

    def check_tokenizer(self, student: Any) -> None:
        """Refuse a student whose tokens have other ids, if both tokenizers are known.

        Args:
            student: Its tokenizer, or None.

        Raises:
            ValueError: They differ.
        """
        known = vocabulary_sha256(student)
        if known is not None and self._tokenizer not in (None, known):
            raise ValueError(
                "teacher_model: expected the student's tokens, got a cache of a teacher some of "
                "whose tokens have other ids; distil from a teacher with the same tokenizer"
            )

    def rows(self, numbers: Tensor, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return what the teacher says of some sequences, ``(B T, K)`` each.

        Args:
            numbers: ``(B,)``, of the sequences.
            size: T, to which they are padded on the right.
            device: Of the result.

        Returns:
            Tokens, -1 where there is none, and their numbers.
        """
        found = []
        for kind, nothing in (("indices", -1), ("numbers", 0)):
            parts = []
            for number in numbers.tolist():
                file = bisect_right(self._firsts, number) - 1
                before = self._at[self._firsts[file]]
                place = slice(self._at[number] - before, self._at[number + 1] - before)
                part = self._folder.part(_name(kind, file), place)
                missing = part.new_full((size - len(part), part.shape[1]), nothing)
                parts.append(torch.cat([part, missing]))
            found.append(torch.cat(parts).to(device))
        return found[0], found[1]


@dataclass
class _Asker:
    """Asks a teacher of one sequence after the other."""

    teacher: Teacher
    tokens: int
    sampled: bool
    temperature: float
    seed: int
    check: TeacherCheck | None

    def __post_init__(self) -> None:
        self._head = self.teacher.weight.float().T

    def ask(self, number: int, row: Any) -> tuple[Tensor, Tensor]:
        """Return tokens int32 and their numbers float32, ``(T, K)`` each."""
        device = self._head.device
        inputs = {name: torch.as_tensor(row[name], device=device)[None]
                  for name in ("input_ids", "position_ids", "labels")
                  if row.get(name) is not None}  # fmt: skip
        hidden = self.teacher(inputs)[0]
        if self.check is not None and not self.check.over:
            labels, _ = targets(labels_of(inputs), documents(inputs), 0)
            self.check.see(hidden, self.teacher.weight, labels, IGNORED)
        draws = torch.Generator(device).manual_seed(_seed(self.seed, number))
        parts = []
        for some in hidden.split(_ROWS):
            logits = some.float() @ self._head
            if not bool(logits.isfinite().all()):
                raise FloatingPointError(f"{not_finite('logits')} (sequence {number})")
            if self.sampled:
                drawn = sample_teacher(logits, self.tokens, draws, temperature=self.temperature)
                parts.append((drawn.indices, drawn.weights))
            else:
                best = (logits / self.temperature).log_softmax(-1).topk(self.tokens, -1)
                parts.append((best.indices.int(), best.values))
        return torch.cat([a for a, _ in parts]).cpu(), torch.cat([b for _, b in parts]).cpu()


def _parts(lengths: list[int], most: int) -> tuple[list[int], list[int]]:
    """Return numbers of the sequences that parts begin with, and where each sequence begins."""
    at, firsts, size = [0], [0], 0
    for number, length in enumerate(lengths):
        if size and size + length > most:
            firsts.append(number)
            size = 0
        size += length
        at.append(at[-1] + length)
    return firsts, at


def _begin(folder: Path, key: dict[str, Any], resume: bool) -> dict[str, Any]:
    """Return files that are whole already, of the same teacher, dataset and options."""
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    if not (folder / _RECORD).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / _RECORD, json.dumps({**key, "files": {}}) + "\n")
        return {}
    found = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    for name, value in key.items():
        if found.get(name) != value:
            raise ResumeError(
                f"{folder} was begun with another {name}; remove it, or give resume=False"
            )
    # a file that was damaged since is written once more
    return {
        name: told for name, told in found["files"].items()
        if (folder / name).is_file() and checksum(folder / name) == told
    }  # fmt: skip


def _write(path: Path, part: int, said: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Write a part as a whole, and return size and SHA-256."""
    tensors = [torch.cat([pair[kind] for pair in said]) for kind in (0, 1)]
    infos = [TensorInfo(_name(kind, part), tensor.dtype, tuple(tensor.shape))
             for kind, tensor in zip(("indices", "numbers"), tensors, strict=True)]  # fmt: skip
    partial = path.with_suffix(".partial")
    write_safetensors(partial, infos, tensors)
    partial.rename(path)
    return checksum(path)


def _name(kind: str, part: int) -> str:
    return f"{kind}.{part:05d}"


def _seed(seed: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:8], "big") >> 1


def _hash(row: Any) -> str:
    found = hashlib.sha256()
    for name in ("input_ids", "position_ids"):
        if row.get(name) is not None:
            plain = torch.as_tensor(row[name]).cpu().to(torch.int64).contiguous()
            found.update(name.encode() + plain.numpy().astype("<i8").tobytes())
    return found.hexdigest()
