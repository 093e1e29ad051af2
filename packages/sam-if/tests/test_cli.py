"""The command line on runs of real trainers."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from sam_if import SAMConfig, SAMTrainer, Scores, attribute
from sam_if.attribution import opened
from sam_if.cli import main
from sam_if.datafiles import read_batches, read_numbers
from shared_kernels.testing.models import tiny_model
from tenfold.assets import smollm2
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    TrainingArguments,
)

COMMANDS = ("plan", "attribute", "show", "detect", "remove", "lds", "check")
TEXTS = [f"The {animal} sleeps." for animal in ("cat", "dog", "crow", "toad", "mouse", "wolf")]


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    return code, capsys.readouterr()


def trained(folder, model, rows, **options):
    args = TrainingArguments(
        str(folder / "out"), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=6,
        save_strategy="no", optim="sgd", learning_rate=0.1, per_device_train_batch_size=3, seed=1,
        weight_decay=0.05,
    )  # fmt: skip
    made = SAMTrainer(model, args, train_dataset=rows, sam=SAMConfig(rho=0.1),
                      record=folder / "run", **options)  # fmt: skip
    made.train()
    return folder / "run"


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """A run of a small language model on texts, with SmolLM2's tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("language")
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    model = tiny_model(
        "mistral", vocab_size=len(tokenizer), max_position_embeddings=64, num_hidden_layers=1
    )
    model.config._attn_implementation = "eager"
    rows = []
    for text in TEXTS:
        ids = torch.tensor(tokenizer(text, padding="max_length", max_length=8)["input_ids"][:8])
        rows.append({"input_ids": ids, "labels": ids})
    made = trained(folder, model, rows, processing_class=tokenizer)
    query = folder / "query.jsonl"
    query.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:2]))
    return made, query


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A run of a small classifier, which came to rest about as much as it will."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("classifier")
    config = BertConfig(
        vocab_size=12, hidden_size=4, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=4, max_position_embeddings=6, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, num_labels=3, attn_implementation="eager",
    )  # fmt: skip
    draws = torch.Generator().manual_seed(3)
    rows = [{"input_ids": torch.randint(12, (5,), generator=draws), "labels": n % 3}
            for n in range(9)]  # fmt: skip
    made = trained(folder, BertForSequenceClassification(config), rows)
    query = folder / "query.safetensors"
    save_file({"input_ids": torch.stack([row["input_ids"] for row in rows[:2]]),
               "labels": torch.tensor([0, 1])}, query)  # fmt: skip
    return made, query


