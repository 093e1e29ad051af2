"""The paper's five findings on a small mixture of experts, trained here on real text.

``python packages/slimmoe/benchmarks/findings all --work FOLDER`` fetches Debian's texts, trains a
tokenizer and a teacher, makes and trains all students with paired seeds, and prints the table. Each
step is a command of its own, and goes on where it was stopped.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter
from shared_kernels.bench.provenance import describe_run
from shared_kernels.files import write_text

# the folder is run as it is, and is a package to its modules
sys.path.insert(0, str(Path(__file__).parents[1]))

app = App(name="findings", help=__doc__, help_format="plaintext")
Work = Annotated[Path, Parameter(help="Folder for texts, teacher and students.")]
_RUNS = Path(__file__).parent / "runs"


@app.command
def corpus(*, work: Work) -> None:
    """Fetch texts (apt-get), and write blocks of tokens and questions."""
    from findings import corpus as texts
    from findings import data

    texts.download(work / "packages")
    data.prepare(texts.documents(work / "packages"), work / "data")


@app.command
def teacher(
    *, work: Work, tokens: int = 150_000_000, seconds: float = 1e9, device: str = "cuda",
    batch: int = 128, sizes: str = "{}", compiled: bool = False, seed: int = 0,
) -> None:  # fmt: skip
    """Train the teacher; under torchrun on several GPUs.

    Args:
        work: Folder.
        tokens: Of training.
        seconds: After which it comes to an end early.
        device: Of training.
        batch: Blocks of a step.
        sizes: JSON of sizes other than those of `model.teacher_config`.
        compiled: Whether layers go through torch.compile.
        seed: Of weights and order.
    """
    from findings import data, model

    loaded = data.load(work / "data")
    curve = model.train_teacher(
        loaded, work / "teacher", tokens=tokens, seconds=seconds, device=device, batch=batch,
        sizes=json.loads(sizes), compiled=compiled, seed=seed,
    )  # fmt: skip
    write_text(work / "teacher" / "curve.json", json.dumps(curve) + "\n")


@app.command
def students(
    *, work: Work, arms: str = "", seeds: int = 3, tokens: int = 6_000_000, batch: int = 64,
    rate: float = 8e-4, calibration: int = 512, workers: int = 1, device: str = "cuda",
    seconds: float = 1e9, target: str = "{}", first_seed: int = 0,
) -> None:  # fmt: skip
    """Make, train and ask students, seed by seed; what has a record is left as it is.

    Args:
        work: Folder.
        arms: Names with commas; all by default.
        seeds: How many.
        tokens: Of each.
        batch: Blocks of a step.
        rate: Of learning at its highest.
        calibration: Blocks that are calibrated on.
        workers: Processes of each GPU.
        device: ``cuda`` for all GPUs there are, or ``cpu``.
        seconds: After which no other is begun.
        target: JSON of sizes other than those of `arms.TARGET`.
        first_seed: Number of the first.
    """
    import torch

    from findings.arms import ARMS, work_through

    names = arms.split(",") if arms else list(ARMS)
    options = {
        "tokens": tokens, "batch": batch, "rate": rate, "calibration": calibration,
        "target": json.loads(target),
    }  # fmt: skip
    count = torch.cuda.device_count() if device == "cuda" else 1
    (work / "runs").mkdir(exist_ok=True)
    described = describe_run(" ".join(["findings", *sys.argv[1:]])) | {"students": options}
    write_text(
        work / "runs" / f"environment-{first_seed}.json", json.dumps(described, indent=1) + "\n"
    )
    context = torch.multiprocessing.get_context("spawn")
    jobs: Any = context.Queue()
    for seed in range(first_seed, first_seed + seeds):
        for name in names:
            jobs.put((name, seed))
    devices = [f"cuda:{n}" for n in range(count)] if device == "cuda" else ["cpu"]
    args = (jobs, work, options, time.time() + seconds)
    started = [
        context.Process(target=work_through, args=(place, *args)) for place in devices * workers
    ]  # fmt: skip
    for process in started:
        process.start()
    for process in started:
        process.join()
    if any(process.exitcode for process in started):
        raise SystemExit("a worker failed; what is done is kept")


@app.command
def ask_teacher(*, work: Work, device: str = "cuda", seed: int = 0) -> None:
    """Ask the teacher what students are asked.

    Args:
        work: Folder.
        device: Of it.
        seed: That it was trained with, for the record's name.
    """
    from slimmoe.mtp import MTPHead
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from findings import data
    from findings.evaluation import evaluate
    from findings.model import dtype_on

    loaded = data.load(work / "data")
    folder = work / "teacher"
    model = AutoModelForCausalLM.from_pretrained(work / "teacher", dtype=dtype_on(device)).to(
        device
    )
    head = MTPHead.from_pretrained(folder, model)
    found = evaluate(model, head, loaded, AutoTokenizer.from_pretrained(loaded.folder))
    told = {key: value for key, value in found.items() if isinstance(value, float)}
    curve = json.loads((folder / "curve.json").read_text(encoding="utf-8"))
    (work / "runs").mkdir(exist_ok=True)
    record = json.dumps(told | {"tokens": curve[-1][0], "curve": curve}, indent=1)
    write_text(work / "runs" / f"teacher-{seed}.json", record + "\n")
    print(json.dumps(told, indent=1))


@app.command
def table(*, runs: Path = _RUNS, out: Path | None = None, readme: Path | None = None) -> None:
    """Print the table of findings, and write it with all means as JSON.

    Args:
        runs: Folder with records of runs; by default those that came with the code.
        out: File for JSON.
        readme: With marks that tables are put between.
    """
    from findings import report

    told = report.record(runs)
    if out is not None:
        write_text(out, json.dumps(told, indent=1) + "\n")
    if readme is not None:
        report.fill(readme, told)
    print(report.markdown([report.Row(**row) for row in told["findings"]]))


@app.command(name="all")
def everything(
    *, work: Work, seeds: int = 3, tokens: int = 6_000_000, device: str = "cuda"
) -> None:
    """All steps, one after the other.

    Args:
        work: Folder.
        seeds: How many.
        tokens: Of each student; the teacher sees twenty times as many.
        device: Of training.
    """
    if not (work / "data").is_dir():
        corpus(work=work)
    if not (work / "teacher").is_dir():
        teacher(work=work, tokens=20 * tokens, device=device)
    ask_teacher(work=work, device=device)
    students(work=work, seeds=seeds, tokens=tokens, device=device)
    table(runs=work / "runs", out=work / "findings.json")


if __name__ == "__main__":
    app()
