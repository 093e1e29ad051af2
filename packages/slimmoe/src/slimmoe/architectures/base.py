"""Tables of tensors: what each axis of each tensor of a family is.

All that compression does to a tensor follows from its row: an axis of channels of the residual
stream is indexed by kept channels, one of experts by kept or merged experts, and so on. A tensor
without a row is an error, never a guess from its size.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, Any

from slimmoe.errors import UnknownTensorError, UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


class Axis(Enum):
    """What an axis counts."""

    VOCABULARY = "vocabulary"
    #: Channels of the residual stream.
    RESIDUAL = "residual"
    #: Two of them, one behind the other: what an MTP module joins.
    TWO_RESIDUALS = "two residuals"
    EXPERT = "expert"
    #: Neurons of a routed expert.
    NEURON = "neuron"
    #: Its gates, and then as many of what they multiply.
    GATE_UP = "gate and up"
    #: The same, in turns.
    GATE_UP_IN_TURNS = "gate and up in turns"
    #: Heads, ranks, dense neurons: left as they are.
    OTHER = "other"


V, R, E, N, O = Axis.VOCABULARY, Axis.RESIDUAL, Axis.EXPERT, Axis.NEURON, Axis.OTHER


@dataclass(frozen=True)
class Row:
    """One kind of tensor.

    Attributes:
        pattern: Its name on disk or in memory, with ``{layer}``, ``{expert}`` and ``{mtp}`` for
            numbers.
        axes: Of its shape.
        norm: Of a norm over the residual stream, what its weights are held less: 0, or 1 where the
            norm multiplies by one more than them. None for all other tensors.
        router: Whether it is the matrix whose rows are experts' directions.
    """

    pattern: str
    axes: tuple[Axis, ...]
    norm: float | None = None
    router: bool = False

    @cached_property
    def regex(self) -> re.Pattern[str]:
        """The pattern as a regular expression with named groups."""
        text = re.escape(self.pattern)
        for name in ("layer", "expert", "mtp"):
            text = text.replace(rf"\{{{name}\}}", rf"(?P<{name}>\d+)")
        return re.compile(text)


@dataclass(frozen=True)
class Match:
    """A tensor and its row.

    Attributes:
        name: Of the tensor.
        row: What it is.
        layer: Of the decoder, None outside of it.
        expert: Whose tensor it is, None where all are in one.
        mtp: Which module of multi-token prediction it is in, None outside of one.
    """

    name: str
    row: Row
    layer: int | None = None
    expert: int | None = None
    mtp: int | None = None

    @property
    def site(self) -> str:
        """The module it is a weight of, by which norms have statistics."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A family.

    Attributes:
        model_type: Of its configurations.
        rows: Of all tensors that there may be.
        experts: Fields of the configuration with the number of routed experts; each that is there
            is written.
        neurons: The field with the width of a routed expert.
        no_width: Why its plain class cannot have fewer channels, if it cannot.
        no_neurons: Why its plain class cannot have narrower experts, if it cannot.
        mtp_layers: The field with the number of MTP modules, None if it has none.
        mtp_behind: Whether MTP modules are numbered as layers behind the last one.
        renormalises: Whether weights of selected experts do not depend on the others' logits, of a
            configuration: then experts that are never selected can go without a loss.
    """

    model_type: str
    rows: tuple[Row, ...]
    experts: tuple[str, ...]
    neurons: str
    no_width: str | None = None
    no_neurons: str | None = None
    mtp_layers: str | None = None
    mtp_behind: bool = False
    renormalises: Callable[[Mapping[str, Any]], bool] = field(
        default=lambda config: bool(config.get("norm_topk_prob"))
    )

    def match(self, name: str, config: Mapping[str, Any]) -> Match:
        """Return what a tensor is.

        Args:
            name: Of the tensor, on disk or in memory.
            config: As ``config.json`` has it.

        Raises:
            UnknownTensorError: No row is of it, or its layer is not in the configuration.
            UnsupportedModelError: It is quantised.
        """
        if name.endswith(("_scale_inv", "_blocks", "_scales", ".qweight", ".qzeros", ".scales")):
            raise UnsupportedModelError(
                f"{name}: its layer is quantised, and no quantization_config of a kind that is "
                "known says how; save the model dequantised, with the library that quantised it"
            )
        found = None
        for row in self.rows:
            if matched := row.regex.fullmatch(name):
                numbers = {key: int(value) for key, value in matched.groupdict().items()}
                if row.pattern.startswith("mtp."):
                    # what layers of a module share is of the first
                    numbers.setdefault("mtp", 0)
                found = Match(name, row, **numbers)
                break
        if found is not None and found.layer is not None:
            found = self._placed(found, config)
        if found is None:
            raise UnknownTensorError(
                f"{name}: the table of {self.model_type} has no row for it; it is not known what "
                "its axes are, so that nothing was written"
            )
        return found

    def _placed(self, found: Match, config: Mapping[str, Any]) -> Match | None:
        """Return a match whose layer is one of the decoder or an MTP module's; None if neither."""
        assert found.layer is not None
        behind = found.layer - int(config["num_hidden_layers"])
        if behind < 0:
            return found
        count = int(config.get(self.mtp_layers) or 0) if self.mtp_layers else 0
        if not self.mtp_behind or behind >= count:
            return None
        return Match(found.name, found.row, None, found.expert, behind)

    def name(self, match: Match, layer: int | None, expert: int | None, layers: int) -> str:
        """Return the name of a tensor that has another place.

        Args:
            match: What it was.
            layer: Its layer; None outside of the decoder.
            expert: Its expert, None where all are in one.
            layers: Of the decoder, behind which MTP modules may be.
        """
        place: dict[str, int] = {}
        if match.mtp is not None and self.mtp_behind:
            place["layer"] = layers + match.mtp
        elif layer is not None:
            place["layer"] = layer
        if match.mtp is not None:
            place["mtp"] = match.mtp
        if expert is not None:
            place["expert"] = expert
        return match.row.pattern.format(**place)

    def count(self, config: Mapping[str, Any]) -> int:
        """Return the number of routed experts of a layer."""
        for key in self.experts:
            if config.get(key) is not None:
                return int(config[key])
        raise UnsupportedModelError(
            f"config.json: expected a number of experts as one of {list(self.experts)}, got none"
        )