def test_help_loads_no_torch():
    code = (
        "import sys\nfrom sam_if.cli import main\n"
        "assert main(['--help']) == 0\n"
        "assert not {'torch', 'transformers', 'scipy'} & set(sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for name in COMMANDS:
        assert name in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(capsys, command):
    code, printed = run(capsys, command, "--help")
    assert code == 0
    assert "--json" in printed.out


def test_attribute_texts(capsys, language, tmp_path):
    made, query = language
    code, printed = run(capsys, "attribute", made, "--query", query, "--out", tmp_path / "scores",
                        "--device", "cpu", "--json")  # fmt: skip
    assert code == 0, printed.err
    found = json.loads(printed.out)
    scores = Scores.load(tmp_path / "scores")
    assert scores.values.shape == (2, 6)
    assert found["samples"] == 6
    assert found["queries"][1]["helpful"][0] == [*scores.top(1, 1)[0]]
    assert found["queries"][1]["harmful"][0] == [*scores.top(1, 1, harmful=True)[0]]
    # the same as in Python
    tokenizer = AutoTokenizer.from_pretrained(made / "model")
    wanted = attribute(made, read_batches(query, tokenizer))
    assert torch.equal(scores.values, wanted.values)
    code, printed = run(capsys, "attribute", made, "--query", query, "--out", tmp_path / "mean",
                        "--method", "gif", "--mean", "--device", "cpu")  # fmt: skip
    assert code == 0
    assert "helped most" in printed.out
    assert Scores.load(tmp_path / "mean").values.shape == (1, 6)
    # scores that are there are not written over
    code, printed = run(capsys, "attribute", made, "--query", query, "--out", tmp_path / "mean",
                        "--method", "gif", "--device", "cpu")  # fmt: skip
    assert code == 2
    assert "exists and is not empty" in printed.err


def test_show(capsys, language, classifier, tmp_path):
    pytest.importorskip("matplotlib")
    for made, query in (language, classifier):
        scores = tmp_path / f"{query.stem}{query.suffix}"
        run(capsys, "attribute", made, "--query", query, "--out", scores, "--method", "gif",
            "--device", "cpu")  # fmt: skip
        for name in ("page.html", "page.png"):
            code, printed = run(capsys, "show", made, scores, "--query", query, "--device", "cpu",
                                "--out", tmp_path / query.suffix / name, "--k", 2)  # fmt: skip
            assert code == 0, printed.err
            assert (tmp_path / query.suffix / name).stat().st_size > 1000
        page = (tmp_path / query.suffix / "page.html").read_text()
        best = Scores.load(scores).top(1)[0][0]
        assert f"sample {best}" in page
        # texts are read, numbers are numbers
        assert (TEXTS[0] in page) == (query.suffix == ".jsonl")
    code, printed = run(capsys, "show", made, scores, "--out", tmp_path / "all.html", "--device",
                        "cpu", "--json")  # fmt: skip
    assert json.loads(printed.out)["page"].endswith("all.html")
    code, printed = run(capsys, "show", made, scores, "--out", tmp_path / "page.pdf")
    assert code == 2
    assert "expected a .html or .png file" in printed.err
    code, printed = run(capsys, "detect", classifier[0], "--html", tmp_path / "labels.html",
                        "--device", "cpu")  # fmt: skip
    assert code == 0
    assert "<html" in (tmp_path / "labels.html").read_text()


def test_pictures_and_numbers_are_cards():
    from sam_if.cards import card_of

    batch = {"pixel_values": torch.randn(2, 3, 4, 4), "labels": torch.tensor([1, 2])}
    found = card_of(batch, 1)
    assert found.label == "2"
    assert found.content.shape == (3, 4, 4)
    assert 0 <= found.content.min() < found.content.max() <= 1
    found = card_of((torch.randn(2, 4, 4), torch.tensor([0.5, 1.5])), 0)
    assert found.label == "0.5"
    assert found.content["x"].shape == (16,)
    ids = torch.tensor([[1, 2, 3]])
    found = card_of({"input_ids": ids, "labels": torch.tensor([[-100, 2, 3]])}, 0)
    assert found.content["labels"].tolist() == [2, 3]


def test_check(capsys, language, classifier):
    code, printed = run(capsys, "check", language[0], "--device", "cpu", "--json")
    found = json.loads(printed.out)
    assert code == 0, printed.err
    assert found["steps"] == 6
    assert found["replayed"] is True
    assert found["worst_step"] < 1e-3
    code, printed = run(capsys, "check", classifier[0], "--device", "cpu")
    assert code == 0
    assert "stationarity" in printed.out


def test_a_run_that_is_not_as_recorded(capsys, classifier, tmp_path):
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(classifier[0], copy)
    lines = (copy / "steps.jsonl").read_text().splitlines()
    lines[1] = lines[1].replace('"rho": 0.1', '"rho": 0.2')
    (copy / "steps.jsonl").write_text("\n".join(lines) + "\n")
    code, printed = run(capsys, "check", copy, "--device", "cpu", "--json")
    assert code == 1
    assert json.loads(printed.out)["problems"]
    code, printed = run(capsys, "attribute", copy, "--query", classifier[1], "--out",
                        tmp_path / "scores", "--device", "cpu")  # fmt: skip
    assert code == 1
    assert "TrajectoryError" in printed.err


def test_detect(capsys, classifier):
    code, printed = run(capsys, "detect", classifier[0], "--k", 4, "--device", "cpu", "--json")
    assert code == 0, printed.err
    found = json.loads(printed.out)["rows"]
    assert [row["rank"] for row in found] == [1, 2, 3, 4]
    assert all(row["label"] == row["sample"] % 3 for row in found)
    code, printed = run(capsys, "detect", classifier[0], "--score", "loss", "--device", "cpu")
    assert code == 0
    assert "suspicious labels" in printed.out


def test_remove(capsys, language, classifier, tmp_path):
    ids = tmp_path / "ids.txt"
    ids.write_text("1, 4\n")
    code, printed = run(capsys, "remove", language[0], "--ids", ids, "--out", tmp_path / "model",
                        "--method", "replay", "--device", "cpu")  # fmt: skip
    assert code == 0, printed.err
    assert "training again without 2 samples" in printed.out
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    record = opened(language[0])
    wanted = record.retrain([1, 4])
    record.vector.write(wanted)
    for name, value in found.state_dict().items():
        assert torch.equal(value, record.model.state_dict()[name]), name
    AutoTokenizer.from_pretrained(tmp_path / "model")
    code, printed = run(
        capsys, "remove", classifier[0], "--ids", ids, "--out", tmp_path / "near",
        "--method", "first_order", "--solver", "gmres", "--damping", 5, "--device", "cpu", "--json",
    )  # fmt: skip
    assert code == 0, printed.err
    told = json.loads(printed.out)
    assert told["method"] == "first_order"
    assert told["samples"] == [1, 4]
    assert load_file(tmp_path / "near" / "edit" / "weights.safetensors")


def test_lds_goes_on(capsys, classifier, tmp_path):
    made, query = classifier
    run(capsys, "attribute", made, "--query", query, "--out", tmp_path / "scores", "--device",
        "cpu")  # fmt: skip
    arguments = ("lds", made, tmp_path / "scores", "--query", query, "--fractions", 0.3,
                 "--subsets", 4, "--device", "cpu", "--json")  # fmt: skip
    code, printed = run(capsys, *arguments)
    assert code == 0, printed.err
    first = json.loads(printed.out)
    assert first["fractions"][0]["fraction"] == 0.3
    assert -1 <= first["fractions"][0]["spearman"] <= 1
    kept = (tmp_path / "scores-lds.json").read_text()
    code, printed = run(capsys, *arguments)
    assert json.loads(printed.out) == first
    assert (tmp_path / "scores-lds.json").read_text() == kept


def test_plan(capsys, tmp_path):
    torch.manual_seed(0)
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    batch = tmp_path / "batch.safetensors"
    ids = torch.randint(3, 60, (4, 6))
    save_file({"input_ids": ids, "labels": ids.clone()}, batch)
    code, printed = run(capsys, "plan", tmp_path / "model", "--batch", batch, "--steps", 100,
                        "--folder", tmp_path / "run", "--device", "cpu", "--json")  # fmt: skip
    assert code == 0, printed.err
    found = json.loads(printed.out)
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["place"] == "disk"
    code, printed = run(capsys, "plan", tmp_path / "model", "--batch", batch, "--steps", 10**12,
                        "--storage", "all", "--device", "cpu")  # fmt: skip
    assert code == 1
    assert "of host memory, and there are" in " ".join(printed.out.split())


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("q.txt", "x", "query: expected a .safetensors or .jsonl file"),
        ("q.jsonl", "", "expected at least one line"),
        ("q.jsonl", "{}\n", "line 1: expected an object with text"),
        ("q.jsonl", '{"text": "a"}\n{"text": "b", "label": 1}\n', "labels of all texts"),
    ],
)
def test_bad_queries(name, text, match, language, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(language[0] / "model")
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=match):
        read_batches(tmp_path / name, tokenizer)
    if name == "q.jsonl":
        with pytest.raises(ValueError, match="query: expected a tokenizer beside the run"):
            read_batches(tmp_path / name)


def test_files_of_tensors_and_numbers(tmp_path):
    place = tmp_path / "q.safetensors"
    save_file({"0": torch.arange(6.0).view(3, 2), "1": torch.arange(3)}, place)
    found = read_batches(place, size=2)
    assert [len(batch[1]) for batch in found] == [2, 1]
    save_file({"x": torch.zeros(3, 2), "labels": torch.arange(2)}, place)
    with pytest.raises(ValueError, match="tensors of as many samples, got list"):
        read_batches(place)
    ids = tmp_path / "ids"
    for text, match in (("1 two", r"got list \['two'\]"), ("", "got str 'nothing'"),
                        ("-1", "numbers of samples")):  # fmt: skip
        ids.write_text(text)
        with pytest.raises(ValueError, match=match):
            read_numbers(ids)
    ids.write_text("3,1\n2")
    assert read_numbers(ids) == [3, 1, 2]
    assert main(["check", str(tmp_path / "none")]) == 2
