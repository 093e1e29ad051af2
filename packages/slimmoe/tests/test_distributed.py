"""Two processes that train a student together, beside one that has all of each batch.

Run as a script, through torch.distributed.run, this is what each of them does.
"""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from slimmoe.distillation import DistillationTrainer, Teacher, TeacherLogitCache

sys.path.insert(0, str(Path(__file__).parent))
from moe_families import model, tokens
from test_distillation import options
from test_mtp import head_of

PROCESSES = 2
#: By name: the student's family, whether it has a module of MTP, and options.
CASES = {
    "balanced": ("qwen3_moe", False, {"router_aux_loss_coef": 1.0}),
    "accumulated": ("qwen3_moe", False, {"router_aux_loss_coef": 1.0,
                                         "gradient_accumulation_steps": 2}),
    "ahead": ("qwen3_next", True, {"router_aux_loss_coef": 1.0, "balance_ahead": True,
                                   "gradient_accumulation_steps": 2}),
    "modules": ("deepseek_v3", True, {"kd_weight": (0.5, 0.5), "mtp_weight": (0.0, 1.0)}),
    "modules left": ("deepseek_v3", True, {"mtp_weight": (0.0, 0.0)}),
    "computed again": ("qwen3_moe", False, {"router_aux_loss_coef": 1.0,
                                            "gradient_checkpointing": True}),
    "each by itself": ("qwen3_moe", False, {"router_aux_loss_coef": 1.0,
                                            "average_tokens_across_devices": False}),
    "cached": ("deepseek_v3", True, {}),
    "offloaded": ("qwen3_moe", False, {}),
}  # fmt: skip


def data_of(family, count=16, size=9, seed=0):
    """Texts, of which more and more has no label, and of which some are padded."""
    ids = tokens(family, count, size, seed)
    made = []
    for number, row in enumerate(ids):
        mask, label = torch.ones_like(row), row.clone()
        mask[size - number % 3 :] = 0
        label[: number // 2] = -100
        made.append({"input_ids": row * mask, "attention_mask": mask,
                     "labels": label.masked_fill(mask == 0, -100)})  # fmt: skip
    return made


def run(case, folder, processes):
    """Train and evaluate; return what is told, and put weights into a file."""
    family, with_head, changes = CASES[case]
    student, head = head_of(family, seed=5) if with_head else (model(family), None)
    teacher = Teacher(model("qwen3_moe", seed=9), offload=case == "offloaded")
    data = data_of(family)
    if case in ("cached", "each by itself"):
        # a cache is of texts without padding; means of processes are that of all if they have as
        # many labels
        data = [{"input_ids": row["input_ids"]} for row in data]
    if case == "cached":
        place = folder / f"cache-{os.environ.get('RANK', 'alone')}"
        teacher = TeacherLogitCache.build(place, teacher, data, tokens=96, progress=False)
        data = teacher.attach(data)
    steps = changes.get("gradient_accumulation_steps", 1)
    args = options(
        folder / "run", max_steps=2, optim="sgd", learning_rate=0.1,
        ddp_backend="gloo" if processes > 1 else None,
        per_device_train_batch_size=8 // steps // processes,
        per_device_eval_batch_size=4 // processes, **changes,
    )  # fmt: skip
    found = DistillationTrainer(student, teacher, args, mtp=head, train_dataset=data)
    assert args.world_size == processes
    found.train()
    told = [t for t in found.state.log_history if "loss" in t]
    texts = data_of(family, 8, seed=1)
    # labels are not needed
    bare = [{k: v for k, v in row.items() if k != "labels"} for row in texts]
    plain = case in ("cached", "each by itself")
    told += [found.evaluate(some) for some in ([data] if plain else [texts, bare])]
    name = os.environ.get("RANK", "alone")
    weights = {name: p.detach().contiguous() for name, p in found.model.named_parameters()}
    save_file({name: p.clone() for name, p in weights.items()}, folder / f"{case} {name}.st")
    return [{k: v for k, v in t.items() if "per_second" not in k and "runtime" not in k}
            for t in told]  # fmt: skip


def launched(folder, *more):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={PROCESSES}",
        f"--master-port={port}", __file__, str(folder), *more,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder of what both processes have told and have learnt."""
    folder = tmp_path_factory.mktemp("ranks")
    done = launched(folder)
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_as_one(case, ran):
    wanted = run(case, ran, 1)
    weights = load_file(ran / f"{case} alone.st")
    begin = model(CASES[case][0]).state_dict()
    learnt = [name for name, tensor in weights.items()
              if name in begin and not torch.equal(tensor, begin[name])]  # fmt: skip
    assert len(learnt) > 0.9 * len(begin)
    for rank in range(PROCESSES):
        for name, tensor in load_file(ran / f"{case} {rank}.st").items():
            torch.testing.assert_close(tensor, weights[name], rtol=1e-4, atol=2e-6, msg=name)
        told = json.loads((ran / f"{rank}.json").read_text())[case]
        assert len(told) == len(wanted)
        for mine, one in zip(told, wanted, strict=True):
            assert mine.keys() == one.keys()
            for name, value in one.items():
                assert mine[name] == pytest.approx(value, rel=2e-4, abs=1e-6), name


def test_what_is_told_is_there(ran):
    told = json.loads((ran / "1.json").read_text())
    assert {"lm", "kl", "load_balancing", "load_entropy", "dead_experts"} <= told["ahead"][0].keys()
    assert "mtp1_lm" in told["modules"][0]
    assert "mtp1_lm" not in told["modules left"][0]
    losses = [one["eval_loss"] for one in told["balanced"] if "eval_loss" in one]
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)


def main(folder):
    torch.set_num_threads(1)
    told = {case: run(case, folder, PROCESSES) for case in CASES}
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(told))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
