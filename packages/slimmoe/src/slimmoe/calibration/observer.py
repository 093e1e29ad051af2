"""Sums what passes through a model's norms, layers, routers and experts while it runs."""

from __future__ import annotations

import math
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from shared_kernels.ops.segments import AssignmentSums, assignment_sums, norm_sums, segment_sums
from torch import Tensor, nn

from slimmoe.calibration.experts import recording
from slimmoe.calibration.statistics import ExpertStatistics, LayerStatistics, NormStatistics

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

    from slimmoe.calibration.experts import Assignments
    from slimmoe.mtp import MTPHead

# Statistics of the columns that `assignment_sums` makes, in its order.
_COLUMNS = ("count", "weight_sum", "share_sum", "norm_sum", "weighted_norm_sum", "norm_max")


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
    a square) is computed in float32, or in float64 where the model is. Nothing is kept per token,
    and no hook waits for a GPU.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        self._anatomy = anatomy
        self._counted: Tensor | None = None
        self._tokens = 0
        self._masks: dict[torch.device, Tensor] = {}
        # by layer; the statistics of experts are views of these
        self._assigned: dict[int, AssignmentSums] = {}
        # by layer (-1: what is after the layers), then by name of the part
        self._sums: dict[int, dict[str, dict[str, Any]]] = {}

    def expect(self, tokens: int, counted: Tensor | None) -> None:
        """Say how many, and which ``[B, T]``, tokens of the coming batch count; None if all do."""
        self._counted = counted
        self._tokens = tokens
        self._masks = {}

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
                    recorders[experts] = partial(self._experts_hook, index)
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
                        by_device.setdefault(value.device, []).append((f"{place}: {field}", value))
        bad = []
        for named in by_device.values():
            # one wait for the device; where a number is not finite, the sum is not either
            totals = torch.stack([value.sum() for _, value in named]).tolist()
            bad += [
                place
                for (place, value), total in zip(named, totals, strict=True)
                if not (math.isfinite(total) or value.isfinite().all())
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
        """Move a layer's sums to the host's memory, in one copy from a device."""
        by_device: dict[torch.device, list[tuple[dict[str, Any], str]]] = {}
        for fields in self._sums.get(layer, {}).values():
            for name, value in fields.items():
                # views of columns, on a CPU, would keep the columns of the others
                if isinstance(value, Tensor) and (value.is_cuda or not value.is_contiguous()):
                    by_device.setdefault(value.device, []).append((fields, name))
        for held in by_device.values():
            values = [fields[name] for fields, name in held]
            flat = torch.cat([value.flatten() for value in values]).cpu()
            parts = flat.split([value.numel() for value in values])
            for (fields, name), value, part in zip(held, values, parts, strict=True):
                fields[name] = part.view(value.shape)
        self._assigned.pop(layer, None)

    def statistics(self) -> dict[str, Any]:
        """The sums, by the names of `CalibrationStatistics`.

        Raises:
            RuntimeError: Experts of a layer computed without being seen.
        """
        # while sums are on a device, which adds them faster
        self.check(everything=True)
        for layer in self._sums:
            self.release(layer)
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
        self._stream(0, "embedding", args[0] if args else kwargs["hidden_states"])

    def _layer_hook(self, index: int, _module: nn.Module, _args: Any, output: Any) -> None:
        self._stream(index, "", output[0] if isinstance(output, tuple) else output)

    def _stream(self, layer: int, part: str, hidden: Tensor) -> None:
        rows = hidden.flatten(0, -2)
        sums = self._part(layer, part, rows.device, output_sum=rows.shape[1:])
        self._count(sums)
        segment_sums(rows, keep=self._keep(rows.device), out=sums["output_sum"][None])

    def _norm_hook(
        self, index: int, name: str, _module: nn.Module, args: Any, output: Tensor
    ) -> None:
        y = output.flatten(0, -2)
        x = args[0].flatten(0, -2).to(y.device)
        width = y.shape[1:]
        sums = self._part(index, name, y.device, output_abs_sum=width, input_square_sum=width)
        self._count(sums)
        out = sums["input_square_sum"], sums["output_abs_sum"]
        norm_sums(x, y, keep=self._keep(y.device), out=out)

    def _router_hook(self, index: int, module: Any, _args: Any, output: Any) -> None:
        # logits come first in every family, before weights and indices, which are k wide
        first = output[0] if isinstance(output, tuple) else output
        experts = len(module.weight)
        if first.shape[-1] != experts or not first.is_floating_point():
            raise ValueError(
                f"{self._anatomy.name(index)}: expected a router that returns its logits first, "
                f"got {tuple(first.shape)}; this family is not supported"
            )
        logits = first.flatten(0, -2)
        keep = self._keep(logits.device)
        if keep is not None:
            logits = torch.where(keep[:, None], logits, 0)
        exact = logits.double()
        sums = self._part(
            index, "experts", logits.device,
            logit_gram=(experts, experts), probability_sum=(experts,),
        )  # fmt: skip
        sums["logit_gram"].addmm_(exact.t(), exact)
        wide = torch.float32 if logits.dtype.itemsize < 4 else logits.dtype
        shares = logits.softmax(-1, dtype=wide)
        segment_sums(shares, keep=keep, out=sums["probability_sum"][None])

    def _experts_hook(self, index: int, weights: Tensor, made: Assignments) -> None:
        device, experts = weights.device, len(made.count)
        inner, width = made.activation.shape[1], made.output.shape[1]
        sums = self._part(index, "experts", device, activation_sum=(experts, inner))
        self._count(sums)
        if index not in self._assigned:
            assigned = AssignmentSums.empty(experts, width, device=device)
            self._assigned[index] = assigned
            sums["output_sum"] = assigned.output
            sums |= zip(_COLUMNS, assigned.columns.unbind(-1), strict=True)
        shares = weights / weights.sum(-1, keepdim=True, dtype=torch.float64)
        weight, share = (w.flatten()[made.place] for w in (weights, shares))
        keep = self._keep(device)
        keep = None if keep is None else keep[made.token]
        assignment_sums(
            made.output, weight, share, made.count, keep=keep, out=self._assigned[index]
        )
        segment_sums(made.activation, made.count, kind="abs", keep=keep, out=sums["activation_sum"])

    def _part(
        self, layer: int, part: str, device: torch.device, **shapes: tuple[int, ...]
    ) -> dict[str, Any]:
        """The sums of a part, which begin with zeros."""
        sums = self._sums.setdefault(layer, {}).setdefault(part, {})
        for name, shape in shapes.items():
            if name not in sums:
                sums[name] = torch.zeros(shape, dtype=torch.float64, device=device)
        return sums

    def _count(self, sums: dict[str, Any]) -> None:
        sums["tokens"] = sums.get("tokens", 0) + self._tokens

    def _keep(self, device: torch.device) -> Tensor | None:
        """Which rows ``[tokens]`` count; None if all do."""
        if self._counted is None:
            return None
        if device not in self._masks:
            self._masks[device] = self._counted.flatten().to(device)
        return self._masks[device]
