"""A model of known lengths: its law, and predictors against what can be predicted at best."""

import pytest
import torch
from forelen.data import ControlConfig, ControlLM
from forelen.data.control import lengths_law
from forelen.dataset import LengthDataset
from forelen.fingerprint import model_fingerprint
from forelen.pooling import FeatureSpec
from forelen.reading import ModelReader, read_prompts
from forelen.store import Collected
from forelen.tap import tapped
from forelen.training import default_arguments, predict_rows, train


@pytest.fixture(scope="module")
def model():
    return ControlLM(ControlConfig(means=(4, 12, 40), longest=128, hidden_size=32))


def test_answers_follow_the_law(model):
    ids, classes = model.prompts(300, seed=1)
    torch.manual_seed(0)
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=128)
    ended = out[:, ids.shape[1] :] == 0
    lengths = ended.long().argmax(-1) + 1
    law = lengths_law(model.config)
    x = torch.arange(1, 129).double()
    for kind in range(3):
        mine = lengths[classes == kind].double()
        mean = float((law[kind] * x).sum())
        deviation = float((law[kind] * (x - mean) ** 2).sum()) ** 0.5
        assert abs(float(mean - mine.mean())) < 4 * deviation / len(mine) ** 0.5
        # the whole distribution, by Kolmogorov and Smirnov
        empirical = (mine[:, None] <= x).double().mean(0)
        assert float((empirical - law[kind].cumsum(-1)).abs().max()) < 1.63 / len(mine) ** 0.5


def test_entropies_of_the_law(model):
    import math

    ids, classes = model.prompts(3)
    hazard = torch.tensor([float(model.law()[kind, 0]) for kind in classes]).double()
    with torch.no_grad():
        p = model(ids).logits[:, -1].double().softmax(-1)
    torch.testing.assert_close(p[:, 0], hazard, rtol=1e-4, atol=1e-7)
    expected = -(hazard * hazard.log() + (1 - hazard) * ((1 - hazard) / 40).log())
    found = torch.special.entr(p).sum(-1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert float(found.max()) < math.log(41)


def sampled(model, count, siblings, seed, ages=(8, 24)):
    """Draw lengths from the law, and read states of prompts and of answers at some ages."""
    ids, classes = model.prompts(count, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    lengths = 1 + torch.multinomial(
        lengths_law(model.config)[classes], siblings, replacement=True, generator=generator
    )
    reader = ModelReader(model)
    prompts = read_prompts(reader, [FeatureSpec()], ids)
    filler = torch.randint(6, 46, (count, max(ages)), generator=generator)

    class Steps:
        def __init__(self):
            from forelen.streaming import StepFeatures

            self.steps = StepFeatures(count, 32, eos=[0], stops=[0], device=torch.device("cpu"))
            self.kept = {}

        def token(self, ids, states, logits):
            self.steps.update(ids, states[-1], logits)
            if self.steps.time in ages:
                self.kept[self.steps.time] = self.steps.features.clone()

    listener = Steps()
    with torch.no_grad(), reader.hooked() as states:
        whole = torch.cat([ids, filler], 1)
        logits = model(whole).logits
        hidden = states[-1]
        for age in range(1, max(ages) + 1):
            place = ids.shape[1] + age - 1
            listener.token(whole[:, place], {-1: hidden[:, place]}, logits[:, place])
    samples, times, steps = [], [], []
    for age in ages:
        alive = (lengths.flatten() > age).nonzero()[:, 0]
        samples.append(alive)
        times.append(torch.full_like(alive, age))
        steps.append(listener.kept[age][alive // siblings])
    header = {
        "model": model_fingerprint(model), "sampling": {}, "span": {}, "tokenizer": {},
        "features": [FeatureSpec().key], "num_samples": siblings,
    }  # fmt: skip
    found = Collected(
        header=header, prompts=prompts, hashes=torch.arange(count), families=[""] * count,
        scenarios=[""] * count, prompt_tokens=torch.full((count,), 12), lengths=lengths,
        censored=torch.zeros_like(lengths, dtype=torch.bool), step_sample=torch.cat(samples),
        step_time=torch.cat(times), steps=torch.cat(steps),
    )  # fmt: skip
    return found, classes


@pytest.mark.slow
def test_a_predictor_reaches_the_bayes_error(model, tmp_path):
    """The expected error of the predicted medians, under the true law, not of a sample."""
    found, _ = sampled(model, 1500, 4, 0)
    arguments = default_arguments(
        tmp_path,
        False,
        num_train_epochs=10,
        learning_rate=3e-3,
        disable_tqdm=True,
        logging_strategy="no",
    )
    predictor = train(found, output_dir=tmp_path, arguments=arguments, plp=True)
    test, classes = sampled(model, 400, 1, 1)
    rows = LengthDataset(test, predictor.config)
    for age in (0, 8, 24):
        chosen = (rows.time == age).nonzero()[:, 0]
        law = model.law(age)[classes[rows.group[chosen]]]
        x = torch.arange(1, law.shape[1] + 1).double()
        median = predict_rows(predictor, rows, chosen=chosen, time=age).median()
        error = (law * (x - median[:, None]).abs()).sum(-1).mean()
        floor = model.bayes_error(age)[classes[rows.group[chosen]]].mean()
        assert float(error) <= 1.05 * float(floor)
        # pinball at 0.9, likewise
        q = predict_rows(predictor, rows, chosen=chosen, time=age).quantile(0.9)
        best = (law.cumsum(-1) < 0.9).sum(-1) + 1.0

        def pinball(q, law=law, x=x):
            gap = x - q[:, None]
            return (law * torch.maximum(0.9 * gap, -0.1 * gap)).sum(-1).mean()

        assert float(pinball(q)) <= 1.05 * float(pinball(best))


def test_states_are_no_table(model):
    """What tells the class is spread over the dimensions, and noisy."""
    ids, classes = model.prompts(400, seed=2)
    found = read_prompts(ModelReader(model), [FeatureSpec("last")], ids)["last.-1.content"]
    correlation = torch.corrcoef(torch.cat([found.T, classes[None].float()]))[-1, :-1]
    assert float((correlation.abs() > 0.3).float().mean()) > 0.7
    assert len(found.unique(dim=0)) > 200


def test_watching_it(model):
    class Keep:
        times = 0

        def begin(self, options): ...
        def prompt(self, states, ids, attention, siblings, logits): ...
        def end(self, sequences): ...
        def token(self, ids, states, logits):
            self.times += 1

    listener = Keep()
    ids, _ = model.prompts(5)
    with tapped(ModelReader(model), listener):
        out = model.generate(ids, max_new_tokens=20)
    assert listener.times == out.shape[1] - ids.shape[1] - 1
