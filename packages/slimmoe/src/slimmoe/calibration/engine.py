"""`calibrate`: run data through a model once and keep sums of what passes."""

from __future__ import annotations

import hashlib
import json
import math
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels._checks import check_choice, check_range, message
from shared_kernels.offload.memory import memory_limits
from torch import Tensor
from tqdm.auto import tqdm

from slimmoe.calibration.data import hash_tokens, make_batches
from slimmoe.calibration.layerwise import LayerFolder, run_layerwise
from slimmoe.calibration.observer import Anatomy, Observer
from slimmoe.calibration.ranks import Ranks
from slimmoe.calibration.statistics import CalibrationStatistics
from slimmoe.weights import FolderWeights, Source, load_model

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Generator, Iterable, Sequence

    from slimmoe.calibration.data import Batch
    from slimmoe.mtp import MTPHead

_MODES = ("auto", "resident", "layerwise")
# What weights may take of the free memory; the rest is for activations and statistics.
_WEIGHTS_SHARE = 0.7
# Say nothing of the architecture.
_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")


def calibrate(
    model: Any,
    data: Iterable[Any] | Tensor,
    *,
    batch_tokens: int = 16384,
    sequence_length: int = 2048,
    mode: str = "auto",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    tokenizer: Any = None,
    exclude: Iterable[int] = (),
    mtp: MTPHead | None = None,
    scratch: str | os.PathLike[str] | None = None,
    distributed: bool = True,
    dequantize: bool = False,
    progress: bool = True,
) -> CalibrationStatistics:
    """Measure what compression is planned from, in one pass over calibration data.

    Every statistic of arXiv:2605.08738, section 3, is a sum over tokens: of experts' routing
    weights and outputs, of norms, of layers' outputs. They are read where the model computes them
    anyway; no expert runs on a token that is not routed to it. A token's sums do not depend on how
    the data is batched, but for rounding.

    Args:
        model: A causal language model of transformers, or the folder of one.
        data: Texts, which are packed: joined with the end-of-sequence token and cut every
            ``sequence_length`` tokens, so that a token may attend to a text before its own. Or
            sequences of token ids, as lists, 1-D tensors or one tensor ``[N, T]``, run as they
            are. Or batches: mappings with ``input_ids`` ``[B, T]`` and maybe ``attention_mask``
            (0 for padding, left or right) and ``mask`` (0 for tokens that are run but do not
            count).
        batch_tokens: Tokens that are run at a time, padding included.
        sequence_length: Of packed texts.
        mode: ``resident`` runs the model as a whole. ``layerwise`` runs one decoder layer after
            the other, read from the folder, and needs memory for two of them; the statistics are
            the same, bit for bit where the device's operations repeat. ``auto`` is layerwise for a
            folder whose weights would take over 70 % of the free memory.
        device: For computation; a given model's own, else CUDA where there is one.
        dtype: To run a folder's model in; default is the one it was saved in.
        tokenizer: For texts; the folder's own by default.
        exclude: Ids of tokens that do not count, such as special tokens. They are run.
        mtp: Modules of multi-token prediction of a model in memory; those of a folder are found
            there. They are told the tokens, and their statistics have numbers behind the layers'.
        scratch: Layerwise: a folder for the hidden states between layers, on disk; None keeps them
            in the host's memory.
        distributed: Where there is a process group of ``torch.distributed``, let each process run
            a part of the batches, and sum up: all of them have to call this with the same data,
            and all get the same statistics. Otherwise each process is by itself.
        dequantize: Read a folder in FP8 or MXFP4 as bfloat16, see `slimmoe.dequantize`.
        progress: Show a bar.

    Raises:
        TypeError: Data of a kind that is not known.
        ValueError: Empty data, a sequence of padding only, token ids outside the vocabulary, a
            model without experts that can be observed, or a bad option.
        FloatingPointError: Something in a layer, which is named, was NaN or infinite.
    """
    check_choice("mode", mode, _MODES)
    check_range("batch_tokens", batch_tokens, 1, 2**40, "choose what fits into memory")
    check_range("sequence_length", sequence_length, 1, 2**40, "2048 is usual")
    loaded = isinstance(model, torch.nn.Module)
    if loaded:
        if mode == "layerwise" or dtype is not None or device is not None:
            wrong = "mode='layerwise'" if mode == "layerwise" else "device or dtype"
            raise ValueError(
                f"{wrong} is for the folder of a model, not for a model in memory; pass the folder"
            )
    elif tokenizer is None:
        data = list(data)
        if data and isinstance(data[0], str):
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(model)
    ranks = Ranks(distributed)
    progress = progress and ranks.index == 0
    made = ranks.agreed(
        lambda: make_batches(
            data,
            batch_tokens=batch_tokens,
            sequence_length=sequence_length,
            tokenizer=tokenizer,
            exclude=exclude,
        )
    )
    batches = ranks.share(made)

    def measure() -> CalibrationStatistics:
        if loaded:
            return _resident(model, batches, mtp, progress)
        source = Source(model, dequantize=True) if dequantize else None
        return _of_folder(model, source, batches, mode, device, dtype, mtp, scratch, progress)

    return ranks.summed(ranks.agreed(measure))


