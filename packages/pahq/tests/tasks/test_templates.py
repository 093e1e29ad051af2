"""The tasks of the field, on tokenizers of words."""

import sys
from pathlib import Path

import pytest
import torch
from pahq import tasks
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent))
from toy_tokenizers import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def texts(tokenizer, tokens):
    return [tokenizer.decode([token]) for token in tokens.reshape(-1).tolist() if token >= 0]


@pytest.mark.parametrize("name", tasks.NAMES)
def test_pairs_fit(tokenizer, name):
    task = tasks.make(name, tokenizer, 12, 3)
    assert len(task) == 12
    assert task.meta["name"] == name
    assert task.meta["seed"] == 3
    # all of one length, without padding
    assert (task.positions == task.clean.shape[1] - 1).all()
    assert not ((task.clean == tokenizer.pad_token_id) | (task.clean == tokenizer.unk_token_id)
                | (task.corrupted == tokenizer.unk_token_id)).any()  # fmt: skip
    assert (task.clean != task.corrupted).any(1).all()
    assert len(set(zip(task.meta["clean"], task.meta["corrupted"], strict=True))) == 12
    if name != "induction":
        for side in ("clean", "corrupted"):
            assert tokenizer(task.meta[side])["input_ids"] == getattr(task, side).tolist()
    assert task.fingerprint == tasks.make(name, tokenizer, 12, 3).fingerprint
    assert task.fingerprint != tasks.make(name, tokenizer, 12, 4).fingerprint
    begun = tasks.make(name, tokenizer, 12, 3, bos=True)
    assert (begun.clean[:, 0] == 1).all()
    assert (begun.corrupted[:, 0] == 1).all()
    assert torch.equal(begun.clean[:, 1:], task.clean)
    assert torch.equal(begun.answers, task.answers)
    with pytest.raises(ValueError, match="n: expected at least 1"):
        tasks.make(name, tokenizer, 0)


@pytest.mark.parametrize("name", ["greater_than", "gendered_pronoun", "sva", "capital_country"])
def test_pairs_differ_in_one_place(tokenizer, name):
    task = tasks.make(name, tokenizer, 12)
    places = (task.clean != task.corrupted).sum(1)
    # a year may differ in two digits
    assert places.max() <= (2 if name == "greater_than" else 1)


@pytest.mark.parametrize(("digits", "begins"), [(1, 1), (2, 2), (3, 3), (4, 4)])
def test_later_years(digits, begins):
    """Each token against all years that it can begin."""
    tokenizer = make_tokenizer(digits)
    task = tasks.greater_than(tokenizer, 40)
    # what is left of the year behind the prompt
    for row, text in enumerate(task.meta["clean"]):
        start = text.split()[7]
        assert task.meta["corrupted"][row] == text.replace(start, start[:2] + "01")
        shown = text.split("to the year ")[1]
        assert shown == ("" if digits > 2 else start[:2])
        years = [f"{last:02d}" if shown else f"{start[:2]}{last:02d}" for last in range(100)]
        right, wrong = (set(texts(tokenizer, side[row]))
                        for side in (task.answers, task.wrong_answers))  # fmt: skip
        for token in {year[:begins] for year in years}:
            later = {year > (start[2:] if shown else start) for year in years
                     if year.startswith(token)}  # fmt: skip
            assert (token in right) == (later == {True})
            assert (token in wrong) == (later == {False})
        assert {len(token) for token in right | wrong} == {begins}


def test_years_with_a_token_of_their_own():
    """As in GPT-2: they do not start, but may come, and so may those that are split otherwise."""
    tokenizer = make_tokenizer(2, apart=["1776", "173"])
    task = tasks.greater_than(tokenizer, 500)
    starts = [text.split()[7] for text in task.meta["clean"]]
    assert "1776" not in starts
    assert not any(start.startswith("173") for start in starts)
    assert "1676" in starts
    row = next(i for i, start in enumerate(starts) if start[:2] == "17" and start < "1730")
    later = texts(tokenizer, task.answers[row])
    assert {"76", "31", "39"} < set(later)
    assert len(later) == 99 - int(starts[row][2:])


def test_arguments_of_a_docstring(tokenizer):
    task = tasks.docstring(tokenizer, 20)
    for row, text in enumerate(task.meta["clean"]):
        defined, told = ([part.strip(" :,()") for part in words] for words in (
            text.split("(self,")[1].split(")")[0].split(),
            [line.split()[1] for line in text.splitlines() if ":param " in line],
        ))  # fmt: skip
        assert told == defined[2:4]
        (right,) = texts(tokenizer, task.answers[row])
        assert right == defined[4]
        other = task.meta["corrupted"][row]
        # nothing of the clean prompt's arguments is left, the words are
        assert not {*defined} & {*other.replace(",", " ").replace(")", " ").split()}
        assert other.splitlines()[1] == text.splitlines()[1]
        wrong = texts(tokenizer, task.wrong_answers[row])
        assert {*defined} - {right} < {*wrong}
        assert len(wrong) == 13
        assert right not in wrong
        assert len(text.splitlines()) == 6


