"""States and entropies read off models, against their own logits."""

import pytest
import torch
from forelen import ChatSpan, FeatureSpec, UnsupportedModelError, token_entropy
from forelen.reading import ModelReader, read_prompts
from shared_kernels.testing.models import tiny_model


def entropies(model, ids):
    with torch.no_grad():
        logprobs = model(ids).logits.double().log_softmax(-1)
    return torch.special.entr(logprobs.exp()).sum(-1)


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "qwen3", "gemma2", "cohere2", "granite", "opt", "gpt_neox", "mamba"]
)
def test_entropies_are_those_of_the_logits(sharpened, name):
    model = sharpened(tiny_model(name), 10.0)
    ids = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))
    found = token_entropy(model, ids).double()
    torch.testing.assert_close(found, entropies(model, ids), rtol=0, atol=2e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_padding_changes_nothing(sharpened, name, side):
    model = sharpened(tiny_model(name), 10.0)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 96, (n,), generator=generator) for n in (5, 9)]
    ids, mask = torch.zeros(2, 9, dtype=torch.int64), torch.zeros(2, 9, dtype=torch.int64)
    for row, tokens in enumerate(rows):
        place = slice(9 - len(tokens), 9) if side == "left" else slice(0, len(tokens))
        ids[row, place], mask[row, place] = tokens, 1
    found = token_entropy(model, ids, mask)
    reader = ModelReader(model, [0, 2])
    specs = [FeatureSpec(), FeatureSpec("last", 2), FeatureSpec("mean", 0), FeatureSpec("max")]
    features = read_prompts(reader, specs, ids, mask)
    for row, tokens in enumerate(rows):
        kept = found[row][mask[row] > 0].double()
        torch.testing.assert_close(kept, entropies(model, tokens[None])[0], rtol=0, atol=2e-5)
        assert found[row][mask[row] == 0].isnan().all()
        alone = read_prompts(reader, specs, tokens[None])
        for key, value in alone.items():
            torch.testing.assert_close(features[key][row], value[0], rtol=0, atol=1e-5)


def test_layers_are_those_of_transformers(llama):
    ids = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(1))
    reader = ModelReader(llama, [0, 1, 3])
    specs = [FeatureSpec("last", layer) for layer in (0, 1, 3, -1)]
    found = read_prompts(reader, specs, ids)
    with torch.no_grad():
        states = llama(ids, output_hidden_states=True).hidden_states
    for layer in (0, 1, 3, -1):
        assert torch.equal(found[FeatureSpec("last", layer).key], states[layer][:, -1])
    assert not reader.states


def test_heads_that_are_called():
    """An adapter on the head: its weight alone is not the head."""
    from peft import LoraConfig, get_peft_model

    model = tiny_model("qwen3")
    wrapped = get_peft_model(model, LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    ids = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))
    inner = wrapped.base_model.model.eval()
    assert not ModelReader(inner).head.is_plain()
    found = token_entropy(inner, ids).double()
    torch.testing.assert_close(found, entropies(inner, ids), rtol=0, atol=2e-5)


def test_a_head_that_is_not_the_models(sharpened):
    model = sharpened(tiny_model("llama"))
    reader = ModelReader(model)
    hidden = torch.randn(2, 32)
    reader.check_head(hidden, model.lm_head(hidden))
    with pytest.raises(UnsupportedModelError, match="are not its head's"):
        reader.check_head(hidden, 1.5 * model.lm_head(hidden))


def test_what_cannot_be_read():
    for name in ("t5", "bert"):
        with pytest.raises(UnsupportedModelError, match=r"decoder|head"):
            ModelReader(tiny_model(name))
    model = tiny_model("llama")
    with pytest.raises(UnsupportedModelError, match="no language-model head"):
        ModelReader(model.model)
    with pytest.raises(UnsupportedModelError, match=r"0 to 3 .*got 4"):
        ModelReader(model, [4])
    with pytest.raises(UnsupportedModelError, match="compiled"):
        ModelReader(torch.compile(model))
    with pytest.raises(ValueError, match="input_ids"):
        token_entropy(model, torch.zeros(1, 0, dtype=torch.int64))


class Chatty:
    chat_template = "a template"

    def apply_chat_template(self, chat, **options):
        return {"input_ids": [1, 9, 9, *map(ord, chat[0]["content"]), 8, 7]}


def test_the_template_by_sentinels():
    span = ChatSpan.of(Chatty())
    assert span == ChatSpan((1, 9, 9), (8, 7))
    ids = torch.tensor([[0, 0, 1, 9, 9, 5, 6, 8, 7], [1, 9, 9, 5, 5, 5, 5, 8, 7]])
    mask = (ids > 0).long()
    found = span.mask(ids, mask)
    assert found.long().tolist() == [[0, 0, 0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1, 0, 0]]
    right = span.mask(ids[:1].roll(-2, 1), mask[:1].roll(-2, 1))
    assert right.long().tolist() == [[0, 0, 0, 1, 1, 0, 0, 0, 0]]
    # not framed so, and nothing between
    odd = torch.tensor([[1, 9, 4, 5, 6, 8, 7], [1, 9, 9, 4, 5, 7, 8]])
    with pytest.warns(UserWarning, match="2 of 2 prompts"):
        assert span.mask(odd).all()
    with pytest.warns(UserWarning, match="1 of 1"):
        assert span.mask(torch.tensor([[1, 9, 9, 8, 7]])).all()
    assert ChatSpan().mask(ids, mask).equal(mask.bool())
