"""The ``sam-if`` command line: what the samples of a recorded run did, and the run without some.

Runs are recorded by ``SAMTrainer(record=...)``. Results go to stdout, messages to stderr;
``--json`` prints one JSON document instead of tables. Exit status: 0 done, 1 the work failed or the
run is not as recorded, 2 bad input. No command loads torch before it runs.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cyclopts import App
from shared_kernels.console import JsonFlag, print_json, print_table, run_app

if TYPE_CHECKING:
    from sam_if.run import RecordedRun

app = App(
    name="sam-if",
    help="Say which training samples made a model that was trained with SAM.",
    version=lambda: _version(),
    help_format="plaintext",
)

Method = Literal["trajectory", "frozen", "gif", "hessian"]
Removal = Literal["first_order", "newton", "replay"]
Suspicion = Literal["margin", "end_margin", "loss", "self_influence", "left_out_loss"]
Optimizer = Literal["sgd", "momentum", "adam", "adamw"]


@app.command
def plan(
    model: str,
    *,
    batch: Path,
    steps: int,
    task: Literal["causal-lm", "classification"] = "causal-lm",
    optimizer: Optimizer = "adamw",
    queries: int = 1,
    together: int = 8,
    storage: Literal["all", "sqrt"] = "sqrt",
    folder: Path | None = None,
    keep_batches: bool = True,
    device: str | None = None,
    json_output: JsonFlag = False,
) -> int:
    """Say what a recorded run and its scores will take, before they begin.

    A step of the model is measured on one batch. The exit status is 1 if there is less room than it
    takes.

    Args:
        model: Folder or name on the Hugging Face hub.
        batch: A batch of a usual step: .safetensors with the model's inputs, or .jsonl with texts.
        steps: Of the run.
        task: What the model is for.
        optimizer: That will train it.
        queries: That will be asked.
        together: Queries that go through the run at a time.
        storage: Keep the weights of all steps, or of about the root of them.
        folder: Where the run will be recorded; by default in host memory.
        keep_batches: Keep batches, rather than make them again.
        device: Where to load the model; by default a GPU if there is one.
        json_output: Print JSON.
    """
    import torch
    import transformers
    from shared_kernels.units import format_bytes, format_seconds

    from sam_if.datafiles import read_batches
    from sam_if.objective import causal_lm, classification
    from sam_if.optim import SAM
    from sam_if.planning import plan as planned

    kind: Any = {
        "causal-lm": transformers.AutoModelForCausalLM,
        "classification": transformers.AutoModelForSequenceClassification,
    }[task]
    tokenizer = _tokenizer(model) if batch.suffix == ".jsonl" else None
    given = read_batches(batch, tokenizer, size=1 << 31)[0]
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded = kind.from_pretrained(model, attn_implementation="eager", dtype=torch.float32)
    loaded = loaded.to(place).eval()
    given = {name: part.to(place) for name, part in given.items()}
    bases: dict[str, Any] = {
        "sgd": torch.optim.SGD, "momentum": torch.optim.SGD, "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
    }  # fmt: skip
    options: dict[str, Any] = {"momentum": 0.9} if optimizer == "momentum" else {}
    sam = SAM(loaded.parameters(), bases[optimizer], lr=1e-3, **options)
    objective = causal_lm(level="token") if task == "causal-lm" else classification()
    found = planned(
        loaded, objective, sam, given, steps=steps, queries=queries, together=together,
        storage=storage, folder=folder, keep_batches=keep_batches,
    )  # fmt: skip
    if json_output:
        print_json(asdict(found))
    else:
        rows = [
            ("parameters that are trained", f"{found.parameters:,}"),
            (f"weights and moments, {found.place}", format_bytes(found.weight_bytes)),
            (f"batches, {found.place}", format_bytes(found.batch_bytes)),
            ("free there", format_bytes(found.free_bytes)),
            ("training", format_seconds(found.training_seconds)),
            ("scores of all queries", format_seconds(found.adjoint_seconds)),
            ("making steps again for them", format_seconds(found.replay_seconds)),
            *(("problem", text) for text in found.problems),
        ]
        if found.device_bytes:
            rows.insert(4, ("device, while scores are made", format_bytes(found.device_bytes)))
        print_table(rows, title=f"{steps} steps of {Path(model).name}")
    return 1 if found.problems else 0


@app.command
def attribute(
    run: Path,
    *,
    query: Path,
    out: Path,
    method: Method = "trajectory",
    mean: bool = False,
    together: int = 8,
    solver: Literal["auto", "dense", "gmres", "bicgstab", "ekfac"] = "auto",
    damping: float = 0.0,
    k: int = 5,
    device: str | None = None,
    json_output: JsonFlag = False,
) -> int:
    """Score all training samples of a run by what they did to queries.

    A score is by how much a query would rise if the sample had not been trained on. Scores are
    written to a folder, and the first are printed.

    Args:
        run: Folder of the record.
        query: .safetensors with the model's inputs, or .jsonl with a text in each line and, for
            classifiers, a label.
        out: Folder to write.
        method: trajectory is the derivative of the run itself; frozen takes perturbations for
            constants; gif leaves Hessians out; hessian is the closed form of a run at rest.
        mean: Ask for the mean of all queries.
        together: Queries that go through the run at a time.
        solver: Of the closed form.
        damping: Of the closed form.
        k: Samples to print of each query.
        device: Where to load the model; by default a GPU if there is one.
        json_output: Print JSON.
    """
    from sam_if.attribution import attribute as attributed

    opened = _opened(run, device)
    queries = _queries(query, run, opened)
    scores = attributed(
        opened, queries, method=method, mean=mean, together=together, solver=solver,
        damping=damping, progress=True,
    )  # fmt: skip
    scores.save(out)
    found: list[dict[str, Any]] = [
        {"query": number, "helpful": scores.top(k, number),
         "harmful": scores.top(k, number, harmful=True)}
        for number in range(len(scores.values))
    ]  # fmt: skip
    if json_output:
        told = {"method": scores.method, "warnings": scores.warnings, "queries": found}
        return print_json({**told, "samples": scores.values.shape[1], "scores": str(out)})
    for text in scores.warnings:
        print(f"warning: {text}")
    rows = [
        (str(one["query"]), " ".join(f"{n}:{value:+.3g}" for n, value in one["helpful"]),
         " ".join(f"{n}:{value:+.3g}" for n, value in one["harmful"]))
        for one in found
    ]  # fmt: skip
    print_table(rows, ("query", "helped most", "harmed most"), title=f"{scores.method}: {out}")
    return 0


@app.command
def show(
    run: Path,
    scores: Path,
    *,
    out: Path,
    query: Path | None = None,
    k: int = 8,
    device: str | None = None,
    json_output: JsonFlag = False,
) -> int:
    """Make a page, or a picture, of the samples that helped and harmed most.

    Args:
        run: Folder of the record.
        scores: Folder that `attribute` wrote.
        out: The file: .html, or .png.
        query: The queries that were asked, to show them, too; without them all are shown as one.
        k: Samples of each kind.
        device: Where to load the model; by default a GPU if there is one.
        json_output: Print JSON.
    """
    from sam_if.cards import RunCards, card_of
    from sam_if.scores import Scores
    from sam_if.views import render_html, render_png

    if out.suffix not in (".html", ".png"):
        raise ValueError(f"out: expected a .html or .png file, got {out.name!r}")
    given, opened = Scores.load(scores), _opened(run, device)
    tokenizer = _tokenizer(run / "model")
    queries = None
    if query is not None:
        batches = _queries(query, run, opened)
        queries = [card_of(batch, place, tokenizer)
                   for batch in batches for place in range(_count(batch))]  # fmt: skip
    render = render_html if out.suffix == ".html" else render_png
    render(given, queries, RunCards(opened, tokenizer), out, k=k)
    if json_output:
        return print_json({"page": str(out)})
    print(f"page: {out}")
    return 0


@app.command
def detect(
    run: Path,
    *,
    score: Suspicion = "margin",
    k: int = 20,
    together: int = 8,
    html: Path | None = None,
    device: str | None = None,
    json_output: JsonFlag = False,
) -> int:
    """Print the training samples whose label is most likely wrong.

    Args:
        run: Folder of the record of a classifier's run.
        score: margin is of the whole run; end_margin and loss are of the model at the end;
            self_influence and left_out_loss take an adjoint pass for each sample of a shortlist.
        k: How many.
        together: Samples that go through the run at a time.
        html: A page to write, where they can be looked at.
        device: Where to load the model; by default a GPU if there is one.
        json_output: Print JSON.
    """
    from sam_if.detect import detect_mislabels

    opened = _opened(run, device)
    found = detect_mislabels(opened, score, k=k, together=together, progress=True)
    if html is not None:
        from sam_if.cards import RunCards
        from sam_if.views import render_suspects

        render_suspects(found, RunCards(opened, _tokenizer(run / "model")), html, k=k)
    if json_output:
        return print_json({"score": found.score, "rows": [asdict(row) for row in found]})
    rows = [
        (str(row.rank), str(row.sample), str(row.label), f"{row.score:.4g}", f"{row.loss:.4g}")
        for row in found
    ]
    print_table(rows, ("", "sample", "label", found.score, "loss"), title="suspicious labels")
    return 0


@app.command
def remove(
    run: Path,
    *,
    ids: Path,
    out: Path,
    method: Removal = "newton",
    solver: Literal["auto", "dense", "gmres", "bicgstab", "ekfac"] = "auto",
    steps: int = 3,
    damping: float = 0.0,
    device: str | None = None,
    json_output: JsonFlag = False,
) -> int:
    """Write the model as if samples had not been trained on, with a certificate of how near it is.

    All but replay is approximate: it moves the weights to where training would come to rest.

    Args:
        run: Folder of the record.
        ids: A file with the numbers of the samples.
        out: Folder to write: the model, as transformers loads it, with the certificate beside it.
        method: replay trains again without them; newton and first_order are for runs at rest.
        solver: Of the linear systems of these.
        steps: Of Newton's.
        damping: Of the linear systems.
        device: Where to load the model; by default a GPU if there is one.
        json_output: Print JSON.
    """
    from shared_kernels.checkpoint import replacing_folder

    from sam_if.datafiles import read_numbers
    from sam_if.removal import remove as removed

    numbers = read_numbers(ids)
    opened = _opened(run, device)
    edited = removed(opened, numbers, method, solver, steps=steps, damping=damping, progress=True)
    edited.apply(opened.model)
    model: Any = opened.model
    with replacing_folder(out) as new:
        model.save_pretrained(new)
        tokenizer = _tokenizer(run / "model")
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        edited.save(new / "edit")
    if json_output:
        return print_json({**asdict(edited.certificate), "model": str(out)})
    print(edited.certificate)
    print(f"model: {out}")
    return 0


@app.command
def lds(
    run: Path,
    scores: Path,
    *,
    query: Path,
    fractions: tuple[float, ...] = (0.05,),
    subsets: int = 20,
    seed: int = 0,
    mean: bool = False,
    path: Path | None = None,
    device: str | None = None,
    json_output: JsonFlag = False,
) -> int:
    """Train again without random subsets, and say how well scores foretell what that does.

    It takes as many runs as there are subsets. What was trained is kept, so that a command that was
    stopped goes on when it is given again.

    Args:
        run: Folder of the record.
        scores: Folder that `attribute` wrote, of the same queries.
        query: As for `attribute`.
        fractions: Of the training data, to remove.
        subsets: Of each fraction.
        seed: Of their draws.
        mean: Whether scores are of the mean of all queries.
        path: File that trainings are kept in; by default lds.json beside the scores.
        device: Where to load the model; by default a GPU if there is one.
        json_output: Print JSON.
    """
    import torch

    from sam_if import evaluate
    from sam_if.scores import Scores

    given, opened = Scores.load(scores), _opened(run, device)
    queries = _queries(query, run, opened)

    def retrain(removed: Any) -> Any:
        weights = opened.retrain(removed)
        with torch.no_grad():
            parts = [opened.vector.losses(weights, batch, measured=True) for batch in queries]
        measured = torch.cat(parts).double().cpu()
        return measured.mean()[None] if mean else measured

    place = path or scores.parent / f"{scores.name}-lds.json"
    found = evaluate.lds(
        retrain, given.values.double(), fractions, subsets, seed, path=place, progress=True
    )

    def number(value: Any) -> float | None:
        # of few subsets some draws have no correlation
        return float(value) if math.isfinite(value) else None

    told: list[dict[str, Any]] = [
        {"fraction": fraction, "spearman": number(found.spearman[n]),
         "interval": [number(bound) for bound in found.ci[n]], "pearson": number(found.pearson[n])}
        for n, fraction in enumerate(found.agreements)
    ]  # fmt: skip
    if json_output:
        return print_json({"method": given.method, "subsets": subsets, "fractions": told})

    def written(value: float | None) -> str:
        return "unknown" if value is None else f"{value:.3f}"

    rows = [
        (f"{one['fraction']:.0%}", written(one["spearman"]),
         " to ".join(written(bound) for bound in one["interval"]), written(one["pearson"]))
        for one in told
    ]  # fmt: skip
    columns = ("removed", "Spearman", "95 %", "Pearson")
    print_table(rows, columns, title=f"{given.method}, {subsets} subsets")
    return 0


@app.command
def check(run: Path, *, device: str | None = None, json_output: JsonFlag = False) -> int:
    """Make a run's steps anew, and say whether it can be asked, and by which methods.

    The exit status is 1 if scores are not what they say.

    Args:
        run: Folder of the record.
        device: Where to load the model; by default a GPU if there is one.
        json_output: Print JSON.
    """
    from sam_if.diagnostics import check_run

    found = check_run(_opened(run, device), progress=True)
    if json_output:
        print_json(asdict(found))
        return 1 if found.problems else 0

    def number(value: float | None, none: str) -> str:
        return none if value is None else f"{value:.2g}"

    rows = [
        ("steps, samples", f"{found.steps}, {found.samples}"),
        ("optimizer inside of SAM", found.optimizer),
        ("worst step, made anew", number(found.worst_step, "not as recorded")),
        ("the run again has the same bits", "yes" if found.replayed else "no"),
        ("second derivatives, error", number(found.derivative_error, "wrong")),
        ("coupling of a batch's samples", number(found.coupling, "unknown")),
        ("steps with clipped gradients", number(found.clipped, "not clipped")),
        ("stationarity at the end", number(found.stationarity, "no closed form")),
        ("kappa at the end", number(found.kappa, "no closed form")),
        *(("problem", text) for text in found.problems),
        *(("remark", text) for text in found.remarks),
    ]
    print_table(rows, title=run.name)
    return 1 if found.problems else 0


def _opened(run: Path, device: str | None) -> RecordedRun:
    """Return the record of a run whose model is on a device, in the mode that it was trained in."""
    import torch

    from sam_if.recording import kept_model
    from sam_if.trajectory import Trajectory

    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Trajectory.open(run, kept_model(run).to(place).eval())


def _tokenizer(folder: str | Path) -> Any:
    """Return the tokenizer of a model's folder; None if it has none."""
    from transformers import AutoTokenizer

    if Path(folder).is_dir() and not (Path(folder) / "tokenizer_config.json").is_file():
        return None
    return AutoTokenizer.from_pretrained(folder)


def _queries(path: Path, run: Path, opened: RecordedRun) -> list[Any]:
    from sam_if.datafiles import read_batches

    place = next(opened.model.parameters()).device
    tokenizer = _tokenizer(run / "model") if path.suffix == ".jsonl" else None

    def moved(batch: Any) -> Any:
        if isinstance(batch, tuple):
            return tuple(part.to(place) for part in batch)
        return {name: part.to(place) for name, part in batch.items()}

    return [moved(batch) for batch in read_batches(path, tokenizer)]


def _count(batch: Any) -> int:
    return len(batch[0] if isinstance(batch, tuple) else next(iter(batch.values())))


def _version() -> str:
    from sam_if._version import __version__

    return __version__


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run_app(app, argv)
