"""Scores of continuations against one uncached forward pass per row."""

import numpy as np
import pytest
import torch
from pskv import PrefixScorer, SharedPrefixCache, StalePrefixError, UnsupportedModelError, support
from shared_kernels.testing.models import tiny_model

FAMILIES = [
    "llama", "mistral", "qwen3", "gemma2", "gemma3", "cohere2", "opt", "gpt2", "gpt_oss",
    "qwen3_moe", "mixtral", "phi3", "olmo2", "granite", "gpt_neox",
]  # fmt: skip
#: Interpreting kernels is slow: these have windows, caps, sinks, learned positions, groups.
INTERPRETED = {"llama", "mistral", "gemma2", "gpt2", "gpt_oss"}
#: Caps at which a small model's logits notice them.
OVERRIDES = {"gemma2": {"attn_logit_softcapping": 0.02, "final_logit_softcapping": 0.5}}
BACKENDS = ["split", "layerwise", "replicate", "none", "fused"]


def oracle(model, prefix, row, first):
    """Log-probabilities and greediness of a row's targets, by one pass over all of it."""
    ids = torch.cat([torch.as_tensor(prefix), torch.as_tensor(row)])
    with torch.no_grad():
        logits = model(input_ids=ids[None].to(model.device), use_cache=False).logits[0]
    logits = logits.double().cpu()
    logprobs = logits.log_softmax(-1)
    places = torch.arange(len(prefix) + first, len(ids))
    targets = ids[places]
    found = logprobs[places - 1, targets]
    return found, bool((logits[places - 1].argmax(-1) == targets).all())


def make_rows(seed=0, suffix=9, tail=3, n=14):
    """Candidates that differ from a parent in one token, a stranger, a short one, duplicates."""
    generator = np.random.default_rng(seed)
    parent = generator.integers(3, 90, suffix + tail)
    rows = [parent]
    for i in range(n):
        row = parent.copy()
        row[i % suffix] = 90 + i % 6
        rows.append(row)
    return [*rows, generator.integers(3, 90, 5), parent[:4], parent]


