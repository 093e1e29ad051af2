"""Generating behind a shared prefix, against generating from whole rows."""

import numpy as np
import pytest
import torch
from pskv import PrefixScorer, StalePrefixError
from shared_kernels.testing.models import tiny_model
from transformers import GenerationConfig, LogitsProcessor

PREFIX = np.random.default_rng(1).integers(3, 90, 18).tolist()
SUFFIXES = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [5, 6, 8]]


def alone(model, suffix, **options):
    ids = torch.tensor([PREFIX + suffix], device=model.device)
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, ids.shape[1] :]


class Recorder(LogitsProcessor):
    """Keeps the logits of every step, which say more than the tokens they lead to."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(scores.cpu().clone())
        return scores


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    "family", ["llama", "mistral", "gemma2", "gemma3", "opt", "gpt2", "gpt_oss", "cohere2"]
)
def test_equals_rows_alone(family, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = tiny_model(family, max_position_embeddings=64).to(device)
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    scorer = PrefixScorer(model, backend="fused" if device == "cuda" else "split")
    before = model.config._attn_implementation
    with scorer.prefill(PREFIX) as prefix:
        sums = prefix.checksums()
        ours = Recorder()
        found = scorer.generate_many(prefix, SUFFIXES, logits_processor=[ours], **options)
        assert all(torch.equal(a, b) for a, b in zip(prefix.checksums(), sums, strict=True))
    assert model.config._attn_implementation == before
    for row, (suffix, tokens) in enumerate(zip(SUFFIXES, found, strict=True)):
        theirs = Recorder()
        expected = alone(model, suffix, logits_processor=[theirs], **options)
        assert tokens.tolist() == expected[0].tolist()
        for a, b in zip(ours.seen, theirs.seen, strict=True):
            torch.testing.assert_close(a[row], b[0], rtol=0, atol=2e-5)


def test_beams_and_several_sequences():
    model = tiny_model("llama")
    scorer = PrefixScorer(model, backend="split")
    options = {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2, "do_sample": False,
               "pad_token_id": 0, "eos_token_id": None}  # fmt: skip
    found = scorer.generate_many(PREFIX, SUFFIXES, **options)
    assert len(found) == 8
    for number, suffix in enumerate(SUFFIXES):
        expected = alone(model, suffix, **options)
        assert torch.equal(torch.stack(found[2 * number : 2 * number + 2]), expected)


def test_ends_are_cut_off():
    model = tiny_model("llama")
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    free = alone(model, SUFFIXES[0], eos_token_id=None, **options)[0].tolist()
    scorer = PrefixScorer(model, backend="split")
    config = GenerationConfig(eos_token_id=[free[4], 95], **options)
    found = scorer.generate_many(PREFIX, SUFFIXES, generation_config=config)
    assert found[0].tolist() == free[: free.index(free[4]) + 1]


def test_processors_see_the_prefix():
    model = tiny_model("llama")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None,
               "repetition_penalty": 5.0}  # fmt: skip
    found = PrefixScorer(model, backend="split").generate_many(PREFIX, SUFFIXES[:1], **options)
    assert found[0].tolist() == alone(model, SUFFIXES[0], **options)[0].tolist()


def test_sampling_repeats_when_memory_runs_out(monkeypatch):
    from pskv import generation as module

    model = tiny_model("llama")
    scorer = PrefixScorer(model, backend="split")
    options = {"max_new_tokens": 5, "do_sample": True, "pad_token_id": 0, "eos_token_id": None}
    right, sizes = module._batch, []

    def small(passes, shared, rows, *rest):
        sizes.append(len(rows))
        if len(rows) > 2:
            torch.rand(3)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(passes, shared, rows, *rest)

    monkeypatch.setattr(module, "_batch", small)
    torch.manual_seed(0)
    found = scorer.generate_many(PREFIX, SUFFIXES, **options)
    assert sizes == [4, 2, 2]
    monkeypatch.setattr(module, "_batch", right)
    torch.manual_seed(0)
    expected = scorer.generate_many(PREFIX, SUFFIXES[:2], **options)
    expected += scorer.generate_many(PREFIX, SUFFIXES[2:], **options)
    assert [row.tolist() for row in found] == [row.tolist() for row in expected]


def test_what_follows_a_row():
    model = tiny_model("llama")
    scorer = PrefixScorer(model, backend="split")
    with scorer.prefill(PREFIX) as prefix:
        found = scorer.next_token_logits(prefix, [*SUFFIXES, []])
    for suffix, logits in zip([*SUFFIXES, []], found, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([PREFIX + suffix])).logits[0, -1]
        torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)
    assert scorer.next_token_logits(scorer.prefill(PREFIX), []).shape == (0, 96)


def test_bad_input():
    scorer = PrefixScorer(tiny_model("llama"), backend="split")
    with pytest.raises(ValueError, match="past_key_values: expected none"):
        scorer.generate_many(PREFIX, SUFFIXES, past_key_values=object())
    with pytest.raises(ValueError, match="at least one token"):
        scorer.generate_many(PREFIX, [[]])
    prefix = scorer.prefill(PREFIX)
    prefix.close(erase=True)
    with pytest.raises(StalePrefixError):
        scorer.generate_many(prefix, SUFFIXES)
    embeds = scorer.model.get_input_embeddings()(torch.tensor(PREFIX)).detach()
    with pytest.raises(ValueError, match="generating needs its token ids"):
        scorer.generate_many(embeds, SUFFIXES)
