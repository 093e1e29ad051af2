"""Tiny models, and answers whose lengths follow a known law."""

import os

import pytest
import torch
from forelen import FeatureSpec
from forelen.collect import FeatureCollector, Prompt
from forelen.data import ControlConfig, ControlLM
from shared_kernels.testing.models import tiny_model

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["SHARED_KERNELS_STRICT"] = "1"


class Words:
    """A tokenizer for `ControlLM`: words are numbers, and a prompt ends with the start token."""

    chat_template = None

    def __call__(self, text):
        return {"input_ids": [*map(int, text.split()), 2]}

    def get_vocab(self):
        return {str(number): number for number in range(50)}


@pytest.fixture
def cuda():
    """Skip without a CUDA device."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return "cuda"


@pytest.fixture
def llama():
    return sharpened(tiny_model("llama"))


@pytest.fixture(name="sharpened")
def sharpened_fixture():
    return sharpened


def sharpened(model, scale=40.0):
    """Make a random model choose: its entropies differ, and answers end at different lengths."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(scale)
    return model.eval()


CONTROL = {"means": (3, 12, 30), "longest": 60, "hidden_size": 32, "fillers": 20}


@pytest.fixture(scope="session")
def collected(tmp_path_factory):
    """A store of answers whose law is known; some are stopped."""
    model = ControlLM(ControlConfig(**CONTROL))
    ids, classes = model.prompts(120, length=9)
    prompts = [
        Prompt(" ".join(map(str, row[:-1])), family=f"f{n % 5}", scenario=f"class {kind}")
        for n, (row, kind) in enumerate(zip(ids.tolist(), classes.tolist(), strict=True))
    ]
    collector = FeatureCollector(
        model, Words(), tmp_path_factory.mktemp("store"), num_samples=4, batch_size=40,
        features=[FeatureSpec(), FeatureSpec("last"), FeatureSpec("entropy+last")],
        max_new_tokens=40, temperature=1.0, top_k=0,
    )  # fmt: skip
    return collector.collect(prompts, progress=False).load()
