"""The word polarity task: real labels, no relatives across the split, nothing random."""

import pytest
from tenfold.tasks import polarity


@pytest.fixture(scope="module")
def data() -> polarity.Split:
    return polarity.load()


def words(examples) -> list[str]:
    return [example.word for example in examples]


def test_split_is_balanced_and_large_enough(data):
    for part in (data.train, data.dev):
        assert len(part) >= 200
        assert [example.label for example in part] == [0, 1] * (len(part) // 2)


def test_split_does_not_change(data):
    assert polarity.load() == data
    assert words(data.dev[:4]) == ["deceit", "soothe", "angers", "fortunate"]


def test_no_word_has_a_relative(data):
    # Words of one class that begin alike are forms of one word: joyful, joyfully.
    for label in (0, 1):
        stems = [e.word[:4] for e in data.train + data.dev if e.label == label]
        assert len(set(stems)) == len(stems)


def test_no_word_is_in_both_parts(data):
    assert not set(words(data.train)) & set(words(data.dev))


def test_labels_are_those_of_the_lexicons(data):
    afinn, vader = polarity.lexicon_scores()
    for example in data.train + data.dev:
        sign = 1 if example.label else -1
        assert afinn[example.word] * sign >= 2
        assert vader[example.word] * sign >= 1


def test_a_word_the_lexicons_disagree_on_is_refused(monkeypatch):
    afinn, vader = polarity.lexicon_scores()
    monkeypatch.setattr(polarity, "lexicon_scores", lambda: (afinn, vader | {"joyful": -1.0}))
    with pytest.raises(ValueError, match=r"joyful.*polarity_words"):
        polarity.load()


def test_batches_are_balanced_and_go_through_everything_first(data):
    drawn = polarity.batches(data.train[:40], 8, seed=3)
    first = [next(drawn) for _ in range(5)]
    assert all(sum(e.label for e in batch) == 4 for batch in first)
    assert sorted(w for batch in first for w in words(batch)) == sorted(words(data.train[:40]))
    again = polarity.batches(data.train[:40], 8, seed=3)
    assert [next(again) for _ in range(5)] == first
    assert next(polarity.batches(data.train[:40], 8, seed=4)) != first[0]


@pytest.mark.parametrize("size", [0, 3, 42])
def test_bad_batch_sizes_are_refused(data, size):
    with pytest.raises(ValueError, match=r"even batch size from 2 to 40"):
        next(polarity.batches(data.train[:40], size, seed=0))


def test_accuracy_counts_the_right_side_of_the_threshold(data):
    import torch

    margins = torch.tensor([-1.0, 1.0, 0.5, 2.0])  # labels 0, 1, 0, 1
    assert polarity.accuracy(margins, data.dev[:4]) == 0.75
    assert polarity.accuracy(margins, data.dev[:4], threshold=0.75) == 1.0
    assert polarity.accuracy(-margins, data.dev[:4]) == 0.25


@pytest.mark.slow
def test_padding_does_not_change_the_answers(data):
    import torch
    from tenfold.assets import smollm2
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    classifier = polarity.Classifier(AutoTokenizer.from_pretrained(folder))
    some = data.dev[:12]
    together = classifier.margins(model, some)
    alone = torch.cat([classifier.margins(model, [example]) for example in some])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    loss = classifier.objective(some)(model)
    labels = torch.tensor([2.0 * e.label - 1 for e in some])
    expected = torch.nn.functional.softplus(-labels * alone).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_options_of_several_tokens_are_refused():
    from tenfold.assets import smollm2
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    with pytest.raises(ValueError, match=r"one token.*extraordinarily good"):
        polarity.Classifier(tokenizer, options=(" bad", " extraordinarily good"))


def test_ranking_is_the_area_under_the_curve_and_knows_no_threshold(data):
    import torch

    dev = data.dev[:6]  # labels alternate, negative first
    assert polarity.ranking(torch.tensor([0.0, 1, 0, 1, 0, 1]), dev) == 1.0
    assert polarity.ranking(torch.zeros(6), dev) == 0.5
    margins = torch.tensor([0.3, 0.1, -0.2, 0.3, 0.0, 2.0])
    # Pairs: 0.1 beats two of three, 0.3 beats two and ties with one, 2.0 beats three.
    assert polarity.ranking(margins, dev) == pytest.approx(7.5 / 9)
    assert polarity.ranking(margins + 10, dev) == pytest.approx(7.5 / 9)
