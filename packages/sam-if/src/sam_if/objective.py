"""What a model is trained on and what it is asked, as numbers of samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from shared_kernels._checks import check_choice, message
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn import functional

#: Labels that count nowhere.
IGNORED = -100


class Objective(Protocol):
    """Losses of samples; see `classification`, `regression` and `causal_lm` for ready-made ones."""

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the loss of each sample of a batch, ``(b,)``; training minimises their mean."""
        ...

    def measure(self, model: nn.Module, batch: Any) -> Tensor:
        """Return what is asked of each sample of a batch, ``(b,)``."""
        ...


@dataclass(frozen=True)
class _FromOutputs:
    """An objective that is a function of a model's outputs and of labels.

    Attributes:
        of_outputs: The loss of each sample, ``(b,)``.
        labels: Key of labels in mappings.
        spec: Name and arguments of the function that made it, as JSON has them.
        measured: What is asked of each sample; by default its loss.
        counted: How much a batch of labels counts among micro-batches of a step; by default as
            many samples as it has.
        drawn: Of outputs, labels and a generator, ``(b,)`` numbers whose gradients have the
            curvature of the losses as their second moment, and no mean.
    """

    of_outputs: Callable[[Any, Tensor], Tensor]
    labels: str
    spec: Mapping[str, Any]
    measured: Callable[[Any, Tensor], Tensor] | None = None
    counted: Callable[[Tensor], float] | None = None
    drawn: Callable[[Tensor, Tensor, torch.Generator], Tensor] | None = None

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        return self._numbers(self.of_outputs, model, batch)

    def _numbers(
        self, function: Callable[[Any, Tensor], Tensor], model: nn.Module, batch: Any
    ) -> Tensor:
        outputs, labels = self._run(model, batch)
        found = function(outputs, labels)
        if found.shape != labels.shape[:1]:
            remedy = "one number for each sample"
            expected = f"losses of shape {tuple(labels.shape[:1])}"
            raise ValueError(message("losses", expected, tuple(found.shape), remedy))
        return found

    def measure(self, model: nn.Module, batch: Any) -> Tensor:
        return self._numbers(self.measured or self.of_outputs, model, batch)

    def pseudo(self, model: nn.Module, batch: Any, generator: torch.Generator) -> Tensor:
        """Return ``(b,)`` numbers whose gradients have the curvature of losses as second moments.

        It is that of generalised Gauss-Newton matrices; the gradients' means are 0.
        """
        assert self.drawn is not None
        return self.drawn(*self._run(model, batch), generator)

    def size(self, batch: Any) -> float:
        """Return how much a batch counts among micro-batches of a step."""
        labels = batch[self.labels] if isinstance(batch, Mapping) else batch[1]
        return len(labels) if self.counted is None else self.counted(labels)

    def _run(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        if isinstance(batch, Mapping):
            known = {key: value for key, value in batch.items() if key != self.labels}
            if self.labels not in batch:
                remedy = "batches are mappings with labels, or pairs (inputs, labels)"
                raise ValueError(message("batch", f"a key {self.labels!r}", sorted(batch), remedy))
            outputs, labels = model(**known), batch[self.labels]
        elif isinstance(batch, Sequence) and len(batch) == 2:
            inputs, labels = batch
            outputs = model(inputs)
        else:
            remedy = "batches are mappings with labels, or pairs (inputs, labels)"
            raise ValueError(message("batch", "one of these", type(batch).__name__, remedy))
        return getattr(outputs, "logits", outputs), labels


def classification(*, labels: str = "labels", label_smoothing: float = 0.0) -> Objective:
    """Return cross entropy of each sample.

    Args:
        labels: Key of class numbers ``(b,)``, where batches are mappings.
        label_smoothing: As in ``torch.nn.functional.cross_entropy``.
    """

    def losses(logits: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(
            logits, target, reduction="none", label_smoothing=label_smoothing
        )

    given = {"name": "classification", "labels": labels, "label_smoothing": label_smoothing}
    return _FromOutputs(losses, labels, given, drawn=_drawn_classes)


def regression(*, labels: str = "labels") -> Objective:
    """Return the mean squared error of each sample, over its outputs.

    Args:
        labels: Key of targets ``(b,)`` or ``(b, m)``, where batches are mappings.
    """

    def losses(outputs: Tensor, target: Tensor) -> Tensor:
        apart = outputs.reshape(len(target), -1) - target.reshape(len(target), -1)
        return apart.square().mean(-1)

    def drawn(outputs: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        outputs = outputs.reshape(len(target), -1)
        signs = torch.randint(2, outputs.shape, generator=generator, device=outputs.device)
        return (2 / outputs.shape[1]) ** 0.5 * (outputs * (2 * signs - 1)).sum(-1)

    return _FromOutputs(losses, labels, {"name": "regression", "labels": labels}, drawn=drawn)


def causal_lm(*, labels: str = "labels", level: str = "mean") -> Objective:
    """Return what a language model loses on each sequence.

    Args:
        labels: Key of token ids ``(b, t)``, -100 where a token does not count; logits of token i
            are to say token ``i + 1``.
        level: ``mean`` over a sequence's counted tokens, or their ``sum``; or ``token``: the
            training loss is the mean over all counted tokens of a step, as in transformers, of
            which a sequence has its own tokens' part. What is asked of a sequence is then its mean.
    """
    check_choice("level", level, ("mean", "sum", "token"))

    def counts(target: Tensor) -> Tensor:
        return (target[:, 1:] != IGNORED).sum(-1)

    def total(logits: Tensor, target: Tensor) -> Tensor:
        wanted = target[:, 1:]
        each = functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), wanted, reduction="none", ignore_index=IGNORED
        )
        return each.sum(-1)

    def mean(logits: Tensor, target: Tensor) -> Tensor:
        return total(logits, target) / counts(target).clamp(min=1)

    def part(logits: Tensor, target: Tensor) -> Tensor:
        return total(logits, target) * (len(target) / counts(target).sum().clamp(min=1))

    def drawn(logits: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        # tokens are drawn independently, so that nothing is left of their products
        each = _drawn_classes(logits[:, :-1].flatten(0, 1), target[:, 1:].flatten(), generator)
        each = each.view(len(target), -1) * (target[:, 1:] != IGNORED)
        if level == "sum":
            return each.sum(-1)
        counted = counts(target).clamp(min=1) if level == "mean" else counts(target).sum()
        share = 1 if level == "mean" else len(target)
        return each.sum(-1) * (share / counted).sqrt()

    given = {"name": "causal_lm", "labels": labels, "level": level}
    if level == "token":
        tokens = lambda target: float(counts(target).sum())  # noqa: E731
        return _FromOutputs(part, labels, given, mean, tokens, drawn)
    return _FromOutputs(mean if level == "mean" else total, labels, given, drawn=drawn)


def _drawn_classes(logits: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
    """Return cross entropies of labels that are drawn as the logits say, ``(b,)``."""
    odds = logits.detach().softmax(-1)
    labels = torch.multinomial(odds, 1, generator=generator)[:, 0]
    return functional.cross_entropy(logits, labels, reduction="none")


_READY: dict[str, Callable[..., Objective]] = {
    "classification": classification, "regression": regression, "causal_lm": causal_lm,
}  # fmt: skip


def objective_of(spec: Mapping[str, Any]) -> Objective:
    """Return the ready-made objective that has this ``spec``.

    Raises:
        ValueError: None has.
    """
    given = dict(spec)
    name = given.pop("name", None)
    if name not in _READY:
        remedy = "give the one that it was recorded with"
        raise ValueError(message("objective", f"one of {', '.join(_READY)}", name, remedy))
    return _READY[name](**given)


class Losses(nn.Module):
    """A model whose output is an objective of a batch, for ``torch.func.functional_call``."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self._objective = objective

    def forward(self, batch: Any, *, measured: bool = False) -> Tensor:
        """Return ``(b,)`` losses, or what is measured."""
        run = self._objective.measure if measured else self._objective.losses
        return run(self.model, batch)


class _Pseudo(nn.Module):
    """A model whose output is `_FromOutputs.pseudo` of a batch."""

    def __init__(self, model: nn.Module, objective: Any) -> None:
        super().__init__()
        self.model, self._objective = model, objective

    def forward(self, batch: Any, generator: torch.Generator) -> Tensor:
        """Return ``(b,)``."""
        return self._objective.pseudo(self.model, batch, generator)


class ParameterVector:
    """A model's trained parameters as one vector ``(p,)``, and losses as functions of it.

    Args:
        model: Parameters that need no gradient stay as they are; tied ones are there once.
        objective: Of samples.

    Attributes:
        names: Of parameters, in order.
        shapes: Of each.
        sizes: How many numbers each has.

    Raises:
        ValueError: No parameter needs a gradient, or they differ in dtype or device.
    """

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        self._module = Losses(model, objective)
        self._objective = objective
        found = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not found:
            raise ValueError(
                message("model", "parameters that need a gradient", 0, "unfreeze some")
            )
        kinds = {(p.dtype, p.device) for p in found.values()}
        if len(kinds) > 1:
            got = sorted(f"{dtype} on {device}" for dtype, device in kinds)
            remedy = "have the model in one dtype on one device"
            raise ValueError(message("model", "parameters of one kind", got, remedy))
        self.names = list(found)
        self._parameters = list(found.values())
        self.shapes = [p.shape for p in self._parameters]
        self.sizes = [p.numel() for p in self._parameters]

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self._module.model

    def __len__(self) -> int:
        return sum(self.sizes)

    def read(self) -> Tensor:
        """Return a copy of the weights."""
        return torch.cat([p.detach().flatten() for p in self._parameters])

    @torch.no_grad()
    def write(self, vector: Tensor) -> None:
        """Put weights into the model."""
        for p, part in zip(self._parameters, vector.split(self.sizes), strict=True):
            p.copy_(part.view_as(p))

    def size(self, batch: Any, samples: int) -> float:
        """Return how much a batch counts among others: by default as many samples as it has."""
        own = getattr(self._objective, "size", None)
        return own(batch) if own else samples

    def losses(self, vector: Tensor, batch: Any, *, measured: bool = False) -> Tensor:
        """Return losses of samples with these weights, or what is measured, ``(b,)``."""
        return self._call(self._module, vector, (batch,), {"measured": measured})

    def pseudo(self, vector: Tensor, batch: Any, generator: torch.Generator) -> Tensor:
        """Return ``(b,)`` numbers whose gradients have the losses' curvature as second moments.

        Raises:
            ValueError: The objective has none.
        """
        if not hasattr(self._objective, "pseudo"):
            remedy = "take a ready-made one, or another solver"
            got = type(self._objective).__name__
            raise ValueError(message("objective", "one with pseudo", got, remedy))
        return self._call(_Pseudo(self.model, self._objective), vector, (batch, generator), {})

    def _call(
        self, module: nn.Module, vector: Tensor, given: tuple[Any, ...], options: dict[str, Any]
    ) -> Tensor:
        parts = vector.split(self.sizes)
        values = {
            f"model.{name}": part.view(shape)
            for name, part, shape in zip(self.names, parts, self.shapes, strict=True)
        }
        return functional_call(module, values, given, options, tie_weights=True)


def query_gradients(
    vector: ParameterVector, at: Tensor, queries: Iterable[Any], mean: bool
) -> list[Tensor]:
    """Return the gradient of what is measured of each query, or of the mean of all, ``(p,)``.

    Raises:
        ValueError: No queries.
    """
    found, count = [], 0
    for batch in queries:
        measure = lambda w, batch=batch: vector.losses(w, batch, measured=True)  # noqa: E731
        with torch.no_grad():
            size = len(measure(at))
        count += size
        if mean:
            found.append(grad(lambda w, measure=measure: measure(w).sum())(at))
        else:
            found += [grad(lambda w, measure=measure, q=q: measure(w)[q])(at) for q in range(size)]
    if not count:
        raise ValueError(message("queries", "at least one sample", 0, "give batches"))
    return [torch.stack(found).sum(0) / count] if mean else found
