"""What only a GPU can show: streams, events, locked memory, and the kernels in a whole run."""

from __future__ import annotations

import gc

import pytest
import torch
from shared_kernels.random import derive_seed
from shared_kernels.testing.models import ARCHITECTURES, tiny_inputs, tiny_model
from zo2._prepare import decay_parameters, prepare
from zo2.config import OffloadConfig, ZOConfig
from zo2.reference import exact_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# Wide enough that copies and kernels overlap in earnest.
WIDE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6}


def cuda_inputs(**kwargs):
    return {k: v.cuda() for k, v in tiny_inputs("llama", **kwargs).items()}


def train(offload, *, dtype=torch.float32, steps=12, dist="gaussian", log=None):
    model = tiny_model("llama", dtype=dtype, **WIDE)
    zo = ZOConfig(seed=1, weight_decay=0.1, dist=dist)
    engine = prepare(model, zo, offload, log=log)
    inputs, seen = cuda_inputs(batch=2, length=32), []
    for t in range(steps):
        step = engine.step(inputs, lr=1e-4 * (1 + t % 3))
        seen += [step.loss, *step.g]
    engine.flush()
    return torch.stack(seen).cpu(), engine.state_dict(dtype=torch.float32), engine


def assert_same(left, right):
    assert torch.equal(left[0], right[0])
    for name, value in left[1].items():
        assert torch.equal(value, right[1][name]), name


@pytest.mark.parametrize("fold_every", [1, 4])
@pytest.mark.parametrize(
    ("dtype", "store"),
    [(torch.float32, "fp32"), (torch.bfloat16, "bf16x2"), (torch.bfloat16, "bf16")],
    ids=["fp32", "bf16x2", "bf16"],
)
def test_streamed_equals_resident(dtype, store, fold_every):
    kwargs = {"store": store, "fold_every": fold_every}
    resident = train(OffloadConfig(gpu="20GiB", **kwargs), dtype=dtype)
    assert resident[2].stats()["blocks_streamed"] == 0
    for extra in ({"prefetch": 1}, {"prefetch": 2}, {"pin": "bounce"}):
        streamed = train(OffloadConfig(**kwargs, **extra), dtype=dtype)
        assert streamed[2].stats()["blocks_streamed"] == 6
        assert streamed[2].stats()["host_registered"] == ("pin" not in extra)
        assert_same(streamed, resident)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_losses_equal_two_separate_forwards(name):
    model, twin = tiny_model(name), tiny_model(name).cuda()
    inputs = {k: v.cuda() for k, v in tiny_inputs(name).items()}
    engine = prepare(model, ZOConfig(seed=3, weight_decay=0.1), OffloadConfig(prefetch=1))
    decay, masters = decay_parameters(twin, "exact"), {}
    for t in range(3):
        expected = exact_step(
            twin, lambda m: m(**inputs).loss, seed=derive_seed(3, t), lr=1e-3,
            weight_decay=0.1, masters=masters, decay=decay,
        )  # fmt: skip
        step = engine.step(inputs, lr=1e-3)
        mean = (expected.loss_plus + expected.loss_minus).mean() / 2
        torch.testing.assert_close(step.loss, mean, rtol=1e-6, atol=0)
        torch.testing.assert_close(step.g, expected.g, rtol=1e-4, atol=2e-3)


class Plain(torch.nn.Module):
    """Transformers asks the device whether sequences are packed; this model asks nothing."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(512, 512) for _ in range(6)])

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().mean()


@pytest.mark.parametrize("store", ["fp32", "bf16x2"])
def test_a_step_never_waits_for_the_device(store):
    engine = prepare(Plain(), ZOConfig(seed=1), OffloadConfig(store=store, fold_every=2))
    x = torch.randn(64, 512, device="cuda")
    for _ in range(3):
        engine.step(lambda m: m(x), lr=1e-4)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            engine.step(lambda m: m(x), lr=1e-4)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dist", ["gaussian", "rademacher"])
def test_a_log_written_on_the_gpu_replays_to_the_same_bits_on_a_cpu(tmp_path, dist):
    path = tmp_path / "run.zolog"
    _, weights, engine = train(OffloadConfig(), dist=dist, log=path)
    engine.close()
    twin = prepare(
        tiny_model("llama", **WIDE), ZOConfig(seed=1, weight_decay=0.1, dist=dist),
        OffloadConfig(), log=path, device="cpu",
    )  # fmt: skip
    assert twin.global_step == 12
    for name, value in twin.state_dict(dtype=torch.float32).items():
        assert torch.equal(value, weights[name]), name


def test_peak_memory_is_the_static_buffers_and_little_else():
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()

    # What was asked for: the caching allocator rounds large blocks up by as much as 2 MiB.
    def requested(which):
        return torch.cuda.memory_stats()[f"requested_bytes.all.{which}"]

    before = requested("current")
    model = tiny_model("llama", **{**WIDE, "num_hidden_layers": 12})
    engine = prepare(model, ZOConfig(), OffloadConfig(store="fp32"))
    stats = engine.stats()
    static = stats["ring_bytes"] + stats["resident_bytes"] + stats["compute_bytes"]
    assert requested("current") - before < 1.01 * static + (1 << 20)
    engine.step(cuda_inputs(), lr=1e-4)
    engine.step(cuda_inputs(), lr=1e-4)
    # The two probes' cuBLAS workspaces of 32 MiB come on top.
    assert requested("peak") - before < 1.05 * static + (72 << 20)
