"""The trainer on a GPU: where it places things, and that it waits for nothing."""

import itertools

import pytest
import torch
import zo2
from shared_kernels.testing.models import tiny_inputs, tiny_model
from transformers import TrainingArguments
from zo2 import OffloadConfig, ZOConfig, ZOTrainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ZO, STREAMED = ZOConfig(seed=3), OffloadConfig(prefetch=1)
ROWS = tiny_inputs("llama", batch=8)
DATA = [{key: value[k] for key, value in ROWS.items()} for k in range(8)]


class Plain(torch.nn.Module):
    """A language model that reads no value; transformers' own ask whether sequences are packed."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(256, 64)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(64, 64) for _ in range(4)])

    def forward(self, input_ids, labels):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        logits = (hidden @ self.embed.weight.T).float()
        return {"loss": torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def make(folder, cls=ZOTrainer, model=None, **kwargs):
    args = TrainingArguments(
        str(folder), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-3,
        lr_scheduler_type="constant", report_to="none", disable_tqdm=True, logging_steps=6,
        save_strategy="steps", save_steps=4, **kwargs,
    )  # fmt: skip
    return cls(model or tiny_model("llama"), args, zo=ZO, offload=STREAMED, train_dataset=DATA)


def batches_of(trainer):
    loader = trainer.get_train_dataloader()
    for epoch in itertools.count():
        loader.set_epoch(epoch)
        yield from loader


def test_equals_the_engines_loop_and_resumes(tmp_path):
    trainer = make(tmp_path)
    trainer.train()
    engine = zo2.prepare(tiny_model("llama"), ZO, STREAMED)
    for batch in itertools.islice(batches_of(trainer), 6):
        engine.step(batch, lr=1e-3)
    expected = engine.state_dict()
    resumed = make(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for weights in (trainer.engine.state_dict(), resumed.engine.state_dict()):
        assert all(torch.equal(v, weights[k]) for k, v in expected.items())


@pytest.mark.parametrize("bf16", [False, True])
def test_a_step_does_not_wait_for_the_gpu(tmp_path, bf16):
    class Strict(ZOTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            # The first steps build what is kept: kernels, buffers, workspaces.
            torch.cuda.set_sync_debug_mode("error" if self.state.global_step > 2 else "default")
            try:
                return super().training_step(model, inputs, num_items_in_batch)
            finally:
                torch.cuda.set_sync_debug_mode("default")

    trainer = make(tmp_path, Strict, Plain(), bf16=bf16)
    trainer.train()
    assert trainer.engine.global_step == 6
