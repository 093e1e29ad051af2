"""The load of experts, and a loss that evens it out over all batches of a step."""

from __future__ import annotations

import math
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from shared_kernels._checks import message
from torch.autograd.function import once_differentiable

from slimmoe.calibration.observer import Anatomy

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence

    from torch import Tensor, nn

    from slimmoe.mtp.modeling_mtp import MTPHead


class Router(NamedTuple):
    """A router of a model or of its modules of MTP.

    Attributes:
        module: It.
        experts: How many it chooses from, N.
        depth: 0 in the model, k in the module of depth k, whose rows are k fewer.
    """

    module: nn.Module
    experts: int
    depth: int


class Routing(NamedTuple):
    """What a router says of rows: logits ``(R, N)``, and whom it chooses, ``(R, k)``."""

    logits: Tensor
    chosen: Tensor


class LoadBalancing:
    """``alpha N sum_i f_i P_i`` of each router, of which the mean is taken.

    f_i is how often expert i is chosen, for each token, and P_i its mean probability in a softmax
    over all logits; both over tokens that are no padding. f sums to k as in transformers, so that
    coefficients mean the same. There, tokens of all layers are thrown together first, so that
    layers that overload different experts pass for even; here each layer is balanced alone.

    P is of the whole step: its sums are divided by the tokens of all batches and processes. The
    gradient goes through P, which is linear in the batches; f multiplies it. f is of all processes
    always, for the price of adding up one number for each expert and batch; and over batches that
    are accumulated, of those so far in the step, which is what Qwen does (arXiv:2501.11873, section
    3): the first batch of a step knows its own fractions alone, the last those of all. With
    ``ahead`` the step is looked through first, and all batches have those of the whole step: then
    accumulated batches are as one, for another forward pass of all but the first.

    Args:
        model: The student.
        head: Its modules of MTP that are trained with it.
        coefficient: alpha; None is the ``router_aux_loss_coef`` of the model's configuration, 0 if
            it has none.
        add_up: Returns the sum over processes of a tensor.

    Attributes:
        coefficient: alpha.
        routers: By the names of their layers; empty where experts are not of a kind that is known.

    Raises:
        ValueError: A coefficient for a model without experts, or whose routers are balanced by a
            bias; or experts that cannot be observed, with a coefficient.
    """

    def __init__(
        self,
        model: Any,
        head: MTPHead | None,
        coefficient: float | None,
        add_up: Callable[[Tensor], Tensor],
    ) -> None:
        own = getattr(model.config.get_text_config(), "router_aux_loss_coef", None) or 0.0
        wanted = own if coefficient is None else coefficient
        try:
            self.routers = _routers(model, head)
        except ValueError:
            # without a loss, all that is missed is a line in the log
            if wanted:
                raise
            self.routers = {}
        if coefficient:
            kind = model.config.model_type
            biased = [name for name, router in self.routers.items()
                      if hasattr(router.module, "e_score_correction_bias")]  # fmt: skip
            if not self.routers:
                remedy = f"{kind} has no routers here"
                raise ValueError(message("router_aux_loss_coef", "0", coefficient, remedy))
            if biased:
                remedy = f"routers of {kind} are sigmoids, which a bias balances, and no loss"
                raise ValueError(message("router_aux_loss_coef", "0", coefficient, remedy))
        self.coefficient = float(wanted) if self.routers else 0.0
        self._add_up = add_up
        #: Of the step: batches to come, its tokens by depth, and what was chosen in it so far.
        self._left = 0
        self._tokens: list[float] = []
        self._known: Tensor | None = None
        self._ahead: Tensor | None = None
        self._window: Tensor | None = None

    # --- batches ---------------------------------------------------------------------------------

    @contextmanager
    def watching(self) -> Generator[dict[str, Routing]]:
        """Give a dictionary that what routers say is put into, by name.

        Logits are those that the model itself keeps for its backward pass; what is computed of
        them is not a part of layers, which may be computed again.
        """
        seen: dict[str, Routing] = {}
        with ExitStack() as stack:
            for name, router in self.routers.items():
                hook = partial(_keep, seen, name, router.experts)
                stack.callback(router.module.register_forward_hook(hook).remove)
            yield seen

    def begin(
        self, tokens: Sequence[float], batches: int, ahead: Sequence[Tensor] | None = None
    ) -> None:
        """Begin a step.

        Args:
            tokens: Of all its batches that are no padding, by depth.
            batches: How many.
            ahead: `counts` of all batches but the first, in this process, if they are known.
        """
        self._left, self._tokens, self._known = batches, list(tokens), None
        self._ahead = None if ahead is None else torch.stack(list(ahead)).sum(0)

    def counts(self, seen: Mapping[str, Routing], masks: Sequence[Tensor]) -> Tensor:
        """Return how often each expert was chosen in a batch, and last its tokens by depth, int64.

        Args:
            seen: Of `watching`.
            masks: By depth, which rows are no padding; see `row_masks`.
        """
        parts = []
        for name, router in self.routers.items():
            chosen, mask = seen[name].chosen, masks[router.depth]
            each = mask.to(chosen.device, torch.int64)[:, None].expand_as(chosen).flatten()
            count = each.new_zeros(router.experts)
            parts.append(count.scatter_add_(0, chosen.flatten().long(), each))
        parts.append(torch.stack([mask.sum() for mask in masks]))
        return torch.cat([part.to(masks[0].device) for part in parts])

    def loss(self, seen: Mapping[str, Routing], masks: Sequence[Tensor]) -> Tensor:
        """Return a batch's share of the loss of its step, without alpha; see `counts`."""
        counts = self.counts(seen, masks)
        self._window = counts if self._window is None else self._window + counts
        if not self.coefficient:
            return torch.zeros((), device=counts.device)
        if not self._left:
            # a batch alone
            self.begin([float(mask.sum()) for mask in masks], 1)
        self._left -= 1
        known, shares = self._known_with(counts), []
        sizes = [router.experts for router in self.routers.values()]
        *chosen, rows = known.split([*sizes, len(masks)])
        for (name, router), count in zip(self.routers.items(), chosen, strict=True):
            logits = seen[name].logits
            if torch.is_grad_enabled() and not logits.requires_grad:
                parameters = list(router.module.parameters())
                if any(p.requires_grad for p in parameters):
                    raise ValueError(
                        f"{name}: its router has no gradient, as where layers are computed again "
                        "without one; give gradient_checkpointing_kwargs={'use_reentrant': False}"
                    )
            mass = summed_probabilities(logits, masks[router.depth].to(logits.device))
            mass = mass / max(1.0, self._tokens[router.depth])
            often = count / rows[router.depth].clamp(min=1)
            shares.append(router.experts * (often.to(mass) * mass).sum().to(counts.device))
        return torch.stack(shares).mean()

    def _known_with(self, counts: Tensor) -> Tensor:
        """Return what is known of the step, in all processes, with a batch that is new."""
        if self._known is None or self._ahead is None:
            mine = counts if self._ahead is None else counts + self._ahead
            every = self._add_up(mine)
            self._known = every if self._known is None else self._known + every
        return self._known

    # --- what is told ----------------------------------------------------------------------------

    def load(self) -> dict[str, float]:
        """Return how even loads were since the last time, of all processes; nothing if unseen.

        ``load_entropy`` is the mean over routers of the entropy of their experts' shares, 1 where
        they are even and 0 where one has all; ``dead_experts`` how many had none, of all routers.
        """
        if self._window is None or not self.routers:
            return {}
        every = self._add_up(self._window).double().cpu()
        self._window = None
        sizes = [router.experts for router in self.routers.values()]
        loads = every[: sum(sizes)].split(sizes)
        laws = [load / load.sum().clamp(min=1) for load in loads]
        entropies = [-float(torch.xlogy(law, law).sum()) / math.log(max(2, len(law)))
                     for law in laws]  # fmt: skip
        return {
            "load_entropy": sum(entropies) / len(entropies),
            "dead_experts": float(sum(int((load == 0).sum()) for load in loads)),
        }


