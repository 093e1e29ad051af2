"""Score continuations of a prefix on a live transformers model."""

from __future__ import annotations

import threading
import time
import warnings
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from shared_kernels._checks import check_choice, message
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from pskv import support
from pskv.attention import NAME, PackedCall, attention_of
from pskv.backends import AutoBackend, check_backend
from pskv.batching import MicroBatch, attempt
from pskv.errors import RetokenizationWarning, StalePrefixError, UnsupportedModelError
from pskv.head import Head
from pskv.planner import PackedLayout, pack, sort_rows
from pskv.prefix import PrefixCache, SharedPrefix

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedTokenizerBase

    Ids = Sequence[int] | np.ndarray | Tensor

#: Rows of requests that have this many more tokens in common share them as a prefix.
_WORTH_A_PREFIX = 16
_IMPL = {"fused": "triton", "split": "split"}


@dataclass(frozen=True, eq=False)
class ScoreOutput:
    """Log-probabilities of continuations, in the order in which they were given.

    Attributes:
        logprobs: float32 ``(N,)`` on the CPU, in nats: the sum over a row's targets, or the mean.
        token_logprobs: For each row float32 ``(targets,)``.
        is_greedy: bool ``(N,)``, whether every target is the likeliest token at its place.
        num_tokens: int64 ``(N,)``, targets of each row.
        stats: What was done: backend, tokens computed, tokens that one pass per row computes,
            forward passes, seconds.
    """

    logprobs: Tensor
    token_logprobs: list[Tensor]
    is_greedy: Tensor
    num_tokens: Tensor
    stats: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Work:
    """Rows to score and the place for their results."""

    rows: list[np.ndarray]
    first: np.ndarray
    logprobs: Tensor
    greedy: Tensor
    bounds: np.ndarray
    computed: int = 0
    passes: int = 0

    @classmethod
    def of(cls, rows: list[np.ndarray], first: np.ndarray, device: torch.device) -> _Work:
        counts = np.array([len(row) for row in rows], dtype=np.int64) - first
        bounds = np.concatenate([[0], np.cumsum(counts)])
        total = int(bounds[-1])
        return cls(
            rows,
            first,
            torch.full((total,), float("nan"), device=device),
            torch.zeros(total, dtype=torch.bool, device=device),
            bounds,
        )