def _of_folder(
    path: Any,
    source: Source | None,
    batches: Sequence[Batch],
    mode: str,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    mtp: MTPHead | None,
    scratch: str | os.PathLike[str] | None,
    progress: bool,
) -> CalibrationStatistics:
    """Measure a folder; with a source, its tensors are read dequantised."""
    if mtp is not None:
        raise ValueError("mtp is for a model in memory; a folder's modules are read with it")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if mode == "layerwise" or (mode == "auto" and not _fits(source or path, device, dtype)):
        folder = LayerFolder(path, device, dtype, source)
        return _layerwise(folder, source or path, batches, device, scratch, progress)
    if source is not None:
        made = load_model(source, dtype).to(device)
    else:
        from transformers import AutoModelForCausalLM

        made = AutoModelForCausalLM.from_pretrained(path, dtype=dtype or "auto").to(device)
    return _resident(made, batches, _modules(source or path, made), progress)


def _modules(folder: Any, model: Any) -> MTPHead | None:
    """Return modules of multi-token prediction of a folder or a source, if it has some."""
    from slimmoe.mtp import MTPHead

    there = isinstance(folder, Source) or Path(folder).is_dir()
    if not there or not MTPHead.is_in(folder, model.config):
        return None
    return MTPHead.from_pretrained(folder, model)


def _behind(
    head: MTPHead, observer: Observer, device: torch.device
) -> Callable[[Batch, Tensor], None]:
    """Return what runs modules on a batch and the model's last hidden states."""

    def run(batch: Batch, hidden: Tensor) -> None:
        inputs = batch.inputs(device)
        ids = inputs["input_ids"]
        positions = inputs.get("position_ids")
        if positions is None:
            positions = torch.arange(ids.shape[1], device=device)[None].expand_as(ids)
        for depth in range(1, len(head.modules_) + 1):
            if ids.shape[1] <= depth:
                return
            counted = batch.ahead(depth)
            whole = bool(counted.all())
            observer.expect(int(counted.sum()), None if whole else counted)
            mask = inputs.get("attention_mask")
            hidden = head.step(depth, hidden, ids, mask, positions)

    return run


def _resident(
    model: Any, batches: Sequence[Batch], head: MTPHead | None, progress: bool
) -> CalibrationStatistics:
    anatomy = Anatomy(model)
    if head is not None:
        anatomy.join(head.eval())
    _check_ids(model, batches)
    observer = Observer(anatomy)
    device = model.get_input_embeddings().weight.device
    with (
        evaluating(model),
        torch.no_grad(),
        observer.watching(
            [*range(len(anatomy.layers)), *sorted(anatomy.mtp)], start=True, end=True
        ),
    ):
        behind = None if head is None else _behind(head, observer, device)
        for batch in tqdm(batches, desc="calibrating", unit="batch", disable=not progress):
            observer.expect(batch.tokens, batch.counted)
            ran = anatomy.base(**batch.inputs(device), use_cache=False)
            if behind is not None:
                behind(batch, ran.last_hidden_state)
            observer.check(everything=False)
    return _statistics(model, observer, batches)


def _layerwise(
    folder: LayerFolder,
    source: Any,
    batches: Sequence[Batch],
    device: torch.device,
    scratch: str | os.PathLike[str] | None,
    progress: bool,
) -> CalibrationStatistics:
    _check_ids(folder.model, batches)
    observer = Observer(folder.anatomy)
    steps = len(folder.anatomy.layers) * len(batches)

    def join() -> Callable[[Batch, Tensor], None] | None:
        head = _modules(source, folder.model)
        if head is None:
            return None
        folder.anatomy.join(head.eval())
        return _behind(head, observer, device)

    with (
        torch.no_grad(),
        tqdm(total=steps, desc="calibrating", unit="layer batch", disable=not progress) as bar,
    ):
        run_layerwise(
            folder, observer, batches, device=device, scratch=scratch, advance=bar.update, join=join
        )
    return _statistics(folder.model, observer, batches)


def _statistics(model: Any, observer: Observer, batches: Sequence[Batch]) -> CalibrationStatistics:
    config = model.config
    described = {k: v for k, v in config.to_diff_dict().items() if k not in _VOLATILE}
    text = json.dumps(described, sort_keys=True, default=str)
    return CalibrationStatistics(
        model_type=config.model_type,
        config_sha256=hashlib.sha256(text.encode()).hexdigest(),
        dtype=str(model.dtype).removeprefix("torch."),
        tokens=sum(batch.tokens for batch in batches),
        sequences=sum(len(batch.input_ids) for batch in batches),
        batches=len(batches),
        tokens_sha256=hash_tokens(batches),
        **observer.statistics(),
    )


def _check_ids(model: Any, batches: Sequence[Batch]) -> None:
    size = model.config.get_text_config().vocab_size
    low = min(int(batch.input_ids.min()) for batch in batches)
    high = max(int(batch.input_ids.max()) for batch in batches)
    if low < 0 or high >= size:
        wrong = low if low < 0 else high
        raise ValueError(
            message("data", f"token ids in [0, {size})", wrong, "use the model's own tokenizer")
        )


def _fits(source: Any, device: torch.device, dtype: torch.dtype | None) -> bool:
    weights = source.weights if isinstance(source, Source) else FolderWeights(source)
    need = sum(
        math.prod(weights.shape(name)) * (dtype or weights.dtype(name)).itemsize for name in weights
    )
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory_limits().free
    return need <= _WEIGHTS_SHARE * free


@contextmanager
def evaluating(model: Any) -> Generator[None]:
    """Have a model in eval mode, and set it back."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
