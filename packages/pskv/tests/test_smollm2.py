"""A real model and its tokenizer: texts, chats, and candidates that survive being typed."""

import warnings

import pytest
import torch
from pskv import PrefixScorer, RoundTripFilter
from pskv.errors import RetokenizationWarning
from tenfold.assets import smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(smollm2())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval()


def test_a_chat_is_answered_by_the_right_city(model, tokenizer):
    scorer = PrefixScorer(model, tokenizer, backend="split")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    answers = ["The capital of France is Paris.", "The capital of France is Rome.",
               "The capital of France is Oslo."]  # fmt: skip
    out = scorer.score(chat, answers)
    assert out.logprobs.argmax() == 0
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    for answer, found in zip(answers, out.logprobs.tolist(), strict=True):
        row = ids + tokenizer(answer, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([row]), use_cache=False).logits[0].double()
        places = torch.arange(len(ids), len(row))
        expected = logits.log_softmax(-1)[places - 1, torch.tensor(row[len(ids) :])].sum()
        assert found == pytest.approx(float(expected), abs=1e-4)
    assert out.stats["tokens"] < sum(len(tokenizer(answer)["input_ids"]) for answer in answers)


def test_texts_that_merge_with_the_prefix_are_named(model, tokenizer):
    scorer = PrefixScorer(model, tokenizer, backend="split")
    with pytest.warns(RetokenizationWarning, match="'ris' is cut into other tokens"):
        scorer.score("The capital of France is Pa", [" Paris", "ris"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scorer.score("The capital of France is", [" Paris", " Lyon"], targets=".")


def test_candidates_that_survive_being_typed(tokenizer):
    before = tokenizer("Repeat:")["input_ids"]
    after = tokenizer(" please", add_special_tokens=False)["input_ids"]
    keep = RoundTripFilter(tokenizer, before, after)
    good = tokenizer(" the kettle is", add_special_tokens=False)["input_ids"]
    letters = tokenizer.convert_tokens_to_ids(list("ther"))
    assert len(good) == 3
    ids = torch.tensor([good, letters[:3]])
    assert keep(ids).tolist() == [True, False]
    assert keep(ids[:0]).tolist() == []
    with pytest.raises(ValueError, match="before: expected token ids that decoding"):
        RoundTripFilter(tokenizer, letters[:3], after)


def test_a_candidate_that_merges_with_what_stands_around_it_does_not_survive(tokenizer):
    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    for before, candidate, after, kept in (
        ("Say:", " pl", "", True),
        ("Say:", " pl", "ease", False),
        ("Say", "portant", "", True),
        ("Say im", "portant", "", False),
    ):
        keep = RoundTripFilter(tokenizer, encode(before), encode(after))
        assert keep(torch.tensor([encode(candidate)])).tolist() == [kept]
