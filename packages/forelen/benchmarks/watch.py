"""What watching ``generate`` costs: 64 answers of 96 tokens to prompts of 16.

``step``: every other token of a call is watched, and the medians of the two kinds of steps are
compared, since from one call to the next the host's speed changes by more than watching costs.
Times are the host's at the end of each step, the device's work included; memory is a whole call's,
so that of watching in both.

``first``: the prediction before the answer begins, by itself, beside the pass over the prompts that
``generate`` begins with. An engine that is watched needs no second pass.

Qwen2.5's shapes of 0.5B and 7B with random weights in bfloat16, and a predictor of random weights:
time says something, predictions do not.
"""

from __future__ import annotations

import statistics
import time
from functools import partial
from itertools import pairwise

import torch
from shared_kernels.bench import Arm, Workload, benchmark
from transformers import StoppingCriteria, StoppingCriteriaList

ROWS, PROMPT, TOKENS = 64, 16, 96
SHAPES = {
    "0.5B": {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "7B": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False,
    },
}  # fmt: skip


class _Ends(StoppingCriteria):
    """Stops nothing; notes when each step was done, the device's work included."""

    def __init__(self):
        self.times = []

    def __call__(self, input_ids, scores, **options):
        torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class _EveryOther:
    """Hears every other token, the first of them."""

    def __init__(self, token):
        self.token, self.turn = token, True

    def __call__(self, *args):
        if self.turn:
            self.token(*args)
        self.turn = not self.turn


def _model(device, shape):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(vocab_size=151936, **SHAPES[shape])
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        model = Qwen2ForCausalLM(config).eval()
        torch.set_default_dtype(default)
    return model


def _watch(device, shape):
    if device == "cpu":
        return
    from forelen import LengthPredictor, LengthPredictorConfig

    model = _model(device, shape)
    ids = torch.randint(0, 1000, (ROWS, PROMPT), device=device)
    mask = torch.ones_like(ids)
    config = LengthPredictorConfig(hidden_size=model.config.hidden_size, plp=True)
    predictor = LengthPredictor(config).eval()

    def generate(criteria=None):
        return model.generate(
            ids, attention_mask=mask, max_new_tokens=TOKENS, min_new_tokens=TOKENS,
            do_sample=False, pad_token_id=0, stopping_criteria=criteria,
        )  # fmt: skip

    def watched():
        with predictor.watch(model) as stream:
            out = generate()
        return out, stream

    found = {}

    def step(name):
        """Return the median of one kind of steps; a call has both."""
        if name not in found:
            ends = _Ends()
            with predictor.watch(model) as stream:
                stream.token = _EveryOther(stream.token)
                generate(StoppingCriteriaList([ends]))
            # the first that are watched compile and record
            times = [after - before for before, after in pairwise(ends.times)][8:]
            found["watched"], found["generate"] = (statistics.median(times[n::2]) for n in range(2))
        return found.pop(name)

    def check():
        out, stream = watched()
        assert torch.equal(out, generate())
        assert stream.time == TOKENS - 1
        assert bool((stream.remaining.mean() >= 1).all())

    params = {"rows": ROWS, "prompt": PROMPT, "tokens": TOKENS, "shape": shape}
    common = {"device": device, "check": check, "baseline": "generate", "params": params}
    yield Workload(
        name=f"step/{shape}", clock="returned", **common,
        arms=[Arm(name=name, fn=partial(step, name)) for name in ("generate", "watched")],
    )  # fmt: skip


@benchmark
def small(device):
    """The shape of Qwen2.5-0.5B."""
    yield from _watch(device, "0.5B")


@benchmark
def large(device):
    """The shape of Qwen2.5-7B."""
    yield from _watch(device, "7B")


@benchmark
def first(device):
    """The first prediction, of 32 prompts of 512 tokens."""
    if device == "cpu":
        return
    from forelen import LengthPredictor, LengthPredictorConfig

    for shape in SHAPES:
        model = _model(device, shape)
        ids = torch.randint(0, 1000, (32, 512), device=device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        predictors = {}
        for pooling in ("entropy", "last"):
            torch.manual_seed(0)
            config = LengthPredictorConfig(hidden_size=model.config.hidden_size, pooling=pooling)
            predictors[pooling] = LengthPredictor(config).eval()

        @torch.no_grad()
        def prefill(model=model, inputs=inputs):
            return model(**inputs, logits_to_keep=1)

        def predict(pooling, model=model, inputs=inputs, predictors=predictors):
            return predictors[pooling].predict(model, inputs)

        def check(predict=predict, predictors=predictors):
            for pooling in predictors:
                law = predict(pooling)
                assert not law.fallback.any()
                assert len(set(law.mean().tolist())) == 32

        yield Workload(
            name=f"first/{shape}", params={"prompts": 32, "tokens": 512, "shape": shape},
            clock="wall", device=device, check=check, baseline="prefill",
            arms=[
                Arm(name="prefill", fn=prefill),
                *(Arm(name=f"predict, {p}", fn=partial(predict, p)) for p in predictors),
            ],
        )  # fmt: skip
