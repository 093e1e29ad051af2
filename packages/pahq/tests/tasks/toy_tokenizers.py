"""Tokenizers of whole words, with tokens of one, two or three digits."""

import re

from pahq.tasks import capital_country, docstring, gendered_pronoun, greater_than, ioi, sva
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
MODULES = [made.__globals__ for made in (ioi, greater_than, docstring, gendered_pronoun, sva,
                                         capital_country)]  # fmt: skip


def strings(value):
    """Return all texts in constants."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [*strings(list(value)), *strings(list(value.values()))]
    return [text for part in value for text in strings(part)]


def make_tokenizer(digits=1, *, apart=(), begin="", end=""):
    """Return a tokenizer of the words of all tasks.

    Args:
        digits: Of a token at most.
        apart: Longer numbers that are tokens nevertheless.
        begin: What it puts before a text.
        end: What it puts behind one.
    """
    split = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex("|".join([*apart, rf"\d{{1,{digits}}}"])), "isolated"),
        pre_tokenizers.Whitespace(),
    ])  # fmt: skip
    constants = [
        value
        for module in MODULES
        for name, value in module.items()
        if name.isupper() and name[0] != "_" and isinstance(value, str | tuple | dict)
    ]
    text = re.sub(r"\{\w+\}", " a ", " ".join([*strings(constants), "When the and"]))
    words = {word for word, _ in split.pre_tokenize_str(text)}
    numbers = [f"{n:0{size}d}" for size in range(1, digits + 1) for n in range(10**size)]
    vocabulary = dict.fromkeys([*SPECIAL, *numbers, *apart, *sorted(words)])
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    made.pre_tokenizer = split
    if begin or end:
        single = " ".join(part for part in (begin, "$A", end) if part)
        ids = [(token, SPECIAL.index(token)) for token in (begin, end) if token]
        made.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>",
    )  # fmt: skip
