"""The ``pahq`` command line: finds circuits, judges, compares, draws and converts them.

Results go to stdout, messages to stderr; ``--json`` prints one JSON document instead of tables.
Exit status: 0 done, 1 the work failed or the model is refused, 2 bad input. No command loads torch
before it runs.
"""

from __future__ import annotations

import time
from pathlib import Path  # noqa: TC003 - cyclopts reads it
from typing import Any, Literal

from cyclopts import App
from shared_kernels.console import JsonFlag, print_json, print_table, run_app

from pahq.loading import check_find, held_out, load_model, make_finder, make_task

app = App(
    name="pahq",
    help="Find the edges of a transformers model that a behaviour needs.",
    version=lambda: _version(),
    help_format="plaintext",
)

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Method = Literal["acdc", "eap", "eap-ig", "exact"]
Metric = Literal["kl", "logit_diff", "prob_diff", "nll"]
Ablation = Literal["patch", "zero", "mean", "mean_positional"]
Precision = Literal["auto", "fp32", "bf16-delta", "fp8-delta", "fp8-rtn", "rtn-q"]
Form = Literal["folder", "mib-json", "mib-pt", "auto-circuit"]


@app.command
def find(
    model: str,
    *,
    out: Path,
    task: str = "ioi",
    examples: int = 16,
    seed: int = 0,
    method: Method = "acdc",
    threshold: float | None = None,
    metric: Metric | None = None,
    ablation: Ablation = "patch",
    direct_edges: bool = False,
    order: Literal["acdc", "reverse", "shuffle"] = "acdc",
    top: int | None = None,
    ig_steps: int | None = None,
    precision: Precision = "auto",
    max_rows: int = 64,
    memory_budget: float | None = None,
    offload: bool = False,
    kv: Literal["grouped", "per_query_head"] = "grouped",
    min_accuracy: float = 0.5,
    judge: bool = True,
    device: str | None = None,
    dtype: Dtype = "auto",
    json_output: JsonFlag = False,
) -> int:
    """Find a circuit, and judge it on other pairs and against chance.

    ACDC tries to remove every edge, and keeps those whose removal raises the metric by the
    threshold or more. It writes down what is decided after every layer: the same command goes on
    where it was stopped. The other methods score all edges; --top keeps the best ones. The
    processes of `torchrun -m pahq find ...` share the removals of a batch.

    Args:
        model: Folder or name on the Hugging Face hub.
        out: New folder for the circuit.
        task: A name that `pahq tasks` lists, or a file of JSON lines with "clean", "corrupted",
            "answer" and, if there is one, "wrong_answer".
        examples: Pairs of clean and corrupted prompts; of a file, the first ones.
        seed: Of the pairs, and of the order where it is shuffle.
        method: acdc decides; eap and eap-ig score by gradients, exact by removing each edge alone.
        threshold: Of acdc, tau; 0.01 by default.
        metric: What removals may not raise; kl by default, and logit_diff for eap.
        ablation: What absent edges carry.
        direct_edges: First try all edges into a query, key or value at once, as the authors' code.
        order: In which acdc tries the edges into a receiver: nearest senders first, farthest, any.
        top: Edges to keep by score.
        ig_steps: Of eap-ig; 5 by default.
        precision: Of acdc: bits of what removals change; close decisions are made again in float32.
            fp8-rtn and rtn-q round activations as PAHQ and its baseline do, and find other edges.
        max_rows: Removals tried in one batch.
        memory_budget: GiB that a batch may take; half of what is free on a GPU by default, else 2.
        offload: Leave the layers in the host's memory, and copy them to the device one at a time.
        kv: Whether query heads that share keys share their edges.
        min_accuracy: A task that the model does less often than this is refused.
        judge: Whether to run the circuit on held-out pairs, beside 20 random circuits of its size.
        device: Where to load the model; by default a GPU if there is one.
        dtype: Of the weights; auto takes what the checkpoint has.
        json_output: Print JSON.
    """
    from pahq.evaluation import faithfulness
    from pahq.ranks import Ranks
    from pahq.tasks import baseline

    check_find(
        out, method, ablation=ablation, threshold=threshold, direct_edges=direct_edges, order=order,
        precision=precision, ig_steps=ig_steps, max_rows=max_rows, memory_budget=memory_budget,
        top=top,
    )  # fmt: skip
    finder, tokenizer = make_finder(model, device, dtype, kv, offload)
    pairs = make_task(task, tokenizer, examples, seed)
    held = held_out(pairs, task, tokenizer, examples, seed) if judge else None
    able = baseline(finder.model, pairs, min_accuracy=min_accuracy)
    begun = out.with_name(out.name + ".search")
    budget = None if memory_budget is None else int(memory_budget * 2**30)
    begin = time.perf_counter()
    if method == "acdc":
        found = finder.acdc(
            pairs, 0.01 if threshold is None else threshold, metric=metric or "kl",
            ablation=ablation, direct_edges=direct_edges, order=order, seed=seed,
            precision=precision, max_rows=max_rows, memory_budget=budget, resume_from=begun,
        )  # fmt: skip
    elif method == "exact":
        found = finder.edge_effects(pairs, metric=metric or "kl", ablation=ablation,
                                    max_rows=max_rows, memory_budget=budget)  # fmt: skip
    else:
        steps = (5 if ig_steps is None else ig_steps) if method == "eap-ig" else 0
        found = finder.eap(pairs, metric=metric or ("kl" if steps else "logit_diff"),
                           ig_steps=steps)  # fmt: skip
    seconds = time.perf_counter() - begin
    if Ranks().index:
        return 0  # the first process of a launch writes and tells
    if top is not None:
        found = found.top(top)
    found.provenance |= {
        "name": model,
        "task_source": task,
        "examples": examples,
        "task_seed": seed,
    }
    found.save_pretrained(out)
    _forget(begun)
    counts = {k: found.provenance[k] for k in ("tested", "skipped", "checked", "batches", "rows")
              if k in found.provenance}  # fmt: skip
    result: dict[str, Any] = {
        "out": str(out), "edges": len(found), "of": finder.graph.edges, "seconds": seconds,
        **counts, "accuracy": able,
    }  # fmt: skip
    report = None
    if judge and len(found):
        report = faithfulness(
            finder, found, pairs, held_out=held, ablation=ablation, progress=not json_output
        )
        result["faithfulness"] = report.to_dict()
    if json_output:
        return print_json(result)
    rows = [("edges", f"{len(found):,} of {finder.graph.edges:,}"), ("seconds", f"{seconds:.1f}")]
    rows += [(key, f"{value:,}") for key, value in counts.items()]
    rows += [("the model does the task", f"{able.get('pairwise', able['top1']):.0%}")]
    print_table([*rows, ("written to", str(out))])
    if report is not None:
        print(report)
    return 0


