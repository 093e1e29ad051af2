"""More prompts than are held at once: rounds of some after the other, and the same samples."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from infsampling import InfiniteSampler, SamplingConfig, SamplingWarning, memory, simulate
from infsampling.memory import rounds_of
from infsampling.scheduling.bounds import lower_bound
from shared_kernels.testing.models import tiny_model

sys.path.insert(0, str(Path(__file__).parent))
import keyed

EOS = tuple(range(2, 9))
#: The third is the first again, and the fifth has no samples.
PROMPTS = [[11, 12, 13, 14, 15], [40, 41], [11, 12, 13, 14, 15], [60], [61], [70, 71, 72], [80]]
COUNTS = [5, 7, 3, 6, 0, 9, 4]


def config(**changes):
    base = {"max_slots": 8, "max_new_tokens": 24, "eos_token_id": EOS, "seed": 3}
    return SamplingConfig(**base | changes)


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama").eval()


def samples(found):
    return (
        found.completion_ids, found.logprobs, found.finish_reason, found.prompt_index,
        found.sample_index,
    )  # fmt: skip


@pytest.mark.parametrize("policy", ["turns", "lpt", "fifo", "lrpt", "paper"])
@pytest.mark.parametrize("most", [1, 2, 5, 6])
def test_rounds_change_no_sample(llama, policy, most):
    whole = InfiniteSampler(llama, config(policy=policy)).generate(PROMPTS, COUNTS)
    found = InfiniteSampler(llama, config(policy=policy, max_resident_prompts=most)).generate(
        PROMPTS, COUNTS
    )
    assert samples(found) == samples(whole)
    assert found.prompt_index == np.repeat(range(7), COUNTS).tolist()
    assert found.sample_index[12:15] == [5, 6, 7]


def test_what_is_held(llama):
    prompts = [[10 + i, *range(11, 50)] for i in range(12)]
    held = {}
    for most in (None, 6, 5, 1):
        sampler = InfiniteSampler(llama, config(max_slots=4, max_resident_prompts=most))
        found = sampler.generate(prompts, 6)
        held[most] = (sampler._engine.sizes.prefixes, sampler._engine.sizes.rows)
        assert found.stats.prefill_tokens == 480
        assert found.stats.new_tokens == sum(map(len, found.completion_ids))
    # whole blocks of 64 tokens, of 12, 6, 4 and 1 prompts of 40
    assert held == {None: (512, 72), 6: (256, 36), 5: (192, 24), 1: (64, 6)}


def test_stats_are_of_the_whole_call(llama):
    sampler = InfiniteSampler(llama, config(max_slots=4, policy="fifo", max_resident_prompts=2))
    stats = sampler.generate(PROMPTS, COUNTS).stats
    parts = [
        InfiniteSampler(llama, config(max_slots=4, policy="fifo")).generate(*part, sample_ids=ids)
        for part, ids in (
            (([PROMPTS[0], PROMPTS[1]], [8, 7]), [*range(8), *range(7)]),
            (([PROMPTS[3], PROMPTS[4]], [6, 0]), list(range(6))),
            (([PROMPTS[5], PROMPTS[6]], [9, 4]), [*range(9), *range(4)]),
        )
    ]
    of = [part.stats for part in parts]
    assert stats.decode_steps == sum(x.decode_steps for x in of)
    steps = [len(ids) - 1 for part in parts for ids in part.completion_ids]
    assert stats.lower_bound == lower_bound(steps, 4) < sum(x.lower_bound for x in of)
    busy = sum(x.slot_utilisation * x.decode_steps for x in of)
    assert stats.slot_utilisation == pytest.approx(busy / stats.decode_steps)
    assert stats.prefill_tokens == 12
    assert stats.slots == 4
    assert stats.host_syncs == sum(x.host_syncs for x in of)
    assert stats.kv_bytes == max(x.kv_bytes for x in of)
    assert sampler.mean_length is not None


def test_stream_in_rounds(llama):
    sampler = InfiniteSampler(llama, config(max_resident_prompts=2))
    whole = sampler.generate(PROMPTS, COUNTS)
    found = list(sampler.stream(PROMPTS, COUNTS))
    found.sort(key=lambda c: (c.prompt_index, c.sample_index))
    assert [c.ids.tolist() for c in found] == whole.completion_ids
    assert [c.prompt_index for c in found] == whole.prompt_index
    assert [c.sample_index for c in found] == whole.sample_index


def test_forced_lengths_and_numbers_go_to_their_samples(llama):
    forced = [1 + i % 24 for i in range(34)]
    numbers = [*range(100, 105), *range(7), *range(3), *range(6), *range(9), *range(4)]
    kwargs = {"forced_lengths": forced, "sample_ids": numbers, "step": 4}
    whole = InfiniteSampler(llama, config()).generate(PROMPTS, COUNTS, **kwargs)
    few = config(max_resident_prompts=2)
    found = InfiniteSampler(llama, few).generate(PROMPTS, COUNTS, **kwargs)
    assert samples(found) == samples(whole)
    assert list(map(len, found.completion_ids)) == forced
    assert found.sample_index == numbers


def test_predictors_see_one_round_at_a_time(llama):
    seen = []

    class Watches:
        def initial(self, prompts):
            seen.append([list(p.ids) for p in prompts])
            return [np.array([known[tuple(p.ids), n] for n in p.samples]) for p in prompts]

        def finished(self, ids, lengths):
            seen.append((list(ids), len(lengths)))

    truth = InfiniteSampler(llama, config(policy="lpt")).generate(PROMPTS, COUNTS)
    given = zip(truth.prompt_index, truth.sample_index, truth.completion_ids, strict=True)
    known = {(tuple(PROMPTS[index]), number): len(ids) for index, number, ids in given}
    sampler = InfiniteSampler(
        llama, config(policy="lpt", max_resident_prompts=3), length_predictor=Watches()
    )
    found = sampler.generate(PROMPTS, COUNTS)
    assert samples(found) == samples(truth)
    lengths = list(map(len, truth.completion_ids))
    rounds = (lengths[:21], lengths[21:])
    assert found.stats.decode_steps == sum(
        simulate([n - 1 for n in of], 8, "lpt", predictions=[n - 1 for n in of]).steps
        for of in rounds
    )
    assert [entry for entry in seen if isinstance(entry, list)] == [
        [PROMPTS[0], PROMPTS[1], PROMPTS[3]], [PROMPTS[5], PROMPTS[6]],
    ]  # fmt: skip
    ends = {tuple(entry[0]): entry[1] for entry in seen if isinstance(entry, tuple)}
    assert ends == {(11, 12, 13, 14, 15): 8, (40, 41): 7, (60,): 6, (61,): 0, (70, 71, 72): 9,
                    (80,): 4}  # fmt: skip


def test_a_warning_names_the_prompt_that_was_given(llama):
    broken = tiny_model("llama").eval()
    with torch.no_grad():
        broken.get_input_embeddings().weight[70] = float("nan")
    sampler = InfiniteSampler(broken, config(max_resident_prompts=2, eos_token_id=()))
    with pytest.warns(SamplingWarning) as told:
        sampler.generate(PROMPTS, COUNTS)
    for prompt in (0, 3, 5):
        assert sum(f": prompt {prompt} sample 0 at token 0" in str(w.message) for w in told) == 1


# --- by memory -----------------------------------------------------------------------------------


def test_rounds_of_loads():
    assert rounds_of([3, 3, 3, 3], 12, None) == [range(4)]
    # as even as they can be, not two of one and a rest
    assert rounds_of([3] * 5, 9, None) == [range(3), range(3, 5)]
    assert rounds_of([1] * 10, 100, 4) == [range(4), range(4, 8), range(8, 10)]
    assert rounds_of([1] * 9, 100, 4) == [range(3), range(3, 6), range(6, 9)]
    # more than there is room for is left to whoever plans a round of it
    assert rounds_of([1, 50, 1], 10, None) == [range(1), range(1, 2), range(2, 3)]
    assert rounds_of([], 10, None) == [range(0)]
    for most in range(1, 100):
        assert len(rounds_of([1] * 7 * most, 1 << 40, most)) == 7


def test_prompts_that_do_not_fit_together_take_rounds(llama):
    prompts = [[10 + i % 80, 10 + i // 80, *range(11, 49)] for i in range(200)]
    alone = InfiniteSampler(llama, config())
    plan = alone.plan([40] * 200, 3)
    assert plan.rounds == [range(200)]
    budget = (plan.prefixes + plan.outputs) // 2
    sampler = InfiniteSampler(llama, config(max_slots="auto", memory_budget=budget))
    tight = sampler.plan([40] * 200, 3)
    assert 2 <= len(tight.rounds) <= 4
    assert tight.total <= budget
    assert tight.slots >= 8
    found = sampler.generate(prompts, 3)
    assert found.stats.slots == tight.slots
    again = InfiniteSampler(llama, config(max_slots=tight.slots)).generate(prompts, 3)
    assert samples(found) == samples(again)
    assert found.stats.kv_bytes < budget < again.stats.kv_bytes
    # nothing is split that fits beside the slots that are quickest
    enough = plan.prefixes + plan.outputs + 700 * plan.slot
    wide = InfiniteSampler(llama, config(max_slots="auto", memory_budget=enough))
    assert len(wide.plan([40] * 200, 3).rounds) == 1


def test_given_slots_leave_the_rest_to_prompts(llama):
    plan = InfiniteSampler(llama, config()).plan([40] * 200, 3)
    budget = 8 * plan.slot + (plan.prefixes + plan.outputs) // 3
    tight = InfiniteSampler(llama, config(memory_budget=budget)).plan([40] * 200, 3)
    assert tight.slots == 8
    assert len(tight.rounds) in (3, 4)
    assert tight.total <= budget


def test_a_slot_of_more_than_half_of_the_memory(llama):
    plan = InfiniteSampler(llama, config()).plan([4] * 200, 1)
    budget = int(1.5 * plan.slot)
    few = InfiniteSampler(llama, config(max_slots="auto", memory_budget=budget))
    tight = few.plan([4] * 200, 1)
    assert tight.slots == 1
    assert tight.total <= budget


def test_given_slots_that_leave_nothing(llama):
    plan = InfiniteSampler(llama, config()).plan([4] * 200, 1)
    given = InfiniteSampler(llama, config(memory_budget=8 * plan.slot)).plan([4] * 200, 1)
    assert given.slots == 8
    assert given.prefixes + given.outputs <= 2 * plan.slot
    assert len(given.rounds) == 19


def test_a_plan_is_of_the_heaviest_round(llama):
    lengths = [40, 40, 40, 1, 1, 1, 1]
    found = InfiniteSampler(llama, config(max_resident_prompts=4)).plan(lengths, 1)
    assert found.rounds == [range(4), range(4, 7)]
    assert found.prefixes == 121 * found.kv_per_token
    found = InfiniteSampler(llama, config(max_resident_prompts=4)).plan(lengths[::-1], 1)
    assert found.prefixes == 120 * found.kv_per_token


def test_the_bound_of_samples_that_were_parked(llama):
    sampler = InfiniteSampler(llama, config(policy="turns", turn=4, sync_every=2, rerank_every=4,
                                            max_slots=2, max_resident_prompts=1))  # fmt: skip
    forced = [11] * 3 + [1]
    stats = sampler.generate([PROMPTS[0], PROMPTS[1]], [3, 1], forced_lengths=forced).stats
    assert stats.swaps
    # three times ten steps in two slots; without parking 20 are needed
    assert stats.lower_bound == 15
    assert stats.decode_steps >= 15


@pytest.mark.parametrize("slots", ["auto", 16])
def test_buffers_of_the_last_call_are_free(llama, monkeypatch, slots):
    sampler = InfiniteSampler(llama, config(max_slots=slots))
    whole = sampler.plan([5], 200)
    total = int((whole.prefixes + whole.outputs + 40.5 * whole.slot) / 0.9)

    def available(device):
        engine = sampler._engine
        return total - (0 if engine is None else engine.nbytes)

    monkeypatch.setattr(memory, "available", available)
    first = sampler.plan([5], 200)
    assert first.slots == (40 if slots == "auto" else 16)
    sampler.generate([PROMPTS[0]], 200)
    assert sampler._engine.nbytes > total / 4
    sampler.mean_length = sampler.last_slots = None
    assert sampler.plan([5], 200) == first


def test_one_prompt_that_does_not_fit(llama):
    plan = InfiniteSampler(llama, config()).plan([40], 3)
    sampler = InfiniteSampler(llama, config(max_slots="auto", memory_budget=plan.prefixes + 1))
    with pytest.raises(MemoryError, match="of one prompt"):
        sampler.generate([list(range(11, 51)), [12]], 3)


def test_memory_that_runs_out_in_a_later_round(llama, monkeypatch):
    from infsampling.engine import Engine

    whole = InfiniteSampler(llama, config(max_slots=4)).generate(PROMPTS, COUNTS)
    eight = InfiniteSampler(llama, config()).generate(PROMPTS, COUNTS)
    budget = InfiniteSampler(llama, config()).plan([5], 1).slot * 8.5
    sampler = InfiniteSampler(
        llama, config(max_slots="auto", memory_budget=budget, max_resident_prompts=2)
    )
    made, plain = [], Engine.run

    def run(engine, steps):
        if len(made) > 1 and engine.sizes.places == 8:
            raise torch.OutOfMemoryError("no more")
        return plain(engine, steps)

    inside = Engine.begin
    monkeypatch.setattr(Engine, "run", run)
    monkeypatch.setattr(
        Engine, "begin", lambda e, eos: (made.append(e.sizes.places), inside(e, eos))[1]
    )
    found = sampler.generate(PROMPTS, COUNTS)
    # later rounds do not try again what did not fit
    assert made == [8, 8, 4, 4]
    assert found.stats.slots == 8
    assert found.completion_ids[21:] == whole.completion_ids[21:]
    assert found.completion_ids[:15] == eight.completion_ids[:15]


@pytest.mark.parametrize("bad", [0, -1])
def test_bad_numbers(bad):
    with pytest.raises(ValueError, match="max_resident_prompts"):
        config(max_resident_prompts=bad)


def test_the_same_as_sequential_generation(llama):
    settings = config(max_resident_prompts=1)
    found = InfiniteSampler(llama, settings).generate([PROMPTS[0], PROMPTS[1]], 5)
    for place, ids in enumerate(PROMPTS[:2]):
        assert found.completion_ids[5 * place :][:5] == keyed.generate(
            llama, ids, list(range(5)), settings, EOS
        )
