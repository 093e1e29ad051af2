"""A process killed with SIGKILL in mid-run goes on bit for bit."""

import os
import signal
import subprocess
import sys

import pytest
import torch
import zo2
from shared_kernels.testing.models import tiny_inputs, tiny_model
from zo2 import OffloadConfig, UpdateLog, ZOConfig

STEPS, DIES_AT = 20, 12
ZO, OFFLOAD = ZOConfig(seed=3), OffloadConfig(store="bf16", fold_every=3)


def model():
    return tiny_model("llama", dtype=torch.bfloat16, num_hidden_layers=2)


def loop(folder, told):
    """A plain loop over engine.step; returns the engine."""
    engine = zo2.prepare(model(), ZO, OFFLOAD, log=folder / "run.zolog", device="cpu")
    while engine.global_step < STEPS:
        engine.step(tiny_inputs("llama", seed=engine.global_step), lr=1e-3)
        told(engine.global_step)
    engine.sync()
    return engine


def trainer(folder, told):
    """The same through ZOTrainer, from the last checkpoint if there is one."""
    from transformers import TrainerCallback, TrainingArguments

    class Tell(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            told(state.global_step)

    inputs = tiny_inputs("llama", batch=8)
    data = [{k: v[i] for k, v in inputs.items()} for i in range(8)]
    args = TrainingArguments(
        str(folder), max_steps=STEPS, learning_rate=1e-3, report_to="none", disable_tqdm=True,
        use_cpu=True, save_steps=5, per_device_train_batch_size=2, logging_strategy="no",
    )  # fmt: skip
    made = zo2.ZOTrainer(
        model(), args, zo=ZO, offload=OFFLOAD, train_dataset=data, callbacks=[Tell()]
    )
    made.train(resume_from_checkpoint=(folder / "checkpoint-10").exists())
    return made.engine


KINDS = {"loop": loop, "trainer": trainer}

CHILD = """
import importlib.util, os, pathlib, signal, sys, torch
from transformers import LlamaForCausalLM, Trainer  # once, before the forks
torch.set_num_threads(int(sys.argv[2]))
spec = importlib.util.spec_from_file_location("victim", sys.argv[1])
victim = importlib.util.module_from_spec(spec)
spec.loader.exec_module(victim)
def told(step):
    if step == victim.DIES_AT:
        os.kill(os.getpid(), signal.SIGKILL)
for kind in sys.argv[4:]:
    if os.fork() == 0:
        folder = pathlib.Path(sys.argv[3]) / kind
        victim.KINDS[kind](folder, told)
        os._exit(3)
    print(os.wait()[1], flush=True)
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Folders of runs whose processes were killed after step 12, and how they ended."""
    folder = tmp_path_factory.mktemp("killed")
    for kind in KINDS:
        (folder / kind).mkdir()
    threads = str(torch.get_num_threads())
    child = subprocess.run(
        [sys.executable, "-c", CHILD, __file__, threads, str(folder), *KINDS],
        capture_output=True, text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    ends = [int(line) for line in child.stdout.split() if line.isdigit()]
    assert ends == [signal.SIGKILL] * len(KINDS), child.stderr
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_process_resumes_bit_for_bit(killed, tmp_path, kind):
    log = killed / kind / "run.zolog"
    with UpdateLog.open(log) as opened:
        assert len(opened) == DIES_AT
    whole = KINDS[kind](tmp_path, lambda step: None)
    steps = []
    resumed = KINDS[kind](killed / kind, steps.append)
    # The loop goes on from its log, the trainer from its last checkpoint.
    assert steps == list(range(13 if kind == "loop" else 11, STEPS + 1))
    left, right = (e.state_dict(dtype=torch.float32) for e in (whole, resumed))
    assert left.keys() == right.keys()
    assert all(torch.equal(v, right[k]) for k, v in left.items())
    assert log.read_bytes() == (tmp_path / "run.zolog").read_bytes()
