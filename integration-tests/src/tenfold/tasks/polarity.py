"""Word polarity: does a word mean something good or something bad?

The labels are people's: a word is used if the lexicons AFINN (Nielsen, 2011; ODbL) and VADER
(Hutto and Gilbert, 2014; MIT) agree on its sign. Both are read out of installed packages. Which of
their words take part is a list beside this module: everyday words, one form of each (`joyful`
without `joyfully`, so that no dev word is a relative of a training word), as many good as bad.

A language model answers by the likelihood of two continuations of a prompt, as in MeZO's
classification tasks (Malladi et al., 2023, appendix E): ``Something cheerful is`` → `` good`` or
`` bad``. The loss is the cross-entropy between those two options alone.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from tenfold.assets import package_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

TEMPLATE = "Something {word} is"
OPTIONS = (" bad", " good")
"""The continuations, by label: 0 is negative, 1 positive."""

DEV_PER_CLASS = 100


@dataclass(frozen=True)
class Example:
    """A word and its label: 1 positive, 0 negative."""

    word: str
    label: int


@dataclass(frozen=True)
class Split:
    """Training and dev examples, each half positive, with no word in both."""

    train: tuple[Example, ...]
    dev: tuple[Example, ...]


def lexicon_scores() -> tuple[dict[str, float], dict[str, float]]:
    """Return the mean rating of every entry of AFINN (-5..5) and of VADER (-4..4).

    Raises:
        AssetError: A lexicon is not installed.
    """
    afinn = package_file("afinn", "data/AFINN-en-165.txt", distribution="afinn")
    vader = package_file("vaderSentiment", "vader_lexicon.txt", distribution="vaderSentiment")
    tables = []
    for path in (afinn, vader):
        rows = (line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line)
        tables.append({row[0]: float(row[1]) for row in rows})
    return tables[0], tables[1]


def load() -> Split:
    """Return the task's examples. The split depends on the words alone, not on any seed.

    Raises:
        AssetError: A lexicon is not installed.
        ValueError: The lexicons disagree on a listed word, or one of them lacks it.
    """
    afinn, vader = lexicon_scores()
    listed = files("tenfold.tasks").joinpath("polarity_words.txt").read_text(encoding="utf-8")
    groups: tuple[list[Example], list[Example]] = ([], [])
    for word in listed.split():
        scores = afinn.get(word, 0.0), vader.get(word, 0.0)
        if scores[0] * scores[1] <= 0:
            raise ValueError(
                f"expected AFINN and VADER to agree on {word!r}, they rate it {scores}; "
                "take it out of polarity_words.txt"
            )
        groups[scores[0] > 0].append(Example(word, int(scores[0] > 0)))
    for group in groups:
        group.sort(key=lambda example: hashlib.sha256(example.word.encode()).digest())
    dev = _alternate(*(group[:DEV_PER_CLASS] for group in groups))
    train = _alternate(*(group[DEV_PER_CLASS:] for group in groups))
    return Split(train, dev)


def _alternate(negative: Sequence[Example], positive: Sequence[Example]) -> tuple[Example, ...]:
    return tuple(e for pair in zip(negative, positive, strict=True) for e in pair)


def batches(examples: Sequence[Example], size: int, *, seed: int) -> Iterator[list[Example]]:
    """Yield balanced batches without end, going through all examples before repeating any.

    Args:
        examples: Balanced, labels alternating.
        size: Examples per batch, even.
        seed: Seed of the order.
    """
    import numpy as np

    if size < 2 or size % 2 or size > len(examples):
        raise ValueError(
            f"expected an even batch size from 2 to {len(examples)}, got {size}; half of each "
            "batch is positive"
        )
    rng = np.random.default_rng(seed)
    negative, positive = examples[0::2], examples[1::2]
    half, per_epoch = size // 2, len(examples) // size
    while True:
        orders = rng.permutation(len(negative)), rng.permutation(len(positive))
        for index in range(per_epoch):
            rows = slice(index * half, (index + 1) * half)
            yield [negative[i] for i in orders[0][rows]] + [positive[i] for i in orders[1][rows]]


class Classifier:
    """Turns a causal language model into a classifier of words.

    Args:
        tokenizer: The model's tokenizer.
        template: A prompt with ``{word}`` in it.
        options: The continuation of each label; each must be a single token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str = TEMPLATE,
        options: Sequence[str] = OPTIONS,
    ) -> None:
        self.tokenizer, self.template = tokenizer, template
        tokens = [tokenizer(option, add_special_tokens=False)["input_ids"] for option in options]
        for option, ids in zip(options, tokens, strict=True):
            if len(ids) != 1:
                raise ValueError(
                    f"expected options of one token, {option!r} has {len(ids)}; choose a shorter "
                    "word with a leading space"
                )
        self.option_tokens = [ids[0] for ids in tokens]

    def batch(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Return ``input_ids`` and ``attention_mask``, (batch, tokens) int64, padded left."""
        prompts = [self.template.format(word=example.word) for example in examples]
        return dict(self.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left"))

    def scores(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Return the logit of each option after the prompt, (batch, options) float32."""
        logits = model(**batch, logits_to_keep=1, use_cache=False).logits[:, -1]
        return logits[:, self.option_tokens].float()

    def objective(self, examples: Sequence[Example]) -> Callable[[nn.Module], Tensor]:
        """Return a function of the model: its mean cross-entropy over the options, in nats."""
        import torch

        batch = self.batch(examples)
        labels = torch.tensor([example.label for example in examples])

        def objective(model: nn.Module) -> Tensor:
            return torch.nn.functional.cross_entropy(self.scores(model, batch), labels)

        return objective

    def margins(
        self, model: nn.Module, examples: Sequence[Example], *, batch_size: int = 50
    ) -> Tensor:
        """Return how far the model prefers each word's positive option, (examples,) float32."""
        import torch

        parts = []
        with torch.inference_mode():
            for start in range(0, len(examples), batch_size):
                batch = self.batch(examples[start : start + batch_size])
                scores = self.scores(model, batch)
                parts.append(scores[:, 1] - scores[:, 0])
        return torch.cat(parts)


def accuracy(margins: Tensor, examples: Sequence[Example], *, threshold: float = 0.0) -> float:
    """Return the share of examples on the right side of ``threshold``.

    Args:
        margins: Preference for the positive option, (examples,).
        examples: The examples in the same order.
        threshold: 0 takes the likelier option; another value allows for a model's constant
            preference for one of the words (contextual calibration, Zhao et al., 2021).
    """
    import torch

    labels = torch.tensor([example.label for example in examples])
    return float(((margins > threshold).long() == labels).double().mean())


def ranking(margins: Tensor, examples: Sequence[Example]) -> float:
    """Return how often a positive word is preferred to a negative one; ties count half.

    This is the area under the ROC curve: no threshold takes part in it, so a model's constant
    preference for one answer neither helps nor harms.

    Args:
        margins: Preference for the positive option, (examples,).
        examples: The examples in the same order.
    """
    import torch

    labels = torch.tensor([example.label for example in examples], dtype=torch.bool)
    gaps = margins[labels][:, None] - margins[~labels][None, :]
    return float(((gaps > 0).double() + 0.5 * (gaps == 0)).mean())
