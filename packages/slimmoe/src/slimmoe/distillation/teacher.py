"""The model that is distilled from."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels._checks import message
from shared_kernels.models import Head
from shared_kernels.offload import OffloadEngine, WeightStore, discover_blocks, layout_unit

from slimmoe.distillation.alignment import check_tokenizers, tokenizer_of
from slimmoe.distillation.rows import INDEX
from slimmoe.errors import UnsupportedModelError
from slimmoe.weights import Source, load_model

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

#: Numbers of each tensor by which a teacher is known again.
_SAMPLES = 64


class Teacher:
    """A model whose last hidden states and head are all that is asked for.

    It is not trained, wrapped or checkpointed, and its logits are never there as a whole.

    With ``offload`` its layers stay in the host's memory, page-locked where there is a GPU, and two
    at a time are on the device: one that runs, and the next, which is copied meanwhile. Embeddings,
    the last norm and the head are there all the time. Each process has its own copy. The numbers
    are those of a teacher on the device; on a CPU, bit for bit.

    Args:
        model: Of transformers; with ``offload`` its weights are in the host's memory, and are taken
            over.
        offload: Whether its layers stay in the host's memory.
        device: To which it is moved, now; else where `to` says.

    Attributes:
        path: Folder or name that it was loaded from, if that is known.

    Raises:
        UnsupportedModelError: Its logits are more than a product with the head, or its layers,
            which are to be offloaded, are already moved by something else.
    """

    def __init__(
        self, model: Any, *, offload: bool = False, device: torch.device | str | None = None
    ) -> None:
        if offload:
            _check_whole(model)
        check_head(model, "teacher_model")
        self.model = model.eval().requires_grad_(False)
        self.path: str | None = getattr(model, "name_or_path", None) or None
        self.engine: OffloadEngine | None = None
        self._offload = offload
        self._fingerprint: str | None = None
        if device is not None:
            self.to(torch.device(device))

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        offload: bool = False,
        device: torch.device | str | None = None,
        dequantize: bool = False,
        **options: Any,
    ) -> Teacher:
        """Load one with ``AutoModelForCausalLM``, in the dtype of its files unless told otherwise.

        Args:
            path: Folder or name on the Hub.
            offload: Whether its layers stay in the host's memory.
            device: To which it is moved.
            dequantize: Whether a folder in FP8 or MXFP4 is read as bfloat16, see
                `slimmoe.dequantize`; ``options`` are not for it.
            options: Of ``AutoModelForCausalLM.from_pretrained``.
        """
        if dequantize:
            if options:
                remedy = "a folder is dequantised as it is"
                raise ValueError(message("options", "none", sorted(options), remedy))
            model = load_model(Source(path, dequantize=True))
            # where it came from, for its tokenizer
            model.name_or_path = str(path)
        else:
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_pretrained(path, **options)
        return cls(model, offload=offload, device=device)

    def to(self, device: torch.device) -> Teacher:
        """Move it to a device.

        Raises:
            ValueError: It is offloaded, and from another device.
        """
        if not self._offload:
            self.model.to(device)
            return self
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if self.engine is None:
            # afterwards, weights are only there while they are used
            self.fingerprint()
            self.engine = _offloaded(self.model, device)
        elif self.engine.device != device:
            raise ValueError(
                f"teacher_model: expected one that runs on {device}, got one that is offloaded and "
                f"runs on {self.engine.device}; give Teacher(model, offload=True) without a device"
            )
        return self

    @property
    def weight(self) -> Tensor:
        """The head, ``(V, H)``."""
        return self.model.get_output_embeddings().weight

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return last hidden states, ``(B, T, H)``.

        Args:
            inputs: Token ids, and what else a model takes; labels and what is of a cache are left
                out.
        """
        known = {key: value for key, value in inputs.items() if key not in ("labels", INDEX)}
        return self.model.get_decoder()(**known, use_cache=False).last_hidden_state

    def fingerprint(self) -> str:
        """Return a hash of names, shapes, dtypes and some numbers of each of its tensors."""
        if self._fingerprint is None:
            found = hashlib.sha256()
            for name, tensor in self.model.state_dict().items():
                found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
                some = tensor.reshape(-1)[:: max(1, tensor.numel() // _SAMPLES)]
                found.update(some.cpu().contiguous().view(torch.uint8).numpy().tobytes())
            self._fingerprint = found.hexdigest()
        return self._fingerprint

    def check_tokenizer(self, student: Any) -> None:
        """Refuse a student whose tokens have other ids, if both tokenizers are known.

        Args:
            student: Its tokenizer, or None.

        Raises:
            ValueError: They differ.
        """
        if student is not None:
            check_tokenizers(student, tokenizer_of(self.path))


def check_head(model: Any, name: str) -> None:
    """Refuse a model whose logits are more than a product of hidden states and head.

    Raises:
        UnsupportedModelError: They are scaled, capped, or have a bias.
    """
    head = Head.of(model)
    if (
        not head.is_plain()
        or head.module.bias is not None
        or head.scale != 1
        or head.softcap is not None
    ):
        raise UnsupportedModelError(
            f"{name}: expected logits that are hidden states times the head, got some that are "
            "scaled, capped or have a bias; this loss cannot make them"
        )


def _check_whole(model: Any) -> None:
    """Refuse weights that something else moves, or that are not there."""
    moved = any(hasattr(module, "_hf_hook") for module in model.modules())
    if moved or any(p.is_meta for p in model.parameters()):
        raise UnsupportedModelError(
            "teacher_model: expected weights in the host's memory to offload, got some that are "
            "placed by a device_map; load it without one"
        )


def _offloaded(model: Any, device: torch.device) -> OffloadEngine:
    """Take the layers of a model over; the rest goes to the device."""
    plan = discover_blocks(model)
    layouts = [layout_unit(unit, {}) for unit in plan.units]
    resident, sizes = plan.resident.index, [layout.nbytes for layout in layouts]
    # a layer's own memory is given back when it is in the store
    freed = sum(sizes[:resident]) - max(sizes[:resident])
    store = WeightStore(layouts, device, [resident], freed_meanwhile=freed)
    for unit, layout in zip(plan.units, layouts, strict=True):
        values = {ref.name: ref.parameter.detach() for ref in unit.params}
        layout.write(store.home(unit.index).flat, values)
        for ref in unit.params:
            ref.parameter.data = ref.parameter.data.new_empty(()).expand(ref.shape)
    engine = OffloadEngine(model, plan, store, prefetch=1)
    engine.bind_resident(None, training=False)
    return engine
