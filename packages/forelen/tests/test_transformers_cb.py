"""Continuous batching of transformers: our scheduler runs, and starts answers in our order."""

import time

import numpy as np
import pytest
import torch
from forelen import Bins, LengthDistribution
from forelen.schedule import (
    LengthTable,
    Trace,
    check_live,
    generate_batch,
    plan_order,
    register_transformers_schedulers,
    scheduled,
    simulate,
)
from forelen.schedule.transformers_cb import SCHEDULERS, SchedulerError
from forelen.schedule.vllm import generate as vllm_generate
from shared_kernels.testing.models import tiny_model

BINS = Bins(tuple(map(float, range(65))))


def points(lengths):
    return LengthDistribution(torch.eye(64).double()[torch.tensor(lengths) - 1], BINS)


class Cache:
    """One that has room for all, of any version."""

    use_prefix_sharing = allow_block_sharing = False
    num_full_attention_groups = 1
    num_blocks = 1
    block_size = 1 << 20
    max_blocks_per_request = 0
    max_decode_fast_path_length = 0
    read_cache_limit = None

    def __init__(self):
        self.pool = self

    def free_blocks(self, request, **options):
        """Nothing to free."""

    def try_to_free_sectors(self):
        """Nothing to free."""

    def compute_free_capacity(self):
        return 1.0

    def get_num_free_blocks(self):
        return 1

    def can_store_request_tokens(self, state, count):
        return True

    def allocate_blocks(self, count, request, allocated):
        return count

    def count_new_complete_blocks(self, state, count):
        return {}


def make(name, table, places=8):
    from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING

    with scheduled(table):
        return SCHEDULER_MAPPING[name](Cache(), 0.0, places)


def request(number, ids, created):
    from transformers.generation.continuous_batching.requests import RequestState

    state = RequestState(request_id=f"r{number}", initial_tokens=list(ids))
    state.created_time = created
    return state


def waiting(scheduler):
    return [state.request_id for state in scheduler._get_waiting_candidates()]


def test_the_order():
    lengths = [30, 5, 60, 12]
    prompts = [[1, n] for n in range(4)]
    orders = {"forelen_sjf": [1, 3, 0, 2], "forelen_lpt": [2, 0, 3, 1]}
    orders["forelen_gittins"] = orders["forelen_sjf"]
    orders["forelen_plan"] = [3, 0, 2, 1]
    for name, order in orders.items():
        table = LengthTable(aging=10.0)
        table.put(prompts, points(lengths), [3, 0, 2, 1])
        scheduler = make(name, table)
        assert table.live == [name]
        for number, ids in enumerate(prompts):
            scheduler.add_waiting_request(request(number, ids, 0.0))
        assert waiting(scheduler) == [f"r{n}" for n in order]


def test_ageing_is_bounded():
    """Nobody is passed by one that comes more than ``(longest - its length) / aging`` later."""
    table = LengthTable(aging=10.0)
    table.put([[1], [2]], points([60, 5]))
    scheduler = make("forelen_sjf", table)
    scheduler.add_waiting_request(request(0, [1], 0.0))
    for number, created in enumerate((1.0, 5.4, 5.6, 9.0), 1):
        scheduler.add_waiting_request(request(number, [2], created))
    assert waiting(scheduler) == ["r1", "r2", "r0", "r3", "r4"]
    with pytest.raises(ValueError, match="aging"):
        LengthTable(aging=0.0)


def test_unknown_requests():
    table = LengthTable(aging=1e-6)
    scheduler = make("forelen_sjf", table)
    for number in range(4):
        scheduler.add_waiting_request(request(number, [number], float(number)))
    assert waiting(scheduler) == ["r0", "r1", "r2", "r3"]
    table.put([[1], [2]], points([10, 50]))
    for number, ids in ((5, [2]), (6, [9]), (7, [1])):
        scheduler.add_waiting_request(request(number, ids, 9.0))
    assert waiting(scheduler)[-3:] == ["r7", "r6", "r5"]


