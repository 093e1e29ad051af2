"""The engine against full forwards, against itself resident, and against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from shared_kernels.random import derive_seed, noise, param_uid
from shared_kernels.testing.models import ARCHITECTURES, tiny_inputs, tiny_model
from torch import nn
from zo2._prepare import decay_parameters, prepare
from zo2.config import OffloadConfig, ZOConfig
from zo2.reference import exact_step, mezo_step

STREAMED = OffloadConfig(prefetch=1)


def run(model, inputs, zo, offload, *, steps, lr=lambda t: 1e-3 * (1 + t % 3), evaluate=False):
    """Train; returns losses, g and the final float32 masters after a flush."""
    engine = prepare(model, zo, offload)
    seen = []
    for t in range(steps):
        step = engine.step(inputs, lr=lr(t))
        seen += [step.loss, *step.g]
        if evaluate and t % 2:
            seen.append(engine.evaluate(lambda m: m(**inputs).loss))
    if evaluate:
        engine.flush()
    return torch.stack(seen), engine.state_dict(dtype=torch.float32), engine


def assert_same(left, right):
    assert torch.equal(left[0], right[0])
    assert left[1].keys() == right[1].keys()
    for name, value in left[1].items():
        assert torch.equal(value, right[1][name]), name


# -- equal to full forwards at materialised weights -----------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_steps_equal_two_separate_forwards(name):
    model, twin, inputs = tiny_model(name), tiny_model(name), tiny_inputs(name)
    engine = prepare(model, ZOConfig(seed=3, weight_decay=0.1), STREAMED)
    decay, masters = decay_parameters(twin, "exact"), {}
    for t in range(4):
        expected = exact_step(
            twin, lambda m: m(**inputs).loss, seed=derive_seed(3, t), lr=1e-3 * (t + 1),
            weight_decay=0.1, masters=masters, decay=decay,
        )  # fmt: skip
        before = dict(engine._engine.visits)
        step = engine.step(inputs, lr=1e-3 * (t + 1))
        assert torch.equal(step.g, expected.g)
        visits = {k: v - before.get(k, 0) for k, v in engine._engine.visits.items()}
        assert visits == dict.fromkeys(range(len(engine._engine.plan.blocks)), 1)
    for key, value in twin.state_dict().items():
        assert torch.equal(engine.state_dict()[key], value), key


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_directions_and_micro_batches_share_one_load(name):
    model, twin = tiny_model(name), tiny_model(name)
    inputs = tiny_inputs(name, batch=8)
    engine = prepare(model, ZOConfig(seed=5, q=3, micro_batch_size=2), STREAMED)
    step = engine.step(inputs, lr=1e-3)
    assert set(engine._engine.visits.values()) == {1}

    def loss(m):
        parts = [{k: v[i : i + 2] for k, v in inputs.items()} for i in range(0, 8, 2)]
        return torch.stack([m(**part).loss for part in parts]).mul(0.25).sum()

    expected = exact_step(twin, loss, seed=derive_seed(5, 0), lr=1e-3, q=3)
    torch.testing.assert_close(step.g, expected.g, rtol=0, atol=2e-3)
    assert engine.estimate(inputs).g.shape == (3,)


def test_micro_batches_are_weighted_by_tokens():
    model, inputs = tiny_model("llama"), tiny_inputs("llama", batch=4)
    inputs["labels"][0, 2:] = -100
    whole = prepare(tiny_model("llama"), ZOConfig(), STREAMED).estimate(inputs)
    parts = prepare(model, ZOConfig(micro_batch_size=1), STREAMED).estimate(inputs)
    torch.testing.assert_close(parts.loss, whole.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(parts.g, whole.g, rtol=0, atol=2e-3)


# -- MeZO's own arithmetic -------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "tied"), [("llama", True), ("opt", False)])
@pytest.mark.parametrize("offload", [None, STREAMED], ids=["resident", "streamed"])
def test_mezo_arithmetic_equals_mezo_for_fifty_steps(name, tied, offload):
    model, twin, inputs = tiny_model(name), tiny_model(name), tiny_inputs(name)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    zo = ZOConfig(arithmetic="mezo", seed=2, weight_decay=0.01)
    engine = prepare(model, zo, offload)
    for t in range(50):
        rate = 1e-4 * (1 - t / 60)
        step = engine.step(inputs, lr=rate)
        expected = mezo_step(
            twin, lambda m: m(**inputs).loss, seed=derive_seed(2, t), lr=rate, weight_decay=0.01
        )
        assert torch.equal(step.g, expected.g), t
    # The engine's weights are those before the next step's perturbation, the twin's after its
    # last restore and update: the same point of the sequence.
    for key, value in twin.state_dict().items():
        assert torch.equal(engine.state_dict()[key], value), key


# -- streamed equals resident ----------------------------------------------------------------------


@pytest.mark.parametrize("fold_every", [1, 4, 32])
@pytest.mark.parametrize(
    ("dtype", "store"),
    [(torch.float32, "fp32"), (torch.bfloat16, "bf16x2"), (torch.bfloat16, "bf16")],
    ids=["fp32-fp32", "bf16-bf16x2", "bf16-bf16"],
)
def test_streamed_equals_resident(dtype, store, fold_every):
    inputs = tiny_inputs("llama", batch=2, length=6)
    zo = ZOConfig(seed=1, weight_decay=0.1, dist="rademacher")
    kwargs = {"store": store, "fold_every": fold_every}

    def train(offload):
        return run(tiny_model("llama", dtype=dtype), inputs, zo, offload, steps=20, evaluate=True)

    # A budget that holds every block: nothing is uploaded, all else is the same.
    resident = train(OffloadConfig(gpu="4GiB", **kwargs))
    assert resident[2].stats()["blocks_streamed"] == 0
    for ring in (2, 3):
        streamed = train(OffloadConfig(prefetch=ring - 1, **kwargs))
        assert streamed[2].stats()["blocks_streamed"] == 4
        assert_same(streamed, resident)


@pytest.mark.parametrize("store", ["fp32", "bf16x2"])
def test_fold_window_changes_no_bit_of_an_exact_store(store):
    model = {"name": "llama", "dtype": torch.float32}
    inputs, zo = tiny_inputs("llama"), ZOConfig(seed=1, weight_decay=0.1)
    results = [
        run(tiny_model(**model), inputs, zo, OffloadConfig(store=store, fold_every=k), steps=12)
        for k in (1, 4, 32)
    ]
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


def test_no_store_drifts_when_nothing_is_learned():
    """Two hundred measured steps at rate 0 leave the weights as they were, in every format."""
    inputs = tiny_inputs("llama", batch=1, length=4)
    for store in ("bf16x2", "bf16"):
        model = tiny_model("llama", dtype=torch.bfloat16, num_hidden_layers=2)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        _, after, engine = run(
            model, inputs, ZOConfig(), OffloadConfig(store=store), steps=200, lr=lambda t: 0.0
        )
        assert engine.global_step == 200
        assert all(torch.equal(after[k], v.float()) for k, v in before.items())


def test_part_of_the_blocks_may_stay_on_the_device():
    inputs, zo = tiny_inputs("llama"), ZOConfig(seed=1)
    layers = {"num_hidden_layers": 8, "hidden_size": 512, "intermediate_size": 2048}
    least = prepare(tiny_model("llama", **layers), zo, OffloadConfig(store="fp32"))
    need = least.stats()
    static = need["ring_bytes"] + need["resident_bytes"] + need["compute_bytes"]
    budget = static + (256 << 20) + 3 * need["host_bytes"] // 8
    engine = prepare(tiny_model("llama", **layers), zo, OffloadConfig(store="fp32", gpu=budget))
    assert 0 < engine.stats()["blocks_streamed"] < 8
    a, b = least.step(inputs, lr=1e-3), engine.step(inputs, lr=1e-3)
    a, b = least.step(inputs, lr=1e-3), engine.step(inputs, lr=1e-3)
    assert torch.equal(a.g, b.g)


# -- reading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("store", "fold_every"), [("fp32", 4), ("bf16x2", 1)])
def test_embeddings_and_head_may_be_streamed_too(store, fold_every):
    dtype = torch.float32 if store == "fp32" else torch.bfloat16

    def make():
        return tiny_model("llama", dtype=dtype, tie_word_embeddings=False)

    parts = (r"model\.layers\.\d+", r"model\.embed_tokens", "lm_head")
    inputs, zo = tiny_inputs("llama"), ZOConfig(seed=2, weight_decay=0.1, q=2)
    blocks, everything = (
        run(
            make(), inputs, zo, OffloadConfig(store=store, fold_every=fold_every, blocks=b), steps=6
        )
        for b in (None, parts)
    )
    assert_same(blocks, everything)
    engine = everything[2]
    assert set(engine._engine.visits.values()) == {6}
    # Of the resident unit, kept once and copied twice for each direction, the last norm is left.
    for kind in ("resident_bytes", "compute_bytes"):
        assert engine.stats()[kind] < blocks[2].stats()[kind]


@pytest.mark.parametrize("offload", [None, STREAMED], ids=["resident", "streamed"])
def test_evaluation_sees_the_last_update(offload):
    model, twin, inputs = tiny_model("llama"), tiny_model("llama"), tiny_inputs("llama")
    engine, masters = prepare(model, ZOConfig(seed=4), offload), {}
    for t in range(3):
        engine.step(inputs, lr=1e-2)
        exact_step(twin, lambda m: m(**inputs).loss, seed=derive_seed(4, t), lr=1e-2,
                   masters=masters, decay=())  # fmt: skip
        with torch.no_grad():
            expected = twin(**inputs).loss
            assert torch.equal(model(**inputs).loss, expected)
        assert torch.equal(engine.evaluate(lambda m: m(**inputs).loss), expected)
        several = engine.evaluate([lambda m: m(**inputs).loss] * 3)
        assert all(torch.equal(x, expected) for x in several)
        kwargs = {"max_new_tokens": 6, "do_sample": False}
        tokens = engine.generate(inputs["input_ids"], **kwargs)
        assert torch.equal(tokens, twin.generate(inputs["input_ids"], **kwargs))


def test_calling_the_model_gives_no_gradient():
    model, inputs = tiny_model("llama"), tiny_inputs("llama")
    prepare(model, ZOConfig(), STREAMED)
    with pytest.raises(RuntimeError, match="does not require grad"):
        model(**inputs).loss.backward()


def test_objectives_need_no_gradient_and_may_generate():
    model, inputs = tiny_model("llama"), tiny_inputs("llama")
    engine = prepare(model, ZOConfig(eps=0.5), STREAMED)

    def objective(m):
        out = m.generate(inputs["input_ids"], max_new_tokens=3, do_sample=False)
        return float(out.float().mean())

    step = engine.step(objective, lr=1e-4)
    assert step.g.item() != 0


def test_save_pretrained_and_restore(tmp_path):
    from transformers import LlamaForCausalLM

    model, inputs = tiny_model("llama"), tiny_inputs("llama")
    engine = prepare(model, ZOConfig(), STREAMED)
    engine.step(inputs, lr=1e-2)
    expected = model(**inputs).loss
    engine.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(LlamaForCausalLM.from_pretrained(tmp_path)(**inputs).loss, expected)
        assert torch.equal(engine.restore()(**inputs).loss, expected)
    model(**inputs).loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None


# -- frozen parameters and adapters ----------------------------------------------------------------


def test_only_trainable_parameters_move():
    model, inputs = tiny_model("llama"), tiny_inputs("llama")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    engine = prepare(model, ZOConfig(), STREAMED, trainable=r".*\.q_proj\.weight")
    for _ in range(3):
        engine.step(inputs, lr=1e-2)
    for key, value in engine.state_dict().items():
        assert torch.equal(value, before[key]) == ("q_proj" not in key), key
    # A frozen base is read only: nothing but the trained part of a block travels back.
    stats = engine.stats()
    assert 0 < stats["downloaded_bytes"] < stats["uploaded_bytes"]


@pytest.mark.peer
def test_lora_adapters_of_peft(tmp_path):
    peft = pytest.importorskip("peft")
    base, inputs = tiny_model("llama"), tiny_inputs("llama")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(base, config).eval()
    engine = prepare(model, ZOConfig(eps=1e-2), STREAMED)
    for _ in range(2):
        engine.step(inputs, lr=1e-2)
    expected = model(**inputs).loss
    engine.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 20_000
    loaded = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).loss, expected)


# -- the estimator ---------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().sum()


def test_mean_of_the_estimator_converges_to_the_gradient():
    torch.manual_seed(0)
    net, x = Net(), torch.randn(5, 6)
    exact = net.double()
    exact(x.double()).backward()
    gradient = torch.cat([p.grad.reshape(-1) for p in exact.parameters()])
    names = [(n, p.numel()) for n, p in net.named_parameters()]
    net = net.float()
    q, steps = 64, 64
    engine = prepare(net, ZOConfig(q=q, eps=1e-2, seed=1), None)
    found = [engine.step(lambda m: m(x), lr=0.0) for _ in range(steps)]
    g = torch.cat([step.g for step in found]).double()
    draws = torch.stack(
        [
            torch.cat([noise(c, seed=step.seed, uid=param_uid(n), direction=k) for n, c in names])
            for step in found
            for k in range(q)
        ]
    ).double()
    cosines = []
    for count in (256, 1024, 4096):
        mean = (g[:count, None] * draws[:count]).mean(0)
        cosines.append(torch.cosine_similarity(mean, gradient, dim=0).item())
    # E|mean - gradient|² = |gradient|² (d + 1) / N for SPSA with normal noise, d dimensions.
    d = gradient.numel()
    for count, cosine in zip((256, 1024, 4096), cosines, strict=True):
        assert cosine == pytest.approx(1 / math.sqrt(1 + (d + 1) / count), abs=0.04)
    assert cosines[-1] > 0.985


def test_g_is_the_directional_derivative_with_quadratic_error():
    torch.manual_seed(0)
    net, x = Net().double(), torch.randn(5, 6, dtype=torch.float64)
    z = {n: noise(p.numel(), seed=9, uid=param_uid(n)).view(p.shape).double()
         for n, p in net.named_parameters()}  # fmt: skip
    net(x).backward()
    truth = sum((p.grad * z[n]).sum() for n, p in net.named_parameters())

    def g(eps):
        losses = []
        for sign in (1, -1):
            shifted = {n: p + sign * eps * z[n] for n, p in net.named_parameters()}
            losses.append(torch.func.functional_call(net, shifted, (x,)))
        return (losses[0] - losses[1]) / (2 * eps)

    errors = [abs((g(eps) - truth).item()) for eps in (2e-2, 1e-2, 5e-3)]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.1)


class Quadratic(nn.Module):
    """ℓ = ½ θᵀAθ in float64 inside, so that g has only the rounding of θ ± εz."""

    def __init__(self, a):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 1, bias=False), nn.Linear(8, 1, bias=False)])
        self.a = a

    def theta(self):
        return torch.cat([layer.weight.reshape(-1) for layer in self.layers]).double()

    def forward(self):
        # Calling the blocks is what loads them.
        rows = [layer(torch.eye(8)).reshape(-1).double() for layer in self.layers]
        theta = torch.cat(rows)
        return 0.5 * theta @ self.a @ theta


def test_quadratic_follows_its_closed_form():
    torch.manual_seed(0)
    half = torch.randn(16, 16, dtype=torch.float64)
    a = half @ half.T / 16
    model = Quadratic(a)
    theta = model.theta().detach().clone()
    zo = ZOConfig(eps=1e-1, seed=6, weight_decay=0.05)
    engine = prepare(model, zo, OffloadConfig(prefetch=1, store="fp32"))
    names = [f"layers.{k}.weight" for k in range(2)]
    for t in range(60):
        lr = 0.02 / (1 + t / 20)
        seed = derive_seed(6, t)
        z = torch.cat([noise(8, seed=seed, uid=param_uid(n)) for n in names]).double()
        g = z @ a @ theta
        step = engine.step(lambda m: m(), lr=lr)
        assert step.g.item() == pytest.approx(g.item(), abs=2e-5)
        theta = (1 - lr * 0.05) * theta - lr * g * z
    found = torch.cat([engine.state_dict()[n].reshape(-1) for n in names]).double()
    torch.testing.assert_close(found, theta, rtol=0, atol=2e-5)


# -- bad input -------------------------------------------------------------------------------------


def test_nothing_trainable():
    model = tiny_model("llama").requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter has requires_grad"):
        prepare(model)


def test_accelerate_hooks_are_refused():
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(tiny_model("llama"), execution_device="cpu")
    with pytest.raises(ValueError, match="accelerate hook"):
        prepare(model)


def test_objective_must_return_one_number():
    engine = prepare(tiny_model("llama"), ZOConfig(), STREAMED)
    inputs = tiny_inputs("llama")
    with pytest.raises(TypeError, match=r"one real number, got a tensor of shape \(4, 10, 96\)"):
        engine.step(lambda m: m(**inputs).logits, lr=1e-3)
    with pytest.raises(ValueError, match="no loss"):
        engine.step({"input_ids": inputs["input_ids"]}, lr=1e-3)
    with pytest.raises(TypeError, match="a batch"):
        engine.step(3, lr=1e-3)
    assert engine.global_step == 0
    engine.step(inputs, lr=1e-3)


def test_one_non_finite_loss_is_skipped_and_two_stop():
    model, inputs = tiny_model("llama"), tiny_inputs("llama")
    engine = prepare(model, ZOConfig(), STREAMED)
    before = engine.state_dict()
    engine.step(lambda m: m(**inputs).loss * float("nan"), lr=1e-2)
    assert engine.stats()["skipped"] == 1
    assert all(torch.equal(v, before[k]) for k, v in engine.state_dict().items())
    engine.step(inputs, lr=1e-2)
    engine.step(lambda m: m(**inputs).loss / 0, lr=1e-2)
    with pytest.raises(FloatingPointError, match="steps 2 and 3"):
        engine.step(lambda m: m(**inputs).loss / 0, lr=1e-2)


def test_clipped_steps_are_skipped():
    engine = prepare(tiny_model("llama"), ZOConfig(clip_g=1e-9), STREAMED)
    before = engine.state_dict()
    for _ in range(3):
        engine.step(tiny_inputs("llama"), lr=1e-2)
    assert engine.stats()["skipped"] == 3
    assert all(torch.equal(v, before[k]) for k, v in engine.state_dict().items())


def test_budgets_are_checked_before_anything_is_allocated():
    with pytest.raises(ValueError, match=r"static GPU buffers, the budget gpu='1MiB'"):
        prepare(tiny_model("llama"), ZOConfig(), OffloadConfig(gpu="1MiB"))
    from shared_kernels.offload import HostMemoryError

    with pytest.raises(
        HostMemoryError, match=r"need .* of host memory, the given limit is 1\.00 KiB"
    ):
        prepare(tiny_model("llama"), ZOConfig(), OffloadConfig(host="1KiB", store="bf16x2"))


def test_an_estimate_is_committed_once():
    engine, inputs = prepare(tiny_model("llama"), ZOConfig(), STREAMED), tiny_inputs("llama")
    estimate = engine.estimate(inputs)
    engine.commit(estimate, lr=1e-3)
    with pytest.raises(ValueError, match="committed once"):
        engine.commit(estimate, lr=1e-3)
    with pytest.raises(ValueError, match="different directions"):
        _ = estimate + engine.estimate(inputs)


def test_patterns_that_match_nothing_are_refused():
    with pytest.raises(ValueError, match="matches no parameter"):
        prepare(tiny_model("llama"), trainable="nothing")
    with pytest.raises(ValueError, match="matches no module"):
        prepare(tiny_model("llama"), ZOConfig(), OffloadConfig(blocks="layers"))


def test_shared_scalar_and_odd_parameters():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(3, 3) for _ in range(3)])
            self.layers[1].weight = self.layers[0].weight
            self.scale = nn.Parameter(torch.tensor(2.0))
            self.turned = nn.Parameter(torch.randn(3, 5).T)
            self.register_buffer("offset", torch.ones(3))

        def forward(self):
            x = torch.ones(2, 3) + self.offset
            for layer in self.layers:
                x = layer(x)
            return (x @ self.turned.T * self.scale).square().mean()

    torch.manual_seed(0)
    twin = Odd()
    # The engine lays parameters out contiguously; a transposed operand would be summed otherwise.
    twin.turned.data = twin.turned.data.contiguous()
    torch.manual_seed(0)
    engine = prepare(Odd(), ZOConfig(seed=8), STREAMED)
    decay, masters = decay_parameters(twin, "exact"), {}
    for t in range(3):
        expected = exact_step(
            twin, lambda m: m(), seed=derive_seed(8, t), lr=1e-3, masters=masters, decay=decay
        )
        assert torch.equal(engine.step(lambda m: m(), lr=1e-3).g, expected.g)
    state = engine.state_dict()
    assert torch.equal(state["offset"], torch.ones(3))
    assert torch.equal(state["layers.0.weight"], state["layers.1.weight"])


def test_overlapping_parameters_are_refused():
    model = tiny_model("llama")
    layer = model.model.layers[0].mlp
    layer.gate_proj.weight = nn.Parameter(layer.up_proj.weight.data[:, :])
    with pytest.raises(ValueError, match="over the same memory"):
        prepare(model)
