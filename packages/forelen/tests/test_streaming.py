"""Watching ``generate``: the same tokens, the states of a full pass, and counted lengths."""

import pytest
import torch
from forelen import (
    FingerprintError,
    LengthPredictor,
    LengthPredictorConfig,
    UnsupportedGenerationError,
)
from forelen.fingerprint import model_fingerprint, sampling_of
from forelen.pooling import entropy_pool
from forelen.reading import ModelReader, read_prompts
from forelen.streaming import StepFeatures
from forelen.tap import tapped
from shared_kernels.testing.models import tiny_model


def predictor_for(model, **options):
    torch.manual_seed(0)
    settings = {"plp": True, "fingerprint": model_fingerprint(model)} | options
    predictor = LengthPredictor(LengthPredictorConfig(hidden_size=32, **settings)).eval()
    if predictor.two_heads:
        torch.nn.init.normal_(predictor.step_out.weight, std=0.3)
    predictor.input_scale.uniform_(0.5, 2.0)
    predictor.input_mean.normal_()
    return predictor


def prompts(rows=3, length=6, pad_left=0):
    ids = torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    for row in range(rows):
        hidden = min(row * pad_left, length - 1)
        ids[row, :hidden], mask[row, :hidden] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


WAYS = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.9},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "in chunks": {"do_sample": False, "prefill_chunk_size": 2},
    "no cache": {"do_sample": False, "use_cache": False},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("pad_left", [0, 2])
def test_the_same_tokens(sharpened, way, pad_left):
    model = sharpened(tiny_model("llama"), 6.0)
    inputs = prompts(pad_left=pad_left)
    options = {"max_new_tokens": 12, **WAYS[way]}
    torch.manual_seed(5)
    plain = model.generate(**inputs, **options)
    predictor = predictor_for(model)
    torch.manual_seed(5)
    with predictor.watch(model, keep_history=True) as stream:
        watched = model.generate(**inputs, **options)
    assert torch.equal(plain, watched)
    assert "generate" not in vars(model)
    assert not model._forward_hooks
    answers = plain[:, inputs["input_ids"].shape[1] :]
    ends = torch.where(answers == 2, torch.arange(answers.shape[1]), answers.shape[1])
    lengths = (ends.amin(-1) + 1).clamp(max=answers.shape[1])
    assert stream.lengths.tolist() == lengths.tolist()
    assert (stream.remaining.quantile(0.01) >= 1).all()
    assert all((found.mean() >= 1).all() for _, found in stream.history)
    assert [time for time, _ in stream.history] == list(range(stream.time + 1))
    static = predictor.predict(model, inputs, **options)
    siblings = WAYS[way].get("num_return_sequences", 1)
    expected = static.pmf.repeat_interleave(siblings, 0)
    torch.testing.assert_close(stream.initial.pmf, expected, rtol=0, atol=1e-5)


class Keep:
    """Keeps what it hears."""

    def __init__(self):
        self.tokens = []

    def begin(self, options):
        self.options = options

    def prompt(self, states, ids, attention, siblings, logits):
        self.states, self.siblings = states, siblings

    def token(self, ids, states, logits):
        self.tokens.append((ids, states, logits))

    def end(self, sequences):
        self.sequences = sequences


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "mistral", "mamba"])
def test_states_are_those_of_a_pass_over_all(sharpened, name):
    model = sharpened(tiny_model(name), 3.0)
    inputs = prompts(rows=2)
    listener, reader = Keep(), ModelReader(model, [1, 2])
    with tapped(reader, listener):
        model.generate(**inputs, max_new_tokens=7, do_sample=False, eos_token_id=None)
    whole = listener.sequences[:, :-1]
    with torch.no_grad():
        out = model(whole, output_hidden_states=True)
    assert len(listener.tokens) == 6
    # those of mamba are counted otherwise
    for layer in (-1,) if name == "mamba" else (1, 2, -1):
        got = [listener.states[layer], *(s[layer][:, None] for _, s, _ in listener.tokens)]
        torch.testing.assert_close(torch.cat(got, 1), out.hidden_states[layer], rtol=0, atol=2e-5)
    for t, (ids, _, logits) in enumerate(listener.tokens, 1):
        assert torch.equal(ids, whole[:, 5 + t])
        torch.testing.assert_close(logits, out.logits[:, 5 + t], rtol=0, atol=1e-4)


