"""What is to be compressed, and how."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from shared_kernels._checks import check_choice, check_range, message

Method = Literal["prune", "merge", "partial_merge"]
Importance = Literal["freq", "soft", "reap", "reap_total", "norm_mean", "norm_total", "norm_max"]
Similarity = Literal["router_weight", "router_logit", "expert_output", "expert_weight"]
Alignment = Literal["none", "hungarian"]
Depth = Literal["last", "similarity"]
Mtp = Literal["compress", "drop"]
METHODS, IMPORTANCES, SIMILARITIES, ALIGNMENTS, DEPTHS, MTP = (
    get_args(known) for known in (Method, Importance, Similarity, Alignment, Depth, Mtp)
)


@dataclass(frozen=True, kw_only=True)
class CompressionConfig:
    """Sizes that a model is compressed to, and by what parts of it are chosen.

    A size that is not given stays.

    Attributes:
        num_layers: Decoder layers that are kept.
        drop_layers: Numbers of those that go, instead of `num_layers` and `depth_method`.
        depth_method: `last` drops the last layers; `similarity` consecutive ones, from where
            the mean outputs of a layer and of the one before it are most alike (arXiv:2605.08738,
            A.4).
        hidden_size: Channels of the residual stream that are kept, those whose mean size behind
            norms is largest.
        rms_correction: Whether norms are scaled by the share of the mean square that kept channels
            have, so that what they give keeps its size. Not in the paper; exact where dropped
            channels are 0.
        num_experts: Routed experts of a layer that are kept.
        num_experts_per_tok: How many of them a token goes to.
        moe_intermediate_size: Neurons of a routed expert that are kept.
        expert_method: `prune` keeps experts as they are; `merge` averages every other expert
            into the kept one that is most like it; `partial_merge` keeps some as they are and
            merges into the others (algorithm 1).
        importance: Of an expert: how often it is selected (`freq`), its share of the weights of
            selected experts (`soft`), the weighted size of what it gives when selected
            (`reap`), the same over all tokens (`reap_total`), the size without weights as a
            mean, sum or largest (`norm_mean`, `norm_total`, `norm_max`).
        similarity: Of experts that are merged: cosine of rows of the router (`router_weight`), of
            its logits over tokens (`router_logit`), of mean outputs (`expert_output`), or of
            all weights (`expert_weight`).
        preserve_ratio: Share of kept experts that `partial_merge` leaves as they are.
        alignment: `hungarian` orders the neurons of an expert as those of what it is merged into
            before they are averaged; the paper does not.
        mtp: Whether modules of multi-token prediction are compressed or dropped.

    Raises:
        ValueError: A size below 1, another choice, or two that exclude one another.
    """

    num_layers: int | None = None
    drop_layers: tuple[int, ...] | None = None
    depth_method: Depth = "last"
    hidden_size: int | None = None
    rms_correction: bool = True
    num_experts: int | None = None
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int | None = None
    expert_method: Method = "partial_merge"
    importance: Importance = "reap"
    similarity: Similarity = "expert_output"
    preserve_ratio: float = 0.5
    alignment: Alignment = "none"
    mtp: Mtp = "compress"

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "num_experts", "num_experts_per_tok",
                     "moe_intermediate_size"):  # fmt: skip
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), 1, 1 << 24, "leave it out to keep all")
        for name in ("hidden_size", "moe_intermediate_size"):
            size = getattr(self, name)
            if size is not None and size % 8:
                remedy = "grouped products read rows of 16 bytes"
                raise ValueError(message(name, "a multiple of 8", size, remedy))
        for name, known in (
            ("depth_method", DEPTHS), ("expert_method", METHODS), ("importance", IMPORTANCES),
            ("similarity", SIMILARITIES), ("alignment", ALIGNMENTS), ("mtp", MTP),
        ):  # fmt: skip
            check_choice(name, getattr(self, name), known)
        if not 0 <= self.preserve_ratio <= 1:
            remedy = "the share of kept experts that stay as they are"
            raise ValueError(message("preserve_ratio", "0 to 1", self.preserve_ratio, remedy))
        if self.drop_layers is not None:
            object.__setattr__(self, "drop_layers", tuple(sorted(set(self.drop_layers))))
            if self.num_layers is not None:
                remedy = "drop_layers says which go, num_layers how many stay"
                raise ValueError(message("drop_layers", "none beside num_layers",
                                         self.drop_layers, remedy))  # fmt: skip

    @property
    def scores(self) -> bool:
        """Whether anything is chosen by statistics."""
        depth = self.num_layers is not None and self.depth_method == "similarity"
        sizes = (self.hidden_size, self.num_experts, self.moe_intermediate_size)
        return depth or any(size is not None for size in sizes)

    def to_json(self) -> str:
        """Return it as JSON."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> CompressionConfig:
        """Read what `to_json` wrote.

        Raises:
            ValueError: A field that there is not, or a value that is refused.
        """
        found: dict[str, Any] = json.loads(text)
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(found) - known):
            raise ValueError(message("config", f"fields of {sorted(known)}", unknown, "see --help"))
        if found.get("drop_layers") is not None:
            found["drop_layers"] = tuple(found["drop_layers"])
        return cls(**found)
