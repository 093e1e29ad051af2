"""Collecting: what is stored, that a stopped collection goes on, and what is refused."""

import json

import pytest
import torch
from forelen import ChatSpan, FeatureSpec
from forelen.collect import FeatureCollector, Prompt, count_tokens
from forelen.data import ControlConfig, ControlLM
from forelen.reading import ModelReader, read_prompts
from forelen.store import Collected, FeatureStore, StoreError


class Words:
    chat_template = None

    def __call__(self, text):
        return {"input_ids": [*map(int, text.split()), 2]}

    def get_vocab(self):
        return {str(number): number for number in range(50)}


@pytest.fixture(scope="module")
def model():
    return ControlLM(ControlConfig(means=(3, 8), longest=20, hidden_size=32, fillers=20))


PROMPTS = [Prompt(f"{3 + n % 2} {6 + n} {7 + n // 2}", family=f"f{n}") for n in range(10)]


def collector(model, path, **options):
    settings = {"num_samples": 3, "batch_size": 3, "max_new_tokens": 9, "top_k": 0} | options
    return FeatureCollector(model, Words(), path, **settings)


def same(a, b):
    for name in ("hashes", "lengths", "censored", "step_sample", "step_time", "steps"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    for key, value in a.prompts.items():
        assert torch.equal(value, b.prompts[key])
    assert a.families == b.families


def test_what_is_stored(model, tmp_path):
    found = collector(model, tmp_path).collect(PROMPTS, progress=False).load()
    assert len(found) == 10
    assert found.lengths.shape == (10, 3)
    assert (found.lengths[found.censored] == 9).all()
    assert found.censored.any()
    assert (found.lengths < 9).any()
    assert sorted(found.families) == sorted(p.family for p in PROMPTS)
    # equal prompts are asked once; too long ones are not
    texts = [*PROMPTS, PROMPTS[0], Prompt("3 " + "7 " * 40)]
    again = collector(model, tmp_path / "b", max_prompt_tokens=30).collect(texts, progress=False)
    same(again.load(), found)
    reader = ModelReader(model)
    for n, prompt in enumerate(PROMPTS):
        row = found.families.index(f"f{n}")
        ids = torch.tensor([Words()(prompt.text)["input_ids"]])
        alone = read_prompts(reader, [FeatureSpec()], ids)[FeatureSpec().key][0]
        torch.testing.assert_close(found.prompts[FeatureSpec().key][row], alone, rtol=0, atol=1e-5)
    # steps: powers of two, while an answer goes on
    assert set(found.step_time.tolist()) <= {1, 2, 4, 8}
    flat = found.lengths.flatten()
    assert (found.step_time < flat[found.step_sample]).all()
    for time in (1, 2, 4, 8):
        there = found.step_sample[found.step_time == time]
        assert sorted(there.tolist()) == (flat > time).nonzero()[:, 0].tolist()
    # nothing but safetensors and JSON, and no text of a prompt
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert not any(PROMPTS[4].text.encode() in path.read_bytes() for path in files)


def test_a_stopped_collection_goes_on(model, tmp_path):
    whole = collector(model, tmp_path / "a").collect(PROMPTS, progress=False).load()
    store = collector(model, tmp_path / "b").collect(PROMPTS, progress=False, limit=2)
    part = store.load()
    assert len(part) < 10
    # half a shard, as a killed process leaves one
    (tmp_path / "b" / "shards" / ".000002.safetensors.x").write_bytes(b"half")
    torch.rand(3)
    same(collector(model, tmp_path / "b").collect(PROMPTS, progress=False).load(), whole)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "b" / "shards").iterdir()}
    collector(model, tmp_path / "b").collect(PROMPTS, progress=False)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "b" / "shards").iterdir()}


def test_other_settings_are_not_mixed(model, tmp_path):
    collector(model, tmp_path).collect(PROMPTS, progress=False, limit=1)
    cases = [
        ("num_samples", {"num_samples": 2}, PROMPTS),
        ("sampling", {"temperature": 0.5}, PROMPTS),
        ("prompts", {}, PROMPTS[1:]),
        ("features", {"features": [FeatureSpec("last")]}, PROMPTS),
    ]
    for name, options, prompts in cases:
        with pytest.raises(StoreError, match=f"begun with {name}="):
            collector(model, tmp_path, **options).collect(prompts, progress=False)


def test_stores_join(model, tmp_path):
    a = collector(model, tmp_path / "a").collect(PROMPTS[:4], progress=False).load()
    b = collector(model, tmp_path / "b").collect(PROMPTS[4:], progress=False).load()
    joined = Collected.join([a, b])
    assert len(joined) == 10
    same(joined.select(range(len(a))), a)
    same(joined.select(range(len(a), 10)), b)
    other = collector(model, tmp_path / "c", num_samples=2).collect(PROMPTS, progress=False)
    with pytest.raises(StoreError, match="num_samples"):
        Collected.join([a, other.load()])


def test_damaged_stores(model, tmp_path):
    with pytest.raises(StoreError, match=r"expected a folder with store\.json"):
        FeatureStore(tmp_path / "none").load()
    store = collector(model, tmp_path / "a").collect(PROMPTS, progress=False)
    with pytest.raises(StoreError, match="got 'median'"):
        store.load(features=["median"])
    assert store.load(steps=False).steps is None
    shard = next((tmp_path / "a" / "shards").glob("*.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-9])
    with pytest.raises(StoreError, match="is damaged"):
        store.load()
    shard.unlink()
    collector(model, tmp_path / "a").collect(PROMPTS, progress=False)
    assert shard.read_bytes() == whole
    header = tmp_path / "a" / "store.json"
    header.write_text(json.dumps({"format": 99}))
    with pytest.raises(StoreError, match="format 1, got 99"):
        store.load()
    header.write_text("{")
    with pytest.raises(StoreError, match="damaged"):
        store.load()


def test_lengths():
    answers = torch.tensor([[5, 2, 2, 2], [5, 5, 5, 5], [5, 5, 5, 2], [7, 1, 1, 1]])
    lengths, censored = count_tokens(answers, [2, 7])
    assert lengths.tolist() == [2, 4, 4, 1]
    assert censored.tolist() == [False, True, False, False]
    assert count_tokens(answers, [])[1].all()


def test_bad_input(model, tmp_path):
    with pytest.raises(ValueError, match="max_new_tokens"):
        FeatureCollector(model, Words(), tmp_path)
    with pytest.raises(ValueError, match="num_samples"):
        collector(model, tmp_path, num_samples=0)
    with pytest.raises(ValueError, match="features"):
        collector(model, tmp_path, features=[])
    with pytest.raises(ValueError, match="prompts"):
        collector(model, tmp_path).collect([], progress=False)
    assert ChatSpan.of(Words()) == ChatSpan()
