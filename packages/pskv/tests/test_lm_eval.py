"""lm-evaluation-harness with shared contexts, against its own Hugging Face model."""

import itertools
import json

import pytest
import torch
from tenfold.assets import smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer

lm_eval = pytest.importorskip("lm_eval")
pytestmark = [
    pytest.mark.peer,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
CAPITALS = {
    "France": "Paris", "Japan": "Tokyo", "Kenya": "Nairobi", "Peru": "Lima", "Norway": "Oslo",
    "Egypt": "Cairo", "Cuba": "Havana", "Iraq": "Baghdad",
}  # fmt: skip
TASK = """
task: capitals
dataset_path: json
dataset_kwargs:
  data_files:
    train: {train}
    test: {test}
training_split: train
test_split: test
output_type: multiple_choice
doc_to_text: "The capital of {{{{country}}}} is"
doc_to_choice: options
doc_to_target: answer
num_fewshot: 3
fewshot_config:
  sampler: first_n
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def models():
    from lm_eval.models.huggingface import HFLM
    from pskv.integrations.lm_eval import SharedPrefixLM

    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    options = {"pretrained": model, "tokenizer": tokenizer, "batch_size": 4}
    # a float32 softmax over the vocabulary is off by 2e-5 a token, more than all the rest
    plain = HFLM(**options, softmax_dtype="float64")
    return plain, SharedPrefixLM(**options, pskv_backend="split")


@pytest.fixture
def task(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    cities = list(CAPITALS.values())
    docs = [
        {"country": country, "options": (cities[n:] + cities)[:4], "answer": 0}
        for n, country in enumerate(CAPITALS)
    ]
    for name, part in (("train", docs[:3]), ("test", docs[3:6])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in part))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "capitals.yaml").write_text(
        TASK.format(train=tmp_path / "train.jsonl", test=tmp_path / "test.jsonl")
    )
    return folder


def test_a_task_gives_the_same_answers(models, task):
    from lm_eval.tasks import TaskManager

    found = []
    for model in models:
        result = lm_eval.simple_evaluate(
            model=model, tasks=["capitals"], task_manager=TaskManager(include_path=str(task)),
            bootstrap_iters=0,
        )  # fmt: skip
        samples = sorted(result["samples"]["capitals"], key=lambda sample: sample["doc_id"])
        found.append((result["results"]["capitals"]["acc,none"],
                      [sample["filtered_resps"] for sample in samples]))  # fmt: skip
    (accuracy, plain), (ours, shared) = found
    assert ours == accuracy >= 0.6
    for a, b in zip(itertools.chain(*plain), itertools.chain(*shared), strict=True):
        assert b[0] == pytest.approx(a[0], abs=1e-4)
        assert b[1] == a[1]


def test_requests_of_all_kinds(models, monkeypatch):
    text = "The capital of France is Paris, and the capital of Japan is Tokyo."
    ids = models[0].tokenizer(text)["input_ids"]
    requests = [
        (("a", "b"), ids[:8], ids[8:12]),
        (("a", "c"), ids[:8], ids[9:10]),
        (None, ids[:1], ids[1:]),
        (("a", "d"), ids[:8], ids[10:11]),
        # longer than the model is told to be: cut on the left
        (("e", "f"), ids * 7, ids[:3]),
        (("g", "h"), ids[:1], (ids * 7)[:60]),
    ]
    for model in models:
        monkeypatch.setattr(model, "_max_length", 60)
    plain, shared = (model._loglikelihood_tokens(requests, True) for model in models)
    for a, b in zip(plain, shared, strict=True):
        assert b[0] == pytest.approx(a[0], abs=1e-4)
        assert b[1] == a[1]


def test_perplexity_of_a_text(models):
    from lm_eval.api.instance import Instance

    text = "The kettle is on, and the tea will be ready soon."
    request = Instance("loglikelihood_rolling", {}, (text,), 0)
    plain, shared = (model.loglikelihood_rolling([request], True) for model in models)
    assert shared == pytest.approx(plain, abs=1e-4)


def test_the_model_has_a_name():
    from lm_eval.api.registry import get_model
    from pskv.integrations.lm_eval import SharedPrefixLM

    assert get_model("hf-pskv") is SharedPrefixLM
