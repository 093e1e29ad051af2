"""Calibration data as batches."""

import pytest
import torch
from slimmoe.calibration.data import hash_tokens, make_batches


class Words:
    """A tokenizer: a letter is a token."""

    eos_token_id = 0

    def __call__(self, text):
        return {"input_ids": [ord(c) - 96 for c in text]}


def batches(data, **options):
    return make_batches(data, **{"batch_tokens": 8, "sequence_length": 4} | options)


def rows(made):
    """The sequences, without padding."""
    found = []
    for batch in made:
        real = torch.ones_like(batch.input_ids) if batch.counted is None else batch.counted
        found += [
            row[keep.bool()].tolist() for row, keep in zip(batch.input_ids, real, strict=True)
        ]
    return found


def test_texts_are_packed_without_loss():
    made = batches(["abc", "de", "", "fghij"], tokenizer=Words())
    assert rows(made) == [[1, 2, 3, 0], [4, 5, 0, 6], [7, 8, 9, 10], [0]]
    assert sum(batch.tokens for batch in made) == 13
    assert made[0].attention_mask is None


def test_a_tokenizer_without_an_end():
    words = Words()
    words.eos_token_id = None
    assert rows(batches(["abc", "de"], tokenizer=words)) == [[1, 2, 3, 4], [5]]


@pytest.mark.parametrize("kind", [list, torch.tensor])
def test_sequences_are_padded_on_the_right(kind):
    made = batches([kind([1, 2]), kind([3, 4, 5]), kind([6])])
    assert [batch.input_ids.tolist() for batch in made] == [[[3, 4, 5], [1, 2, 0]], [[6]]]
    assert made[0].attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert made[0].counted.tolist() == [[True] * 3, [True, True, False]]
    assert [batch.tokens for batch in made] == [5, 1]
    assert made[1].attention_mask is None


def test_a_sequence_longer_than_a_batch_runs_alone():
    made = batches([[1] * 20, [2] * 3, [3] * 3])
    assert [tuple(batch.input_ids.shape) for batch in made] == [(1, 20), (2, 3)]


def test_a_tensor_of_sequences():
    ids = torch.arange(15).view(5, 3)
    made = batches(ids)
    assert rows(made) == ids.tolist()
    assert [len(batch.input_ids) for batch in made] == [2, 2, 1]
    assert rows(batches(iter(ids))) == ids.tolist()


def test_positions_count_from_the_first_token():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    made = batches([{"input_ids": torch.ones(2, 4, dtype=torch.int64), "attention_mask": mask}])
    inputs = made[0].inputs(torch.device("cpu"))
    assert inputs["position_ids"].tolist() == [[0, 0, 0, 1], [0, 1, 2, 2]]
    assert torch.equal(inputs["attention_mask"], mask)


def test_batches_with_masks():
    item = {
        "input_ids": [[1, 2, 3], [4, 5, 0]], "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "mask": [[0, 1, 1], [1, 1, 1]], "labels": None,
    }  # fmt: skip
    (made,) = batches([item])
    assert made.counted.tolist() == [[False, True, True], [True, True, False]]
    assert made.attention_mask.tolist() == item["attention_mask"]
    (made,) = batches([item], exclude=[2, 9])
    assert made.counted.tolist() == [[False, False, True], [True, True, False]]
    (made,) = batches([{"input_ids": [[1, 2]], "attention_mask": [[1, 1]]}])
    assert made.counted is made.attention_mask is None


def test_a_hash_ignores_padding_and_order():
    hashes = {
        hash_tokens(batches(data))
        for data in (
            [[1, 2], [3]],
            [[3], [1, 2]],
            [{"input_ids": [[9, 3], [1, 2]], "attention_mask": [[0, 1], [1, 1]]}],
        )
    }
    assert len(hashes) == 1
    assert len(hashes.pop()) == 64


@pytest.mark.parametrize(
    ("data", "error", "match"),
    [
        ([], ValueError, "empty"),
        (torch.zeros(0, 4, dtype=torch.int64), ValueError, "empty"),
        ("a text", TypeError, "put the text in a list"),
        (["text"], ValueError, "need a tokenizer"),
        ([[]], ValueError, r"data\[0\] is an empty sequence"),
        ([[1], [[2]]], TypeError, r"data\[1\]"),
        ([[0.5]], TypeError, r"data\[0\]"),
        ([{"ids": [[1]]}], ValueError, "ids"),
        ([{"input_ids": [[1]], "position_ids": [[0]]}], ValueError, "'position_ids'"),
        ([{"input_ids": [1]}], ValueError, r"\[B, T\]"),
        ([{"input_ids": [[1, 2]], "attention_mask": [[1]]}], ValueError, "match it"),
        (
            [{"input_ids": [[1], [2]], "attention_mask": [[1], [0]]}],
            ValueError,
            "sequence of padding only",
        ),
        ([{"input_ids": [[1, 2]], "mask": [[0, 0]]}], ValueError, "padding or excluded"),
    ],
)
def test_bad_data(data, error, match):
    with pytest.raises(error, match=match):
        batches(data)


def test_everything_excluded():
    with pytest.raises(ValueError, match="padding or excluded"):
        batches([[1, 2], [1]], exclude=[1, 2])
    assert sum(batch.tokens for batch in batches([[1, 2], [1]], exclude=[1])) == 1


def test_texts_mixed_with_ids():
    with pytest.raises(TypeError, match="mixed"):
        batches(["a", [1]], tokenizer=Words())
