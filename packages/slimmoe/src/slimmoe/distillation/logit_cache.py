"""What a teacher says of a dataset, on disk: its K likeliest tokens, or K that are drawn.

The likeliest tokens are what can be kept of a law, and no estimate of it; drawn ones are, for their
expectation is that of the whole law (Sparse Logit Sampling, arXiv:2503.16870).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels._checks import check_range, message
from shared_kernels.checkpoint import TensorFolder, TensorInfo, replacing_folder, write_safetensors
from shared_kernels.files import write_text
from shared_kernels.ops.distill import sample_teacher
from tqdm.auto import tqdm

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from slimmoe.distillation.teacher import Teacher

_RECORD = "cache.json"
_FILE = "model.safetensors"
#: Name of a batch's numbers of sequences.
INDEX = "cache_index"
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
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        told = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        self._folder = TensorFolder(folder)
        self.sampled, self.temperature = bool(told["sampled"]), float(told["temperature"])
        self._at: list[int] = told["at"]
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
        progress: bool = True,
    ) -> TeacherLogitCache:
        """Run a teacher on a dataset and write down what it says.

        Args:
            folder: That is not there yet.
            teacher: To be asked.
            data: Rows with ``input_ids``, one sequence each, without padding.
            tokens: K of each row: the likeliest, or as many drawn with repeats.
            sampled: Whether they are drawn.
            temperature: Of its law.
            seed: Of drawing.
            progress: Whether to show a bar.

        Raises:
            FileExistsError: The folder is there.
            ValueError: No sequences, or more tokens than the vocabulary has.
        """
        vocabulary = len(teacher.weight)
        check_range("tokens", tokens, 1, vocabulary + 1, "of the vocabulary")
        if not len(data):
            raise ValueError(message("data", "sequences", len(data), "give rows with input_ids"))
        lengths = [len(row["input_ids"]) for row in data]
        at = [0, *torch.tensor(lengths).cumsum(0).tolist()]
        device = teacher.weight.device
        head = teacher.weight.float().T
        draws = torch.Generator(device).manual_seed(seed)

        def said() -> Iterator[tuple[Tensor, Tensor]]:
            for row in tqdm(data, desc="asking the teacher", disable=not progress):
                ids = torch.as_tensor(row["input_ids"], device=device)[None]
                hidden = teacher({"input_ids": ids})[0]
                parts = []
                for some in hidden.split(_ROWS):
                    logits = some.float() @ head
                    if sampled:
                        drawn = sample_teacher(logits, tokens, draws, temperature=temperature)
                        parts.append((drawn.indices, drawn.weights))
                    else:
                        law = (logits / temperature).log_softmax(-1)
                        best = law.topk(tokens, -1)
                        parts.append((best.indices.int(), best.values))
                yield torch.cat([a for a, _ in parts]).cpu(), torch.cat([b for _, b in parts]).cpu()

        record = {
            "sampled": sampled, "temperature": temperature, "tokens": tokens, "at": at,
            "sha256": [_hash(row["input_ids"]) for row in data],
        }  # fmt: skip
        with replacing_folder(folder) as made:
            # one pass over the teacher, and two files that grow with it
            indices = torch.from_file(str(made / "indices.bin"), True, at[-1] * tokens,
                                      dtype=torch.int32).view(-1, tokens)  # fmt: skip
            numbers = torch.from_file(str(made / "numbers.bin"), True, at[-1] * tokens,
                                      dtype=torch.float32).view(-1, tokens)  # fmt: skip
            for begin, (some, values) in zip(at, said(), strict=False):
                indices[begin : begin + len(some)] = some
                numbers[begin : begin + len(some)] = values
            infos = [TensorInfo("indices", indices.dtype, tuple(indices.shape)),
                     TensorInfo("numbers", numbers.dtype, tuple(numbers.shape))]  # fmt: skip
            write_safetensors(made / _FILE, infos, (indices, numbers))
            for name in ("indices.bin", "numbers.bin"):
                (made / name).unlink()
            write_text(made / _RECORD, json.dumps(record) + "\n")
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
            if _hash(row["input_ids"]) != self._hashes[number]:
                remedy = "build a cache of this dataset, in this order"
                raise ValueError(
                    message("data", f"the same tokens in row {number}", "others", remedy)
                )
        return CachedDataset(data)

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
        for name, nothing in (("indices", -1), ("numbers", 0)):
            parts = []
            for number in numbers.tolist():
                begin, end = self._at[number], self._at[number + 1]
                part = self._folder.part(name, slice(begin, end))
                missing = part.new_full((size - len(part), part.shape[1]), nothing)
                parts.append(torch.cat([part, missing]))
            found.append(torch.cat(parts).to(device))
        return found[0], found[1]


def _hash(ids: Any) -> str:
    plain = torch.as_tensor(ids).cpu().to(torch.int64).contiguous().numpy().astype("<i8")
    return hashlib.sha256(plain.tobytes()).hexdigest()