def test_an_index_that_sees_more_than_a_mean():
    """Either very short or long has the larger mean and goes first by Gittins' index."""
    pmf = torch.zeros(2, 64).double()
    pmf[0, [0, 63]] = 0.5
    pmf[1, 24] = 1.0
    table = LengthTable()
    table.put([[1], [2]], LengthDistribution(pmf, BINS))
    for name, order in (("forelen_sjf", ["r2", "r1"]), ("forelen_gittins", ["r1", "r2"])):
        scheduler = make(name, table)
        for number in (1, 2):
            scheduler.add_waiting_request(request(number, [number], 0.0))
        assert waiting(scheduler) == order


def test_another_scheduler_is_noticed():
    register_transformers_schedulers()
    from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING

    assert set(SCHEDULERS) < set(SCHEDULER_MAPPING)

    class Manager:
        class batch_processor:
            scheduler = SCHEDULER_MAPPING["fifo"](Cache(), 0.0, 8)

    with pytest.raises(SchedulerError, match="found FIFOScheduler"):
        check_live(Manager(), "forelen_sjf")
    Manager.batch_processor.scheduler = make("forelen_sjf", LengthTable())
    check_live(Manager(), "forelen_sjf")
    with pytest.raises(SchedulerError, match="forelen_lpt"):
        check_live(Manager(), "forelen_lpt")
    with (
        scheduled(LengthTable()),
        pytest.raises(SchedulerError, match="another table"),
        scheduled(LengthTable()),
    ):
        pass


def wait_and_run(table, lengths, *, places, steps, made=()):
    """Step a scheduler whose cache has room, a token of each answer a pass; return what ran."""
    scheduler = make("forelen_turns", table, places)
    ran = []
    for number, length in enumerate(lengths):
        state = request(number, [1, number], float(number) * 1e-6)
        state.max_new_tokens = state._new_tokens_limit = length
        scheduler.add_waiting_request(state)
    for _ in range(steps):
        found = scheduler.schedule_batch(100, 10**6)[0]
        ran.append(sorted(int(future.state.request_id[1:]) for future in found))
        for future in found:
            if future.state.update_and_check_completion(7, None):
                scheduler.finish_request(future.state.request_id)
    return scheduler, ran


def test_answers_make_way():
    """A long answer that was thought short lets others have their turn."""
    table = LengthTable(turn=4)
    table.put([[1, n] for n in range(4)], points([5, 6, 7, 8]))
    scheduler, ran = wait_and_run(table, [10, 2, 6, 3], places=2, steps=13)
    # the first has had its turn when the last waits; it goes on when the second place is free
    assert ran == [
        [0, 1], [0, 1], [0, 2], [0, 2], [2, 3], [2, 3], [2, 3], [0, 2],
        [0], [0], [0], [0], [0],
    ]  # fmt: skip
    assert table.pauses == 1
    assert not scheduler.has_pending_requests()
    assert not scheduler._keys


def test_none_makes_way_for_nothing():
    """Not while there is a place, nor for one that had as much, nor before its turn is over."""
    table = LengthTable(turn=4)
    wait_and_run(table, [10, 10], places=2, steps=10)
    assert table.pauses == 0
    table = LengthTable(turn=10)
    wait_and_run(table, [10, 10, 10], places=2, steps=20)
    assert table.pauses == 0
    table = LengthTable(turn=9)
    wait_and_run(table, [10, 10, 10], places=2, steps=20)
    assert table.pauses == 1
    table = LengthTable(turn=4)
    scheduler, _ = wait_and_run(table, [10, 10], places=3, steps=6)
    scheduler.add_waiting_request(request(2, [1, 2], 1.0))
    assert len(scheduler.schedule_batch(100, 10**6)[0]) == 3
    assert table.pauses == 0


def test_long_prompts_make_way_one_by_one():
    """No more are paused in a pass than their followers' prompts fit into it."""
    table = LengthTable(turn=3)
    scheduler = make("forelen_turns", table, 4)
    for number in range(8):
        ids = [1] * (20 if number < 4 else 50)
        scheduler.add_waiting_request(request(number, ids, float(number) * 1e-6))
    running = []
    for _ in range(12):
        found = scheduler.schedule_batch(120, 10**6)[0]
        running.append(len(found))
        for future in found:
            if future.has_new_token:
                future.state.update_and_check_completion(7, None)
    assert table.pauses > 2
    # two of the long prompts fit into a pass; with four, a place would be empty
    assert running == 12 * [4]


