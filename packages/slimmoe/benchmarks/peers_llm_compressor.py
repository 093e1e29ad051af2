"""REAP of llm-compressor on folders of models: run by ``peers.py`` in an environment of its own.

    python peers_llm_compressor.py FOLDER

FOLDER has folders of models, and ``tokens.json`` with sequences of one length for each. What comes
out is in ``told.json``: of each model, pipeline and layer the importance of experts, how often they
were selected, and which are kept.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning.reap import REAPPruningModifier
from llmcompressor.modifiers.pruning.reap.utils import REAPSaliencyTracker
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

#: It wants one, and there are no texts.
NO_TEXT = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>")), pad_token="<pad>"
)


def ran(folder, rows, pipeline, every):
    """Prune half of the experts; return what each layer's tracker has at the end."""
    layers, plain = [], REAPSaliencyTracker.compute_retained_experts

    def watched(self, *args):
        kept = plain(self, *args)
        layers.append({"importance": self.mean_saliency.tolist(), "count": self.count.tolist(),
                       "kept": kept.tolist()})  # fmt: skip
        return kept

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(r) for r in rows]})
    with mock.patch.object(REAPSaliencyTracker, "compute_retained_experts", watched):
        oneshot(
            model=model, tokenizer=NO_TEXT, recipe=[REAPPruningModifier(sparsity=0.5)],
            dataset=data, num_calibration_samples=len(rows), max_seq_length=len(rows[0]),
            shuffle_calibration_samples=False, pipeline=pipeline, moe_calibrate_all_experts=every,
        )  # fmt: skip
    return layers


def main(folder):
    """Run all models through both pipelines, and all experts on all tokens once."""
    tokens, told = json.loads((folder / "tokens.json").read_text()), {}
    for name, rows in tokens.items():
        told[name] = {}
        for run, pipeline, every in (("basic", "basic", False), ("all experts", "basic", True),
                                     ("sequential", "sequential", False)):  # fmt: skip
            try:
                told[name][run] = ran(folder / name, rows, pipeline, every)
            except Exception as error:
                told[name][run] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    names = ("llmcompressor", "transformers", "torch")
    found = {"models": told, "versions": {name: version(name) for name in names}}
    (folder / "told.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