def row_masks(inputs: Mapping[str, Any], depths: int) -> list[Tensor]:
    """Return, of the model and of each module of MTP, which rows are of tokens alone.

    Args:
        inputs: With ``input_ids`` ``(B, T)``, and a mask if there is padding.
        depths: Of modules.

    Returns:
        bool ``(B (T - k),)`` of depth k: whether both tokens of a row are there.
    """
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    plain = mask is None or mask.ndim != 2
    real = torch.ones_like(ids, dtype=torch.bool) if plain else mask != 0
    size = ids.shape[1]
    return [(real[:, depth:] & real[:, : size - depth]).flatten() for depth in range(depths + 1)]


def not_finite(seen: Mapping[str, Routing]) -> str | None:
    """Return the name of the first layer whose router said what is not finite."""
    for name, routing in seen.items():
        if not bool(routing.logits.detach().isfinite().all()):
            return name
    return None


class _SummedProbabilities(torch.autograd.Function):
    """Keeps logits alone: their softmax in float32 is twice as large, and made again."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, counted: Tensor) -> Tensor:
        ctx.save_for_backward(logits, counted)
        return (_law(logits) * counted[:, None]).sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Any:
        logits, counted = ctx.saved_tensors
        law = _law(logits)
        found = law * (slope - (law * slope).sum(-1, keepdim=True)) * counted[:, None]
        return found.to(logits.dtype), None


def summed_probabilities(logits: Tensor, counted: Tensor) -> Tensor:
    """Return the sum over rows of the softmax of logits, ``(N,)``.

    Args:
        logits: ``(R, N)``.
        counted: bool ``(R,)``, which rows count.
    """
    made: Any = _SummedProbabilities.apply
    return made(logits, counted)


def _law(logits: Tensor) -> Tensor:
    wide = logits.dtype if logits.dtype == torch.float64 else torch.float32
    return logits.softmax(-1, dtype=wide)


def _routers(model: Any, head: MTPHead | None) -> dict[str, Router]:
    anatomy = Anatomy(model)
    if head is not None:
        anatomy.join(head)
    return {
        anatomy.name(index): Router(
            routed.router, routed.experts.num_experts,
            index - len(anatomy.layers) + 1 if index in anatomy.mtp else 0,
        )
        for index, routed in sorted(anatomy.routed.items())
    }  # fmt: skip


def _keep(
    seen: dict[str, Routing], name: str, experts: int, _module: nn.Module, _args: Any, output: Any
) -> None:
    logits, chosen = output[0], output[-1]
    if logits.shape[-1] != experts or chosen.is_floating_point():
        raise ValueError(
            f"{name}: expected a router that returns logits first and whom it chose last, got "
            f"{tuple(logits.shape)} and {chosen.dtype}; this family is not supported"
        )
    seen[name] = Routing(logits.flatten(0, -2), chosen.flatten(0, -2))