@app.command(name="eval")
def evaluate(
    circuit: Path,
    *,
    model: str | None = None,
    task: str | None = None,
    examples: int | None = None,
    seed: int | None = None,
    ablation: Ablation | None = None,
    sizes: bool = False,
    plot: Path | None = None,
    device: str | None = None,
    dtype: Dtype = "auto",
    json_output: JsonFlag = False,
) -> int:
    """Judge a circuit that `pahq find` made, on its pairs and on held-out ones.

    Args:
        circuit: Folder.
        model: Folder or name on the hub; by default that of the circuit.
        task: By default that of the circuit.
        examples: Pairs; by default as many as the circuit was found on.
        seed: Of the pairs; by default that of the circuit.
        ablation: What absent edges carry; by default what they carried.
        sizes: Also measure circuits of growing size by the scores: CPR and CMD of MIB. All edges
            must have scores, as those of eap, eap-ig and exact.
        plot: Picture of them, .svg or .png; needs pip install 'pahq[plot]'.
        device: Where to load the model; by default a GPU if there is one.
        dtype: Of the weights; auto takes what the checkpoint has.
        json_output: Print JSON.
    """
    from pahq.circuit import Circuit
    from pahq.evaluation import cpr_cmd, faithfulness, plot_curve

    if plot is not None and not sizes:
        raise ValueError("--plot: draws what --sizes measures; give both")
    found = Circuit.from_pretrained(circuit)
    known = found.provenance
    for key, value in (("name", model), ("task_source", task), ("examples", examples),
                       ("task_seed", seed)):  # fmt: skip
        if value is not None:
            known[key] = value
        elif key not in known:
            flag = {"name": "model", "task_source": "task", "task_seed": "seed"}.get(key, key)
            raise ValueError(f"--{flag}: {circuit} does not say; give it")
    kv = "grouped" if found.graph.key_heads < found.graph.heads else "per_query_head"
    finder, tokenizer = make_finder(known["name"], device, dtype, kv)
    absent = ablation or known.get("ablation", "patch")
    source = known["task_source"], tokenizer, known["examples"], known["task_seed"]
    pairs = make_task(*source)
    held = held_out(pairs, *source)
    report = faithfulness(
        finder, found, pairs, held_out=held, ablation=absent, progress=not json_output
    )
    result = report.to_dict()
    curve = None
    if sizes:
        curve = cpr_cmd(finder, found, held or pairs, ablation=absent, progress=not json_output)
        result["sizes"] = curve.to_dict()
        if plot is not None:
            plot_curve(curve, plot)
    if json_output:
        return print_json(result)
    print(report)
    if curve is not None:
        print(f"\n{curve}")
    return 0


