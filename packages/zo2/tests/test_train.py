"""``zo2 train`` from files to a saved model, and what it makes of rows and options."""

import json

import pytest
import torch
import transformers
import zo2
from shared_kernels.testing.models import tiny_model
from zo2 import TrainConfig, UpdateLog
from zo2.cli import main
from zo2.train import encode, load_config, read_rows

WORDS = ["<pad>", "<s>", "</s>", "<user>", "<bot>", *(f"w{k}" for k in range(60))]
TEMPLATE = (
    "{% for m in messages %}{{ '<user> ' if m.role == 'user' else '<bot> ' }}{{ m.content }}"
    "{{ ' </s> ' if m.role != 'user' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bot> ' }}{% endif %}"
)


def make_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({w: k for k, w in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A model folder, and data files of all kinds."""
    path = tmp_path_factory.mktemp("files")
    tiny_model("llama", num_hidden_layers=2).save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    rows = [{"prompt": f"w{k} w{k + 1}", "completion": f"w{k + 2}"} for k in range(12)]
    (path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (path / "dev.json").write_text(json.dumps(rows[:4]))
    return path


def run(capsys, *args):
    status = main([str(a) for a in args])
    out, err = capsys.readouterr()
    return status, out, err


def ids(text):
    return [WORDS.index(w) for w in text.split()]


# -- rows ------------------------------------------------------------------------------------------


def test_only_completions_are_learned(tokenizer):
    rows = [
        {"text": "w1 w2"},
        {"prompt": "w1 w2", "completion": "w3"},
        {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]},
        {
            "prompt": [{"role": "user", "content": "w1"}],
            "completion": [{"role": "assistant", "content": "w2"}],
        },
    ]
    text, pair, chat, listed = encode(rows, tokenizer, 16)
    assert text == {"input_ids": ids("w1 w2 </s>"), "labels": ids("w1 w2 </s>")}
    assert pair["input_ids"] == ids("w1 w2 w3 </s>")
    assert pair["labels"] == [-100, -100, *ids("w3 </s>")]
    assert chat["input_ids"] == ids("<user> w1 <bot> w2 </s>")
    assert chat["labels"] == [-100] * 3 + ids("w2 </s>")
    assert listed == chat


def test_long_rows_keep_their_completion(tokenizer, caplog):
    rows = [
        {"prompt": "<s> w1 w2 w3", "completion": "w4"},
        {"text": "w1 w2 w3 w4 w5"},
        {"prompt": "w1", "completion": "w2 w3 w4 w5"},
    ]
    pair, text = encode(rows, tokenizer, 4)
    assert pair["input_ids"] == ids("<s> w3 w4 </s>")
    assert pair["labels"] == [-100, -100, *ids("w4 </s>")]
    assert text["input_ids"] == ids("w1 w2 w3 w4")
    assert "1 of 3 rows are left out" in caplog.text
    with pytest.raises(ValueError, match="no row of the data fits"):
        encode(rows[2:], tokenizer, 4)
    with pytest.raises(ValueError, match=r"row 2 .*it has \['label'\]"):
        encode([{"text": "w1"}, {"label": 1}], tokenizer, 4)


def test_files_are_read_and_faults_named(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [{"text": "a"}, {"text": "b"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n{"text": "b"}\n')
    for kind in ("parquet", "json", "jsonl"):
        assert read_rows(tmp_path / f"a.{kind}") == rows
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{')
    (tmp_path / "none.jsonl").write_text("")
    (tmp_path / "a.csv").write_text("text\n")
    for name, words in {
        "bad.jsonl": "line 2: not JSON", "none.jsonl": "at least one", "a.csv": "expected a .jsonl"
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=words):
            read_rows(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_rows(tmp_path / "missing.jsonl")


# -- options ---------------------------------------------------------------------------------------


def test_options_win_over_the_file_and_reach_nested_fields(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: m\ndata: d.jsonl\nlr: 1e-7\nsteps: 5\n"
        "zo: {eps: 1e-2, q: 2}\ntrainer: {logging_steps: 7}\n"
    )
    found = load_config(
        path, {"steps": 9, "lr": None}, ["zo.q=3", "offload.gpu=8GiB", "trainer.seed=4"]
    )
    assert found == TrainConfig(
        model="m", data="d.jsonl", lr=1e-7, steps=9, zo=zo2.ZOConfig(eps=1e-2, q=3),
        offload=zo2.OffloadConfig(gpu="8GiB"), trainer={"logging_steps": 7, "seed": 4},
    )  # fmt: skip
    for settings, words in {
        "zo.epss=1": "did you mean 'eps'",
        "zo.eps": "KEY=VALUE",
        "lr.x=1": "no options inside",
        "trainer.max_steps=3": "set by the option 'steps'",
        "zo.eps=-1": "above 0",
    }.items():
        with pytest.raises(ValueError, match=words):
            load_config(path, {}, [settings])
    with pytest.raises(ValueError, match="model and data must be given"):
        load_config(None, {})
    path.write_text("a: [")
    with pytest.raises(ValueError, match="is not YAML"):
        load_config(path, {})


# -- from files to a model -------------------------------------------------------------------------


def options(folder, out):
    return (
        "train", "--model", folder / "model", "--data", folder / "train.jsonl", "--output-dir", out,
        "--eval-data", folder / "dev.json", "--batch-size", 4, "--max-length", 16, "--lr", "1e-3",
        "--set", "zo.eps=1e-2", "--set", "trainer.use_cpu=true", "--set", "trainer.save_steps=2",
        "--set", "trainer.logging_steps=1",
    )  # fmt: skip


def test_train_from_files_and_resume(folder, tmp_path, capsys):
    args = options(folder, tmp_path / "out")
    status, out, err = run(capsys, *args, "--steps", 5, "--json")
    assert status == 0, err
    found = json.loads(out)
    assert (found["steps"], found["skipped"]) == (5, 0)
    assert found["train_loss"] > 0
    assert found["eval_loss"] > 0
    assert "grad_norm" in err
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tuned = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tuned("w3")["input_ids"] == ids("w3")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    zo2.replay(base, found["log"], progress=False)
    for name, value in model.state_dict().items():
        assert torch.equal(base.state_dict()[name], value), name
    with UpdateLog.open(found["log"]) as log:
        assert log.header["eps"] == 1e-2
        assert log.records["lr"].tolist() == pytest.approx([1e-3] * 5)
        whole = log.records.copy()
    # As if the run had ended after the checkpoint of step 2.
    for step in (4, 5):
        for file in (tmp_path / "out" / f"checkpoint-{step}").iterdir():
            file.unlink()
        (tmp_path / "out" / f"checkpoint-{step}").rmdir()
    status, out, err = run(capsys, *args, "--steps", 5, "--resume")
    assert (status, "train_loss" in out) == (0, True), err
    with UpdateLog.open(found["log"]) as log:
        assert (log.records == whole).all()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, value in again.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_a_dry_run_shows_the_plan_and_writes_nothing(folder, tmp_path, capsys, monkeypatch):
    from shared_kernels.offload import Bandwidth

    rates = {"h2d": 5e10, "d2h": 5e10, "duplex": 9e10, "d2d": 4e12, "gemm": 6e14, "rng": 6e11}
    monkeypatch.setattr("zo2._plan.measure_bandwidth", lambda device, dist: Bandwidth(**rates))
    args = options(folder, tmp_path / "out")
    status, out, _ = run(capsys, *args, "--dry-run", "--json")
    found = json.loads(out)
    # Two words, a completion and its end, in batches of four.
    assert (status, found["tokens"], found["n_blocks"]) == (0, 16, 2)
    status, out, _ = run(capsys, *args, "--dry-run", "--set", "offload.host=1kB")
    assert (status, "DOES NOT FIT" in out) == (1, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("--set", "data=missing.jsonl"), "missing.jsonl"),
        (("--set", "trainer.colour=red"), "colour"),
        (("--resume",), "no checkpoint"),
        (("--set", "zo.q=0"), "ZOConfig.q"),
        (("--config", "missing.yaml"), "missing.yaml"),
    ],
)
def test_bad_input_is_status_2(folder, tmp_path, capsys, monkeypatch, change, words):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *options(folder, tmp_path / "out"), *change)
    assert (status, out) == (2, "")
    assert words in err


def test_bench(folder, capsys, monkeypatch):
    status, out, _ = run(capsys, "bench", "rng", "--elements", 4096, "--device", "cpu", "--json")
    found = json.loads(out)["draws_per_second"]
    assert status == 0
    assert set(found) == {"gaussian", "rademacher", "torch.randn"}
    assert min(found.values()) > 0
    args = ("bench", "step", folder / "model", "--tokens", 8, "--device", "cpu")
    status, out, _ = run(capsys, *args, "--json")
    found = json.loads(out)
    assert status == 0
    assert [found[k]["blocks_streamed"] for k in ("streamed", "resident")] == [2, 0]
    assert found["streamed"]["seconds_per_step"] > 0
    status, _, err = run(capsys, *args[:3], "--tokens", 0, "--device", "cpu")
    assert (status, "at least 2 tokens" in err) == (2, True)
    monkeypatch.setattr("zo2.bench.pcie", lambda device: {"device": "cpu", "h2d": 1.5})
    status, out, _ = run(capsys, "bench", "pcie")
    assert (status, "1.5" in out) == (0, True)
