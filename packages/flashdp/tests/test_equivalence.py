"""Ways of running a step that must not change it: without clipping, recomputed, compiled, sdpa."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from flashdp.engine import PrivacyEngine
from shared_kernels.testing.models import tiny_inputs, tiny_model
from torch import nn

ROWS, STEPS = 4, 20


def attach(model, optimizer=None, **options):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=1.0)
    engine = PrivacyEngine(secure_rng=False, seed=0)
    defaults = {"noise_multiplier": 0.0, "max_grad_norm": 0.5, "expected_batch_size": 1.0}
    engine.make_private(model, optimizer, **{**defaults, **options})
    return engine, optimizer


def sums_of(engine):
    return {engine._parameters[p]: s for p, s in engine.collector.take().items()}


def assert_same(found, expected, rtol):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = float((found[name] - value).norm())
        assert error <= rtol * max(float(value.norm()), 1e-6), name


class Tokens(nn.Module):
    """Table, norm and matrices, in the dtype that is asked for."""

    def __init__(self):
        super().__init__()
        self.table, self.norm = nn.Embedding(17, 8), nn.LayerNorm(8)
        self.mid, self.out = nn.Linear(8, 12), nn.Linear(12, 17, bias=False)

    def forward(self, tokens):
        logits = self.out(torch.tanh(self.mid(self.norm(self.table(tokens)))))
        return nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none"
        ).mean(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_clipping_and_noise_a_run_is_ordinary_training(dtype):
    """20 AdamW steps on the summed loss over B, to 1e-6 of every weight."""
    torch.manual_seed(0)
    model = Tokens().to(dtype)
    plain, expected_batch = copy.deepcopy(model), 5.0
    # Its default epsilon would let AdamW blow the rounding of a vanishing gradient up to a step.
    options = {"lr": 1e-3, "eps": 1e-4, "weight_decay": 0.1}
    ordinary = torch.optim.AdamW(plain.parameters(), **options)
    _, private = attach(
        model, torch.optim.AdamW(model.parameters(), **options), max_grad_norm=[math.inf] * 4,
        expected_batch_size=expected_batch,
    )  # fmt: skip
    start = [p.detach().clone() for p in model.parameters()]
    for step in range(STEPS):
        g = torch.Generator().manual_seed(step)
        # Draws differ in size; the divisor does not.
        tokens = torch.randint(0, 17, (3 + step % 4, 9), generator=g)
        model(tokens).sum().backward()
        private.step()
        ordinary.zero_grad()
        (plain(tokens).sum() / expected_batch).backward()
        ordinary.step()
    results = [[p.detach() for p in m.parameters()] for m in (model, plain)]
    for found, value, old in zip(*results, start, strict=True):
        assert float((value - old).norm()) > 1e-3 * float(value.norm())
        assert float((found - value).norm()) <= 1e-6 * float(value.norm())


def llama_sums(*, checkpoint=False, attention="eager", backend=None, grouping="module"):
    model = tiny_model("llama", attn_implementation=attention).train()
    if checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    engine, _ = attach(model, grouping=grouping)
    called = model if backend is None else torch.compile(model, backend=backend)
    # Twice, because a compiled graph could have kept what belonged to the first batch.
    found = []
    for seed in (1, 2):
        called(**tiny_inputs("llama", batch=ROWS, seed=seed)).loss.backward()
        found.append(sums_of(engine))
    return found


@pytest.fixture(scope="module")
def eager():
    return {grouping: llama_sums(grouping=grouping) for grouping in ("module", "flat")}


@pytest.mark.parametrize("grouping", ["module", "flat"])
@pytest.mark.parametrize(
    "options",
    [{"checkpoint": True}, {"attention": "sdpa"}, {"attention": "sdpa", "checkpoint": True}],
    ids=["checkpoints", "sdpa", "both"],
)
def test_a_step_run_otherwise_gives_the_same_sums(eager, grouping, options):
    for found, expected in zip(
        llama_sums(grouping=grouping, **options), eager[grouping], strict=True
    ):
        assert_same(found, expected, rtol=1e-5)


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_sums(eager):
    torch._dynamo.reset()
    for found, expected in zip(llama_sums(backend="aot_eager"), eager["module"], strict=True):
        assert_same(found, expected, rtol=1e-5)
