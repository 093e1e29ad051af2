"""The losses of GRPO, so that micro batches add up to the whole batch's gradient."""

from __future__ import annotations

from typing import Final

import torch
from shared_kernels._checks import check_choice, message
from torch import Tensor

#: Names and meanings of TRL.
LOSS_TYPES: Final = ("grpo", "bnpo", "dr_grpo", "dapo")
SCALES: Final = ("group", "batch", "none")


def group_advantages(
    rewards: Tensor, group_size: int, *, scale_rewards: str = "group", epsilon: float = 1e-4
) -> Tensor:
    """Return ``(r - mean of its group) / (std + epsilon)``.

    The standard deviation has Bessel's correction, as TRL's. A group whose rewards are all the same
    gets zeros.

    Args:
        rewards: float ``(N,)``, groups one after the other.
        group_size: G; divides N.
        scale_rewards: By the deviation of the ``group``, of the ``batch``, or ``none``.
        epsilon: Added to the deviation.

    Raises:
        ValueError: N is no multiple of G, or an unknown scale.
    """
    check_choice("scale_rewards", scale_rewards, SCALES)
    if group_size < 1 or rewards.dim() != 1 or len(rewards) % group_size:
        wanted = f"a multiple of the {group_size} rewards of a group"
        raise ValueError(message("rewards", wanted, rewards, "gather whole groups"))
    groups = rewards.view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    if scale_rewards == "group":
        deviation = groups.std(1, keepdim=True) if group_size > 1 else torch.zeros_like(centred)
        centred = centred / (deviation + epsilon)
    elif scale_rewards == "batch":
        deviation = rewards.std() if len(rewards) > 1 else torch.zeros_like(rewards.mean())
        centred = centred / (deviation + epsilon)
    return centred.reshape(-1)


def loss_items(mask: Tensor, loss_type: str, max_completion_length: int) -> float:
    """Return what a loss is divided by: of a whole batch, or of a part of it to be added up.

    Sequences for ``grpo``, tokens for ``bnpo`` and ``dapo``, sequences times their most tokens for
    ``dr_grpo``. (TRL's ``bnpo`` counts the tokens of the local batch, its ``dapo`` those of all
    processes: here the caller sums over what it wants.)
    """
    check_choice("loss_type", loss_type, LOSS_TYPES)
    if loss_type == "grpo":
        return float(len(mask))
    if loss_type == "dr_grpo":
        return float(len(mask) * max_completion_length)
    return float(mask.sum())


def grpo_loss(
    logps: Tensor,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    num_items: float,
    loss_type: str = "dapo",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    beta: float = 0.0,
    use_bias_correction_kl: bool = False,
) -> Tensor:
    """Return the clipped policy-gradient loss of a part of a batch.

    Of each token ``-min(rho A, clip(rho, 1 - eps, 1 + eps_high) A) + beta k3`` with
    ``rho = exp(logp - old)`` and ``k3 = e^d - d - 1``, ``d = ref - logp`` (arXiv:2402.03300, DAPO
    arXiv:2503.14476, Dr. GRPO arXiv:2503.20783). ``grpo`` takes the mean of each sequence first.
    Sums are divided by ``num_items``, which is the whole batch's: the losses of its parts add up to
    its loss, and their gradients to its gradient.

    Args:
        logps: float ``(B, T)``, log-probabilities of the tokens.
        old_logps: Of the policy that sampled them; None if it is this one, whose ratio is 1 and has
            a gradient.
        ref_logps: Of the reference policy, needed if ``beta`` is not 0.
        advantages: float ``(B,)``.
        mask: ``(B, T)``, 1 for tokens that count; values elsewhere may be anything.
        num_items: See `loss_items`.
        loss_type: One of `LOSS_TYPES`.
        epsilon: Of the clip.
        epsilon_high: Of the clip above; ``epsilon`` by default.
        beta: Weight of the divergence from the reference.
        use_bias_correction_kl: Weigh the divergence by rho, so that its gradient is unbiased off
            the policy (DeepSeek-V3.2, arXiv:2512.02556); TRL 1.16 does so by default.

    Raises:
        ValueError: Shapes that do not fit, an unknown type, or no reference for ``beta``.
    """
    check_choice("loss_type", loss_type, LOSS_TYPES)
    for name, x, shape in (
        ("old_logps", old_logps, logps.shape), ("ref_logps", ref_logps, logps.shape),
        ("mask", mask, logps.shape), ("advantages", advantages, logps.shape[:1]),
    ):  # fmt: skip
        if x is not None and x.shape != shape:
            raise ValueError(message(name, f"shape {tuple(shape)}", x, "one per token or sequence"))
    if not num_items > 0:
        raise ValueError(message("num_items", "a positive number", num_items, "see loss_items"))
    if beta and ref_logps is None:
        raise ValueError(message("ref_logps", "a tensor where beta is not 0", None, "or beta=0"))
    counted = mask.bool()
    # what does not count may hold anything, and must have no gradient
    new = torch.where(counted, logps, 0.0)
    old = new.detach() if old_logps is None else torch.where(counted, old_logps, 0.0)
    ratio = (new - old).exp()
    high = epsilon if epsilon_high is None else epsilon_high
    gain = advantages[:, None]
    per_token = -torch.minimum(ratio * gain, ratio.clamp(1 - epsilon, 1 + high) * gain)
    if beta and ref_logps is not None:
        d = torch.where(counted, ref_logps, 0.0) - new
        divergence = d.exp() - d - 1
        if use_bias_correction_kl:
            divergence = ratio * divergence
        per_token = per_token + beta * divergence
    per_token = torch.where(counted, per_token, 0.0)
    if loss_type == "grpo":
        return (per_token.sum(1) / counted.sum(1).clamp(min=1)).sum() / num_items
    return per_token.sum() / num_items
