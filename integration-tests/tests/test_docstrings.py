"""The documents of the private training task: real, apart, and the same on every run."""

import itertools

import pytest
import torch
from tenfold import assets
from tenfold.tasks import docstrings


@pytest.fixture(scope="module")
def documents():
    return docstrings.load()


def test_documents_are_many_different_and_apart(documents):
    training, held = documents
    assert len(training) > 3000
    assert 0.05 < len(held) / len(training) < 0.2
    assert len({*training, *held}) == len(training) + len(held)
    assert all(len(text.encode()) >= docstrings.LEAST for text in held)
    some = docstrings.load(files=20)
    assert docstrings.load(files=20) == some
    assert set(some[0]) < set(training)
    assert set(some[1]) < set(held)


def test_their_order_is_not_that_of_an_alphabet(documents):
    _, held = documents
    rising = sum(a < b for a, b in itertools.pairwise(held))
    assert 0.4 < rising / len(held) < 0.6


def test_documents_are_encoded_between_marks_and_filled_up():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets.smollm2())
    rows = docstrings.encode(["Return the sum of two.", "Stop. " * 40], tokenizer, 12)
    assert [len(row) for row in rows] == [8, 12]
    assert rows[0][0] == tokenizer.bos_token_id
    assert rows[0][-1] == tokenizer.eos_token_id
    assert tokenizer.decode(rows[0][1:-1]) == "Return the sum of two."
    batch = docstrings.batch(rows)
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 12)
    assert batch["labels"][0, 8:].eq(-100).all()
    real = batch["labels"] != -100
    assert torch.equal(batch["input_ids"][real], batch["labels"][real])
    assert docstrings.batch([])["input_ids"].shape == (0, 1)
