"""Prompts that are held together: the loop over their samples, and what comes of it."""

from __future__ import annotations

import itertools
import logging
import time
import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
from shared_kernels.ops.sampling import fields as f

from infsampling.engine import Engine, Sizes
from infsampling.errors import SamplingWarning
from infsampling.keys import prompt_uid, sample_keys
from infsampling.length_prediction import ProgressivePredictor, PromptState, chosen_policy
from infsampling.output import FINISH_REASONS, Completion, SamplingStats
from infsampling.scheduling import bounds, parking, policies

if TYPE_CHECKING:
    from collections.abc import Generator

    from torch import Tensor

    from infsampling.cache import Parked
    from infsampling.request import Request
    from infsampling.sampler import InfiniteSampler

_LOG = logging.getLogger(__name__)
#: Steps of a probe, if the predictor does not say.
PROBE_TOKENS = 16


class Run:
    """Prompts that are held together, and all their samples.

    Args:
        sampler: Whose model and settings.
        request: What to sample.
        step: Of the training.
        eos: Tokens that end a sample.
        slots: Samples decoded at once.
    """

    def __init__(
        self, sampler: InfiniteSampler, request: Request, step: int, eos: list[int], slots: int
    ) -> None:
        self.sampler, self.config, self.step = sampler, sampler.config, step
        self.request, self.eos, self.slots = request, eos, slots
        self.rows = len(request.unique)
        self.policy = chosen_policy(self.config.policy, sampler.length_predictor)
        self.order: list[int] = []
        self.failed = False
        self.prefill_seconds = self.decode_seconds = 0.0

    # --- the loop ------------------------------------------------------------------------------

    def go(self) -> Generator[list[int]]:
        """Sample, and yield the rows that have ended whenever the host looks."""
        sampler = self.sampler
        lengths = [len(ids) for ids in self.request.prompts]
        self._reset()
        if not self.rows:
            return
        with sampler.prepared():
            told: set[int] = set()
            for again in (False, True):
                try:
                    for ended in self._attempt(lengths):
                        # samples are the same when all begins again
                        fresh = [row for row in ended if row not in told]
                        told.update(fresh)
                        if fresh:
                            yield fresh
                    break
                except torch.OutOfMemoryError as error:
                    if again or self.config.max_slots != "auto" or self.slots == 1:
                        raise MemoryError(
                            f"{self.slots} slots do not fit beside what else is in memory; lower "
                            "max_slots, max_new_tokens or max_resident_prompts, or free "
                            "memory; where much is reserved and little allocated, "
                            "PYTORCH_ALLOC_CONF=expandable_segments:True helps"
                        ) from error
                self._fewer_slots()
            self._warn()
        self._learn()

    def _reset(self) -> None:
        """Begin as if nothing had been sampled."""
        self.parked: dict[int, Parked] = {}
        self.parked_bytes = self.swaps = 0
        self.kv_bytes = self.host_syncs = self.captures = 0
        self.counts, self.reasons = [0] * self.rows, [0] * self.rows
        self.totals = [0] * f.COUNTERS
        self.held: list[int] | None = None

    def _fewer_slots(self) -> None:
        """Take half of the slots, and free what the others took."""
        slots = max(1, self.slots // 2)
        _LOG.warning("out of memory with %d slots: begins again with %d", self.slots, slots)
        self.slots = slots
        vars(self).pop("engine", None)
        self.sampler.close()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _attempt(self, lengths: list[int]) -> Generator[list[int]]:
        """Sample in so many slots, and yield the rows that have ended."""
        self._reset()
        sizes = Sizes(self.slots, self.rows, self.config.max_new_tokens, sum(lengths), max(lengths))
        self.engine = engine = self.sampler.engine_for(sizes, self.eos)
        began = time.perf_counter()
        self._begin()
        self.prefill_seconds = time.perf_counter() - began
        ended = [row for row, reason in enumerate(self.reasons) if reason]
        if ended:
            yield ended
        began = time.perf_counter()
        yield from self._decode(engine, self._ranking(engine))
        self.decode_seconds = time.perf_counter() - began
        self.kv_bytes = engine.cache.nbytes + engine.store.nbytes
        self.host_syncs, self.captures = engine.host_syncs, engine.captures

    def _begin(self) -> None:
        """Compute the prompts, draw all first tokens, and let the samples wait in order."""
        request, engine = self.request, self.engine
        uids = [prompt_uid(ids) for ids in request.prompts]
        keys = sample_keys(
            self.config.seed, self.step, [uids[u] for u in request.unique], request.sample_index
        )
        rows = torch.zeros_like(engine.state.rows[:, : self.rows], device="cpu")
        prompts: list[PromptState] = []
        wanted = self._asks and bool(getattr(self.sampler.length_predictor, "wants_states", False))
        stops = torch.tensor(self.eos, dtype=torch.int64)
        starts = itertools.accumulate(map(len, request.prompts), initial=0)
        # of each prompt its number, its tokens, its rows and its place; some have no samples
        owners = [
            (number, ids, mine, start)
            for number, (ids, mine, start) in enumerate(
                zip(request.prompts, request.rows_of, starts, strict=False)
            )
            if mine
        ]
        places = [(ids, start) for _, ids, _, start in owners]
        for (number, ids, mine, start), found in zip(
            owners, engine.prefill(places, states=wanted), strict=True
        ):
            token, logprob, entropy = (
                x.cpu() for x in engine.first_tokens(found.logits, keys[mine].to(engine.device))
            )
            samples = [request.sample_index[row] for row in mine]
            prompts.append(PromptState(ids, found.hidden, float(entropy[0]), samples, found.states))
            where = torch.tensor(mine)
            limit = torch.tensor([request.limits[row] for row in mine])
            good = token >= 0
            reason = torch.where(limit <= 1, f.CUT, f.RUNNING)
            reason = torch.where(torch.isin(token, stops), f.STOPPED, reason)
            reason = torch.where(good, reason, f.NOT_FINITE)
            for field, value in (
                (f.COUNT, good.long()), (f.LIMIT, limit), (f.REASON, reason),
                (f.ROW_PREFIX, number), (f.ROW_START, start), (f.ROW_PREFIX_LENGTH, len(ids)),
            ):  # fmt: skip
                rows[field, where] = torch.as_tensor(value, dtype=torch.int64)
            rows[f.ROW_KEY_LOW :, where] = keys[where].T
            there = where.to(engine.device)
            state = engine.state
            state.tokens[there, 0] = token.clamp(min=0).int().to(engine.device)
            state.logprobs[there, 0] = logprob.float().to(engine.device)
        engine.cache.allocate(engine.store)
        engine.state.rows.zero_()[:, : self.rows] = rows
        self.counts, self.reasons = rows[f.COUNT].tolist(), rows[f.REASON].tolist()
        engine.expect(prompts[0].hidden)
        self.predicted = self._predict(prompts)
        groups = np.array(request.unique)
        order = policies.order(
            # the first token is there already
            self.predicted - 1,
            self.slots,
            self.policy,
            groups=groups,
        )
        self.order = [row for row in order if not self.reasons[row]]

    def _predict(self, prompts: list[PromptState]) -> np.ndarray:
        """Return expected tokens of each sample; of predictions that fail, all the same."""
        request, predictor = self.request, self.sampler.length_predictor
        expected = np.full(self.rows, float(self.config.max_new_tokens))
        if predictor is None or not self._asks:
            return expected
        owners = [mine for mine in request.rows_of if mine]
        try:
            found = [np.asarray(x, dtype=np.float64) for x in predictor.initial(prompts)]
            for mine, values in zip(owners, found, strict=True):
                if values.shape != (len(mine),) or not np.isfinite(values).all():
                    raise ValueError(f"{len(mine)} finite lengths expected, got {values}")
                expected[mine] = np.clip(values, 1, self.config.max_new_tokens)
        except Exception as error:
            self._fail(error)
            return np.full(self.rows, float(self.config.max_new_tokens))
        return expected

    @property
    def _asks(self) -> bool:
        """Whether the policy wants predictions."""
        return self.policy not in ("fifo", "turns")

    def _fail(self, error: Exception) -> None:
        """Do without the predictor: an order is all that it decides, the samples are right."""
        if not self.failed:
            _LOG.warning("length_predictor failed, samples go as they would without: %r", error)
        self.failed = True

    def _ranking(self, engine: Engine) -> parking.Ranking | None:
        """Return what says who runs, for a policy or a predictor that takes samples out."""
        predictor, policy = self.sampler.length_predictor, self.policy
        progressive = isinstance(predictor, ProgressivePredictor) and not self.failed
        probe = int(getattr(predictor, "probe_tokens", PROBE_TOKENS)) if progressive else 0
        probing = policy == "lpt" and parking.worth_probing(
            self.predicted[self.order] - 1, self.slots, probe
        )
        if policy not in policies.PARKING and not probing:
            return None
        progress = None
        if policy != "turns" and isinstance(predictor, ProgressivePredictor) and not self.failed:
            progress = _Progress(self, predictor, engine)
        return parking.Ranking(
            policy, self.predicted - 1, turn=self.config.turn, limit=self.config.park_limit,
            probe=probe, remaining=progress,
            refresh=None if progress is None else progress.refresh,
            margin=self.config.rerank_every / 2,
        )  # fmt: skip

    def _decode(self, engine: Engine, ranking: parking.Ranking | None) -> Generator[list[int]]:
        engine.queue(self.order)
        every = self.config.sync_every
        if engine.device.type == "cpu" and ranking is None:
            # looking costs nothing there
            every = 1
        clock, waiting = 0, len(self.order)
        done = self.rows - waiting
        if ranking is None:
            engine.fill()
        while done < self.rows:
            if ranking is not None:
                self._move(engine, ranking, full=ranking.due(clock, self.config.rerank_every))
            engine.run(every)
            if engine.watch_error is not None:
                self._fail(engine.watch_error)
            clock += every
            totals, held, counts, reasons = engine.progress(self.rows)
            ended = [
                r for r, (a, b) in enumerate(zip(self.reasons, reasons, strict=True)) if a != b
            ]
            self.totals, self.held, self.counts, self.reasons = totals, held, counts, reasons
            done += len(ended)
            if ended:
                yield ended

    def _move(self, engine: Engine, ranking: parking.Ranking, *, full: bool) -> None:
        """Take samples out of slots, and put others there."""
        first = self.held is None
        held = self.held or [-1] * self.slots
        taken = 0 if first else self.totals[f.HEAD]
        fresh = self.order[taken:]
        steps = np.array(self.counts) - 1
        out, into = ranking.choose(held, list(self.parked), fresh, steps, full=full)
        for slot in out:
            self.parked[held[slot]] = engine.park(slot, self.counts[held[slot]])
        self.swaps += len(out)
        self.parked_bytes = max(self.parked_bytes, sum(p.nbytes for p in self.parked.values()))
        for slot, row in into:
            engine.place(slot, row, self.counts[row], self.parked.pop(row, None))
        started = {row for _, row in into}
        if out or into or first:
            self.order = [row for row in fresh if row not in started]
            engine.queue(self.order)
            engine.fill()

    # --- what comes of it ------------------------------------------------------------------------

    def fetch(self, rows: list[int]) -> list[Completion]:
        """Bring samples that have ended to the host."""
        state, request = self.engine.state, self.request
        longest = max(self.counts[row] for row in rows)
        where = torch.tensor(rows, device=self.engine.device)
        tokens = state.tokens[where, :longest].cpu().long()
        logprobs = state.logprobs[where, :longest].cpu()
        return [
            Completion(
                request.prompt_index[row], request.sample_index[row],
                tokens[i, : self.counts[row]].clone(), logprobs[i, : self.counts[row]].clone(),
                FINISH_REASONS[self.reasons[row]],
            )
            for i, row in enumerate(rows)
        ]  # fmt: skip

    def stats(self) -> SamplingStats:
        """Return how it went."""
        steps = [max(0, count - 1) for count in self.counts]
        bound = bounds.preemptive_bound if self.swaps else bounds.lower_bound
        decoded = self.totals[f.STEPS]
        return SamplingStats(
            policy=self.policy,
            decode_steps=decoded,
            lower_bound=bound(steps, self.slots),
            slot_utilisation=self.totals[f.BUSY] / (decoded * self.slots) if decoded else 1.0,
            slots=self.slots,
            prefill_tokens=sum(
                len(ids)
                for ids, mine in zip(self.request.prompts, self.request.rows_of, strict=True)
                if mine
            ),
            new_tokens=sum(self.counts),
            kv_bytes=self.kv_bytes,
            parked_bytes=self.parked_bytes,
            host_syncs=self.host_syncs,
            swaps=self.swaps,
            graph_captures=self.captures,
            prefill_seconds=self.prefill_seconds,
            decode_seconds=self.decode_seconds,
        )

    def _warn(self) -> None:
        request = self.request
        bad = [row for row, reason in enumerate(self.reasons) if reason == f.NOT_FINITE]
        if bad:
            listed = ", ".join(
                f"prompt {request.prompt_index[row]} sample {request.sample_index[row]} at token "
                f"{self.counts[row]}"
                for row in bad[:5]
            )
            warnings.warn(
                f"{len(bad)} samples ended where a logit was NaN or infinite: {listed}",
                SamplingWarning, stacklevel=4,
            )  # fmt: skip
        if self.config.temperature > 0:
            tokens = self.engine.state.tokens
            for mine in request.rows_of:
                alike = len(mine) > 3 and len({self.counts[row] for row in mine}) == 1
                if alike and self.counts[mine[0]] > 3:
                    lines: Tensor = tokens[mine, : self.counts[mine[0]]]
                    if bool((lines == lines[:1]).all()):
                        warnings.warn(
                            f"all {len(mine)} completions of prompt "
                            f"{request.prompt_index[mine[0]]} are the same: the model is certain",
                            SamplingWarning, stacklevel=4,
                        )  # fmt: skip

    def _learn(self) -> None:
        if self.rows and all(self.reasons):
            self.sampler.learned(float(np.mean(self.counts)), self.slots)
        predictor = self.sampler.length_predictor
        if predictor is not None:
            try:
                for ids, mine in zip(self.request.prompts, self.request.rows_of, strict=True):
                    predictor.finished(ids, np.array([self.counts[row] for row in mine]))
            except Exception as error:
                self._fail(error)


class _Progress:
    """What a progressive predictor said last of each sample, less the steps since."""

    def __init__(self, run: Run, predictor: ProgressivePredictor, engine: Engine) -> None:
        self.run, self.predictor, self.engine = run, predictor, engine
        self.said: np.ndarray | None = None
        self.at = np.zeros(run.rows)
        # prompts without samples were not shown to the predictor
        shown = {unique: place for place, unique in enumerate(sorted(set(run.request.unique)))}
        owners = [shown[unique] for unique in run.request.unique]
        try:
            engine.watch(
                lambda hidden: predictor.begin(owners, hidden), predictor.update, run.rows
            )  # fmt: skip
        except Exception as error:
            run._fail(error)

    def refresh(self) -> None:
        """Ask again."""
        run = self.run
        self.said = None
        if run.failed:
            return
        try:
            found = np.asarray(self.predictor.remaining(), dtype=np.float64)
            goes_on = np.array(run.reasons) == f.RUNNING
            if found.shape != (run.rows,) or not np.isfinite(found[goes_on]).all():
                raise ValueError(f"{run.rows} finite numbers expected of remaining(), got {found}")
        except Exception as error:
            run._fail(error)
            self.engine.unwatch(error)
            return
        self.at = np.array(run.counts) - 1
        # the newest token was made, and not yet read
        most = np.maximum(run.config.max_new_tokens - 1 - self.at, 1)
        self.said = np.clip(found - 1, 1, most)

    def __call__(self, row: int, done: int) -> float:
        """Return the steps that a sample is believed to need yet."""
        if self.said is None:
            return parking.left(float(self.run.predicted[row]) - 1, done)
        return parking.left(float(self.said[row]), done - int(self.at[row]))
