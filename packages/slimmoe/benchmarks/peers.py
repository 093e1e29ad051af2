"""Importances of REAP by llm-compressor, on the same weights and tokens as those of this package.

llm-compressor 0.14 wants transformers up to 5.17 and torch up to 2.14, so it has an environment of
its own, and models and numbers go there and back as files. From the top folder of the checkout:

    uv venv --python 3.11 /tmp/llm-compressor
    uv pip install --python /tmp/llm-compressor/bin/python llmcompressor==0.14.0
    uv run python packages/slimmoe/benchmarks/peers.py /tmp/llm-compressor/bin/python

It writes ``results/peers-agreement.json``. Models are tiny, of random weights. By its pipeline
``basic`` llm-compressor measures all layers of the model as it is, as this package does; by
``sequential``, its default, layers behind the first are measured on what those before give when
half of their experts are gone. There the first layer of some models is as if attention saw tokens
to the right, too: the mask is lost where its code is cut into layers.

Slimder-Man (github.com/JakeATX/Slimder-Man) has no package; which experts it keeps, and which it
averages with what weights, is compared with a checkout of it:

    uv run python packages/slimmoe/benchmarks/peers.py --slimder-man FOLDER
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import runpy
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch
from shared_kernels.bench.provenance import checkout_root, describe_run
from slimmoe import CompressionConfig, calibrate, plan
from slimmoe.merging.grouping import grouped
from slimmoe.merging.merge import average
from slimmoe.merging.similarity import of_gram
from slimmoe.pruning.experts import importance

HERE = Path(__file__).parent
RECORD = HERE / "results" / "peers-agreement.json"
#: Families whose experts llm-compressor takes apart.
FAMILIES = ("qwen3_moe", "qwen2_moe", "qwen3_next", "mixtral", "olmoe", "deepseek_v3", "gpt_oss")


def compared(python: str, families=FAMILIES) -> dict:
    """Measure both, and return by family how far they are apart."""
    made = SimpleNamespace(**runpy.run_path(str(HERE.parent / "tests" / "moe_families.py")))
    with TemporaryDirectory() as place:
        folder, tokens = Path(place), {}
        models = {name: made.model(name, num_experts=16, num_experts_per_tok=4)
                  for name in families}  # fmt: skip
        for name, model in models.items():
            model.save_pretrained(folder / name)
            tokens[name] = made.tokens(model, 16, 32).tolist()
        (folder / "tokens.json").write_text(json.dumps(tokens))
        ran = subprocess.run(
            [python, str(HERE / "peers_llm_compressor.py"), place], capture_output=True, text=True
        )
        if ran.returncode:
            raise RuntimeError(f"{python}: {ran.stderr[-2000:]}")
        told = json.loads((folder / "told.json").read_text())
    found = {name: agreement(models[name], tokens[name], told["models"][name]) for name in families}
    return {"families": found, "versions": told["versions"]}


def importances(model, rows):
    """Return statistics, and importances by layer."""
    statistics = calibrate(model, rows, progress=False)
    return statistics, [
        importance(statistics.experts[p], "reap") for p in sorted(statistics.experts)
    ]


def agreement(model, rows, theirs):
    """Compare one model's layers in each of their runs."""
    statistics, ours = importances(model, rows)
    options = CompressionConfig(num_experts=8, expert_method="prune", importance="reap")
    kept = plan(model, statistics, options, minimum_tokens=0).experts
    places, found = sorted(kept), {}
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    _, both_ways = importances(model, rows)

    def apart(a, b):
        return float(((a - b) / b).abs().max())

    for run, layers in theirs.items():
        if isinstance(layers, str):
            found[run] = {"refused": layers}
            continue
        given = [torch.tensor(layer["importance"], dtype=torch.float64) for layer in layers]
        far = [apart(a, b) for a, b in zip(ours, given, strict=True)]
        found[run] = {
            "layers": len(layers), "largest relative difference, first layer": far[0],
            "the same, if ours saw tokens to the right": apart(both_ways[0], given[0]),
            "largest relative difference": max(far),
            "counts that differ": sum(
                int((statistics.experts[place].count != torch.tensor(layer["count"])).sum())
                for place, layer in zip(places, layers, strict=True)
            ),
            "layers with other experts kept": sum(
                kept[place].kept != layer["kept"]
                for place, layer in zip(places, layers, strict=True)
            ),
        }  # fmt: skip
    return found


