"""Score continuations of a prefix on a live transformers model."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from shared_kernels._checks import check_choice, check_tensor, message
from torch import Tensor
from tqdm.auto import tqdm

from pskv import support
from pskv.embeddings import number_vectors
from pskv.encoding import Encoder, as_row
from pskv.errors import StalePrefixError
from pskv.generation import check_options, generate
from pskv.gradient import by_token, embedding_gradient, token_gradient
from pskv.output import ScoreOutput
from pskv.passes import Passes
from pskv.prefix import PrefixCache, SharedPrefix
from pskv.probe import probe
from pskv.work import Work

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedTokenizerBase

    Ids = Sequence[int] | np.ndarray | Tensor
    Prefix = SharedPrefix | str | list[dict[str, str]] | Ids

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class PrefixScorer:
    """Scores continuations on a causal language model of transformers, in place.

    Attaching compares a packed pass with ordinary ones on random tokens, so a model that this
    package does not know is either right or refused. The model's settings are changed during a
    call only. One thread at a time; others wait.

    Args:
        model: The model, in eval mode, with or without PEFT adapters.
        tokenizer: For texts and chats; token ids need none.
        backend: ``fused`` (Triton kernel), ``split`` (plain torch), ``layerwise`` (a copy of the
            prefix per row and layer), ``replicate`` (per row), ``none`` (the prefix is passed
            again with every row), or ``auto``: each that can work is timed on real calls and the
            fastest goes on.
        micro_batch: Most tokens of a forward pass, or ``auto``: what fits into memory.
        share_parent: Compute tokens that rows have in common once.
        deterministic: Never choose by time.
        cuda_graphs: Record passes that keep coming as CUDA graphs where the GPU waits for the host,
            as it does with small models and few rows. Not with ``deterministic``, nor while a
            module has hooks.

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
        cuda_graphs: bool = True,
    ) -> None:
        support.check_model(model)
        self.model = model
        self._passes = Passes(
            model, backend=backend, micro_batch=micro_batch, depth=3 if share_parent else 1,
            deterministic=deterministic, cuda_graphs=cuda_graphs,
        )  # fmt: skip
        self._encoder = Encoder(tokenizer, self._passes.head.module.weight.shape[0])
        self._lock = threading.RLock()
        self.device = self._passes.device
        self.probed = probe(self._passes, self.prefill)

    @property
    def backend(self) -> str:
        """How rows attend to the prefix."""
        return self._passes.backend

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer.

        Raises:
            ValueError: There is none.
        """
        return self._encoder.tokenizer

    @property
    def vocabulary_size(self) -> int:
        """Tokens that the head tells apart."""
        return self._encoder.vocabulary

    @property
    def tokens_per_pass(self) -> int:
        """Most tokens of a forward pass, as far as memory is known now."""
        return self._passes.micro.tokens

    # -- prefixes --------------------------------------------------------------------------------

    def prefill(
        self, prefix: str | list[dict[str, str]] | Ids, *, chunk: int | None = None
    ) -> SharedPrefix:
        """Compute a prefix's keys and values, once.

        Args:
            prefix: Token ids, a text (encoded with special tokens), a chat (rendered by the
                tokenizer's template, with the prompt of the answer), or embeddings: a floating
                tensor ``(P, d)``. May be empty.
            chunk: Tokens of a forward pass; by default those of a micro-batch.
        """
        with self._lock, torch.no_grad():
            table = None
            if isinstance(prefix, Tensor) and prefix.is_floating_point():
                check_tensor(
                    "prefix", prefix, dtypes=_FLOATS, shape=(None, self._width), strided=True
                )
                table, ids = prefix.to(self.device), np.arange(len(prefix))
            else:
                ids = self._encoder.prefix(prefix)
            support.check_state(self.model)
            support.check_length(self._passes.inner, len(ids), 0)
            cache = PrefixCache(self._passes.inner.config.get_text_config().num_hidden_layers)
            held = None if table is not None else torch.from_numpy(ids)
            shared = SharedPrefix(held, cache, None, support.fingerprint(self.model))
            shared.text = prefix if isinstance(prefix, str) else None
            self._passes.append(shared, ids, chunk, table)
            return shared

    @property
    def _width(self) -> int:
        return self._passes.inner.get_input_embeddings().weight.shape[1]

    # -- scores ----------------------------------------------------------------------------------

    def score(
        self,
        prefix: Prefix,
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
            FloatingPointError: A score is not finite.
        """
        check_choice("reduction", reduction, ("sum", "mean"))
        with self._lock, torch.no_grad():
            text = prefix if isinstance(prefix, str) else getattr(prefix, "text", None)
            rows, first = self._encoder.rows(continuations, targets, text)
            own = not isinstance(prefix, SharedPrefix)
            shared = self.prefill(prefix) if own else prefix
            begin = time.perf_counter()
            self._check(shared, rows, first)
            work = Work.of(rows, first, self.device)
            output = self._output(shared, work, self._passes.run(shared, work), reduction, begin)
            if own:
                shared.close()
            return output

    def score_embeds(
        self,
        prefix: Prefix,
        inputs_embeds: Tensor,
        target_ids: Tensor,
        *,
        reduction: str = "sum",
    ) -> ScoreOutput:
        """Score rows that are given as embeddings, as tools for prompt search hold them.

        Vectors that are equal bit for bit are treated as one token, so that what rows share is
        computed once, as `score` does.

        Args:
            prefix: What `prefill` returned, or what it takes.
            inputs_embeds: ``(N, S, d)`` in the model's dtype; the last t of S are the targets'.
            target_ids: int64 ``(t,)``, or ``(N, t)``; 1 <= t <= S.
            reduction: ``sum`` or ``mean`` over the targets.

        Raises:
            TypeError: Another dtype.
            ValueError: Shapes that do not fit together; also what `score` refuses.
            StalePrefixError: The model has changed since `prefill`.
            FloatingPointError: A score is not finite.
        """
        check_choice("reduction", reduction, ("sum", "mean"))
        weight = self._passes.inner.get_input_embeddings().weight
        check_tensor(
            "inputs_embeds",
            inputs_embeds,
            dtypes=(weight.dtype,),
            shape=(None, None, self._width),
            strided=True,
        )
        count, length, width = inputs_embeds.shape
        shape = (None,) if target_ids.dim() == 1 else (count, None)
        check_tensor("target_ids", target_ids, dtypes=(torch.int64,), shape=shape, strided=True)
        targets = target_ids.expand(count, -1).cpu().numpy()
        if not 1 <= targets.shape[1] <= length:
            got = f"{targets.shape[1]} targets in rows of {length}"
            raise ValueError(
                message("target_ids", "1 to S targets", got, "rows end with the targets")
            )
        with self._lock, torch.no_grad():
            own = not isinstance(prefix, SharedPrefix)
            shared = self.prefill(prefix) if own else prefix
            begin = time.perf_counter()
            flat = inputs_embeds.to(self.device).reshape(-1, width)
            numbers, table = number_vectors(flat)
            rows = list(numbers.view(count, length).numpy())
            first = np.full(count, length - targets.shape[1], dtype=np.int64)
            self._check(shared, [], first[:0])
            self._encoder.check("target_ids", targets.reshape(-1))
            support.check_length(self._passes.inner, shared.length, length)
            if count and not shared.length and not first[0]:
                remedy = "put the embedding of a token such as BOS in front"
                raise ValueError(
                    message("inputs_embeds", "a row before the first target", "none", remedy)
                )
            work = Work.of(rows, first, self.device, table=table, targets=targets.reshape(-1))
            output = self._output(shared, work, self._passes.run(shared, work), reduction, begin)
            if own:
                shared.close()
            return output

    def score_requests(
        self, requests: Sequence[tuple[Ids, Ids]], *, progress: bool = False
    ) -> list[tuple[float, bool]]:
        """Score (context, continuation) pairs of token ids, as evaluation harnesses make them.

        Contexts that begin alike share what they have in common, at every depth.

        Args:
            requests: The pairs.
            progress: Show a bar.

        Returns:
            For each pair the sum of the log-probabilities of the continuation, and whether it is
            what greedy decoding gives.

        Raises:
            ValueError: As `score`; also an empty context, which predicts nothing.
        """
        with self._lock, torch.no_grad():
            pairs = [[as_row(part) for part in request] for request in requests]
            rows = [np.concatenate(pair) for pair in pairs]
            first = np.array([len(pair[0]) for pair in pairs], dtype=np.int64)
            with self.prefill([]) as shared:
                self._check(shared, rows, first)
                work = Work.of(rows, first, self.device)
                with tqdm(total=len(rows), disable=not progress, desc="score") as bar:
                    work.advance = bar.update
                    backend = self._passes.descend(shared, work)
                output = self._output(shared, work, backend, "sum", time.perf_counter())
            return list(zip(output.logprobs.tolist(), output.is_greedy.tolist(), strict=True))

    def next_token_logits(self, prefix: SharedPrefix, rows: Sequence[Ids]) -> Tensor:
        """Return the logits float32 ``(N, V)`` of what follows each row, on the model's device.

        All of them are stored: ``4 N V`` bytes.

        Args:
            prefix: What `prefill` returned.
            rows: Token ids; an empty row asks what follows the prefix.

        Raises:
            ValueError: What `score` refuses; or an empty row behind an empty prefix.
            StalePrefixError: The model has changed since `prefill`.
        """
        with self._lock, torch.no_grad():
            arrays = [as_row(row, f"rows[{number}]") for number, row in enumerate(rows)]
            # a target of each row's own, never computed, makes the row's last token ask for it
            extended = [np.append(row, 0) for row in arrays]
            first = np.array([len(row) for row in arrays], dtype=np.int64)
            self._check(prefix, extended, first)
            if not arrays:
                return torch.empty(0, self._encoder.vocabulary, device=self.device)
            return self._passes.next_token_logits(prefix, arrays)

    # -- gradients and generation ----------------------------------------------------------------

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
                as_row(ids, name)
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
            return token_gradient(
                self._passes, prefix, row, len(parts[0]), len(parts[2]), objective
            )

    def embedding_gradient(
        self,
        prefix: SharedPrefix,
        suffix_embeds: Tensor,
        rest_embeds: Tensor,
        target_ids: Tensor,
        *,
        objective: str | Callable[[Tensor, Tensor], Tensor] = "nll",
    ) -> Tensor:
        """Differentiate as `token_gradient` does, from embeddings.

        Args:
            prefix: What `prefill` returned.
            suffix_embeds: ``(s, d)``, to differentiate by.
            rest_embeds: ``(r, d)``, what follows, the targets' embeddings at the end.
            target_ids: int64 ``(t,)``.
            objective: As `token_gradient`.

        Returns:
            ``(s, V)``, as `token_gradient`.

        Raises:
            ValueError: No suffix, or more targets than embeddings behind it.
            StalePrefixError: The model has changed since `prefill`.
        """
        dtype, shape = self._passes.inner.get_input_embeddings().weight.dtype, (None, self._width)
        check_tensor("suffix_embeds", suffix_embeds, dtypes=(dtype,), shape=shape, strided=True)
        check_tensor("rest_embeds", rest_embeds, dtypes=(dtype,), shape=shape, strided=True)
        check_tensor("target_ids", target_ids, dtypes=(torch.int64,), shape=(None,), strided=True)
        if not len(suffix_embeds) or not 1 <= len(target_ids) <= len(rest_embeds):
            got = f"{len(suffix_embeds)}, {len(rest_embeds)} and {len(target_ids)}"
            raise ValueError(
                f"suffix_embeds, rest_embeds, target_ids: expected s >= 1 and r >= t >= 1, "
                f"got {got}; the rest ends with the targets"
            )
        with self._lock:
            self._check(prefix, [], np.zeros(0, dtype=np.int64))
            gradient = embedding_gradient(
                self._passes, prefix, suffix_embeds, rest_embeds, target_ids, objective
            )
            return by_token(self._passes, gradient)

    def generate_many(
        self,
        prefix: Prefix,
        suffixes: Sequence[str] | Sequence[Ids],
        **options: Any,
    ) -> list[Tensor]:
        """Generate after each suffix by the model's own `generate`, the prefix held once.

        Args:
            prefix: What `prefill` returned, or what it takes.
            suffixes: Texts (encoded without special tokens) or token ids, at least one token each.
            **options: Of ``model.generate``: ``max_new_tokens``, ``do_sample``, ``num_beams``,
                ``num_return_sequences``, ``generation_config``, processors, criteria…

        Returns:
            For each sequence its new tokens, int64 on the CPU, up to the first end-of-sequence
            token; sequences of one suffix follow one another.

        Raises:
            ValueError: An option that cannot work here, or what `score` refuses.
            StalePrefixError: The model has changed since `prefill`.
        """
        check_options(options)
        with self._lock, torch.no_grad():
            rows = self._encoder.texts("suffixes", suffixes, getattr(prefix, "text", None))
            own = not isinstance(prefix, SharedPrefix)
            shared = self.prefill(prefix) if own else prefix
            self._check(
                shared, rows, np.array([max(0, len(row) - 1) for row in rows], dtype=np.int64)
            )
            found = generate(self._passes, shared, rows, options)
            if own:
                shared.close()
            return found

    # -- checks and results ----------------------------------------------------------------------

    def _check(self, shared: SharedPrefix, rows: list[np.ndarray], first: np.ndarray) -> None:
        support.check_state(self.model)
        if shared.closed:
            raise StalePrefixError("the prefix has been closed; call prefill again")
        if shared.fingerprint != support.fingerprint(self.model):
            raise StalePrefixError(
                "the model's weights, adapters, dtype or attention have changed since prefill; "
                "call prefill again"
            )
        self._encoder.check_rows(rows, first, shared.length)
        longest = max((len(row) for row in rows), default=0)
        support.check_length(self._passes.inner, shared.length, longest)

    def _output(
        self, shared: SharedPrefix, work: Work, backend: str, reduction: str, begin: float
    ) -> ScoreOutput:
        output = ScoreOutput.of(
            work, shared.length, reduction, backend, time.perf_counter() - begin
        )
        row = output.broken()
        if row is not None:
            where = self._passes.where_not_finite(shared, work.rows[row][:-1], work.table)
            raise FloatingPointError(
                f"continuations[{row}]: its logits are not finite{where}; the model overflows on "
                "it (try bfloat16 or float32)"
            )
        return output
