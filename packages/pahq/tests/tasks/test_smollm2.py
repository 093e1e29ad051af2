"""All tasks on a model that does them."""

import pytest
import torch
from pahq import Task, tasks
from tenfold.assets import smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer


def test_the_model_does_the_tasks_and_not_on_corrupted_prompts():
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval()
    least = {"ioi": 3, "greater_than": 2, "docstring": 4, "induction": 6, "gendered_pronoun": 3,
             "sva": 1, "capital_country": 6}  # fmt: skip
    assert set(least) == set(tasks.NAMES)
    for name, gap in least.items():
        task = tasks.make(name, tokenizer, 4)
        found = tasks.baseline(model, task, min_accuracy=0.75)
        other = Task(task.corrupted, task.clean, task.positions, task.answers, task.wrong_answers)
        blind = tasks.baseline(model, other)
        assert found["logit_diff"] > gap, name
        assert blind["logit_diff"] < 0.5, name
        assert blind["nll"] > found["nll"] + 1, name
        with pytest.raises(ValueError, match="LlamaForCausalLM"):
            tasks.baseline(model, other, min_accuracy=0.9)
