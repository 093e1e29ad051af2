"""A real model: tokens, ends and log-probabilities are those of sequential generation."""

import sys
from pathlib import Path

import pytest
import torch
from infsampling import InfiniteSampler, SamplingConfig
from infsampling.scheduling import free_slots
from tenfold.assets import smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent))
import keyed

TEXT = "Name a colour and say why you like it, in one sentence."


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval()


def test_group_of_sixteen_in_eight_slots(model):
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": TEXT}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    settings = SamplingConfig(max_slots=8, max_new_tokens=20, eos_token_id=(2,))
    sampler = InfiniteSampler(model, settings)
    found = sampler.generate([ids], 16)
    chosen = [0, 3, 8, 15]
    expected = keyed.generate(model, ids, chosen, settings, [2])
    assert [found.completion_ids[sample] for sample in chosen] == expected
    assert {"stop", "length"} == set(found.finish_reason)
    assert len({tuple(tokens) for tokens in found.completion_ids}) == 16
    turns = settings.replace(policy="turns", turn=4, sync_every=4, rerank_every=4)
    parked = InfiniteSampler(model, turns).generate([ids], 16)
    assert parked.completion_ids == found.completion_ids
    assert parked.logprobs == found.logprobs
    assert parked.stats.swaps > 0
    # of this size the slots cost no steps
    slots = free_slots([len(tokens) - 1 for tokens in found.completion_ids])
    assert found.stats.lower_bound <= 20 * 16 / min(8, slots)
