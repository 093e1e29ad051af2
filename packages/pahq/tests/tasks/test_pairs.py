"""Sets of answers, tasks of texts and of tokens, and what is refused."""

import sys
from pathlib import Path

import pytest
import torch
from pahq import Task
from pahq.tasks import from_ids, from_pairs

sys.path.insert(0, str(Path(__file__).parent))
from toy_tokenizers import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


FRANCE, JAPAN = "The capital of France is the city of", "The capital of Japan is the city of"
ONE, MANY = "The keys near the door", "The key near the door"


def texts(tokenizer, tokens):
    return [tokenizer.decode([token]) for token in tokens.tolist() if token >= 0]


def test_several_answers(tokenizer):
    task = from_pairs(tokenizer, [ONE, MANY], [MANY, ONE], [(" are", " were"), " is"],
                      [[" is", tokenizer.convert_tokens_to_ids("has")], [" have"]])  # fmt: skip
    assert task.answers.shape == (2, 2)
    assert [texts(tokenizer, row) for row in task.answers] == [["are", "were"], ["is"]]
    assert [texts(tokenizer, row) for row in task.wrong_answers] == [["is", "has"], ["have"]]
    assert task.answers[1, 1] == task.wrong_answers[1, 1] == -1
    single = from_pairs(tokenizer, [ONE, MANY], [MANY, ONE], [" are", " is"], [" is", " are"])
    assert single.answers.shape == single.wrong_answers.shape == (2,)
    assert task.fingerprint != single.fingerprint
    # with one digit a token, 32 and 33 begin alike
    year = "The siege went on from the year 1732 to the year 17"
    merged = from_pairs(tokenizer, [year], [year.replace("32", "01")], [["40", "41", "51"]])
    assert texts(tokenizer, merged.answers[0]) == ["4", "5"]


def test_some_of_the_pairs_have_their_texts(tokenizer):
    task = from_pairs(tokenizer, [ONE, FRANCE], [MANY, JAPAN], [" are", " Paris"])
    assert task.positions.tolist() == [4, 7]
    some = task.select([1])
    assert some.meta["clean"] == [FRANCE]
    assert some.meta["corrupted"] == [JAPAN]
    assert torch.equal(some.clean[0], task.clean[1])
    assert task.meta["clean"] == [ONE, FRANCE]


