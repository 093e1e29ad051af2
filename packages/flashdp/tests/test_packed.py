"""Sequences packed into one row are what they are one below the other."""

from __future__ import annotations

import pytest
import torch
from flashdp import PrivacyEngine, per_sample_loss, poisson_data_loader
from flashdp.errors import PrivacyError
from flashdp.losses import unit_loss
from shared_kernels.testing.models import tiny_model

LENGTHS = (5, 9, 3, 7)
C, RTOL = 0.05, 1e-5


def sequences(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 90, (n,), generator=generator) for n in LENGTHS]


def padded(rows):
    """One below the other."""
    width = max(map(len, rows))
    ids = torch.stack([torch.cat([row, row.new_zeros(width - len(row))]) for row in rows])
    filled = torch.arange(width) < torch.tensor([[len(row)] for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": filled.long(),
        "labels": ids.masked_fill(~filled, -100),
    }


def packed(rows):
    """As transformers' DataCollatorWithFlattening packs them."""
    from transformers import DataCollatorWithFlattening

    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = collate([{"input_ids": row.tolist()} for row in rows])
    assert batch["input_ids"].shape == (1, sum(map(len, rows)))
    return batch


def sums_of(batch, name="llama", *, given=(), **options):
    """The clipped sums of one batch."""
    model = tiny_model(name)
    engine = PrivacyEngine(secure_rng=False, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"noise_multiplier": 0.0, "max_grad_norm": C, "expected_batch_size": 1.0} | options
    engine.make_private(model, optimizer, **options)
    loss = model(**batch, **dict(given), use_cache=False).loss
    loss.backward()
    assert engine.independence.status == "loss"
    return loss.item(), {n: engine.collector.sums[p] for p, n in engine._parameters.items()}


def assert_same(one, other):
    assert one[0] == pytest.approx(other[0], rel=RTOL)
    assert one[1].keys() == other[1].keys()
    for name, total in one[1].items():
        assert float(total.norm()) > 0, name
        error = float((total - other[1][name]).norm() / total.norm())
        assert error < RTOL, f"{name}: {error:.1e}"


@pytest.mark.parametrize(("name", "options"), [
    ("gpt2", {}),
    ("llama", {"strategy": "gram"}),
    ("llama", {"strategy": "recompute"}),
    ("llama", {"grouping": "flat"}),
])  # fmt: skip
def test_packed_is_padded(name, options):
    rows = sequences()
    assert_same(sums_of(packed(rows), name, **options), sums_of(padded(rows), name, **options))


def test_packed_users_and_filling():
    rows = sequences()
    given = {"dp_rows": torch.tensor([0, 1, 3, 4]), "dp_mask": torch.tensor([True, True, False])}
    found = sums_of(packed(rows), given=given)
    assert_same(found, sums_of(padded(rows), given=given))
    # The loss counts what fills a batch up; the sums do not.
    rows[3] = rows[3].flip(0)
    again = sums_of(packed(rows), given=given)
    assert again[0] != pytest.approx(found[0], rel=RTOL)
    assert_same((found[0], again[1]), found)


def test_no_sequence_predicts_the_next():
    rows = sequences()
    batch, rest = packed(rows), {"cu_seq_lens_q": torch.tensor([0, 5, 14, 17, 24])}
    logits = torch.randn(1, 24, 90, generator=torch.Generator().manual_seed(0))
    whole = torch.cat(rows)[None]
    expected = sum(
        unit_loss(logits[:, a:b], whole[:, a:b]) for a, b in ((0, 5), (5, 14), (14, 17), (17, 24))
    )
    for labels in (batch["labels"], whole):
        assert float(unit_loss(logits, labels, **rest)) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_losses_of_packed_sequences(reduction):
    logits = torch.randn(1, 24, 90, generator=torch.Generator().manual_seed(0))
    labels = torch.cat(sequences())[None]
    labels[0, [0, 5, 6, 14, 15, 16]] = -100
    cu = torch.tensor([0, 5, 14, 17, 24])
    found = per_sample_loss(logits, labels, reduction=reduction, cu_seqlens=cu)
    for k, loss in enumerate(found):
        part = slice(int(cu[k]), int(cu[k + 1]))
        alone = per_sample_loss(logits[:, part], labels[:, part], reduction=reduction)
        assert float(loss) == pytest.approx(float(alone), rel=1e-6)
    # Nothing in it counts.
    assert float(found[2]) == 0


def test_attention_across_sequences_is_refused():
    batch = packed(sequences())
    # Without places that start anew, a model takes all tokens for one sequence.
    batch["position_ids"] = torch.arange(24)[None]
    with pytest.raises(PrivacyError, match=r"coupled.*attention across"):
        sums_of(batch)


def test_a_model_without_labels_is_probed_too():
    model = tiny_model("llama")
    engine = PrivacyEngine(secure_rng=False, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine.make_private(
        model, optimizer, noise_multiplier=0.0, max_grad_norm=C, expected_batch_size=1.0
    )
    batch = packed(sequences())
    batch.pop("labels")
    model(**batch, use_cache=False)
    assert engine.independence.status == "outputs"


@pytest.mark.parametrize(("change", "words"), [
    (lambda batch: batch.update(dp_rows=torch.tensor([0, 1, 2])), "4 packed sequences, its units"),
    (lambda batch: batch.update(cu_seq_lens_q=torch.tensor([0, 5, 20])), "ends at 20"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(change, words):
    batch = packed(sequences())
    change(batch)
    with pytest.raises(PrivacyError, match=words):
        sums_of(batch)


def test_a_mean_over_rows_is_refused():
    with pytest.raises(PrivacyError, match="packed sequences are one row"):
        sums_of(packed(sequences()), loss_reduction="mean")


def test_a_poisson_loader_packs():
    from transformers import DataCollatorWithFlattening

    data = [{"input_ids": row.tolist()} for seed in range(4) for row in sequences(seed)]
    loader = poisson_data_loader(
        data, num_steps=2, expected_batch_size=5, public_n=len(data), max_physical_batch_size=4,
        secure_rng=False, seed=1,
        collate_fn=DataCollatorWithFlattening(return_flash_attn_kwargs=True),
    )  # fmt: skip
    model = tiny_model("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = PrivacyEngine(secure_rng=False, seed=0)
    engine.make_private(
        model, optimizer, loader, noise_multiplier=0.0, max_grad_norm=C, expected_batch_size=5
    )
    before = [p.detach().clone() for p in model.parameters()]
    filled = 0
    for batch in loader:
        filled += int((~loader.current.mask).sum())
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert filled
    assert loader.steps_done == engine.accountant.steps == 2
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
