"""What a compressed model says of itself: ``README.md`` beside its weights."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from shared_kernels.files import write_text
from shared_kernels.units import format_bytes

from slimmoe._version import __version__
from slimmoe.configuration import CompressionConfig
from slimmoe.summary import compared

if TYPE_CHECKING:
    from pathlib import Path

    from slimmoe.planning import CompressionPlan
    from slimmoe.weights import Source

FILE = "README.md"
_TAG = "slimmoe"
#: What is as true of a model as of the one that it was made of.
_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag", "datasets")


def card(source: Source, plan: CompressionPlan, base_model: str | None = None) -> str:
    """Return a model card.

    The licence is that of the source's own card, if it has one.

    Args:
        source: What goes in, of a folder.
        plan: What was done to it.
        base_model: Name of the source on the Hub; by default its folder's.
    """
    from huggingface_hub import ModelCardData

    assert source.path is not None
    known = _metadata(source.path / FILE)
    # what was compressed before has the name of what it was made of
    before = known.get("base_model") if _TAG in (known.get("tags") or ()) else None
    base = base_model or before or source.path.name
    kept: dict[str, Any] = {key: known[key] for key in _KEPT if known.get(key) is not None}
    data = ModelCardData(
        base_model=base, library_name="transformers", tags=[_TAG, "mixture-of-experts"], **kept
    )
    lines = [
        f"# {base}, made smaller", "",
        f"Made by slimmoe {__version__}; it loads in plain transformers.", "",
        "|  | before | after |", "|---|--:|--:|",
    ]  # fmt: skip
    told = compared(source, plan)
    for field, before in told["before"].items():
        both = [format_bytes(size) if "bytes" in field else f"{size:,}"
                for size in (before, told["after"][field])]  # fmt: skip
        lines.append(f"| {field.replace('_', ' ')} | {both[0]} | {both[1]} |")
    if plan.calibration is None:
        lines += ["", "Calibration: none, for nothing was chosen by data."]
    else:
        lines += [
            "", f"Calibration: {plan.calibration['tokens']:,} tokens in {plan.calibration['dtype']}"
            f", SHA-256 of their ids `{plan.calibration['tokens_sha256']}`.",
        ]  # fmt: skip
    plain = asdict(CompressionConfig())
    options = {key: value for key, value in asdict(plan.options).items()
               if value != plain[key] or "method" in key}  # fmt: skip
    lines += ["", f"Plan: SHA-256 `{plan.hash}`, of these options:", "",
              "```json", json.dumps(options, indent=1), "```"]  # fmt: skip
    if plan.warnings:
        lines += ["", "To be known:", "", *(f"- {told}" for told in plan.warnings)]
    return f"---\n{data}\n---\n\n" + "\n".join(lines) + "\n"


def note_training(folder: Path, text: str) -> None:
    """Add to a model card how the model was trained; nothing happens without a card.

    Args:
        folder: Of the model.
        text: A sentence.
    """
    if (folder / FILE).is_file():
        said = (folder / FILE).read_text(encoding="utf-8")
        write_text(folder / FILE, f"{said.rstrip()}\n\n{text}\n")


def _metadata(path: Path) -> dict[str, Any]:
    """Return the header of a card; nothing where there is none, or none that can be read."""
    import yaml
    from huggingface_hub import metadata_load

    try:
        found = metadata_load(path) if path.is_file() else None
    except (ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}
