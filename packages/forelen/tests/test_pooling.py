"""Pooling of prompts: what the ops leave to this package."""

import pytest
import torch
from forelen import FeatureSpec, entropy_pool
from forelen.pooling import pool

F64 = torch.float64


def make(tokens=15, width=6):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator, dtype=F64)
    return hidden, 3 * torch.rand(tokens, generator=generator, dtype=F64)


def loop(hidden, entropy):
    weights = [float(e.exp()) for e in entropy]
    total = torch.zeros(hidden.shape[-1], dtype=F64)
    for h, w in zip(hidden, weights, strict=True):
        total += w * h
    return total / sum(weights)


def padded(side):
    hidden, entropy = make()
    out = torch.full((2, 12, 6), float("nan"), dtype=F64)
    score = torch.full((2, 12), float("nan"), dtype=F64)
    mask = torch.zeros(2, 12, dtype=torch.bool)
    for row, part in enumerate((slice(0, 10), slice(10, 15))):
        n = part.stop - part.start
        place = slice(12 - n, 12) if side == "left" else slice(0, n)
        out[row, place], score[row, place], mask[row, place] = hidden[part], entropy[part], True
    return hidden, entropy, out, score, mask


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_may_hold_anything(side):
    hidden, entropy, out, score, mask = padded(side)
    found = entropy_pool(out, score, attention_mask=mask)
    torch.testing.assert_close(found[0], loop(hidden[:10], entropy[:10]))
    torch.testing.assert_close(found[1], loop(hidden[10:], entropy[10:]))
    packed = entropy_pool(hidden, entropy, cu_seqlens=torch.tensor([0, 10, 15]))
    torch.testing.assert_close(packed, found)
    assert not entropy_pool(out, score, attention_mask=torch.zeros(2, 12)).any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_each_way(side):
    hidden, entropy, out, score, mask = padded(side)
    content = mask & (mask.long().cumsum(-1) > 2)
    rows = [(hidden[:10], entropy[:10]), (hidden[10:], entropy[10:])]

    def found(pooling, **options):
        return pool(out, FeatureSpec(pooling, **options), mask, content, score).double()

    for row, (h, e) in enumerate(rows):
        near = {"rtol": 1e-6, "atol": 1e-6}
        torch.testing.assert_close(found("mean")[row], h[2:].mean(0), **near)
        torch.testing.assert_close(found("max")[row], h[2:].amax(0), **near)
        torch.testing.assert_close(found("last")[row], h[-1], **near)
        torch.testing.assert_close(found("entropy")[row], loop(h[2:], e[2:]), **near)
        both = torch.cat([loop(h[2:], e[2:]), h[-1]])
        torch.testing.assert_close(found("entropy+last")[row], both, **near)
        # what predicted a token, not what it predicts
        shifted = found("entropy", entropy_shift=1)[row]
        torch.testing.assert_close(shifted, loop(h[2:], e[1:-1]), **near)


def test_keys():
    for spec in (FeatureSpec(), FeatureSpec("last", 15), FeatureSpec("entropy+last", 0, False, 1)):
        assert FeatureSpec.from_key(spec.key) == spec
    for key in ("entropy", "last.x.all", "last.3.some"):
        with pytest.raises(ValueError, match=r"POOLING\.LAYER"):
            FeatureSpec.from_key(key)


def test_bad_input():
    hidden, entropy = make()
    with pytest.raises(ValueError, match="bounds of 15 tokens"):
        entropy_pool(hidden, entropy, cu_seqlens=torch.tensor([0, 14]))
    with pytest.raises(ValueError, match="entropy: expected shape"):
        entropy_pool(hidden, entropy[1:], cu_seqlens=torch.tensor([0, 15]))
    with pytest.raises(ValueError, match="content_mask"):
        entropy_pool(hidden[None], entropy[None], content_mask=torch.ones(3))
    with pytest.raises(TypeError, match="hidden"):
        entropy_pool(hidden.long(), entropy, cu_seqlens=torch.tensor([0, 15]))
    with pytest.raises(ValueError, match="pooling"):
        FeatureSpec("median")
    with pytest.raises(ValueError, match="layer"):
        FeatureSpec(layer=-2)
