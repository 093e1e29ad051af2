"""Where weights come from: a folder of safetensors, or a model in memory."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from shared_kernels.checkpoint import TensorFolder

from slimmoe.architectures import architecture_of
from slimmoe.errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import Tensor

    from slimmoe.architectures import Architecture, Match


class Weights(Protocol):
    """Tensors by name, read when they are asked for."""

    def __iter__(self) -> Iterator[str]:
        """Return all names."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor."""
        ...

    def read(self, name: str, index: Any = ...) -> Tensor:
        """Return a tensor, or the part of it that an index gives."""
        ...


class FolderWeights:
    """Tensors of a folder.

    Args:
        path: With safetensors, one file or several.
    """

    def __init__(self, path: str | Path) -> None:
        self.folder = TensorFolder(path)
        self._infos = {t.name: t for infos in self.folder.shards.values() for t in infos}

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._infos[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor."""
        return self._infos[name].dtype

    def read(self, name: str, index: Any = ...) -> Tensor:
        """Return a tensor, or the part of it that an index gives."""
        return self.folder.part(name, index)


class ModelWeights:
    """Tensors of a model in memory.

    Args:
        model: Of transformers.
    """

    def __init__(self, model: Any) -> None:
        self._tensors: dict[str, Tensor] = model.state_dict()
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        # a file has what is tied once
        for name in tied:
            self._tensors.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor."""
        return self._tensors[name].dtype

    def read(self, name: str, index: Any = ...) -> Tensor:
        """Return a tensor, or the part of it that an index gives."""
        return self._tensors[name].detach()[index]


class Source:
    """A model that is compressed.

    Args:
        model: A folder, or a model of transformers in memory.
        dequantize: Whether quantised tensors of a folder are read as bfloat16, see
            `slimmoe.dequantize`; else they are refused.

    Attributes:
        config: As ``config.json`` has it, with all that its class fills in.
        family: Of the model.
        weights: Its tensors.
        matches: What each tensor is, by name.

    Raises:
        UnsupportedModelError: Another family, quantised weights, or a tensor that no table knows.
    """

    def __init__(self, model: Any, *, dequantize: bool = False) -> None:
        from transformers import AutoConfig

        in_memory = not isinstance(model, str | Path)
        self.path = None if in_memory else Path(model)
        made = model.config if in_memory else AutoConfig.from_pretrained(model)
        self.config_class = type(made)
        # as a file has it, without where it was and what wrote it
        self.config: dict[str, Any] = {
            key: value
            for key, value in json.loads(made.to_json_string(use_diff=False)).items()
            if not key.startswith("_") and key != "transformers_version"
        }
        self.family: Architecture = architecture_of(self.config)
        quantization = self.config.pop("quantization_config", None)
        if quantization and (in_memory or not dequantize):
            raise UnsupportedModelError(
                "config.json: expected weights that are not quantised, got a quantization_config; "
                "give dequantize=True (--dequantize) for a folder in FP8 or MXFP4, or save the "
                "model dequantised first"
            )
        self.weights: Weights = ModelWeights(model) if in_memory else FolderWeights(model)
        if quantization:
            from slimmoe.dequantize import Dequantized

            self.weights = Dequantized(self.weights, quantization)
        self.matches: dict[str, Match] = {
            name: self.family.match(name, self.config) for name in self.weights
        }

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return int(self.config["num_hidden_layers"])

    def place(self, match: Match) -> int | None:
        """Return the layer of a tensor; modules of MTP are counted behind the decoder's layers."""
        return match.layer if match.mtp is None else self.layers + match.mtp

    @cached_property
    def _by_place(self) -> dict[int, list[Match]]:
        found: dict[int, list[Match]] = {}
        for match in self.matches.values():
            place = self.place(match)
            if place is not None:
                found.setdefault(place, []).append(match)
        return found

    def at(self, place: int) -> list[Match]:
        """Return the tensors of a layer."""
        return self._by_place.get(place, [])

    def places(self) -> list[int]:
        """Return layers with experts."""
        return sorted(
            place
            for place, matches in self._by_place.items()
            if any(match.row.router for match in matches)
        )


def load_model(source: Source, dtype: torch.dtype | None = None) -> Any:
    """Return the model of a folder, whole in memory, without modules of MTP.

    Args:
        source: Of the folder; its tensors may be dequantised.
        dtype: To load it in; by default that of its configuration.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = source.config_class.from_dict(source.config)
    with torch.device("meta"):
        kind: Any = type(AutoModelForCausalLM.from_config(config))
    state = {name: source.weights.read(name) for name, match in source.matches.items()
             if match.mtp is None}  # fmt: skip
    return kind.from_pretrained(None, config=config, state_dict=state, dtype=dtype or "auto").eval()
