"""Forward passes over rows that continue a prefix, as many tokens at a time as memory takes."""

from __future__ import annotations

import time
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from shared_kernels.models import Head, attention_of, configs_of
from torch import Tensor
from transformers import DynamicCache

from pskv import support
from pskv.attention import NAME, PackedCall
from pskv.backends import AutoBackend, check_backend
from pskv.batching import MicroBatch, attempt
from pskv.graphs import Graphs, rounded
from pskv.planner import PackedLayout, pack, plan, sort_rows
from pskv.work import Work, groups, targets_of

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from shared_kernels.ops.prefix_attention import PrefixLayout

    from pskv.prefix import PrefixCache, SharedPrefix

#: Rows of requests that have this many more tokens in common share them as a prefix.
_WORTH_A_PREFIX = 16
IMPLEMENTATIONS = {"fused": "triton", "split": "split"}
"""Backends that pack rows, and the implementation of the attention that each uses."""


class Passes:
    """A model, and how rows go through it.

    Args:
        model: The transformers model, with or without adapters.
        backend: One of `pskv.backends.BACKENDS`.
        micro_batch: Tokens of a pass, or "auto".
        depth: Of how many packed rows one row may consist.
        deterministic: Never choose by time.
        cuda_graphs: Record passes that wait for the host.
    """

    def __init__(
        self, model: Any, *, backend: str, micro_batch: int | str, depth: int,
        deterministic: bool, cuda_graphs: bool,
    ) -> None:  # fmt: skip
        self.model = model
        self.inner = support.inner_model(model)
        self.base = self.inner.base_model
        self.configs = configs_of(self.inner)
        self.head = Head.of(self.inner)
        self.depth = depth
        self.device = self.inner.get_input_embeddings().weight.device
        self.backend = check_backend(backend, self.device)
        self.auto = AutoBackend(self.device, deterministic=deterministic)
        self.micro = MicroBatch.make(micro_batch, self.device)
        # a graph belongs to one device
        alone = {p.device for p in model.parameters()} == {self.device}
        records = cuda_graphs and not deterministic and self.device.type == "cuda" and alone
        self.graphs = Graphs(model, self.device, enabled=records)

    def tensor(self, array: np.ndarray) -> Tensor:
        """Copy an array to the device without waiting for it."""
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    @property
    def packed_backend(self) -> str:
        """The backend for what only packed rows can do."""
        if self.backend in IMPLEMENTATIONS:
            return self.backend
        return self.auto.best

    @property
    def packed_impl(self) -> str:
        """The implementation of the attention for what only packed rows can do."""
        return IMPLEMENTATIONS[self.packed_backend]

    # -- prefixes --------------------------------------------------------------------------------

    def append(
        self, prefix: SharedPrefix, ids: np.ndarray, chunk: int | None = None,
        table: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Add tokens to a prefix; with a table, the embeddings that ``ids`` number."""
        start = prefix.cache.get_seq_length()
        for layer in prefix.cache.held:
            layer.reserve(start + len(ids))
        step = chunk or max(1, self.micro.tokens)
        for low in range(0, len(ids), step):
            part = self.tensor(ids[low : low + step])[None]
            place = torch.arange(start + low, start + low + part.shape[1], device=self.device)
            tokens = part if table is None else table[part]
            hidden = self._forward(tokens, place[None], prefix.cache)
            prefix.last_hidden = hidden[0, -1:].clone()

    def _forward(self, tokens: Tensor, places: Tensor, cache: Any, **options: Any) -> Tensor:
        """Pass token ids, or embeddings, of rows at some places."""
        name = "inputs_embeds" if tokens.is_floating_point() else "input_ids"
        return self.base(
            **{name: tokens}, position_ids=places, past_key_values=cache, use_cache=True, **options
        ).last_hidden_state

    # -- scores ----------------------------------------------------------------------------------

    def run(self, shared: SharedPrefix, work: Work) -> str:
        """Score all rows, and return the backend that did."""
        backend, done = self._choose(shared, work)
        order, common = sort_rows([row[:-1] for row in work.rows])
        begin = time.perf_counter()
        self._run(shared, work, order, common, 0, backend)
        if done is not None:
            done(time.perf_counter() - begin)
        return backend

    def descend(self, shared: SharedPrefix, work: Work) -> str:
        """Score all rows; what many have in common joins the prefix while they are scored."""
        order, common = sort_rows([row[:-1] for row in work.rows])
        if len(order):
            self._descend(shared, work, order, common, 0)
        return self.packed_backend

    def _descend(
        self, shared: SharedPrefix, work: Work, order: np.ndarray, common: np.ndarray, depth: int
    ) -> None:
        """Score sorted rows whose first ``depth`` tokens are in the prefix."""
        rows = work.rows
        parting = int(common[1:].min(initial=len(rows[order[0]])))
        # the first target of every row must be predicted from here on
        alike = min(parting, int(work.first[order].min()))
        held = (shared.cache.get_seq_length(), shared.last_hidden)
        if len(order) > 1 and alike - depth >= _WORTH_A_PREFIX:
            self.append(shared, rows[order[0]][depth:alike])
            depth = alike
        lengths = np.array([len(rows[row]) for row in order], dtype=np.int64) - depth
        new = lengths - np.concatenate([[0], np.maximum(common[1:] - depth, 0)])
        if new.sum() <= self.micro.tokens or len(order) == 1:
            self._run(shared, work, order, common, depth, self.packed_backend)
        else:
            for part in groups(new, np.flatnonzero(common[1:] == parting) + 1, self.micro.tokens):
                self._descend(shared, work, order[part], common[part], depth)
        shared.cache.truncate(held[0])
        shared.last_hidden = held[1]

    def _run(
        self,
        shared: SharedPrefix,
        work: Work,
        order: np.ndarray,
        common: np.ndarray,
        depth: int,
        backend: str,
    ) -> None:
        """Score sorted rows whose first ``depth`` tokens are in the prefix already."""
        common = np.maximum(common - depth, 0)
        lengths = np.array([len(work.rows[row]) for row in order], dtype=np.int64) - depth - 1
        low = 0
        while low < len(order):
            extra = shared.length if backend == "none" else 0
            high = self._cut(backend, lengths + extra, common, low)
            tokens = int((lengths[low:high] - common[low:high]).sum() + common[low])
            step = partial(
                self._pass, shared, work, order[low:high], common[low:high], depth, backend
            )
            _, problem = attempt(partial(self._measured, step, tokens))
            if problem is None:
                self.micro.succeeded()
                if work.advance is not None:
                    work.advance(high - low)
                low = high
            elif high - low == 1:
                raise torch.OutOfMemoryError(
                    f"{problem}; one row of {lengths[low]} tokens after a prefix of "
                    f"{shared.cache.get_seq_length()} does not fit: shorten it, or free memory"
                )
            else:
                self.graphs.clear()
                self.micro.failed(tokens)

    def _cut(self, backend: str, lengths: np.ndarray, common: np.ndarray, low: int) -> int:
        """Return where the rows of a pass that begins at ``low`` end."""
        if backend in IMPLEMENTATIONS:
            new = lengths[low:] - common[low:]
            new[0] += common[low]
            fits = np.cumsum(new) <= self.micro.tokens
        else:
            widest = np.maximum.accumulate(lengths[low:])
            fits = widest * np.arange(1, len(widest) + 1) <= self.micro.tokens
        return low + max(1, int(fits.sum()))

    def _measured(self, step: Callable[[], None], tokens: int) -> None:
        if self.micro.fitted or self.device.type != "cuda" or tokens < 256:
            step()
            return
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        step()
        used = torch.cuda.max_memory_allocated(self.device) - before
        free, _ = torch.cuda.mem_get_info(self.device)
        free += torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        self.micro.fit(tokens, used, free)

    def _pass(
        self,
        shared: SharedPrefix,
        work: Work,
        order: np.ndarray,
        common: np.ndarray,
        depth: int,
        backend: str,
    ) -> None:
        common = common.copy()
        common[0] = 0
        rows = [work.rows[row][depth:-1] for row in order.tolist()]
        packs = backend in IMPLEMENTATIONS
        packed = pack(rows, np.arange(len(rows)), common, self.depth if packs else 1)
        # a row is told by its last token, if it has one
        owner, place, slots = targets_of(work, order, depth)
        found = np.full(len(place), -1, dtype=np.int64)
        inside = place >= 0
        if packs:
            hidden = self.packed(shared, packed, IMPLEMENTATIONS[backend], work.table)
            found[inside] = packed.place(owner[inside], place[inside])
            work.computed += len(packed.tokens)
        else:
            ends = np.array([packed.index[high - 1] if high > low else -1
                             for low, high in pairwise(packed.bounds)])  # fmt: skip
            _, kept, number = np.unique(ends, return_index=True, return_inverse=True)
            chosen = [rows[row] for row in kept.tolist()]
            width = max(map(len, chosen))
            hidden = self._padded(shared, chosen, backend, work.table)
            found[inside] = (number[owner] * width + place)[inside]
            held = shared.length if backend == "none" else 0
            work.computed += (held + width) * len(chosen)
        work.passes += 1
        self._finish(shared, work, hidden, found, slots)

    def _finish(
        self, shared: SharedPrefix, work: Work, hidden: Tensor, places: np.ndarray,
        slots: np.ndarray,
    ) -> None:  # fmt: skip
        """Turn hidden states into results; a place of -1 is the prefix's last."""
        wanted, rows = np.unique(places, return_inverse=True)
        states: list[Tensor] = []
        if wanted[0] < 0 and shared.last_hidden is not None:
            states.append(shared.last_hidden)
            wanted = wanted[1:]
        # one copy to the device for all
        parts = (wanted, rows.reshape(-1), work.targets[slots], slots)
        moved = self.tensor(np.concatenate(parts)).split([len(part) for part in parts])
        if len(wanted):
            states.append(hidden[moved[0]])
        head = self.head.module.weight.device
        mapping, chosen = moved[1].to(head), moved[2].to(head)
        found = self.head.logprobs(torch.cat(states).to(head), chosen, mapping)
        greedy = found.argmax[mapping] == chosen
        results = torch.stack([found.logprob.float(), found.lse[mapping].float(), greedy.float()])
        work.results[:, moved[3]] = results.to(self.device)

    # -- forward passes --------------------------------------------------------------------------

    def packed(
        self, shared: SharedPrefix, packed: PackedLayout, impl: str, table: Tensor | None = None,
        call: PackedCall | None = None,
    ) -> Tensor:  # fmt: skip
        """Return final hidden states ``(T, d)`` of packed rows, valid until the next pass."""
        count, held = len(packed.tokens), shared.cache.get_seq_length()
        if not count:
            return torch.empty(0)

        def forward(inputs: list[Tensor], layout: PrefixLayout | None) -> Tensor:
            assert layout is not None
            own = call or PackedCall(layout, shared.cache, impl)
            with attention_of(self.configs, NAME), shared.cache.mode("read"):
                return self._forward(*inputs, shared.cache, pskv=own)[0]

        def inputs(size: int) -> list[Tensor]:
            both = np.zeros((2, size), dtype=np.int64)
            both[0, :count] = packed.tokens
            both[1] = held
            both[1, :count] += packed.positions
            ids, places = self.tensor(both)[:, None]
            return [ids if table is None else table[ids], places]

        # padding is no reason to pass more tokens at a time than memory or the user allows
        size = min(rounded(count), max(count, self.micro.tokens))
        deep = max(map(len, packed.segments))
        key = ("packed", impl, size, deep, table is None, shared.fingerprint, *shared.addresses())
        # the probe's own call is to be seen to run, and split has shapes of its own every time
        if call is None and impl == "triton" and self.graphs.wants(key):
            hidden = self.graphs.run(key, inputs(size), packed.layout(held, size), forward)
            if hidden is not None:
                return hidden[:count]
        return self.graphs.timed(key, lambda: forward(inputs(count), packed.layout(held)))

    def _padded(
        self, shared: SharedPrefix, rows: list[np.ndarray], backend: str, table: Tensor | None
    ) -> Tensor:
        """Return final hidden states ``(rows * width, d)``, padding included."""
        width = max(map(len, rows))
        if not width:
            return torch.empty(0)
        held = shared.length
        ids = np.zeros((len(rows), held + width), dtype=np.int64)
        for line, row in zip(ids, rows, strict=True):
            line[held : held + len(row)] = row
        if backend == "none":
            assert shared.ids is not None
            ids[:, :held] = shared.ids.numpy()
            return self._whole(self.tensor(ids), shared.fingerprint)[:, held:].flatten(0, 1)
        tokens = self.tensor(ids[:, held:])
        cache: Any = shared.cache
        if backend == "replicate":
            cache = replicated(shared.cache, len(rows))
        places = torch.arange(held, held + width, device=self.device).expand(len(rows), -1)
        with shared.cache.mode("expand"):
            return self._forward(tokens if table is None else table[tokens], places, cache).flatten(
                0, 1
            )

    def _whole(self, ids: Tensor, fingerprint: Hashable) -> Tensor:
        """Return final hidden states of whole rows, valid until the next pass."""

        def forward(inputs: list[Tensor], layout: PrefixLayout | None) -> Tensor:
            return self.base(input_ids=inputs[0], use_cache=False).last_hidden_state

        key = ("whole", *ids.shape, fingerprint)
        if self.graphs.wants(key):
            hidden = self.graphs.run(key, [ids], None, forward)
            if hidden is not None:
                return hidden
        return self.graphs.timed(key, lambda: forward([ids], None))

    def next_token_logits(self, shared: SharedPrefix, rows: list[np.ndarray]) -> Tensor:
        """Return the logits float32 ``(N, V)`` of what follows each row."""
        packed = plan(rows)
        hidden = self.packed(shared, packed, self.packed_impl)
        states: list[Any] = [
            hidden[packed.place(number, np.array([len(row) - 1]))] if len(row)
            else shared.last_hidden
            for number, row in enumerate(rows)
        ]  # fmt: skip
        return self.head.logits(torch.cat(states)).float()

    def where_not_finite(self, shared: SharedPrefix, row: np.ndarray, table: Tensor | None) -> str:
        """Say which layer of the model makes a row not finite, if one does."""
        states = self._states(shared, row, table)
        broken = [index for index, state in enumerate(states) if not state.isfinite().all()]
        if not broken:
            return ""
        return ", from the embeddings on" if broken[0] == 0 else f", from layer {broken[0] - 1} on"

    def _states(
        self, shared: SharedPrefix, row: np.ndarray, table: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Return what the embeddings and each layer make of one row, to look for a fault."""
        if not len(row):
            return () if shared.last_hidden is None else (shared.last_hidden,)
        held = shared.cache.get_seq_length()
        ids = self.tensor(row)[None]
        tokens = {"input_ids": ids} if table is None else {"inputs_embeds": table[ids]}
        places = torch.arange(held, held + len(row), device=self.device)[None]
        with shared.cache.mode("expand"):
            return self.base(
                **tokens, position_ids=places, past_key_values=shared.cache, use_cache=True,
                output_hidden_states=True,
            ).hidden_states  # fmt: skip

    def _choose(
        self, shared: SharedPrefix, work: Work
    ) -> tuple[str, Callable[[float], None] | None]:
        plain = shared.ids is not None and work.table is None
        if self.backend != "auto":
            if self.backend == "none" and not plain:
                raise ValueError("backend: 'none' needs token ids, not embeddings; use another")
            return self.backend, None
        held = shared.cache.get_seq_length()
        widest = max((len(row) for row in work.rows), default=1)
        state = shared.nbytes // max(1, held)
        return self.auto.choose(len(work.rows), held, widest, state, plain=plain)


def replicated(cache: PrefixCache, rows: int) -> DynamicCache:
    """Return an ordinary cache with a copy of the prefix for each row, as search tools make it."""
    copies = DynamicCache()
    held = cache.get_seq_length()
    for index, layer in enumerate(cache.held if held else ()):
        keys, values = (
            x[:held].transpose(0, 1)[None].expand(rows, -1, -1, -1)
            for x in (layer.keys, layer.values)
        )
        copies.update(keys, values, index)
    return copies
