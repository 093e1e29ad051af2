"""The choice between ways to hold a prefix."""

import numpy as np
import pytest
import torch
from pskv import PrefixScorer
from pskv.backends import AutoBackend
from shared_kernels.testing.models import tiny_model

COSTS = {"split": 3.0, "replicate": 2.0, "layerwise": 5.0, "none": 1.0}


def settle(auto, costs, calls, **options):
    chosen = []
    for _ in range(calls):
        backend, done = auto.choose(8, 16, 45, 1024, **options)
        chosen.append(backend)
        if done is not None:
            done(costs[backend] * (1 if chosen.count(backend) > 1 else 100))
    return chosen


def test_the_fastest_goes_on_after_a_few_calls_of_each():
    auto = AutoBackend(torch.device("cpu"), deterministic=False)
    chosen = settle(auto, COSTS, 30, plain=True)
    assert set(chosen[:20]) == set(COSTS)
    assert set(chosen[20:]) == {"none"}
    # rows that are not token ids cannot be passed again
    assert set(settle(auto, COSTS, 30, plain=False)[15:]) == {"replicate"}


def test_what_may_not_be_tried():
    auto = AutoBackend(torch.device("cpu"), deterministic=True)
    assert set(settle(auto, COSTS, 5, plain=True)) == {"split"}
    auto = AutoBackend(torch.device("cpu"), deterministic=False)
    long = {auto.choose(8, 4096, 45, 1 << 20, plain=True)[0] for _ in range(3)}
    assert long == {"split"}


def test_all_that_are_tried_agree():
    scorer = PrefixScorer(tiny_model("llama"), backend="auto")
    rows = np.random.default_rng(0).integers(3, 90, (6, 12))
    with scorer.prefill([5, 6, 7, 8]) as prefix:
        outputs = [scorer.score(prefix, rows) for _ in range(24)]
    assert {output.stats["backend"] for output in outputs} == set(COSTS)
    for output in outputs:
        torch.testing.assert_close(output.logprobs, outputs[0].logprobs, rtol=0, atol=1e-4)
    assert len({output.stats["backend"] for output in outputs[20:]}) == 1


def test_embeddings_are_not_passed_again():
    model = tiny_model("llama")
    scorer = PrefixScorer(model, backend="none")
    embeds = model.get_input_embeddings()(torch.arange(5, 12)[None]).detach()
    with pytest.raises(ValueError, match="'none' needs token ids"):
        scorer.score_embeds([5, 6], embeds, torch.tensor([7]))
