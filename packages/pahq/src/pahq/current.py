"""The run of a circuit while it is being decided, held so that it can be changed a little.

Receivers are decided from the last to the first, so that everything before the one in question
holds the values of the clean run, and everything behind it has its edges. What a run holds of
senders is how much they differ from the corrupted run: that is all an edge can take away.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from pahq.adapters.base import Norm
    from pahq.forward import Executor, PlainRun

#: How much of what a sender computes is read: nothing, the tokens of answers, all tokens.
DEAD, NARROW, WIDE = 0, 1, 2
#: Senders that are added up at once.
_AT_ONCE = 32


class Current:
    """What senders compute and receivers read in a circuit, in high precision.

    Where only the token at which an example gives its answer is read of a sender, nothing else is
    computed of it: an MLP or a query behind which only such tokens count has none others either.

    Args:
        executor: Of the model.
        clean: Its run on clean inputs.
        corrupted: Of inputs of the same shape. All but `PlainRun.final` may be in the host's memory
            in both.
        positions: int64 ``(N,)``, the token of each example whose final state counts.

    Attributes:
        present: bool ``(S, R)`` on the CPU; all edges at first.
        moved: Of each sender ``(N T, D)``, its output less that of the corrupted run; None where
            only answers are read of it, or nothing, and all that reads it is decided.
        answers: ``(S, N, D)``, the same of answers; of no use where nothing is read.
        needs: int8 ``(S,)``, what decided receivers read of each sender.
    """

    def __init__(
        self, executor: Executor, clean: PlainRun, corrupted: PlainRun, positions: Tensor
    ) -> None:
        graph = executor.graph
        self.executor, self.corrupted = executor, corrupted
        senders, self.examples, self.tokens, self.width = clean.senders.shape
        self.device, self.dtype = clean.final.device, clean.final.dtype
        self.present = torch.from_numpy(graph.full())
        self.edges = self.present.numpy()
        self.positions = positions.to(self.device)
        #: Of the answers among all tokens.
        self.at = torch.arange(self.examples, device=self.device) * self.tokens + self.positions
        self.moved: list[Tensor | None] = []
        # one layer at a time, for both may be in the host's memory, and layers are forgotten
        for layer in range(-1, graph.layers):
            part = slice(graph.head(layer, 0), graph.mlp(layer) + 1) if layer >= 0 else slice(0, 1)
            gone = clean.senders[part].to(self.device) - corrupted.senders[part].to(self.device)
            self.moved += gone.flatten(1, 2).unbind()
        self.answers = torch.stack([self._all(s)[self.at] for s in range(senders)])
        self.needs = np.zeros(senders, np.int8)
        self._inputs: dict[int, Tensor] = {}
        self._made: dict[tuple[int, str, int], Tensor] = {}
        self._undecided: tuple[int, str, Tensor] | None = None

    # --- what is read ----------------------------------------------------------------------------

    def need(self, receiver: int) -> int:
        """Return how much of what a receiver reads counts."""
        graph = self.executor.graph
        part = graph.place(receiver)[1]
        if part == "logits":
            return NARROW
        most = int(self.needs[graph.readers(receiver)].max())
        # a query sees keys and values of other tokens
        return WIDE if most and part in "kv" else most

    def without(self, start: Tensor | None, senders: list[int], need: int) -> Tensor:
        """Return a change less what some senders give, ``(N T, D)`` or, narrow, ``(N, D)``."""
        if start is None:
            tokens = self.examples * (self.tokens if need == WIDE else 1)
            start = torch.zeros(tokens, self.width, dtype=self.dtype, device=self.device)
        for begin in range(0, len(senders), _AT_ONCE):
            start = start - self.gone(senders[begin : begin + _AT_ONCE], need).sum(0)
        return start

    def gone(self, senders: Sequence[int], need: int, out: Tensor | None = None) -> Tensor:
        """Return what some senders give, ``(n, N T, D)`` or, narrow, ``(n, N, D)``."""
        if need == WIDE:
            return torch.stack([self._all(sender) for sender in senders], out=out)
        index = torch.tensor(senders, device=self.device)
        return torch.index_select(self.answers, 0, index, out=out)

    def _all(self, sender: int) -> Tensor:
        found = self.moved[sender]
        if found is None:
            raise RuntimeError(f"sender {sender} was forgotten, but is read")
        return found

    def release(self, layer: int) -> None:
        """Forget what nothing reads of a layer that is decided, as all behind it is."""
        graph = self.executor.graph
        for sender in range(graph.head(layer, 0), graph.mlp(layer) + 1):
            # what is left would otherwise keep the memory of the whole layer
            read = self.needs[sender] == WIDE
            self.moved[sender] = self._all(sender).clone() if read else None

    def close(self, receiver: int) -> None:
        """Take a receiver as decided: what it reads of its senders counts."""
        senders = self.edges[:, receiver].nonzero()[0]
        self.needs[senders] = np.maximum(self.needs[senders], self.need(receiver))

    def reset(self) -> None:
        """Take all receivers as undecided."""
        self.needs[:] = DEAD
        self.forget()

    def corrupted_input(self, receiver: int, need: int) -> Tensor:
        """Return what a receiver read in the corrupted run, ``(N T, D)`` or, narrow, ``(N, D)``."""
        found = self.corrupted.read(self.executor.graph, receiver).to(self.device)
        return self.tokens_of(found.flatten(0, 1), need)

    def tokens_of(self, x: Tensor, need: int) -> Tensor:
        """Return all tokens of ``(..., N T, D)``, or those of answers."""
        return x if need == WIDE else x[..., self.at, :]

    def input(self, receiver: int) -> Tensor:
        """Return what a receiver reads, ``(N T, D)`` or, narrow, ``(N, D)``."""
        found = self._inputs.get(receiver)
        if found is None:
            self._check_now(f"receiver {receiver}")
            need = self.need(receiver)
            graph = self.executor.graph
            layer, part, _ = graph.place(receiver)
            senders = self.edges[: graph.upstream(receiver), receiver]
            if need == WIDE and senders.all():
                # all undecided receivers of a layer read the same
                found = self._stream(layer, part == "mlp", receiver)
            else:
                found = self.corrupted_input(receiver, need)
                found = found - self.without(None, senders.nonzero()[0].tolist(), need)
            self._inputs[receiver] = found
        return found

    def _stream(self, layer: int, mlp: bool, receiver: int) -> Tensor:
        key = (layer, "mlp" if mlp else "heads")
        if self._undecided is None or self._undecided[:2] != key:
            up = self.executor.graph.upstream(receiver)
            x = self.corrupted_input(receiver, WIDE) - self.without(None, [*range(up)], WIDE)
            self._undecided = (*key, x)
        return self._undecided[2]

    def norm(self, receiver: int) -> Norm | None:
        """Return the norm behind what a receiver reads; None for the logits."""
        layer, part, _ = self.executor.graph.place(receiver)
        if part == "logits":
            return None
        return self.executor.adapter.norm("mlp" if part == "mlp" else "attention", layer)

    def forget(self, receivers: list[int] | None = None) -> None:
        """Forget what some receivers read and what is made of it, or all."""
        graph = self.executor.graph
        self._undecided = None
        if receivers is None:
            self._inputs.clear()
            self._made.clear()
            return
        for receiver in receivers:
            self._inputs.pop(receiver, None)
            layer, part, index = graph.place(receiver)
            if part == "mlp":
                self._made.pop((layer, "before", 0), None)
            elif part != "logits":
                self._made.pop((layer, part, index), None)
                self._made.pop((layer, f"flat {part}", index), None)
                for sender in graph.readers(receiver):
                    self._made.pop((layer, "head", sender), None)

    # --- what is made of it ----------------------------------------------------------------------

    def _keep(self, key: tuple[int, str, int], make: Callable[[], Tensor]) -> Tensor:
        if key not in self._made:
            self._check_now(str(key))
            self._made[key] = make()
        return self._made[key]

    def _check_now(self, what: str) -> None:
        # what is made while work is recorded would be there only after it is repeated
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"{what} of the current run was not made before work was recorded")

    def by_example(self, x: Tensor, need: int) -> Tensor:
        """Return ``(..., N T, d)`` as ``(..., N, T, d)``, or, narrow, as ``(..., N, 1, d)``."""
        return x.unflatten(-2, (self.examples, self.tokens if need == WIDE else 1))

    def flat(self, layer: int, part: str, index: int) -> Tensor:
        """Return a head's query, key or value before its norm and its turn, ``(tokens, d)``."""
        receiver = self.executor.graph.columns(layer, part).start + index

        def make() -> Tensor:
            adapter = self.executor.adapter
            adapter.load(layer)
            weight, bias = adapter.weights(layer, part)
            head = self.executor.shared(part, index)
            found = adapter.norm("attention", layer)(self.input(receiver))
            found = found @ weight[head].to(adapter.dtype).T
            return found if bias is None else found + bias[head].to(adapter.dtype)

        return self._keep((layer, f"flat {part}", index), make)

    def turned(self, layer: int, part: str, x: Tensor, need: int) -> Tensor:
        """Return ``(..., tokens, d)`` of `flat` as attention takes it, ``(..., N, T, d)``."""
        adapter = self.executor.adapter
        x = self.by_example(x, need)
        if part == "v":
            return x
        at = None if need == WIDE else self.positions
        return adapter.rotate(layer, adapter.head_norm(layer, part, x), at)

    def part(self, layer: int, part: str, index: int) -> Tensor:
        """Return a head's query, key or value, ``(N, T, d)``; a narrow query is ``(N, 1, d)``."""
        receiver = self.executor.graph.columns(layer, part).start + index
        return self._keep(
            (layer, part, index),
            lambda: self.turned(
                layer, part, self.flat(layer, part, index)[None], self.need(receiver)
            )[0],
        )

    def head(self, layer: int, index: int) -> Tensor:
        """Return what a head reads, ``(N, T, d)``, or, narrow, ``(N, 1, d)``."""
        graph, adapter = self.executor.graph, self.executor.adapter

        def make() -> Tensor:
            key = index // graph.group
            q, k, v = (self.part(layer, *p)[None] for p in (("q", index), ("k", key), ("v", key)))
            at = None if self.needs[graph.head(layer, index)] == WIDE else self.positions
            return adapter.attend(layer, q, k, v, at)[0]

        return self._keep((layer, "head", graph.head(layer, index)), make)

    def before(self, layer: int) -> Tensor:
        """Return what enters an MLP's activation, ``(tokens, F)``; gated, ``[gate, inner]``."""
        adapter, receiver = self.executor.adapter, self.executor.graph.columns(layer, "mlp").start

        def make() -> Tensor:
            x = adapter.norm("mlp", layer)(self.input(receiver))
            adapter.load(layer)
            inside, factor = adapter.feed_forward(layer).before(x)
            return inside if factor is None else torch.cat([inside, factor], -1)

        return self._keep((layer, "before", 0), make)

    # --- new values ------------------------------------------------------------------------------

    def add(self, sender: int, value: Tensor) -> None:
        """Add to what a sender computes, ``(N T, D)`` or, where only answers count, ``(N, D)``."""
        if self.needs[sender] == WIDE:
            self._all(sender).add_(value)
            value = value[self.at]
        self.answers[sender] += value

    @torch.no_grad()
    def compute(self, first: int) -> None:
        """Compute all that is decided anew, from a layer on, from what there is before.

        Nothing that was added up before remains in it.
        """
        graph, adapter = self.executor.graph, self.executor.adapter
        self.forget()
        for layer in range(first, graph.layers):
            for head in range(graph.heads):
                sender = graph.head(layer, head)
                if self.needs[sender]:
                    z = self.head(layer, head)
                    self._set(sender, adapter.write(layer, [head], z[None])[0].flatten(0, 1))
            sender = graph.mlp(layer)
            if self.needs[sender]:
                receiver = graph.columns(layer, "mlp").start
                self._set(sender, adapter.mlp(layer, self.input(receiver)))

    def _set(self, sender: int, value: Tensor) -> None:
        was = self.corrupted.senders[sender].flatten(0, 1).to(value.device)
        if self.needs[sender] == WIDE:
            self._all(sender).copy_(value - was)
            self.answers[sender] = self._all(sender)[self.at]
        else:
            self.answers[sender] = value - was[self.at]
