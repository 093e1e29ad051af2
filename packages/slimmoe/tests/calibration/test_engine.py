"""`calibrate`: options, modes and bad input."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import moe_families
from calibration_oracle import assert_same
from slimmoe.calibration import calibrate, engine


class Words:
    eos_token_id = 2

    def __call__(self, text):
        return {"input_ids": [3 + ord(c) % 90 for c in text]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    moe_families.model("qwen3_moe").save_pretrained(path)
    return path


def test_texts(folder):
    texts = ["some text", "and some more of it"]
    found = calibrate(
        folder, texts, tokenizer=Words(), sequence_length=8, batch_tokens=16, progress=False
    )
    assert found.tokens == sum(len(text) + 1 for text in texts)
    stream = [i for text in texts for i in [*Words()(text)["input_ids"], 2]]
    rows = [stream[at : at + 8] for at in range(0, len(stream), 8)]
    assert_same(found, calibrate(folder, rows, batch_tokens=16, progress=False))
    assert found.sequences == 4


def test_the_folders_own_tokenizer(folder, tmp_path):
    import shutil

    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    own = tmp_path / "own"
    shutil.copytree(folder, own)
    vocabulary = {word: 3 + at for at, word in enumerate(["a", "b", "<unk>", "</s>"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(own)
    found = calibrate(own, ["a b", "b c"], progress=False)
    wanted = calibrate(own, [[3, 4, 6, 4, 5, 6]], progress=False)
    assert found.tokens_sha256 == wanted.tokens_sha256
    assert_same(found, wanted)


def test_auto_takes_layers_when_memory_is_short(folder, monkeypatch):
    ran = []
    for name in ("_layerwise", "_resident"):
        run = getattr(engine, name)
        monkeypatch.setattr(
            engine, name, lambda *a, run=run, name=name: (ran.append(name), run(*a))[1]
        )
    calibrate(folder, [[5, 6]], progress=False)
    size = sum(p.numel() * 4 for p in moe_families.model("qwen3_moe").parameters())

    class Limits:
        free = int(size / 0.7) + 100

    monkeypatch.setattr(engine, "memory_limits", lambda: Limits)
    calibrate(folder, [[5, 6]], progress=False)
    Limits.free = int(size / 0.7) - 100
    calibrate(folder, [[5, 6]], progress=False)
    calibrate(folder, [[5, 6]], dtype=torch.bfloat16, progress=False)
    assert ran == ["_resident", "_resident", "_layerwise", "_resident"]


def test_dtype_of_a_folder(folder):
    for mode in ("resident", "layerwise"):
        found = calibrate(folder, [[5, 6]], mode=mode, dtype=torch.bfloat16, progress=False)
        assert found.dtype == "bfloat16"
        assert calibrate(folder, [[5, 6]], mode=mode, progress=False).dtype == "float32"


def test_a_base_model_is_as_good():
    model = moe_families.model("qwen3_moe")
    found = calibrate(model.model, [[5, 6, 7]], progress=False)
    assert_same(found, calibrate(model, [[5, 6, 7]], progress=False))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"mode": "fast"}, "mode: expected one of auto, resident, layerwise"),
        ({"batch_tokens": 0}, "batch_tokens"),
        ({"sequence_length": 0}, "sequence_length"),
        ({"mode": "layerwise"}, "is for the folder of a model"),
        ({"dtype": torch.bfloat16}, "is for the folder of a model"),
        ({"data": []}, "empty"),
        ({"data": [[5, 96]]}, r"token ids in \[0, 96\), got int 96"),
        ({"data": [[5, -1]]}, "got int -1"),
    ],
)
def test_bad_input(options, match):
    model = moe_families.model("qwen3_moe")
    with pytest.raises(ValueError, match=match):
        calibrate(model, **{"data": [[5, 6]]} | options)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        calibrate(tmp_path / "none", [[5, 6]], progress=False)


def test_importing_the_package_does_not_import_this():
    code = "import slimmoe, sys; assert 'torch' not in sys.modules, 'torch'"
    subprocess.run([sys.executable, "-c", code], check=True)
