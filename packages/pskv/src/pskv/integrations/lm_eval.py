"""lm-evaluation-harness on shared prefixes: the model ``hf-pskv``.

Importing this module registers it, for ``lm_eval.simple_evaluate(model="hf-pskv", ...)``. On a
command line, ``python -m pskv.integrations.lm_eval`` takes the arguments of ``lm_eval``.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError("lm-eval is not installed: pip install 'pskv[lm-eval]'") from error

from pskv.scorer import PrefixScorer

_log = logging.getLogger(__name__)


@register_model("hf-pskv")
class SharedPrefixLM(HFLM):
    """The harness's Hugging Face model, whose requests share the contexts that they have in common.

    Few-shot examples are passed through the model once for all questions, and a question once for
    all its options. Log-probabilities are computed in float32 at least, whatever ``softmax_dtype``
    says; ``batch_size`` and ``logits_cache`` make no difference to them. Generation is the
    harness's own, and so are encoder-decoder models.

    Args:
        pskv_backend: As `PrefixScorer`'s backend.
        pskv_micro_batch: As `PrefixScorer`'s micro_batch.
        **options: Of ``HFLM``.
    """

    def __init__(
        self, *args: Any, pskv_backend: str = "auto", pskv_micro_batch: int | str = "auto",
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(*args, **options)
        self._scorer: PrefixScorer | None = None
        self._pskv: dict[str, Any] = {"backend": pskv_backend, "micro_batch": pskv_micro_batch}

    @property
    def scorer(self) -> PrefixScorer:
        """What scores the requests."""
        if self._scorer is None:
            self._scorer = PrefixScorer(self.model, **self._pskv)
        return self._scorer

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Score (texts, context ids, continuation ids), in the order given."""
        if self.backend != "causal":
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        pairs, cut = [], 0
        for _, context, continuation in requests:
            whole = (context + continuation)[-(self.max_length + 1) :]
            cut += len(whole) < len(context) + len(continuation)
            pairs.append((whole[: -len(continuation)], whole[-len(continuation) :]))
        if cut:
            _log.warning(
                "%d of %d requests are longer than the model's %d positions and lose tokens on "
                "the left", cut, len(requests), self.max_length,
            )  # fmt: skip
        answers = self.scorer.score_requests(pairs, progress=not disable_tqdm and self.rank == 0)
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    sys.exit(cli_evaluate())
