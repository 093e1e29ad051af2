"""Whether what was written is what a plan says, and what transformers takes it for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from slimmoe.dequantize import Dequantized
from slimmoe.errors import VerificationError
from slimmoe.memory import compress_model
from slimmoe.planning import CompressionPlan
from slimmoe.streaming import MANIFEST, checksum
from slimmoe.weights import FolderWeights, Source, load_model


@torch.no_grad()
def verify(
    folder: str | Path, source: str | Path | None = None, *, tokens: int = 32
) -> dict[str, Any]:
    """Check a compressed model.

    Its files have the sizes and SHA-256 that were noted, and its tensors the names and shapes that
    the plain class of transformers wants. With the model that it was made of, it is also loaded and
    compared bit for bit with one that is compressed in memory, which takes as much memory as all
    three.

    Args:
        folder: Of `slimmoe.compress`.
        source: What it was made of.
        tokens: Random ones that both models are run on.

    Returns:
        What was checked: number of ``files``, ``tensors``, those of modules of ``mtp``, and with a
        source the largest difference of ``logits``.

    Raises:
        VerificationError: Something is not as it should be.
        FileNotFoundError: It was not written by slimmoe.
    """
    folder = Path(folder)
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    for name, told in manifest["files"].items():
        if not (folder / name).is_file():
            raise VerificationError(f"{folder / name}: it is not there")
        if checksum(folder / name) != told:
            raise VerificationError(f"{folder / name}: its bytes are not those that were written")
    made = Source(folder)
    found = {
        name: made.weights.shape(name) for name, match in made.matches.items() if match.mtp is None
    }
    wanted = _wanted(made)
    for name in sorted(found.keys() ^ wanted.keys()):
        which = "has no place in" if name in found else "is missing for"
        raise VerificationError(f"{folder}: {name} {which} {made.config['architectures']}")
    for name, shape in found.items():
        if shape != wanted[name]:
            raise VerificationError(f"{folder}: {name} has shape {shape}, not {wanted[name]}")
    told = {"files": len(manifest["files"]), "tensors": len(found),
            "mtp": len(made.matches) - len(found)}  # fmt: skip
    if source is not None:
        plan = CompressionPlan.from_json(json.dumps(manifest["plan"]))
        told["logits"] = _compared(folder, source, plan, tokens)
    return told


def _wanted(made: Source) -> dict[str, tuple[int, ...]]:
    """Return names and shapes that the plain class has on disk."""
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    config = made.config_class.from_dict(made.config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    state = model.state_dict()
    apart = any(match.expert is not None for match in made.matches.values())
    if apart:
        state = revert_weight_conversion(model, state)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    assert isinstance(made.weights, FolderWeights)
    return {
        name: tuple(tensor.shape) for name, tensor in state.items()
        if name not in tied or name in made.matches
    }  # fmt: skip


def _compared(folder: Path, source: str | Path, plan: CompressionPlan, tokens: int) -> float:
    from transformers import AutoModelForCausalLM

    after = AutoModelForCausalLM.from_pretrained(folder)
    read = Source(source, dequantize=True)
    quantised = isinstance(read.weights, Dequantized)
    before = load_model(read) if quantised else AutoModelForCausalLM.from_pretrained(source)
    wanted = compress_model(before, plan)
    state = after.state_dict()
    for name, tensor in wanted.state_dict().items():
        if name not in state or not torch.equal(state[name], tensor):
            raise VerificationError(f"{folder}: {name} is not what compression in memory gives")
    ids = torch.randint(int(after.config.vocab_size), (1, tokens),
                        generator=torch.Generator().manual_seed(0))  # fmt: skip
    logits = [model.eval()(ids, use_cache=False).logits for model in (after, wanted)]
    far = float((logits[0] - logits[1]).abs().max())
    if not far == 0:
        raise VerificationError(f"{folder}: its logits are off by {far:.1e}")
    return far
