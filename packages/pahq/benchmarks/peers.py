"""Circuits, scores and files of EAP-IG and TransformerLens, compared with those of this package.

The two want different versions of TransformerLens, so each has its command. From the top folder of
the checkout:

    E="--with eap@git+https://github.com/hannamw/EAP-IG@795f560 --with transformer-lens==3.9.0"
    uv run $E python packages/pahq/benchmarks/peers.py eap_ig
    uv run --with transformer-lens==4.3.0 python packages/pahq/benchmarks/peers.py transformer_lens

Each writes its part of ``results/peers-agreement.json``. For auto-circuit see ``auto_circuit.py``.
"""

from __future__ import annotations

import argparse
import json
import runpy
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest import mock

import torch
from shared_kernels.bench.provenance import checkout_root, describe_run

RECORD = Path(__file__).parent / "results" / "peers-agreement.json"
beside = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("auto_circuit.py"))))
gpt2, llama, hooked, pairs = beside.gpt2, beside.llama, beside.hooked, beside.pairs
some, largest, need, versions = beside.some, beside.largest, beside.need, beside.versions


# --- EAP-IG -----------------------------------------------------------------------------------


def eap_ig():
    """Compare circuits, gradients and files."""
    need("eap")
    from pahq import CircuitFinder

    found = {}
    for name, model in (("GPT-2", gpt2(3)), ("Llama, 4 of 4 keys", llama(4)),
                        ("Llama, 2 of 4 keys", llama(2))):  # fmt: skip
        finder = CircuitFinder(model, kv="per_query_head")
        found[name] = eap_ig_of(finder, hooked(model), pairs(97, 4, 10))
    return found | {"files": eap_ig_files(), "versions": versions("eap", "transformer-lens")}


def eap_ig_of(finder, model, task, steps=5, count=50):
    """Compare one model's circuits and gradients."""
    import eap.attribute
    import eap.evaluate
    from eap.graph import Graph

    zeros, cpu = torch.zeros, not torch.cuda.is_available()

    def on_cpu(*args, **options):
        # its scores are made on a GPU, whatever the model is on
        here = cpu and options.get("device") == "cuda"
        return zeros(*args, **options | ({"device": "cpu"} if here else {}))

    def tokens(_, ids, max_length=None):
        # the random model has no tokenizer
        length = torch.full((len(ids),), ids.shape[1])
        return ids, torch.ones_like(ids), length, ids.shape[1]

    def logit_diff(logits, _clean, _lengths, answers):
        right, wrong = (logits[:, -1].gather(1, ids[:, None])[:, 0] for ids in answers)
        return wrong - right

    def kl(logits, clean, _lengths, _answers):
        # there a mean over the vocabulary, which is its size times less
        q, p = (x[:, -1].log_softmax(-1) for x in (logits, clean))
        return torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)

    # what it divides by is the number of examples
    def total(metric):
        return lambda *given: metric(*given).sum()

    loader = [(task.clean, task.corrupted, (task.answers, task.wrong_answers))]
    edges = torch.from_numpy(finder.graph.full())
    ran = {"logit_diff": [], "kl": []}
    scores = {}
    with mock.patch.object(torch, "zeros", on_cpu), \
            mock.patch.object(eap.evaluate, "tokenize_plus", tokens), \
            mock.patch.object(eap.attribute, "tokenize_plus", tokens):  # fmt: skip
        for number in range(count):
            circuit = some(finder.graph, number, (number + 1) / (count + 1))
            graph = Graph.from_model(model)
            graph.in_graph[:] = circuit.present
            theirs = eap.evaluate.evaluate_graph(
                model, graph, loader, [logit_diff, kl], quiet=True, skip_clean=False
            )
            ours = finder.evaluate(circuit, task)
            for name, value in zip(ran, theirs, strict=True):
                ran[name].append((ours[name]["circuit"], value.mean()))
        model.requires_grad_(True)
        for method, metric in (("EAP", logit_diff), ("EAP-IG-inputs", logit_diff),
                               ("EAP-IG-inputs", kl)):  # fmt: skip
            graph = Graph.from_model(model)
            eap.attribute.attribute(
                model, graph, loader, total(metric), method, ig_steps=steps, quiet=True
            )
            scores[method, metric.__name__] = torch.where(edges, graph.scores, 0.0)
        model.requires_grad_(False)
    found = {f"evaluate_graph, {name}": largest(values) for name, values in ran.items()}
    for (method, metric), theirs in scores.items():
        name = f"{method}, {metric}"
        if method == "EAP":
            found[name] = largest([(finder.eap(task, metric=metric).scores, theirs)])
            continue
        ours = finder.eap(task, metric=metric, ig_steps=steps).scores
        found[f"{name}, points as they are"] = largest([(ours, theirs)])
        # it has gradients at 0/5 to 4/5 of the way to the clean input, this package at 1/5 to 5/5
        first, last = (gradient_at(finder, task, metric, share) for share in (0, 1))
        moved = ours + (first - last) / steps
        found[f"{name}, same points"] = largest([(moved, theirs)])
    return {"circuits": count, "edges": finder.graph.edges} | found