def test_who_goes_on_has_a_turn():
    """Also if one waits that had nothing yet."""
    table = LengthTable(aging=10.0, turn=4)
    scheduler = make("forelen_turns", table, 1)
    paused = request(0, [1, 0], 0.0)
    paused.generated_tokens = [7] * 9
    again = paused.create_equivalent_initial_request()
    again.created_time = 0.0
    for state in (again, request(1, [1, 1], 10.0)):
        scheduler.add_waiting_request(state)
    ran = []
    for _ in range(6):
        (future,) = scheduler.schedule_batch(100, 10**6)[0]
        ran.append(future.state.request_id)
        future.state.update_and_check_completion(7, None)
    assert ran == ["r0"] * 4 + ["r1"] * 2


def test_prompts_of_more_than_a_batch_make_way_too():
    table = LengthTable(turn=3)
    scheduler = make("forelen_turns", table, 1)
    for number in range(2):
        scheduler.add_waiting_request(request(number, [1] * 50, float(number) * 1e-6))
    ran = []
    for _ in range(12):
        found = scheduler.schedule_batch(30, 10**6)[0]
        ran.append([int(future.state.request_id[1:]) for future in found])
        for future in found:
            if future.has_new_token:
                future.state.update_and_check_completion(7, None)
    # two passes read a prompt; the second goes on until it is a turn ahead
    assert ran == 4 * [[0]] + 7 * [[1]] + [[0]]


def test_what_was_paused_does_not_wait_for_ever():
    """Newcomers pass it until it has waited for as many tokens as it is behind."""
    table = LengthTable(aging=10.0, turn=32)
    table.put([[1, n] for n in range(9)], points([60] + 8 * [5]))
    scheduler = make("forelen_turns", table)
    paused = request(0, [1, 0], 0.0)
    paused.generated_tokens = [7] * 40
    again = paused.create_equivalent_initial_request()
    again.created_time = 0.0
    scheduler.add_waiting_request(again)
    # 60 and 60 for its turn, against 5: they are even after 11.5 seconds
    for number, created in enumerate((1.0, 11.4, 11.6, 30.0), 1):
        scheduler.add_waiting_request(request(number, [1, number], created))
    assert waiting(scheduler) == ["r1", "r2", "r0", "r3", "r4"]
    with pytest.raises(ValueError, match="turn"):
        LengthTable(turn=0)
    with pytest.raises(ValueError, match="objective"):
        generate_batch(None, [], points([1])[:0], objective="latency", turn=5)


@pytest.mark.gpu
@pytest.mark.parametrize("shared", [False, True])
def test_paused_answers_are_the_same_on_a_gpu(cuda, shared):
    paused_answers_are_the_same(tiny_model("llama").to(cuda), shared)


@pytest.mark.parametrize("shared", [False, True])
def test_paused_answers_are_the_same(shared):
    paused_answers_are_the_same(tiny_model("llama"), shared)


def answered(model, prompts, lengths, **settings):
    """Return outputs by prompt of the model's own server, with a maximum for each."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    config = ContinuousBatchingConfig(
        num_blocks=256, max_batch_tokens=256, return_logprobs=True, **settings
    )
    generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    with model.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=config, block=True, timeout=5
    ) as manager:
        for ids, length in zip(prompts, lengths, strict=True):
            manager.add_request(ids, max_new_tokens=length)
        found = {}
        while len(found) < len(prompts):
            output = manager.get_result(timeout=60)
            assert output is not None
            if output.is_finished():
                found[tuple(output.prompt_ids)] = output
    return found


def paused_answers_are_the_same(model, shared):
    """Tokens, prompts and log-probabilities; and about as many pauses as are simulated."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 96, (12, 6), generator=generator).tolist()
    lengths = np.random.default_rng(0).integers(1, 60, 12).tolist()
    settings = {"allow_block_sharing": shared}
    plain = answered(model, prompts, lengths, **settings)
    guess = np.arange(30, 42)
    table = LengthTable(turn=8)
    table.put(prompts, points(guess.tolist()))
    settings |= {"max_requests_per_batch": 3, "scheduler_type": "forelen_turns"}
    with scheduled(table):
        found = answered(model, prompts, lengths, **settings)
    assert table.live == ["forelen_turns"]
    for key, output in found.items():
        assert output.generated_tokens == plain[key].generated_tokens
        assert output.logprobs == pytest.approx(plain[key].logprobs, abs=1e-4)
    trace = Trace.at_once(np.array(lengths))
    pauses = simulate(trace, "turns", 3, predicted=guess, turn=8, resume=0).pauses
    # requests come while the first run, and a step may be under way when one is paused
    assert abs(table.pauses - pauses) <= 3
    assert table.pauses > 10


