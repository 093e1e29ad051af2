"""The gradient with respect to the choice of tokens, against autograd of the whole model."""

import numpy as np
import pytest
import torch
from pskv import PrefixScorer, StalePrefixError
from shared_kernels.testing.models import tiny_model

PREFIX, SUFFIX, TAIL, TARGET = [5, 9, 4, 7, 30], [11, 12, 13, 14], [20, 21], [40, 41, 42]


def whole(model, weights):
    """Loss of the uncached model when suffix tokens are mixtures ``(s, V)`` of embeddings."""
    embed = model.get_input_embeddings()
    table = embed(torch.arange(96))
    fixed = [embed(torch.tensor(part)) for part in (PREFIX, TAIL, TARGET[:-1])]
    embeds = torch.cat([fixed[0], weights @ table, *fixed[1:]])[None]
    logits = model(inputs_embeds=embeds, use_cache=False).logits[0, -3:]
    return -logits.double().log_softmax(-1)[torch.arange(3), torch.tensor(TARGET)].sum()


def one_hot(dtype):
    weights = torch.zeros(len(SUFFIX), 96, dtype=dtype)
    weights[torch.arange(len(SUFFIX)), torch.tensor(SUFFIX)] = 1
    return weights


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "opt", "mixtral", "gpt_oss"])
def test_equals_autograd_of_the_uncached_model(family):
    model = tiny_model(family)
    scorer = PrefixScorer(model, backend="split")
    with scorer.prefill(PREFIX) as prefix:
        before = prefix.checksums()
        for _ in range(3):
            found = scorer.token_gradient(prefix, SUFFIX, TAIL, TARGET)
        assert all(torch.equal(a, b) for a, b in zip(prefix.checksums(), before, strict=True))
    weights = one_hot(torch.float32).requires_grad_()
    (expected,) = torch.autograd.grad(whole(model, weights), weights)
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * scale)
    assert all(p.grad is None for p in model.parameters())


def test_finite_differences():
    model = tiny_model("gpt2", dtype=torch.float64)
    scorer = PrefixScorer(model, backend="split")
    found = scorer.token_gradient(scorer.prefill(PREFIX), SUFFIX, TAIL, TARGET)
    step = 1e-4
    for place, token in ((0, 3), (3, 77), (2, 13)):
        losses = []
        for sign in (1, -1):
            weights = one_hot(torch.float64)
            weights[place, token] += sign * step
            with torch.no_grad():
                losses.append(float(whole(model, weights)))
        slope = (losses[0] - losses[1]) / (2 * step)
        assert float(found[place, token]) == pytest.approx(slope, rel=1e-5, abs=1e-7)


def test_other_objectives():
    scorer = PrefixScorer(tiny_model("llama"), backend="split")
    prefix = scorer.prefill(PREFIX)
    nll = scorer.token_gradient(prefix, SUFFIX, TAIL, TARGET)

    def mean(logits, targets):
        return torch.nn.functional.cross_entropy(logits, targets)

    found = scorer.token_gradient(prefix, SUFFIX, TAIL, TARGET, objective=mean)
    torch.testing.assert_close(found * 3, nll, rtol=1e-4, atol=1e-6)


def test_bad_input():
    model = tiny_model("llama")
    scorer = PrefixScorer(model, backend="split")
    prefix = scorer.prefill(PREFIX)
    with pytest.raises(ValueError, match="suffix_ids: expected at least one"):
        scorer.token_gradient(prefix, [], TAIL, TARGET)
    with pytest.raises(ValueError, match="target_ids: expected at least one"):
        scorer.token_gradient(prefix, SUFFIX, TAIL, [])
    with pytest.raises(ValueError, match="got int 96"):
        scorer.token_gradient(prefix, [96], TAIL, TARGET)
    with pytest.raises(ValueError, match="objective: expected"):
        scorer.token_gradient(prefix, SUFFIX, TAIL, TARGET, objective="loss")
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    with pytest.raises(StalePrefixError):
        scorer.token_gradient(prefix, np.array(SUFFIX), TAIL, TARGET)
