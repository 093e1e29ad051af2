"""The same on a GPU: graphs, compiled steps, 16 bits, and what they must not change."""

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from infsampling import InfiniteSampler, OracleLengths, SamplingConfig
from infsampling.scheduling import POLICIES
from shared_kernels.testing.models import tiny_model

sys.path.insert(0, str(Path(__file__).parent))
import keyed

EOS = tuple(range(2, 9))
PROMPT = [11, 12, 13, 14, 15]
pytestmark = pytest.mark.gpu


def config(**changes):
    base = {"max_slots": 8, "max_new_tokens": 24, "eos_token_id": EOS, "seed": 3, "compile": False}
    return SamplingConfig(**base | changes)


@pytest.fixture
def llama(cuda):
    return tiny_model("llama").eval().to(cuda)


def test_graph_gives_the_same_bits(llama):
    plain = InfiniteSampler(llama, config(cuda_graph=False)).generate([PROMPT], 30)
    sampler = InfiniteSampler(llama, config())
    for _ in range(2):
        found = sampler.generate([PROMPT], 30)
        assert (found.completion_ids, found.logprobs) == (plain.completion_ids, plain.logprobs)
    assert plain.stats.graph_captures == 0
    assert found.stats.graph_captures == 0
    assert found.stats.host_syncs <= found.stats.decode_steps // 16 + 2


def test_the_cpu_draws_the_same(llama):
    found = InfiniteSampler(llama, config()).generate([PROMPT], 30)
    model = copy.deepcopy(llama).cpu()
    assert found.completion_ids == InfiniteSampler(model, config()).generate(
        [PROMPT], 30).completion_ids  # fmt: skip
    assert found.completion_ids == keyed.generate(model, PROMPT, range(30), config(), EOS)


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gpt_oss", "mistral", "gpt2"])
def test_compiled_steps(cuda, name):
    model = tiny_model(name).eval().to(cuda)
    plain = InfiniteSampler(model, config()).generate([PROMPT], 20)
    found = InfiniteSampler(model, config(compile=True)).generate([PROMPT], 20)
    assert found.completion_ids == plain.completion_ids
    # the experts of gpt_oss go through the host, and cannot be recorded
    assert found.stats.graph_captures == (name != "gpt_oss")
    for a, b in zip(found.logprobs, plain.logprobs, strict=True):
        assert a == pytest.approx(b, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True])
def test_tokens_do_not_depend_on_the_schedule(cuda, dtype, compiled):
    # wide enough for tensor cores, and prompts and answers over several splits
    model = tiny_model(
        "llama", hidden_size=256, intermediate_size=512, num_attention_heads=4, head_dim=64,
        max_position_embeddings=2048, dtype=dtype,
    ).eval().to(cuda)  # fmt: skip
    prompts = [[*range(10, 90)] * 8, PROMPT]
    base = config(
        max_slots=16, max_new_tokens=600, eos_token_id=(), compile=compiled, park_limit=4.0
    )  # fmt: skip
    lengths = np.random.default_rng(0).integers(1, 600, 48).tolist()
    plain = InfiniteSampler(model, base).generate(prompts, 24, forced_lengths=lengths)
    for policy in POLICIES:
        oracle = OracleLengths([lengths[:24], lengths[24:]])
        sampler = InfiniteSampler(model, base.replace(policy=policy), length_predictor=oracle)
        found = sampler.generate(prompts, 24, forced_lengths=lengths)
        assert found.completion_ids == plain.completion_ids
        assert found.logprobs == plain.logprobs
        assert (found.stats.swaps > 0) == (policy in ("lrpt", "turns"))
    alone = InfiniteSampler(model, base).generate(prompts[:1], 24, forced_lengths=lengths[:24])
    assert alone.completion_ids == plain.completion_ids[:24]
    assert alone.logprobs == plain.logprobs[:24]


def test_other_slots_change_tokens_of_near_ties_only(cuda):
    model = tiny_model(
        "llama", hidden_size=256, intermediate_size=512, num_attention_heads=4, head_dim=64,
        max_position_embeddings=512, dtype=torch.bfloat16,
    ).eval().to(cuda)  # fmt: skip
    assert keyed.share_that_parts(model, PROMPT, 64, 200, (8, 16, 32)) < 0.5


def test_weights_that_changed_are_used(llama):
    sampler = InfiniteSampler(llama, config(compile=True))
    before = sampler.generate([PROMPT], 12)
    with torch.no_grad():
        for p in llama.parameters():
            p.mul_(1.01).add_(0.01)
    after = sampler.generate([PROMPT], 12)
    fresh = InfiniteSampler(copy.deepcopy(llama), config(compile=True)).generate([PROMPT], 12)
    assert after.completion_ids == fresh.completion_ids != before.completion_ids
    assert after.logprobs == fresh.logprobs
    assert after.stats.graph_captures == 0


def test_refilling_never_records_or_compiles_again(llama):
    sampler = InfiniteSampler(llama, config(compile=True))
    sampler.generate([PROMPT], 1000)
    torch._dynamo.utils.counters.clear()
    found = sampler.generate([PROMPT[:3]], 1000)
    assert found.stats.graph_captures == 0
    assert not torch._dynamo.utils.counters["frames"]


def test_buffers_that_are_made_anew_find_what_was_compiled(cuda):
    # 16 bits: projections are joined
    llama = tiny_model("llama", dtype=torch.bfloat16).eval().to(cuda)
    sampler = InfiniteSampler(llama, config(compile=True))
    before = sampler.generate([PROMPT], 20)
    torch._dynamo.utils.counters.clear()
    for _ in range(2):
        sampler.close()
        found = sampler.generate([PROMPT], 20)
        assert found.stats.graph_captures == 1
        assert found.completion_ids == before.completion_ids
    assert not torch._dynamo.utils.counters["frames"]
