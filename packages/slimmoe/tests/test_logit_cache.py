"""Teachers on disk: what is written, and training by it."""

import sys
from pathlib import Path

import pytest
import torch
from slimmoe.distillation import DistillationTrainer, Teacher, TeacherLogitCache

sys.path.insert(0, str(Path(__file__).parent))
from moe_families import model, tokens
from test_distillation import options, rows
from test_mtp import head_of


@pytest.fixture
def teacher():
    return Teacher(model("deepseek_v3", seed=9))


def data_of(n=6, size=9):
    return rows(tokens("deepseek_v3", n, size))


def run(folder, teacher, data, steps=3, **changes):
    student, head = head_of("deepseek_v3", seed=5)
    found = DistillationTrainer(
        student, teacher, options(folder, max_steps=steps, kd_weight=(0.7, 0.7), **changes),
        mtp=head, train_dataset=data,
    )  # fmt: skip
    found.train()
    return found


@torch.no_grad()
def test_what_is_written_is_the_teachers_law(teacher, tmp_path):
    data = [{"input_ids": row["input_ids"][:size]} for row, size in zip(
        data_of(), (9, 4, 1, 9, 7, 2), strict=True)]  # fmt: skip
    cache = TeacherLogitCache.build(tmp_path / "c", teacher, data, tokens=5, temperature=2.0,
                                    progress=False)  # fmt: skip
    assert len(cache) == 6
    found, numbers = cache.rows(torch.tensor([4, 1]), 8, torch.device("cpu"))
    assert found.shape == numbers.shape == (16, 5)
    for at, number in ((0, 4), (8, 1)):
        ids = data[number]["input_ids"]
        law = (teacher.model(ids[None]).logits[0] / 2).log_softmax(-1)
        best = law.topk(5, -1)
        size = len(ids)
        torch.testing.assert_close(numbers[at : at + size], best.values, rtol=1e-5, atol=1e-5)
        assert torch.equal(law.gather(1, found[at : at + size].long()).exp(), best.values.exp())
        assert (found[at + size : at + 8] == -1).all()


def test_all_tokens_are_as_the_teacher_itself(teacher, tmp_path):
    data = data_of(8)
    cache = TeacherLogitCache.build(tmp_path / "c", teacher, data, tokens=96, progress=False)
    one = run(tmp_path / "one", cache, cache.attach(data))
    other = run(tmp_path / "other", teacher, data)
    losses = [[told["loss"] for told in r.state.log_history if "loss" in told]
              for r in (one, other)]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for (name, a), b in zip(one.model.named_parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4, msg=name)


def test_likeliest_tokens_teach_too(teacher, tmp_path):
    data = data_of(8)
    cache = TeacherLogitCache.build(tmp_path / "c", teacher, data, tokens=8, progress=False)
    found = run(tmp_path / "run", TeacherLogitCache(tmp_path / "c"), cache.attach(data), steps=40,
                learning_rate=1e-2)  # fmt: skip
    kl = [told["kl"] for told in found.state.log_history if "kl" in told]
    assert sum(kl[-4:]) < 0.5 * sum(kl[:4])


def test_drawn_tokens(teacher, tmp_path):
    data = data_of(8)
    caches = [TeacherLogitCache.build(tmp_path / name, teacher, data, tokens=8, sampled=True,
                                      seed=seed, progress=False)
              for name, seed in (("a", 1), ("b", 1), ("c", 2))]  # fmt: skip
    numbers = torch.arange(8)
    said = [cache.rows(numbers, 9, torch.device("cpu")) for cache in caches]
    assert torch.equal(said[0][0], said[1][0])
    assert not torch.equal(said[0][0], said[2][0])
    torch.testing.assert_close(said[0][1].sum(-1), torch.ones(72))
    found = run(tmp_path / "run", caches[0], caches[0].attach(data))
    told = found.state.log_history[0]
    assert {"lm", "cross_entropy", "mtp1_cross_entropy"} <= told.keys()
    assert "kl" not in told


def test_another_dataset_is_refused(teacher, tmp_path):
    data = data_of()
    cache = TeacherLogitCache.build(tmp_path / "c", teacher, data, tokens=4, progress=False)
    with pytest.raises(ValueError, match="data: expected 6 sequences"):
        cache.attach(data[:5])
    with pytest.raises(ValueError, match="the same tokens in row 0"):
        cache.attach(data[::-1])
    with pytest.raises(ValueError, match="train_dataset: expected rows of the cache"):
        run(tmp_path / "run", cache, data)
    with pytest.raises(ValueError, match=r"temperature: expected 1\.0, got float 2\.0"):
        run(tmp_path / "run", cache, cache.attach(data), temperature=2.0)
    with pytest.raises(FileExistsError):
        TeacherLogitCache.build(tmp_path / "c", teacher, data, tokens=4, progress=False)
    with pytest.raises(ValueError, match="tokens: expected"):
        TeacherLogitCache.build(tmp_path / "d", teacher, data, tokens=97, progress=False)
    with pytest.raises(ValueError, match="data: expected sequences"):
        TeacherLogitCache.build(tmp_path / "d", teacher, [], progress=False)
    assert not (tmp_path / "d").exists()
    with pytest.raises(FileNotFoundError):
        TeacherLogitCache(tmp_path / "d")
