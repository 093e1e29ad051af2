"""Calibrations in a group of processes: called by test_ranks.py through torch.distributed.run."""

import json
import sys
from pathlib import Path

import torch
from torch import distributed

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from calibration_oracle import exact_model
from slimmoe.calibration import calibrate
from test_mtp import head_of

#: Sequences of other lengths, which make five batches and one of them short.
LENGTHS = (9, 9, 9, 8, 8, 7, 5, 5, 4, 3, 2)


def sequences(vocabulary=96):
    draws = torch.Generator().manual_seed(5)
    return [torch.randint(3, vocabulary, (size,), generator=draws) for size in LENGTHS]


def resident(**options):
    return calibrate(exact_model("qwen3_moe"), sequences(), batch_tokens=18, exclude=[7, 11],
                     progress=False, **options)  # fmt: skip


def modules(**options):
    found, head = head_of("deepseek_v3", 2, dtype=torch.float64)
    return calibrate(found, sequences(), batch_tokens=18, mtp=head, progress=False, **options)


def layerwise(folder, **options):
    return calibrate(folder / "model", sequences(), batch_tokens=18, mode="layerwise",
                     dtype=torch.float64, progress=False, device="cpu", **options)  # fmt: skip


def refused(call):
    try:
        call()
    except (ValueError, RuntimeError, FloatingPointError) as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


def main(folder):
    # what a model imports takes the group as a default if there is one (torch.distributed.nn),
    # and a group that outlives destroy_process_group may abort the process at its end
    exact_model("mixtral")
    distributed.init_process_group("gloo")
    rank, told = distributed.get_rank(), {}
    for name, found in (
        ("resident", resident()), ("modules", modules()), ("layerwise", layerwise(folder)),
        ("alone", resident(distributed=False)),
    ):  # fmt: skip
        found.save_pretrained(folder / f"{name}-{rank}")
    broken = exact_model("qwen3_moe")
    broken.model.embed_tokens.weight.data[50] = float("nan")
    # the second process alone has this token
    told["nan"] = refused(
        lambda: calibrate(broken, [[5, 6], [50, 6]], batch_tokens=2, progress=False)
    )
    model = exact_model("qwen3_moe")
    told["others"] = refused(lambda: calibrate(model, [[5, 6 + rank]] * 4, progress=False))
    told["few"] = refused(lambda: calibrate(model, [[5, 6]], progress=False))
    (folder / f"{rank}.json").write_text(json.dumps(told))
    distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
