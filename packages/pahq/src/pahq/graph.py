"""Senders, receivers and edges of a decoder, and the order in which ACDC visits them."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from shared_kernels._checks import check_range, message

if TYPE_CHECKING:
    from collections.abc import Iterator

_EDGE = re.compile(r"(?P<sender>input|a\d+\.h\d+|m\d+)->(?P<receiver>\S+)")


@dataclass(frozen=True)
class Graph:
    """All edges of a decoder with L layers and H query heads.

    Senders are the embeddings (``input``), each head's output (``a3.h2``) and each MLP's (``m3``).
    Receivers are what each head's query, key and value and each MLP read from the residual stream
    (``a3.h2<q>``, ``m3``), and ``logits``. An edge goes from each sender to each receiver that
    comes after it. With grouped keys, the heads of a group share one receiver of keys and one of
    values (``a3.kv0<k>``).

    Numbers: senders in the order in which they are computed, receivers layer by layer, in a layer
    queries, keys, values, MLP; ``logits`` is the last.

    Args:
        layers: L.
        heads: H.
        key_heads: K, receivers of keys in a layer: those of the model if grouped, else H.
        parallel: Whether MLPs read what heads of their layer read, and not their output.
    """

    layers: int
    heads: int
    key_heads: int
    parallel: bool = False

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "key_heads"):
            check_range(name, getattr(self, name), 1, 1 << 20, "a decoder has at least one")
        if self.heads % self.key_heads:
            remedy = f"a divisor of heads={self.heads}"
            raise ValueError(message("key_heads", remedy, self.key_heads, "see the model's config"))

    # --- numbers -------------------------------------------------------------------------------

    @property
    def senders(self) -> int:
        """How many there are, ``1 + L (H + 1)``."""
        return 1 + self.layers * (self.heads + 1)

    @property
    def width(self) -> int:
        """Receivers of a layer, ``H + 2 K + 1``."""
        return self.heads + 2 * self.key_heads + 1

    @property
    def receivers(self) -> int:
        """How many there are, ``L (H + 2 K + 1) + 1``."""
        return self.layers * self.width + 1

    @property
    def logits(self) -> int:
        """Return the last receiver."""
        return self.receivers - 1

    @property
    def group(self) -> int:
        """Query heads of one head of keys."""
        return self.heads // self.key_heads

    def head(self, layer: int, index: int) -> int:
        """Return the sender of a head."""
        return 1 + layer * (self.heads + 1) + index

    def mlp(self, layer: int) -> int:
        """Return the sender of an MLP."""
        return 1 + layer * (self.heads + 1) + self.heads

    def columns(self, layer: int, part: str) -> slice:
        """Return the receivers of a layer's ``q``, ``k``, ``v`` or ``mlp``."""
        first, count = {
            "q": (0, self.heads),
            "k": (self.heads, self.key_heads),
            "v": (self.heads + self.key_heads, self.key_heads),
            "mlp": (self.heads + 2 * self.key_heads, 1),
        }[part]
        return slice(layer * self.width + first, layer * self.width + first + count)

    @functools.cached_property
    def _places(self) -> list[tuple[int, str, int]]:
        parts = [
            (part, number - self.columns(0, part).start)
            for part in ("q", "k", "v", "mlp")
            for number in range(self.columns(0, part).start, self.columns(0, part).stop)
        ]
        found = [(layer, *place) for layer in range(self.layers) for place in parts]
        return [*found, (self.layers, "logits", 0)]

    def place(self, receiver: int) -> tuple[int, str, int]:
        """Return layer, part and index of a receiver; ``(L, "logits", 0)`` for the last."""
        if receiver < 0:
            raise IndexError(receiver)
        return self._places[receiver]

    def upstream(self, receiver: int) -> int:
        """Return how many senders, from the first on, come before a receiver."""
        layer, part, _ = self.place(receiver)
        before = 1 + layer * (self.heads + 1)
        return before + self.heads if part == "mlp" and not self.parallel else before

    @functools.cached_property
    def _readers(self) -> list[list[int]]:
        found = []
        for layer, part, index in self._places:
            if part == "logits":
                found.append([])
            elif part == "mlp":
                found.append([self.mlp(layer)])
            elif part == "q":
                found.append([self.head(layer, index)])
            else:
                found.append([self.head(layer, index * self.group + j) for j in range(self.group)])
        return found

    def readers(self, receiver: int) -> list[int]:
        """Return the senders that are computed from a receiver; none from ``logits``."""
        return self._readers[receiver]

    # --- edges ---------------------------------------------------------------------------------

    @functools.cached_property
    def _up(self) -> np.ndarray:
        return np.array([self.upstream(r) for r in range(self.receivers)])

    def full(self) -> np.ndarray:
        """Return all edges, bool ``(senders, receivers)``."""
        return np.arange(self.senders)[:, None] < self._up[None]

    @property
    def edges(self) -> int:
        """How many there are."""
        return int(self._up.sum())

    def order(self) -> Iterator[int]:
        """Return receivers as ACDC visits them: from the logits to the first layer.

        In a layer the MLP, then the inputs of values, of keys and of queries, each from the last
        head to the first (ArthurConmy/Automatic-Circuit-Discovery).
        """
        yield self.logits
        for layer in reversed(range(self.layers)):
            for part in ("mlp", "v", "k", "q"):
                columns = self.columns(layer, part)
                yield from reversed(range(columns.start, columns.stop))

    def candidates(self, receiver: int) -> list[int]:
        """Return the senders of a receiver's edges as ACDC tries them, the nearest first."""
        return list(reversed(range(self.upstream(receiver))))

    # --- names ---------------------------------------------------------------------------------

    @functools.cached_property
    def sender_names(self) -> list[str]:
        """Return the names of all senders."""
        names = ["input"]
        for layer in range(self.layers):
            names += [f"a{layer}.h{head}" for head in range(self.heads)] + [f"m{layer}"]
        return names

    @functools.cached_property
    def receiver_names(self) -> list[str]:
        """Return the names of all receivers."""
        keys = "h" if self.key_heads == self.heads else "kv"
        names = []
        for layer in range(self.layers):
            names += [f"a{layer}.h{head}<q>" for head in range(self.heads)]
            for part in "kv":
                names += [f"a{layer}.{keys}{j}<{part}>" for j in range(self.key_heads)]
            names.append(f"m{layer}")
        return [*names, "logits"]

    @functools.cached_property
    def _numbers(self) -> tuple[dict[str, int], dict[str, int]]:
        return (
            {name: number for number, name in enumerate(self.sender_names)},
            {name: number for number, name in enumerate(self.receiver_names)},
        )

    def name(self, sender: int, receiver: int) -> str:
        """Return an edge's name, ``a0.h1->a3.h2<q>``."""
        return f"{self.sender_names[sender]}->{self.receiver_names[receiver]}"

    def edge(self, name: str) -> tuple[int, int]:
        """Return sender and receiver of an edge.

        Raises:
            ValueError: There is no such edge.
        """
        found = _EDGE.fullmatch(name)
        senders, receivers = self._numbers
        if found and found["sender"] in senders and found["receiver"] in receivers:
            sender, receiver = senders[found["sender"]], receivers[found["receiver"]]
            if sender < self.upstream(receiver):
                return sender, receiver
        remedy = "names are like those of sender_names and receiver_names"
        raise ValueError(message("edge", "an edge of this model", name, remedy))
