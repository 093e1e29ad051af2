"""Which model, tokenizer and sampling a predictor was trained for."""

from __future__ import annotations

import hashlib
import json
import warnings
from typing import Any

#: What decides how long answers get.
SAMPLING = (
    "do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens",
    "min_new_tokens", "eos_token_id", "stop_strings",
)  # fmt: skip


class FingerprintError(ValueError):
    """A predictor met a model it was not trained for."""


def digest(value: Any) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of a JSON value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def unwrapped(model: Any) -> Any:
    """Return the transformers model inside a PEFT model, or the model."""
    inner = getattr(model, "get_base_model", None)
    return model if inner is None else inner()


def model_fingerprint(model: Any) -> dict[str, Any]:
    """Return what a predictor depends on, of a transformers model."""
    model = unwrapped(model)
    config = model.config.get_text_config()
    shapes = sorted((name, list(p.shape)) for name, p in model.named_parameters())
    return {
        "architecture": type(model).__name__,
        "hidden_size": int(config.hidden_size),
        "vocab_size": int(config.vocab_size),
        "weights": digest(shapes),
    }


def tokenizer_fingerprint(tokenizer: Any) -> dict[str, Any]:
    """Return what a predictor depends on, of a tokenizer."""
    vocabulary = tokenizer.get_vocab()
    return {
        "tokenizer": digest(sorted(vocabulary.items())),
        "template": digest(getattr(tokenizer, "chat_template", None)),
    }


def sampling_of(model: Any, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return how a call of ``generate`` with these options samples."""
    given = dict(options or {})
    base = given.pop("generation_config", None) or getattr(model, "generation_config", None)
    found = {name: given.get(name, getattr(base, name, None)) for name in SAMPLING}
    eos = found["eos_token_id"]
    if eos is not None:
        ends = eos if isinstance(eos, list | tuple) else getattr(eos, "tolist", lambda: eos)()
        found["eos_token_id"] = sorted(ends) if isinstance(ends, list | tuple) else [int(ends)]
    if not found["do_sample"]:
        # without a draw these decide nothing
        found["do_sample"] = False
        for name in ("temperature", "top_p", "top_k", "min_p"):
            found[name] = None
    defaults = {"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0}
    for name, plain in defaults.items():
        if found[name] is None and (found["do_sample"] or name == "repetition_penalty"):
            found[name] = plain
    return found


def check_model(expected: dict[str, Any], model: Any) -> None:
    """Refuse another model than the one a predictor was trained for.

    Raises:
        FingerprintError: Another architecture, other sizes, or other names of weights.
    """
    found = model_fingerprint(model)
    for name, value in found.items():
        if name in expected and expected[name] != value:
            raise FingerprintError(
                f"model: expected {name} {expected[name]!r}, as the predictor was trained for, got "
                f"{value!r}; load that model, or train a predictor for this one"
            )


def check_sampling(expected: dict[str, Any], found: dict[str, Any]) -> bool:
    """Return whether answers are sampled as in training; warn if not.

    A lower cap on the tokens is no difference: the distribution is cut there.
    """
    if not expected:
        return True
    names = [name for name in SAMPLING if name != "max_new_tokens"]
    changed = [name for name in names if expected.get(name) != found.get(name)]
    cap, trained = found.get("max_new_tokens"), expected.get("max_new_tokens")
    if trained is not None and (cap is None or cap > trained):
        warnings.warn(
            f"answers may have {cap or 'any number of'} tokens, those of training had {trained} at "
            "most: what lies beyond is extrapolated",
            UserWarning,
            stacklevel=3,
        )
    if changed:
        pairs = ", ".join(f"{n} {expected.get(n)!r} -> {found.get(n)!r}" for n in changed)
        warnings.warn(
            f"answers are sampled otherwise than in training ({pairs}): predictions are not "
            "calibrated; collect and calibrate with these settings",
            UserWarning,
            stacklevel=3,
        )
    return not changed
