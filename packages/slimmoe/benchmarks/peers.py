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
"""

from __future__ import annotations

import argparse
import json
import runpy
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch
from shared_kernels.bench.provenance import checkout_root, describe_run
from slimmoe import CompressionConfig, calibrate, plan
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


def main():
    """Compare, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("python", help="of an environment that has llmcompressor")
    parser.add_argument("--out", type=Path, default=RECORD, metavar="FILE")
    given = parser.parse_args()
    torch.set_num_threads(1)
    root = checkout_root(HERE)
    found = {"llm_compressor": compared(given.python)}
    command = "python packages/slimmoe/benchmarks/peers.py /tmp/llm-compressor/bin/python"
    found["llm_compressor"]["provenance"] = describe_run(command, root)
    given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
