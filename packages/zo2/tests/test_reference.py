"""The reference steps against independent transcriptions."""

import math

import numpy as np
import pytest
import torch
from shared_kernels.random import noise, param_uid
from shared_kernels.testing.models import tiny_inputs, tiny_model
from torch import nn
from zo2.reference import exact_step, mezo_decays, mezo_step, trainable_parameters


class MezoTranscription:
    """MeZO's zo_perturb_parameters / zo_step / zo_update, line by line, on the global generator."""

    def __init__(self, model, lr, eps, weight_decay):
        self.model, self.lr, self.eps, self.weight_decay = model, lr, eps, weight_decay

    def perturb(self, scaling_factor):
        torch.manual_seed(self.seed)
        for _, param in self.named:
            z = torch.normal(
                mean=0, std=1, size=param.data.size(), device=param.data.device,
                dtype=param.data.dtype,
            )  # fmt: skip
            param.data = param.data + scaling_factor * z * self.eps

    def forward(self, loss_fn):
        self.model.eval()
        with torch.inference_mode():
            return loss_fn(self.model).detach()

    def step(self, loss_fn, seed):
        self.named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        self.seed = seed
        self.perturb(1)
        loss1 = self.forward(loss_fn)
        self.perturb(-2)
        loss2 = self.forward(loss_fn)
        projected_grad = ((loss1 - loss2) / (2 * self.eps)).item()
        self.perturb(1)
        torch.manual_seed(self.seed)
        for name, param in self.named:
            z = torch.normal(
                mean=0, std=1, size=param.data.size(), device=param.data.device,
                dtype=param.data.dtype,
            )  # fmt: skip
            if "bias" not in name and "layer_norm" not in name and "layernorm" not in name:
                param.data = param.data - self.lr * (
                    projected_grad * z + self.weight_decay * param.data
                )
            else:
                param.data = param.data - self.lr * (projected_grad * z)
        return loss1, loss2, projected_grad


def loss_of(batch):
    return lambda model: model(**batch).loss


