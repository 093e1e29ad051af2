"""The head that turns pooled hidden states into a distribution over lengths."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from shared_kernels._checks import check_range, check_tensor, message
from shared_kernels.ops.pool import StepHead
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import ModelOutput

from forelen.configuration_forelen import LengthPredictorConfig
from forelen.distribution import LengthDistribution
from forelen.fingerprint import check_model, check_sampling, sampling_of
from forelen.losses import forelen_loss, paper_loss
from forelen.reading import ModelReader, read_prompts
from forelen.streaming import LengthStream
from forelen.tap import tapped

if TYPE_CHECKING:
    from collections.abc import Generator

#: Beside a pooled state, of an answer that has begun: log1p of its tokens, the entropy now, its
#: moving average, and the log-probability of the end token.
STEP_FEATURES = 4
#: Width of the hidden layer at least, if nothing is said.
_INNER = 128
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class LengthPredictorOutput(ModelOutput):
    """What a predictor returns.

    Attributes:
        loss: Mean over the rows, if labels were given.
        logits: float32 ``(N, K)`` over the bins.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None


class Folded(NamedTuple):
    """A predictor whose first layer is split, its scaling multiplied in.

    Attributes:
        prompt_weight: float32 ``(p, d)``.
        bias: float32 ``(p,)``.
        head: The rest, for `plp_step`.
        linear: There is no hidden layer: ``p`` is K.
    """

    prompt_weight: Tensor
    bias: Tensor
    head: StepHead
    linear: bool

    def prompt(self, features: Tensor) -> Tensor:
        """Return the part of the first layer that a prompt decides, float32 ``(N, p)``."""
        return torch.addmm(self.bias, features.float(), self.prompt_weight.T)

    def output(self, inner: Tensor) -> Tensor:
        """Return probabilities float32 ``(N, K)`` of first layers ``(N, p)``."""
        if self.linear:
            return inner.softmax(-1)
        head = self.head
        x = nn.functional.layer_norm(inner, inner.shape[-1:], head.gain, head.shift, head.eps)
        return torch.addmm(head.out_bias, x.relu(), head.out_weight.T).softmax(-1)


