"""Transformers with a circuit planted into them, whose edges are known by construction.

Each head and MLP of the circuit writes to a direction of the residual stream of its own, and each
of its inputs reads the directions of its senders and nothing else. All heads and MLPs also read
everything with random weights and write what they make of it to directions that no part of the
circuit reads, those outside the circuit to no other: they run, they differ between clean and
corrupted inputs, and they do not matter. A large constant in one direction keeps norms from mixing
directions (`pahq.truth.weights.Frame`).

An edge outside the circuit has no effect but what norms leak, of second order in KL: 1.2e-9 nats at
most in 32 models, which leaves ``BAND[0]`` a margin. How much one of the circuit matters depends on
the draws: the least of all edges of 160 circuits of `pahq.truth.wire` (4 heads and 2 MLPs of 2 or 3
layers, 32 pairs) was 4e-5. ACDC finds the circuit with any threshold in the band, KL the metric.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels._checks import check_range, message

from pahq.adapters import adapter_of
from pahq.circuit import Circuit
from pahq.tasks import Task
from pahq.truth.weights import (
    SCALE,
    Frame,
    new_model,
    write_attention,
    write_embeddings,
    write_mlp,
)
from pahq.truth.wiring import sources_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from pahq.graph import Graph

#: Thresholds of KL, in nats, between which ACDC finds a planted circuit.
BAND = (1e-7, 1e-5)
_FEATURES = 4
#: Of attention scores of the circuit, and of its logits: what a signal of 1 is multiplied by.
_SHARPNESS, _LOUDNESS = 2.0, 1.0


@dataclass
class Planted:
    """A model and what is true of it.

    Attributes:
        model: A causal language model of transformers, in evaluation mode.
        circuit: The edges that matter, each with a score of 1; all others have 0. Keys are grouped
            as in the model.
        clean: int64, tokens that clean prompts are drawn from.
        corrupted: int64, those of corrupted ones.
    """

    model: Any
    circuit: Circuit
    clean: Tensor
    corrupted: Tensor

    def task(self, n: int = 32, *, length: int = 8, seed: int = 0) -> Task:
        """Draw pairs of prompts of independent tokens.

        The answer is the token whose logit is highest on the clean prompt against the corrupted
        one, the wrong answer that whose is lowest.

        Args:
            n: Pairs.
            length: Tokens of a prompt.
            seed: Of the draws.

        Raises:
            ValueError: Fewer than one pair, or a length that the model has no positions for.
        """
        check_range("n", n, 1, 1 << 20, "a task has a pair")
        check_range("length", length, 1, 65, "the model has 64 positions")
        draws = torch.Generator().manual_seed(seed)
        prompts = [
            pool[torch.randint(len(pool), (n, length), generator=draws)]
            for pool in (self.clean, self.corrupted)
        ]
        device = self.model.get_input_embeddings().weight.device
        with torch.no_grad():
            clean, corrupted = (
                self.model(input_ids=ids.to(device), use_cache=False).logits[:, -1].cpu()
                for ids in prompts
            )
        gap = clean - corrupted
        return Task(
            *prompts, torch.full((n,), length - 1), gap.argmax(-1), gap.argmin(-1),
            {"name": "planted", "seed": seed},
        )  # fmt: skip


def plant(
    graph: Graph,
    edges: Iterable[str],
    *,
    family: str = "llama",
    width: int = 64,
    vocabulary: int = 96,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Planted:
    """Build a model whose circuit is a set of edges.

    Args:
        graph: Of the model, with as many receivers of keys as it has heads of keys.
        edges: Names of the circuit's edges, such as `pahq.truth.wire` draws.
        family: ``gpt2`` or ``llama``.
        width: D, of the residual stream.
        vocabulary: V, tokens.
        seed: Of all weights.
        dtype: Of parameters, float32 or float64: with fewer bits the constant would swallow
            signals.

    Raises:
        ValueError: Edges that cannot matter (`pahq.truth.wiring.sources_of`), a width without
            room for all directions, a family that cannot have that graph, or another dtype.
    """
    draws = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (vocabulary, _FEATURES), generator=draws).double() * 2 - 1
    every = torch.arange(vocabulary)
    builder = Builder(graph, edges, family, width, signs, draws)
    return Planted(builder.build(dtype), builder.circuit(), every, every)


class Builder:
    """Puts a model together.

    Args:
        graph: Of the model.
        edges: Names of the circuit's edges.
        family: ``gpt2`` or ``llama``.
        width: D.
        tokens: float64 ``(V, F)``, features of each token.
        draws: Where weights come from.
        neurons: Gain, offset and height of neurons of MLPs of the circuit: together they write
            the sum of ``height * act(gain * x + offset)``, x what the MLP reads.
        even: Whether what a sender of the circuit writes is scaled to a variance of 1, and what
            its readers read to that of one sender; else signals are added up as they are.
    """

    def __init__(
        self,
        graph: Graph,
        edges: Iterable[str],
        family: str,
        width: int,
        tokens: Tensor,
        draws: torch.Generator,
        *,
        neurons: Sequence[tuple[float, float, float]] = ((1.0, 0.0, 1.0),),
        even: bool = True,
    ) -> None:
        self.graph, self.tokens, self.draws = graph, tokens, draws
        self.neurons, self.even = neurons, even
        self.sources = sources_of(graph, edges)
        self.model = new_model(family, graph, width, 2 * width, len(tokens))
        inside = sorted({s for senders in self.sources.values() for s in senders} - {0})
        self.frame = Frame(family, width, tokens.shape[1], inside, draws)

    def circuit(self) -> Circuit:
        """Return the circuit, all of whose edges have a score of 1 and all others one of 0."""
        scores = torch.zeros(self.graph.senders, self.graph.receivers)
        for receiver, senders in self.sources.items():
            scores[senders, receiver] = 1
        return Circuit(self.graph, scores > 0, scores, {"method": "planted"})

    @torch.no_grad()
    def build(self, dtype: torch.dtype) -> Any:
        """Return the model."""
        if dtype not in (torch.float32, torch.float64):
            remedy = "with fewer bits the constant would swallow signals"
            raise ValueError(message("dtype", "float32 or float64", dtype, remedy))
        self._embeddings()
        adapter, graph = adapter_of(self.model), self.graph
        ids = torch.randint(len(self.tokens), (64, 8), generator=self.draws)
        x = adapter.embed(ids)
        for layer in range(graph.layers):
            q, k, v, o = self._heads(layer)
            write_attention(self.model, layer, q, k, v, o)
            parts = [
                adapter.part(layer, part, range(n), x.expand(n, *x.shape))
                for part, n in (("q", graph.heads), ("k", graph.key_heads), ("v", graph.key_heads))
            ]
            parts[1:] = (part.repeat_interleave(graph.group, 0) for part in parts[1:])
            made = adapter.write(layer, range(graph.heads), adapter.attend(layer, *parts))
            scaled = [self._scale(graph.head(layer, h), o[h], made[h]) for h in range(graph.heads)]
            write_attention(self.model, layer, q, k, v, torch.stack(scaled))
            x = x + adapter.write(layer, range(graph.heads), adapter.attend(layer, *parts)).sum(0)
            into, gain, out = self._mlp(layer)
            write_mlp(self.model, layer, into, gain, out)
            out = self._scale(graph.mlp(layer), out, adapter.mlp(layer, x))
            write_mlp(self.model, layer, into, gain, out)
            x = x + adapter.mlp(layer, x)
        return self.model.to(dtype)

    def _embeddings(self) -> None:
        frame, draws = self.frame, self.draws
        size, width = len(self.tokens), frame.constant.numel()
        tokens = SCALE * width**0.5 * frame.constant + self.tokens @ frame.features
        tokens = tokens + frame.writer(size, draws).T / len(frame.junk) ** 0.5
        positions = frame.writer(64, draws).T / len(frame.junk) ** 0.5
        head = torch.zeros_like(tokens)
        for sender in self.sources[self.graph.logits]:
            law = torch.randn(size, dtype=torch.float64, generator=draws)
            head += _LOUDNESS * law[:, None] * self._reads([sender])
        write_embeddings(self.model, tokens, positions, head)

    def _reads(self, senders: Sequence[int]) -> Tensor:
        """Return what reads the sum of some senders' signals, ``(D,)``."""
        frame, total = self.frame, torch.zeros_like(self.frame.constant)
        for sender in senders:
            if sender:
                total += frame.of[sender]
                continue
            mix = torch.ones(len(frame.features), dtype=torch.float64)
            if self.even:
                mix = torch.randn(len(mix), dtype=torch.float64, generator=self.draws)
            total += mix / mix.norm() @ frame.features
        return SCALE * total / (len(senders) ** 0.5 if self.even else 1)

    def _heads(self, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        graph, frame, draws = self.graph, self.frame, self.draws
        size = frame.constant.numel() // graph.heads
        q, k, v = (
            frame.reader(n * size, draws).view(n, size, -1)
            for n in (graph.heads, graph.key_heads, graph.key_heads)
        )
        o = torch.stack([frame.writer(size, draws) for _ in range(graph.heads)])
        # of all pairs of dimensions, positions turn this one least
        slow = size // 2 - 1
        for group in range(graph.key_heads):
            heads = [group * graph.group + j for j in range(graph.group)]
            inside = [h for h in heads if graph.head(layer, h) in frame.of]
            if not inside:
                continue
            keys, values = (
                self.sources.get(graph.columns(layer, part).start + group, []) for part in "kv"
            )
            v[group, 0] = self._reads(values)
            k[group, slow] = self._reads(keys) if keys else 0
            k[group, slow + size // 2] = 0
            for head in inside:
                queries = self.sources.get(graph.columns(layer, "q").start + head)
                q[head] = 0
                read = self._reads(queries) if queries else frame.offset
                q[head, slow] = _SHARPNESS * size**0.5 * read
                o[head, :, 0] = frame.of[graph.head(layer, head)]
        return q, k, v, o

    def _mlp(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        frame, inner = self.frame, 2 * self.frame.constant.numel()
        into, gain = (frame.reader(inner, self.draws) for _ in range(2))
        out = frame.writer(inner, self.draws)
        sender = self.graph.mlp(layer)
        if sender in frame.of:
            read = self._reads(self.sources[self.graph.columns(layer, "mlp").start])
            for row, (slope, offset, height) in enumerate(self.neurons):
                into[row] = slope * read + offset * frame.offset
                gain[row] = frame.offset
                out[:, row] = height * frame.of[sender]
        return into, gain, out

    def _scale(self, sender: int, weight: Tensor, made: Tensor) -> Tensor:
        """Return what a sender writes with, ``(D, n)``, so that ``made`` has a size of about 1."""
        signal = self.frame.of.get(sender)
        junk = self.frame.junk.T @ self.frame.junk
        scaled = junk @ weight / (made @ junk).square().sum(-1).mean().sqrt()
        if signal is None:
            return scaled
        size = (made @ signal).std() if self.even else 1.0
        return scaled + signal[:, None] * (signal @ weight) / size
