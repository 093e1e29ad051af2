"""The losses against a plain loop, in parts, against TRL's, and by finite differences."""

import math

import pytest
import torch
from infsampling.trainer import LOSS_TYPES, group_advantages, grpo_loss, loss_items

F64 = torch.float64
LONGEST = 9


def make(rows=6, seed=0, spread=0.5):
    g = torch.Generator().manual_seed(seed)
    logps = -torch.rand(rows, LONGEST, generator=g, dtype=F64)
    old, ref = (logps + spread * torch.randn(logps.shape, generator=g, dtype=F64) for _ in range(2))
    lengths = torch.randint(1, LONGEST + 1, (rows,), generator=g)
    mask = (torch.arange(LONGEST) < lengths[:, None]).to(F64)
    return logps, old, ref, torch.randn(rows, generator=g, dtype=F64), mask


def loop(logps, old, ref, advantages, mask, *, loss_type, epsilon, epsilon_high, beta):
    per_row = []
    for i in range(len(logps)):
        values = []
        for t in range(LONGEST):
            if not mask[i, t]:
                continue
            ratio = math.exp(float(logps[i, t] - old[i, t]))
            a = float(advantages[i])
            clipped = min(max(ratio, 1 - epsilon), 1 + epsilon_high)
            d = float(ref[i, t] - logps[i, t])
            values.append(-min(ratio * a, clipped * a) + beta * (math.exp(d) - d - 1))
        per_row.append(values)
    everything = [v for values in per_row for v in values]
    return {
        "grpo": sum(sum(v) / len(v) for v in per_row) / len(per_row),
        "bnpo": sum(everything) / len(everything),
        "dapo": sum(everything) / len(everything),
        "dr_grpo": sum(everything) / (len(per_row) * LONGEST),
    }[loss_type]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_against_a_loop(loss_type, beta):
    logps, old, ref, advantages, mask = make()
    options = {"loss_type": loss_type, "epsilon": 0.2, "epsilon_high": 0.28, "beta": beta}
    found = grpo_loss(logps, old, ref, advantages, mask,
                      num_items=loss_items(mask, loss_type, LONGEST), **options)  # fmt: skip
    expected = loop(logps, old, ref, advantages, mask, **options)
    assert float(found) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("on_policy", [True, False])
def test_parts_add_up_to_the_gradient_of_the_whole(loss_type, on_policy):
    logps, old, ref, advantages, mask = make(8)
    options = {"loss_type": loss_type, "beta": 0.03,
               "num_items": loss_items(mask, loss_type, LONGEST)}  # fmt: skip

    def gradient(parts):
        leaf = logps.clone().requires_grad_()
        total = 0.0
        for part in parts:
            loss = grpo_loss(leaf[part], None if on_policy else old[part], ref[part],
                             advantages[part], mask[part], **options)  # fmt: skip
            loss.backward()
            total += float(loss.detach())
        return leaf.grad, total

    whole = gradient([slice(0, 8)])
    # two processes with unequal numbers of tokens, and micro batches of each
    for parts in ([slice(0, 3), slice(3, 8)], [slice(i, i + 1) for i in range(8)]):
        found = gradient(parts)
        assert float((found[0] - whole[0]).abs().max() / whole[0].abs().max()) <= 1e-11
        assert found[1] == pytest.approx(whole[1], rel=1e-11)
    # averaging the parts instead would weigh short sequences more
    if loss_type != "grpo":
        wrong = sum(
            float(grpo_loss(logps[p], old[p], ref[p], advantages[p], mask[p], loss_type=loss_type,
                            num_items=loss_items(mask[p], loss_type, LONGEST))) / 2
            for p in (slice(0, 2), slice(2, 8))
        )  # fmt: skip
        assert wrong != pytest.approx(whole[1], rel=1e-3)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_gradcheck(loss_type):
    _, old, ref, advantages, mask = make(4)
    # away from the corners of the clip
    logps = (old + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: grpo_loss(x, old, ref, advantages, mask, num_items=3.0, loss_type=loss_type,
                            beta=0.1), logps)  # fmt: skip


def test_on_policy_gradient_is_the_advantage():
    logps, _, _, advantages, mask = make()
    leaf = logps.clone().requires_grad_()
    grpo_loss(leaf, None, None, advantages, mask, num_items=1.0).backward()
    torch.testing.assert_close(leaf.grad, -advantages[:, None] * mask, rtol=0, atol=1e-15)


def test_what_does_not_count_may_be_anything():
    logps, old, ref, advantages, mask = make()
    clean = grpo_loss(logps, old, ref, advantages, mask, num_items=5.0, beta=0.1)
    for x in (logps, old, ref):
        x[mask == 0] = float("nan")
    leaf = logps.clone().requires_grad_()
    found = grpo_loss(leaf, old, ref, advantages, mask, num_items=5.0, beta=0.1)
    found.backward()
    assert found == clean
    assert leaf.grad.isfinite().all()


def test_advantages():
    rewards = torch.tensor([1.0, 2.0, 3.0, 5.0, 5.0, 5.0], dtype=F64)
    found = group_advantages(rewards, 3)
    wanted = torch.tensor([-1.0, 0.0, 1.0, 0.0, 0.0, 0.0], dtype=F64) / (1 + 1e-4)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    none = group_advantages(rewards, 3, scale_rewards="none")
    assert none.tolist() == [-1.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    batch = group_advantages(rewards, 3, scale_rewards="batch")
    torch.testing.assert_close(batch, none / (rewards.std() + 1e-4))
    assert group_advantages(rewards, 1).tolist() == [0.0] * 6
    with pytest.raises(ValueError, match="a multiple of the 4 rewards"):
        group_advantages(rewards, 4)


def test_bad_input():
    logps, old, ref, advantages, mask = make()
    with pytest.raises(ValueError, match="loss_type"):
        grpo_loss(logps, old, ref, advantages, mask, num_items=1.0, loss_type="ppo")
    with pytest.raises(ValueError, match="num_items: expected a positive number"):
        grpo_loss(logps, old, ref, advantages, mask, num_items=0.0)
    with pytest.raises(ValueError, match="ref_logps"):
        grpo_loss(logps, old, None, advantages, mask, num_items=1.0, beta=0.1)
    with pytest.raises(ValueError, match=r"advantages: expected shape \(6,\)"):
        grpo_loss(logps, old, ref, advantages[:3], mask, num_items=1.0)
