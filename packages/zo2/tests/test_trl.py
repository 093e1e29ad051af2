"""trl's trainer with zeroth-order steps."""

import importlib.util

import pytest
import torch
import zo2
from shared_kernels.testing.models import tiny_model
from zo2 import OffloadConfig, UpdateLog, ZOConfig

pytestmark = pytest.mark.peer

ZO, STREAMED = ZOConfig(seed=3, eps=1e-2), OffloadConfig(prefetch=1)
ROWS = [{"prompt": f"w{k} w{k + 1}", "completion": f" w{k + 2} w{k + 3}"} for k in range(8)]


@pytest.fixture(scope="module")
def trl():
    return pytest.importorskip("trl")


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *(f"w{k}" for k in range(60))]
    made = Tokenizer(models.WordLevel({w: k for k, w in enumerate(words)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="<pad>")


def make(trl, tokenizer, folder, **kwargs):
    from datasets import Dataset

    args = trl.SFTConfig(
        str(folder), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-3, use_cpu=True,
        lr_scheduler_type="constant", report_to="none", disable_tqdm=True, logging_steps=1,
        save_steps=2, bf16=False, eval_strategy="steps", eval_steps=1, **kwargs,
    )  # fmt: skip
    return zo2.ZOSFTTrainer(
        tiny_model("llama", num_hidden_layers=2), args, zo=ZO, offload=STREAMED,
        train_dataset=Dataset.from_list(ROWS), eval_dataset=Dataset.from_list(ROWS[:4]),
        processing_class=tokenizer,
    )  # fmt: skip


def test_its_loss_steps_logs_and_resumes(trl, tokenizer, tmp_path):
    trainer = make(trl, tokenizer, tmp_path / "whole")
    assert isinstance(trainer, trl.SFTTrainer)
    trainer.train()
    logged = [e for e in trainer.state.log_history if "grad_norm" in e]
    # Two words and the end of text are learned, of sequences of five tokens.
    assert [e["num_tokens"] for e in logged] == [20, 40, 60]
    assert all({"loss", "entropy", "mean_token_accuracy"} <= e.keys() for e in logged)
    # The same steps by the engine itself, on the loader's batches with plain cross-entropy.
    twin = tiny_model("llama", num_hidden_layers=2)
    engine = zo2.prepare(twin, ZO, STREAMED, device="cpu")
    loader = trainer.get_train_dataloader()
    batches = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        batches += [dict(b) for b in loader]
    for entry, batch in zip(logged, batches, strict=False):
        step = engine.step(batch, lr=1e-3)
        assert entry["loss"] == pytest.approx(step.loss.item(), rel=1e-5)
        assert entry["grad_norm"] == pytest.approx(abs(step.g.item()), abs=1e-3)
    resumed = make(trl, tokenizer, tmp_path / "whole")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    left, right = trainer.engine.state_dict(), resumed.engine.state_dict()
    assert all(torch.equal(v, right[k]) for k, v in left.items())
    with UpdateLog.open(trainer.log_path) as log:
        assert len(log) == 3


def test_evaluation_metrics_are_those_of_evaluation(trl, tokenizer, tmp_path):
    trainer = make(trl, tokenizer, tmp_path)
    trainer.train()
    seen = [e for e in trainer.state.log_history if "eval_entropy" in e][-1]
    again = trainer.evaluate()
    found = [e for e in trainer.state.log_history if "eval_entropy" in e][-1]
    assert found["eval_entropy"] == pytest.approx(seen["eval_entropy"], rel=1e-6)
    assert again["eval_loss"] == seen["eval_loss"]


def test_an_engine_is_refused(trl, tmp_path):
    engine = zo2.prepare(tiny_model("llama", num_hidden_layers=2), ZO, device="cpu")
    with pytest.raises(TypeError, match="pass the model itself"):
        zo2.ZOSFTTrainer(engine, trl.SFTConfig(str(tmp_path), use_cpu=True, bf16=False))


def test_without_trl_the_name_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "trl" else find(n, *a)
    )
    import zo2.trainer

    with pytest.raises(ImportError, match=r"pip install 'zo2\[trl\]'"):
        _ = zo2.trainer.ZOSFTTrainer
    with pytest.raises(AttributeError):
        _ = zo2.trainer.nonsense
