"""Loaders on files as the benchmark's, its mismatched columns included, and prompts of packages."""

import pytest
from forelen.data import load_forelen, mini_prompts

PROMPT = 'What, in "one" line,\nis it?'


def write(folder, split, text):
    path = folder / "Qwen2.5_0.5B" / "RL" / f"{split}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def quoted(text):
    return '"' + text.replace('"', '""') + '"'


def test_columns_that_differ(tmp_path):
    import datasets

    write(tmp_path, "train", f"user_prompt_content,target_length\n{quoted(PROMPT)},12\nb,3\n")
    write(tmp_path, "test", "dataset_name,target_length,user_prompt_content,extra\ngsm8k,7.0,c,9\n")
    where = {"model": "Qwen2.5_0.5B", "scenario": "RL"}
    train = load_forelen(tmp_path, **where)
    assert train[0] == {
        "user_prompt_content": PROMPT, "target_length": 12, "dataset_name": "RL",
    }  # fmt: skip
    test = load_forelen(tmp_path, split="test", **where)
    assert test[0]["dataset_name"] == "gsm8k"
    assert test[0]["target_length"] == 7
    assert test[0]["extra"] == 9
    assert test.features["target_length"].dtype == "int64"
    # what the plain loader says of the same files
    files = {s: str(tmp_path / "Qwen2.5_0.5B" / "RL" / f"{s}.csv") for s in ("train", "test")}
    with pytest.raises(datasets.exceptions.DatasetGenerationError):
        datasets.load_dataset("csv", data_files=files, cache_dir=str(tmp_path / "cache"))


def test_bad_files(tmp_path):
    where = {"model": "Qwen2.5_0.5B", "scenario": "RL"}
    with pytest.raises(FileNotFoundError, match=r"no Qwen2.5_0.5B/RL/train\.csv"):
        load_forelen(tmp_path, **where)
    with pytest.raises(FileNotFoundError, match="there is none"):
        load_forelen(tmp_path / "a" / "b" / "c", **where)
    for text, match in (
        ("user_prompt_content\na\n", "a column target_length"),
        ("user_prompt_content,target_length\na,0\n", r"got 0\.0 in row 0"),
        ("user_prompt_content,target_length\na,3\nb,2.5\n", r"got 2\.5 in row 1"),
    ):
        write(tmp_path, "train", text)
        with pytest.raises(ValueError, match=match):
            load_forelen(tmp_path, **where)
    with pytest.raises(ValueError, match="scenario"):
        load_forelen(tmp_path, model="m", scenario="Chat")
    with pytest.raises(ValueError, match="split"):
        load_forelen(tmp_path, split="dev", **where)


@pytest.mark.peer
def test_prompts_of_packages():
    pytest.importorskip("reasoning_gym")
    found = mini_prompts("Reasoning", 60)
    assert len({prompt.text for prompt in found}) >= 55
    assert len({prompt.family for prompt in found}) == 55
    assert found == mini_prompts("Reasoning", 60)
    other = mini_prompts("RL", 60)
    assert not {p.text for p in other} & {p.text for p in found if len(p.text) > 40}
    code = mini_prompts("Code", 200)
    assert len(code) == 164
    assert all("def " in prompt.text for prompt in code)


@pytest.mark.parametrize(("scenario", "least"), [("LongSeq", 300), ("Facts", 500)])
def test_prompts_of_files(scenario, least):
    try:
        found = mini_prompts(scenario, 10_000)
    except ImportError as error:
        assert "--no-deps inspect-evals" in str(error)
        pytest.skip("inspect-evals is not installed")
    assert len(found) >= least
    assert all(prompt.text and prompt.scenario == scenario for prompt in found)


def test_bad_scenarios(monkeypatch):
    with pytest.raises(ValueError, match="scenario"):
        mini_prompts("Chat", 3)
    with pytest.raises(ValueError, match="count"):
        mini_prompts("Code", 0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"forelen\[mini\]"):
        mini_prompts("Code", 3)
