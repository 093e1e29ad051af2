"""Random problems of attention over a shared prefix, and a float64 answer row by row."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from shared_kernels.ops.prefix_attention.layout import PrefixLayout

__all__ = ["PrefixProblem", "make_problem"]


@dataclass(frozen=True)
class PrefixProblem:
    """Arguments of `shared_prefix_attention`.

    Attributes:
        tensors: q, k, v, shared k, shared v.
        layout: Of the rows.
        options: Keyword arguments.
    """

    tensors: tuple[Tensor, ...]
    layout: PrefixLayout
    options: dict[str, Any] = field(default_factory=dict)

    def to(self, device: str | None = None, dtype: torch.dtype | None = None) -> "PrefixProblem":
        """Return the same elsewhere, or of another dtype."""
        options = dict(self.options)
        if options.get("sinks") is not None:
            options["sinks"] = options["sinks"].to(device)
        return replace(
            self, tensors=tuple(t.to(device, dtype) for t in self.tensors), options=options
        )

    def run(self, function: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Call the function."""
        return function(*self.tensors, self.layout, **self.options, **options)

    def expected(self) -> tuple[Tensor, Tensor, float]:
        """Compute in float64, by torch's attention over a copy of the prefix for each row.

        Returns:
            Output, log-sum-exp, and the largest absolute logit.
        """
        q, k, v, shared_k, shared_v = (t.double().cpu() for t in self.tensors)
        scale, window, softcap, sinks = (
            self.options.get(name) for name in ("scale", "window", "softcap", "sinks")
        )
        scale = q.shape[2] ** -0.5 if scale is None else scale
        group = q.shape[1] // k.shape[1]
        outs, lses, largest = [], [], 0.0
        for q0, count, own, keys, start, prefix, *ancestors in self.layout.rows.tolist():
            shared = range(start, start + prefix)
            chains = zip(ancestors[::2], ancestors[1::2], strict=True)
            packed = [p for low, n in (*chains, (own, keys)) for p in range(low, low + n)]
            row_k, row_v = (
                torch.cat([s[list(shared)], x[packed]]).repeat_interleave(group, 1).transpose(0, 1)
                for s, x in ((shared_k, k), (shared_v, v))
            )
            total = row_k.shape[1]
            place = torch.arange(total)
            behind = place[total - count :, None] - place
            seen = behind >= 0 if window is None else (behind >= 0) & (behind < window)
            row_q = q[q0 : q0 + count].transpose(0, 1)
            bias = torch.zeros(count, total, dtype=q.dtype).masked_fill(~seen, float("-inf"))
            logits = row_q @ row_k.mT * scale
            logits = softcap * torch.tanh(logits / softcap) if softcap is not None else logits
            largest = max(largest, float(logits.abs().max()) if logits.numel() else 0.0)
            lse = (logits + bias).logsumexp(-1)
            if softcap is None:
                out = scaled_dot_product_attention(row_q, row_k, row_v, bias, scale=scale)
            else:
                out = (logits + bias).softmax(-1) @ row_v
            if sinks is not None:
                joined = torch.logaddexp(lse, sinks.double().cpu()[:, None])
                out, lse = out * (lse - joined).exp()[..., None], joined
            outs.append(out.transpose(0, 1))
            lses.append(lse.mT)
        if not outs:
            return q.new_empty(0, q.shape[1], v.shape[2]), q.new_empty(q.shape[:2]), largest
        return torch.cat(outs), torch.cat(lses), largest


def make_problem(
    lengths: Sequence[int],
    *,
    prefix: int | Sequence[int] = 0,
    ancestors: Sequence[Sequence[tuple[int, int]]] | None = None,
    group: int = 1,
    heads: int = 2,
    dim: int = 16,
    value_dim: int | None = None,
    sinks: bool = False,
    peak: float = 1.0,
    seed: int = 0,
    **options: Any,
) -> PrefixProblem:
    """Make a random problem in float32.

    Args:
        lengths: Queries, and own keys, of each row.
        prefix: Shared keys that each row sees, from the first one on.
        ancestors: As `PrefixLayout.build` takes them.
        group: Query heads that share a key head.
        heads: Key heads.
        dim: Of queries and keys.
        value_dim: Of values; ``dim`` by default.
        sinks: Whether to make sinks.
        peak: Scale of the queries: large ones make attention peaky.
        seed: Equal arguments give equal problems.
        **options: Further arguments of the function.
    """
    generator = torch.Generator().manual_seed(seed)
    seen = [prefix] * len(lengths) if isinstance(prefix, int) else list(prefix)
    layout = PrefixLayout.build(
        lengths, shared=[(0, length) for length in seen], ancestors=ancestors
    )

    def randn(rows: int, heads: int, width: int) -> Tensor:
        return torch.randn(rows, heads, width, generator=generator)

    width = dim if value_dim is None else value_dim
    total, shared = sum(lengths), max(seen, default=0)
    tensors = (
        randn(total, heads * group, dim) * peak,
        randn(total, heads, dim),
        # a mean of the values makes lost weight show
        randn(total, heads, width) + 1,
        randn(shared, heads, dim),
        randn(shared, heads, width) + 1,
    )
    if sinks:
        options["sinks"] = torch.randn(heads * group, generator=generator)
    return PrefixProblem(tensors, layout, options)
