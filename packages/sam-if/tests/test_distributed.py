"""Two processes that take the steps of SAM, beside one that has all of each batch.

Run as a script, through torch.distributed.run, this is what each of them does.
"""

import gc
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sam_if.config import SAMConfig
from sam_if.trainer import SAMTrainer
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parent))
from test_mixed_precision import Counting
from test_trainer import (
    Net,
    language_model,
    moved,
    options,
    parameters,
    put_back,
    rows,
    stacked,
    texts,
    windows,
)

PROCESSES, STEPS = 2, 5
#: Steps of 16 rows: of each process two batches of four; of 40 rows, the last has one of each.
CASES = {
    "means": SAMConfig(rho=0.3),
    "tokens": SAMConfig(rho=0.3, adaptive=True),
    "synchronised each time": SAMConfig(rho=0.3),
    "per_rank": SAMConfig(rho=0.5, scope="per_rank"),
    "per_microbatch": SAMConfig(rho=0.5, scope="per_microbatch"),
    "per_rank overflow": SAMConfig(rho=0.5, scope="per_rank"),
    "per_microbatch overflow": SAMConfig(rho=0.5, scope="per_microbatch"),
}


def run(case, folder, processes):
    """Train; return what was told, and put weights into a file."""
    tokens, overflow = case == "tokens", case.endswith("overflow")
    rank = int(os.environ.get("RANK", 0))
    dtype = torch.float32 if overflow else torch.float64
    if tokens:
        model, data = language_model(), texts(40)
    else:
        # in one process, in its first pass of the second step
        model = Net(dtype, spoilt=(5,) if overflow and rank else ())
        data = rows(40 if case == "means" else 32, dtype)
    each = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    kept = []

    class Seen(TrainerCallback):
        def on_step_end(self, *_, **__):
            kept.append([p.detach().clone() for p in model.parameters()])

    args = options(
        folder / "run", max_steps=STEPS, gradient_accumulation_steps=2,
        per_device_train_batch_size=8 // processes, max_grad_norm=0.0 if overflow else 0.5,
        ddp_backend="gloo" if processes > 1 else None,
        accelerator_config=each if case.startswith("synchronised") else None,
    )  # fmt: skip
    assert args.world_size == processes
    trainer = SAMTrainer(model, args, train_dataset=data, sam=CASES[case], callbacks=[Seen()])
    if overflow:
        trainer.accelerator.scaler = Counting()
    trainer.train()
    told = [t for t in trainer.state.log_history if "loss" in t]
    if overflow:
        assert all(torch.equal(p, q) for p, q in zip(kept[0], kept[1], strict=True))
        assert not any(torch.equal(p, q) for p, q in zip(kept[1], kept[2], strict=True))
        assert trainer.accelerator.scaler.get_scale() == 512.0
    name = os.environ.get("RANK", "alone")
    save_file({n: p.detach().clone() for n, p in model.named_parameters()},
              folder / f"{case} {name}.st")  # fmt: skip
    return [{key: t[key] for key in ("loss", "grad_norm", "learning_rate")} for t in told]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder of what both processes have told and have learnt."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={PROCESSES}",
        f"--master-port={port}", __file__, str(folder),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


def learnt(case, ran, most, wanted):
    for rank in range(PROCESSES):
        found = load_file(ran / f"{case} {rank}.st")
        assert found.keys() == wanted.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, wanted[name], rtol=most, atol=most, msg=name)


@pytest.mark.parametrize("case", ["means", "tokens", "synchronised each time"])
def test_two_processes_are_as_one(case, ran):
    wanted = run(case, ran, 1)
    learnt(case, ran, 1e-11, load_file(ran / f"{case} alone.st"))
    for rank in range(PROCESSES):
        told = json.loads((ran / f"{rank}.json").read_text())[case]
        assert len(told) == len(wanted) == STEPS
        for mine, one in zip(told, wanted, strict=True):
            assert mine == pytest.approx(one, rel=1e-6)


@pytest.mark.parametrize("scope", ["per_rank", "per_microbatch"])
def test_each_process_by_its_own_gradient(scope, ran):
    """Batches of four go to the processes in turn."""
    twin, data = Net(), rows(32)
    made = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    schedule = LambdaLR(made, lambda t: 1 - t / STEPS)
    for part in windows(data, 16, STEPS):
        batches = [stacked(part[i : i + 4]) for i in range(0, 16, 4)]
        if scope == "per_rank":
            batches = [{name: torch.cat([a[name], b[name]]) for name in a}
                       for a, b in (batches[::2], batches[1::2])]  # fmt: skip
        sums = [torch.zeros_like(p) for p in twin.parameters()]
        for batch in batches:
            before = moved(twin, torch.autograd.grad(twin(**batch)["loss"], parameters(twin)), 0.5)
            grads = torch.autograd.grad(twin(**batch)["loss"], parameters(twin))
            put_back(twin, before)
            sums = [s + g / len(batches) for s, g in zip(sums, grads, strict=True)]
        norm = float(torch.stack([s.square().sum() for s in sums]).sum().sqrt())
        for p, s in zip(twin.parameters(), sums, strict=True):
            p.grad = s * min(1.0, 0.5 / (norm + 1e-6))
        made.step()
        schedule.step()
    learnt(scope, ran, 1e-11, dict(twin.named_parameters()))


@pytest.mark.parametrize("scope", ["per_rank", "per_microbatch"])
def test_where_one_process_overflows_all_skip(scope, ran):
    """The rest is asserted in the processes."""
    case = f"{scope} overflow"
    learnt(case, ran, 0.0, load_file(ran / f"{case} 0.st"))


def main(folder):
    torch.set_num_threads(1)
    # models' code is imported before there is a group
    language_model()
    # trainers collect garbage when they begin: what was imported is none
    gc.freeze()
    told = {case: run(case, folder, PROCESSES) for case in CASES}
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(told))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