def test_steps_are_the_pool_of_the_states():
    generator = torch.Generator().manual_seed(0)
    rows, width, vocabulary = 4, 6, 20
    steps = StepFeatures(rows, width, eos=[2, 3], stops=[2, 3, 0], device=torch.device("cpu"))
    ids = torch.full((5, rows), 9)
    ids[2, 1], ids[3:, 1], ids[3, 2], ids[4, 2] = 2, 0, 0, 9
    hidden = torch.randn(5, rows, width, generator=generator)
    logits = 3 * torch.randn(5, rows, vocabulary, generator=generator)
    for t in range(5):
        steps.update(ids[t], hidden[t], logits[t])
    logprobs = logits.double().log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    for row, count in enumerate((5, 2, 3, 5)):
        pooled = entropy_pool(hidden[None, :count, row].double(), entropy[None, :count, row])[0]
        average = float(entropy[0, row])
        for t in range(1, count):
            average = 0.9 * average + 0.1 * float(entropy[t, row])
        last = count - 1
        numbers = torch.tensor([
            float(torch.tensor(count).log1p()), float(entropy[last, row]), average,
            float(logprobs[last, row, [2, 3]].logsumexp(0)),
        ]).double()  # fmt: skip
        expected = torch.cat([pooled, hidden[last, row].double(), numbers])
        torch.testing.assert_close(steps.features[row].double(), expected, rtol=0, atol=1e-5)
    assert steps.counts.tolist() == [5, 2, 3, 5]
    assert steps.active.tolist() == [True, False, False, True]
    assert steps.complete.tolist() == [False, True, False, False]


def test_the_split_head_is_the_head(llama):
    for options in (
        {}, {"pooling": "entropy+last"}, {"plp": False, "head": "linear"}, {"head": "paper"},
    ):  # fmt: skip
        predictor = predictor_for(llama, **options)
        prompt, seen = torch.randn(5, predictor.prompt_size), torch.tensor([0, 1, 7, 300, 6000])
        folded = predictor.folded(torch.device("cpu"))
        inner = folded.prompt(prompt)
        expected = predictor(prompt).logits.softmax(-1)
        torch.testing.assert_close(folded.output(inner), expected, rtol=0, atol=1e-6)
        if not predictor.config.plp:
            continue
        step = torch.randn(5, predictor.step_size)
        expected = predictor(prompt, step, seen).logits.softmax(-1)
        if folded.step is None:
            found = folded.output(inner + step @ folded.head.weight.T)
        else:
            second = folded._replace(head=folded.step)
            left = predictor.bins.remaining(folded.output(inner), seen)
            found = second.output(folded.step_bias + step @ folded.step.weight.T) * left
            found /= found.sum(-1, keepdim=True)
            found[0] = folded.output(inner)[0]
        # in float32; each of the two is up to 2.4e-6 from the same in float64
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("head", ["forelen", "paper"])
def test_a_stream_predicts_what_a_data_set_row_does(sharpened, head):
    """Step by step, ended rows too, against the predictor called on the features."""
    torch.manual_seed(1)
    model = sharpened(tiny_model("llama"), 2.0)
    predictor = predictor_for(model, head=head)
    inputs, found = prompts(), []
    with predictor.watch(model) as stream:

        def keep(seen):
            if seen.time:
                steps = seen._steps
                found.append((seen.remaining.pmf, steps.features.clone(), steps.counts.clone()))

        stream.on_update(keep)
        ends = list(range(2, 20))
        model.generate(**inputs, max_new_tokens=24, do_sample=True, eos_token_id=ends)
    reader, spec = ModelReader(model), predictor.config.feature_spec()
    before = read_prompts(
        reader, [spec], inputs["input_ids"], inputs["attention_mask"], predictor.config.chat_span()
    )[spec.key]
    # some rows end while others go on
    assert len(found[-1][2].unique()) > 1
    for pmf, features, counts in found:
        logits = predictor(before, features, counts).logits
        live = counts > 0
        expected = logits.double().softmax(-1)
        torch.testing.assert_close(pmf[live], expected[live], rtol=0, atol=1e-5)


