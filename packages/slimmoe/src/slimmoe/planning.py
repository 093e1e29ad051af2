"""What of a model is kept and what is averaged: decided before anything is written."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels._checks import check_range, message
from shared_kernels.files import write_text

from slimmoe import cautions
from slimmoe.architectures import Axis
from slimmoe.configuration import CompressionConfig
from slimmoe.errors import UnsupportedModelError
from slimmoe.merging.grouping import Experts, grouped
from slimmoe.merging.similarity import similarity
from slimmoe.pruning import depth, width
from slimmoe.pruning.experts import importance, largest
from slimmoe.resizing import resized
from slimmoe.weights import Source

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from torch import Tensor

    from slimmoe.architectures import Match
    from slimmoe.calibration.statistics import CalibrationStatistics, ExpertStatistics

_log = logging.getLogger(__name__)
#: Rows of each expert's matrices that are compared at a time.
_BLOCK = 16


@dataclass(frozen=True)
class CompressionPlan:
    """What is done to a model.

    Attributes:
        options: What was asked for.
        source: Configuration of the model that goes in.
        config: Configuration of the one that comes out.
        layers: Kept layers, in order.
        channels: Kept channels of the residual stream, in order; None for all.
        experts: By layer of the model that goes in, what its experts become. Modules of MTP are
            counted behind its layers.
        neurons: By layer, the kept neurons of each expert that comes out.
        norms: By module, what its norm is multiplied by.
        mtp: Whether modules of MTP stay.
        report: What is to be known of it: by layer, ``dropped_selections``, the share of
            selections that went to experts that are not kept, and where selected weights are not
            renormalised, ``dropped_mass``, the share of the router's probability that they had;
            ``least_tokens`` and ``mean_tokens`` that its experts were selected for.
        calibration: Of which tokens the statistics are; None if nothing was chosen by them.
        warnings: What may be unwanted.
    """

    options: CompressionConfig
    source: dict[str, Any]
    config: dict[str, Any]
    layers: list[int]
    channels: list[int] | None = None
    experts: dict[int, Experts] = field(default_factory=dict)
    neurons: dict[int, list[list[int]]] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)
    mtp: bool = True
    report: dict[str, dict[str, float]] = field(default_factory=dict)
    calibration: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def hash(self) -> str:
        """SHA-256 of all of it."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Return it as JSON."""
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    def save(self, path: str | Path) -> None:
        """Write it as JSON, atomically."""
        write_text(path, self.to_json())

    @classmethod
    def from_json(cls, text: str) -> CompressionPlan:
        """Read what `to_json` wrote."""
        found = json.loads(text)
        found["options"] = CompressionConfig.from_json(json.dumps(found["options"]))
        found["experts"] = {int(k): Experts(**v) for k, v in found["experts"].items()}
        found["neurons"] = {int(k): v for k, v in found["neurons"].items()}
        return cls(**found)

    @classmethod
    def load(cls, path: str | Path) -> CompressionPlan:
        """Read what `save` wrote."""
        return cls.from_json(Path(path).read_text(encoding="utf-8"))


def plan(
    model: Any,
    statistics: CalibrationStatistics | None,
    options: CompressionConfig,
    *,
    minimum_tokens: int = 32,
) -> CompressionPlan:
    """Decide what of a model is kept, and what is averaged.

    It depends on nothing but its arguments, and asks for weights only where experts are compared by
    them.

    Args:
        model: A folder, a model of transformers in memory, or a `slimmoe.weights.Source`.
        statistics: Of `slimmoe.calibrate`; None if nothing is chosen by them.
        options: Sizes and methods.
        minimum_tokens: Of the calibration that an expert should have been selected for; the plan
            warns of those that were not.

    Raises:
        ValueError: Larger sizes than the model has, more experts of a token than of a layer, or
            statistics that are missing or of another model.
        UnsupportedModelError: What the model's plain class cannot express.
    """
    check_range("minimum_tokens", minimum_tokens, 0, 1 << 40, "0 warns of no expert")
    source = model if isinstance(model, Source) else Source(model)
    made = _Planner(source, statistics, options, minimum_tokens).plan()
    for told in made.warnings:
        _log.warning("%s", told)
    return made


def comes_out(match: Match, layers: Collection[int], mtp: bool) -> bool:
    """Return whether a tensor's layer, or its module of MTP, is kept."""
    if match.mtp is not None:
        return mtp
    return match.layer is None or match.layer in layers


