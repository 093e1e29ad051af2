"""The countdown posterior against the forward pass of a hidden Markov model."""

import numpy as np
import pytest
import torch
from forelen.smoothing import CountdownSmoother


def test_against_a_forward_pass():
    rng = np.random.default_rng(0)
    states, steps = 8, 5
    prior = rng.dirichlet(np.ones(states))
    seen = rng.dirichlet(np.ones(states), steps)
    smoother = CountdownSmoother(torch.tensor(prior)[None])
    # states are what remains, r = 1..8; a token moves r to r - 1, and r = 1 ends the answer
    move = np.zeros((states, states))
    for r in range(1, states):
        move[r, r - 1] = 1.0
    alpha = prior
    for likelihood in seen:
        alpha = (alpha @ move) * likelihood
        alpha = alpha / alpha.sum()
        found = smoother.update(torch.tensor(likelihood)[None])[0]
        np.testing.assert_allclose(found.numpy(), alpha, rtol=1e-12)


def test_several_tokens_at_once_and_the_end():
    prior = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    flat = torch.full_like(prior, 0.25)
    found = CountdownSmoother(prior).update(flat, tokens=2)
    torch.testing.assert_close(found[0], torch.tensor([3 / 7, 4 / 7, 0, 0]).double())
    # nothing is left: the prediction stands alone
    alone = torch.tensor([[0.5, 0.5, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(CountdownSmoother(prior).update(alone, tokens=9), alone)
    with pytest.raises(TypeError, match="prior"):
        CountdownSmoother(prior.float())
