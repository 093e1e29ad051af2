"""What only a GPU can show: kernels in whole steps, 16-bit arithmetic, and who waits for whom."""

from __future__ import annotations

import pytest
import torch
from flashdp import PrivacyEngine
from flashdp.errors import PrivacyError
from flashdp.losses import per_sample_loss
from shared_kernels.testing.models import tiny_inputs, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# Wide enough for the kernels over tensor descriptors.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}
ROWS, LENGTH, C = 4, 64, 0.05


def make(device, dtype=torch.float32, **options):
    model = tiny_model("llama", dtype=dtype, **WIDE).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = PrivacyEngine(secure_rng=False, seed=0)
    options = {"noise_multiplier": 0.0, "max_grad_norm": C, "expected_batch_size": 1.0} | options
    engine.make_private(model, optimizer, **options)
    return model, optimizer, engine


def inputs(device, rows=ROWS):
    return {k: v.to(device) for k, v in tiny_inputs("llama", batch=rows, length=LENGTH).items()}


def sums_of(device, dtype=torch.float32, **options):
    model, _, engine = make(device, dtype, **options)
    model(**inputs(device), use_cache=False).loss.backward()
    assert engine.independence.status == "loss"
    return {name: engine.collector.sums[p].cpu() for p, name in engine._parameters.items()}


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("options", [
    {}, {"strategy": "gram"}, {"strategy": "spill"}, {"strategy": "recompute"},
    {"grouping": "flat"},
], ids=str)  # fmt: skip
def test_sums_are_the_cpus(dtype, bound, options):
    expected, found = sums_of("cpu", **options), sums_of("cuda", dtype, **options)
    assert found.keys() == expected.keys()
    for name, total in expected.items():
        assert found[name].dtype == torch.float32
        error = float((found[name] - total).norm() / total.norm())
        assert error < bound, f"{name}: {error:.1e}"


def test_noise_is_the_cpus():
    grads = []
    for device in ("cpu", "cuda"):
        model, optimizer, engine = make(device, noise_multiplier=1.0)
        # Nothing was drawn, so that what an optimizer sees is noise alone.
        optimizer.register_step_pre_hook(
            lambda *_, model=model: grads.append([p.grad.cpu() for p in model.parameters()])
        )
        optimizer.step()
        assert engine.accountant.steps == 1
    for one, other in zip(*grads, strict=True):
        assert float(one.std()) > 0
        assert torch.equal(one, other)


@pytest.mark.parametrize("grouping", ["module", "flat"])
def test_a_step_does_not_wait_for_the_gpu(grouping):
    model, optimizer, _ = make("cuda", torch.bfloat16, noise_multiplier=1.0, grouping=grouping)
    batch = inputs("cuda")
    for step in range(4):
        loss = model(**batch, use_cache=False).loss
        # The first steps measure rates, build kernels, and read the thresholds.
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
        try:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")


class Coupled(torch.nn.Module):
    """Every row's loss counts as the loss of the row before says."""

    def __init__(self):
        super().__init__()
        self.model = tiny_model("llama", dtype=torch.bfloat16, **WIDE)

    def forward(self, input_ids, labels):
        logits = self.model(input_ids=input_ids, use_cache=False).logits
        losses = per_sample_loss(logits, labels)
        return (losses * (99 * losses.detach().roll(1)).cos()).sum()


def test_coupled_units_are_refused():
    model = Coupled().cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = PrivacyEngine(secure_rng=False, seed=0)
    engine.make_private(
        model, optimizer, noise_multiplier=0.0, max_grad_norm=C, expected_batch_size=1.0
    )
    with pytest.raises(PrivacyError, match="coupled"):
        model(**inputs("cuda"))
