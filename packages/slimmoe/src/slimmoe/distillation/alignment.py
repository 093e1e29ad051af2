"""Whether a teacher speaks of the same tokens as its student, and of the labels that are there."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels._checks import message

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

logger = logging.getLogger(__name__)

#: Labels that are looked at; their logits are there at a time.
_ROWS = 256
#: Nats by which a law may be worse than an even one. A teacher that has learnt nothing, with logits
#: of variance 1, is half a nat worse, and SmolLM2-135M two at texts whose ids are permuted.
_WORSE = 1.0


def tokenizer_of(source: Any) -> Any:
    """Return the tokenizer of a folder or name, or of a processor; None if it has none.

    Args:
        source: A folder or a name on the Hub, a tokenizer, or a processor with one.
    """
    if source is None or hasattr(source, "get_vocab"):
        return source
    if not isinstance(source, str | Path):
        return tokenizer_of(getattr(source, "tokenizer", None))
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, ImportError):
        # weights alone, or a kind that is not installed
        return None


def vocabulary_sha256(tokenizer: Any) -> str | None:
    """Return a hash of tokens and their ids; None without a tokenizer."""
    if tokenizer is None:
        return None
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def check_tokenizers(student: Any, teacher: Any) -> None:
    """Refuse a teacher whose tokens have other ids than the student's.

    Args:
        student: Its tokenizer, None if it is not known; then nothing is checked.
        teacher: Likewise.

    Raises:
        ValueError: They differ; the message names tokens and their ids.
    """
    if student is None or teacher is None:
        return
    ours: Mapping[str, int] = student.get_vocab()
    theirs: Mapping[str, int] = teacher.get_vocab()
    differ = [(name, ours.get(name), theirs.get(name)) for name in ours.keys() | theirs.keys()
              if ours.get(name) != theirs.get(name)]  # fmt: skip
    if differ:
        differ.sort(key=lambda one: (min(i for i in one[1:] if i is not None), one[0]))
        told = ", ".join(f"{name!r} ({_told(mine)} and {_told(other)})"
                         for name, mine, other in differ[:3])  # fmt: skip
        raise ValueError(
            f"teacher_model: expected the student's tokens, got {len(differ)} that have other ids: "
            f"{told}; distil from a teacher with the same tokenizer"
        )


def _told(number: int | None) -> str:
    return "none" if number is None else str(number)


class TeacherCheck:
    """Refuses a teacher that is far worse at labels than an even law.

    It speaks of other tokens then. A few tokens that differ do not show here, and labels that are
    displaced hardly: frequent tokens are likely anywhere. 256 rows are looked at, of as many
    batches as it takes, and nothing afterwards.

    Attributes:
        over: Whether there is nothing to be looked at any more.
    """

    def __init__(self) -> None:
        self.over = False
        self._sum, self._rows = 0.0, 0

    def see(self, hidden: Tensor, weight: Tensor, labels: Tensor, ignored: int) -> None:
        """Look at a batch.

        Args:
            hidden: ``(R, H)``, the teacher's last hidden states.
            weight: ``(V, H)``, its head.
            labels: ``(R,)``, what rows predict.
            ignored: The label of rows that predict nothing.

        Raises:
            FloatingPointError: Hidden states or logits are not finite.
            ValueError: Labels beyond the teacher's vocabulary, or a cross entropy over
                ``ln V + 1``.
        """
        if not bool(hidden.isfinite().all()):
            raise FloatingPointError(not_finite("hidden states"))
        rows = (labels != ignored).nonzero().flatten()
        if not len(rows):
            return
        left = min(_ROWS - self._rows, len(rows))
        rows = rows[torch.linspace(0, len(rows) - 1, left).round().long()]
        wanted = labels[rows].to(hidden.device)
        size = len(weight)
        if int(wanted.max()) >= size:
            remedy = f"it has no more than {size} tokens"
            highest = int(wanted.max())
            raise ValueError(message("teacher_model", "all labels known", highest, remedy))
        logits = hidden[rows.to(hidden.device)].float() @ weight.float().T
        if not bool(logits.isfinite().all()):
            raise FloatingPointError(not_finite("logits"))
        self._sum += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
        self._rows += left
        self.over = self._rows == _ROWS
        found, even = self._sum / self._rows, math.log(size)
        if self.over and found > even + _WORSE:
            raise ValueError(
                f"teacher_model: its cross entropy of the labels is {found:.2f}, and that of an "
                f"even law {even:.2f}; it was trained on other token ids, or the texts are none "
                "that it knows (check_teacher=False goes on)"
            )


def warn_of_student(kl: float, size: int) -> None:
    """Tell that a student is farther from its teacher than an even law can be.

    Args:
        kl: Its mean divergence in the first batch.
        size: Of the vocabulary.
    """
    if kl > math.log(size) + _WORSE:
        logger.warning(
            "the student's divergence from its teacher is %.2f, more than an even law's %.2f: "
            "either compression left nothing of it, or its tokens are others",
            kl, math.log(size),
        )  # fmt: skip


def diagnosis(loss: float, step: int, hidden: Tensor | None, router: str | None) -> str:
    """Return what is not finite: the teacher, a router of the student, or the loss alone.

    Args:
        loss: That is not finite.
        step: At which.
        hidden: Of the teacher; None if it is not there.
        router: Of `slimmoe.distillation.balancing.not_finite`.
    """
    if hidden is not None and not bool(hidden.isfinite().all()):
        return f"{not_finite('hidden states')} (at step {step})"
    what = f"loss: {loss}" if router is None else f"{router}: logits of its router are not finite"
    return (
        f"{what} at step {step}; look for a rate of learning that is too high, or for data or "
        "weights that are not finite"
    )


def not_finite(what: str) -> str:
    """Return what to say of a teacher's numbers that are not finite."""
    return (
        f"teacher_model: its {what} are not finite; look for NaN in its weights, or for a dtype "
        "that is too narrow, such as float16"
    )
