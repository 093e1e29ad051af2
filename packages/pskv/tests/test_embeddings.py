"""Rows given as embeddings, against the same rows as token ids."""

import numpy as np
import pytest
import torch
from pskv import PrefixScorer
from pskv.embeddings import number_vectors
from shared_kernels.testing.models import tiny_model

PREFIX, TARGET = [5, 9, 4, 7, 30, 8, 2], [40, 41, 42]


def candidates(count=12, suffix=9):
    generator = np.random.default_rng(0)
    rows = np.tile(generator.integers(3, 90, suffix), (count, 1))
    rows[np.arange(count), np.arange(count) % suffix] = 90 + np.arange(count) % 6
    return torch.from_numpy(rows)


@pytest.mark.parametrize(
    "backend", ["split", "replicate", pytest.param("fused", marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_equals_token_ids(family, backend):
    if backend == "fused" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = tiny_model(family).to("cuda" if backend == "fused" else "cpu")
    scorer = PrefixScorer(model, backend=backend)
    embed = model.get_input_embeddings()
    rows = candidates()
    whole = torch.cat([rows, torch.tensor(TARGET).expand(len(rows), -1)], 1)
    with torch.no_grad():
        embeds, before = (embed(ids.to(model.device)) for ids in (whole, torch.tensor(PREFIX)))
    expected = scorer.score(PREFIX, rows, targets=TARGET)
    with scorer.prefill(before) as prefix:
        assert prefix.length == len(PREFIX) and prefix.ids is None
        found = scorer.score_embeds(prefix, embeds, torch.tensor(TARGET))
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=0, atol=2e-5)
    assert torch.equal(found.is_greedy, expected.is_greedy)
    # what rows share is found in their vectors
    assert found.stats["tokens"] == expected.stats["tokens"]
    each = torch.tensor(TARGET).expand(len(rows), -1)
    again = scorer.score_embeds(before, embeds, each, reduction="mean")
    torch.testing.assert_close(again.logprobs * 3, expected.logprobs, rtol=0, atol=2e-5)


def test_vectors_that_are_in_no_vocabulary():
    model = tiny_model("llama")
    scorer = PrefixScorer(model, backend="split")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        before = model.model.embed_tokens(torch.tensor(PREFIX))
        soft = torch.randn(4, 6, before.shape[1], generator=generator) * before.std()
        soft[1, :3] = soft[0, :3]
        logits = model(inputs_embeds=torch.cat([before.expand(4, -1, -1), soft], 1)).logits
    expected = logits[:, -4:-1].double().log_softmax(-1)[:, range(3), TARGET].sum(1)
    found = scorer.score_embeds(before, soft, torch.tensor(TARGET))
    torch.testing.assert_close(found.logprobs.double(), expected, rtol=0, atol=3e-5)


def test_logits_of_targets():
    model = tiny_model("llama")
    scorer = PrefixScorer(model, backend="split")
    out = scorer.score(PREFIX, [[11, 12]], targets=TARGET)
    row = torch.tensor([[*PREFIX, 11, 12, *TARGET]])
    with torch.no_grad():
        logits = model(row).logits[0, -4:-1]
    expected = logits[range(3), TARGET]
    torch.testing.assert_close(
        out.token_logprobs[0] + out.token_lse[0], expected, rtol=0, atol=2e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_numbers(dtype):
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(7, 24, generator=generator).to(dtype)
    index = torch.randint(0, 7, (300,), generator=generator)
    number, distinct = number_vectors(table[index])
    assert len(distinct) == 7
    assert torch.equal(distinct[number], table[index])
    assert number_vectors(table[:0])[0].shape == (0,)


def test_a_hash_that_deceives_costs_sharing_only(monkeypatch):
    monkeypatch.setattr(
        torch, "randint", lambda low, high, shape, **options: torch.zeros(shape, dtype=torch.int64)
    )
    vectors = torch.randn(5, 4)
    number, distinct = number_vectors(vectors)
    assert torch.equal(distinct[number], vectors)


def test_the_gradient_from_embeddings():
    model = tiny_model("gemma3")
    scorer = PrefixScorer(model, backend="split")
    prefix = scorer.prefill(PREFIX)
    suffix, tail = [11, 12, 13], [20]
    expected = scorer.token_gradient(prefix, suffix, tail, TARGET)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(torch.tensor(suffix + tail + TARGET))
    found = scorer.embedding_gradient(prefix, embeds[:3], embeds[3:], torch.tensor(TARGET))
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="s >= 1 and r >= t >= 1, got 0, 4 and 3"):
        scorer.embedding_gradient(prefix, embeds[:0], embeds[3:], torch.tensor(TARGET))


@pytest.mark.parametrize(
    ("shape", "targets", "error", "match"),
    [
        ((2, 5, 16), [1] * 6, ValueError, "6 targets in rows of 5"),
        ((2, 5, 16), [], ValueError, "0 targets in rows of 5"),
        ((2, 5, 16), [96], ValueError, r"target_ids: expected token ids in \[0, 96\)"),
        ((2, 5, 15), [1], ValueError, "inputs_embeds"),
        ((2, 60, 16), [1], ValueError, "60 tokens after a prefix of 7"),
    ],
)
def test_bad_input(shape, targets, error, match):
    model = tiny_model("llama")
    width = model.config.hidden_size
    scorer = PrefixScorer(model, backend="split")
    shape = (*shape[:2], width if shape[2] == 16 else 15)
    with pytest.raises(error, match=match):
        scorer.score_embeds(PREFIX, torch.zeros(shape), torch.tensor(targets, dtype=torch.int64))


def test_another_dtype():
    scorer = PrefixScorer(tiny_model("llama"), backend="split")
    width = scorer.model.config.hidden_size
    with pytest.raises(TypeError, match="inputs_embeds"):
        scorer.score_embeds(
            PREFIX, torch.zeros(2, 5, width, dtype=torch.bfloat16), torch.tensor(TARGET)
        )