class PrefixScorer:
    """Scores continuations on a causal language model of transformers, in place.

    Attaching compares a packed pass with ordinary ones on random tokens, so a model that this
    package does not know is either right or refused. The model's settings are changed during a
    call only. One thread at a time; others wait.

    Args:
        model: The model, in eval mode, with or without PEFT adapters.
        tokenizer: For texts and chats; token ids need none.
        backend: ``fused`` (Triton kernel), ``split`` (plain torch), ``layerwise`` (a copy of the
            prefix per row and layer), ``replicate`` (per row), or ``auto``: each that can work is
            timed on real calls and the fastest goes on.
        micro_batch: Most tokens of a forward pass, or ``auto``: what fits into memory.
        share_parent: Compute tokens that rows have in common once.
        deterministic: Never choose by time.

    Raises:
        UnsupportedModelError: The model has a part that cannot share a prefix.
        ValueError: An argument is not one of those listed.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        backend: str = "auto",
        micro_batch: int | str = "auto",
        share_parent: bool = True,
        deterministic: bool = False,
    ) -> None:
        support.check_model(model)
        self.model, self.tokenizer = model, tokenizer
        self._inner = support.inner_model(model)
        self._base = self._inner.base_model
        self._head = Head.of(self._inner)
        self._depth = 3 if share_parent else 1
        self._lock = threading.RLock()
        self.device = self._inner.get_input_embeddings().weight.device
        self.backend = check_backend(backend, self.device)
        self._auto = AutoBackend(self.device, deterministic=deterministic)
        self._micro = MicroBatch.make(micro_batch, self.device)
        self._probe()

    # -- prefixes --------------------------------------------------------------------------------

    def prefill(
        self, prefix: str | list[dict[str, str]] | Ids, *, chunk: int | None = None
    ) -> SharedPrefix:
        """Compute a prefix's keys and values, once.

        Args:
            prefix: Token ids, a text (encoded with special tokens), or a chat (rendered by the
                tokenizer's template, with the prompt of the answer). May be empty.
            chunk: Tokens of a forward pass; by default those of a micro-batch.
        """
        with self._lock, torch.no_grad():
            ids = self._encode_prefix(prefix)
            support.check_state(self.model)
            support.check_length(self._inner, len(ids), 0)
            cache = PrefixCache(self._inner.config.get_text_config().num_hidden_layers)
            shared = SharedPrefix(ids, cache, None, support.fingerprint(self.model))
            shared.text = prefix if isinstance(prefix, str) else None
            self._append(shared, ids.numpy(), chunk)
            return shared

    def _append(self, prefix: SharedPrefix, ids: np.ndarray, chunk: int | None = None) -> None:
        start = prefix.cache.get_seq_length()
        if len(ids):
            for layer in prefix.cache.held:
                if layer.is_initialized:
                    layer.reserve(start + len(ids))
        step = chunk or max(1, self._micro.tokens)
        for low in range(0, len(ids), step):
            part = self._tensor(ids[low : low + step])
            place = torch.arange(start + low, start + low + len(part), device=self.device)
            hidden = self._base(
                input_ids=part[None], position_ids=place[None], past_key_values=prefix.cache,
                use_cache=True,
            ).last_hidden_state  # fmt: skip
            prefix.last_hidden = hidden[0, -1:].clone()

    # -- scores ----------------------------------------------------------------------------------

    def score(
        self,
        prefix: SharedPrefix | str | list[dict[str, str]] | Ids,
        continuations: Sequence[str] | Sequence[Ids] | Tensor,
        *,
        targets: Any = None,
        reduction: str = "sum",
    ) -> ScoreOutput:
        """Score continuations of one prefix.

        Args:
            prefix: What `prefill` returned, or what it takes.
            continuations: Texts (encoded without special tokens), token ids, or int64 ``(N, S)``.
            targets: A text or token ids that follow every continuation, or one for each; only
                these are scored then. By default all tokens of the continuations are.
            reduction: ``sum`` or ``mean`` over a row's targets.

        Raises:
            ValueError: A row without targets, a token outside the vocabulary, or rows longer than
                the model's positions.
            StalePrefixError: The model has changed since `prefill`.
        """
        check_choice("reduction", reduction, ("sum", "mean"))
        with self._lock, torch.no_grad():
            rows, first = self._rows(prefix, continuations, targets)
            own = not isinstance(prefix, SharedPrefix)
            shared = self.prefill(prefix) if own else prefix
            begin = time.perf_counter()
            self._check(shared, rows, first)
            work = _Work.of(rows, first, self.device)
            backend = self._run(shared, work)
            output = self._output(shared, work, backend, reduction, begin)
            if own:
                shared.close()
            return output

    def score_requests(self, requests: Sequence[tuple[Ids, Ids]]) -> list[tuple[float, bool]]:
        """Score (context, continuation) pairs of token ids, as evaluation harnesses make them.

        Contexts that begin alike share what they have in common, at every depth.

        Returns:
            For each pair the sum of the log-probabilities of the continuation, and whether it is
            what greedy decoding gives.

        Raises:
            ValueError: As `score`; also an empty context, which predicts nothing.
        """
        with self._lock, torch.no_grad():
            pairs = [[_as_row(part) for part in request] for request in requests]
            rows = [np.concatenate(pair) for pair in pairs]
            first = np.array([len(pair[0]) for pair in pairs], dtype=np.int64)
            shared = self.prefill([])
            self._check(shared, rows, first)
            work = _Work.of(rows, first, self.device)
            with shared:
                order, common = sort_rows([row[:-1] for row in rows])
                if len(rows):
                    self._descend(shared, work, order, common, 0)
            output = self._output(None, work, self._packed_backend(), "sum", 0.0)
            return list(zip(output.logprobs.tolist(), output.is_greedy.tolist(), strict=True))

    # -- gradients -------------------------------------------------------------------------------

    def token_gradient(
        self,
        prefix: SharedPrefix,
        suffix_ids: Ids,
        tail_ids: Ids,
        target_ids: Ids,
        *,
        objective: str | Callable[[Tensor, Tensor], Tensor] = "nll",
    ) -> Tensor:
        """Differentiate an objective with respect to the choice of each suffix token.

        ``g[i, v] = <dL/de_i, E(v)>`` with ``e_i`` the embedding of suffix token i and E the
        model's embedding of every token: the gradient with respect to a one-hot choice, as greedy
        coordinate gradient takes it (arXiv:2307.15043, section 2.2). The prefix's keys and values
        do not depend on the suffix, so they are constants, and the gradient is exact.

        Args:
            prefix: What `prefill` returned.
            suffix_ids: int64 ``(s,)``, the tokens to differentiate by; at least one.
            tail_ids: int64 ``(a,)``, tokens between suffix and target; may be none.
            target_ids: int64 ``(t,)``; at least one.
            objective: ``nll`` (the sum over the targets), or a function of logits ``(t, V)`` and
                target ids that returns a scalar.

        Returns:
            ``(s, V)`` in the dtype of the embeddings.

        Raises:
            ValueError: No suffix or target, or what `score` refuses.
            StalePrefixError: The model has changed since `prefill`.
        """
        with self._lock:
            parts = [
                _as_row(ids, name)
                for name, ids in (
                    ("suffix_ids", suffix_ids), ("tail_ids", tail_ids), ("target_ids", target_ids),
                )
            ]  # fmt: skip
            for name, part in (("suffix_ids", parts[0]), ("target_ids", parts[2])):
                if not len(part):
                    raise ValueError(message(name, "at least one token", part, "pass some"))
            row = np.concatenate(parts)
            first = len(row) - len(parts[2])
            self._check(prefix, [row], np.array([first], dtype=np.int64))
            embed = self._inner.get_input_embeddings()
            held, count = prefix.length, len(parts[0])
            with torch.no_grad():
                embeds = embed(self._tensor(row[:-1])[None])
                vocabulary = torch.arange(self._head.module.weight.shape[0], device=self.device)
            with torch.enable_grad(), prefix.cache.mode("expand"):
                suffix = embeds[:, :count].detach().requires_grad_()
                place = torch.arange(held, held + len(row) - 1, device=self.device)
                hidden = self._base(
                    inputs_embeds=torch.cat([suffix, embeds[:, count:]], 1),
                    position_ids=place[None], past_key_values=prefix.cache, use_cache=True,
                ).last_hidden_state[0]  # fmt: skip
                logits = self._head.logits(hidden[first - 1 :])
                targets = self._tensor(parts[2]).to(logits.device)
                if isinstance(objective, str):
                    check_choice("objective", objective, ("nll",))
                    loss = cross_entropy(logits.float(), targets, reduction="sum")
                else:
                    loss = objective(logits, targets)
                (gradient,) = torch.autograd.grad(loss, suffix)
            with torch.no_grad():
                return gradient[0] @ embed(vocabulary).mT

    def _descend(
        self, shared: SharedPrefix, work: _Work, order: np.ndarray, common: np.ndarray, depth: int
    ) -> None:
        """Score sorted rows whose first ``depth`` tokens are in the prefix."""
        rows = work.rows
        parting = int(common[1:].min(initial=len(rows[order[0]])))
        # the first target of every row must be predicted from here on
        alike = min(parting, int(work.first[order].min()))
        held = (shared.cache.get_seq_length(), shared.last_hidden)
        if len(order) > 1 and alike - depth >= _WORTH_A_PREFIX:
            self._append(shared, rows[order[0]][depth:alike])
            depth = alike
        lengths = np.array([len(rows[row]) for row in order], dtype=np.int64) - depth
        new = lengths - np.concatenate([[0], np.maximum(common[1:] - depth, 0)])
        if new.sum() <= self._micro.tokens or len(order) == 1:
            self._run(shared, work, order, common, depth)
        else:
            for part in _groups(new, np.flatnonzero(common[1:] == parting) + 1, self._micro.tokens):
                self._descend(shared, work, order[part], common[part], depth)
        shared.cache.truncate(held[0])
        shared.last_hidden = held[1]

    def _run(
        self,
        shared: SharedPrefix,
        work: _Work,
        order: np.ndarray | None = None,
        common: np.ndarray | None = None,
        depth: int = 0,
    ) -> str:
        """Score rows whose first ``depth`` tokens are in the prefix already."""
        if order is None or common is None:
            backend, done = self._choose(shared, work)
            order, common = sort_rows([row[:-1] for row in work.rows])
        else:
            backend, done = self._packed_backend(), None
        rows = [row[depth:-1] for row in work.rows]
        common = np.maximum(common - depth, 0)
        lengths = np.array([len(rows[row]) for row in order], dtype=np.int64)
        begin = time.perf_counter()
        low = 0
        while low < len(order):
            high = self._cut(backend, lengths, common, low)
            tokens = int((lengths[low:high] - common[low:high]).sum() + common[low])
            step = partial(
                self._pass, shared, work, rows, order[low:high], common[low:high], depth, backend
            )
            _, problem = attempt(partial(self._measured, step, tokens))
            if problem is None:
                self._micro.succeeded()
                low = high
            elif high - low == 1:
                raise torch.OutOfMemoryError(
                    f"{problem}; one row of {lengths[low]} tokens after a prefix of "
                    f"{shared.cache.get_seq_length()} does not fit: shorten it, or free memory"
                )
            else:
                self._micro.failed(tokens)
        if done is not None:
            done(time.perf_counter() - begin)
        return backend

    def _cut(self, backend: str, lengths: np.ndarray, common: np.ndarray, low: int) -> int:
        """Return where the rows of a pass that begins at ``low`` end."""
        if backend in _IMPL:
            new = lengths[low:] - common[low:]
            new[0] += common[low]
            fits = np.cumsum(new) <= self._micro.tokens
        else:
            widest = np.maximum.accumulate(lengths[low:])
            fits = widest * np.arange(1, len(widest) + 1) <= self._micro.tokens
        return low + max(1, int(fits.sum()))

    def _measured(self, step: Callable[[], None], tokens: int) -> None:
        if self._micro.fitted or self.device.type != "cuda" or tokens < 256:
            step()
            return
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        step()
        used = torch.cuda.max_memory_allocated(self.device) - before
        free, _ = torch.cuda.mem_get_info(self.device)
        free += torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        self._micro.fit(tokens, used, free)

    def _pass(
        self,
        shared: SharedPrefix,
        work: _Work,
        rows: list[np.ndarray],
        order: np.ndarray,
        common: np.ndarray,
        depth: int,
        backend: str,
    ) -> None:
        common = common.copy()
        common[0] = 0
        packed = pack(rows, order, common, self._depth if backend in _IMPL else 1)
        if backend in _IMPL:
            hidden = self._packed(shared, packed, _IMPL[backend])
            place: Callable[[int, np.ndarray], np.ndarray] = packed.place
            work.computed += len(packed.tokens)
        else:
            unique = {(*packed.paths[row], len(rows[row])): row for row in order.tolist()}
            numbers = {key: number for number, key in enumerate(unique)}
            chosen = [rows[row] for row in unique.values()]
            width = max(map(len, chosen))
            hidden = self._padded(shared, chosen, backend)
            work.computed += width * len(chosen)

            def place(row: int, index: np.ndarray) -> np.ndarray:
                return numbers[(*packed.paths[row], len(rows[row]))] * width + index

        work.passes += 1
        self._finish(shared, work, hidden, order, depth, place)

    def _finish(
        self,
        shared: SharedPrefix,
        work: _Work,
        hidden: Tensor,
        order: np.ndarray,
        depth: int,
        place: Callable[[int, np.ndarray], np.ndarray],
    ) -> None:
        """Turn hidden states into the results of some rows."""
        places, targets, slots = [], [], []
        for row in order.tolist():
            first, length = int(work.first[row]), len(work.rows[row])
            index = np.arange(first, length) - depth - 1
            # the first target may be predicted by the prefix itself
            found = np.full(len(index), -1, dtype=np.int64)
            inside = index >= 0
            if inside.any():
                found[inside] = place(row, index[inside])
            places.append(found)
            targets.append(work.rows[row][first:])
            slots.append(np.arange(work.bounds[row], work.bounds[row + 1]))
        wanted, rows = np.unique(np.concatenate(places), return_inverse=True)
        states: list[Tensor] = []
        if wanted[0] < 0 and shared.last_hidden is not None:
            states.append(shared.last_hidden)
            wanted = wanted[1:]
        if len(wanted):
            states.append(hidden[self._tensor(wanted)])
        head = self._head.module.weight.device
        chosen = self._tensor(np.concatenate(targets)).to(head)
        mapping = self._tensor(rows.reshape(-1)).to(head)
        result = self._head.logprobs(torch.cat(states).to(head), chosen, mapping)
        slot = self._tensor(np.concatenate(slots))
        work.logprobs[slot] = result.logprob.float().to(self.device)
        work.greedy[slot] = (result.argmax[mapping] == chosen).to(self.device)

    # -- forward passes --------------------------------------------------------------------------

    def _packed(self, shared: SharedPrefix, packed: PackedLayout, impl: str) -> Tensor:
        """Return final hidden states ``(T, d)`` of packed rows."""
        if not len(packed.tokens):
            return torch.empty(0)
        held = shared.cache.get_seq_length()
        call = PackedCall(packed.layout(held), shared.cache, impl)
        with attention_of(self._inner, NAME), shared.cache.mode("read"):
            return self._base(
                input_ids=self._tensor(packed.tokens)[None],
                position_ids=self._tensor(packed.positions + held)[None],
                past_key_values=shared.cache,
                use_cache=True,
                pskv=call,
            ).last_hidden_state[0]

    def _padded(self, shared: SharedPrefix, rows: list[np.ndarray], backend: str) -> Tensor:
        """Return final hidden states ``(rows * width, d)``, padding included."""
        width = max(map(len, rows))
        if not width:
            return torch.empty(0)
        ids = np.zeros((len(rows), width), dtype=np.int64)
        for line, row in zip(ids, rows, strict=True):
            line[: len(row)] = row
        held = shared.cache.get_seq_length()
        cache: Any = shared.cache
        if backend == "replicate":
            cache = DynamicCache()
            for index, layer in enumerate(shared.cache.held if held else ()):
                keys, values = (
                    x[:held].transpose(0, 1)[None].expand(len(rows), -1, -1, -1)
                    for x in (layer.keys, layer.values)
                )
                cache.update(keys, values, index)
        place = torch.arange(held, held + width, device=self.device)
        with shared.cache.mode("expand"):
            return self._base(
                input_ids=self._tensor(ids), position_ids=place.expand(len(rows), -1),
                past_key_values=cache, use_cache=True,
            ).last_hidden_state.flatten(0, 1)  # fmt: skip

    def _packed_backend(self) -> str:
        if self.backend in _IMPL:
            return self.backend
        return "fused" if self.device.type == "cuda" else "split"

    def _choose(
        self, shared: SharedPrefix, work: _Work
    ) -> tuple[str, Callable[[float], None] | None]:
        if self.backend != "auto":
            return self.backend, None
        widest = max((len(row) for row in work.rows), default=1)
        state = shared.nbytes // max(1, shared.cache.get_seq_length())
        return self._auto.choose(len(work.rows), shared.cache.get_seq_length(), widest, state)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    # -- input and output ------------------------------------------------------------------------

    def _output(
        self, shared: SharedPrefix | None, work: _Work, backend: str, reduction: str, begin: float
    ) -> ScoreOutput:
        values, greedy = work.logprobs.cpu(), work.greedy.cpu()
        bad = (values.isnan() | (values == float("inf"))).nonzero()
        if len(bad):
            row = int(np.searchsorted(work.bounds, int(bad[0]), side="right") - 1)
            raise FloatingPointError(
                f"continuations[{row}]: its logits are not finite; the model overflows on it "
                "(try bfloat16 or float32)"
            )
        counts = np.diff(work.bounds)
        number = torch.from_numpy(np.repeat(np.arange(len(counts)), counts))
        sums = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, number, values.double())
        wrong = torch.zeros(len(counts), dtype=torch.int64).index_add_(0, number, (~greedy).long())
        tokens = torch.from_numpy(counts)
        if reduction == "mean":
            sums = sums / tokens
        held = shared.length if shared is not None else 0
        stats = {
            "backend": backend,
            "tokens": work.computed,
            "tokens_without_sharing": sum(held + len(row) for row in work.rows),
            "passes": work.passes,
            "seconds": time.perf_counter() - begin,
        }
        return ScoreOutput(
            sums.float(), list(values.split(counts.tolist())), wrong == 0, tokens, stats
        )

    def _rows(
        self, prefix: Any, continuations: Any, targets: Any
    ) -> tuple[list[np.ndarray], np.ndarray]:
        text = prefix if isinstance(prefix, str) else getattr(prefix, "text", None)
        rows = self._encode_all("continuations", continuations, text)
        if targets is None:
            return rows, np.zeros(len(rows), dtype=np.int64)
        if isinstance(targets, str) or not any(isinstance(t, str) or np.ndim(t) for t in targets):
            ends = self._encode_all("targets", [targets], None) * len(rows)
        else:
            ends = self._encode_all("targets", targets, None)
        if len(ends) != len(rows):
            remedy = "give one for all, or one for each continuation"
            raise ValueError(message("targets", f"{len(rows)} targets", len(ends), remedy))
        first = np.array([len(row) for row in rows], dtype=np.int64)
        return [np.concatenate(pair) for pair in zip(rows, ends, strict=True)], first

    def _encode_all(self, name: str, items: Any, before: str | None) -> list[np.ndarray]:
        if isinstance(items, str):
            raise TypeError(message(name, "a sequence of texts", items, "put it into a list"))
        if not any(isinstance(item, str) for item in items):
            return [_as_row(item, f"{name}[{number}]") for number, item in enumerate(items)]
        tokenizer = self._need_tokenizer()
        encoded = tokenizer(list(items), add_special_tokens=False)["input_ids"]
        if before is not None:
            head = tokenizer(before)["input_ids"]
            joined = tokenizer([before + item for item in items])["input_ids"]
            for item, ids, whole in zip(items, encoded, joined, strict=True):
                if head + ids != whole:
                    warnings.warn(
                        f"{item!r} is cut into other tokens when it is joined to the prefix; the "
                        "tokens of the two texts alone are scored",
                        RetokenizationWarning,
                        stacklevel=4,
                    )
                    break
        return [np.array(ids, dtype=np.int64) for ids in encoded]

    def _encode_prefix(self, prefix: Any) -> Tensor:
        if isinstance(prefix, str):
            return torch.tensor(self._need_tokenizer()(prefix)["input_ids"], dtype=torch.int64)
        if isinstance(prefix, list) and prefix and isinstance(prefix[0], dict):
            ids = self._need_tokenizer().apply_chat_template(
                prefix, add_generation_prompt=True, return_dict=False
            )
            return torch.tensor(ids, dtype=torch.int64)
        ids = torch.from_numpy(_as_row(prefix, "prefix"))
        self._check_vocabulary("prefix", ids.numpy())
        return ids

    def _need_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise ValueError(
                "tokenizer: texts need one; pass it to PrefixScorer, or pass token ids"
            )
        return self.tokenizer

    def _check_vocabulary(self, name: str, ids: np.ndarray) -> None:
        size = self._head.module.weight.shape[0]
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < size:
            worst = int(ids.min()) if ids.min() < 0 else int(ids.max())
            raise ValueError(
                message(name, f"token ids in [0, {size})", worst, "use the model's tokenizer")
            )

    def _check(self, shared: SharedPrefix, rows: list[np.ndarray], first: np.ndarray) -> None:
        support.check_state(self.model)
        if shared.closed:
            raise StalePrefixError("the prefix has been closed; call prefill again")
        if shared.fingerprint != support.fingerprint(self.model):
            raise StalePrefixError(
                "the model's weights, adapters, dtype or attention have changed since prefill; "
                "call prefill again"
            )
        for number, (row, start) in enumerate(zip(rows, first.tolist(), strict=True)):
            name = f"continuations[{number}]"
            if len(row) <= start:
                remedy = "leave it out, or pass targets"
                raise ValueError(message(name, "at least one token to score", row, remedy))
            if not start and not shared.length:
                remedy = "begin with a token such as BOS, or pass targets"
                raise ValueError(
                    message(name, "a token before the first to score", row.tolist()[:8], remedy)
                )
            self._check_vocabulary(name, row)
        longest = max((len(row) for row in rows), default=0)
        support.check_length(self._inner, shared.length, longest)

    # -- the comparison at the start ---------------------------------------------------------------

    @torch.no_grad()
    def _probe(self) -> None:
        """Compare a packed pass with one pass per row.

        Raises:
            UnsupportedModelError: They differ, or a layer did not take part.
        """
        vocabulary = min(
            self._head.module.weight.shape[0], self._inner.get_input_embeddings().num_embeddings
        )
        generator = np.random.default_rng(0)
        ids = generator.integers(0, vocabulary, 24)
        rows = [ids[11:].copy() for _ in range(4)]
        for place, row in zip((9, 9, 11), rows[1:], strict=True):
            row[place] = (row[place] + 1 + place) % vocabulary
        rows.append(generator.integers(0, vocabulary, 5))
        name = type(self._inner).__name__
        remedy = "score it without a cache, and please report the model"
        shared = self.prefill(ids[:11])
        layers = self._inner.config.get_text_config().num_hidden_layers
        if shared.cache.get_seq_length() != 11 or len(shared.cache.held) != layers:
            raise UnsupportedModelError(f"model: {name} does not use its cache; {remedy}")
        order, common = sort_rows(rows)
        packed = pack(rows, order, common, 3)
        call = PackedCall(packed.layout(11), shared.cache, _IMPL[self._packed_backend()])
        with attention_of(self._inner, NAME), shared.cache.mode("read"):
            hidden = self._base(
                input_ids=self._tensor(packed.tokens)[None],
                position_ids=self._tensor(packed.positions + 11)[None],
                past_key_values=shared.cache, use_cache=True, pskv=call,
            ).last_hidden_state[0]  # fmt: skip
        if call.layers != set(range(layers)):
            raise UnsupportedModelError(
                f"model: {len(call.layers)} of {layers} layers of {name} attend through "
                f"transformers' attention functions; {remedy}"
            )
        kinds = getattr(self._inner.config.get_text_config(), "layer_types", None) or []
        sliding = {index for index, kind in enumerate(kinds) if kind == "sliding_attention"}
        if not sliding <= call.windows:
            raise UnsupportedModelError(
                f"model: layer {min(sliding - call.windows)} of {name} has a window that its "
                f"attention function is not told; {remedy}"
            )
        bound = support.probe_tolerance(hidden.dtype)
        errors = []
        for number, row in enumerate(rows):
            whole = self._tensor(np.concatenate([ids[:11], row]))[None]
            expected = self._base(input_ids=whole, use_cache=False).last_hidden_state[0]
            found = hidden[self._tensor(packed.place(number, np.arange(len(row))))]
            errors.append(support.relative_errors(found, expected[11:]))
        error = support.worst(self._inner, torch.cat(errors))
        if error > bound:
            raise UnsupportedModelError(
                f"model: hidden states of {name} over a shared prefix differ from ordinary ones "
                f"by {error:.1e} of their norm, more than {bound:.0e}; {remedy}"
            )
        logits = self._inner(input_ids=whole, use_cache=False).logits[0]
        errors = support.relative_errors(self._head.logits(expected), logits)
        error = support.worst(self._inner, errors)
        if error > bound:
            raise UnsupportedModelError(
                f"model: the head of {name} is more than a linear layer, a scale and a cap: logits "
                f"differ by {error:.1e} of their norm; {remedy}"
            )
        shared.close()


def _groups(tokens: np.ndarray, bounds: np.ndarray, most: int) -> list[slice]:
    """Cut rows at ``bounds``, and join neighbours that have at most ``most`` tokens together."""
    edges = [0, *bounds.tolist(), len(tokens)]
    found: list[slice] = []
    for low, high in pairwise(edges):
        if found and tokens[found[-1].start : high].sum() <= most:
            found[-1] = slice(found[-1].start, high)
        else:
            found.append(slice(low, high))
    return found


def _as_row(ids: Any, name: str = "ids") -> np.ndarray:
    row = ids.detach().cpu().numpy() if isinstance(ids, Tensor) else np.asarray(ids)
    if row.ndim != 1 or (row.size and row.dtype.kind not in "iu"):
        raise TypeError(message(name, "one dimension of token ids", ids, "encode it first"))
    return row.astype(np.int64)
