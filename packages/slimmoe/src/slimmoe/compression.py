"""From a folder or a name on the Hub to a smaller model, in one call."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared_kernels._checks import message

from slimmoe.planning import plan as make_plan
from slimmoe.streaming import write
from slimmoe.weights import Source

if TYPE_CHECKING:
    from slimmoe.calibration.statistics import CalibrationStatistics
    from slimmoe.configuration import CompressionConfig
    from slimmoe.planning import CompressionPlan


def fetched(model: str | Path) -> Path:
    """Return the folder of a model; one that is none is taken for a name on the Hub."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    patterns = [
        "*.json",
        "*.safetensors",
        "*.txt",
        "*.model",
        "*.jinja",
        "README.md",
        "LICEN[CS]E*",
    ]
    return Path(snapshot_download(str(model), allow_patterns=patterns))


def compress(
    source: str | Path,
    target: str | Path,
    options: CompressionConfig | None = None,
    *,
    calibration: Any = None,
    statistics: CalibrationStatistics | None = None,
    plan: CompressionPlan | None = None,
    max_shard_bytes: int = 5 << 30,
    resume: bool = True,
    progress: bool = True,
    minimum_tokens: int = 32,
    base_model: str | None = None,
    dequantize: bool = False,
    **calibrate_options: Any,
) -> CompressionPlan:
    """Write a smaller model, which plain transformers loads.

    Args:
        source: A folder with safetensors, or a name on the Hugging Face Hub.
        target: A folder that is not there yet, or an empty one.
        options: Sizes and methods; not with a plan.
        calibration: Texts or token ids to choose by, as `slimmoe.calibrate` takes them.
        statistics: What `slimmoe.calibrate` gave, instead.
        plan: What `slimmoe.plan` gave, instead of all three.
        max_shard_bytes: Of a file of weights.
        resume: Whether to go on with what was begun.
        progress: Whether to show bars.
        minimum_tokens: Of the calibration that an expert should have been selected for; the plan
            warns of those that were not.
        base_model: Name of the source on the Hub, for the model card, where it is a folder.
        dequantize: Whether a source in FP8 or MXFP4 is read as bfloat16; else it is refused.
        calibrate_options: Of `slimmoe.calibrate`.

    Returns:
        The plan that was carried out; it is in ``slimmoe.json``, too.

    Raises:
        ValueError: Neither a plan nor options, both, or nothing to choose by.
        UnsupportedModelError: Another family, quantised weights, an unknown tensor, or a size that
            the model's class cannot have.
        FileExistsError: The target is there.
        ResumeError: What was begun has another plan.
        OSError: The disk has too little room.
    """
    if (plan is None) == (options is None):
        raise ValueError(message("options", "either these or a plan", options, "give one of them"))
    folder = fetched(source)
    read = Source(folder, dequantize=dequantize)
    if plan is None:
        assert options is not None
        if statistics is None and options.scores:
            if calibration is None:
                remedy = "texts or token ids, or statistics of slimmoe.calibrate"
                raise ValueError(message("calibration", "something to choose by", None, remedy))
            from slimmoe.calibration import calibrate

            statistics = calibrate(folder, calibration, progress=progress, dequantize=dequantize,
                                   **calibrate_options)  # fmt: skip
        plan = make_plan(read, statistics, options, minimum_tokens=minimum_tokens)
    if base_model is None and not Path(source).is_dir():
        base_model = str(source)
    write(read, target, plan, max_shard_bytes=max_shard_bytes, resume=resume, progress=progress,
          base_model=base_model)  # fmt: skip
    return plan