def assert_scores(model, scorer, prefix, rows, targets, bound):
    out = scorer.score(torch.as_tensor(prefix), rows, targets=targets)
    first = [0] * len(rows)
    if targets is not None:
        first = [len(row) for row in rows]
        rows = [np.concatenate([row, targets]) for row in rows]
    for number, (row, start) in enumerate(zip(rows, first, strict=True)):
        expected, greedy = oracle(model, prefix, row, start)
        assert out.num_tokens[number] == len(row) - start
        torch.testing.assert_close(
            out.token_logprobs[number].double(), expected, rtol=0, atol=bound
        )
        assert abs(float(out.logprobs[number]) - float(expected.sum())) <= bound * len(row)
        assert bool(out.is_greedy[number]) == greedy
    return out


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_families_agree_with_uncached_rows(family, backend, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if device == "cpu" and backend == "fused" and torch.cuda.is_available():
        pytest.skip("the kernels are compiled for the GPU in this process")
    if device == "cpu" and backend == "fused" and family not in INTERPRETED:
        pytest.skip("its kernels run on a GPU only")
    model = tiny_model(family, **OVERRIDES.get(family, {})).to(device)
    if family == "gemma2":
        # older versions of transformers take sdpa for it, which leaves out the cap
        model.set_attn_implementation("eager")
    scorer = PrefixScorer(model, backend=backend)
    prefix = np.random.default_rng(1).integers(3, 90, 18)
    before = model.config._attn_implementation
    assert_scores(model, scorer, prefix, make_rows(), None, 3e-5)
    if backend == "split":
        assert_scores(model, scorer, prefix, make_rows(), np.array([7, 8, 9]), 3e-5)
    assert model.config._attn_implementation == before


def spearman(one, other):
    ranks = [torch.tensor(x).argsort().argsort().double() for x in (one, other)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_bfloat16_is_no_further_from_float64_than_ordinary_passes(family, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    # all experts take part: a router's choice between two is no matter of accuracy
    config = {"num_experts_per_tok": 4} if family == "gpt_oss" else {}
    exact = tiny_model(family, dtype=torch.float32, **config).to(device)
    model = tiny_model(family, dtype=torch.bfloat16, **config).to(device)
    exact.load_state_dict(model.state_dict())
    scorer = PrefixScorer(model, backend="fused" if device == "cuda" else "split")
    prefix = np.random.default_rng(1).integers(3, 90, 18)
    errors, scores = ({name: [] for name in ("ours", "ordinary", "exact")} for _ in range(2))
    for seed in range(6 if device == "cuda" else 2):
        rows = make_rows(seed)
        out = scorer.score(torch.as_tensor(prefix), rows)
        for row, found in zip(rows, out.token_logprobs, strict=True):
            expected, _ = oracle(exact, prefix, row, 0)
            ordinary, _ = oracle(model, prefix, row, 0)
            for name, value in (("ours", found), ("ordinary", ordinary), ("exact", expected)):
                errors[name].append(value.double() - expected)
                scores[name].append(float(value.double().sum()))
    ours, ordinary, _ = (torch.cat(x).square().mean().sqrt() for x in errors.values())
    assert ours <= 1.2 * ordinary
    ours, ordinary = (spearman(scores[name], scores["exact"]) for name in ("ours", "ordinary"))
    assert ours >= ordinary - 0.002


def test_in_float64_the_error_is_rounding():
    model = tiny_model("gpt2", dtype=torch.float64)
    prefix = np.random.default_rng(1).integers(3, 90, 18)
    for backend in ("split", "layerwise"):
        scorer = PrefixScorer(model, backend=backend)
        out = scorer.score(torch.as_tensor(prefix), make_rows())
        for row, found in zip(make_rows(), out.token_logprobs, strict=True):
            expected, _ = oracle(model, prefix, row, 0)
            torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-6)


def test_shared_tokens_are_computed_once():
    model = tiny_model("llama")
    rows = make_rows()
    shared = PrefixScorer(model, backend="split").score(torch.arange(5, 20), rows)
    apart = PrefixScorer(model, backend="split", share_parent=False).score(
        torch.arange(5, 20), rows
    )
    assert shared.stats["tokens"] < apart.stats["tokens"]
    torch.testing.assert_close(shared.logprobs, apart.logprobs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("micro_batch", [1, 7, 40])
@pytest.mark.parametrize("backend", ["split", "replicate"])
def test_micro_batches_change_nothing(backend, micro_batch):
    model = tiny_model("qwen3")
    prefix = torch.arange(5, 20)
    whole = PrefixScorer(model, backend=backend).score(prefix, make_rows())
    parts = PrefixScorer(model, backend=backend, micro_batch=micro_batch).score(prefix, make_rows())
    assert parts.stats["passes"] > whole.stats["passes"] == 1
    torch.testing.assert_close(parts.logprobs, whole.logprobs, rtol=0, atol=1e-4)
    assert torch.equal(parts.is_greedy, whole.is_greedy)


def test_no_prefix_and_one_token():
    model = tiny_model("llama")
    scorer = PrefixScorer(model, backend="split")
    out = scorer.score([], [[5, 6, 7]], targets=[8, 9])
    expected, _ = oracle(model, np.array([5]), [6, 7, 8, 9], 2)
    assert float(out.logprobs[0]) == pytest.approx(float(expected.sum()), abs=1e-4)
    # options of one token need no forward pass beyond the prefix
    out = scorer.score([5, 6, 7], [[8], [9], [8]])
    assert out.stats["tokens"] == 0
    for row, found in zip([[8], [9], [8]], out.logprobs.tolist(), strict=True):
        expected, _ = oracle(model, np.array([5, 6, 7]), row, 0)
        assert found == pytest.approx(float(expected.sum()), abs=1e-5)
    assert len(scorer.score([5], []).logprobs) == 0


def test_greedy_means_every_token():
    model = tiny_model("llama")
    said = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)[0, 3:]
    other = said.clone()
    other[3] = (other[3] + 1) % 96
    out = PrefixScorer(model, backend="split").score([5, 6, 7], torch.stack([said, other]))
    assert out.is_greedy.tolist() == [True, False]
    assert out.token_is_greedy[1].tolist() == [True, True, True, False]


def test_means():
    scorer = PrefixScorer(tiny_model("llama"), backend="split")
    rows = make_rows()
    sums = scorer.score([5, 6], rows)
    means = scorer.score([5, 6], rows, reduction="mean")
    torch.testing.assert_close(means.logprobs * sums.num_tokens, sums.logprobs)


@pytest.mark.parametrize("micro_batch", ["auto", 30])
def test_requests_share_contexts_at_every_depth(micro_batch):
    model = tiny_model("llama", max_position_embeddings=256)
    scorer = PrefixScorer(model, backend="split", micro_batch=micro_batch)
    generator = np.random.default_rng(2)
    shots = generator.integers(3, 90, 60)
    requests = []
    for question in range(6):
        context = np.concatenate([shots, generator.integers(3, 90, 20 + question)])
        requests += [(context, generator.integers(3, 90, 1 + option)) for option in range(4)]
    requests += [(generator.integers(3, 90, 9), [4, 5]), (shots[:1], shots[1:4])]
    # predicted by what others share, before and after these in the order of sorting
    requests += [(shots, [1, 4]), (shots, [95, 4]), (shots, [94])]
    forwarded = []
    handle = model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: forwarded.append(args[0].shape[:2].numel()),
        with_kwargs=True,
    )
    found = scorer.score_requests(requests)
    handle.remove()
    for (context, continuation), (value, greedy) in zip(requests, found, strict=True):
        expected, expected_greedy = oracle(model, context, continuation, 0)
        assert value == pytest.approx(float(expected.sum()), abs=1e-4)
        assert greedy == expected_greedy
    naive = sum(len(a) + len(b) for a, b in requests)
    assert sum(forwarded) < naive / (4 if micro_batch == "auto" else 2)


def test_a_prefix_never_changes():
    model = tiny_model("gemma2", max_position_embeddings=128)
    scorer = PrefixScorer(model, backend="auto")
    with scorer.prefill(np.arange(5, 30)) as prefix:
        before = prefix.checksums()
        first = scorer.score(prefix, make_rows())
        for number in range(100):
            scorer._passes.backend = BACKENDS[number % 3]
            again = scorer.score(prefix, make_rows(), targets=[4, 5] if number % 7 == 0 else None)
        with pytest.raises(ValueError, match="at least one token"):
            scorer.score(prefix, [[]])
        assert all(torch.equal(a, b) for a, b in zip(prefix.checksums(), before, strict=True))
        scorer._passes.backend = "split"
        again = scorer.score(prefix, make_rows())
        torch.testing.assert_close(again.logprobs, first.logprobs, rtol=0, atol=1e-4)
    with pytest.raises(StalePrefixError, match="closed"):
        scorer.score(prefix, make_rows())


def test_memory_that_runs_out_costs_nothing_but_time(monkeypatch):
    model = tiny_model("llama")
    scorer = PrefixScorer(model, backend="split")
    prefix = scorer.prefill(np.arange(5, 20))
    expected = scorer.score(prefix, make_rows())
    before, state = prefix.checksums(), torch.get_rng_state()
    right = scorer._passes.packed

    def small(shared, packed, *rest):
        if len(packed.tokens) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(shared, packed, *rest)

    monkeypatch.setattr(scorer._passes, "packed", small)
    found = scorer.score(prefix, make_rows())
    assert found.stats["passes"] > 3
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=0, atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(prefix.checksums(), before, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    held = scorer._passes.micro.tokens
    for _ in range(40):
        scorer.score(prefix, [[5, 6]])
    assert scorer._passes.micro.tokens > held
    with pytest.raises(torch.OutOfMemoryError, match="one row of 29 tokens after a prefix of 15"):
        scorer.score(prefix, [np.full(30, 5)])


def test_a_cache_of_transformers():
    model = tiny_model("mistral")
    prefix = torch.arange(5, 25)
    cache = SharedPrefixCache.from_prefix(model, prefix)
    rows = torch.from_numpy(np.stack(make_rows()[:6]))
    expected = torch.stack([model(torch.cat([prefix, row])[None]).logits[0, 20:] for row in rows])
    for _ in range(2):
        found = model(rows, past_key_values=cache).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
        assert cache.get_seq_length() == 20


# -- bad input -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama():
    return PrefixScorer(tiny_model("llama"), backend="split")


@pytest.mark.parametrize(
    ("rows", "targets", "error", "match"),
    [
        ([[5], []], None, ValueError, r"continuations\[1\]: expected at least one token"),
        ([[5]], [], ValueError, "at least one token"),
        ([[5, 96]], None, ValueError, r"token ids in \[0, 96\), got int 96"),
        ([[5, -1]], None, ValueError, "got int -1"),
        ([[0.5]], None, TypeError, r"continuations\[0\]: expected one dimension of token ids"),
        ([[5] * 61], None, ValueError, "61 tokens after a prefix of 5, 66 in all, and the model"),
        (["text"], None, ValueError, "tokenizer: texts need one"),
        ("text", None, TypeError, "a sequence of texts"),
        ([[5], [6]], [[7], [8], [9]], ValueError, "targets: expected 2 targets"),
    ],
)
def test_bad_rows(llama, rows, targets, error, match):
    with pytest.raises(error, match=match):
        llama.score([5, 6, 7, 8, 9], rows, targets=targets)


def test_nothing_predicts_the_first_token(llama):
    with pytest.raises(ValueError, match="a token before the first to score"):
        llama.score([], [[5, 6]])


def test_a_stale_prefix():
    model = tiny_model("llama")
    scorer = PrefixScorer(model, backend="split")
    prefix = scorer.prefill([5, 6, 7])
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    with pytest.raises(StalePrefixError, match="prefill again"):
        scorer.score(prefix, [[5]])


def test_models_that_are_refused():
    with pytest.raises(UnsupportedModelError, match="training mode"):
        PrefixScorer(tiny_model("llama").train())
    with pytest.raises(UnsupportedModelError, match="language-model head"):
        PrefixScorer(tiny_model("t5"))
    with pytest.raises(UnsupportedModelError, match=r"head|layers of kind|cache"):
        PrefixScorer(tiny_model("mamba"))
    model = tiny_model("llama")
    scorer = PrefixScorer(model, backend="split")
    model.train()
    with pytest.raises(UnsupportedModelError, match=r"model\.eval"):
        scorer.score([5], [[6]])
    with pytest.raises(ValueError, match="backend: expected"):
        PrefixScorer(tiny_model("llama"), backend="fast")
    with pytest.raises(ValueError, match="micro_batch: expected"):
        PrefixScorer(tiny_model("llama"), micro_batch=0)


def test_a_model_that_attends_otherwise_is_refused():
    model = tiny_model("llama")
    right = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda x, position_ids: right(
        x, position_ids - position_ids.min()
    )
    with pytest.raises(UnsupportedModelError, match="differ from ordinary"):
        PrefixScorer(model, backend="split")


def test_a_head_that_does_more_is_refused():
    model = tiny_model("llama")
    model.lm_head.register_forward_hook(lambda module, args, out: out * 2 + out.mean())
    right = model.forward
    model.forward = lambda *args, **kwargs: _shifted(right(*args, **kwargs))
    with pytest.raises(UnsupportedModelError, match="more than a linear layer"):
        PrefixScorer(model, backend="split")


def _shifted(output):
    output.logits = output.logits + torch.arange(output.logits.shape[-1])
    return output


def test_logits_that_are_not_finite_name_the_row():
    model = tiny_model("llama")
    scorer = PrefixScorer(model, backend="split")
    with torch.no_grad():
        model.model.embed_tokens.weight[95] = float("nan")
    with pytest.raises(FloatingPointError, match=r"continuations\[0\]: its logits are not finite"):
        scorer.score([5], [[6, 7]])


def test_length_dependent_rotary_angles_are_refused():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4,
            "original_max_position_embeddings": 32}  # fmt: skip
    scorer = PrefixScorer(tiny_model("llama", rope_parameters=rope), backend="split")
    assert len(scorer.score([5], [[6] * 20]).logprobs) == 1
    with pytest.raises(UnsupportedModelError, match=r"\(dynamic\) depend on the total length"):
        scorer.score([5], [[6] * 40])


def test_adapters():
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj", "v_proj"])
    ).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5, generator=torch.Generator().manual_seed(0))
    scorer = PrefixScorer(wrapped, backend="split")
    prefix = np.random.default_rng(1).integers(3, 90, 18)
    assert_scores(wrapped, scorer, prefix, make_rows(), None, 3e-5)
    held = scorer.prefill(prefix)
    with wrapped.disable_adapter():
        plain, _ = oracle(wrapped, prefix, make_rows()[0], 0)
        with pytest.raises(StalePrefixError, match="adapters"):
            scorer.score(held, make_rows())
    adapted = scorer.score(held, make_rows()).token_logprobs[0]
    assert (plain - adapted).abs().max() > 0.01
    head = peft.LoraConfig(target_modules=["q_proj", "lm_head"])
    with pytest.raises(UnsupportedModelError, match="head carries an adapter"):
        PrefixScorer(peft.get_peft_model(tiny_model("llama"), head).eval())
    virtual = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(UnsupportedModelError, match="virtual tokens"):
        PrefixScorer(peft.get_peft_model(tiny_model("llama"), virtual).eval())


def test_an_attention_that_leaves_out_the_cap_is_named(monkeypatch):
    from transformers.models.gemma2 import modeling_gemma2

    right = modeling_gemma2.eager_attention_forward

    def without(*args, **options):
        return right(*args, **{**options, "softcap": None})

    model = tiny_model("gemma2", **OVERRIDES["gemma2"])
    model.set_attn_implementation("eager")
    monkeypatch.setattr(modeling_gemma2, "eager_attention_forward", without)
    with pytest.raises(UnsupportedModelError, match=r"differ from ordinary ones.*please report"):
        PrefixScorer(model, backend="split")
    # as transformers 5.17 has it by default; later ones raise
    model.config._attn_implementation_internal = "sdpa"
    assert 'attn_implementation="eager"' in support.remedy(model)


def test_numbers_that_overflow_name_the_layer():
    model = tiny_model("llama")
    scorer = PrefixScorer(model, backend="split")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0] = float("inf")
    with pytest.raises(FloatingPointError, match=r"continuations\[0\].*from layer 1 on"):
        scorer.score([5, 7], [[6, 7, 8]])
