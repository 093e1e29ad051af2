"""trl's trainer with private steps."""

import importlib.util

import flashdp
import pytest
import torch
from flashdp import PrivacyArguments
from shared_kernels.testing.models import tiny_model

pytestmark = pytest.mark.peer

PRIVACY = PrivacyArguments(
    noise_multiplier=0.0, max_grad_norm=1e6, expected_batch_size=4, target_delta=1e-3
)
ROWS = [
    {"prompt": f"w{k} w{k + 1}", "completion": " ".join(f" w{k + 2 + i}" for i in range(1 + k % 3))}
    for k in range(8)
]


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


def make(trl, tokenizer, folder, privacy=PRIVACY, *, options=(), **kwargs):
    from datasets import Dataset

    args = trl.SFTConfig(
        str(folder), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True,
        lr_scheduler_type="constant", report_to="none", disable_tqdm=True, logging_steps=1,
        bf16=False, optim="sgd", **dict(options),
    )  # fmt: skip
    return flashdp.DPSFTTrainer(
        tiny_model("llama", num_hidden_layers=2), args, privacy=privacy,
        train_dataset=Dataset.from_list(ROWS), eval_dataset=Dataset.from_list(ROWS[:4]),
        processing_class=tokenizer, **kwargs,
    )  # fmt: skip


def test_its_steps_are_a_plain_loops(trl, tokenizer, tmp_path):
    trainer = make(trl, tokenizer, tmp_path)
    assert isinstance(trainer, trl.SFTTrainer)
    batches, inner = [], trainer.training_step

    def spy(model, inputs, count=None):
        batches.append({k: v.clone() for k, v in inputs.items()})
        return inner(model, inputs, count)

    trainer.training_step = spy
    trainer.train()
    assert trainer.engine.accountant.steps == 3
    assert trainer.engine.independence.status == "loss"
    # The same batches, one row after the other, with plain cross-entropy over each row's own words.
    twin = tiny_model("llama", num_hidden_layers=2)
    optimizer = torch.optim.SGD(twin.parameters(), lr=1e-2)
    for batch in batches:
        for row, real in enumerate(batch["dp_mask"].tolist()):
            if real:
                one = {
                    k: batch[k][row : row + 1] for k in ("input_ids", "attention_mask", "labels")
                }
                (twin(**one).loss / 4).backward()
        if bool(batch["dp_last"]):
            optimizer.step()
            optimizer.zero_grad()
    own = dict(trainer.model.named_parameters())
    moved = 0.0
    fresh = dict(tiny_model("llama", num_hidden_layers=2).named_parameters())
    for name, param in twin.named_parameters():
        torch.testing.assert_close(own[name], param, rtol=1e-5, atol=1e-6)
        moved = max(moved, float((param - fresh[name]).detach().abs().max()))
    assert moved > 1e-3


def test_nothing_is_logged_that_is_not_private(trl, tokenizer, tmp_path):
    trainer = make(trl, tokenizer, tmp_path)
    trainer.train()
    trained = [entry for entry in trainer.state.log_history if "learning_rate" in entry]
    assert trained
    told = {"loss", "entropy", "mean_token_accuracy", "num_tokens", "grad_norm"}
    assert all(not told & entry.keys() for entry in trained)
    # Of data to evaluate on, everything is told.
    found = trainer.evaluate()
    assert {"eval_loss", "eval_entropy", "eval_mean_token_accuracy"} <= found.keys()


@pytest.mark.parametrize(("options", "words"), [
    ({"packing": True}, "packing=True, and a packed row"),
    ({"padding_free": True}, "padding_free=True"),
    ({"loss_type": "dft"}, "loss_type='dft'"),
])  # fmt: skip
def test_what_mixes_units_is_refused(trl, tokenizer, tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        make(trl, tokenizer, tmp_path, options=options)


def test_adapters(trl, tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = make(trl, tokenizer, tmp_path, peft_config=config)
    trainer.train()
    covered = trainer.privacy_report().to_dict()
    assert trainer.engine.accountant.steps == 3
    assert "lora_A" in str(covered)


def test_without_trl_the_remedy_is_told(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'flashdp\[trl\]'"):
        flashdp.trainer.__getattr__("DPSFTTrainer")