@pytest.mark.gpu
@pytest.mark.parametrize("objective", ["makespan", "latency"])
def test_answers_start_in_order_on_a_gpu(cuda, objective):
    answers_start_in_order(tiny_model("llama", dtype=torch.bfloat16).to(cuda), objective)


@pytest.mark.parametrize("objective", ["makespan", "latency"])
def test_answers_start_in_order(objective):
    answers_start_in_order(tiny_model("llama"), objective)


def answers_start_in_order(model, objective):
    from transformers import ContinuousBatchingConfig, GenerationConfig

    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 96, (12, 6), generator=generator).tolist()
    lengths = np.random.default_rng(0).permutation(np.arange(4, 64, 5)).tolist()
    blocks = {"num_blocks": 64, "max_batch_tokens": 64}
    config = ContinuousBatchingConfig(max_requests_per_batch=2, **blocks)
    generation = GenerationConfig(
        max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    plain = model.generate_batch(
        inputs=prompts, generation_config=generation,
        continuous_batching_config=ContinuousBatchingConfig(**blocks),
    )  # fmt: skip
    found = generate_batch(
        model, prompts, points(lengths), objective=objective, continuous_batching_config=config,
        generation_config=generation, turn=0 if objective == "makespan" else None,
    )  # fmt: skip
    outputs = sorted(found.values(), key=lambda output: output.lifespan[0])
    by_prompt = {tuple(ids): length for ids, length in zip(prompts, lengths, strict=True)}
    started = [by_prompt[tuple(output.prompt_ids)] for output in outputs]
    expected = sorted(lengths)
    if objective == "makespan":
        expected = [lengths[row] for row in plan_order(points(lengths), 2, cap=8)]
    assert started == expected
    answers = {tuple(o.prompt_ids): o.generated_tokens for o in found.values()}
    for output in plain.values():
        assert answers[tuple(output.prompt_ids)] == output.generated_tokens


class Engine:
    """Takes what vLLM's engine does, and remembers it."""

    def __init__(self, policy):
        self.llm_engine = type("E", (), {})()
        self.llm_engine.vllm_config = type("C", (), {})()
        self.llm_engine.vllm_config.scheduler_config = type("S", (), {"policy": policy})()

    def generate(self, prompts, sampling_params, priority):
        self.priority = priority
        return prompts


def test_priorities_for_vllm():
    engine = Engine("priority")
    assert vllm_generate(engine, ["a", "b", "c"], points([30, 5, 60])) == ["a", "b", "c"]
    assert engine.priority == [30, 5, 60]
    vllm_generate(engine, ["a", "b", "c"], points([30, 5, 9]), order=[2, 0, 1])
    assert engine.priority == [1, 2, 0]
    with pytest.raises(ValueError, match="order"):
        vllm_generate(engine, ["a", "b"], points([30, 5]), order=[1, 1])
    with pytest.raises(ValueError, match="order"):
        LengthTable().put([[1], [2]], points([30, 5]), [0])
    vllm_generate(engine, ["a", "b"], points([30, 5]), objective="makespan")
    assert engine.priority == [-30, -5]
    with pytest.raises(ValueError, match="scheduling_policy"):
        vllm_generate(Engine("fcfs"), ["a"], points([3]))
    with pytest.raises(ValueError, match="2 rows"):
        vllm_generate(engine, ["a", "b"], points([3]))


def test_tables_are_filled_fast_enough():
    """A thousand requests are placed in less time than a step of a model takes."""
    table = LengthTable()
    prompts = [[n] for n in range(1000)]
    table.put(prompts, points([1 + n % 64 for n in range(1000)]))
    scheduler = make("forelen_sjf", table)
    began = time.perf_counter()
    for number, ids in enumerate(prompts):
        scheduler.add_waiting_request(request(number, ids, 0.0))
    assert (time.perf_counter() - began) / 1000 < 5e-3
    with pytest.raises(ValueError, match="found"):
        table.put(prompts, points([1, 2]))