@pytest.mark.parametrize("name", ["llama", "opt"], ids=["tied", "untied"])
def test_mezo_step_equals_the_transcription_for_50_steps(name):
    ours, theirs = tiny_model(name), tiny_model(name)
    tied = len(list(ours.named_parameters(remove_duplicate=False))) > len(
        list(ours.named_parameters())
    )
    assert tied == (name == "llama")
    original = {n: p.clone() for n, p in ours.named_parameters()}
    transcription = MezoTranscription(theirs, lr=1e-3, eps=1e-3, weight_decay=0.1)
    for step in range(50):
        loss_fn = loss_of(tiny_inputs(name, batch=2, seed=step))
        seed = 1000 + 17 * step
        mine = mezo_step(ours, loss_fn, seed=seed, eps=1e-3, lr=1e-3, weight_decay=0.1)
        plus, minus, g = transcription.step(loss_fn, seed)
        assert (mine.loss_plus.item(), mine.loss_minus.item()) == (plus.item(), minus.item())
        assert mine.g.item() == g
    for (n, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(a, b), n
        assert not torch.equal(a, original[n]), f"{n} never moved"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mezo_step_equals_the_transcription_in_16_bits(dtype):
    ours, theirs = tiny_model("opt", dtype=dtype), tiny_model("opt", dtype=dtype)
    loss_fn = loss_of(tiny_inputs("opt", batch=2))
    transcription = MezoTranscription(theirs, lr=1e-2, eps=1e-2, weight_decay=0.01)
    for seed in range(5):
        mezo_step(ours, loss_fn, seed=seed, eps=1e-2, lr=1e-2, weight_decay=0.01)
        transcription.step(loss_fn, seed)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_mezo_leaves_global_state_modes_and_frozen_parameters_alone():
    model = tiny_model("opt").train()
    model.model.decoder.embed_tokens.weight.requires_grad_(False)
    model.model.decoder.layers[0].eval()
    frozen = model.model.decoder.embed_tokens.weight.clone()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    seen = []
    mezo_step(model, lambda m: (seen.append(m.training), loss_of(tiny_inputs("opt"))(m))[1], seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert seen == [False, False]
    assert model.training
    assert not model.model.decoder.layers[0].training
    assert torch.equal(model.model.decoder.embed_tokens.weight, frozen)


@pytest.mark.parametrize(
    ("name", "decays"),
    [
        ("model.layers.0.fc1.weight", True),
        ("model.layers.0.fc1.bias", False),
        ("layers.0.self_attn_layer_norm.weight", False),
        ("model.layers.0.input_layernorm.weight", False),
        ("model.norm.weight", True),
    ],
)
def test_mezo_decay_rule(name, decays):
    assert mezo_decays(name) is decays


class Toy(nn.Module):
    """A loss that is linear in three parameters, tied once; exact in closed form."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.body = nn.Linear(37, 5, dtype=dtype)
        self.head = nn.Linear(37, 5, bias=False, dtype=dtype)
        self.head.weight = self.body.weight
        self.norm = nn.LayerNorm(5, dtype=dtype)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))

    def forward(self):
        return sum((p.double() * (k + 1)).sum() for k, p in enumerate(self.parameters()))


def numpy_step(weights, seed, eps, lr, wd, q, dist, decay):
    """The exact rule in numpy float32 scalars-per-array, independent of the torch code."""
    f = np.float32
    z = {}
    for n, w in weights.items():
        for k in range(q):
            flat = noise(w.size, seed=seed, uid=param_uid(n), direction=k, dist=dist)
            z[n, k] = flat.numpy().reshape(w.shape)
    gs = []
    for k in range(q):
        losses = []
        for sign in (f(1), f(-1)):
            moved = {n: w + sign * (f(eps) * z[n, k]) for n, w in weights.items()}
            losses.append(
                sum((m.astype(np.float64) * (i + 1)).sum() for i, m in enumerate(moved.values()))
            )
        gs.append(f((losses[0] - losses[1]) / (2 * eps)))
    out = {}
    for n, w in weights.items():
        y = w.copy()
        for k in range(q):
            a = f(1) - f(lr) * f(wd) if k == 0 and n in decay else f(1)
            y = a * y - (f(lr) / f(q) * gs[k]) * z[n, k]
        out[n] = y
    return out, gs


@pytest.mark.parametrize("dist", ["gaussian", "rademacher"])
@pytest.mark.parametrize("q", [1, 3])
def test_exact_step_equals_numpy(q, dist):
    model = Toy()
    weights = {n: p.detach().numpy().copy() for n, p in model.named_parameters()}
    assert list(weights) == ["body.weight", "body.bias", "norm.weight", "norm.bias"]
    masters = {}
    for seed in (3, 2**64 - 5):
        step = exact_step(
            model, lambda m: m(), seed=seed, eps=1e-2, lr=1e-3, weight_decay=0.3, q=q, dist=dist,
            masters=masters, decay={"body.weight"},
        )  # fmt: skip
        weights, gs = numpy_step(weights, seed, 1e-2, 1e-3, 0.3, q, dist, {"body.weight"})
        np.testing.assert_allclose(step.g.numpy(), gs, rtol=1e-6)
    for n, p in model.named_parameters():
        np.testing.assert_allclose(p.detach().numpy(), weights[n], rtol=3e-7, atol=1e-7)
        assert torch.equal(p, masters[n])


def test_exact_step_restores_without_drift_in_bf16():
    """With lr so small that nothing moves, 20 steps leave a bf16 model bit for bit as it was."""
    model = tiny_model("opt", dtype=torch.bfloat16)
    before = {n: p.clone() for n, p in model.named_parameters()}
    masters, loss_fn = {}, loss_of(tiny_inputs("opt"))
    for seed in range(20):
        exact_step(model, loss_fn, seed=seed, eps=1e-2, lr=1e-30, masters=masters)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    in_place = tiny_model("opt", dtype=torch.bfloat16)
    for seed in range(20):
        mezo_step(in_place, loss_fn, seed=seed, eps=1e-2, lr=1e-30)
    assert any(not torch.equal(p, before[n]) for n, p in in_place.named_parameters())


def test_exact_step_losses_are_those_of_materialised_weights():
    model, twin = tiny_model("opt"), tiny_model("opt")
    loss_fn = loss_of(tiny_inputs("opt"))
    step = exact_step(model, loss_fn, seed=9, eps=1e-3, lr=1e-3)
    with torch.no_grad():
        for n, p in twin.named_parameters():
            p.add_(noise(p.numel(), seed=9, uid=param_uid(n)).view_as(p) * 1e-3)
        assert step.loss_plus.item() == loss_fn(twin).item()


def test_g_estimates_the_directional_derivative():
    """g against the autograd gradient times z: the error falls with eps squared."""
    model = tiny_model("opt").double()
    loss_fn = loss_of(tiny_inputs("opt"))
    loss_fn(model).backward()
    expected = sum(
        (p.grad * noise(p.numel(), seed=4, uid=param_uid(n)).view_as(p)).sum().item()
        for n, p in model.named_parameters()
    )
    errors = []
    for eps in (0.01, 0.005):
        twin = tiny_model("opt")
        step = exact_step(twin, loss_fn, seed=4, eps=eps, lr=1e-30)
        errors.append(abs(step.g.item() - expected))
    assert errors[1] < abs(expected) * 0.05
    assert 2.5 < errors[0] / errors[1] < 6


@pytest.mark.parametrize("step", [mezo_step, exact_step])
def test_bad_input(step):
    model = tiny_model("opt")
    with pytest.raises(ValueError, match=r"scalar, got shape \(4, 10, 96\)"):
        step(model, lambda m: m(**tiny_inputs("opt")).logits, seed=0)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        step(model, loss_of(tiny_inputs("opt")), seed=0)
    assert math.isfinite(loss_of(tiny_inputs("opt"))(model).item())


def test_trainable_parameters_are_canonical():
    names = [n for n, _ in trainable_parameters(tiny_model("llama"))]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
