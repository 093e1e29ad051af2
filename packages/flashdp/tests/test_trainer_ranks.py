"""Two processes under DPTrainer against one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging import version

STEPS, UNITS, PHYSICAL = 3, 12, 2
DRAWS = ([0, 3, 5, 8], [], [1, 2, 4, 11])
RUNS = ("noise", "no noise", "own weights", "resumed")
SMALL = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 16}

pytestmark = pytest.mark.slow


def can_resume():
    """Transformers 5.17 loads optimizers of CPU ranks to "cpu:0", which torch refuses; 5.23 not."""
    return version.parse(metadata.version("transformers")) >= version.parse("5.23")


needs_resume = pytest.mark.skipif(not can_resume(), reason="transformers cannot resume CPU ranks")


def train(run, folder):
    """Train, and return weights, epsilon and what the trainer says of its run."""
    from flashdp.config import PrivacyArguments
    from flashdp.trainer import DPTrainer
    from shared_kernels.testing.models import tiny_inputs, tiny_model
    from transformers import TrainingArguments

    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    inputs = tiny_inputs("llama", batch=UNITS)
    data = [{key: value[k] for key, value in inputs.items()} for k in range(UNITS)]
    noise = 0.0 if run == "no noise" else 0.5
    privacy = PrivacyArguments(
        noise_multiplier=noise, max_grad_norm=1.0, expected_batch_size=4, target_delta=1e-3,
        # A resumed run may not use the same seed again.
        **({} if run == "resumed" else {"secure_rng": False, "seed": 5}),
    )  # fmt: skip

    def make(steps):
        model = tiny_model("llama", **SMALL)
        if run == "own weights":
            with torch.no_grad():
                model.lm_head.weight += rank
        arguments = TrainingArguments(
            output_dir=str(folder), per_device_train_batch_size=PHYSICAL, learning_rate=1e-2,
            lr_scheduler_type="constant", max_steps=steps, report_to="none", disable_tqdm=True,
            save_strategy="steps" if run == "resumed" else "no", save_steps=1,
            use_cpu="GPUS" not in os.environ, logging_steps=1,
        )  # fmt: skip
        trainer = DPTrainer(
            model, arguments, train_dataset=data, privacy=privacy, log_non_private_loss=True,
            eval_dataset=data[:4],
        )  # fmt: skip
        sampler = trainer.loader.sampler
        assert (sampler.shard, sampler.num_shards) == (rank, world)
        own = [torch.tensor([k for k in draw if k % world == rank]).numpy() for draw in DRAWS]
        sampler.draw = lambda step: own[step]
        return trainer

    trainer = make(STEPS)
    if run == "resumed":
        short = make(STEPS)
        short.state.max_steps = 1
        short._set_limit = lambda: setattr(short.state, "max_steps", 1)
        short.train()
        trainer.train(resume_from_checkpoint=True)
    else:
        trainer.train()
    logs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "weights": {n: v.clone() for n, v in trainer.model.state_dict().items()},
        "wrapped": type(trainer.model_wrapped).__name__,
        "steps": trainer.engine.accountant.steps,
        "epsilon": trainer.privacy_report().epsilon if noise else None,
        "largest": trainer.loader.mechanism(1.0).dataset_size,
        "losses": logs,
        "evaluated": trainer.evaluate()["eval_loss"],
    }


def in_two_processes(folder, **more):
    """What both processes found in all runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        set_by_launcher = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1, **more,
        }  # fmt: skip
        environment = os.environ | {k: str(v) for k, v in set_by_launcher.items()}
        command = [sys.executable, __file__, str(folder)]
        processes.append(subprocess.Popen(command, env=environment))
    try:
        assert [process.wait(timeout=240) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", map_location="cpu") for rank in range(2)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return in_two_processes(tmp_path_factory.mktemp("ranks"))


def assert_same(left, right, atol=0.0):
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("run", [*RUNS[:-1], pytest.param(RUNS[-1], marks=needs_resume)])
def test_both_have_the_same_weights(ranks, run):
    assert_same(ranks[0][run]["weights"], ranks[1][run]["weights"])


@pytest.mark.parametrize("run", ["noise", "no noise"])
def test_two_are_one(ranks, run, tmp_path):
    alone, both = train(run, tmp_path), ranks[0][run]
    # Adam divides by gradients that may be near 0.
    assert_same(alone["weights"], both["weights"], atol=2e-5)
    assert both["steps"] == alone["steps"] == STEPS
    assert both["evaluated"] == pytest.approx(alone["evaluated"], rel=1e-4)
    assert both["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert both["wrapped"] == "LlamaForCausalLM"


def test_a_share_is_what_is_accounted_for(ranks):
    for found in ranks:
        assert found["noise"]["largest"] == UNITS // 2
        assert found["noise"]["epsilon"] == ranks[0]["noise"]["epsilon"]


@needs_resume
def test_a_resumed_run_counts_all_its_steps(ranks):
    for found in ranks:
        assert found["resumed"]["steps"] == STEPS


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_are_one_process(tmp_path):
    ranks = in_two_processes(tmp_path, GPUS=2)
    for run in ranks[0]:
        assert_same(ranks[0][run]["weights"], ranks[1][run]["weights"])
    alone = train("noise", tmp_path)
    assert_same(alone["weights"], ranks[0]["noise"]["weights"], atol=1e-4)
    assert ranks[0]["noise"]["losses"] == pytest.approx(alone["losses"], rel=1e-3)


if __name__ == "__main__":
    torch.set_num_threads(1)
    runs = RUNS if can_resume() or "GPUS" in os.environ else RUNS[:-1]
    results = {run: train(run, Path(sys.argv[1]) / run.replace(" ", "-")) for run in runs}
    torch.save(results, Path(sys.argv[1]) / f"{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()