class LengthPredictor(PreTrainedModel):
    """Predicts how long answers will be from hidden states of the model that gives them.

    ``Linear, LayerNorm, ReLU, Dropout, Linear`` (arXiv:2602.11812). With ``plp`` the same head
    also takes what is known of an answer that has begun, zeros before it has, and predicts what
    remains. Trained by the stock Trainer; ``save_pretrained`` and ``from_pretrained`` as any model.
    """

    config_class = LengthPredictorConfig
    config: LengthPredictorConfig
    base_model_prefix = "forelen"
    main_input_name = "prompt_features"
    input_mean: Tensor
    input_scale: Tensor
    marginal: Tensor

    def __init__(self, config: LengthPredictorConfig) -> None:
        super().__init__(config)
        self.prompt_size = config.feature_spec().parts * config.hidden_size
        # of a growing answer: its pool, its newest state, and numbers of the step
        self.step_size = 2 * config.hidden_size + STEP_FEATURES if config.plp else 0
        width = self.prompt_size + self.step_size
        self.bins = config.length_bins()
        if config.head == "linear":
            if config.plp:
                raise ValueError(message("plp", "False with a linear head", True, "use forelen"))
            self.out = nn.Linear(width, len(self.bins))
        else:
            inner = config.inner_size or max(width // 2, 1 if config.head == "paper" else _INNER)
            self.inner = nn.Linear(width, inner)
            self.norm = nn.LayerNorm(inner)
            self.dropout = nn.Dropout(config.dropout)
            self.out = nn.Linear(inner, len(self.bins))
        # features have outlier dimensions; what training saw brings them to one scale
        self.register_buffer("input_mean", torch.zeros(width))
        self.register_buffer("input_scale", torch.ones(width))
        # what is said of a prompt that says nothing
        self.register_buffer("marginal", torch.full((len(self.bins),), 1 / len(self.bins)))
        self.post_init()

    def forward(
        self,
        prompt_features: Tensor,
        decode_features: Tensor | None = None,
        labels: Tensor | None = None,
        censored: Tensor | None = None,
        weights: Tensor | None = None,
        **ignored: Any,
    ) -> LengthPredictorOutput:
        """Predict, and compare with labels.

        Args:
            prompt_features: float ``(N, d)``, or ``(N, 2 d)`` for ``entropy+last``.
            decode_features: float ``(N, 2 d + 4)``, with ``plp``; zeros for answers that have not
                begun.
            labels: ``(N,)``, tokens that remain: the whole answer's for a prompt alone.
            censored: bool ``(N,)``, of answers that were stopped after so many.
            weights: float ``(N,)``, of the rows in the loss.
            **ignored: Columns of a data set that training does not need, such as groups.

        Raises:
            ValueError: Shapes that do not fit the configuration.
        """
        check_tensor(
            "prompt_features", prompt_features, dtypes=_FLOATS, shape=(None, self.prompt_size),
            strided=True,
        )  # fmt: skip
        if decode_features is not None and not self.config.plp:
            remedy = "train with plp=True to predict from answers that have begun"
            raise ValueError(message("decode_features", "none", decode_features, remedy))
        parts = [prompt_features]
        if self.config.plp:
            shape = (len(prompt_features), self.step_size)
            if decode_features is None:
                decode_features = prompt_features.new_zeros(shape)
            check_tensor(
                "decode_features", decode_features, dtypes=_FLOATS, shape=shape, strided=True
            )
            parts.append(decode_features)
        dtype = self.out.weight.dtype
        x = (torch.cat([part.to(dtype) for part in parts], -1) - self.input_mean) / self.input_scale
        if self.config.head != "linear":
            x = self.dropout(self.norm(self.inner(x)).relu())
        logits = self.out(x).float()
        loss = None
        if labels is not None:
            losses = self._loss(logits, labels, censored)
            share = torch.ones_like(losses) if weights is None else weights.to(losses)
            loss = (losses * share).sum() / share.sum().clamp(min=1e-12)
        return LengthPredictorOutput(loss=loss, logits=logits)

    def _loss(self, logits: Tensor, labels: Tensor, censored: Tensor | None) -> Tensor:
        weight = self.config.weight
        if self.config.head == "paper":
            return paper_loss(logits, labels, self.bins, weight=weight)
        return forelen_loss(logits, labels, self.bins, censored=censored, weight=weight)

    def folded(self, device: torch.device) -> Folded:
        """Return the head split into what a prompt and what a step decides, float32."""
        first = self.out if self.config.head == "linear" else self.inner
        with torch.no_grad():
            weight = first.weight.float().to(device) / self.input_scale.float().to(device)
            bias = first.bias.float().to(device) - weight @ self.input_mean.float().to(device)
            tail = {
                name: value.detach().float().to(device).contiguous()
                for name, value in (
                    ("gain", getattr(self, "norm", self.out).weight),
                    ("shift", getattr(self, "norm", self.out).bias),
                    ("out_weight", self.out.weight),
                    ("out_bias", self.out.bias),
                )
            }
        step = weight[:, self.prompt_size :].contiguous()
        eps = float(getattr(getattr(self, "norm", None), "eps", 0.0))
        return Folded(
            weight[:, : self.prompt_size].contiguous(), bias,
            StepHead(weight=step, eps=eps, **tail), self.config.head == "linear",
        )  # fmt: skip

    def distribution(self, logits: Tensor, *, time: int = 0) -> LengthDistribution:
        """Return the distribution that logits ``(N, K)`` stand for, calibrated if that was done."""
        return self.distribution_of(logits.float().softmax(-1), time=time)

    def distribution_of(
        self, probs: Tensor, *, time: int = 0, bad: Tensor | None = None, calibrated: bool = True
    ) -> LengthDistribution:
        """Return the distribution of probabilities ``(N, K)`` after ``time`` tokens.

        Rows that are ``bad`` or hold what is no number get the lengths of training, and are marked.
        """
        lost = ~probs.isfinite().all(-1)
        lost = lost if bad is None else lost | bad
        marginal = self.marginal.to(probs)
        return LengthDistribution(
            torch.where(lost[:, None], marginal, probs), self.bins, fallback=lost,
            calibration=self.config.length_calibration(time) if calibrated else None,
        )  # fmt: skip

    @torch.no_grad()
    def predict(self, model: Any, inputs: Any, **options: Any) -> LengthDistribution:
        """Predict the lengths of answers before any token of them, by one pass over the prompts.

        Args:
            model: The model that will answer.
            inputs: What a tokenizer returns: ``input_ids`` and ``attention_mask``, or tokens
                ``(B, T)``.
            **options: Those of ``generate`` that answers will be sampled with.

        Raises:
            FingerprintError: Not the model the predictor was trained for.
            UnsupportedModelError: A model whose states cannot be read.
        """
        check_model(self.config.fingerprint, model)
        sampling = sampling_of(model, options)
        calibrated = check_sampling(self.config.sampling, sampling)
        ids = inputs if isinstance(inputs, Tensor) else inputs["input_ids"]
        mask = None if isinstance(inputs, Tensor) else inputs.get("attention_mask")
        spec, span = self.config.feature_spec(), self.config.chat_span()
        reader = ModelReader(model, [spec.layer])
        if not ids.shape[1]:
            nothing = torch.full((len(ids), len(self.bins)), float("nan"), device=ids.device)
            return self.distribution_of(nothing, calibrated=calibrated)
        found = read_prompts(reader, [spec], ids, mask, span)[spec.key]
        bad = ~found.isfinite().all(-1)
        if mask is not None:
            bad = bad | ~mask.bool().any(-1)
        folded = self.folded(found.device)
        probs = folded.output(folded.prompt(torch.where(bad[:, None], 0.0, found)))
        return self.distribution_of(probs, bad=bad, calibrated=calibrated)

    @contextmanager
    def watch(
        self, model: Any, *, stride: int | None = None, keep_history: bool = False
    ) -> Generator[LengthStream]:
        """Within this, every ``model.generate`` is predicted, before and while it runs.

        Args:
            model: The model that answers; its tokens come out as without this.
            stride: Tokens between two predictions; by default the config's.
            keep_history: Keep every prediction.

        Yields:
            The predictions of the newest call.

        Raises:
            FingerprintError: Not the model the predictor was trained for.
            UnsupportedModelError: A model whose states cannot be read.
        """
        check_model(self.config.fingerprint, model)
        stride = self.config.plp_stride if stride is None else stride
        check_range("stride", stride, 1, 1 << 31, "1 predicts at every token")
        reader = ModelReader(model, [self.config.layer])
        stream = LengthStream(self, reader, stride=stride, keep_history=keep_history)
        with tapped(reader, stream):
            yield stream


AutoConfig.register("forelen", LengthPredictorConfig, exist_ok=True)
AutoModel.register(LengthPredictorConfig, LengthPredictor, exist_ok=True)