def table(rows: Mapping[str, Sequence[Axis]], **options: Any) -> tuple[Row, ...]:
    """Return rows of names and axes."""
    return tuple(Row(name, tuple(axes), **options) for name, axes in rows.items())


def behind(prefix: str, rows: Sequence[Row]) -> tuple[Row, ...]:
    """Return rows whose names begin with a prefix."""
    return tuple(Row(prefix + row.pattern, row.axes, row.norm, row.router) for row in rows)


#: Embeddings and head.
ENDS = table({"model.embed_tokens.weight": (V, R), "lm_head.weight": (V, R)})
#: Heads that read and write the residual stream; biases of what they write are channels.
ATTENTION = table({
    **{f"self_attn.{part}_proj.weight": (O, R) for part in "qkv"},
    **{f"self_attn.{part}_proj.bias": (O,) for part in "qkv"},
    "self_attn.o_proj.weight": (R, O),
    "self_attn.o_proj.bias": (R,),
    "self_attn.q_norm.weight": (O,),
    "self_attn.k_norm.weight": (O,),
})  # fmt: skip
#: A layer without experts.
DENSE = table({
    "mlp.gate_proj.weight": (O, R), "mlp.up_proj.weight": (O, R), "mlp.down_proj.weight": (R, O),
})  # fmt: skip
ROUTER = table({"mlp.gate.weight": (E, R)}, router=True)
#: Routed experts, each in tensors of its own or all in one.
EXPERTS = table({
    "mlp.experts.{expert}.gate_proj.weight": (N, R),
    "mlp.experts.{expert}.up_proj.weight": (N, R),
    "mlp.experts.{expert}.down_proj.weight": (R, N),
    "mlp.experts.gate_up_proj": (E, Axis.GATE_UP, R),
    "mlp.experts.down_proj": (E, R, N),
})  # fmt: skip


def shared(name: str) -> tuple[Row, ...]:
    """Return rows of experts that see every token."""
    return table({
        f"mlp.{name}.gate_proj.weight": (O, R), f"mlp.{name}.up_proj.weight": (O, R),
        f"mlp.{name}.down_proj.weight": (R, O),
    })  # fmt: skip


def norms(offset: float = 0.0) -> tuple[Row, ...]:
    """Return rows of a layer's two norms."""
    names = ("input_layernorm.weight", "post_attention_layernorm.weight")
    return table(dict.fromkeys(names, (R,)), norm=offset)


def decoder(layer: Sequence[Row], offset: float = 0.0) -> tuple[Row, ...]:
    """Return rows of a model: embeddings, layers, the last norm, the head."""
    last = table({"model.norm.weight": (R,)}, norm=offset)
    return (*ENDS, *behind("model.layers.{layer}.", layer), *last)
