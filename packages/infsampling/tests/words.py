"""A tokenizer for tiny models."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def make_tokenizer():
    """Return a tokenizer of 96 words, ``w4`` to ``w95``, with a chat template."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, 96)}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", bos_token="<s>",
        unk_token="<unk>",
        chat_template="{% for m in messages %}w9 {{ m['content'] }} {% endfor %}w10",
    )  # fmt: skip
