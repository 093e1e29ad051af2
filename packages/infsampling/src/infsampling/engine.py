"""The decoding batch: fixed addresses and shapes, one step after the other."""

from __future__ import annotations

import itertools
import logging
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels.ops.prefix_attention.decode import decode_tile
from shared_kernels.ops.sampling import SlotState, gumbel_sample, logit_threshold, slot_refill_
from shared_kernels.ops.sampling import fields as f

from infsampling.attention import DecodeCall
from infsampling.cache import Parked, PrefixStore, SlotCache
from infsampling.prompts import Prefill, tokens_together

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from torch import Tensor

    from infsampling.config import SamplingConfig

_LOG = logging.getLogger(__name__)
#: No token: what stands where no more stop tokens do.
_NEVER = -2
#: Prompts and their bound are rounded up to these, so that calls of similar prompts share buffers.
_PREFIX_TOKENS, _LONGEST = 64, 512
#: The batch is padded to a multiple of this: rows of a product have the same bits then, whichever
#: row of the batch they are.
LANES = 8


@dataclass(frozen=True)
class Sizes:
    """What buffers are made for.

    Attributes:
        places: Slots that take samples.
        rows: Samples.
        capacity: Tokens of a sample at most.
        prefixes: Tokens of all unique prompts.
        longest: Of the longest prompt.
    """

    places: int
    rows: int
    capacity: int
    prefixes: int
    longest: int

    def room(self) -> Sizes:
        """Return what to allocate, so that similar calls find it large enough."""
        return Sizes(
            self.places,
            self.rows,
            self.capacity,
            -(-self.prefixes // _PREFIX_TOKENS) * _PREFIX_TOKENS,
            -(-self.longest // _LONGEST) * _LONGEST,
        )

    def holds(self, other: Sizes) -> bool:
        """Return whether buffers of this size will do for another, without much waste."""
        return (
            (self.places, self.capacity) == (other.places, other.capacity)
            and other.rows <= self.rows <= 2 * other.rows
            and other.prefixes <= self.prefixes <= max(_PREFIX_TOKENS, 2 * other.prefixes)
            and other.longest <= self.longest
        )


class Engine:
    """Slots, prompts and samples on the device.

    Args:
        model: A causal language model in evaluation mode, which attends by our function.
        config: Of the sampler.
        sizes: What the first call needs.
        stops: Most tokens that can end a sample.
        forward: Calls the model in a decoding step.
    """

    def __init__(
        self, model: Any, config: SamplingConfig, sizes: Sizes, stops: int, forward: Forward
    ) -> None:
        self.model, self.config, self.sizes = model, config, sizes.room()
        self.device = next(model.parameters()).device
        self.fingerprint = fingerprint(model)
        text = model.config.get_text_config()
        heads = text.num_attention_heads
        key_heads = getattr(text, "num_key_value_heads", None) or heads
        layers, sizes = text.num_hidden_layers, self.sizes
        self.lanes = -(-sizes.places // LANES) * LANES
        self.store = PrefixStore(layers, sizes.prefixes)
        self.prefill = Prefill(
            model, self.store, config.prefill_chunk,
            tokens_together(self.device, config.prefill_chunk),
        )  # fmt: skip
        self.cache = SlotCache(layers, sizes.places, sizes.capacity)
        self.state = SlotState.empty(
            self.lanes, sizes.rows, sizes.capacity, places=sizes.places,
            tile=decode_tile(heads, key_heads), device=self.device,
        )  # fmt: skip
        slots = self.state.slots
        self.eos = torch.full((max(1, stops),), _NEVER, dtype=torch.int64, device=self.device)
        self.host_syncs = self.captures = 0
        self._none = torch.zeros(self.lanes, dtype=torch.int64, device=self.device)
        self._first = torch.arange(self.lanes, device=self.device) * sizes.capacity - 1
        self._place = torch.zeros_like(self._first)
        tables = (
            slots[f.LENGTH], slots[f.START], slots[f.PREFIX_LENGTH], self.state.order,
            self.state.tiles,
        )  # fmt: skip
        self._call = DecodeCall(self.cache, self.store, tables, sizes.longest)
        self._forward = forward
        self._wants_graph = self.device.type == "cuda" and config.cuda_graph is not False
        # of steps that are watched, and that are not
        self._graphs: dict[bool, Any] = {}
        self._watcher: Callable[[Tensor, Tensor, Tensor], None] | None = None
        self._hidden = self._scratch = self._none
        self.watch_error: Exception | None = None

    def begin(self, eos: Sequence[int]) -> None:
        """Empty all slots, and set the tokens that end a sample."""
        state = self.state
        state.slots.zero_()
        state.slots[[f.ROW, f.PREFIX]] = -1
        state.counters.zero_()
        self.eos.fill_(_NEVER)
        self.eos[: len(eos)] = torch.tensor(list(eos), dtype=torch.int64, device=self.device)
        self.host_syncs = self.captures = 0
        self._watcher = self.watch_error = None

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and outputs."""
        outputs = self.state.tokens.nbytes + self.state.logprobs.nbytes
        return self.cache.nbytes + self.store.nbytes + outputs

    @property
    def _watching(self) -> bool:
        return self._watcher is not None

    # --- who watches ---------------------------------------------------------------------------

    def expect(self, like: Tensor) -> None:
        """Make room for the final states of steps, which are like this one ``(d,)``."""
        self._hidden = self._forward.buffer(self.lanes, like)

    def watch(
        self, begin: Callable[[Tensor], None], update: Callable[[Tensor, Tensor, Tensor], None],
        rows: int,
    ) -> None:  # fmt: skip
        """Tell of every step until the next call: `ProgressivePredictor.update` says what.

        Steps are the same otherwise. An error of ``update`` ends it, and is kept in
        ``watch_error``.

        Args:
            begin: Called with states ``(lanes, d)`` like those to come.
            update: Called in every step.
            rows: The number for lanes without a sample.
        """
        self._scratch = torch.full_like(self._none, rows)
        # it was recorded with what another call's update remembered
        self._graphs.pop(True, None)
        begin(self._hidden)
        self._watcher = update

    def unwatch(self, error: Exception) -> None:
        """Stop telling."""
        self._watcher, self.watch_error = None, error

    def _tell(self, logits: Tensor) -> None:
        if self._watcher is None:
            return
        row = self.state.slots[f.ROW]
        try:
            self._watcher(torch.where(row < 0, self._scratch, row), self._hidden, logits)
        except Exception as error:
            self.unwatch(error)

    # --- prompts -----------------------------------------------------------------------------

    def first_tokens(self, logits: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Draw the first token of every sample of a prompt from one row of logits.

        Returns:
            Tokens, log-probabilities and entropies ``(n,)``.
        """
        rows = logits.expand(len(keys), -1)
        return self._draw(rows, keys, torch.zeros_like(keys[:, 0]))

    def _draw(self, logits: Tensor, keys: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        config = self.config
        limit = None
        if config.temperature > 0:
            # rows of one prompt are the same
            one = logits[:1] if logits.stride(0) == 0 and len(logits) else logits
            limit = logit_threshold(
                one, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p,
                min_p=config.min_p,
            )  # fmt: skip
            if limit is not None:
                limit = limit.expand(len(logits)).contiguous()
        token, logprob, kept, entropy = gumbel_sample(
            logits, keys, index, temperature=config.temperature, threshold=limit
        )
        if config.logprobs == "filtered":
            logprob = logprob - kept
        return token, logprob, entropy

    # --- slots -------------------------------------------------------------------------------

    def fill(self) -> None:
        """Give free slots to the samples that wait."""
        slot_refill_(self.state, self._none, self._none.float(), self.eos, record=False)

    def run(self, steps: int) -> None:
        """Take steps, by the CUDA graph if there is one."""
        with self._forward.kept():
            while steps and self._wants_graph and self._watching not in self._graphs:
                # a step that is recorded does nothing, so that those before it are taken for real
                self._warm_up()
                steps -= 1
            for _ in range(steps):
                graph = self._graphs.get(self._watching)
                if graph is None:
                    self.step()
                else:
                    graph.replay()

    def _warm_up(self) -> None:
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self.step()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        torch.cuda.synchronize(self.device)
        graph, watching = torch.cuda.CUDAGraph(), self._watching
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.step()
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, torch.AcceleratorError) as error:
            if watching:
                # it may be what watches that cannot be recorded: without, it is tried again
                self.unwatch(self.watch_error or error)
                return
            self._wants_graph = False
            _LOG.warning("the decoding step cannot be recorded, and runs uncaptured: %s", error)
            return
        # a watcher that failed meanwhile is in what was recorded, in part
        if self._watching == watching:
            self._graphs[watching] = graph
        self.captures += 1

    def step(self) -> None:
        """Decode one token of every busy slot, and fill the slots that become free."""
        state = self.state
        slots = state.slots
        length = slots[f.LENGTH]
        idle = self.cache.tokens - 1
        self._place.copy_(torch.where(length > 0, self._first + length, idle))
        self.cache.write_to(self._place)
        logits = self._forward(
            input_ids=slots[f.TOKEN][:, None], position_ids=slots[f.POSITION][:, None],
            past_key_values=self.cache, use_cache=True, infsampling=self._call,
        ).logits[:, -1]  # fmt: skip
        keys = slots[f.KEY_LOW : f.KEY_HIGH + 1].T
        token, logprob, _ = self._draw(logits, keys, length)
        self._tell(logits)
        slot_refill_(state, token, logprob, self.eos)

    def queue(self, rows: Sequence[int]) -> None:
        """Let these samples wait, in this order, instead of those that do."""
        count = len(rows)
        self.state.queue[:count] = torch.tensor(rows, dtype=torch.int64, device=self.device)
        self.state.counters[f.HEAD], self.state.counters[f.TAIL] = 0, count

    # --- what the host sees --------------------------------------------------------------------

    def progress(self, rows: int) -> tuple[list[int], list[int], list[int], list[int]]:
        """Look at all: counters, the sample of each slot, and tokens and reason of each sample."""
        self.host_syncs += 1
        state = self.state
        parts = (
            state.counters, state.slots[f.ROW, : self.sizes.places], state.rows[f.COUNT, :rows],
            state.rows[f.REASON, :rows],
        )  # fmt: skip
        found = torch.cat(parts).tolist()
        cuts = [0, *itertools.accumulate(map(len, parts))]
        totals, held, counts, reasons = (found[a:b] for a, b in itertools.pairwise(cuts))
        return totals, held, counts, reasons

    def park(self, slot: int, tokens: int) -> Parked:
        """Take a sample of so many tokens out of its slot."""
        # the newest token's keys and values are not there yet
        parked = Parked(self.cache.region(slot, tokens - 1))
        self.state.slots[f.ROW, slot] = -1
        return parked

    def place(self, slot: int, row: int, tokens: int, parked: Parked | None) -> None:
        """Put a sample into a free slot; `fill` must follow."""
        if parked is not None:
            parked.restore(self.cache.region(slot, tokens - 1))
        self.state.slots[f.ROW, slot] = row


class Forward:
    """Calls a model in decoding steps, and keeps the states that its head reads.

    They are kept whether anybody wants them or not: a compiled model rounds otherwise where they
    are, and who watches must not change a bit.

    Args:
        model: A causal language model.
        compile: Compile it: anew for each object, once for each size of a batch.
    """

    def __init__(self, model: Any, *, compile: bool) -> None:
        self.model, self.compiles = model, compile
        self._buffers: dict[tuple[Any, ...], Tensor] = {}
        self._hidden: Tensor | None = None
        # one object, so that what was compiled with it is found again
        self._hook = self._keep
        self._calls: dict[int, Any] = {}

    def __call__(self, **inputs: Any) -> Any:
        """Return the model's output."""
        if not self.compiles:
            return self.model(**inputs)
        size = len(inputs["input_ids"])
        if size not in self._calls:
            self._calls[size] = _compiled(self.model)
        return self._calls[size](**inputs)

    def buffer(self, lanes: int, like: Tensor) -> Tensor:
        """Return where states ``(lanes, d)`` of steps will be, the same for the same sizes."""
        key = (lanes, *like.shape, like.dtype, like.device)
        if key not in self._buffers:
            self._buffers[key] = like.new_zeros(lanes, *like.shape)
        self._hidden = self._buffers[key]
        return self._hidden

    @contextmanager
    def kept(self) -> Generator[None]:
        """Within this, a step leaves the states in the buffer that was asked for last."""
        hook = self.model.get_output_embeddings().register_forward_pre_hook(self._hook)
        try:
            yield
        finally:
            hook.remove()

    def _keep(self, module: Any, args: tuple[Tensor, ...]) -> None:
        assert self._hidden is not None
        self._hidden.copy_(args[0][:, -1])


def _compiled(model: Any) -> Any:
    def forward(**inputs: Any) -> Any:
        return model(**inputs)

    # what is compiled belongs to the code object, and each of them may be compiled a few times only
    forward.__code__ = forward.__code__.replace()
    return torch.compile(forward)


def fingerprint(model: Any) -> tuple[Any, ...]:
    """Return what a recorded step depends on: where the weights are, and what they are."""
    return tuple((p.data_ptr(), p.dtype, p.shape, p.device) for p in model.parameters())