def test_stride_and_callbacks(llama):
    predictor = predictor_for(llama)
    seen = []
    with predictor.watch(llama, stride=4, keep_history=True) as stream:
        stream.on_update(lambda s: seen.append((s.time, float(s.remaining.mean()[0]))))
        llama.generate(**prompts(), max_new_tokens=12, do_sample=False, eos_token_id=None)
        first = stream.remaining.pmf
        assert [time for time, _ in seen] == [0, 4, 8]
        assert seen[0][1] != seen[1][1]
        llama.generate(**prompts(rows=2), max_new_tokens=3, do_sample=False, eos_token_id=None)
        assert stream.time == 2
        assert len(stream.initial) == 2
    assert len(first) == 3


def test_without_plp_what_remains_follows_from_the_first_prediction(llama):
    predictor = predictor_for(llama, plp=False)
    with predictor.watch(llama) as stream:
        llama.generate(**prompts(), max_new_tokens=9, do_sample=False, eos_token_id=None)
    seen = stream.tokens
    assert seen.tolist() == [8, 8, 8]
    torch.testing.assert_close(
        stream.remaining.mean(), stream.initial.remaining(seen), rtol=1e-3, atol=1e-3
    )


def test_before_anything_is_known(llama):
    with predictor_for(llama).watch(llama) as stream, pytest.raises(RuntimeError, match="generate"):
        _ = stream.initial


def test_embeddings_as_prompts(llama):
    inputs = prompts(rows=2)
    embeddings = llama.get_input_embeddings()(inputs["input_ids"])
    with predictor_for(llama).watch(llama) as stream:
        llama.generate(
            inputs_embeds=embeddings, attention_mask=inputs["attention_mask"], max_new_tokens=4,
            do_sample=False,
        )  # fmt: skip
    expected = predictor_for(llama).predict(llama, inputs)
    torch.testing.assert_close(stream.initial.pmf, expected.pmf, rtol=0, atol=1e-5)


