"""Prompts and continuations packed: against separate rows, gradients included."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_kernels.errors import KernelUnavailableError
from shared_kernels.ops.prefix_attention.training import PackedPrompts, packed_prefix_attention

LAYOUTS = [
    ([5], [[3, 1, 4]]),
    ([1, 7], [[2], [6, 0, 1]]),
    ([4, 2], [[], [3]]),
    ([3], [[]]),
]


def draw(layout, heads=4, key_heads=2, dim=8, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(layout.tokens)
    return [
        torch.randn(layout.tokens, h, dim, generator=generator, dtype=torch.float64)
        .to(device, dtype)
        .requires_grad_()
        for h in (heads, key_heads, key_heads)
    ]


def by_rows(q, k, v, layout, window=None, softcap=None, sinks=None):
    """Every text by itself, key by key."""
    out, place = torch.zeros_like(q), layout.prompt_tokens
    texts, first = [], 0
    for prompt, own in zip(layout.prompts, layout.continuations, strict=True):
        base = list(range(first, first + prompt))
        texts.append((base, 0))
        for length in own:
            texts.append(([*base, *range(place, place + length)], prompt))
            place += length
        first += prompt
    group = q.shape[1] // k.shape[1]
    rows = {}
    for text, skip in texts:
        for at in range(skip, len(text)):
            seen = text[max(0, at + 1 - (window or at + 1)) : at + 1]
            keys, values = (x[seen].repeat_interleave(group, 1) for x in (k, v))
            logits = torch.einsum("hd,khd->hk", q[text[at]], keys) * 8**-0.5
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            powers = logits.exp()
            total = powers.sum(1) + (0 if sinks is None else sinks.exp())
            weights = powers / total[:, None]
            rows[text[at]] = torch.einsum("hk,khd->hd", weights, values)
    return torch.stack([rows[i] for i in range(len(out))])


def gradients(out, tensors, weights):
    return torch.autograd.grad((out * weights).sum(), tensors, materialize_grads=True)


@pytest.mark.parametrize(("prompts", "continuations"), LAYOUTS)
@pytest.mark.parametrize("window", [None, 3, 100])
def test_outputs_and_gradients_are_those_of_separate_rows(prompts, continuations, window):
    layout = PackedPrompts.build(prompts, continuations)
    tensors = draw(layout)
    out = packed_prefix_attention(*tensors, layout, window=window)
    exact = by_rows(*tensors, layout, window)
    assert float((out - exact).detach().abs().max()) < 1e-14
    weights = torch.randn_like(exact)
    for a, b in zip(gradients(out, tensors, weights), gradients(exact, tensors, weights),
                    strict=True):  # fmt: skip
        assert float((a - b).abs().max()) < 1e-13


@pytest.mark.parametrize(("softcap", "sink"), [(0.7, False), (None, True), (0.7, True)])
def test_caps_and_sinks(softcap, sink):
    layout = PackedPrompts.build([5], [[3, 1, 4]])
    tensors = draw(layout)
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True) if sink else None
    options = {"window": 4, "softcap": softcap, "sinks": sinks}
    out = packed_prefix_attention(*tensors, layout, **options)
    exact = by_rows(*tensors, layout, **options)
    leaves = [*tensors, *([sinks] if sink else [])]
    weights = torch.randn_like(exact)
    assert float((out - exact).detach().abs().max()) < 1e-14
    for a, b in zip(gradients(out, leaves, weights), gradients(exact, leaves, weights),
                    strict=True):  # fmt: skip
        assert float((a - b).abs().max()) < 1e-13


def test_gradcheck():
    layout = PackedPrompts.build([2, 1], [[2, 1], [2]])
    assert torch.autograd.gradcheck(
        lambda *x: packed_prefix_attention(*x, layout), draw(layout, 2, 1, 4)
    )


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.tuples(st.integers(1, 5), st.lists(st.integers(0, 4), max_size=3)),
                      max_size=3))  # fmt: skip
def test_layout(sizes):
    layout = PackedPrompts.build([p for p, _ in sizes], [c for _, c in sizes])
    # the slow way: walk through the texts
    positions = [i for p, _ in sizes for i in range(p)]
    before, end, place = [], 0, sum(p for p, _ in sizes)
    for prompt, own in sizes:
        end += prompt
        for n in own:
            positions += range(prompt, prompt + n)
            before += [end - 1 if i == 0 else place + i - 1 for i in range(n)]
            place += n
    assert layout.tokens == len(positions)
    assert layout.position_ids().tolist() == positions
    assert layout.predecessors().tolist() == before
    own, queries, keys = layout.segments(torch.device("cpu"))
    assert own[-1] == layout.tokens
    assert len(own) == 1 + len(sizes) + sum(len(c) for _, c in sizes)
    assert keys[-1] == layout.prompt_tokens
    assert queries[-1] == layout.tokens - layout.prompt_tokens
    assert layout.longest == max((p + max(c, default=0) for p, c in sizes), default=0)


def test_the_private_operators_have_the_arguments_that_are_given():
    forward = torch.ops.aten._flash_attention_forward.default._schema
    backward = torch.ops.aten._flash_attention_backward.default._schema
    assert [a.name for a in forward.arguments][:11] == [
        "query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p",
        "is_causal", "return_debug_mask", "scale",
    ]  # fmt: skip
    assert [a.name for a in backward.arguments][:15] == [
        "grad_out", "query", "key", "value", "out", "logsumexp", "cum_seq_q", "cum_seq_k", "max_q",
        "max_k", "dropout_p", "is_causal", "rng_state", "unused", "scale",
    ]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "key_heads", "dim"), [(8, 2, 128), (3, 3, 64), (4, 1, 72)])
def test_flash_is_as_near_to_float64_as_separate_rows(cuda, dtype, heads, key_heads, dim):
    for prompts, continuations in (
        ([300], [[70, 1, 500, 33]]), ([5, 128], [[200], [1, 0, 129]]), ([40], [[]]),
    ):  # fmt: skip
        layout = PackedPrompts.build(prompts, continuations)
        narrow = draw(layout, heads, key_heads, dim, dtype, cuda)
        wide = [x.detach().double().requires_grad_() for x in narrow]
        weights = torch.randn_like(narrow[0])
        results = []
        for tensors, impl in ((narrow, "flash"), (narrow, "reference"), (wide, "reference")):
            out = packed_prefix_attention(*tensors, layout, impl=impl)
            results.append([out, *gradients(out, tensors, weights.to(out.dtype))])
        found, plain, exact = results
        for a, b, c in zip(found, plain, exact, strict=True):
            scale = c.abs().max()
            error, theirs = ((x.double() - c).abs().max() / scale for x in (a, b))
            assert float(error) < max(1.5 * float(theirs), 2 * torch.finfo(dtype).eps)


@pytest.mark.gpu
def test_float32_on_a_gpu(cuda):
    layout = PackedPrompts.build([30], [[7, 20]])
    narrow = draw(layout, dtype=torch.float32, device=cuda)
    exact = by_rows(*(x.double() for x in narrow), layout)
    assert float((packed_prefix_attention(*narrow, layout).double() - exact).abs().max()) < 1e-5


def test_bad_input():
    with pytest.raises(ValueError, match="prompts: expected at least one token each"):
        PackedPrompts.build([0], [[1]])
    with pytest.raises(ValueError, match="continuations: expected lists for 2 prompts"):
        PackedPrompts.build([1, 1], [[1]])
    with pytest.raises(ValueError, match="no negative number"):
        PackedPrompts.build([1], [[-1]])
    layout = PackedPrompts.build([2], [[1]])
    q, k, v = draw(layout)
    with pytest.raises(ValueError, match=r"k: expected shape \(3, heads, dim\)"):
        packed_prefix_attention(q, k[:2], v, layout)
    with pytest.raises(ValueError, match="a multiple of key heads"):
        packed_prefix_attention(q[:, :3], k, v, layout)
    with pytest.raises(TypeError, match="v: expected"):
        packed_prefix_attention(q, k, v.float(), layout)
    with pytest.raises(ValueError, match="window: expected a positive number"):
        packed_prefix_attention(q, k, v, layout, window=0)
    with pytest.raises(KernelUnavailableError, match="CUDA tensors"):
        packed_prefix_attention(q, k, v, layout, impl="flash")
