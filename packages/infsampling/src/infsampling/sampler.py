"""Sample many completions of each prompt, as many at a time as there are slots."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels.models import attention_of, configs_of

from infsampling import memory, support
from infsampling.attention import NAME
from infsampling.call import Call
from infsampling.config import SamplingConfig
from infsampling.engine import Engine, Forward, Sizes, fingerprint
from infsampling.fusion import FusedProjections
from infsampling.request import counts_of

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

    from infsampling.length_prediction import LengthPredictor
    from infsampling.output import Completion, SamplingOutput


class InfiniteSampler:
    """Samples completions of prompts in slots that never stand empty while a sample waits.

    A prompt's keys and values are computed and held once, whatever the number of its samples; the
    memory is set by the slots. Prompts that do not fit together are sampled in rounds. A sample's
    tokens are a function of the weights, the prompt, the seed, the step and the sample's number:
    other prompts, the order, the predictor and where it was decoded change nothing, bit for bit, as
    long as slots, device, dtype and versions stay.

    Args:
        model: A causal language model of transformers that lets its attention be chosen, in any
            mode; it is set to evaluation while sampling and left as it was.
        config: Settings; by default those of the model's generation configuration.
        length_predictor: Decides the order for policies that want predictions.
        processing_class: A tokenizer, asked for its end-of-sequence token.

    Raises:
        UnsupportedModelError: The model has a part that cannot be served.
    """

    def __init__(
        self,
        model: Any,
        config: SamplingConfig | None = None,
        *,
        length_predictor: LengthPredictor | None = None,
        processing_class: Any = None,
    ) -> None:
        support.check_model(model)
        self.model = model
        if config is None:
            config = SamplingConfig.from_generation_config(model.generation_config)
        self.config = config
        self.length_predictor = length_predictor
        self.processing_class = processing_class
        self._engine: Engine | None = None
        self._forward: Forward | None = None
        self._projections = FusedProjections(model)
        self.mean_length: float | None = None
        self.last_slots: int | None = None
        self._running = False

    # --- public ------------------------------------------------------------------------------

    def plan(
        self, prompt_lengths: Sequence[int], num_generations: int | Sequence[int]
    ) -> memory.MemoryPlan:
        """Say how many slots a call would have, and what takes how much memory.

        Args:
            prompt_lengths: Tokens of each unique prompt.
            num_generations: Samples of each, or of all alike.

        Raises:
            MemoryError: Not even one slot fits beside one prompt.
        """
        counts = counts_of(num_generations, len(prompt_lengths))
        return memory.make_plan(
            self.model, self.config, prompt_lengths, counts, mean_length=self.mean_length,
            last=self.last_slots, held=0 if self._engine is None else self._engine.nbytes,
        )  # fmt: skip

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        num_generations: int | Sequence[int],
        *,
        step: int = 0,
        sample_ids: Sequence[int] | None = None,
        forced_lengths: Sequence[int] | None = None,
    ) -> SamplingOutput:
        """Sample.

        Args:
            prompt_ids: Token ids of each prompt; one that comes twice is computed once, and its
                samples are numbered on.
            num_generations: Samples of each prompt, or of all alike.
            step: Of the training; another step has other samples.
            sample_ids: Number of each sample among all samples of its prompt, where other
                processes sample the same prompt; by default they are numbered here.
            forced_lengths: Tokens that each sample is to have, whatever it says: for benchmarks.

        Raises:
            ValueError: Prompts without tokens or beyond the model's positions, or numbers that do
                not fit together.
            MemoryError: Not even one slot fits beside one prompt; or the slots did not, of planned
                ones not even half of them.
        """
        call = Call(self, prompt_ids, num_generations, step, sample_ids, forced_lengths)
        return call.output()

    def stream(
        self,
        prompt_ids: Sequence[Sequence[int]],
        num_generations: int | Sequence[int],
        *,
        step: int = 0,
        sample_ids: Sequence[int] | None = None,
        forced_lengths: Sequence[int] | None = None,
    ) -> Iterator[Completion]:
        """Sample, and yield completions as they end; closing the iterator drops the rest.

        Arguments and errors as in `generate`.
        """
        call = Call(self, prompt_ids, num_generations, step, sample_ids, forced_lengths)
        return call.completions()

    def refresh(self) -> None:
        """Forget everything that was made for the model as it was.

        Keys and values of prompts never outlive a call, and changed weights are read where they
        are; call this after the model had modules exchanged.
        """
        self._engine = self._forward = None

    def close(self) -> None:
        """Free keys, values and buffers."""
        self._engine = None

    # --- inside ------------------------------------------------------------------------------

    def eos_token_ids(self) -> list[int]:
        """Return the tokens that end a completion."""
        if self.config.eos_token_id is not None:
            return list(self.config.eos_token_id)
        found: list[int] = []
        for owner in (getattr(self.model, "generation_config", None), self.processing_class):
            ids = getattr(owner, "eos_token_id", None)
            found += [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
        return list(dict.fromkeys(found))

    def engine_for(self, sizes: Sizes, eos: Sequence[int]) -> Engine:
        """Return the buffers of the last call if they will do, else new ones."""
        engine, stops = self._engine, len(self.eos_token_ids())
        if (
            engine is None
            or not engine.sizes.holds(sizes)
            or engine.fingerprint != fingerprint(self.model)
        ):
            # what it held is free before the new one is made
            engine = self._engine = None
            engine = self._engine = Engine(
                self.model, self.config, sizes, stops, self._step_forward()
            )
        engine.begin(eos)
        return engine

    def _step_forward(self) -> Forward:
        if self._forward is None:
            wanted = self.config.compile
            if wanted is None:
                wanted = next(self.model.parameters()).is_cuda
            self._forward = Forward(self.model, compile=wanted)
        return self._forward

    @contextmanager
    def prepared(self) -> Generator[None]:
        """Set the model up for sampling, and back, also after an exception."""
        if self._running:
            raise RuntimeError(
                "this sampler is sampling already; finish or close the iterator of `stream` first"
            )
        training = [module for module in self.model.modules() if module.training]
        self._running = True
        try:
            for module in training:
                module.training = False
            with torch.no_grad(), attention_of(configs_of(self.model), NAME), ExitStack() as stack:
                if next(self.model.parameters()).is_cuda:
                    stack.enter_context(self._projections())
                yield
        finally:
            self._running = False
            for module in training:
                module.training = True

    def learned(self, mean_length: float, slots: int) -> None:
        """Remember how long samples were, and in how many slots, for the next plan."""
        self.last_slots = slots
        before = mean_length if self.mean_length is None else self.mean_length
        self.mean_length = 0.5 * before + 0.5 * mean_length
