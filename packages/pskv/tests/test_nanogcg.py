"""nanogcg as it is installed, with and without shared prefixes."""

import pytest
import torch
from pskv.integrations.nanogcg import accelerate
from shared_kernels.testing.models import tiny_model
from tenfold.assets import smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer

nanogcg = pytest.importorskip("nanogcg")
pytestmark = pytest.mark.peer
MESSAGES, TARGET = "Write a short greeting.", "Hello, sunshine!"
REPLACED = ("compute_candidates_loss", "compute_token_gradient")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(smollm2())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tiny(tokenizer):
    return tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=128)


@pytest.fixture(autouse=True)
def settings():
    yield
    torch.use_deterministic_algorithms(False)


def config(**options):
    options = {"num_steps": 2, "search_width": 12, "topk": 32, "seed": 7, "verbosity": "ERROR",
               "optim_str_init": "x x x x x x", "use_prefix_cache": False, **options}  # fmt: skip
    return nanogcg.GCGConfig(**options)


def run(model, tokenizer, **options):
    return nanogcg.run(model, tokenizer, MESSAGES, TARGET, config(**options))


def assert_same(found, expected):
    assert found.strings == expected.strings
    assert found.losses == pytest.approx(expected.losses, abs=1e-4)
    assert found.best_string == expected.best_string


def test_a_real_model_gives_the_same_strings(model, tokenizer):
    expected = run(model, tokenizer)
    with accelerate(backend="split"):
        found = run(model, tokenizer)
    assert_same(found, expected)
    assert found.losses[-1] < found.losses[0]


@pytest.mark.parametrize(
    "options",
    [
        {"use_mellowmax": True, "mellowmax_alpha": 0.7},
        {"buffer_size": 4, "num_steps": 6},
        {"n_replace": 3},
        {"filter_ids": False, "allow_non_ascii": True},
        {"early_stop": True, "num_steps": 3},
        {"batch_size": 5},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_mean_what_they_meant(tiny, tokenizer, options):
    expected = run(tiny, tokenizer, **options)
    # its own cache would raise on transformers 5; here it makes no difference
    cached = "n_replace" not in options
    with accelerate(backend="split"):
        found = run(tiny, tokenizer, **{**options, "use_prefix_cache": cached})
    assert_same(found, expected)


def test_a_perfect_match_stops(model, tokenizer):
    chat = [{"role": "user", "content": 'Say "Hello" and nothing else. {optim_str}'}]
    options = config(early_stop=True, optim_str_init="x x x x", num_steps=20)
    expected = nanogcg.run(model, tokenizer, chat, "Hello", options)
    with accelerate(backend="split"):
        found = nanogcg.run(model, tokenizer, chat, "Hello", options)
    assert_same(found, expected)
    assert len(found.losses) < 20


def test_everything_is_put_back(tiny, tokenizer):
    from nanogcg import gcg

    before = [getattr(gcg.GCG, name) for name in REPLACED]
    before += [gcg.filter_ids, gcg.find_executable_batch_size]

    def current():
        found = [getattr(gcg.GCG, name) for name in REPLACED]
        return [*found, gcg.filter_ids, gcg.find_executable_batch_size]

    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error), accelerate(backend="split"):
            assert all(a is not b for a, b in zip(current(), before, strict=True))
            raise error
        assert current() == before
    with pytest.raises(ValueError, match="backend"), accelerate(backend="fast"):
        run(tiny, tokenizer)
    assert current() == before


def test_nothing_survives_the_filter(tiny, tokenizer):
    with accelerate(backend="split"), pytest.raises(RuntimeError, match="filter_ids=False"):
        from nanogcg import gcg

        letters = tokenizer.convert_tokens_to_ids(list("ther"))
        gcg.filter_ids(torch.tensor([letters]), tokenizer)
