"""Searches in a group of processes: called by test_ranks.py through torch.distributed.run."""

import json
import sys
from pathlib import Path

import torch
from pahq import CircuitFinder
from patching_cases import family, pairs
from torch import distributed


def main(folder):
    # what a model imports takes the group as a default if there is one (torch.distributed.nn),
    # and a group that outlives destroy_process_group may abort the process at its end
    family("llama")
    distributed.init_process_group("gloo")
    rank, task = distributed.get_rank(), pairs()
    out = {}
    for name, dtype, options in CASES:
        finder = CircuitFinder(family(name).to(dtype))
        found = finder.acdc(task, 0.001, progress=False, **options)
        alone = finder.edge_effects(task, max_rows=3, progress=False)
        out[f"{name} {options}"] = {
            "present": found.present.int().tolist(), "value": found.provenance["value"],
            "rows": found.provenance["rows"], "effects": alone.scores.nan_to_num(7).tolist(),
        }  # fmt: skip
    resumed = CircuitFinder(family("llama"))
    for _ in range(2):
        found = resumed.acdc(task, 0.001, resume_from=folder / "search", progress=False)
    out["resumed"] = found.present.int().tolist()
    try:
        resumed.acdc(task, 0.001 + rank, progress=False)
    except ValueError as error:
        out["refused"] = str(error)
    (folder / f"{rank}.json").write_text(json.dumps(out))
    distributed.destroy_process_group()


CASES = (
    ("llama", torch.float64, {"max_rows": 5}),
    ("gpt2", torch.float64, {"direct_edges": True}),
    ("gemma2", torch.float64, {"direct_edges": True, "max_rows": 1}),
    ("llama", torch.float32, {"precision": "bf16-delta"}),
    ("llama", torch.float32, {"precision": "fp8-delta", "max_rows": 3}),
)

if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