class _Planner:
    def __init__(
        self,
        source: Source,
        statistics: CalibrationStatistics | None,
        options: CompressionConfig,
        minimum_tokens: int,
    ) -> None:
        self.source, self.options, self.minimum_tokens = source, options, minimum_tokens
        self.config, self.family = source.config, source.family
        if statistics is None and options.scores:
            remedy = "slimmoe.calibrate(model, data) gives them"
            raise ValueError(message("statistics", "some, for these sizes", None, remedy))
        if statistics is not None:
            self._check(statistics)
        self._statistics = statistics

    def _check(self, statistics: CalibrationStatistics) -> None:
        """Refuse statistics of another model."""
        ours = (self.family.model_type, self.source.layers, int(self.config["hidden_size"]))
        size = len(statistics.embedding.output_sum)
        theirs = (statistics.model_type, len(statistics.layers), size)
        if ours != theirs:
            remedy = "family, layers and channels differ: calibrate with this model"
            raise ValueError(message("statistics", f"those of {ours}", theirs, remedy))

    @property
    def statistics(self) -> CalibrationStatistics:
        assert self._statistics is not None
        return self._statistics

    def plan(self) -> CompressionPlan:
        source, options = self.source, self.options
        layers, channels = self._layers(), self._channels()
        mtp = options.mtp == "compress"
        last = source.layers
        places = [p for p in source.places() if p in layers or (mtp and p >= last)]
        experts = {place: self._experts(place) for place in places} if self._fewer() else {}
        neurons = self._neurons(places, experts)
        count, selected = self._selected()
        norms: dict[str, float] = {}
        if channels is not None and options.rms_correction:
            norms = {
                match.site: width.correction(self._norm(match.site), channels)
                for match in source.matches.values()
                if match.row.norm is not None and comes_out(match, layers, mtp)
            }
        made = resized(
            self.family, self.config, layers=layers, hidden=len(channels or self._all_channels()),
            experts=count, selected=selected, neurons=self._neuron_count(), mtp=mtp,
        )  # fmt: skip
        return CompressionPlan(
            options, self.config, made, layers, channels, experts, neurons, norms, mtp,
            {str(place): self._told(place, found) for place, found in experts.items()},
            self._calibration(), list(self._warnings(layers, places if experts or neurons else [])),
        )  # fmt: skip

    def _calibration(self) -> dict[str, Any] | None:
        if self._statistics is None or not self.options.scores:
            return None
        names = ("tokens", "sequences", "tokens_sha256", "dtype")
        return {name: getattr(self._statistics, name) for name in names}

    def _warnings(self, layers: list[int], places: list[int]) -> Iterator[str]:
        yield from cautions.of_layers(self.config.get("layer_types") or [], layers)
        yield from cautions.of_sizes(self.options, self.config, self.family.neurons)
        if places:
            yield from cautions.of_experts(self.statistics.experts, places, self.minimum_tokens)

    # --- sizes -----------------------------------------------------------------------------------

    def _layers(self) -> list[int]:
        options, count = self.options, self.source.layers
        if options.drop_layers is not None:
            layers = depth.without(count, options.drop_layers)
        elif options.num_layers is None or options.num_layers == count:
            layers = list(range(count))
        elif options.depth_method == "last":
            layers = depth.last(count, options.num_layers)
        else:
            told = self.statistics
            sums = [told.embedding, *(told.layers[layer] for layer in range(count))]
            means = [found.output_sum / found.tokens for found in sums]
            layers = depth.similar(means, options.num_layers)
        kinds = self.config.get("layer_types") or []
        full = "full_attention"
        if full in kinds and full not in [kinds[layer] for layer in layers]:
            raise UnsupportedModelError(
                f"num_layers: none of the layers {layers} has attention over all tokens; keep more"
            )
        return layers

    def _all_channels(self) -> range:
        return range(int(self.config["hidden_size"]))

    def _channels(self) -> list[int] | None:
        size, count = self.options.hidden_size, len(self._all_channels())
        if size is None or size == count:
            return None
        self._smaller("hidden_size", size, count)
        if self.family.no_width:
            raise UnsupportedModelError(
                f"hidden_size: expected {count} for {self.family.model_type}, got {size}; "
                f"{self.family.no_width}"
            )
        norms = {
            match.site: self._norm(match.site)
            for match in self.source.matches.values()
            if match.row.norm is not None and match.mtp is None
        }
        return width.channels(norms, size)

    def _norm(self, site: str) -> Any:
        found = self.statistics.norms.get(site)
        if found is None:
            remedy = "calibrate with the model's MTP modules, or give mtp='drop'"
            raise ValueError(message("statistics", f"those of {site}", None, remedy))
        return found

    def _fewer(self) -> bool:
        count = self.family.count(self.config)
        size = self.options.num_experts
        if size is None or size == count:
            return False
        self._smaller("num_experts", size, count)
        return True

    def _groups(self) -> int:
        """Return groups that the router selects from first."""
        groups = int(self.config.get("n_group") or 1)
        if self.config.get("topk_method") == "greedy" or self.family.model_type == "mixtral":
            return 1
        return groups

    def _selected(self) -> tuple[int, int]:
        """Return numbers of experts of a layer and of a token."""
        count = self.options.num_experts or self.family.count(self.config)
        selected = self.options.num_experts_per_tok or int(self.config["num_experts_per_tok"])
        reach, groups = count, self._groups()
        if groups > 1:
            reach = int(self.config.get("topk_group") or groups) * (count // groups)
            if count // groups < 2:
                remedy = f"its router needs two experts in each of {groups} groups"
                raise ValueError(message("num_experts", f"at least {2 * groups}", count, remedy))
        if selected > reach:
            remedy = f"a token can reach {reach} experts of {count}"
            raise ValueError(message("num_experts_per_tok", f"at most {reach}", selected, remedy))
        return count, selected

    def _neuron_count(self) -> int:
        return self.options.moe_intermediate_size or int(self.config[self.family.neurons])

    def _smaller(self, name: str, size: int, count: int) -> None:
        if size > count:
            raise ValueError(message(name, f"at most {count}", size, "a model is made smaller"))

    # --- experts ---------------------------------------------------------------------------------

    def _found(self, place: int) -> ExpertStatistics:
        found = self.statistics.experts.get(place)
        if found is None:
            remedy = "calibrate with the model's MTP modules, or give mtp='drop'"
            raise ValueError(message("statistics", f"experts of layer {place}", None, remedy))
        return found

    def _experts(self, place: int) -> Experts:
        options, found = self.options, self._found(place)
        count, _ = self._selected()
        scores, alike = importance(found, options.importance), None
        preserve = options.preserve_ratio if options.expert_method == "partial_merge" else 0.0
        if options.expert_method != "prune" and preserve < 1:
            alike = similarity(
                options.similarity, found, lambda: self._router(place),
                lambda: self._parts(place, len(scores)),
            )  # fmt: skip
        return grouped(scores, alike, count, preserve, self._groups(), f"layer {place}")

    def _router(self, place: int) -> Tensor:
        match = next(match for match in self.source.at(place) if match.row.router)
        return self.source.weights.read(match.name)

    def _parts(self, place: int, count: int) -> Iterator[Tensor]:
        """Return the weights of a layer's experts, some rows of each at a time."""
        weights, alone = self.source.weights, {}
        for match in self.source.at(place):
            if match.expert is not None:
                alone.setdefault(match.row.pattern, {})[match.expert] = match.name
            elif Axis.EXPERT in match.row.axes and not match.row.router:
                if len(match.row.axes) < 3:
                    continue
                size = weights.shape(match.name)[1]
                for begin in range(0, size, _BLOCK):
                    yield weights.read(match.name, (slice(None), slice(begin, begin + _BLOCK)))
        for names in alone.values():
            size = weights.shape(names[0])[0]
            for begin in range(0, size, _BLOCK):
                rows = slice(begin, begin + _BLOCK)
                yield torch.stack([weights.read(names[e], rows) for e in range(count)])

    def _neurons(self, places: list[int], experts: Mapping[int, Experts]) -> dict:
        size, count = self._neuron_count(), int(self.config[self.family.neurons])
        if size == count:
            return {}
        self._smaller("moe_intermediate_size", size, count)
        if self.family.no_neurons:
            raise UnsupportedModelError(
                f"moe_intermediate_size: expected {count} for {self.family.model_type}, got "
                f"{size}; {self.family.no_neurons}"
            )
        made = {}
        for place in places:
            found = self._found(place)
            means = found.activation_sum / found.count.clamp(min=1)[:, None]
            ours = experts.get(place) or Experts.alone(list(range(len(means))))
            made[place] = []
            for members, shares in zip(ours.members, ours.weights, strict=True):
                if self.options.alignment == "none":
                    share = torch.tensor(shares, dtype=torch.float64)
                    score = (share[:, None] * means[members]).sum(0)
                else:
                    # the order of neurons is that of the first
                    score = means[members[0]]
                made[place].append(largest(score, size))
        return made

    def _told(self, place: int, experts: Experts) -> dict[str, float]:
        found = self._found(place)
        gone = torch.ones(len(found.count), dtype=torch.bool)
        gone[experts.kept] = False
        told = {"dropped_selections": float(found.count[gone].sum() / found.count.sum()),
                "least_tokens": float(found.count.min()),
                "mean_tokens": float(found.count.mean())}  # fmt: skip
        if not self.family.renormalises(self.config):
            mass = found.probability_sum
            told["dropped_mass"] = float(mass[gone].sum() / mass.sum())
        return told
