import pytest
from infsampling import SamplingConfig
from infsampling.config import POLICIES
from infsampling.scheduling import POLICIES as ORDERS
from transformers import GenerationConfig


def test_policies_are_those_of_the_schedules():
    assert set(POLICIES) == {"auto", *ORDERS}


def test_from_generation_config():
    generation = GenerationConfig(
        do_sample=True,
        temperature=0.6,
        top_k=20,
        top_p=0.95,
        max_new_tokens=77,
        eos_token_id=[1, 2],
    )
    found = SamplingConfig.from_generation_config(generation, max_slots=4)
    assert (found.temperature, found.top_k, found.top_p) == (0.6, 20, 0.95)
    assert (found.max_new_tokens, found.eos_token_id, found.max_slots) == (77, (1, 2), 4)
    greedy = SamplingConfig.from_generation_config(GenerationConfig(eos_token_id=5))
    assert (greedy.temperature, greedy.top_k, greedy.eos_token_id) == (0.0, 0, (5,))
    assert greedy.max_new_tokens == SamplingConfig().max_new_tokens


@pytest.mark.parametrize("option", [
    {"num_beams": 3}, {"repetition_penalty": 1.2}, {"stop_strings": ["a"]},
    {"no_repeat_ngram_size": 2}, {"suppress_tokens": [4]},
])  # fmt: skip
def test_what_the_sampler_does_not_have_is_refused(option):
    name = next(iter(option))
    with pytest.raises(ValueError, match=f"{name}: expected .* use `generate`"):
        SamplingConfig.from_generation_config(GenerationConfig(do_sample=True, **option))


def test_from_trl():
    from trl import GRPOConfig

    args = GRPOConfig(
        output_dir="unused", temperature=0.9, max_completion_length=33, seed=8, bf16=False,
        use_cpu=True, report_to=[], generation_kwargs={"min_p": 0.1},
    )  # fmt: skip
    found = SamplingConfig.from_trl(args, policy="turns")
    assert (found.temperature, found.max_new_tokens, found.seed) == (0.9, 33, 8)
    assert (found.min_p, found.policy, found.top_p) == (0.1, "turns", 1.0)
    args.generation_kwargs = {"num_beams": 2}
    with pytest.raises(ValueError, match="num_beams"):
        SamplingConfig.from_trl(args)


@pytest.mark.parametrize(("values", "text"), [
    ({"max_slots": 0}, "max_slots"), ({"max_new_tokens": 0}, "max_new_tokens"),
    ({"temperature": -1.0}, "temperature"), ({"top_p": 0.0}, "top_p"), ({"top_p": 1.5}, "top_p"),
    ({"min_p": 2.0}, "min_p"), ({"top_k": -1}, "top_k"), ({"policy": "best"}, "policy"),
    ({"rerank_every": 24}, "a multiple of sync_every=16"), ({"memory_budget": 0}, "memory_budget"),
    ({"logprobs": "raw"}, "logprobs"), ({"sync_every": 0}, "sync_every"),
    ({"max_prompt_tokens": 0}, "max_prompt_tokens"), ({"park_limit": 0.5}, "park_limit"),
    ({"park_limit": float("nan")}, "park_limit"),
])  # fmt: skip
def test_bad_values(values, text):
    with pytest.raises(ValueError, match=text):
        SamplingConfig(**values)


def test_end_tokens_are_a_tuple():
    assert SamplingConfig(eos_token_id=4).eos_token_id == (4,)
    assert SamplingConfig(eos_token_id=[4, 5]).eos_token_id == (4, 5)