def slimder_man(folder, families=FAMILIES):
    """Compare what becomes of experts by the same scores and likeness, by family."""
    made = SimpleNamespace(**runpy.run_path(str(HERE.parent / "tests" / "moe_families.py")))
    file = folder / "src" / "slimder_man" / "compression" / "experts.py"
    spec = importlib.util.spec_from_file_location("slimder_man_experts", file)
    theirs = importlib.util.module_from_spec(spec)
    # its dataclasses look for their module
    sys.modules[spec.name] = theirs
    spec.loader.exec_module(theirs)
    found = {}
    for name in families:
        model = made.model(name, num_experts=16, num_experts_per_tok=4)
        statistics = calibrate(model, made.tokens(model, 16, 32), progress=False)
        found[name] = {"layers": 0, "layers with other experts kept": 0,
                       "layers with other groups": 0,
                       "largest difference of averages": 0.0}  # fmt: skip
        for layer, measured in sorted(statistics.experts.items()):
            for kind in ("freq", "soft", "reap"):
                told = one_layer(theirs, importance(measured, kind), measured, layer)
                for key, value in told.items():
                    best = max if isinstance(value, float) else int.__add__
                    found[name][key] = best(found[name][key], value)
    ran = subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True
    )
    return {"families": found, "versions": {"slimder-man": ran.stdout.strip() or "not a checkout"}}


def one_layer(theirs, scores, measured, seed, count=8):
    """Make eight of sixteen experts by both, of the same matrices."""
    alike = of_gram(measured.logit_gram)
    ours = grouped(scores, alike, count, preserve=0.5)
    torch.manual_seed(seed)
    experts = [torch.nn.Linear(8, 6, bias=False) for _ in scores]
    averages, plan_of_theirs = theirs.merge_experts(experts, scores, alike, count)
    groups = {b: [b, *others] for b, others in plan_of_theirs.groups.items()}
    groups |= {expert: [expert] for expert in plan_of_theirs.s_keep}
    order = plan_of_theirs.new_expert_order
    mine = {members[0]: members for members in ours.members}
    far = 0.0
    for expert, members, weights in zip(ours.kept, ours.members, ours.weights, strict=True):
        if expert in order:
            parts = [(lambda e=e: experts[e].weight.detach()) for e in members]
            other = averages[order.index(expert)].weight.detach()
            far = max(far, float((average(parts, weights) - other).abs().max()))
    return {
        "layers": 1, "layers with other experts kept": int(sorted(order) != ours.kept),
        "layers with other groups": int(mine != {b: groups[b] for b in sorted(groups)}),
        "largest difference of averages": far,
    }  # fmt: skip


def main():
    """Compare, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("python", nargs="?", help="of an environment that has llmcompressor")
    parser.add_argument("--slimder-man", type=Path, metavar="FOLDER", help="a checkout of it")
    parser.add_argument("--out", type=Path, default=RECORD, metavar="FILE")
    given = parser.parse_args()
    torch.set_num_threads(1)
    root = checkout_root(HERE)
    found = json.loads(given.out.read_text(encoding="utf-8")) if given.out.is_file() else {}
    script = "python packages/slimmoe/benchmarks/peers.py"
    if given.python is not None:
        command = f"{script} /tmp/llm-compressor/bin/python"
        found["llm_compressor"] = compared(given.python)
        found["llm_compressor"]["provenance"] = describe_run(command, root)
    if given.slimder_man is not None:
        found["slimder_man"] = slimder_man(given.slimder_man)
        found["slimder_man"]["provenance"] = describe_run(f"{script} --slimder-man FOLDER", root)
    given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
