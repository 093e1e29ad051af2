"""Teachers on disk: what is written, going on with it, and training by it."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from slimmoe.distillation import DistillationTrainer, Teacher, TeacherLogitCache
from slimmoe.errors import ResumeError

sys.path.insert(0, str(Path(__file__).parent))
from moe_families import model, tokens
from test_distillation import options, rows
from test_mtp import head_of
from test_teacher_alignment import NAMES, succession, sure, tokenizer


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
    data[1] = data[0]
    caches = [TeacherLogitCache.build(tmp_path / name, teacher, data, tokens=8, sampled=True,
                                      seed=seed, progress=False)
              for name, seed in (("a", 1), ("b", 1), ("c", 2))]  # fmt: skip
    numbers = torch.arange(8)
    said = [cache.rows(numbers, 9, torch.device("cpu")) for cache in caches]
    assert torch.equal(said[0][0], said[1][0])
    assert not torch.equal(said[0][0], said[2][0])
    # a text that comes twice is drawn of twice
    assert not torch.equal(said[0][0][:9], said[0][0][9:18])
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


def test_packed_documents_are_apart(teacher, tmp_path):
    """As where the teacher is there: positions that begin anew are those of another document."""
    ids = tokens("deepseek_v3", 4, 9)
    places = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4])
    data = [{"input_ids": row, "position_ids": places} for row in ids]
    cache = TeacherLogitCache.build(tmp_path / "c", teacher, data, tokens=96, progress=False)
    plain = TeacherLogitCache.build(tmp_path / "p", teacher, rows(ids), tokens=96, progress=False)
    found = cache.rows(torch.tensor([0]), 9, torch.device("cpu"))
    alone = TeacherLogitCache.build(tmp_path / "a", teacher, rows(ids[:, 4:]), tokens=96,
                                    progress=False)  # fmt: skip
    wanted = alone.rows(torch.tensor([0]), 5, torch.device("cpu"))
    torch.testing.assert_close(found[1][4:], wanted[1], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="the same tokens in row 0"):
        plain.attach(data)
    losses = [
        run(tmp_path / name, said, some).state.log_history[0]["loss"]
        for name, said, some in (("one", cache, cache.attach(data)), ("two", teacher, data))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# --- going on ------------------------------------------------------------------------------------

LENGTHS = (9, 4, 1, 9, 7, 2, 9, 3)
#: Parts of so many tokens: sequences 0 and 1, 2 and 3, 4 and 5, 6 and 7.
PART = 13


def uneven():
    return [{"input_ids": row["input_ids"][:size]}
            for row, size in zip(data_of(8), LENGTHS, strict=True)]  # fmt: skip


class Counting(Teacher):
    """Ends the process, or fails, when it is asked once more than so many times."""

    def __init__(self, most=None, kill=False):
        super().__init__(model("deepseek_v3", seed=9))
        self.asked, self.most, self.kill = 0, most, kill

    def __call__(self, inputs):
        if self.asked == self.most:
            if self.kill:
                signal.raise_signal(signal.SIGKILL)
            raise KeyboardInterrupt
        self.asked += 1
        return super().__call__(inputs)


def built(folder, teacher=None, data=None, **changes):
    known = {"tokens": 5, "part_tokens": PART, "progress": False} | changes
    return TeacherLogitCache.build(folder, teacher or Counting(), data or uneven(), **known)


def content(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("sampled", [False, True])
def test_what_was_killed_goes_on(sampled, tmp_path):
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import test_logit_cache as t; from pathlib import Path\n"
        f"t.built(Path({str(tmp_path / 'c')!r}), t.Counting(5, kill=True), sampled={sampled})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    assert not (tmp_path / "c").exists()
    teacher = Counting()
    cache = built(tmp_path / "c", teacher, sampled=sampled)
    # two parts of two sequences were whole
    assert teacher.asked == 4
    built(tmp_path / "whole", sampled=sampled)
    wanted = content(tmp_path / "whole")
    assert content(tmp_path / "c") == wanted
    assert sorted(wanted) == ["cache.json", *(f"part-0000{n}-of-00004.safetensors"
                                              for n in range(1, 5))]  # fmt: skip
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []
    # and as without parts
    one = built(tmp_path / "one", sampled=sampled, part_tokens=1000)
    for part, whole in zip(*(known.rows(torch.arange(8), 9, torch.device("cpu"))
                             for known in (cache, one)), strict=True):  # fmt: skip
        assert torch.equal(part, whole)


def stopped(folder):
    with pytest.raises(KeyboardInterrupt):
        built(folder, Counting(5))


def test_what_was_begun_otherwise_does_not_go_on(tmp_path):
    stopped(tmp_path / "c")
    other = Teacher(model("deepseek_v3", seed=8))
    data = uneven()
    data[7]["input_ids"] = data[7]["input_ids"].flip(0)
    for name, changes in (
        ("dataset", {"data": data}), ("dataset", {"data": uneven()[::-1]}),
        ("teacher", {"teacher": other}), ("tokens", {"tokens": 4}),
        ("temperature", {"temperature": 2.0}), ("sampled", {"sampled": True}),
        ("part_tokens", {"part_tokens": 14}),
    ):  # fmt: skip
        with pytest.raises(ResumeError, match=rf"was begun with another {name}\b"):
            built(tmp_path / "c", **changes)
    assert len(built(tmp_path / "c", other, resume=False)) == 8
    built(tmp_path / "d", other)
    assert content(tmp_path / "c") == content(tmp_path / "d")
    with pytest.raises(KeyboardInterrupt):
        built(tmp_path / "e", Counting(5), sampled=True, seed=1)
    with pytest.raises(ResumeError, match="was begun with another seed"):
        built(tmp_path / "e", sampled=True, seed=2)
    built(tmp_path / "e", sampled=True, seed=1)


def test_what_was_damaged_is_asked_again(tmp_path):
    stopped(tmp_path / "c")
    file = tmp_path / ".c.slimmoe" / "part-00001-of-00004.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    teacher = Counting()
    built(tmp_path / "c", teacher)
    assert teacher.asked == 6
    built(tmp_path / "whole")
    assert content(tmp_path / "c") == content(tmp_path / "whole")


def test_parts_that_are_missing(tmp_path):
    built(tmp_path / "c")
    for change in (lambda file: file.write_bytes(file.read_bytes() + b"more"), Path.unlink):
        change(tmp_path / "c" / "part-00003-of-00004.safetensors")
        with pytest.raises(ValueError, match="part-00003-of-00004"):
            TeacherLogitCache(tmp_path / "c")


# --- teachers that should not be asked -----------------------------------------------------------


def test_teachers_of_other_tokens(tmp_path):
    ids = torch.randperm(96, generator=torch.Generator().manual_seed(3))
    data = rows(succession())
    with pytest.raises(ValueError, match="teacher_model: its cross entropy of the labels"):
        built(tmp_path / "c", Teacher(sure(ids)), data)
    assert not (tmp_path / "c").exists()
    built(tmp_path / "c", Teacher(sure(ids)), data, check_teacher=False)
    built(tmp_path / "d", Teacher(sure()), data)


def test_tokenizers_are_told_by_the_cache(tmp_path):
    model("deepseek_v3", seed=9).save_pretrained(tmp_path / "teacher")
    tokenizer(NAMES).save_pretrained(tmp_path / "teacher")
    data = data_of(8)
    cache = built(tmp_path / "c", Teacher.from_pretrained(tmp_path / "teacher"), data)

    def train(cache, known, **changes):
        student, _ = head_of("deepseek_v3", seed=5)
        DistillationTrainer(
            student, cache, options(tmp_path / "run", **changes),
            train_dataset=cache.attach(data), processing_class=known,
        ).train()  # fmt: skip

    train(cache, tokenizer(NAMES))
    other = tokenizer(NAMES[::-1])
    with pytest.raises(ValueError, match="teacher_model: expected the student's tokens"):
        train(cache, other)
    train(cache, other, check_teacher=False)
    train(cache, None)
    # of a teacher without one, nothing is known
    train(built(tmp_path / "d", data=data), other)


@pytest.mark.parametrize("sampled", [False, True])
def test_a_teacher_that_is_not_finite(sampled, tmp_path):
    broken = model("deepseek_v3", seed=9)
    data = uneven()
    data[5]["input_ids"] = torch.tensor([95, 95])
    assert not any((row["input_ids"] == 95).any() for row in data[:5])
    with torch.no_grad():
        broken.model.embed_tokens.weight[95] = float("nan")
    match = "teacher_model: its logits are not finite.*sequence 5"
    with pytest.raises(FloatingPointError, match=match):
        built(tmp_path / "c", Teacher(broken), data, sampled=sampled, check_teacher=False)
    told = json.loads((tmp_path / ".c.slimmoe" / "cache.json").read_text())
    assert len(told["files"]) == 2
