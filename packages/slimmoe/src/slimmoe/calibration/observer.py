"""Sums what passes through a model's norms, layers, routers and experts while it runs."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from slimmoe.calibration.experts import recording
from slimmoe.calibration.statistics import ExpertStatistics, LayerStatistics, NormStatistics

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

    from slimmoe.calibration.experts import Assignments
    from slimmoe.mtp import MTPHead

# Bytes of the float64 copies that are made at a time on a GPU.
_COPY_BYTES = 256 << 20


class Routed(NamedTuple):
    """The experts of a layer and the router before them."""

    experts: Any
    router: nn.Module


class Anatomy:
    """Where a model's layers, norms, routers and experts are.

    Found by structure, not by the names of classes: the layers are the list of modules as long as
    the configuration says; a norm of the residual stream is a child of a layer or of the base
    model whose only parameter is a ``weight`` ``[H]`` (norms inside attention are deeper); experts
    are a child ``experts`` with a ``down_proj`` of three axes; their router is the sibling with
    ``[E, H]`` weights.

    Attributes:
        base: The model without its head.
        prefix: Of names in a checkpoint, with a dot.
        layers: The decoder layers.
        norms: By index of layer; those after the layers are at -1.
        routed: By index of layer.
        mtp: Indices of modules of multi-token prediction, behind those of layers.

    Raises:
        ValueError: No decoder layers, or experts that cannot be observed.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.base = model.base_model
        self.prefix = f"{model.base_model_prefix}."
        text = model.config.get_text_config()
        lists = [
            (name, child)
            for name, child in self.base.named_children()
            if isinstance(child, nn.ModuleList) and len(child) == text.num_hidden_layers
        ]
        if len(lists) != 1:
            raise ValueError(
                f"{type(model).__name__} has no list of {text.num_hidden_layers} decoder layers; "
                "give a decoder-only language model"
            )
        self._list, self.layers = lists[0]
        self.norms: dict[int, dict[str, nn.Module]] = {-1: _norms(self.base, text.hidden_size)}
        self.routed: dict[int, Routed] = {}
        self.mtp: set[int] = set()
        for index, layer in enumerate(self.layers):
            self.norms[index] = _norms(layer, text.hidden_size)
            found = [
                block
                for block in layer.modules()
                if getattr(getattr(getattr(block, "experts", None), "down_proj", None), "ndim", 0)
                == 3
            ]
            if len(found) > 1:
                raise ValueError(f"{self.name(index)} has experts twice; that is not supported")
            for block in found:
                self.routed[index] = self._routed(index, block)

    def join(self, head: MTPHead) -> None:
        """Add modules of multi-token prediction, as layers behind the last.

        Their norms have the names that they have in the checkpoint.
        """
        for depth, module in enumerate(head.modules_):
            index = len(self.layers) + depth
            self.mtp.add(index)
            self.norms[index] = head.norms(depth)
            for block in module.modules():
                if getattr(getattr(block, "experts", None), "down_proj", None) is not None:
                    self.routed[index] = self._routed(index, block)

    def name(self, layer: int, child: str = "") -> str:
        """Name in the checkpoint of a layer, of its child, or of a child of the base model (-1)."""
        if layer in self.mtp and child in self.norms[layer]:
            return child
        names = [] if layer < 0 else [self._list, str(layer)]
        return self.prefix + ".".join([*names, child] if child else names)

    def _routed(self, index: int, block: Any) -> Routed:
        experts = block.experts
        count, hidden = experts.num_experts, self.model.config.get_text_config().hidden_size
        routers = [
            child
            for child in block.children()
            if child is not experts
            and getattr(getattr(child, "weight", None), "shape", None) == (count, hidden)
        ]
        # what the functions of transformers know of experts, and ours do not
        unknown = not experts.has_gate or getattr(experts, "has_post_expert_norm", False)
        if len(routers) != 1 or unknown:
            raise ValueError(
                f"{self.name(index)}: expected gated experts beside one router with weights "
                f"({count}, {hidden}), got {type(block).__name__}; this family is not supported"
            )
        return Routed(experts, routers[0])


def _norms(parent: nn.Module, hidden: int) -> dict[str, nn.Module]:
    found = {}
    for name, child in parent.named_children():
        parameters = dict(child.named_parameters())
        if list(parameters) == ["weight"] and parameters["weight"].shape == (hidden,):
            found[name] = child
    return found


