"""Lengths for samplers: what a stream says, whoever sits in which lane."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forelen import (
    FingerprintError,
    LengthPredictor,
    LengthPredictorConfig,
    SampledLengths,
    UnsupportedModelError,
)
from forelen.fingerprint import model_fingerprint
from forelen.streaming import StepFeatures
from shared_kernels.testing.models import tiny_model


def predictor_for(model, **options):
    torch.manual_seed(0)
    settings = {"plp": True, "fingerprint": model_fingerprint(model)} | options
    predictor = LengthPredictor(LengthPredictorConfig(hidden_size=32, **settings)).eval()
    if predictor.two_heads:
        torch.nn.init.normal_(predictor.step_out.weight, std=0.3)
    predictor.input_scale.uniform_(0.5, 2.0)
    predictor.input_mean.normal_()
    return predictor


def asked(model, ids, count):
    """What a sampler tells of a prompt."""
    with torch.no_grad():
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
    return SimpleNamespace(ids=ids, hidden=states[-1], states=states, samples=range(count))


PROMPTS = [[5, 9, 17, 30, 22], [44, 61, 70]]


@pytest.mark.parametrize(
    "options",
    [{}, {"pooling": "last"}, {"pooling": "entropy+last"}, {"plp": False, "head": "linear"},
     {"content_only": True, "span": {"before": [5], "after": []}}],
)  # fmt: skip
@pytest.mark.parametrize("level", [None, 0.9])
@pytest.mark.filterwarnings("ignore:1 of 1 prompts are not framed")
def test_the_first_prediction_is_the_predictors(llama, options, level):
    predictor = predictor_for(llama, **options)
    lengths = SampledLengths(predictor, llama, level=level)
    assert lengths.wants_states == (options.get("pooling") != "last")
    found = lengths.initial([asked(llama, PROMPTS[0], 3), asked(llama, PROMPTS[1], 2)])
    for ids, values, count in zip(PROMPTS, found, (3, 2), strict=True):
        law = predictor.predict(llama, torch.tensor([ids]))
        expected = law.mean() if level is None else law.quantile(0.9)
        np.testing.assert_allclose(values, expected.expand(count).numpy(), rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"head": "paper"}, {"plp": False}])
def test_growing_answers_are_those_of_a_stream(llama, options):
    """Answers that come, pause and change lanes, against each alone in a batch of its own."""
    generator = torch.Generator().manual_seed(1)
    predictor = predictor_for(llama, **options)
    lengths = SampledLengths(predictor, llama, level=None)
    lengths.eos = [2, 3]
    lengths.initial([asked(llama, ids, 3) for ids in PROMPTS])
    owners, lanes = [1, 0, 0, 1, 1, 0], 4
    places = set()
    for _ in range(2):
        lengths.begin(owners, torch.zeros(lanes, 32))
        kept = (*lengths._state, lengths._features, lengths._counts)
        places.add(tuple(tensor.data_ptr() for tensor in kept))
        seen = {row: [] for row in range(6)}
        for _ in range(13):
            # the last answer never runs
            rows = torch.randperm(5, generator=generator)[:lanes]
            rows[torch.rand(lanes, generator=generator) < 0.3] = 6
            hidden = torch.randn(lanes, 32, generator=generator)
            logits = 3 * torch.randn(lanes, 96, generator=generator)
            logits[rows == 6] = float("nan")
            lengths.update(rows, hidden, logits)
            for lane, row in enumerate(rows.tolist()):
                if row < 6:
                    seen[row].append((hidden[lane], logits[lane]))
        assert len({len(tokens) for tokens in seen.values()}) > 2
        law, told = lengths.law(), lengths.remaining()
        first = predictor.folded(torch.device("cpu")).output(lengths._prompt)
        for row, tokens in seen.items():
            owner = owners[row]
            if not tokens:
                torch.testing.assert_close(law.pmf[row].float(), first[owner])
                continue
            steps = StepFeatures(1, 32, eos=[2, 3], stops=[2, 3], device=torch.device("cpu"))
            for state, score in tokens:
                steps.update(torch.tensor([9]), state[None], score[None])
            if predictor.config.plp:
                torch.testing.assert_close(
                    lengths._features[row], steps.features[0], rtol=0, atol=2e-5
                )
                before_it = lengths.reader.features(
                    {-1: asked(llama, PROMPTS[owner], 1).states[None]}, [lengths.spec],
                    torch.ones(1, len(PROMPTS[owner])), None,
                )[lengths.spec.key]  # fmt: skip
                logits = predictor(before_it, steps.features, steps.counts).logits
                expected = logits.double().softmax(-1)[0]
            else:
                left = predictor.bins.remaining(first[owner : owner + 1], steps.counts)
                expected = left.double()[0]
            torch.testing.assert_close(law.pmf[row], expected, rtol=0, atol=1e-5)
        np.testing.assert_allclose(told, law.mean().numpy())
        assert (told >= 1).all()
    # the second time found the buffers of the first
    assert len(places) == 1


def test_an_answer_that_is_not_finite_harms_no_other(llama):
    lengths = SampledLengths(predictor_for(llama), llama)
    lengths.initial([asked(llama, PROMPTS[0], 3)])
    lengths.begin([0, 0, 0], torch.zeros(2, 32))
    good = torch.randn(2, 32), torch.randn(2, 96)
    lengths.update(torch.tensor([0, 1]), *good)
    told = lengths.remaining()
    lengths.update(torch.tensor([2, 3]), torch.full((2, 32), float("nan")), good[1] / 0)
    after = lengths.remaining()
    np.testing.assert_array_equal(after[:2], told[:2])
    assert np.isfinite(after).all()
    # the lengths of training, for what says nothing
    assert lengths.law().fallback.tolist() == [False, False, True]


def test_a_prompt_that_is_not_finite_gets_the_lengths_of_training(llama):
    lengths = SampledLengths(predictor_for(llama), llama)
    bad = asked(llama, PROMPTS[1], 2)
    bad.states = bad.states * float("nan")
    told = lengths.initial([asked(llama, PROMPTS[0], 1), bad])
    assert np.isfinite(np.concatenate(told)).all()
    lengths.begin([0, 1, 1], torch.zeros(2, 32))
    lengths.update(torch.tensor([0, 1]), torch.randn(2, 32), torch.randn(2, 96))
    assert lengths.law().fallback.tolist() == [False, True, True]


def test_what_does_not_fit(llama):
    with pytest.raises(UnsupportedModelError, match=r"reads the last layer .* got layer 2"):
        SampledLengths(predictor_for(llama, layer=2), llama)
    with pytest.raises(FingerprintError, match="architecture"):
        SampledLengths(predictor_for(tiny_model("gpt2")), llama)
    with pytest.raises(ValueError, match="level: expected a number in"):
        SampledLengths(predictor_for(llama), llama, level=1.0)
    with pytest.raises(ValueError, match="probe_tokens"):
        SampledLengths(predictor_for(llama), llama, probe_tokens=-1)
    prompt = asked(llama, PROMPTS[0], 1)
    prompt.states = None
    with pytest.raises(ValueError, match="states: expected the states of 5 tokens"):
        SampledLengths(predictor_for(llama), llama).initial([prompt])