def test_adapters(sharpened):
    """A PEFT model, whose generate calls that of the model inside."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(sharpened(tiny_model("llama"), 6.0), config).eval()
    inputs = prompts()
    plain = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    predictor = predictor_for(model)
    with predictor.watch(model) as stream:
        watched = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert torch.equal(plain, watched)
    assert stream.time >= 1
    static = predictor.predict(model, inputs, max_new_tokens=6)
    torch.testing.assert_close(stream.initial.pmf, static.pmf, rtol=0, atol=1e-5)
    with pytest.raises(FingerprintError, match="weights"):
        predictor_for(tiny_model("llama")).predict(model, inputs)


def test_what_cannot_be_followed(llama):
    predictor = predictor_for(llama)
    inputs = prompts()
    past = llama(inputs["input_ids"][:, :4], use_cache=True).past_key_values
    cases = {
        "beam_search": {"num_beams": 2},
        "assisted_generation": {"prompt_lookup_num_tokens": 2},
        "past_key_values": {"past_key_values": past},
        "paged": {"cache_implementation": "paged"},
    }
    for match, options in cases.items():
        with predictor.watch(llama), pytest.raises(UnsupportedGenerationError, match=match):
            llama.generate(**inputs, max_new_tokens=4, **options)
    assisted = {"assistant_model": tiny_model("llama")}
    with predictor.watch(llama), pytest.raises(UnsupportedGenerationError, match="assisted"):
        llama.generate(**inputs, max_new_tokens=4, **assisted)
    with predictor.watch(llama), pytest.raises(UnsupportedGenerationError, match="a prompt"):
        llama.generate(max_new_tokens=4)
    with (
        predictor.watch(llama),
        pytest.raises(UnsupportedGenerationError, match="replaced already"),
        predictor.watch(llama),
    ):
        pass
    assert "generate" not in vars(llama)


@pytest.mark.gpu
def test_compiled_steps_are_refused_on_a_gpu(cuda, sharpened):
    model = sharpened(tiny_model("llama")).to(cuda)
    inputs = {name: value.to(cuda) for name, value in prompts().items()}
    options = {"cache_implementation": "static", "max_new_tokens": 4, "do_sample": False}
    with predictor_for(model).watch(model) as stream:
        with pytest.raises(UnsupportedGenerationError, match="disable_compile"):
            model.generate(**inputs, **options)
        model.generate(**inputs, **options, disable_compile=True)
    assert stream.lengths.shape == (3,)


@pytest.mark.gpu
def test_watching_on_a_gpu(cuda, sharpened):
    model = sharpened(tiny_model("llama"), 6.0)
    inputs = prompts(pad_left=2)
    predictor = predictor_for(model)
    with predictor.watch(model) as cpu:
        model.generate(**inputs, max_new_tokens=10, do_sample=False)
    model = model.to(cuda)
    with predictor.watch(model) as gpu:
        model.generate(
            **{k: v.to(cuda) for k, v in inputs.items()}, max_new_tokens=10, do_sample=False
        )
    assert gpu.lengths.tolist() == cpu.lengths.tolist()
    torch.testing.assert_close(gpu.initial.pmf.cpu(), cpu.initial.pmf, rtol=0, atol=1e-4)
    torch.testing.assert_close(gpu.remaining.pmf.cpu(), cpu.remaining.pmf, rtol=0, atol=1e-4)


def test_another_model(llama):
    predictor = predictor_for(llama)
    other = tiny_model("qwen3")
    with pytest.raises(FingerprintError, match=r"architecture 'LlamaForCausalLM'.*Qwen3"):
        predictor.predict(other, prompts())
    with pytest.raises(FingerprintError), predictor.watch(other):
        pass


def test_other_sampling_is_not_calibrated(llama):
    sampling = sampling_of(llama, {"do_sample": True, "max_new_tokens": 10})
    part = {"levels": [0.2, 0.7], "weights": [1.0, 1.0], "prompts": 2}
    predictor = predictor_for(llama, sampling=sampling, calibration={"0": part})
    same = predictor.predict(llama, prompts(), do_sample=True, max_new_tokens=10)
    assert same.calibrated
    with pytest.warns(UserWarning, match="temperature 1.0 -> 0.5"):
        found = predictor.predict(
            llama, prompts(), do_sample=True, temperature=0.5, max_new_tokens=10
        )
    assert not found.calibrated
    with pytest.warns(UserWarning, match="may have 20 tokens"):
        found = predictor.predict(llama, prompts(), do_sample=True, max_new_tokens=20)
    assert found.calibrated


def test_prompts_that_say_nothing(sharpened):
    # a head of its own: what is no number in the embeddings stays out of it
    llama = sharpened(tiny_model("llama", tie_word_embeddings=False))
    predictor = predictor_for(llama)
    predictor.marginal.copy_(torch.arange(1.0, len(predictor.bins) + 1).softmax(-1))
    inputs = prompts()
    inputs["attention_mask"][1] = 0
    found = predictor.predict(llama, inputs)
    assert found.fallback.tolist() == [False, True, False]
    torch.testing.assert_close(found.pmf[1].float(), predictor.marginal)
    alone = predictor.predict(llama, {k: v[:1] for k, v in inputs.items()})
    torch.testing.assert_close(found.pmf[0], alone.pmf[0], rtol=0, atol=1e-6)
    none = predictor.predict(llama, torch.zeros(2, 0, dtype=torch.int64))
    assert none.fallback.all()
    one = predictor.predict(llama, torch.tensor([[5]]))
    assert not one.fallback.any()
    with torch.no_grad():
        llama.get_input_embeddings().weight[7] = float("nan")
    ids = prompts()["input_ids"]
    ids[ids == 7] = 8
    ids[2, 3] = 7
    found = predictor.predict(llama, ids)
    assert found.fallback.tolist() == [False, False, True]
    with predictor.watch(llama) as stream:
        llama.generate(ids, max_new_tokens=3, do_sample=False)
    assert stream.initial.fallback.tolist() == [False, False, True]
    assert stream.remaining.mean().isfinite().all()