def gradient_at(finder, task, metric, share):
    """Return scores by the gradient at one point between corrupted and clean embeddings."""
    from pahq.attribution import gradients
    from pahq.metrics import Metric

    clean, corrupted = (finder.executor.plain(ids) for ids in (task.clean, task.corrupted))
    first, last = corrupted.senders[0], clean.senders[0]
    measure = Metric(metric, finder.adapter, task, clean.final)
    found = torch.cat(gradients(finder.executor, first + share * (last - first), measure))
    scores = torch.einsum("sntd,rntd->sr", corrupted.senders - clean.senders, found)
    return scores * torch.from_numpy(finder.graph.full())


def eap_ig_files():
    """Write files here, read and write them there, and read them here."""
    from eap.graph import Graph as Theirs
    from pahq import Graph
    from pahq.formats import from_mib_json, from_mib_pt, to_mib_json, to_mib_pt

    graph = Graph(12, 12, 12)
    circuit = some(graph, 0, 0.1)
    edges = torch.from_numpy(graph.full())
    found = {"edges": graph.edges}
    with TemporaryDirectory() as folder:
        for name, write, read in (("json", to_mib_json, from_mib_json),
                                  ("pt", to_mib_pt, from_mib_pt)):  # fmt: skip
            ours, theirs = (Path(folder) / f"{who}.{name}" for who in ("ours", "theirs"))
            write(circuit, ours, d_model=768)
            between = getattr(Theirs, f"from_{name}")(str(ours))
            getattr(between, f"to_{name}")(str(theirs))
            again = read(theirs)
            assert torch.equal(between.real_edge_mask, edges)
            assert len(between.edges) == graph.edges
            found[name] = {
                "differing there": int((between.in_graph != circuit.present).sum()),
                "differing after": int((again.present != circuit.present).sum()),
                "differing scores": int((again.scores != circuit.scores)[edges].sum()),
                "their included edges": between.count_included_edges(), "ours": len(circuit),
            }  # fmt: skip
    return found


# --- TransformerLens --------------------------------------------------------------------------


def transformer_lens(count=20):
    """Compare gradients and faithfulness of its attribution patching, one pair at a time."""
    need("transformer_lens")
    from pahq import CircuitFinder
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
    from transformer_lens.tools.analysis import attribution_patching as tool

    finder, model = CircuitFinder(gpt2(3)), gpt2(3).requires_grad_(True)
    graph = finder.graph
    model.config._attn_implementation = "eager"
    bridge = build_bridge_from_module(model, "GPT2LMHeadModel", hf_config=model.config)
    scores, recovered = [], []
    for seed in range(4):
        task = pairs(97, 1, 6, seed)

        def metric(logits, task=task):
            return logits[0, -1, task.wrong_answers[0]] - logits[0, -1, task.answers[0]]

        # its gradient is that of the second text, whose effects point to the first
        theirs = tool.attribution_patch(
            bridge, task.corrupted, task.clean, metric,
            tool.EdgeAttributionConfig(granularity="edge"),
        ).edge_scores  # fmt: skip
        table = torch.zeros(graph.senders, graph.receivers)
        for edge, score in theirs.items():
            table[place(graph, *edge)] += score
        scores.append((finder.eap(task).scores, table))
        for number in range(count // 4):
            circuit = some(graph, number, (number + 1) / (count // 4 + 1))
            edges = [edge for edge in theirs if bool(circuit.present[place(graph, *edge)])]
            judged = tool.faithfulness(bridge, task.clean, task.corrupted, metric, edges)
            mine = finder.evaluate(circuit, task, ["logit_diff"])["logit_diff"]
            recovered.append((mine["recovered"], judged.recovered))
    return {
        "tasks": len(scores), "circuits": len(recovered), "edges": graph.edges,
        "edges there, one for each token": len(theirs), "attribution_patch": largest(scores),
        "faithfulness, recovered": largest(recovered), "versions": versions("transformer-lens"),
    }  # fmt: skip


def place(graph, writer, reader):
    """Return sender and receiver of an edge of TransformerLens."""
    if writer.kind == "embed":
        sender = 0
    elif writer.kind == "mlp_out":
        sender = graph.mlp(writer.layer)
    else:
        sender = graph.head(writer.layer, writer.head)
    if reader.kind == "logits":
        return sender, graph.logits
    part = "mlp" if reader.kind == "mlp_in" else reader.kind[0]
    return sender, graph.columns(reader.layer, part).start + (reader.head or 0)


def main():
    """Compare with one package, and write its part of the record."""
    comparisons = {made.__name__: made for made in (eap_ig, transformer_lens)}
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("peer", choices=comparisons)
    parser.add_argument("--out", type=Path, default=RECORD, metavar="FILE")
    given = parser.parse_args()
    root = checkout_root(Path(__file__))
    file = Path(__file__).resolve().relative_to(root).as_posix()
    found = comparisons[given.peer]()
    found["provenance"] = describe_run(f"python {file} {given.peer}", root)
    record = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
    record = dict(sorted((record | {given.peer: found}).items()))
    given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
