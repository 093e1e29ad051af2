"""MeZO's arithmetic in the engine: its own log replays and resumes to the same bits."""

import pytest
import torch
import zo2
from shared_kernels.random import derive_seed
from shared_kernels.testing.models import tiny_inputs, tiny_model
from zo2 import OffloadConfig, UpdateLog, ZOConfig
from zo2.log import SKIPPED
from zo2.reference import mezo_perturb, mezo_step

ZO = ZOConfig(arithmetic="mezo", eps=1e-2, seed=4, weight_decay=0.1, clip_g=1e3)
STREAMED = OffloadConfig(prefetch=1)


def model(dtype=torch.float32):
    return tiny_model("llama", dtype=dtype)


def step(engine, t):
    """One step; the losses of step 2 are not numbers, so it is skipped."""
    inputs = tiny_inputs("llama", seed=t)
    spoil = float("nan") if t == 2 else 1.0
    engine.step(lambda m: m(**inputs, use_cache=False).loss * spoil, lr=1e-2 / (t + 1))


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def run(request, tmp_path_factory):
    """A run of five steps, with one skipped and a flush."""
    folder = tmp_path_factory.mktemp("mezo")
    engine = zo2.prepare(model(request.param), ZO, STREAMED, log=folder / "a.zolog", device="cpu")
    for t in range(5):
        step(engine, t)
        if t == 3:
            engine.flush()
    weights = engine.state_dict()
    engine.close()
    return request.param, folder / "a.zolog", weights


def test_the_table_is_in_the_order_in_which_noise_is_drawn(run):
    dtype, path, _ = run
    with UpdateLog.open(path) as log:
        names = [p["name"] for p in log.header["parameters"]]
    assert names == [name for name, _ in model(dtype).named_parameters()]


def test_its_log_replays_bit_for_bit_skipped_steps_included(run):
    dtype, path, weights = run
    with UpdateLog.open(path) as log:
        assert [int(f) for f in log.records["flags"]] == [0, 0, SKIPPED, 0, 2, 0]
    replayed = zo2.replay(model(dtype), path, device="cpu", progress=False).state_dict()
    assert all(torch.equal(v, replayed[k]) for k, v in weights.items())


def test_it_resumes_bit_for_bit_from_any_step(run, tmp_path):
    dtype, path, weights = run
    for keep in (2, 3, 5):
        log = tmp_path / f"{keep}.zolog"
        log.write_bytes(path.read_bytes())
        with UpdateLog.open(log, "a") as opened:
            opened.truncate(keep)
        engine = zo2.prepare(model(dtype), ZO, STREAMED, log=log, device="cpu")
        for t in range(engine.global_step, 5):
            step(engine, t)
            if t == 3:
                engine.flush()
        assert all(torch.equal(v, weights[k]) for k, v in engine.state_dict().items())
        engine.close()
        assert log.read_bytes() == path.read_bytes()


def test_a_skipped_step_leaves_the_rounding_of_its_perturbations():
    """As MeZO would: it perturbs before it knows that the losses are of no use."""
    engine, twin = zo2.prepare(model(), ZO, STREAMED, device="cpu"), model()
    for t in range(4):
        step(engine, t)
        seed = derive_seed(4, t)
        if t == 2:
            named = list(twin.named_parameters())
            for scale in (1, -2, 1):
                mezo_perturb(named, seed=seed, scale=scale, eps=1e-2)
        else:
            inputs = tiny_inputs("llama", seed=t)
            mezo_step(
                twin, lambda m, i=inputs: m(**i).loss, seed=seed, lr=1e-2 / (t + 1),
                weight_decay=0.1, eps=1e-2,
            )  # fmt: skip
    found = engine.state_dict()
    assert all(torch.equal(v, found[k]) for k, v in twin.state_dict().items())
