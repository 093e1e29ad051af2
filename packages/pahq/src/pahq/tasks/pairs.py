"""Tasks from texts and from tokens.

Whole prompts are encoded, never words on their own, for tokens depend on what is around them. What
stands at the beginning is said by ``bos``: None leaves it to the tokenizer, which may put a token
there or not, True puts its BOS token there, False puts none. It must be the same for all prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels._checks import message

from pahq.tasks.base import Task

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    #: A text, whose first token counts; a token; or several of them.
    Answer = str | int | Sequence[str | int]


def from_pairs(
    tokenizer: Any,
    clean: Sequence[str],
    corrupted: Sequence[str],
    answers: Sequence[Answer],
    wrong_answers: Sequence[Answer] | None = None,
    *,
    name: str = "pairs",
    bos: bool | None = None,
) -> Task:
    """Make a task of texts.

    What counts of an answer is its first token behind the prompt. Answer and wrong answer must
    differ in it: where they share a beginning, put that into the prompt. Texts of one set that
    begin with the same token count once.

    Args:
        tokenizer: The model's.
        clean: N prompts.
        corrupted: As many, each with as many tokens as its clean prompt.
        answers: What follows the clean prompt, with its leading space if it has one: a text, a
            token, or several of either where each of them is right.
        wrong_answers: What follows the corrupted one.
        name: Of the task.
        bos: Whether prompts begin with the tokenizer's BOS token; None leaves it to the tokenizer.

    Raises:
        ValueError: A pair of different length, by number and texts; none; prompts that begin
            otherwise than others; answers that are alike.
    """
    lists = {"corrupted": corrupted, "answers": answers}
    if wrong_answers is not None:
        lists["wrong_answers"] = wrong_answers
    for title, texts in lists.items():
        if len(texts) != len(clean):
            raise ValueError(message(title, f"{len(clean)} texts", len(texts), "give one a prompt"))
    found = [
        encode_pair(tokenizer, clean[i], corrupted[i], answers[i],
                    None if wrong_answers is None else wrong_answers[i], number=i, bos=bos)
        for i in range(len(clean))
    ]  # fmt: skip
    rows, others, right, wrong = zip(*found, strict=True) if found else ([], [], [], [])
    task = from_ids(
        rows, others, right, None if wrong_answers is None else wrong,
        name=name, pad=tokenizer.pad_token_id or 0, bos=tokenizer.bos_token_id,
    )  # fmt: skip
    task.meta |= {"bos": bos, "clean": list(clean), "corrupted": list(corrupted)}
    return task


def from_ids(
    clean: Mapping[str, Any] | Iterable[Sequence[int]],
    corrupted: Mapping[str, Any] | Iterable[Sequence[int]],
    answers: Sequence[int | Sequence[int]] | Tensor,
    wrong_answers: Sequence[int | Sequence[int]] | Tensor | None = None,
    *,
    name: str = "ids",
    pad: int = 0,
    bos: int | None = None,
) -> Task:
    """Make a task of tokens. The last one of each prompt is where its answer is given.

    Args:
        clean: N prompts without padding, of any lengths, or what a tokenizer returns for a batch,
            whose ``attention_mask`` says what is padding, on either side.
        corrupted: As many, each with as many tokens as its clean prompt.
        answers: Token that follows the clean prompt, or several; or a tensor of them, see `Task`.
        wrong_answers: Token that follows the corrupted one, or several.
        name: Of the task.
        pad: Token that fills prompts up, on the right.
        bos: Token that all prompts begin with, or none does; None does not look.

    Raises:
        ValueError: As `from_pairs`.
    """
    rows, others = _unpadded(clean), _unpadded(corrupted)
    if len(rows) != len(others):
        raise ValueError(
            message("corrupted", f"{len(rows)} prompts", len(others), "give one a prompt")
        )
    for number, (a, b) in enumerate(zip(rows, others, strict=True)):
        _check_lengths(number, a, b, a, b)
    if bos is not None:
        _check_beginnings(rows, others, bos)
    longest = max(map(len, rows), default=0)
    padded = lambda lines: torch.tensor(  # noqa: E731
        [line + [pad] * (longest - len(line)) for line in lines], dtype=torch.int64
    ).view(len(lines), longest)
    return Task(
        padded(rows), padded(others), torch.tensor([len(row) - 1 for row in rows]), _sets(answers),
        None if wrong_answers is None else _sets(wrong_answers), {"name": name},
    )  # fmt: skip


def encode(tokenizer: Any, text: str, bos: bool | None = None) -> list[int]:
    """Return the tokens of a prompt.

    Raises:
        ValueError: The tokenizer puts a token behind texts, or has no BOS token to put before them.
    """
    bare = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if bos is None:
        ids = list(tokenizer(text)["input_ids"])
        if bare and ids[-len(bare) :] != bare:
            remedy = "give bos=True or bos=False, and nothing but that is added"
            expected = "one that puts nothing behind a text"
            raise ValueError(message("tokenizer", expected, f"{ids} for {text!r}", remedy))
        return ids
    if bos and tokenizer.bos_token_id is None:
        raise ValueError(message("bos", "False or None", bos, "the tokenizer has no such token"))
    return [tokenizer.bos_token_id, *bare] if bos else bare


def encode_pair(
    tokenizer: Any, clean: str, corrupted: str, answers: Answer, wrong_answers: Answer | None,
    *, number: int = 0, bos: bool | None = None,
) -> tuple[list[int], list[int], int | list[int], int | list[int] | None]:  # fmt: skip
    """Return the tokens of a pair, and of its answers; see `from_pairs`."""
    ids, others = encode(tokenizer, clean, bos), encode(tokenizer, corrupted, bos)
    _check_lengths(number, ids, others, clean, corrupted)
    right = _tokens(tokenizer, clean, ids, answers, bos)
    if wrong_answers is None:
        return ids, others, _as_given(answers, right), None
    wrong = _tokens(tokenizer, clean, ids, wrong_answers, bos)
    same = [token for token in right if token in wrong]
    if same:
        remedy = "put the beginning that they share into the prompt, or leave the example out"
        raise ValueError(
            message("wrong_answers", "other tokens than the answers",
                    f"{wrong[same[0]]!r} and {right[same[0]]!r}, which begin with the same token "
                    f"{tokenizer.decode([same[0]])!r}, in example {number} ({clean!r})", remedy)
        )  # fmt: skip
    return ids, others, _as_given(answers, right), _as_given(wrong_answers, wrong)


def _as_given(answers: Answer, tokens: dict[int, str | int]) -> int | list[int]:
    found = list(tokens)
    return found[0] if isinstance(answers, str | int) else found


def _tokens(
    tokenizer: Any, text: str, ids: list[int], answers: Answer, bos: bool | None
) -> dict[int, str | int]:
    """Return what each answer begins with where it stands, and the answer."""
    found: dict[int, str | int] = {}
    for answer in [answers] if isinstance(answers, str | int) else answers:
        if isinstance(answer, int):
            found.setdefault(answer, answer)
            continue
        token = following(tokenizer, text, ids, answer, bos)
        if token is None:
            raise ValueError(
                f"answers: expected one that begins with a token of its own behind the prompt, got "
                f"{answer!r} behind {text!r}; begin it with a space, or end the prompt without one"
            )
        found.setdefault(token, answer)
    if not found:
        raise ValueError(
            f"answers: expected one at least behind {text!r}, got none; leave the example out"
        )
    return found


def following(
    tokenizer: Any, text: str, ids: list[int], answer: str, bos: bool | None = None
) -> int | None:
    """Return the first token of an answer behind a prompt, or None where it grows together."""
    whole = encode(tokenizer, text + answer, bos)
    return whole[len(ids)] if len(whole) > len(ids) and whole[: len(ids)] == ids else None


def _check_lengths(number: int, a: list[int], b: list[int], first: object, second: object) -> None:
    if len(a) != len(b):
        raise ValueError(
            f"corrupted: expected as many tokens as in the clean prompt, got {len(b)} and "
            f"{len(a)} in example {number} ({second!r} and {first!r}); "
            "exchange words for ones of as many tokens"
        )
    if not a:
        raise ValueError(
            f"clean: expected a prompt, got no token in example {number}; begin with a BOS token"
        )


def _check_beginnings(rows: list[list[int]], others: list[list[int]], bos: int) -> None:
    has = rows[0][0] == bos if rows else False
    for name, lines in (("clean", rows), ("corrupted", others)):
        for number, line in enumerate(lines):
            if (line[0] == bos) != has:
                remedy = "give all prompts a BOS token, or none"
                expected = (
                    f"a prompt that begins {'with' if has else 'without'} the BOS token {bos}"
                )
                got = f"token {line[0]} in example {number}"
                raise ValueError(message(name, f"{expected}, as the first one", got, remedy))
            if line[:2] == [bos, bos]:
                remedy = "the text has one already: give bos=False"
                got = f"two in example {number}"
                raise ValueError(message(name, f"one BOS token {bos}", got, remedy))


def _unpadded(batch: Any) -> list[list[int]]:
    if not isinstance(batch, Mapping):
        return [[int(token) for token in row] for row in batch]
    rows = batch["input_ids"]
    masks = batch.get("attention_mask", [[1] * len(row) for row in rows])
    return [
        [int(token) for token, seen in zip(row, mask, strict=True) if seen]
        for row, mask in zip(rows, masks, strict=True)
    ]


def _sets(answers: Sequence[int | Sequence[int]] | Tensor) -> Tensor:
    """Return ``(N,)`` if each is one token, else ``(N, A)``."""
    if isinstance(answers, torch.Tensor):
        return answers
    if all(isinstance(answer, int) for answer in answers):
        return torch.tensor(answers, dtype=torch.int64)
    rows = [[answer] if isinstance(answer, int) else list(answer) for answer in answers]
    width = max(1, *map(len, rows))
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=torch.int64)
