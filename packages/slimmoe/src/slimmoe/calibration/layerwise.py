"""Run a model from its folder with the weights of one decoder layer in memory at a time.

The model's own forward makes masks, positions and rotary embeddings. Its layers hand their input
on, except for the one whose turn it is: that takes the hidden states which the layer before left,
and leaves its own in their place. So each layer runs once on each batch, and is read once.
"""

from __future__ import annotations

import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from shared_kernels.checkpoint import TensorFolder
from torch import Tensor, nn

from slimmoe.calibration.observer import Anatomy, Observer

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Generator, Sequence

    from slimmoe.calibration.data import Batch
    from slimmoe.weights import Source


class LayerFolder:
    """A model without weights, and the folder that its parts are read from.

    Tensors go through the conversions that ``from_pretrained`` uses, so that files with experts one
    by one and files with fused experts are read alike.

    Attributes:
        model: A causal language model on the meta device, but for what was loaded.
        anatomy: Of the model.
        path: The folder.

    Args:
        path: The folder.
        device: For what is loaded.
        dtype: Of it; None for that of the configuration.
        source: Of the folder, whose tensors are read dequantised; None reads them as they are.

    Raises:
        ValueError: The weights are quantized.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        device: torch.device,
        dtype: torch.dtype | None,
        source: Source | None = None,
    ) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        folder, self.path = TensorFolder(path), Path(path)
        self._device = device
        self._folder: Any = folder
        config = AutoConfig.from_pretrained(path)
        if source is not None:
            self._folder, config = source.weights, source.config_class.from_dict(source.config)
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError(
                f"{path} has quantized weights; give dequantize=True, or load it dequantized with "
                "transformers, save it, and calibrate that folder"
            )
        if dtype is None:
            dtype = config.dtype or _stored_dtype(folder)
        with torch.device("meta"):
            self.model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        self.anatomy = Anatomy(self.model)
        self._dtype = dtype
        self._of_layer = re.compile(rf"^(?:{re.escape(self.anatomy.prefix)})?layers\.(\d+)\.")

    def load_frame(self) -> None:
        """Load what belongs to no layer, the head excepted, and make buffers that are not saved.

        Raises:
            ValueError: Weights are missing or do not fit.
        """
        base = self.anatomy.base
        in_layers = {id(m) for layer in self.anatomy.layers for m in layer.modules()}
        for module in base.modules():
            unsaved = module._non_persistent_buffers_set
            if unsaved and id(module) in in_layers:
                raise ValueError(
                    f"{type(module).__name__} in a decoder layer has buffers that are not saved; "
                    "use mode='resident'"
                )
            for name in unsaved:
                module._buffers[name] = torch.empty_like(module._buffers[name], device=self._device)
            if unsaved:
                self.model._init_weights(module)
        prefixes = tuple(
            f"{name}." for name, child in base.named_children() if child is not self.anatomy.layers
        )
        names = [
            name
            for name in self._folder
            if not self._of_layer.match(name)
            and name.removeprefix(self.anatomy.prefix).startswith(prefixes)
        ]
        self._load(names)
        self._require(base, "the model outside its layers", in_layers)

    def load_layer(self, index: int) -> None:
        """Load a layer's weights.

        Raises:
            ValueError: Weights are missing, unknown, or do not fit.
        """
        names = [
            name
            for name in self._folder
            if (match := self._of_layer.match(name)) and int(match[1]) == index
        ]
        self._load(names)
        self._require(self.anatomy.layers[index], self.anatomy.name(index), set())

    def drop_layer(self, index: int) -> None:
        """Free a layer's weights."""
        self.anatomy.layers[index].to("meta")

    def _load(self, names: Sequence[str]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        config = LoadStateDictConfig(
            device_map={"": self._device},
            dtype=self._dtype,
            dtype_plan=self.model._get_dtype_plan(self._dtype),
            weight_mapping=cast("Any", get_model_conversion_mapping(self.model)),
        )
        with _silent():
            report, _ = convert_and_load_state_dict_in_model(
                self.model, {name: self._folder[name] for name in names}, config
            )
        wrong = [*report.unexpected_keys, *report.mismatched_keys, *report.conversion_errors]
        wrong += report.error_msgs
        if wrong:
            raise ValueError(
                f"{self.path}: {wrong[0]} is unknown to {type(self.model).__name__}, or "
                "has another shape there"
            )

    def _require(self, module: nn.Module, place: str, apart: set[int]) -> None:
        for name, child in module.named_modules():
            if id(child) not in apart:
                own = {**child._parameters, **child._buffers}
                for key, tensor in own.items():
                    if tensor is not None and tensor.is_meta:
                        raise ValueError(f"{self.path} has no weights for {name}.{key} of {place}")


class Boundary:
    """Hidden states of all batches, between two layers.

    Args:
        batches: Their shapes are what is needed.
        like: A hidden state.
        folder: For a memory-mapped file; None keeps them in the host's memory.
    """

    def __init__(self, batches: Sequence[Batch], like: Tensor, folder: Path | None) -> None:
        self._shapes = [(*batch.input_ids.shape, like.shape[-1]) for batch in batches]
        sizes = [torch.Size(shape).numel() for shape in self._shapes]
        self._at = [0, *torch.tensor(sizes).cumsum(0).tolist()]
        if folder is None:
            pinned = like.is_cuda
            self._flat = torch.empty(self._at[-1], dtype=like.dtype, pin_memory=pinned)
        else:
            file = str(folder / "hidden_states")
            self._flat = torch.from_file(file, True, self._at[-1], dtype=like.dtype)

    def __getitem__(self, batch: int) -> Tensor:
        """A view ``[B, T, H]``, to be read and written."""
        return self._flat[self._at[batch] : self._at[batch + 1]].view(self._shapes[batch])


def run_layerwise(
    folder: LayerFolder,
    observer: Observer,
    batches: Sequence[Batch],
    *,
    device: torch.device,
    scratch: str | os.PathLike[str] | None,
    advance: Callable[[], object],
    join: Callable[[], Callable[[Batch, Tensor], None] | None],
) -> None:
    """Run all batches through one layer after the other, under an observer.

    The next layer is read in a thread while one runs, so at most two are in memory.

    Args:
        folder: Of the model; nothing needs to be loaded.
        observer: On the folder's model.
        batches: As run.
        device: For computation.
        scratch: A folder for the hidden states between layers, which take tokens times H times the
            size of the model's dtype; None keeps them in the host's memory.
        advance: Called after each batch in each layer.
        join: Called before the last layer runs; may join modules to the anatomy, and gives what
            runs them on a batch and the model's last hidden states.
    """
    anatomy = folder.anatomy
    layers = anatomy.layers
    last = len(layers) - 1
    folder.load_frame()
    with ExitStack() as stack:
        reader = stack.enter_context(ThreadPoolExecutor(1))
        place = None
        if scratch is not None:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=scratch)))
        relay = _Relay(batches, place)
        pending = reader.submit(folder.load_layer, 0)
        for index, layer in enumerate(layers):
            pending.result()
            if index < last:
                pending = reader.submit(folder.load_layer, index + 1)
            behind = join() if index == last else None
            watched = [index, *sorted(anatomy.mtp)] if index == last else [index]
            idle = [other for other in layers if other is not layer]
            idle += [] if index == last else anatomy.norms[-1].values()
            with (
                _handing_on(idle),
                relay.around(layer, first=index == 0, last=index == last),
                observer.watching(watched, start=index == 0, end=index == last),
            ):
                for at, batch in enumerate(batches):
                    relay.batch = at
                    observer.expect(batch.tokens, batch.counted)
                    ran = anatomy.base(**batch.inputs(device), use_cache=False)
                    if behind is not None:
                        behind(batch, ran.last_hidden_state)
                    advance()
            observer.check(everything=False)
            observer.release(index)
            folder.drop_layer(index)


