"""The ForeLen benchmark (arXiv:2602.11812): prompts and the lengths of their answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared_kernels._checks import check_choice, message

if TYPE_CHECKING:
    import os

    from datasets import Dataset

HUB_ID = "abinzzz/ForeLen"
SCENARIOS = ("LongSeq", "Reasoning", "RL")
SPLITS = ("train", "validation", "test")
_PROMPT, _LENGTH, _NAME = "user_prompt_content", "target_length", "dataset_name"


def load_forelen(
    source: str | os.PathLike[str] = HUB_ID,
    *,
    model: str,
    scenario: str,
    split: str = "train",
) -> Dataset:
    """Load one split, whichever columns its file has.

    Files of different splits have different columns, which ``datasets.load_dataset`` refuses; here
    a missing ``dataset_name`` is the scenario, and other columns are kept.

    Args:
        source: A dataset on the Hub, or a folder with the same files.
        model: Folder of the model, such as ``Qwen2.5_0.5B``.
        scenario: ``LongSeq``, ``Reasoning`` or ``RL``.
        split: ``train``, ``validation`` or ``test``.

    Returns:
        Columns ``user_prompt_content`` (string), ``target_length`` (int64, at least 1),
        ``dataset_name`` (string), and what else the file has.

    Raises:
        FileNotFoundError: The folder has no such file.
        ValueError: An unknown scenario or split, missing columns, or lengths that no answer has.
    """
    check_choice("scenario", scenario, SCENARIOS)
    check_choice("split", split, SPLITS)
    name = f"{model}/{scenario}/{split}.csv"
    path = Path(source) / name
    if not Path(source).is_dir():
        if str(source).count("/") != 1:
            raise FileNotFoundError(
                f"source: expected a folder or a dataset of the Hub, got {source}; there is none"
            )
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download(str(source), name, repo_type="dataset"))
    if not path.is_file():
        raise FileNotFoundError(
            f"source: {source} has no {name}; files lie in MODEL/SCENARIO/SPLIT"
        )
    return _read(path, scenario)


def _read(path: Path, scenario: str) -> Dataset:
    import pyarrow as pa
    import pyarrow.compute as pc
    from datasets import Dataset
    from pyarrow import csv

    table: Any = csv.read_csv(
        path,
        parse_options=csv.ParseOptions(newlines_in_values=True),
        convert_options=csv.ConvertOptions(
            column_types={_PROMPT: pa.string(), _LENGTH: pa.float64(), _NAME: pa.string()},
            strings_can_be_null=False,
        ),
    )
    for column in (_PROMPT, _LENGTH):
        if column not in table.column_names:
            remedy = "it is no file of ForeLen"
            raise ValueError(message(str(path), f"a column {column}", table.column_names, remedy))
    lengths = table[_LENGTH].to_numpy(zero_copy_only=False)
    bad = [row for row, value in enumerate(lengths) if not (value >= 1 and value == int(value))]
    if bad:
        raise ValueError(
            f"{path}: expected whole lengths of at least 1, got {lengths[bad[0]]} in row {bad[0]}; "
            "mend or delete the row"
        )
    place = table.column_names.index(_LENGTH)
    table = table.set_column(place, _LENGTH, pc.cast(table[_LENGTH], pa.int64()))
    if _NAME not in table.column_names:
        table = table.append_column(_NAME, pa.array([scenario] * len(table), pa.string()))
    return Dataset(table)
