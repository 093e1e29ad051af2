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
#: Width of a hidden layer at least, if nothing is said.
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
        step: The head of answers that have begun, if it is another one.
        step_bias: Of its first layer, float32 ``(q,)``.
    """

    prompt_weight: Tensor
    bias: Tensor
    head: StepHead
    linear: bool
    step: StepHead | None = None
    step_bias: Tensor | None = None

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

    ``Linear, LayerNorm, ReLU, Dropout, Linear`` (arXiv:2602.11812). With ``plp`` it predicts what
    remains of an answer that has begun. The paper's head takes what is known of the answer beside
    the prompt, zeros before it has begun. By default a second head looks at the answer alone, and
    its probabilities weigh what the first prediction leaves possible (`Bins.remaining`): it has to
    learn no more than the answer's own evidence, and without any the prediction counts down.
    Trained by the stock Trainer; ``save_pretrained`` and ``from_pretrained`` as any model.
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
        self.two_heads = config.plp and config.head != "paper"
        first = self.prompt_size if self.two_heads else width
        self.bins = config.length_bins()
        if config.head == "linear":
            if config.plp:
                raise ValueError(message("plp", "False with a linear head", True, "use forelen"))
            self.out = nn.Linear(width, len(self.bins))
        else:
            inner = config.inner_size or max(first // 2, 1 if config.head == "paper" else _INNER)
            self.inner = nn.Linear(first, inner)
            self.norm = nn.LayerNorm(inner)
            self.dropout = nn.Dropout(config.dropout)
            self.out = nn.Linear(inner, len(self.bins))
        if self.two_heads:
            inner = config.inner_size or max(self.step_size // 2, _INNER)
            self.step_inner = nn.Linear(self.step_size, inner)
            self.step_norm = nn.LayerNorm(inner)
            self.step_out = nn.Linear(inner, len(self.bins))
        # features have outlier dimensions; what training saw brings them to one scale
        self.register_buffer("input_mean", torch.zeros(width))
        self.register_buffer("input_scale", torch.ones(width))
        # what is said of a prompt that says nothing
        self.register_buffer("marginal", torch.full((len(self.bins),), 1 / len(self.bins)))
        self.post_init()
        if self.two_heads:
            # no evidence to begin with
            nn.init.zeros_(self.step_out.weight)

    def forward(
        self,
        prompt_features: Tensor,
        decode_features: Tensor | None = None,
        times: Tensor | None = None,
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
            times: int64 ``(N,)``, tokens of each answer that were read; with ``decode_features``
                unless the head is the paper's.
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
        shape = (len(prompt_features), self.step_size)
        if decode_features is not None:
            check_tensor(
                "decode_features", decode_features, dtypes=_FLOATS, shape=shape, strided=True
            )
            if self.two_heads:
                remedy = "give the tokens that were read of each answer"
                if times is None:
                    raise ValueError(message("times", f"int64 ({shape[0]},)", None, remedy))
                check_tensor("times", times, dtypes=(torch.int64,), shape=shape[:1])
        if self.two_heads:
            logits = self._first(self._scaled(prompt_features))
            if decode_features is not None and times is not None:
                grown = self._second(self._scaled(decode_features, self.prompt_size))
                left = self.bins.remaining(logits.softmax(-1), times)
                logits = torch.where(times[:, None] > 0, grown + left.log(), logits)
        else:
            parts = [prompt_features]
            if self.config.plp:
                parts.append(
                    prompt_features.new_zeros(shape) if decode_features is None else decode_features
                )
            logits = self._first(self._scaled(torch.cat([part.float() for part in parts], -1)))
        loss = None
        if labels is not None:
            losses = self._loss(logits, labels, censored)
            share = torch.ones_like(losses) if weights is None else weights.to(losses)
            loss = (losses * share).sum() / share.sum().clamp(min=1e-12)
        return LengthPredictorOutput(loss=loss, logits=logits)

    def _scaled(self, x: Tensor, low: int = 0) -> Tensor:
        """Bring what goes in to one scale."""
        chosen = slice(low, low + x.shape[-1])
        dtype = self.out.weight.dtype
        return (x.to(dtype) - self.input_mean[chosen]) / self.input_scale[chosen]

    def _first(self, x: Tensor) -> Tensor:
        if self.config.head != "linear":
            x = self.dropout(self.norm(self.inner(x)).relu())
        return self.out(x).float()

    def _second(self, x: Tensor) -> Tensor:
        x = self.step_norm(self.step_inner(self.dropout(x))).relu()
        return self.step_out(self.dropout(x)).float()

    def _loss(self, logits: Tensor, labels: Tensor, censored: Tensor | None) -> Tensor:
        weight = self.config.weight
        if self.config.head == "paper":
            return paper_loss(logits, labels, self.bins, weight=weight)
        return forelen_loss(logits, labels, self.bins, censored=censored, weight=weight)

    def folded(self, device: torch.device) -> Folded:
        """Return the head split into what a prompt and what a step decides, float32."""
        if self.config.head == "linear":
            weight, bias, head = self._fold(self.out, None, self.out, 0, device)
        else:
            weight, bias, head = self._fold(self.inner, self.norm, self.out, 0, device)
        split = self.prompt_size
        first = head._replace(weight=weight[:, split:].contiguous())
        step = step_bias = None
        if self.two_heads:
            _, step_bias, step = self._fold(
                self.step_inner, self.step_norm, self.step_out, split, device
            )
        return Folded(
            weight[:, :split].contiguous(), bias, first, self.config.head == "linear", step,
            step_bias,
        )  # fmt: skip

    @torch.no_grad()
    def _fold(
        self, inner: nn.Linear, norm: nn.LayerNorm | None, out: nn.Linear, low: int,
        device: torch.device,
    ) -> tuple[Tensor, Tensor, StepHead]:  # fmt: skip
        """Return a first layer on unscaled input from column ``low`` on, and a head with it."""
        chosen = slice(low, low + inner.in_features)
        weight = inner.weight.float().to(device) / self.input_scale[chosen].float().to(device)
        bias = inner.bias.float().to(device) - weight @ self.input_mean[chosen].float().to(device)
        gain, shift, out_weight, out_bias = (
            value.detach().float().to(device).contiguous()
            for value in ((norm or out).weight, (norm or out).bias, out.weight, out.bias)
        )
        eps = 0.0 if norm is None else float(norm.eps)
        return weight, bias, StepHead(weight.contiguous(), gain, shift, out_weight, out_bias, eps)

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