class _Relay:
    """Brings a layer the hidden states of the one before, and takes its own."""

    def __init__(self, batches: Sequence[Batch], folder: Path | None) -> None:
        self._batches = batches
        self._folder = folder
        self._boundary: Boundary | None = None
        self.batch = 0

    @contextmanager
    def around(self, layer: nn.Module, *, first: bool, last: bool) -> Generator[None]:
        handles = []
        if not first:
            handles.append(layer.register_forward_pre_hook(self._bring, with_kwargs=True))
        if not last:
            handles.append(layer.register_forward_hook(self._take))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _bring(self, _module: nn.Module, args: Any, kwargs: Any) -> Any:
        assert self._boundary is not None
        hidden = self._boundary[self.batch]
        if args:
            return (hidden.to(args[0].device), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": hidden.to(kwargs["hidden_states"].device)}

    def _take(self, _module: nn.Module, _args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if self._boundary is None:
            self._boundary = Boundary(self._batches, hidden, self._folder)
        self._boundary[self.batch].copy_(hidden)


@contextmanager
def _handing_on(modules: Sequence[Any]) -> Generator[None]:
    """Have modules return their input. They stay in place, since models read their attributes."""
    for module in modules:
        module.forward = _hand_on
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _hand_on(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    return hidden_states


@contextmanager
def _silent() -> Generator[None]:
    """Without transformers' own bar, which would come once per layer."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _stored_dtype(folder: TensorFolder) -> torch.dtype:
    infos = (info for shard in folder.shards.values() for info in shard)
    return next((info.dtype for info in infos if info.dtype.is_floating_point), torch.float32)