def test_induction_heads_are_right(tokenizer):
    task = tasks.induction(tokenizer, 50, length=6)
    assert task.clean.shape == (50, 11)
    for ids, answers in ((task.clean, task.answers), (task.corrupted, task.wrong_answers)):
        for row, answer in zip(ids.tolist(), answers.tolist(), strict=True):
            assert row[row.index(row[-1]) + 1] == answer
            assert sorted(row[:5] + row[5:6]) == sorted({*row})
    assert torch.equal(task.clean[:, 6:], task.corrupted[:, 6:])
    assert torch.equal(task.clean[:, :6].sort(1).values, task.corrupted[:, :6].sort(1).values)
    assert torch.equal(task.clean[:, :5], task.clean[:, 6:])
    with pytest.raises(ValueError, match="length"):
        tasks.induction(tokenizer, 4, length=3)
    with pytest.raises(ValueError, match="tokenizer: expected 100000 words"):
        tasks.induction(tokenizer, 4, length=100_000)


def test_numbers_of_verbs(tokenizer):
    task = tasks.sva(tokenizer, 40)
    plural = [text.split()[1].endswith("s") for text in task.meta["clean"]]
    assert 10 < sum(plural) < 30
    for row, many in enumerate(plural):
        sets = [texts(tokenizer, side[row]) for side in (task.answers, task.wrong_answers)]
        assert sets == ([["are", "were", "have"], ["is", "was", "has"]] if many
                        else [["is", "was", "has"], ["are", "were", "have"]])  # fmt: skip
        assert task.meta["corrupted"][row].split()[1].endswith("s") != many
    # the other noun says nothing
    other = [text.split()[-1].endswith("s") for text in task.meta["clean"]]
    assert 0.2 < sum(a == b for a, b in zip(plural, other, strict=True)) / 40 < 0.8


def test_pronouns_and_capitals(tokenizer):
    task = tasks.gendered_pronoun(tokenizer, 30)
    assert {*texts(tokenizer, task.answers)} == {"she", "he"}
    names = tasks.gendered_pronoun.__globals__["NAMES"]
    for side, answers in (("clean", task.answers), ("corrupted", task.wrong_answers)):
        for text, pronoun in zip(task.meta[side], texts(tokenizer, answers), strict=True):
            assert text.split()[1] in names[f" {pronoun}"]
    task = tasks.capital_country(tokenizer, 30)
    capitals = tasks.capital_country.__globals__["CAPITALS"]
    for side, answers in (("clean", task.answers), ("corrupted", task.wrong_answers)):
        for text, capital in zip(task.meta[side], texts(tokenizer, answers), strict=True):
            assert capitals[text.split()[3]] == capital


def test_prompts_of_another_length_are_left_out(tokenizer):
    """Countries of two tokens go with such countries only, and capitals that begin alike do not."""
    apart = make_tokenizer()
    apart.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(a, b) for a, b in (
            ("France", "Peru Peru"), ("Japan", "Peru Iran"), ("Berlin", "Rome Rome"),
        )]
    )  # fmt: skip
    task = tasks.capital_country(apart, 300)
    assert len({len(apart(text)["input_ids"]) for text in task.meta["clean"]}) == 1
    for a, b in zip(task.meta["clean"], task.meta["corrupted"], strict=True):
        assert {a.split()[3], b.split()[3]} != {"Germany", "Italy"}
        assert (a.split()[3] in ("France", "Japan")) == (b.split()[3] in ("France", "Japan"))


def test_tokenizers_that_cannot():
    made = Tokenizer(
        models.BPE({s: i for i, s in enumerate(pre_tokenizers.ByteLevel.alphabet())}, [])
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = PreTrainedTokenizerFast(tokenizer_object=made)
    for name, what in (("ioi", "names"), ("docstring", "words"), ("gendered_pronoun", "names")):
        with pytest.raises(ValueError, match=f"single tokens for {what}.*from_pairs"):
            tasks.make(name, letters, 2)
    # nouns of any number of tokens do for years
    assert len(tasks.greater_than(letters, 2)) == 2
    with pytest.raises(ValueError, match=r"at most 0 pairs of sva.* got 2\d and 2\d in example 0"):
        tasks.sva(letters, 2)
    joined = make_tokenizer()
    joined.backend_tokenizer.pre_tokenizer = None
    with pytest.raises(ValueError, match="one that splits years"):
        tasks.greater_than(joined, 2)


def test_more_pairs_than_there_are(tokenizer):
    with pytest.raises(ValueError, match=r"n: expected at most 1\d\d\d pairs of capital_country"):
        tasks.capital_country(tokenizer, 2000)
    blind = make_tokenizer(end="</s>")
    with pytest.raises(ValueError, match=r"at most 0 pairs of sva.*refused, for one: tokenizer: "):
        tasks.sva(blind, 2)


def test_names():
    assert set(tasks.NAMES) <= set(tasks.__all__)
    assert all(line and "\n" not in line for line in tasks.NAMES.values())
    with pytest.raises(ValueError, match="name: expected one of ioi, greater_than"):
        tasks.make("addition", None)
