"""What watching ``generate`` costs: 64 answers of 96 tokens to prompts of 16, every step predicted.

The time is the median of the steps of a call, by the host's clock at the end of each, so that a
step that the host was late for says nothing; ``whole`` is that of the calls, prompts included.
Qwen2.5's shapes of 0.5B and 7B with random weights in bfloat16, and a predictor of random weights:
time says something, predictions do not. ``stride 4`` predicts at every fourth token.
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

    def watched(stride, criteria=None):
        with predictor.watch(model, stride=stride) as stream:
            out = generate(criteria)
        return out, stream

    def step(call):
        ends = _Ends()
        call(StoppingCriteriaList([ends]))
        return statistics.median(after - before for before, after in pairwise(ends.times))

    def check():
        out, stream = watched(1)
        assert torch.equal(out, generate())
        assert stream.time == TOKENS - 1
        assert bool((stream.remaining.mean() >= 1).all())

    arms = {
        "generate": generate,
        "watched": lambda criteria=None: watched(1, criteria),
        "watched, stride 4": lambda criteria=None: watched(4, criteria),
    }
    params = {"rows": ROWS, "prompt": PROMPT, "tokens": TOKENS, "shape": shape}
    common = {"device": device, "check": check, "baseline": "generate"}
    yield Workload(
        name=f"step/{shape}", params=params, clock="returned", **common,
        arms=[Arm(name=name, fn=partial(step, call)) for name, call in arms.items()],
    )  # fmt: skip
    yield Workload(
        name=f"whole/{shape}", params=params, clock="wall", **common,
        arms=[Arm(name=name, fn=call) for name, call in arms.items()],
    )  # fmt: skip


@benchmark
def small(device):
    """The shape of Qwen2.5-0.5B."""
    yield from _watch(device, "0.5B")


@benchmark
def large(device):
    """The shape of Qwen2.5-7B."""
    yield from _watch(device, "7B")
