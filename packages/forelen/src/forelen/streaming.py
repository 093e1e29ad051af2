"""Predictions while ``generate`` runs."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels.ops.pool import PoolState, StepHead, plp_step
from torch import Tensor

from forelen.fingerprint import check_sampling, sampling_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from forelen.binning import Bins
    from forelen.distribution import LengthDistribution
    from forelen.modeling_forelen import LengthPredictor
    from forelen.reading import ModelReader

#: Of what has been, in the moving average of the entropy.
DECAY = 0.9
#: Steps before one is recorded: kernels are compiled by then.
_EAGER = 2


class StepFeatures:
    """What is known of B answers that grow by a token at a time.

    ``[g ; h ; s]`` of each row: the entropy-weighted mean of its states, the newest state, and
    log1p of its tokens, the entropy now, its moving average and the end token's log-probability.
    On a GPU a step is recorded once and replayed, since its few small operations would take the
    host longer than the device.

    Args:
        rows: B.
        width: d.
        eos: End tokens.
        stops: Tokens whose reading shows that a row has ended; the end tokens and the padding.
        device: Of the states.
        prompt: float ``(B, p)``, the prompts' share of a head's first layer.
        head: The rest of the head, to predict with.
        first: float ``(B, K)``, what was predicted before the answers began, if what it leaves
            possible weighs the head's probabilities.
        bins: Of it.
    """

    def __init__(
        self,
        rows: int,
        width: int,
        *,
        eos: list[int],
        stops: list[int],
        device: torch.device,
        prompt: Tensor | None = None,
        head: StepHead | None = None,
        first: Tensor | None = None,
        bins: Bins | None = None,
    ) -> None:
        self.first, self.bins = first, bins
        self.edges = None if first is None or bins is None else bins.closed_edges().to(first)
        self.state = PoolState.empty(rows, width, device=device)
        self.features = torch.zeros(rows, 2 * width + 4, device=device)
        self.numbers = torch.zeros(rows, 4, device=device)
        self.active = torch.ones(rows, dtype=torch.bool, device=device)
        self.eos = torch.tensor(eos, dtype=torch.int64, device=device)
        self.stops = torch.tensor(stops, dtype=torch.int64, device=device)
        self.prompt, self.head = prompt, head
        self.time = 0
        # tokens that were read: of the longest answer, and of each
        self.steps = torch.zeros((), dtype=torch.int64, device=device)
        self.counts = torch.zeros(rows, dtype=torch.int64, device=device)
        # answers whose end token was read
        self.complete = torch.zeros(rows, dtype=torch.bool, device=device)
        self._recorded: dict[bool, Any] = {}
        self._inputs: tuple[Tensor, ...] = ()

    def update(
        self, ids: Tensor, hidden: Tensor, logits: Tensor, *, predict: bool = False
    ) -> Tensor | None:
        """Read a token ``(B,)`` of each row; return probabilities ``(B, K)`` if asked for.

        They are overwritten by the next prediction.
        """
        self.time += 1
        if not hidden.is_cuda or self.time <= _EAGER:
            return self._update(ids, hidden, logits, predict)
        given = (ids, hidden, logits)
        if not self._inputs:
            self._inputs = tuple(torch.empty_like(t) for t in given)
        for kept, new in zip(self._inputs, given, strict=True):
            kept.copy_(new)
        if predict not in self._recorded:
            self._recorded[predict] = self._record(predict)
        graph, probs = self._recorded[predict]
        if graph is None:
            return self._update(*self._inputs, predict)
        graph.replay()
        return probs

    def _record(self, predict: bool) -> tuple[Any, Tensor | None]:
        """Record a step, without doing it; (None, None) where that fails."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                probs = self._update(*self._inputs, predict)
        except RuntimeError as error:
            warnings.warn(
                f"steps are not recorded as a CUDA graph, so watching takes longer: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
            return None, None
        return graph, probs

    def _update(self, ids: Tensor, hidden: Tensor, logits: Tensor, predict: bool) -> Tensor | None:
        self.steps += 1
        self.complete |= self.active & (ids[:, None] == self.eos).any(-1)
        self.active &= ~(ids[:, None] == self.stops).any(-1)
        self.counts += self.active
        logprobs = torch.log_softmax(logits, -1, dtype=torch.float32)
        entropy = torch.special.entr(logprobs.exp()).sum(-1)
        log_eos = logprobs[:, self.eos].logsumexp(-1) if len(self.eos) else entropy * 0 - 30.0
        average = torch.lerp(entropy, self.numbers[:, 2], DECAY)
        average = torch.where(self.steps == 1, entropy, average)
        time = self.steps.float().log1p().expand_as(entropy)
        # an end token that cannot come has no logarithm
        new = torch.stack([time, entropy, average, log_eos.clamp(min=-30.0)], -1)
        self.numbers.copy_(torch.where(self.active[:, None], new, self.numbers))
        probs = plp_step(
            self.state, hidden, entropy, self.numbers, self.active, self.features,
            prompt=self.prompt, head=self.head if predict else None,
        )  # fmt: skip
        if probs is None or self.first is None or self.bins is None:
            return probs
        joint = probs * self.bins.remaining(self.first, self.counts, self.edges)
        return joint / joint.sum(-1, keepdim=True)


class LengthStream:
    """What a predictor says of the answers of the newest call of ``generate``.

    Rows are those of its output. Reading a distribution waits for the device; the steps do not.

    Attributes:
        time: Tokens that were read of answers that go on.
    """

    def __init__(
        self, predictor: LengthPredictor, reader: ModelReader, *, stride: int, keep_history: bool
    ) -> None:
        self.predictor, self.reader = predictor, reader
        self.stride, self.keep_history = stride, keep_history
        self.callbacks: list[Callable[[LengthStream], None]] = []
        self._calibrated = True
        self._options: dict[str, Any] = {}
        self._reset()

    def _reset(self) -> None:
        self._steps: StepFeatures | None = None
        self._initial: Tensor | None = None
        self._probs: Tensor | None = None
        self._bad: Tensor | None = None
        self._past: list[tuple[int, Tensor]] = []
        self._lengths: Tensor | None = None
        self._predicted_at = 0
        self._checked = False

    # what users read

    @property
    def time(self) -> int:
        """Tokens that were read of answers that go on."""
        return 0 if self._steps is None else self._steps.time

    @property
    def initial(self) -> LengthDistribution:
        """The lengths, predicted from the prompts alone."""
        return self._distribution(self._need(self._initial), 0)

    @property
    def remaining(self) -> LengthDistribution:
        """The tokens to come after what has been read, at least 1; of ended rows their last one.

        Without ``plp`` in the predictor's config: the first prediction, given the tokens so far.
        """
        if self._probs is not None:
            return self._distribution(self._probs, self._predicted_at)
        if not self.time or self._steps is None:
            return self.initial
        return self.initial.after(self._steps.counts)

    @property
    def tokens(self) -> Tensor:
        """Tokens of each answer that were read, int64 ``(B,)``."""
        return self._need(self._steps).counts.clone()

    @property
    def finished(self) -> Tensor:
        """Which rows were seen to end, bool ``(B,)``."""
        return ~self._need(self._steps).active

    @property
    def history(self) -> list[tuple[int, LengthDistribution]]:
        """Tokens read and what remained, at every prediction; with ``keep_history``."""
        return [(time, self._distribution(probs, time)) for time, probs in self._past]

    @property
    def lengths(self) -> Tensor:
        """Tokens of each answer, its end token included, int64 ``(B,)``; once generate returned."""
        return self._need(self._lengths)

    def on_update(self, callback: Callable[[LengthStream], None]) -> None:
        """Call a function after every prediction."""
        self.callbacks.append(callback)

    # what generate tells

    def begin(self, options: dict[str, Any]) -> None:
        """Forget the call before."""
        self._reset()
        sampling = sampling_of(self.reader.model, options)
        self._options = sampling
        self._calibrated = check_sampling(self.predictor.config.sampling, sampling)

    def prompt(
        self,
        states: dict[int, Tensor],
        ids: Tensor | None,
        attention: Tensor,
        siblings: int,
        logits: Tensor,
    ) -> None:
        """Predict from the prompts."""
        if not self._checked:
            last = torch.where(
                attention, torch.arange(attention.shape[1], device=logits.device), -1
            )
            rows = torch.arange(len(logits), device=logits.device)
            ends = states[-1].to(logits.device)[rows, last.amax(-1).clamp(min=0)]
            if attention[:, -1].all():
                self.reader.check_head(ends[:1], logits[:1])
            self._checked = True
        once = slice(None, None, siblings)
        predictor = self.predictor
        spec = predictor.config.feature_spec()
        mask = attention[once]
        content = None if ids is None else predictor.config.chat_span().mask(ids[once], mask)
        found = self.reader.features(
            {layer: h[once] for layer, h in states.items()}, [spec], mask, content
        )[spec.key].repeat_interleave(siblings, 0)
        empty = ~(mask if content is None else content).any(-1).repeat_interleave(siblings, 0)
        self._folded = predictor.folded(found.device)
        self._bad = empty | ~found.isfinite().all(-1)
        found = torch.where(self._bad[:, None], 0.0, found)
        self._prompt = self._folded.prompt(found)
        self._initial = self._folded.output(self._prompt)
        config = self.reader.model.generation_config
        eos = list(self._options.get("eos_token_id") or [])
        pad = getattr(config, "pad_token_id", None)
        folded = self._folded
        options: dict[str, Any] = {}
        if folded.step is not None and folded.step_bias is not None:
            share = folded.step_bias.expand(len(found), -1).contiguous()
            options = {"prompt": share, "head": folded.step, "first": self._initial,
                       "bins": predictor.bins}  # fmt: skip
        elif predictor.config.plp:
            options = {"prompt": self._prompt, "head": folded.head}
        self._steps = StepFeatures(
            len(found), states[-1].shape[-1], eos=eos, device=found.device,
            stops=[*eos, *([] if pad is None else [int(pad)])], **options,
        )  # fmt: skip
        self._notify(0)

    def token(self, ids: Tensor, states: dict[int, Tensor], logits: Tensor) -> None:
        """Predict from a token more."""
        steps = self._need(self._steps)
        due = self.predictor.config.plp and (steps.time + 1) % self.stride == 0
        probs = steps.update(ids, states[-1], logits, predict=due)
        if probs is not None:
            self._probs, self._predicted_at = probs, steps.time
            self._notify(steps.time)
        elif not self.predictor.config.plp and steps.time % self.stride == 0:
            self._notify(steps.time)

    def end(self, sequences: Tensor) -> None:
        """Count the tokens of each answer."""
        steps = self._steps
        if steps is None:
            return
        # the last token of a row that goes on was made but not read
        self._lengths = steps.counts + (steps.active | steps.complete)

    def _notify(self, time: int) -> None:
        if self.keep_history:
            probs = self._initial if self._probs is None else self._probs
            self._past.append((time, self._need(probs).clone()))
        for callback in self.callbacks:
            callback(self)

    def _distribution(self, probs: Tensor, time: int) -> LengthDistribution:
        return self.predictor.distribution_of(
            probs, time=time, bad=self._bad, calibrated=self._calibrated
        )

    @staticmethod
    def _need(value: Any) -> Any:
        if value is None:
            raise RuntimeError("nothing is known yet; call generate within the context")
        return value
