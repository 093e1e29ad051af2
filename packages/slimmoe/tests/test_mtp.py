"""Modules of multi-token prediction: what they see, files, and drafts."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from slimmoe import CompressionConfig, UnsupportedModelError, plan
from slimmoe.mtp import MTPHead, acceptance_rate
from slimmoe.mtp.acceptance import drafts
from slimmoe.streaming import write
from slimmoe.weights import Source
from torch.nn import functional
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
import made
from moe_families import model, tokens

FAMILIES = ("qwen3_next", "deepseek_v3")


def head_of(family, count=1, seed=0, dtype=torch.float32, **changes):
    """A model and modules with random weights; in float64 experts run one after the other."""
    found = model(family, dtype=dtype, **changes)
    if dtype == torch.float64:
        found.set_experts_implementation("eager")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = MTPHead(found, count).eval()
        with torch.no_grad():
            for tensor in head.state_dict().values():
                if tensor.ndim == 1:
                    tensor += 0.1 * torch.randn_like(tensor)
                else:
                    tensor.normal_(std=tensor.shape[-1] ** -0.5)
    return found, head.to(dtype)


def saved(found, head, folder):
    found.save_pretrained(folder)
    file = folder / "model.safetensors"
    state = load_file(file) | {name: t.contiguous() for name, t in head.tensors()}
    save_file(state, file, metadata={"format": "pt"})


@torch.no_grad()
def given(found, head, ids, **options):
    hidden = found.get_decoder()(ids, use_cache=False, **options).last_hidden_state
    return head(hidden, ids, **options)


# --- what rows see -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [1, 2])
def test_rows_see_as_many_tokens_as_they_should(family, count):
    """Row i of depth k knows token i + k, and not token i + k + 1, which it is to predict."""
    # in float32, rounding lets a router choose otherwise now and then
    found, head = head_of(family, count, dtype=torch.float64)
    ids = tokens(found, 1, 10)
    before = given(found, head, ids)
    assert [h.shape[1] for h in before] == [9 - depth for depth in range(count)]
    for place in range(1, 10):
        other = ids.clone()
        other[0, place] = 3 + (other[0, place] - 2) % 90
        for depth, (a, b) in enumerate(zip(before, given(found, head, other), strict=True), 1):
            moved = (a - b).abs().amax(-1)[0] > 1e-6
            first = max(0, place - depth)
            assert not moved[:first].any()
            if first < len(moved):
                assert moved[first]


def test_it_is_the_formula():
    found, head = head_of("deepseek_v3")
    ids = tokens(found, 2, 8)
    hidden = found.get_decoder()(ids).last_hidden_state
    module = head.modules_[0]
    both = torch.cat([module.embedding_norm(found.model.embed_tokens(ids[:, 1:])),
                      module.hidden_norm(hidden[:, :-1])], -1)  # fmt: skip
    x = both @ module.projection.weight.T
    positions = torch.arange(1, 8)[None].expand(2, -1)
    mask = torch.full((7, 7), float("-inf")).triu(1)[None, None].expand(2, -1, -1, -1)
    y = module.layer(x, attention_mask=mask, position_ids=positions,
                     position_embeddings=found.model.rotary_emb(x, positions))  # fmt: skip
    wanted = module.norm(y[0] if isinstance(y, tuple) else y)
    torch.testing.assert_close(given(found, head, ids)[0], wanted, rtol=1e-5, atol=1e-5)


def test_padding_changes_nothing():
    found, head = head_of("deepseek_v3", 2)
    ids = tokens(found, 1, 8)
    wanted = given(found, head, ids)
    longer = torch.cat([ids, torch.zeros(1, 3, dtype=torch.int64)], 1)
    mask = torch.ones_like(longer)
    mask[:, 8:] = 0
    for a, b in zip(given(found, head, longer, attention_mask=mask), wanted, strict=True):
        torch.testing.assert_close(a[:, : b.shape[1]], b, rtol=1e-5, atol=1e-5)


def test_padding_on_the_left():
    found, head = head_of("deepseek_v3", 2)
    ids = tokens(found, 1, 8)
    wanted = given(found, head, ids)
    longer = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids], 1)
    mask = torch.ones_like(longer)
    mask[:, :3] = 0
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    ran = given(found, head, longer, attention_mask=mask, position_ids=places)
    for a, b in zip(ran, wanted, strict=True):
        # the first row of a depth has seen nothing but padding before
        torch.testing.assert_close(a[:, -b.shape[1] :], b, rtol=1e-4, atol=1e-4)


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_files(family, tmp_path):
    found, head = head_of(family)
    saved(found, head, tmp_path)
    assert all(match.mtp == 0 for name, match in Source(tmp_path).matches.items()
               if name in dict(head.tensors()))  # fmt: skip
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    again = MTPHead.from_pretrained(tmp_path, loaded)
    ids = tokens(found)
    state = again.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in head.state_dict().items())
    wanted = given(found, head, ids)[0]
    torch.testing.assert_close(given(loaded, again, ids)[0], wanted, rtol=1e-4, atol=1e-5)
    assert not any("embed_tokens" in name for name in again.state_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_compressed_module_is_read(family, tmp_path):
    found, head = head_of(family)
    saved(found, head, tmp_path / "before")
    source = Source(tmp_path / "before")
    options = CompressionConfig(num_experts=4, hidden_size=24, drop_layers=(1,))
    write(source, tmp_path / "after", plan(source, made.statistics(source), options),
          progress=False)  # fmt: skip
    smaller = AutoModelForCausalLM.from_pretrained(tmp_path / "after")
    again = MTPHead.from_pretrained(tmp_path / "after", smaller)
    assert again.modules_[0].projection.weight.shape == (24, 48)
    assert again.modules_[0].layer.mlp.experts.down_proj.shape[0] == 4
    assert given(smaller, again, tokens(found))[0].isfinite().all()


def test_what_is_no_module(tmp_path):
    with pytest.raises(UnsupportedModelError, match="mixtral has no modules"):
        MTPHead(model("mixtral"))
    found = model("qwen3_next")
    found.save_pretrained(tmp_path / "without")
    with pytest.raises(ValueError, match="folder: expected modules of MTP"):
        MTPHead.from_pretrained(tmp_path / "without", found)
    with pytest.raises(ValueError, match="count: expected at least 1"):
        MTPHead(found, 0)
    found, head = head_of("qwen3_next")
    saved(found, head, tmp_path / "with")
    with pytest.raises(ValueError, match="folder: expected modules of this model"):
        MTPHead.from_pretrained(tmp_path / "with", model("qwen3_next", num_experts=4))
    with pytest.raises(ValueError, match="input_ids: expected over 1 tokens"):
        given(found, head, tokens(found, 1, 1))


# --- learning and drafting -----------------------------------------------------------------------


def pairs(n, size, seed, vocabulary=24):
    """Texts of pairs: the first of a pair is any token, and the second follows from it."""
    draws = torch.Generator().manual_seed(seed)
    law = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(9))
    first = torch.randint(vocabulary, (n, size // 2), generator=draws)
    return torch.stack([first, law[first]], -1).flatten(1) + 3


def learnt(ahead, steps=150):
    """Train a module whose embeddings are of tokens so far ahead; return its last loss."""
    found, head = head_of("deepseek_v3", vocab_size=32)
    found.requires_grad_(False)
    head.train()
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    losses = []
    for step in range(steps):
        ids = pairs(16, 12, step)
        with torch.no_grad():
            hidden = found.get_decoder()(ids).last_hidden_state
        if ahead == 1:
            given = head(hidden, ids)[0]
        else:
            embeddings, places = found.model.embed_tokens(ids[:, :-1]), torch.arange(11)[None]
            context = head.context(embeddings, None, places.expand(16, -1))
            given = head.modules_[0](embeddings, hidden[:, :-1], **context)
        # row i of depth 1 is to predict token i + 2: where that is the second of a pair
        logits, wanted = found.lm_head(given[:, 1:-1:2]), ids[:, 3::2]
        loss = functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return sum(losses[-10:]) / 10


def test_a_module_learns_the_token_after_the_next():
    """Token i + 2 follows from token i + 1, which it is told; without, it is any of 24."""
    assert learnt(1) < 0.05
    assert learnt(0) > 2


def manual_drafts(found, head, ids, depth):
    """Drafts behind the last token but one, one module call after the other."""
    hidden = found.get_decoder()(ids).last_hidden_state[:, :-1]
    embed = found.model.embed_tokens
    inputs, states = embed(ids[:, 1:]), hidden
    tokens_, size = [], hidden.shape[1]
    for step in range(depth):
        number = min(step, len(head.modules_) - 1)
        if step and number != min(step - 1, len(head.modules_) - 1):
            raise NotImplementedError
        # the first draft is of the last row; further ones are rows behind it
        positions = torch.arange(inputs.shape[1])[None]
        context = head.context(inputs, None, positions)
        out = head.modules_[number](inputs, states, **context)[:, -1:]
        token = found.lm_head(out).argmax(-1)
        tokens_.append(int(token))
        inputs = torch.cat([inputs, embed(token)], 1)
        states = torch.cat([states, out], 1)
    assert size
    return tokens_


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_drafts_are_those_of_one_after_the_other(family):
    """As with a cache: a further draft sees all rows before, and the drafts of its own."""
    found, head = head_of(family)
    ids = tokens(found, 1, 9)
    together = drafts(found, head, ids, 4)
    assert together.shape == (1, 4, 8)
    for end in range(2, 10):
        wanted = manual_drafts(found, head, ids[:, :end], 4)
        assert together[0, :, end - 2].tolist() == wanted


@torch.no_grad()
def test_acceptance():
    found, head = head_of("deepseek_v3")
    prompts = list(tokens(found, 5, 6))
    told = acceptance_rate(found, head, prompts, depth=3, new_tokens=12)
    assert 0 < told.positions <= 5 * 9
    assert all(a >= b for a, b in zip(told.rates, told.rates[1:], strict=False))
    assert told.mean_length == pytest.approx(1 + sum(told.rates))
    # what is counted: answers whose tokens are what was drafted
    right, positions = [0, 0, 0], 0
    for prompt in prompts:
        answer = found.generate(prompt[None], max_new_tokens=12, do_sample=False)
        for row in range(len(prompt) - 1, answer.shape[1] - 4):
            drafted = manual_drafts(found, head, answer[:, : row + 2], 3)
            wanted = answer[0, row + 2 : row + 5].tolist()
            positions += 1
            for length in range(3):
                right[length] += drafted[: length + 1] == wanted[: length + 1]
    assert told.positions == positions
    assert told.rates == pytest.approx([r / positions for r in right])
    with pytest.raises(ValueError, match="depth: expected"):
        acceptance_rate(found, head, prompts, depth=0)
    with pytest.raises(ValueError, match="prompts: expected answers to draft in"):
        acceptance_rate(found, head, [], depth=2)


@torch.no_grad()
def test_answers_that_end_at_different_places():
    """Together and one after the other: what is behind an answer's end does not count."""
    found, head = head_of("deepseek_v3")
    prompts = list(tokens(found, 6, 6)) + list(tokens(found, 2, 4))
    answers = [found.generate(p[None], max_new_tokens=12, do_sample=False)[0] for p in prompts]
    # a token that ends one answer early
    end = int(answers[0][len(prompts[0]) + 5])
    found.generation_config.eos_token_id = end
    found.generation_config.pad_token_id = 0
    lengths = {len(found.generate(p[None], max_new_tokens=12, do_sample=False)[0]) - len(p)
               for p in prompts}  # fmt: skip
    assert len(lengths) > 1
    told = [acceptance_rate(found, head, prompts, depth=2, new_tokens=12, batch=size)
            for size in (1, 3, 16)]  # fmt: skip
    assert told[0].positions == told[1].positions == told[2].positions
    assert told[0].rates == told[1].rates == told[2].rates


def test_a_head_that_drafts_what_the_model_says():
    """All is right where a constant model says one token, and the head the same."""
    found, head = head_of("deepseek_v3")
    with torch.no_grad():
        found.lm_head.weight.zero_()
        found.lm_head.weight[7] = 0
        found.lm_head.weight[7, 0] = 1
        found.model.norm.weight.zero_()
        head.modules_[0].norm.weight.zero_()
    told = acceptance_rate(found, head, list(tokens(found, 2, 5)), depth=2, new_tokens=8)
    assert told.rates == (1.0, 1.0)
    assert told.mean_length == 3
