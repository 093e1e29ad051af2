"""How good models are: perplexity by its formula, tasks of lm-eval, drafts; on the command line."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from slimmoe import CompressionConfig, compress
from slimmoe.cli import main
from slimmoe.evaluation import acceptance, evaluate, perplexity
from slimmoe.mtp import MTPHead, acceptance_rate
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent))
from moe_families import FAMILIES, model, tokens
from test_mtp import head_of, saved

TEXTS = ["the cat sat on the mat, and the dog sat on the cat.", "a bird does not sit; it flies."]
LETTERS = "abcdefghijklmnopqrstuvwxyz .,;:?"
TASK = """
task: sounds
dataset_path: json
dataset_kwargs: {{data_files: {{test: {test}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "the {{{{animal}}}} says"
doc_to_choice: options
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
DOCS = [
    {"animal": animal, "options": ["woof", "miaow", "moo"], "answer": number % 3}
    for number, animal in enumerate(["dog", "cat", "cow", "wolf", "lion", "calf", "fox"])
]


def tokenizer():
    """One token for each letter."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    known = {"<unk>": 0, "<s>": 1, "</s>": 2} | {c: 3 + at for at, c in enumerate(LETTERS)}
    made = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model with a tokenizer, a smaller one, and one with modules of MTP."""
    folder = tmp_path_factory.mktemp("models")
    model("qwen3_moe").save_pretrained(folder / "whole")
    found, head = head_of("deepseek_v3")
    folder.joinpath("drafts").mkdir()
    saved(found, head, folder / "drafts")
    for name in ("whole", "drafts"):
        tokenizer().save_pretrained(folder / name)
    compress(folder / "whole", folder / "less", CompressionConfig(num_layers=2), progress=False)
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text)
    return folder


# --- perplexity ----------------------------------------------------------------------------------


def by_brute_force(found, stream, block):
    """Mean over all predicted tokens, block by block, of what is left of the whole logits."""
    losses = []
    for begin in range(0, len(stream) - block + 1, block):
        ids = torch.tensor(stream[begin : begin + block])
        logits = found(ids[None]).logits[0].double()
        for at in range(block - 1):
            law = logits[at].softmax(-1)
            losses.append(-math.log(float(law[ids[at + 1]])))
    return sum(losses) / len(losses), len(losses)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_perplexity_is_its_formula(family):
    found = model(family)
    read = tokenizer()
    stream = [i for text in TEXTS for i in [*read(text)["input_ids"], 2]]
    assert len(stream) % 16
    for batch_tokens in (16, 40, 1000):
        told = perplexity(found, TEXTS, tokenizer=read, block=16, batch_tokens=batch_tokens)
        mean, count = by_brute_force(found, stream, 16)
        assert told.tokens == count == len(stream) // 16 * 15
        assert told.nats_per_token == pytest.approx(mean, rel=1e-5)
        assert told.perplexity == pytest.approx(math.exp(mean), rel=1e-4)
        size = sum(len(text.encode()) for text in TEXTS)
        assert told.nats_per_byte == pytest.approx(mean * len(stream) / size, rel=1e-5)


@torch.no_grad()
def test_token_ids_are_joined_too(place):
    found = model("qwen3_moe")
    rows = tokens(found, 3, 9).tolist()
    told = perplexity(place / "whole", rows, block=5)
    mean, count = by_brute_force(found, [i for row in rows for i in row], 5)
    assert told.tokens == count == 20
    assert told.nats_per_token == pytest.approx(mean, rel=1e-5)
    assert told.nats_per_byte is None


def test_a_model_that_knows_nothing_or_all():
    found = model("qwen3_moe")
    with torch.no_grad():
        found.lm_head.weight.zero_()
    assert perplexity(found, tokens(found).tolist(), block=6).perplexity == pytest.approx(96)
    found.model.embed_tokens.weight.data.zero_()
    found.model.norm.weight.data.fill_(0)
    assert perplexity(found, [[3] * 12], block=6).perplexity == pytest.approx(96)


def test_perplexity_of_what_cannot_be(place):
    found = model("qwen3_moe")
    for data, options, match in (
        (TEXTS, {}, "tokenizer"),
        ([], {}, "data: expected texts or token ids"),
        ([[3, 4, 5]], {"block": 4}, "block: expected at most 3 tokens, .*got int 4"),
        ([[3, 4, 5]], {"block": 1}, "block: expected an integer in"),
        ([[3, 99]], {"block": 2}, r"token ids in \[0, 96\), got int 99"),
    ):
        with pytest.raises(ValueError, match=match):
            perplexity(found, data, **options)


# --- tasks ---------------------------------------------------------------------------------------


@pytest.fixture
def task(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "sounds.yaml").write_text(TASK.format(test=tmp_path / "test.jsonl"))
    return folder


@pytest.fixture
def manager(task):
    from slimmoe.evaluation import task_manager

    return task_manager(task)


@torch.no_grad()
def accuracy(folder, docs):
    """Share of questions whose likeliest option is the answer."""
    found, read, right = AutoModelForCausalLM.from_pretrained(folder), tokenizer(), 0
    for doc in docs:
        said = []
        for option in doc["options"]:
            before = read(f"the {doc['animal']} says")["input_ids"]
            after = read(f" {option}")["input_ids"]
            law = found(torch.tensor([before + after])).logits[0].double().log_softmax(-1)
            said.append(sum(float(law[len(before) - 1 + at, t]) for at, t in enumerate(after)))
        right += said.index(max(said)) == doc["answer"]
    return right / len(docs)


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_local_task(place, task, manager):
    for count in (None, 4):
        wanted = accuracy(place / "whole", DOCS[:count])
        told = evaluate(place / "whole", ["sounds"], task_manager=manager, limit=count,
                        device="cpu")  # fmt: skip
        assert told["sounds"]["acc,none"] == pytest.approx(wanted)
        assert told["sounds"]["samples"] == len(DOCS[:count])
        loaded = AutoModelForCausalLM.from_pretrained(place / "whole").train()
        again = evaluate(loaded, [str(task / "sounds.yaml")], tokenizer=tokenizer(), limit=count,
                         batch_size=3, bootstrap_iters=0, task_manager=manager)  # fmt: skip
        assert again["sounds"]["acc,none"] == pytest.approx(wanted)
        assert loaded.training


@pytest.mark.peer
def test_tasks_that_there_are_not(place, task):
    with pytest.raises(ValueError, match=r"tasks: expected .*, got list \['sonds'\]; .*include"):
        evaluate(place / "whole", ["sonds"], include_path=task)
    with pytest.raises(ValueError, match="tasks: expected at least one"):
        evaluate(place / "whole", [])
    with pytest.raises(FileNotFoundError, match="include_path"):
        evaluate(place / "whole", ["sounds"], include_path=task / "nowhere")


def test_without_lm_eval(place, monkeypatch):
    for name in ("lm_eval", "lm_eval.models.huggingface", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'slimmoe\[eval\]'"):
        evaluate(place / "whole", ["sounds"])


# --- drafts --------------------------------------------------------------------------------------


def test_drafts_of_texts(place):
    told = acceptance(place / "drafts", TEXTS, prompts=3, prompt_tokens=8, depth=2, new_tokens=9)
    found = AutoModelForCausalLM.from_pretrained(place / "drafts")
    stream = [i for text in TEXTS for i in [*tokenizer()(text)["input_ids"], 2]]
    prompts = [torch.tensor(stream[at : at + 8]) for at in (0, 8, 16)]
    wanted = acceptance_rate(found, MTPHead.from_pretrained(place / "drafts", found), prompts,
                             depth=2, new_tokens=9)  # fmt: skip
    assert told == wanted
    assert acceptance(place / "whole", TEXTS, prompt_tokens=8) is None
    with pytest.raises(ValueError, match="prompt_tokens: expected at most"):
        acceptance(place / "drafts", TEXTS, prompt_tokens=1000)


# --- the command ---------------------------------------------------------------------------------


def run(capsys, *args):
    status = main(["eval", *[str(arg) for arg in args]])
    told = capsys.readouterr()
    return status, told.out, told.err


def test_models_side_by_side(place, capsys):
    texts = ("--texts", place / "0.txt", place / "1.txt", "--block", 16, "--device", "cpu")
    status, out, err = run(capsys, place / "whole", place / "less", *texts, "--json")
    assert status == 0, err
    told = json.loads(out)
    assert list(told) == [str(place / "whole"), str(place / "less")]
    for path, found in told.items():
        wanted = perplexity(path, TEXTS, block=16)
        assert found["texts"] == pytest.approx({
            "tokens": wanted.tokens, "nats_per_token": wanted.nats_per_token,
            "nats_per_byte": wanted.nats_per_byte, "perplexity": wanted.perplexity,
        })  # fmt: skip
    status, out, _ = run(capsys, place / "whole", place / "less", *texts)
    assert status == 0
    for word in ("whole", "less", "perplexity", "nats per byte", "75"):
        assert word in out


def test_drafts_on_the_command_line(place, capsys):
    args = (place / "drafts", place / "whole", "--texts", place / "0.txt", "--block", 8,
            "--acceptance", "--prompts", 2, "--new-tokens", 9)  # fmt: skip
    status, out, err = run(capsys, *args, "--json")
    assert status == 0, err
    told = json.loads(out)
    wanted = acceptance(place / "drafts", TEXTS[:1], prompts=2, prompt_tokens=8, new_tokens=9)
    assert told[str(place / "drafts")]["acceptance"]["rates"] == list(wanted.rates)
    assert told[str(place / "whole")]["acceptance"] is None
    status, out, _ = run(capsys, *args)
    assert status == 0
    assert "4 drafts accepted" in out


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tasks_on_the_command_line(place, task, capsys):
    args = (place / "whole", place / "less", "--tasks", "sounds", "--include-path", task,
            "--limit", 5, "--device", "cpu")  # fmt: skip
    status, out, err = run(capsys, *args, "--json")
    assert status == 0, err
    for path, found in json.loads(out).items():
        assert found["tasks"]["sounds"]["acc,none"] == pytest.approx(accuracy(path, DOCS[:5]))
    status, out, _ = run(capsys, *args)
    assert status == 0
    assert "sounds: acc,none" in out


@pytest.mark.parametrize(("args", "match"), [
    ((), "give --tasks or --texts"), (("--acceptance",), "--acceptance: .*--texts"),
    (("--limit", "5", "--texts", "{texts}"), "--limit.*--tasks"),
    (("--texts", "{texts}", "--block", "1000"), "block: expected at most"),
])  # fmt: skip
def test_commands_that_cannot_be(args, match, place, capsys):
    import re

    status, _, err = run(capsys, place / "whole",
                         *(arg.format(texts=place / "0.txt") for arg in args))  # fmt: skip
    assert status == 2
    assert re.search(match, err)
