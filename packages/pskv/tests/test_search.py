"""Searches: the same steps whatever holds the prefix, filters, resuming, what is refused."""

import json
import warnings

import numpy as np
import pytest
import torch
from pskv import PrefixScorer
from pskv.bench import UncachedScorer
from pskv.search import (
    BeamConfig,
    BeamSearch,
    CoordinateSearch,
    GradientSampler,
    MomentumSampler,
    RandomSampler,
    SearchConfig,
    SearchPrompt,
)
from pskv.search.evaluate import Evaluation
from pskv.search.samplers import allowed_tokens
from shared_kernels.testing.models import tiny_model
from tenfold.assets import smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.filterwarnings("ignore:pskv.search is for")
MESSAGES, TARGET = "Write a short greeting.", "Hello, sunshine!"
INIT = "x x x x x x"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(smollm2())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def scorer(model, tokenizer):
    return PrefixScorer(model, tokenizer, backend="split")


@pytest.fixture(scope="module")
def tiny(tokenizer):
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=128)
    return PrefixScorer(model, tokenizer, backend="split")


def test_steps_are_the_same_without_a_cache(model, tokenizer):
    # benchmarks/trajectory.py takes fifty, wider ones
    config = SearchConfig(steps=4, width=8, topk=64, init=INIT)
    found = {}
    for name in ("none", "replicate", "split"):
        scorer = (
            UncachedScorer(model, tokenizer) if name == "none"
            else PrefixScorer(model, tokenizer, backend=name)
        )  # fmt: skip
        found[name] = CoordinateSearch(scorer, config).run(MESSAGES, TARGET, progress=False)
    none = found.pop("none")
    assert len(none.steps) == 4
    assert none.steps[-1].best_loss < none.losses[0] - 0.1
    for result in found.values():
        assert [step.ids for step in result.steps] == [step.ids for step in none.steps]
        np.testing.assert_allclose(result.losses, none.losses, rtol=0, atol=1e-4)
        assert result.evaluations == none.evaluations
        assert result.tokens < none.tokens / 2


class Recorder(GradientSampler):
    def __init__(self):
        super().__init__(topk=16)
        self.seen = []

    def propose(self, *args):
        self.seen.append(super().propose(*args))
        return self.seen[-1]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_kernel_takes_the_same_steps(tokenizer, device):
    if (device == "cuda") != torch.cuda.is_available():
        pytest.skip("kernels are compiled where there is a GPU, and interpreted elsewhere")
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=128)
    steps, width = (50, 64) if device == "cuda" else (6, 4)
    config = SearchConfig(steps=steps, width=width, init="x x x x")
    runs = []
    for backend in ("split", "fused"):
        model = model.to(device)
        scorer, sampler = PrefixScorer(model, tokenizer, backend=backend), Recorder()
        result = CoordinateSearch(scorer, config, sampler=sampler).run(
            "Hi", "Hello!", progress=False
        )
        runs.append((sampler.seen, result))
    for a, b in zip(runs[0][0], runs[1][0], strict=True):
        assert torch.equal(a, b)
    assert [s.ids for s in runs[0][1].steps] == [s.ids for s in runs[1][1].steps]
    np.testing.assert_allclose(runs[0][1].losses, runs[1][1].losses, rtol=0, atol=1e-4)


def test_what_is_found_can_be_typed(scorer, tokenizer):
    config = SearchConfig(steps=3, width=24, topk=64, init=INIT)
    result = CoordinateSearch(scorer, config).run(MESSAGES, TARGET, progress=False)
    prompt = SearchPrompt.render(tokenizer, MESSAGES, TARGET)
    text = prompt.texts[0] + result.text + prompt.texts[1]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == [*prompt.before.tolist(), *result.ids, *prompt.after.tolist()]
    # and it has the loss that is said
    whole = torch.tensor([[*ids, *prompt.target.tolist()]])
    with torch.no_grad():
        logits = scorer.model(whole).logits[0, -len(prompt.target) - 1 : -1]
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(prompt.target))
    assert result.loss == pytest.approx(float(loss), abs=1e-4)
    assert result.evaluations + result.dropped == 1 + 3 * 24
    assert result.steps[-1].best_nll == pytest.approx(result.loss * len(prompt.target), rel=1e-6)


