"""A real model and its template."""

import pytest
import torch
from forelen import ChatSpan, FeatureSpec, token_entropy
from forelen.collect import encode
from forelen.reading import ModelReader, read_prompts
from tenfold.assets import smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(smollm2())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval()


TEXTS = ("What is the capital of France?", "Name three rivers, and say where they end.")


@pytest.mark.parametrize("side", ["left", "right"])
def test_entropies_are_those_of_the_logits(model, tokenizer, side):
    rows = [encode(tokenizer, text) for text in TEXTS]
    longest = max(map(len, rows))
    ids, mask = torch.full((2, longest), 2), torch.zeros(2, longest, dtype=torch.int64)
    for row, tokens in enumerate(rows):
        place = slice(longest - len(tokens), None) if side == "left" else slice(len(tokens))
        ids[row, place], mask[row, place] = torch.tensor(tokens), 1
    found = token_entropy(model, ids, mask)
    for row, tokens in enumerate(rows):
        with torch.no_grad():
            logprobs = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        expected = torch.special.entr(logprobs.exp()).sum(-1)
        torch.testing.assert_close(found[row][mask[row] > 0], expected, rtol=0, atol=2e-4)


def test_the_template_is_left_out(model, tokenizer):
    span = ChatSpan.of(tokenizer)
    assert len(span.before) == 24
    assert tokenizer.decode(span.before).startswith("<|im_start|>system")
    assert tokenizer.decode(span.after).endswith("<|im_start|>assistant\n")
    for text in TEXTS:
        ids = torch.tensor([encode(tokenizer, text)])
        inside = span.mask(ids)[0]
        assert tokenizer.decode(ids[0, inside]) == text
    # without its constant tokens the pool differs more from prompt to prompt
    reader = ModelReader(model)
    specs = [FeatureSpec(), FeatureSpec(content_only=False)]
    rows = [
        read_prompts(reader, specs, torch.tensor([encode(tokenizer, text)]), None, span)
        for text in TEXTS
    ]
    distances = []
    for spec in specs:
        a, b = (row[spec.key][0] for row in rows)
        distances.append(float((a - b).norm() / (a.norm() * b.norm()) ** 0.5))
    assert distances[0] > 1.2 * distances[1]