@app.command
def compare(first: Path, second: Path, *, json_output: JsonFlag = False) -> int:
    """Say what two circuits of one model share.

    Args:
        first: Folder.
        second: Folder.
        json_output: Print JSON.
    """
    from pahq.circuit import Circuit

    a, b = Circuit.from_pretrained(first), Circuit.from_pretrained(second)
    both, weights = a & b, [c.provenance.get("weights") for c in (a, b)]
    result = {
        "first": len(a), "second": len(b), "both": len(both), "jaccard": a.jaccard(b),
        "same_weights": None if None in weights else weights[0] == weights[1],
        "only_first": list((a - b).edges()), "only_second": list((b - a).edges()),
    }  # fmt: skip
    if json_output:
        return print_json(result)
    rows = [("edges of the first", f"{len(a):,}"), ("edges of the second", f"{len(b):,}"),
            ("edges of both", f"{len(both):,}"), ("Jaccard", f"{a.jaccard(b):.3f}")]  # fmt: skip
    if result["same_weights"] is not None:
        rows.append(("found with the same weights", "yes" if result["same_weights"] else "no"))
    print_table(rows)
    for title, one in (("only in the first", a - b), ("only in the second", b - a)):
        names = list(one.edges())
        more = f" and {len(names) - 20:,} more" if len(names) > 20 else ""
        print(f"{title}: {', '.join(names[:20]) or 'none'}{more}")
    return 0


@app.command
def draw(circuit: Path, out: Path, *, top: int | None = None) -> int:
    """Draw a circuit: .html to explore, .svg to look at, .dot for graphviz.

    Args:
        circuit: Folder.
        out: File; its ending says what it is.
        top: Draw the edges with the highest scores only; a picture of thousands shows nothing.
    """
    from shared_kernels.files import write_text

    from pahq import drawing
    from pahq.circuit import Circuit

    makers = {".html": drawing.to_html, ".svg": drawing.to_svg, ".dot": drawing.to_dot}
    if out.suffix not in makers:
        raise ValueError(f"OUT: expected a file with .html, .svg or .dot, got {out}")
    found = Circuit.from_pretrained(circuit)
    if top is not None:
        found = found.top(top)
    write_text(out, makers[out.suffix](found))
    print(f"{len(found):,} edges in {out}")
    return 0


@app.command
def convert(
    source: Path, out: Path, *, to: Form, form: Form = "folder", d_model: int | None = None,
    like: Path | None = None,
) -> int:  # fmt: skip
    """Turn a circuit into the file of another program, or such a file into a circuit.

    Args:
        source: Folder, or file.
        out: New folder, or file.
        to: mib-json and mib-pt are those of EAP-IG and of the MIB leaderboard, auto-circuit has
            prune scores as safetensors, folder is that of `pahq find`.
        form: Of the source.
        d_model: Width of the residual stream, which MIB's files tell; known of circuits that were
            found here.
        like: Folder of a circuit of the same model, for auto-circuit files, which do not tell it.
    """
    from pahq import formats
    from pahq.circuit import Circuit

    if form == "folder":
        found = Circuit.from_pretrained(source)
    elif form == "auto-circuit":
        if like is None:
            raise ValueError(
                "--like: auto-circuit files do not tell the model; give a circuit of it"
            )
        graph = formats.per_query_head(Circuit.from_pretrained(like)).graph
        found = formats.load_auto_circuit(source, graph)
    else:
        read = formats.from_mib_json if form == "mib-json" else formats.from_mib_pt
        found = read(source)
    if to == "folder":
        found.save_pretrained(out)
    elif to == "auto-circuit":
        formats.save_auto_circuit(found, out)
    else:
        width = d_model or found.provenance.get("d_model")
        if width is None:
            raise ValueError(f"--d-model: {source} does not tell it; give the model's hidden size")
        write = formats.to_mib_json if to == "mib-json" else formats.to_mib_pt
        write(found, out, d_model=int(width))
    print(f"{len(found):,} edges in {out}")
    return 0