def test_tokens():
    task = from_ids([[5, 6, 7], [8, 9]], [[5, 4, 7], [8, 6]], [10, [11, 12]], [12, 13], pad=3)
    assert task.clean.tolist() == [[5, 6, 7], [8, 9, 3]]
    assert task.corrupted.tolist() == [[5, 4, 7], [8, 6, 3]]
    assert task.positions.tolist() == [2, 1]
    assert task.answers.tolist() == [[10, -1], [11, 12]]
    assert task.wrong_answers.tolist() == [12, 13]
    tensor = from_ids([[5, 6, 7]], [[5, 4, 7]], torch.tensor([[10, -1]]), torch.tensor([9]))
    assert tensor.answers.tolist() == [[10, -1]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_either_side_is_taken_off(tokenizer, side):
    wanted = from_pairs(tokenizer, [ONE, FRANCE], [MANY, JAPAN], [" are", " Paris"])
    tokenizer.padding_side = side
    batches = [tokenizer(lines, padding=True) for lines in ([ONE, FRANCE], [MANY, JAPAN])]
    tokenizer.padding_side = "right"
    assert 0 in batches[0]["attention_mask"][0]
    found = from_ids(*batches, wanted.answers)
    assert found.fingerprint == wanted.fingerprint
    batches[1]["attention_mask"][0] = [1] * len(batches[1]["input_ids"][0])
    with pytest.raises(ValueError, match=r"as many tokens .* got 8 and 5 in example 0"):
        from_ids(*batches, wanted.answers)


def test_what_prompts_begin_with():
    bare, begun = make_tokenizer(), make_tokenizer(begin="<s>")
    pair = [FRANCE], [JAPAN], [" Paris"], [" Tokyo"]
    first = lambda tokenizer, **options: from_pairs(tokenizer, *pair, **options).clean[0, :2]  # noqa: E731
    the = bare.convert_tokens_to_ids("The")
    for tokenizer in (bare, begun):
        assert first(tokenizer, bos=True).tolist() == [1, the]
        assert first(tokenizer, bos=False)[0] == the
    assert first(bare)[0] == the
    assert first(begun).tolist() == [1, the]
    both = from_pairs(bare, *pair, bos=True)
    assert both.positions.tolist() == [8]
    assert both.corrupted[0, 0] == 1
    assert torch.equal(both.answers, from_pairs(bare, *pair).answers)

    with pytest.raises(ValueError, match=r"corrupted: .* without the BOS token 1.* in example 1"):
        from_ids([[5, 6], [7, 8]], [[5, 7], [1, 8]], [9, 9], bos=1)
    with pytest.raises(ValueError, match=r"clean: .* with the BOS token 1.*token 7 in example 1"):
        from_ids([[1, 6], [7, 8]], [[1, 7], [7, 9]], [9, 9], bos=1)
    with pytest.raises(ValueError, match=r"one BOS token 1, got str 'two in example 0'.*bos=False"):
        from_pairs(begun, ["<s>" + FRANCE], ["<s>" + JAPAN], [" Paris"])
    with pytest.raises(ValueError, match=r"puts nothing behind a text.* give bos="):
        from_pairs(make_tokenizer(end="</s>"), *pair)
    assert first(make_tokenizer(end="</s>"), bos=False)[0] == the
    nameless = make_tokenizer()
    nameless.bos_token = None
    with pytest.raises(ValueError, match="bos: expected False or None"):
        from_pairs(nameless, *pair, bos=True)
    assert first(nameless)[0] == the


def test_answers_that_do_not_differ(tokenizer):
    year = "The siege went on from the year 1732 to the year 17"
    pairs = [ONE, year], [MANY, year.replace("32", "01")]
    with pytest.raises(
        ValueError,
        match=r"'39' and '32', which begin with the same token '3', in example 1 \('The siege.*"
        "beginning that they share into the prompt",
    ):
        from_pairs(tokenizer, *pairs, [" are", "32"], [" is", ["01", "39"]])
    with pytest.raises(ValueError, match="other tokens than the answers"):
        from_pairs(tokenizer, [ONE], [MANY], [" are"], [" are"])
    with pytest.raises(ValueError, match=r"answers: expected one at least behind 'The keys"):
        from_pairs(tokenizer, [ONE], [MANY], [[]], [" are"])


def whole(**changes):
    ids = torch.arange(6).view(2, 3)
    parts = {
        "clean": ids,
        "corrupted": ids + 1,
        "positions": torch.tensor([2, 2]),
        "answers": torch.tensor([7, 8]),
        "wrong_answers": torch.tensor([[9, -1], [7, 5]]),
    }
    return Task(**parts | changes)  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "match"), [
    ({"clean": torch.zeros(0, 3).long()}, ValueError, "clean: .* at least one pair"),
    ({"corrupted": torch.zeros(2, 4).long()}, ValueError, r"corrupted: expected shape \(2, 3\)"),
    ({"positions": torch.tensor([2])}, ValueError, r"positions: expected shape \(2,\)"),
    ({"positions": torch.tensor([[2], [2]])}, ValueError, r"positions: expected shape \(2,\)"),
    ({"positions": torch.tensor([2, 3])}, ValueError, "positions below 3, got str '3 in example 1"),
    ({"positions": torch.tensor([-1, 2])}, ValueError, "got str '-1 in example 0"),
    ({"answers": torch.tensor([7])}, ValueError, r"answers: expected shape \(2,\)"),
    ({"answers": torch.zeros(2, 1, 1).long()}, ValueError, r"answers: expected shape \(2,\)"),
    ({"answers": torch.tensor([7.0, 8.0])}, TypeError, "answers: expected int64"),
    ({"clean": torch.zeros(2, 3)}, TypeError, "clean: expected int64"),
    ({"answers": torch.tensor([[7, 3], [-1, -1]])}, ValueError, "answers: .*none in example 1"),
    ({"wrong_answers": torch.tensor([-1, 3])}, ValueError, "wrong_answers: .*none in example 0"),
    ({"answers": torch.tensor([[7, 3], [4, 4]])}, ValueError, r"once .*\[4, 4\] in example 1"),
    ({"answers": torch.tensor([[7, 2], [4, 5]])}, ValueError, "same token 5 in example 1"),
])  # fmt: skip
def test_bad_tasks(changes, error, match):
    with pytest.raises(error, match=match):
        whole(**changes)


def test_fillers_are_no_answers():
    """Both sets have fillers, which are not alike, nor one twice."""
    task = whole(answers=torch.tensor([[7, -1, -1], [8, 4, -1]]))
    assert len(task) == 2


def test_bad_input(tokenizer):
    with pytest.raises(ValueError, match="corrupted: expected 2 prompts, got int 1"):
        from_ids([[5], [6]], [[5]], [7, 7])
    with pytest.raises(ValueError, match="no token in example 0"):
        from_ids([[]], [[]], [7])
    with pytest.raises(ValueError, match="got 2 and 1 in example 1"):
        from_ids([[5], [6]], [[5], [6, 7]], [7, 7])
    with pytest.raises(ValueError, match="at least one pair"):
        from_ids([], [], [])
