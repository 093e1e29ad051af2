"""Compression in stages, with a distillation after each (arXiv:2605.08738, section 3.4).

The paper has two stages, of 40 and 360 billion tokens: *depth-first* drops half of the layers that
go, and then the rest and all channels; *width-first* half of the channels first; *joint* half of
both. When experts are compressed it does not say; here it is in the first stage. Each stage is
planned by statistics of the student as it then is, and the teacher is always the model that was
there first. The rate of learning and the weights of losses go on over all stages.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared_kernels._checks import message
from shared_kernels.files import write_text

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from slimmoe.configuration import CompressionConfig
    from slimmoe.summary import Sizes

SCHEDULES = ("one_shot", "depth_first", "width_first", "joint")
_CHANNELS = 64


@dataclass(frozen=True)
class Stage:
    """A compression and a distillation.

    Attributes:
        options: Sizes that this stage ends with.
        tokens: Of its distillation.
        span: Which part of all tokens that is, from 0 to 1.
    """

    options: CompressionConfig
    tokens: int
    span: tuple[float, float]


@dataclass(frozen=True)
class ProgressiveSchedule:
    """Stages, one after the other.

    Attributes:
        name: Of `SCHEDULES`.
        stages: In order.
    """

    name: str
    stages: tuple[Stage, ...]

    @classmethod
    def make(
        cls,
        name: str,
        source: Sizes,
        target: CompressionConfig,
        tokens: Sequence[int],
        *,
        period: int = 1,
    ) -> ProgressiveSchedule:
        """Return the stages to a target.

        Args:
            name: ``one_shot`` for one stage, ``depth_first``, ``width_first`` or ``joint`` for two.
            source: Sizes of the model that is compressed.
            target: Sizes at the end.
            tokens: Of each stage.
            period: Layers that make a pattern, such as four in Qwen3-Next: half of what goes is
                rounded to whole ones.

        Raises:
            ValueError: Another name, tokens for another number of stages, or nothing that the
                first stage would do.
        """
        if name not in SCHEDULES:
            raise ValueError(message("name", f"one of {list(SCHEDULES)}", name, "see make"))
        count = 1 if name == "one_shot" else 2
        if len(tokens) != count or min(tokens, default=0) < 1:
            raise ValueError(message("tokens", f"{count} numbers", tuple(tokens), "of each stage"))
        if target.drop_layers is not None:
            remedy = "stages need numbers of layers: give num_layers"
            raise ValueError(message("target", "no drop_layers", target.drop_layers, remedy))
        options = [target]
        if count == 2:
            options.insert(0, cls._first(name, source, target, period))
        whole, at, stages = sum(tokens), 0, []
        for option, size in zip(options, tokens, strict=True):
            stages.append(Stage(option, size, (at / whole, (at + size) / whole)))
            at += size
        return cls(name, tuple(stages))

    @staticmethod
    def _first(
        name: str, source: Sizes, target: CompressionConfig, period: int
    ) -> CompressionConfig:
        layers, hidden = (
            target.num_layers or source.layers,
            target.hidden_size or source.hidden_size,
        )
        half = round((source.layers - layers) / 2 / period) * period
        middle = source.layers - half if name != "width_first" else None
        channels = (source.hidden_size + hidden) / 2
        # a multiple of what the target is one of
        step = _CHANNELS if hidden % _CHANNELS == 0 else 8
        width = round(channels / step) * step if name != "depth_first" else None
        if middle in (None, source.layers) and width in (None, source.hidden_size):
            remedy = f"{name} halves what goes, and nothing of it does"
            raise ValueError(message("target", "fewer layers or channels", target, remedy))
        return dataclasses.replace(target, num_layers=middle, hidden_size=width)

    def to_json(self) -> str:
        """Return it as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"


class ProgressiveRunner:
    """Carries stages out, each in a folder of its own.

    Args:
        schedule: Of stages.
        train: Called with the folder of a student, the stage and a folder for its run; it trains
            and leaves the student in ``FOLDER/final``, as ``slimmoe distill`` does. It is called
            again where it was stopped.
        recipe: What else stages depend on, as JSON has it: what was begun with another one is not
            gone on with.
    """

    def __init__(
        self,
        schedule: ProgressiveSchedule,
        train: Callable[[Path, Stage, Path], Any],
        recipe: Mapping[str, Any] | None = None,
    ) -> None:
        self.schedule, self.train = schedule, train
        self.recipe: dict[str, Any] = json.loads(json.dumps(dict(recipe or {})))

    def run(
        self,
        source: str | Path,
        folder: str | Path,
        calibration: Any,
        *,
        resume: bool = True,
        progress: bool = True,
        base_model: str | None = None,
        dequantize: bool = False,
        **calibrate_options: Any,
    ) -> Path:
        """Compress and train, stage by stage; what is done is not done again.

        Args:
            source: Folder of the model.
            folder: For stages: ``stage-1/statistics``, ``stage-1/student``, ``stage-1/run``, ...
            calibration: Texts or token ids, as `slimmoe.calibrate` takes them.
            resume: Whether to go on with what is there.
            progress: Whether to show bars.
            base_model: Name of the source on the Hub, for model cards.
            dequantize: Whether a source in FP8 or MXFP4 is read as bfloat16.
            calibrate_options: Of `slimmoe.calibrate`.

        Returns:
            The folder of the last student.

        Raises:
            ValueError: What is there is of another schedule or recipe.
        """
        from slimmoe.calibration import CalibrationStatistics, calibrate
        from slimmoe.compression import compress

        folder, student = Path(folder), Path(source)
        if not resume:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        told = folder / "schedule.json"
        if told.is_file() and told.read_text(encoding="utf-8") != self.schedule.to_json():
            remedy = "give another folder, or resume=False"
            raise ValueError(message("folder", "one of this schedule", str(folder), remedy))
        write_text(told, self.schedule.to_json())
        self._check_recipe(folder / "recipe.json")
        for number, stage in enumerate(self.schedule.stages, 1):
            place = folder / f"stage-{number}"
            made, final = place / "student", place / "run" / "final"
            if not (place / "done").is_file():
                if not made.is_dir():
                    # what comes out of a stage is not quantised
                    quantised = dequantize and number == 1
                    measured = place / "statistics"
                    if not measured.is_dir():
                        calibrate(
                            student, calibration, progress=progress, dequantize=quantised,
                            **calibrate_options,
                        ).save_pretrained(measured)  # fmt: skip
                    statistics = CalibrationStatistics.from_pretrained(measured)
                    compress(student, made, stage.options, statistics=statistics,
                             progress=progress, base_model=base_model,
                             dequantize=quantised)  # fmt: skip
                self.train(made, stage, place / "run")
                if not final.is_dir():
                    remedy = "train leaves the student there"
                    raise ValueError(message("train", f"a folder {final}", None, remedy))
                write_text(place / "done", "")
            student = final
        return student

    def _check_recipe(self, path: Path) -> None:
        """Write the recipe down, or compare it with what is there."""
        if path.is_file():
            begun = json.loads(path.read_text(encoding="utf-8"))
            for name in sorted(begun.keys() | self.recipe.keys()):
                before, now = begun.get(name), self.recipe.get(name)
                if before != now:
                    remedy = "give another folder, or resume=False"
                    raise ValueError(message(name, f"{before!r}, as it was begun", now, remedy))
        write_text(path, json.dumps(self.recipe, indent=1) + "\n")