class Observer:
    """Accumulates statistics of the layers that are being watched.

    Sums over tokens are taken in float64, whatever the model computes in; what is summed (a norm,
    a square) is computed in float32, or in float64 where the model is. Nothing is kept per token.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        self._anatomy = anatomy
        self._counted: Tensor | None = None
        self._tokens = 0
        self._rows: dict[torch.device, Tensor] = {}
        # by layer (-1: what is after the layers), then by name of the part
        self._sums: dict[int, dict[str, dict[str, Any]]] = {}

    def expect(self, tokens: int, counted: Tensor | None) -> None:
        """Say how many, and which ``[B, T]``, tokens of the coming batch count; None if all do."""
        self._counted = counted
        self._tokens = tokens
        self._rows = {}

    @contextmanager
    def watching(self, layers: Iterable[int], *, start: bool, end: bool) -> Generator[None]:
        """Sum what passes while this is open.

        Args:
            layers: Indices of layers.
            start: Also what enters layer 0.
            end: Also the norms after the layers.
        """
        anatomy = self._anatomy
        layers = list(layers)
        recorders = {}
        with ExitStack() as stack:

            def hook(handle: Any) -> None:
                stack.callback(handle.remove)

            for index in layers:
                self._sums.setdefault(index, {})
                if index not in anatomy.mtp:
                    layer = anatomy.layers[index]
                    hook(layer.register_forward_hook(partial(self._layer_hook, index)))
                if index in anatomy.routed:
                    experts, router = anatomy.routed[index]
                    recorders[experts] = partial(self._experts_hook, index, experts.num_experts)
                    hook(router.register_forward_hook(partial(self._router_hook, index)))
            if start:
                first = anatomy.layers[0]
                hook(first.register_forward_pre_hook(self._start_hook, with_kwargs=True))
            for index in [*layers, -1] if end else layers:
                for name, norm in anatomy.norms[index].items():
                    hook(norm.register_forward_hook(partial(self._norm_hook, index, name)))
            if recorders:
                stack.enter_context(recording(anatomy.model, recorders))
            yield

    def check(self, *, everything: bool) -> None:
        """Look for sums that are not finite.

        Args:
            everything: Look at all sums; otherwise only at those of the residual stream, into
                which everything goes that the model computes.

        Raises:
            FloatingPointError: Names the first part, in the order in which the model runs, and its
                layer.
        """
        by_device: dict[torch.device, list[tuple[str, Tensor]]] = {}
        for layer in self._order():
            for part, fields in self._sums[layer].items():
                place = self._anatomy.name(layer, part)
                for field, value in fields.items():
                    if field != "tokens" and (everything or (field == "output_sum" and not part)):
                        flag = value.isfinite().all()
                        by_device.setdefault(value.device, []).append((f"{place}: {field}", flag))
        bad = [
            place
            for flags in by_device.values()
            # one wait for the device
            for (place, _), good in zip(
                flags, torch.stack([flag for _, flag in flags]).tolist(), strict=True
            )
            if not good
        ]
        if bad and not everything:
            self.check(everything=True)
        if bad:
            raise FloatingPointError(
                f"{bad[0]} is not finite; look for NaN or infinite weights there or before, or "
                "for an overflow in the model's dtype"
            )

    def _order(self) -> list[int]:
        """Layers as the model runs them; -1 is what comes after them."""
        return sorted(self._sums, key=lambda layer: (layer < 0, layer))

    def release(self, layer: int) -> None:
        """Move a layer's sums to the host's memory."""
        for fields in self._sums.get(layer, {}).values():
            for name, value in fields.items():
                if isinstance(value, Tensor):
                    fields[name] = value.cpu()

    def statistics(self) -> dict[str, Any]:
        """The sums, by the names of `CalibrationStatistics`.

        Raises:
            RuntimeError: Experts of a layer computed without being seen.
        """
        self.check(everything=True)
        for layer in self._anatomy.routed:
            parts = self._sums[layer]
            seen = parts.get("experts", {}).get("tokens", 0)
            # a module of MTP is no layer, but has norms
            ran = parts.get("") or next(parts[name] for name in self._anatomy.norms[layer])
            if seen != ran["tokens"]:
                raise RuntimeError(
                    f"{self._anatomy.name(layer)}: its experts ran past transformers' registry of "
                    "experts functions (a quantized or replaced module?); they cannot be observed"
                )
        found: dict[str, Any] = {"experts": {}, "norms": {}, "layers": {}}
        for layer in self._order():
            self.release(layer)
            for name, fields in self._sums[layer].items():
                if name == "embedding":
                    found["embedding"] = LayerStatistics(**fields)
                elif name == "experts":
                    found["experts"][layer] = ExpertStatistics(**fields)
                elif name == "":
                    found["layers"][layer] = LayerStatistics(**fields)
                else:
                    found["norms"][self._anatomy.name(layer, name)] = NormStatistics(**fields)
        return found

    def _start_hook(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self._add(0, "embedding", tokens=self._tokens, output_sum=_sum(self._select(hidden)))

    def _layer_hook(self, index: int, _module: nn.Module, _args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        self._add(index, "", tokens=self._tokens, output_sum=_sum(self._select(hidden)))

    def _norm_hook(
        self, index: int, name: str, _module: nn.Module, args: Any, output: Tensor
    ) -> None:
        x, y = self._select(args[0]), self._select(output)
        self._add(
            index, name, tokens=self._tokens,
            output_abs_sum=_sum(y.abs()), input_square_sum=_sum(_wide(x).square()),
        )  # fmt: skip

    def _router_hook(self, index: int, module: Any, _args: Any, output: Any) -> None:
        # logits come first in every family, before weights and indices, which are k wide
        first = output[0] if isinstance(output, tuple) else output
        if first.shape[-1] != len(module.weight) or not first.is_floating_point():
            raise ValueError(
                f"{self._anatomy.name(index)}: expected a router that returns its logits first, "
                f"got {tuple(first.shape)}; this family is not supported"
            )
        logits = _wide(self._select(first))
        exact = logits.double()
        self._add(
            index, "experts",
            logit_gram=exact.t() @ exact, probability_sum=_sum(logits.softmax(-1)),
        )  # fmt: skip

    def _experts_hook(self, index: int, experts: int, weights: Tensor, made: Assignments) -> None:
        exact = weights.double()
        shares = exact / exact.sum(-1, keepdim=True)
        if self._counted is not None:
            keep = self._counted.to(weights.device).flatten()[made.token].nonzero().flatten()
            made = type(made)(*(field[keep] for field in made))
        weight, share = (w[made.token, made.slot] for w in (exact, shares))
        norm = torch.linalg.vector_norm(_wide(made.output), dim=-1).double()
        count = torch.bincount(made.expert, minlength=experts)
        columns = torch.stack([weight, share, norm, weight * norm], -1)
        weight_sum, share_sum, norm_sum, weighted_norm_sum = segment_sum(columns, count).unbind(-1)
        self._add(
            index, "experts", tokens=self._tokens,
            count=count.double(), weight_sum=weight_sum, share_sum=share_sum,
            norm_sum=norm_sum, weighted_norm_sum=weighted_norm_sum,
            norm_max=norm.new_zeros(experts).scatter_reduce(0, made.expert, norm, "amax"),
            output_sum=segment_sum(made.output, count),
            activation_sum=segment_sum(made.activation, count, absolute=True),
        )  # fmt: skip

    def _add(self, layer: int, part: str, **values: Any) -> None:
        sums = self._sums.setdefault(layer, {}).setdefault(part, {})
        for name, value in values.items():
            if name not in sums:
                sums[name] = value
            elif name == "norm_max":
                sums[name] = torch.maximum(sums[name], value)
            else:
                sums[name] += value

    def _select(self, x: Tensor) -> Tensor:
        """Rows ``[tokens, ...]`` of the tokens that count."""
        rows = x.flatten(0, -2)
        if self._counted is None:
            return rows
        if x.device not in self._rows:
            self._rows[x.device] = self._counted.flatten().nonzero().flatten().to(x.device)
        return rows[self._rows[x.device]]


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype.itemsize < 4 else x


def _sum(x: Tensor) -> Tensor:
    return x.sum(0, dtype=torch.float64)


def segment_sum(x: Tensor, lengths: Tensor, *, absolute: bool = False) -> Tensor:
    """Sum consecutive rows in float64, in a fixed order.

    Args:
        x: ``[S, N]``.
        lengths: ``[E]`` int64, rows of each sum; they add up to S.
        absolute: Sum absolute values.

    Returns:
        ``[E, N]`` float64.
    """
    out = x.new_zeros(len(lengths), x.shape[1], dtype=torch.float64)
    if x.is_cuda:
        return _segment_sum_at_once(x, lengths, out, absolute)
    ends = [0, *lengths.cumsum(0).tolist()]
    for row, (start, end) in zip(out, pairwise(ends), strict=True):
        part = x[start:end].abs() if absolute else x[start:end]
        torch.sum(part, 0, dtype=torch.float64, out=row)
    return out


def _segment_sum_at_once(x: Tensor, lengths: Tensor, out: Tensor, absolute: bool) -> Tensor:
    """Without a launch per expert, or waiting for the lengths; costs a copy of some columns."""
    reduce: Any = torch.segment_reduce  # ty: ignore[missing-attribute]
    width = max(1, _COPY_BYTES // (8 * max(1, len(x))))
    for at in range(0, x.shape[1], width):
        part = x[:, at : at + width].double()
        part = part.abs() if absolute else part
        out[:, at : at + width] = reduce(part, "sum", lengths=lengths, unsafe=True)
    return out
