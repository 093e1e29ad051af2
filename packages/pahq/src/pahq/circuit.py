"""A set of edges, what is known of each, and how it was found."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file
from shared_kernels._checks import message
from shared_kernels.checkpoint import replacing_folder
from shared_kernels.files import write_text

from pahq.card import card
from pahq.graph import Graph

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from networkx import MultiDiGraph
    from torch import Tensor

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass
class Circuit:
    """Some edges of a model.

    Attributes:
        graph: All edges that there are.
        present: bool ``(S, R)`` on the CPU, those of the circuit.
        scores: float32 ``(S, R)``, what an edge's removal added to the metric when it was tried;
            NaN where none was.
        provenance: Of what it was found, and how.
    """

    graph: Graph
    present: Tensor
    scores: Tensor
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = (self.graph.senders, self.graph.receivers)
        for name in ("present", "scores"):
            found = getattr(self, name)
            if tuple(found.shape) != shape:
                raise ValueError(message(name, f"shape {shape}", tuple(found.shape), "see Graph"))
        self.present, self.scores = self.present.bool().cpu(), self.scores.float().cpu()
        self.present &= torch.from_numpy(self.graph.full())

    def __len__(self) -> int:
        return int(self.present.sum())

    def edges(self) -> Iterator[str]:
        """Return the names of its edges."""
        for sender, receiver in self.present.nonzero().tolist():
            yield self.graph.name(sender, receiver)

    @property
    def density(self) -> float:
        """Return the share of all edges."""
        return len(self) / self.graph.edges

    @property
    def margins(self) -> Tensor:
        """How far each effect that ACDC measured was from the threshold, float32 ``(S, R)``.

        NaN where an edge was not tried.

        Raises:
            ValueError: Edges were not chosen by a threshold.
        """
        if "threshold" not in self.provenance:
            remedy = "circuits of CircuitFinder.acdc have margins"
            raise ValueError(message("circuit", "a threshold", self.provenance, remedy))
        scores = self.scores.double()
        size = scores.abs() if self.provenance.get("absolute") else scores
        return (size - self.provenance["threshold"]).abs().float()

    @property
    def min_margin(self) -> float:
        """The smallest of `margins`, infinite if no edge was tried."""
        return float(self.margins.nan_to_num(float("inf")).min())

    def ambiguous_edges(self, within: float = 1e-6) -> Iterator[str]:
        """Return edges, kept or not, that rounding of float32 could have decided otherwise.

        Args:
            within: How near an effect was to the threshold.

        Raises:
            ValueError: Edges were not chosen by a threshold.
        """
        for sender, receiver in (self.margins <= within).nonzero().tolist():
            yield self.graph.name(sender, receiver)

    def top(self, count: int, *, absolute: bool = True) -> Circuit:
        """Return the edges with the highest scores, or scores furthest from 0.

        Args:
            count: How many; among equal scores, those of earlier receivers come last.
            absolute: Whether a score below 0 counts like one above it.

        Raises:
            ValueError: Fewer edges than that have a score.
        """
        scored = self.present & ~self.scores.isnan()
        if not 0 <= count <= int(scored.sum()):
            remedy = "edges without a score have no rank"
            raise ValueError(message("count", f"at most {int(scored.sum())}", count, remedy))
        rank = self.scores.abs() if absolute else self.scores
        rank = torch.where(scored, rank, float("-inf")).T.flatten().flip(0)
        order = rank.argsort(descending=True, stable=True)[:count]
        chosen = torch.zeros_like(rank, dtype=torch.bool)
        chosen[order] = True
        present = chosen.flip(0).view(self.graph.receivers, -1).T
        return Circuit(self.graph, present.contiguous(), self.scores.clone(), dict(self.provenance))

    def _with(self, other: Circuit, join: Callable[[Tensor, Tensor], Tensor]) -> Circuit:
        if self.graph != other.graph:
            remedy = "circuits of one model, with keys grouped in both or in none"
            raise ValueError(message("other", remedy, other.graph, "see Graph"))
        return Circuit(self.graph, join(self.present, other.present), self.scores.clone())

    def __and__(self, other: Circuit) -> Circuit:
        """Return the edges of both, with the scores of the first."""
        return self._with(other, lambda a, b: a & b)

    def __or__(self, other: Circuit) -> Circuit:
        """Return the edges of either, with the scores of the first."""
        return self._with(other, lambda a, b: a | b)

    def __sub__(self, other: Circuit) -> Circuit:
        """Return the edges of the first that the second does not have."""
        return self._with(other, lambda a, b: a & ~b)

    def jaccard(self, other: Circuit) -> float:
        """Return the share of the edges of either that both have; 1 for two without edges."""
        either = len(self | other)
        return len(self & other) / either if either else 1.0

    def to_networkx(self) -> MultiDiGraph:
        """Return its edges as a graph of networkx (``pip install 'pahq[networkx]'``).

        Nodes are ``input``, heads (``a3.h2``), MLPs (``m3``) and ``logits``, those that an edge
        leaves or enters, each with its ``layer`` (-1 of the embeddings, L of the logits) and its
        ``kind``: ``input``, ``head``, ``mlp`` or ``logits``.

        An edge goes to the node that reads with its receiver, and to each head of the group where
        heads share keys and values. The key of an edge, and its ``receiver``, is the receiver's
        name, so that a sender has up to three edges to a head; ``kind`` is ``q``, ``k``, ``v``,
        ``mlp`` or ``logits``; ``score`` is a float, NaN where there is none.

        Returns:
            A `networkx.MultiDiGraph` without cycles, with what is in `provenance` as attributes.

        Raises:
            ImportError: networkx is not installed.
        """
        try:
            from networkx import MultiDiGraph
        except ImportError as error:
            command = "pip install 'pahq[networkx]'"
            raise ImportError(f"Circuit.to_networkx needs networkx: {command}") from error
        graph, made = self.graph, MultiDiGraph()
        made.graph.update(self.provenance)
        # the logits come behind all senders
        names = [*graph.sender_names, "logits"]
        edges = [
            (sender, node, receiver)
            for sender, receiver in self.present.nonzero().tolist()
            for node in graph.readers(receiver) or [graph.senders]
        ]
        for number in sorted({end for sender, node, _ in edges for end in (sender, node)}):
            layer, place = divmod(number - 1, graph.heads + 1)
            kind = "mlp" if place == graph.heads else "head"
            if number in (0, graph.senders):
                kind = "logits" if number else "input"
            made.add_node(names[number], layer=layer, kind=kind)
        for sender, node, receiver in edges:
            name = graph.receiver_names[receiver]
            made.add_edge(
                names[sender], names[node], key=name, receiver=name, kind=graph.place(receiver)[1],
                score=float(self.scores[sender, receiver]),
            )  # fmt: skip
        return made

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``circuit.safetensors``, ``circuit.json`` and a model card to a new folder.

        It can be uploaded as it is: ``hf upload you/circuit FOLDER``.

        Raises:
            FileExistsError: There is one that is not empty.
        """
        document = {"graph": asdict(self.graph), "provenance": self.provenance}
        with replacing_folder(folder) as made:
            tensors = {"present": self.present, "scores": self.scores.contiguous()}
            save_file(tensors, made / "circuit.safetensors")
            write_text(made / "circuit.json", json.dumps(document, indent=1) + "\n")
            write_text(made / "README.md", card(self))

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, revision: str | None = None, token: str | bool | None = None
    ) -> Circuit:
        """Read what `save_pretrained` wrote.

        Args:
            folder: Where it is, or the name of a repository of the Hugging Face Hub.
            revision: Of the repository.
            token: For a repository that is not public.

        Raises:
            FileNotFoundError: There is none.
        """
        if isinstance(folder, str) and _REPOSITORY.fullmatch(folder) and not Path(folder).exists():
            folder = snapshot_download(
                folder, revision=revision, token=token, allow_patterns=["circuit.*"]
            )
        folder = Path(folder)
        document = json.loads((folder / "circuit.json").read_text())
        tensors = load_file(folder / "circuit.safetensors")
        graph = Graph(**document["graph"])
        return cls(graph, tensors["present"], tensors["scores"], document["provenance"])