def test_a_search_stops_when_the_target_is_said(scorer, tokenizer):
    # asked to repeat it, the model nearly does
    chat = [{"role": "user", "content": 'Say "Hello" and nothing else. {optim_str}'}]
    config = SearchConfig(steps=25, width=12, topk=32, init="x x x x", early_stop=True)
    result = CoordinateSearch(scorer, config).run(chat, "Hello", progress=False)
    assert result.elicited_at is not None
    prompt = SearchPrompt.render(tokenizer, chat, "Hello")
    row = [*prompt.before.tolist(), *result.elicited_ids, *prompt.after.tolist()]
    made = scorer.model.generate(
        torch.tensor([row]), attention_mask=torch.ones(1, len(row), dtype=torch.int64),
        max_new_tokens=len(prompt.target), do_sample=False,
    )  # fmt: skip
    assert made[0, len(row) :].tolist() == prompt.target.tolist()
    assert result.elicited_at <= result.evaluations


def test_all_tokens_must_be_what_greedy_decoding_gives(tiny):
    before, after = np.arange(5, 12), np.arange(20, 23)
    candidate = torch.tensor([[30, 31, 32]])
    row = torch.cat([torch.from_numpy(before), candidate[0], torch.from_numpy(after)])[None]
    said = tiny.model.generate(
        row, attention_mask=torch.ones_like(row), max_new_tokens=3, do_sample=False
    )[0, row.shape[1] :].numpy()
    for target, expected in ((said, True), (np.append(said[:2], said[2] - 1), False)):
        prompt = SearchPrompt(before, after, target, ("", ""))
        for limit in (None, 1e9):
            evaluation = Evaluation(tiny, prompt, max_perplexity=limit)
            assert evaluation.losses(candidate).greedy.tolist() == [expected]
            assert (evaluation.elicited is not None) == expected


def test_stopping_and_going_on(tiny, tmp_path):
    path = tmp_path / "search.json"
    config = SearchConfig(steps=14, width=6, topk=32, init=INIT, sampler="momentum", buffer_size=3)
    whole = CoordinateSearch(tiny, config).run(MESSAGES, TARGET, progress=False)

    class Killed(Exception):
        pass

    def kill(step):
        if step.evaluations > 60:
            raise Killed

    with pytest.raises(Killed):
        CoordinateSearch(tiny, config).run(
            MESSAGES, TARGET, checkpoint=path, on_step=kill, progress=False
        )
    assert 10 <= len(json.loads(path.read_text())["steps"]) < 14
    again = CoordinateSearch(tiny, config).run(MESSAGES, TARGET, checkpoint=path, progress=False)
    assert [step.ids for step in again.steps] == [step.ids for step in whole.steps]
    assert again.evaluations == whole.evaluations and again.tokens == whole.tokens
    with pytest.raises(ValueError, match=r"checkpoint: .* is of another prompt"):
        CoordinateSearch(tiny, config).run(MESSAGES, "Goodbye", checkpoint=path, progress=False)


def test_perplexity_filter(scorer):
    config = SearchConfig(steps=2, width=16, topk=64, init="hello my friend", max_perplexity=1e4)
    result = CoordinateSearch(scorer, config).run(MESSAGES, TARGET, progress=False)
    prompt = SearchPrompt.render(scorer.tokenizer, MESSAGES, TARGET)
    row = torch.tensor([[*prompt.before.tolist(), *result.ids]])
    with torch.no_grad():
        logits = scorer.model(row).logits[0, len(prompt.before) - 1 : -1]
    nll = torch.nn.functional.cross_entropy(logits, torch.tensor(result.ids))
    assert float(nll.exp()) <= 1e4
    free = SearchConfig(steps=2, width=16, topk=64, init="hello my friend")
    assert result.dropped > CoordinateSearch(scorer, free).run(
        MESSAGES, TARGET, progress=False
    ).dropped  # fmt: skip


def test_mellowmax(tiny):
    config = SearchConfig(steps=2, width=8, topk=32, init=INIT, objective="mellowmax")
    result = CoordinateSearch(tiny, config).run(MESSAGES, TARGET, progress=False)
    prompt = SearchPrompt.render(tiny.tokenizer, MESSAGES, TARGET)
    row = torch.tensor([[*prompt.before.tolist(), *result.ids, *prompt.after, *prompt.target]])
    with torch.no_grad():
        logits = tiny.model(row).logits[0, -len(prompt.target) - 1 : -1]
    chosen = -logits[range(len(prompt.target)), prompt.target]
    expected = chosen.logsumexp(0) - np.log(len(prompt.target))
    assert result.loss == pytest.approx(float(expected), abs=2e-4)


def test_beams(tiny):
    config = BeamConfig(length=4, beams=4, expansions=3, seed=1)
    result = BeamSearch(tiny, config).run(MESSAGES, TARGET, progress=False)
    assert [len(step.ids) for step in result.steps] == [1, 2, 3, 4]
    assert result.evaluations == 12 + 3 * 12
    assert result.loss == min(result.losses)
    again = BeamSearch(tiny, config).run(MESSAGES, TARGET, progress=False)
    assert again.ids == result.ids
    filtered = BeamSearch(tiny, BeamConfig(length=2, beams=3, expansions=3, filter=True))
    assert filtered.run(MESSAGES, TARGET, progress=False).text