@app.command
def tasks(
    *,
    model: str | None = None,
    examples: int = 16,
    seed: int = 0,
    device: str | None = None,
    dtype: Dtype = "auto",
    json_output: JsonFlag = False,
) -> int:
    """List the tasks; with a model, how well it does each.

    Args:
        model: Folder or name on the Hugging Face hub.
        examples: Pairs of each.
        seed: Of the pairs.
        device: Where to load the model; by default a GPU if there is one.
        dtype: Of the weights; auto takes what the checkpoint has.
        json_output: Print JSON.
    """
    from pahq.tasks import NAMES, baseline, make

    found: dict[str, Any] = {name: {"about": about} for name, about in NAMES.items()}
    if model is not None:
        loaded, tokenizer = load_model(model, device, dtype)
        for name, entry in found.items():
            try:
                entry |= baseline(loaded, make(name, tokenizer, examples, seed))
            except ValueError as error:
                entry["refused"] = str(error)
    if json_output:
        return print_json(found)
    rows = []
    for name, entry in found.items():
        row = [name, entry["about"]]
        if model is not None:
            share = entry.get("pairwise", entry.get("top1"))
            row.append("refused" if share is None else f"{share:.0%}")
        rows.append(tuple(row))
    titles = ("task", "what", "right")[: 2 if model is None else 3]
    print_table(rows, titles)
    for name, entry in found.items():
        if "refused" in entry:
            print(f"{name}: {entry['refused']}")
    return 0


@app.command
def doctor(
    model: str,
    *,
    task: str = "ioi",
    examples: int = 16,
    device: str | None = None,
    dtype: Dtype = "auto",
    json_output: JsonFlag = False,
) -> int:
    """Say whether a model can be searched, and about how long that will take here.

    A row of a search runs changes alone, or, where heads share a norm, whole runs, which take
    longer. The exit status is 1 if the model is refused.

    Args:
        model: Folder or name on the Hugging Face hub.
        task: A name, or a file of pairs.
        examples: Pairs.
        device: Where to load it; by default a GPU if there is one.
        dtype: Of the weights; auto takes what the checkpoint has.
        json_output: Print JSON.
    """
    from shared_kernels.units import format_bytes

    from pahq.errors import UnsupportedModelError

    try:
        finder, tokenizer = make_finder(model, device, dtype, "grouped")
    except UnsupportedModelError as error:
        if json_output:
            print_json({"name": model, "works": False, "refused": str(error)})
        else:
            print(f"It cannot be searched: {error}")
        return 1
    graph, pairs = finder.graph, make_task(task, tokenizer, examples, 0)
    begin = time.perf_counter()
    finder.executor.plain(pairs.clean.to(finder.adapter.device))
    seconds = time.perf_counter() - begin
    size = pairs.clean.numel() * int(finder.model.config.get_text_config().hidden_size)
    # what senders differ by, and what layers read in both runs
    held = size * (graph.senders + 4 * graph.layers) * finder.adapter.dtype.itemsize
    search = "whole runs" if finder.adapter.shared_scale else "changes"
    result = {
        "name": model, "works": True, "rows": search, "edges": graph.edges,
        "senders": graph.senders, "receivers": graph.receivers,
        "plain_seconds": seconds, "state_bytes": held,
        "one_by_one_seconds": seconds * graph.edges,
    }  # fmt: skip
    if json_output:
        return print_json(result)
    print_table(
        [
            ("logits are the model's", "yes"),
            ("a row of a search runs", search),
            ("edges", f"{graph.edges:,} from {graph.senders:,} senders"),
            ("a run of the pairs", f"{seconds:.2f} s"),
            ("a run for each edge would be", f"{seconds * graph.edges / 3600:.1f} h at most"),
            ("what a search holds", format_bytes(held) + " and the rows of a batch"),
        ]
    )
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run_app(app, argv)


def _version() -> str:
    from pahq._version import __version__

    return __version__


def _forget(folder: Path) -> None:
    """Delete what a search that has ended wrote down."""
    from pahq.progress import FILE

    (folder / FILE).unlink(missing_ok=True)
    if folder.is_dir():
        folder.rmdir()
