"""Read a folder of safetensors lazily, and write one tensor by tensor.

The writer differs from ``safetensors.torch.save_file`` in that a shard is never in memory as a
whole: its header follows from names, dtypes and shapes known beforehand, and each tensor's bytes
are written as they come.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator, Sequence

    from torch import Tensor

INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAME = "model.safetensors"

_CODES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODE_OF = {dtype: code for code, dtype in _CODES.items()}
# Other files of weights would be stale beside the new ones.
_WEIGHT_SUFFIXES = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".gguf", ".onnx", ".zolog",
}  # fmt: skip


class TensorInfo(NamedTuple):
    """Name, dtype and shape of a stored tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class TensorFolder:
    """The safetensors of a model folder, single or sharded.

    Attributes:
        path: The folder.
        shards: Tensors of each file, in file order.
        file_of: File that holds each tensor.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Read the headers.

        Raises:
            FileNotFoundError: No folder, or no safetensors in it.
            ValueError: The index names a file or tensor that is not there.
        """
        from safetensors import safe_open

        self.path = Path(path)
        if not self.path.is_dir():
            raise FileNotFoundError(f"expected a folder with safetensors, {self.path} is none")
        self.shards: dict[str, list[TensorInfo]] = {}
        self.metadata: dict[str, dict[str, str]] = {}
        self._open: dict[str, Any] = {}
        for file in self._files():
            handle = safe_open(self.path / file, framework="pt", device="cpu")
            self._open[file] = handle
            self.metadata[file] = dict(handle.metadata() or {})
            self.shards[file] = [_info(handle, name) for name in handle.offset_keys()]
        self.file_of = {t.name: file for file, infos in self.shards.items() for t in infos}

    def _files(self) -> list[str]:
        index = self.path / INDEX_NAME
        if index.is_file():
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = sorted(set(weight_map.values()))
            if any(Path(f).name != f for f in files):
                raise ValueError(f"{index} names files outside its folder; it is not trusted")
            missing = [f for f in files if not (self.path / f).is_file()]
            if missing:
                raise ValueError(f"{index} names {missing[0]}, which is not there")
            return files
        files = sorted(f.name for f in self.path.glob("*.safetensors"))
        if WEIGHTS_NAME in files:
            return [WEIGHTS_NAME]
        if not files:
            raise FileNotFoundError(
                f"no safetensors in {self.path}; load the model with transformers and save it with "
                "save_pretrained(folder)"
            )
        return files

    def __contains__(self, name: str) -> bool:
        return name in self.file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self.file_of)

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor, backed by the memory-mapped file."""
        return self._open[self.file_of[name]].get_tensor(name)

    def part(self, name: str, index: Any) -> Tensor:
        """Read a part of one tensor; what an index leaves out is not read.

        Args:
            name: Of the tensor.
            index: An integer, a slice or a tuple of them; ``...`` for all of it.
        """
        return self[name] if index is ... else self._open[self.file_of[name]].get_slice(name)[index]


def _info(handle: Any, name: str) -> TensorInfo:
    part = handle.get_slice(name)
    code = part.get_dtype()
    if code not in _CODES:
        raise ValueError(f"tensor {name!r} has dtype {code}, which this reader does not know")
    return TensorInfo(name, _CODES[code], tuple(part.get_shape()))


def write_safetensors(
    path: str | os.PathLike[str],
    infos: Sequence[TensorInfo],
    tensors: Iterable[Tensor],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write one safetensors file, one tensor in memory at a time.

    Args:
        path: The file.
        infos: What will come, in order.
        tensors: The values, in the same order; each is asked for after the one before is written.
        metadata: String pairs for the header; ``format: pt`` is added.

    Raises:
        ValueError: A tensor is not what its info says.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    at = 0
    for info in infos:
        header[info.name] = {
            "dtype": _CODE_OF[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [at, at + info.nbytes],
        }
        at += info.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with Path(path).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for info, tensor in zip(infos, tensors, strict=True):
            if tensor.dtype != info.dtype or tuple(tensor.shape) != info.shape:
                raise ValueError(
                    f"{info.name}: expected {info.dtype} {info.shape}, "
                    f"got {tensor.dtype} {tuple(tensor.shape)}"
                )
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            file.write(memoryview(flat.view(torch.uint8).numpy()))
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Generator[Path]:
    """Give a temporary folder that becomes ``path`` when the block ends without an error.

    Raises:
        FileExistsError: ``path`` exists and is not an empty folder.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not empty; choose another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        if path.exists():
            path.rmdir()
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def copy_side_files(source: Path, target: Path, *, skip: Iterable[str] = ()) -> None:
    """Copy config, tokenizer and other files that are not weights, following links.

    Args:
        source: From there.
        target: To there.
        skip: Names of files that are left out.
    """
    for file in sorted(source.iterdir()):
        if file.name in skip:
            continue
        if file.is_file() and file.suffix not in _WEIGHT_SUFFIXES and file.name != INDEX_NAME:
            shutil.copyfile(file, target / file.name)


def write_index(target: Path, shards: dict[str, list[TensorInfo]]) -> None:
    """Write the index of a sharded folder; a single ``model.safetensors`` needs none."""
    if list(shards) == [WEIGHTS_NAME]:
        return
    index = {
        "metadata": {"total_size": sum(t.nbytes for infos in shards.values() for t in infos)},
        "weight_map": {t.name: file for file, infos in shards.items() for t in infos},
    }
    (target / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