# -- samplers ------------------------------------------------------------------------------------


def test_samplers_change_what_they_should():
    generator = torch.Generator().manual_seed(0)
    parent = torch.arange(10, 15)
    gradient = torch.randn(5, 50, generator=generator)
    allowed = torch.ones(50, dtype=torch.bool)
    allowed[:10] = False
    for sampler in (GradientSampler(4, 2), MomentumSampler(4, 2), RandomSampler(2)):
        made = sampler.propose(parent, gradient, allowed, 200, generator)
        assert made.shape == (200, 5)
        assert (made != parent).sum(1).max() <= 2
        assert made.min() >= 10
    best = (-gradient).masked_fill(~allowed, -torch.inf).topk(4, 1).indices
    made = GradientSampler(4, 1).propose(parent, gradient, allowed, 400, generator)
    for place in range(5):
        assert set(made[:, place].tolist()) <= {int(parent[place]), *best[place].tolist()}


def test_momentum_averages():
    sampler = MomentumSampler(momentum=0.25)
    allowed, generator = torch.ones(6, dtype=torch.bool), torch.Generator()
    first, second = torch.randn(2, 3, 6)
    for gradient in (first, second):
        sampler.propose(torch.zeros(3, dtype=torch.int64), gradient, allowed, 2, generator)
    torch.testing.assert_close(sampler.average, 0.25 * first + 0.75 * second)


def test_tokens_that_may_be_chosen(tokenizer):
    allowed = allowed_tokens(tokenizer, 49152, non_ascii=False)
    assert not allowed[tokenizer.all_special_ids].any()
    assert allowed[tokenizer("hello")["input_ids"]].all()
    assert not allowed[tokenizer("é", add_special_tokens=False)["input_ids"]].any()
    assert allowed_tokens(tokenizer, 49152, non_ascii=True).sum() > allowed.sum()


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"steps": 0}, "steps: expected"),
        ({"topk": 0}, "topk: expected"),
        ({"sampler": "best"}, "sampler: expected"),
        ({"objective": "loss"}, "objective: expected"),
        ({"momentum": 1.0}, "momentum: expected a number in"),
        ({"max_perplexity": 0.5}, "max_perplexity: expected"),
        ({"mellowmax_alpha": 0.0}, "mellowmax_alpha: expected"),
        ({"init": ""}, "init: expected"),
        ({"buffer_size": -1}, "buffer_size: expected"),
    ],
)
def test_bad_settings(options, match):
    with pytest.raises(ValueError, match=match):
        SearchConfig(**options)


@pytest.mark.parametrize("options", [{"length": 0}, {"temperature": 0.0}, {"max_perplexity": 0.0}])
def test_bad_beam_settings(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}: expected"):
        BeamConfig(**options)


def test_bad_prompts(tiny, tokenizer):
    search = CoordinateSearch(tiny, SearchConfig(steps=1, width=2, init="x x"))
    with pytest.raises(ValueError, match="target: expected some text"):
        search.run(MESSAGES, "")
    with pytest.raises(ValueError, match="once in the rendered prompt, got it 2 times"):
        search.run("{optim_str} and {optim_str}", TARGET)
    with pytest.raises(ValueError, match="messages: expected at least one"):
        search.run([], TARGET)
    # spaces join the one that the message ends in
    spaces = CoordinateSearch(tiny, SearchConfig(steps=1, width=2, init="  "))
    with pytest.raises(ValueError, match="init: expected a text whose tokens stay the same"):
        spaces.run("Hi ", TARGET)
    bare = PrefixScorer(tiny.model, backend="split")
    with pytest.raises(ValueError, match="tokenizer: texts need one"):
        CoordinateSearch(bare).run(MESSAGES, TARGET)


def test_the_notice_comes_once(tiny, monkeypatch):
    from pskv.search import evaluate

    monkeypatch.setattr(evaluate, "_noticed", False)
    search = BeamSearch(tiny, BeamConfig(length=1, beams=1, expansions=1))
    with pytest.warns(UserWarning, match="models you own"):
        search.run(MESSAGES, TARGET, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search.run(MESSAGES, TARGET, progress=False)


def test_saving(tiny, tmp_path):
    search = BeamSearch(tiny, BeamConfig(length=1, beams=1, expansions=1))
    result = search.run(MESSAGES, TARGET, progress=False)
    result.save(tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text()) == result.to_dict()
