"""What a trainer needs to record its run: numbers of samples, an objective, and a folder.

A row of the training data is known by its place in it, which goes with it through samplers and
collators.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from shared_kernels._checks import message
from shared_kernels.files import write_text
from torch import Tensor, nn

from sam_if.objective import causal_lm, classification, regression
from sam_if.planning import require_room
from sam_if.trajectory import Trajectory

MISSING = "trainers need transformers and accelerate: pip install 'sam-if[trainer]'"
try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(MISSING) from error

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from sam_if.objective import Objective

#: Key of a sample's number in a batch.
SAMPLE = "sample_number"
_MODEL, _CLASS = "model", "class.json"


class Row(NamedTuple):
    """A row that is no mapping, with its number."""

    row: Any
    number: int


class Numbered(torch.utils.data.Dataset):
    """A dataset whose rows know their numbers.

    Args:
        dataset: With a length.

    Raises:
        ValueError: It has none.
    """

    def __init__(self, dataset: Any) -> None:
        if not hasattr(dataset, "__len__"):
            remedy = "samples of a stream have no numbers: give a dataset that has"
            got = type(dataset).__name__
            raise ValueError(message("train_dataset", "one with a length", got, remedy))
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        number = int(index)
        row = self.dataset[number]
        return {**row, SAMPLE: number} if isinstance(row, Mapping) else Row(row, number)


class NumberedCollator:
    """Makes batches of numbered rows, as another collator does of rows.

    Args:
        collator: The other, whose batches are mappings.
    """

    def __init__(self, collator: Callable[[list[Any]], Any]) -> None:
        self.collator = collator

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        """Return a batch with the numbers of its samples."""
        numbers, plain = [], []
        for row in rows:
            if isinstance(row, Row):
                numbers.append(row.number)
                plain.append(row.row)
            else:
                numbers.append(row[SAMPLE])
                plain.append({name: value for name, value in row.items() if name != SAMPLE})
        return {**self.collator(plain), SAMPLE: torch.tensor(numbers)}


def objective_for(model: nn.Module, label_smoothing: float = 0.0) -> Objective:
    """Return the objective that transformers trains a model by.

    Args:
        model: Of transformers, or of peft around one.
        label_smoothing: As the trainer is told.

    Raises:
        ValueError: A model of another kind, whose objective has to be given.
    """
    inner: Any = model
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    config: Any = getattr(inner, "config", None)
    kind = type(inner).__name__
    remedy = "give objective="
    if kind.endswith(("ForSequenceClassification", "ForImageClassification")):
        problem = getattr(config, "problem_type", None)
        if problem == "regression" or (problem is None and config.num_labels == 1):
            return regression()
        if problem in (None, "single_label_classification"):
            return classification(label_smoothing=label_smoothing)
        raise ValueError(message("model", "one label for each sample", problem, remedy))
    if kind.endswith(("ForCausalLM", "LMHeadModel")) and not label_smoothing:
        return causal_lm(level="token")
    expected = "a model for causal language modelling without label smoothing, or classification"
    raise ValueError(message("model", expected, kind, remedy))


class Recorder:
    """Records what a trainer does.

    Args:
        folder: Of the run; one that a checkpoint is resumed from goes on.
        objective: By which it is trained.
        max_grad_norm: To which gradients are clipped.
        options: Of `Trajectory`.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        objective: Objective,
        max_grad_norm: float | None,
        **options: Any,
    ) -> None:
        self.folder, self.objective = Path(folder), objective
        self._max_grad_norm, self._options = max_grad_norm, options
        self._trajectory: Trajectory | None = None
        self._parts: list[tuple[Any, Tensor]] = []

    def begin(
        self, model: nn.Module, optimizer: Any, steps: tuple[int, int], processor: Any,
        inputs: dict[str, Any],
    ) -> None:  # fmt: skip
        """Open the folder, if it is not open.

        Args:
            model: With the weights before the step.
            optimizer: SAM.
            steps: Number of the first that will be taken, and of the last.
            processor: Tokenizer or the like, to keep beside the model.
            inputs: Of a usual micro-batch.

        Raises:
            MemoryError: There is no room for the run.
            FileExistsError: There is another run in the folder.
            TrajectoryError: The run in the folder is another than the checkpoint's.
        """
        if self._trajectory is not None:
            return
        if steps[0]:
            self._trajectory = Trajectory.resume(
                self.folder, model, optimizer, self.objective, at=steps[0]
            )
            return
        self._trajectory = Trajectory(
            model, self.objective, optimizer, max_grad_norm=self._max_grad_norm,
            folder=self.folder, **self._options,
        )  # fmt: skip
        size = sum(part.nbytes for part in inputs.values() if isinstance(part, Tensor))
        try:
            require_room(
                self._trajectory, max(1, steps[1]), self._options["storage"], self.folder, size
            )
        except MemoryError:
            shutil.rmtree(self.folder)
            raise
        keep_model(self.folder, model, processor)

    def add(self, inputs: dict[str, Any]) -> None:
        """Take a micro-batch of the next step."""
        batch = dict(inputs)
        self._parts.append((batch, batch.pop(SAMPLE)))

    def step(self) -> Tensor:
        """Record a step of the micro-batches, and leave its gradient with the weights as they were.

        Returns:
            The loss at the weights, 0-dimensional.
        """
        assert self._trajectory is not None
        parts, self._parts = self._parts, []
        return self._trajectory.gradient_window(parts)

    def finish(self) -> None:
        """Keep the weights at the end, once."""
        if self._trajectory is not None and not self._trajectory.finished:
            self._trajectory.finish()


class FinishCallback(TrainerCallback):
    """Ends the record when training ends.

    Args:
        recorder: Whose record it is.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Keep the weights at the end."""
        self._recorder.finish()


def keep_model(folder: Path, model: nn.Module, processor: Any) -> None:
    """Keep a model of transformers beside its run, and what reads its inputs."""
    inner: Any = model
    if not hasattr(inner, "save_pretrained"):
        return
    inner.save_pretrained(folder / _MODEL)
    if hasattr(processor, "save_pretrained"):
        processor.save_pretrained(folder / _MODEL)
    # a trainer may name a padding token after the model was made, whose row is trained all the same
    padding = {
        name: module.padding_idx
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    }
    told = {"name": type(inner).__name__, "padding_idx": padding}
    write_text(folder / _MODEL / _CLASS, json.dumps(told) + "\n")


def kept_model(folder: str | os.PathLike[str]) -> nn.Module:
    """Load the model that was kept beside a run, with the weights that it began with.

    Attention is computed in the way that has derivatives in forward mode.

    Raises:
        FileNotFoundError: None was kept; it has to be given.
        ValueError: Its class is not of transformers or peft.
    """
    import transformers

    place = Path(folder) / _MODEL
    if not (place / _CLASS).is_file():
        raise FileNotFoundError(f"{place}: no model was kept beside the run; give model=")
    told = json.loads((place / _CLASS).read_text(encoding="utf-8"))
    name = told["name"]
    if (place / "adapter_config.json").is_file():
        import peft

        kind: Any = getattr(peft, f"Auto{name}", peft.AutoPeftModel)
        model = kind.from_pretrained(place, is_trainable=True, attn_implementation="eager")
    else:
        kind = getattr(transformers, name, None)
        if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
            remedy = "give model="
            raise ValueError(message("folder", "a model of transformers", name, remedy))
        model = kind.from_pretrained(place, attn_implementation="eager")
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = told["padding_idx"].get(name)
    return model
