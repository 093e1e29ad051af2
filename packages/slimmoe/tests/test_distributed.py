"""Two processes that train a student together, beside one that has all of each batch.

Run as a script, through torch.distributed.run, this is what each of them does: with whole weights
(DDP), or with a part of each weight (FSDP2).
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
from accelerate import DistributedType, PartialState
from safetensors.torch import load_file, save_file
from slimmoe.distillation import DistillationTrainer, Teacher, TeacherLogitCache
from slimmoe.mtp import MTPHead
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

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
#: Those that are run with sharded weights, too.
SHARDED = ("balanced", "ahead", "modules", "computed again", "cached")


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


def shard():
    """Have accelerate shard weights on CPUs, which it does on accelerators alone."""
    state = PartialState._shared_state
    if state["distributed_type"] == DistributedType.MULTI_CPU:
        state["distributed_type"] = DistributedType.MULTI_XPU


def run(case, folder, processes, sharded=False):
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
    changes = changes | ({"fsdp": True, "fsdp_config": {"version": 2}} if sharded else {})
    args = options(
        folder / "run", max_steps=2, optim="sgd", learning_rate=0.1,
        ddp_backend="gloo" if processes > 1 else None,
        per_device_train_batch_size=8 // steps // processes,
        per_device_eval_batch_size=4 // processes, **changes,
    )  # fmt: skip
    assert args.world_size == processes
    if sharded:
        shard()
    found = DistillationTrainer(student, teacher, args, mtp=head, train_dataset=data)
    found.train()
    parameters = dict(found.model.named_parameters())
    assert all(isinstance(p, DTensor) for p in parameters.values()) == sharded
    told = [t for t in found.state.log_history if "loss" in t]
    texts = data_of(family, 8, seed=1)
    # labels are not needed
    bare = [{k: v for k, v in row.items() if k != "labels"} for row in texts]
    plain = case in ("cached", "each by itself")
    told += [found.evaluate(some) for some in ([data] if plain else [texts, bare])]
    name = os.environ.get("RANK", "alone")
    if sharded:
        parameters = {name: p.full_tensor() for name, p in parameters.items()}
    weights = {name: p.detach().clone().contiguous() for name, p in parameters.items()}
    save_file(weights, folder / f"{case} {name}.st")
    return [{k: v for k, v in t.items() if "per_second" not in k and "runtime" not in k}
            for t in told]  # fmt: skip


def go_on(folder):
    """Train with sharded weights, once in one go and once from a checkpoint on, and save."""
    data, found = data_of("deepseek_v3"), []
    for resumed in (False, True):
        student, head = head_of("deepseek_v3", seed=5)
        args = options(
            folder / "kept", max_steps=4, save_strategy="steps", save_steps=2, ddp_backend="gloo",
            fsdp=True, fsdp_config={"version": 2}, mtp_weight=(0.5, 0.5),
        )  # fmt: skip
        shard()
        trainer = DistillationTrainer(
            student, model("qwen3_moe", seed=9), args, mtp=head, train_dataset=data
        )
        trainer.train(resume_from_checkpoint=str(folder / "kept/checkpoint-2") if resumed else None)
        found.append({n: p.full_tensor().detach() for n, p in trainer.model.named_parameters()})
        trainer.save_model(str(folder / "saved"))
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name
    if os.environ["RANK"] == "0":
        save_file(found[0], folder / "kept.st")


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


@pytest.fixture(scope="module")
def ran_sharded(tmp_path_factory):
    """The same of processes that have a part of each weight."""
    folder = tmp_path_factory.mktemp("sharded")
    done = launched(folder, "sharded")
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_as_one(case, ran):
    compare(case, ran)


@pytest.mark.parametrize("case", SHARDED)
def test_two_processes_with_a_part_of_each_weight_are_as_one(case, ran_sharded):
    compare(case, ran_sharded)


def test_sharded_weights_are_saved_and_go_on(ran_sharded):
    wanted = load_file(ran_sharded / "kept.st")
    plain = AutoModelForCausalLM.from_pretrained(ran_sharded / "saved")
    head = MTPHead.from_pretrained(ran_sharded / "saved", plain)
    found = dict(plain.named_parameters())
    found |= {f"mtp_head.{name}": p for name, p in head.named_parameters()}
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, wanted[name]), name


def compare(case, ran):
    """Hold what processes told and have learnt against one process."""
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


def main(folder, sharded=""):
    torch.set_num_threads(1)
    cases = SHARDED if sharded else CASES
    told = {case: run(case, folder, PROCESSES, bool(sharded)) for case in cases}
    if sharded:
        go_on(folder)
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(told))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
