"""A posterior over what remains, from one prediction after another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from shared_kernels._checks import check_tensor

if TYPE_CHECKING:
    from torch import Tensor


class CountdownSmoother:
    """Bayes' rule along an answer: every token that comes leaves one less.

    Before a prediction the posterior over ``R = 1, 2, ... X`` moves by the tokens that came, what
    would have ended being impossible; then it is multiplied with the prediction, taken as the
    likelihood of what the predictor saw (as TRAIL does, arXiv:2410.01035). Predictions of one
    answer are not independent, so the posterior is surer than it should be.

    Args:
        prior: float ``(N, X)``, of the lengths.
    """

    def __init__(self, prior: Tensor) -> None:
        check_tensor("prior", prior, dtypes=(torch.float64,), shape=(None, None), strided=True)
        self.posterior = prior / prior.sum(-1, keepdim=True)

    def update(self, predicted: Tensor, tokens: int = 1) -> Tensor:
        """Return the posterior ``(N, X)`` after ``tokens`` more and a prediction ``(N, X)``.

        Where the two exclude one another the prediction stands alone.
        """
        moved = torch.zeros_like(self.posterior)
        if tokens < moved.shape[1]:
            moved[:, : moved.shape[1] - tokens] = self.posterior[:, tokens:]
        joint = moved * predicted
        total = joint.sum(-1, keepdim=True)
        alone = predicted / predicted.sum(-1, keepdim=True)
        self.posterior = torch.where(total > 1e-300, joint / total.clamp(min=1e-300), alone)
        return self.posterior
