"""Kernels interpreted on the CPU, tiny models, and prompts."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["SHARED_KERNELS_STRICT"] = "1"


@pytest.fixture
def cuda():
    """Skip without a CUDA device."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return "cuda"


@pytest.fixture
def tokenizer():
    """Of words."""
    # transformers comes after the environment is set
    from words import make_tokenizer

    return make_tokenizer()
