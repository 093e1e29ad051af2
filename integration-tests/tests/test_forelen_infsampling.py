"""forelen tells infsampling how long samples will be: by shape alone, and no token changes."""

import contextlib
import io
import logging
import warnings
from pathlib import Path

import numpy as np
import pytest
import tenfold
import torch
from forelen import FeatureCollector, LengthDistribution, SampledLengths
from forelen.dataset import LengthDataset
from forelen.store import FeatureStore
from forelen.streaming import StepFeatures
from forelen.training import default_arguments, predict_rows, train
from infsampling import InfiniteSampler, ProgressivePredictor, SamplingConfig, simulate
from infsampling.scheduling.bounds import preemptive_bound
from shared_kernels.testing.models import tiny_model

STORE = Path(tenfold.__file__).parent / "data" / "forelen-mini"
PROMPTS = [[11, 12, 13, 14, 15], [40, 41], [60, 61, 62]]
COUNTS = [9, 14, 7]


class Words:
    """A tokenizer without a template: words are numbers."""

    chat_template = None

    def __call__(self, text):
        return {"input_ids": [*map(int, text.split())]}

    def get_vocab(self):
        return {str(number): number for number in range(96)}


def trained(found, folder, **settings):
    arguments = default_arguments(
        folder, False, num_train_epochs=settings.pop("epochs"), disable_tqdm=True, use_cpu=True,
        logging_strategy="no", weight_decay=0.1,
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return train(found, output_dir=folder, arguments=arguments, **settings)


@pytest.fixture(scope="module")
def model():
    found = tiny_model("llama").eval()
    # answers of some ten tokens, some much longer
    found.generation_config.eos_token_id = list(range(2, 9))
    return found


@pytest.fixture(scope="module")
def collected(model, tmp_path_factory):
    """What the model answered to other prompts, and its states meanwhile."""
    draws = np.random.default_rng(0).integers(10, 96, (60, 5))
    collector = FeatureCollector(
        model, Words(), tmp_path_factory.mktemp("store"), num_samples=4, batch_size=60,
        max_new_tokens=40, temperature=1.0, top_p=1.0, top_k=0,
    )  # fmt: skip
    texts = [" ".join(map(str, row)) for row in draws.tolist()]
    return collector.collect(texts, progress=False).load()


@pytest.fixture(scope="module")
def predictor(collected, tmp_path_factory):
    """Trained on it, to look at growing answers too."""
    return trained(collected, tmp_path_factory.mktemp("train"), plp=True, epochs=3)


def sampled(model, predictor, **changes):
    settings = SamplingConfig(
        **{"max_slots": 8, "max_new_tokens": 40, "seed": 3, "sync_every": 2, "rerank_every": 4}
        | changes
    )
    return InfiniteSampler(model, settings, length_predictor=predictor).generate(PROMPTS, COUNTS)


@pytest.fixture(scope="module")
def plain(model):
    return sampled(model, None, policy="fifo")


@pytest.mark.parametrize("policy", ["lpt", "lrpt"])
def test_samples_are_the_same(model, predictor, plain, policy, caplog):
    lengths = SampledLengths(predictor, model, probe_tokens=2)
    assert isinstance(lengths, ProgressivePredictor)
    with caplog.at_level(logging.WARNING):
        found = sampled(model, lengths, policy=policy)
    assert not caplog.records
    assert found.stats.swaps > 0
    assert found.completion_ids == plain.completion_ids
    assert found.logprobs == plain.logprobs
    told = lengths.remaining()
    assert told.shape == (30,)
    assert np.isfinite(told).all()


def test_what_it_reads_is_what_it_was_trained_on(model, predictor):
    """The features of every sample, through swaps, against a pass over its whole text."""
    lengths = SampledLengths(predictor, model)
    found = sampled(model, lengths, policy="lrpt")
    for row, tokens in enumerate(found.completion_ids):
        ids = PROMPTS[found.prompt_index[row]]
        read = len(tokens) - 1
        assert int(lengths._counts[row]) == read
        if not read:
            continue
        with torch.no_grad():
            out = model(torch.tensor([ids + tokens]), output_hidden_states=True)
        steps = StepFeatures(
            1, 32, eos=lengths.eos, stops=[], device=torch.device("cpu")
        )  # fmt: skip
        for place in range(len(ids), len(ids) + read):
            steps.update(torch.tensor([9]), out.hidden_states[-1][:, place], out.logits[:, place])
        torch.testing.assert_close(lengths._features[row], steps.features[0], rtol=0, atol=1e-4)


def test_a_predictor_of_another_model_is_refused(predictor):
    with pytest.raises(ValueError, match="architecture"):
        SampledLengths(predictor, tiny_model("gpt2"))


# --- real lengths --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Trained on answers of SmolLM2-135M-Instruct, and the prompts it was not trained on."""
    found = FeatureStore(STORE).load()
    made = trained(found.split("train"), tmp_path_factory.mktemp("real"), epochs=4, dropout=0.3)
    return made, found.split("test")


def test_fewer_steps_on_real_lengths(real):
    """Eight prompts with eight answers each, on half as many slots, in a simulation.

    By an upper quantile of what is left of each answer, given the prompt and its age: at
    temperature 1 the longest expected first is no better than no order, since what was thought
    short and is long begins last.
    """
    made, test = real
    siblings, cap = test.lengths.shape[1], test.header["sampling"]["max_new_tokens"]
    rows = LengthDataset(test, made.config)
    first = predict_rows(made, rows, chosen=torch.arange(len(test)) * siblings).pmf
    ages = range(0, cap, 16)
    left = torch.stack([
        LengthDistribution(
            made.bins.remaining(first, torch.full((len(first),), age)), made.bins
        ).quantile(0.999).clamp(max=cap - age)
        for age in ages
    ], 1).numpy()  # fmt: skip
    over = {name: [] for name in ("fifo", "lrpt", "true lengths")}
    for low in range(0, len(test) - 7, 8):
        lengths = test.lengths[low : low + 8].flatten().numpy() - 1
        table = left[np.arange(low, low + 8).repeat(siblings)]

        def remaining(row, done, table=table):
            return float(table[row, done // 16]) - done % 16

        for name, policy, believed, rest in (
            ("fifo", "fifo", None, None), ("lrpt", "lrpt", table[:, 0], remaining),
            ("true lengths", "lrpt", None, None),
        ):  # fmt: skip
            result = simulate(lengths, len(lengths) // 2, policy, believed, remaining=rest)
            over[name].append(result.steps / preemptive_bound(lengths, len(lengths) // 2))
    mean = {name: float(np.mean(values)) for name, values in over.items()}
    print(mean)
    assert 1 <= mean["true lengths"] < mean["lrpt"] < 0.95 * mean["fifo"]


@pytest.mark.slow
def test_smollm2(real, caplog):
    from forelen.collect import encode
    from tenfold.assets import smollm2
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    live = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval()
    texts = ("Name a river.", "Say hello.", "What is 7 plus 5?")
    prompts = [encode(tokenizer, text) for text in texts]
    settings = SamplingConfig(
        max_slots=8, max_new_tokens=48, sync_every=4, rerank_every=8, eos_token_id=(2,),
        temperature=0.7,
    )  # fmt: skip

    def run(policy, predictor=None):
        sampler = InfiniteSampler(live, settings.replace(policy=policy), length_predictor=predictor)
        return sampler.generate(prompts, 6)

    found = run("fifo")
    for policy in ("lpt", "lrpt"):
        guided = run(policy, SampledLengths(real[0], live, probe_tokens=2))
        assert guided.completion_ids == found.completion_ids
        assert guided.logprobs == found.logprobs
        assert guided.stats.swaps > 0
        stats = guided.stats
        print(policy, stats.decode_steps, stats.lower_bound, found.stats.decode_steps)
    assert not [record for record in caplog.records if "failed" in record.message]
