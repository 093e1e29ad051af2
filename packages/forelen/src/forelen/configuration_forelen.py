"""Configuration of a length predictor."""

from __future__ import annotations

from typing import Any

from shared_kernels._checks import check_choice, check_range
from transformers import PreTrainedConfig

from forelen.binning import Bins
from forelen.calibration import Calibration
from forelen.pooling import FeatureSpec
from forelen.template import ChatSpan

HEADS = ("forelen", "paper", "linear")


class LengthPredictorConfig(PreTrainedConfig):
    """What a predictor reads, over which bins it predicts, and of which model it is.

    Args:
        hidden_size: d of the model that answers.
        bins: As `Bins.to_dict`; 64 of log1p up to 4096 tokens if left out.
        head: ``forelen``; ``paper`` (arXiv:2602.11812), with its loss and without scaling of what
            goes in; ``linear``, a layer without a hidden one.
        pooling: How the states of a prompt become one.
        layer: Of the states; -1 is the last, after its norm.
        entropy_shift: 0 weighs a state by the entropy of what it predicts, 1 by that of the
            distribution that predicted its token.
        content_only: Leave out the tokens of the chat template.
        plp: Predict again while the answer grows.
        plp_stride: Tokens between two predictions.
        inner_size: Width of the hidden layer; by default half of what goes in, and 128 at least
            unless the head is the paper's.
        dropout: Of hidden layers, and of what goes into the head of answers that have begun.
        weight: Of the cross-entropy in the loss; the squared term has the rest.
        fingerprint: Of the model that answers.
        sampling: How its answers were sampled.
        span: Tokens of its chat template, ``{"before": [...], "after": [...]}``.
        calibration: Calibrations for answers of an age on, ``{"0": Calibration.to_dict(), ..}``.
    """

    model_type = "forelen"

    def __init__(
        self,
        hidden_size: int = 576,
        bins: dict[str, Any] | None = None,
        head: str = "forelen",
        pooling: str = "entropy",
        layer: int = -1,
        entropy_shift: int = 0,
        content_only: bool = True,
        plp: bool = False,
        plp_stride: int = 1,
        inner_size: int | None = None,
        dropout: float = 0.1,
        weight: float = 0.95,
        fingerprint: dict[str, Any] | None = None,
        sampling: dict[str, Any] | None = None,
        span: dict[str, list[int]] | None = None,
        calibration: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        check_range("hidden_size", hidden_size, 1, 1 << 20, "that of the model")
        check_choice("head", head, HEADS)
        check_range("plp_stride", plp_stride, 1, 1 << 31, "1 predicts at every token")
        self.hidden_size = hidden_size
        self.bins = bins if bins is not None else Bins.log1p(64, 4096).to_dict()
        self.head, self.pooling, self.layer = head, pooling, layer
        self.entropy_shift, self.content_only = entropy_shift, content_only
        self.plp, self.plp_stride = plp, plp_stride
        self.inner_size, self.dropout, self.weight = inner_size, dropout, weight
        self.fingerprint, self.sampling = fingerprint or {}, sampling or {}
        self.span, self.calibration = span or {}, calibration or {}
        # refused now rather than when the first answer is predicted
        self.feature_spec()
        self.length_bins()
        self.length_calibration(0)
        super().__init__(**options)

    def feature_spec(self) -> FeatureSpec:
        """Return which vector of a prompt goes in."""
        return FeatureSpec(self.pooling, self.layer, self.content_only, self.entropy_shift)

    def chat_span(self) -> ChatSpan:
        """Return the chat template's tokens."""
        span = self.span
        return ChatSpan(tuple(span.get("before", ())), tuple(span.get("after", ())))

    def length_bins(self) -> Bins:
        """Return the bins."""
        return Bins.from_dict(self.bins)

    def length_calibration(self, age: int) -> Calibration | None:
        """Return the calibration for answers of so many tokens, if there is one."""
        parts = {int(name): found for name, found in self.calibration.items()}
        begins = [begin for begin in parts if begin <= age]
        return Calibration.from_dict(parts[max(begins)]) if begins else None
