"""Modules of multi-token prediction (MTP) of Qwen3-Next and DeepSeek-V3.

Module k, of depth k = 1, 2, ..., reads what the one before it gave for a token, the model itself
for the first, and the embedding of the token k further on:
``h_k = Layer([RMSNorm(Emb(t_{i+k})); RMSNorm(h_{k-1})] W)`` (arXiv:2605.08738, section 3.3). Row i
then predicts token ``i + k + 1`` with the model's own head. Embedding and head are the model's.
The order of the two halves is that of released checkpoints. What is read of the model is behind its
last norm, and what a module gives behind its own, as transformers and vLLM have it.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from shared_kernels._checks import message
from torch import nn

from slimmoe.errors import UnsupportedModelError
from slimmoe.weights import Source

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

#: By family, the names of a module's parts on disk: of the two norms, of what joins them, of the
#: last norm; and what its layer's names begin with.
_NAMES = {
    "qwen3_next": ("mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.fc", "mtp.norm",
                   "mtp.layers.{mtp}."),
    "deepseek_v3": ("model.layers.{layer}.enorm", "model.layers.{layer}.hnorm",
                    "model.layers.{layer}.eh_proj", "model.layers.{layer}.shared_head.norm",
                    "model.layers.{layer}."),
}  # fmt: skip
_PARTS = ("embedding_norm", "hidden_norm", "projection", "norm")
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class MTPModule(nn.Module):
    """One module.

    Args:
        config: Of the model, with one layer more.
        layer_class: Of its decoder layers.
        norm_class: Of its norms.
        index: Of the layer.
    """

    def __init__(self, config: Any, layer_class: type, norm_class: type, index: int) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.embedding_norm = norm_class(width, eps=eps)
        self.hidden_norm = norm_class(width, eps=eps)
        self.projection = nn.Linear(2 * width, width, bias=False)
        self.layer = layer_class(config, index)
        self.norm = norm_class(width, eps=eps)

    def forward(self, embeddings: Tensor, hidden: Tensor, **context: Any) -> Tensor:
        """Return what is given for each token, ``(B, T, D)``.

        Args:
            embeddings: ``(B, T, D)``, of tokens further on.
            hidden: ``(B, T, D)``, what the module before gave.
            context: Masks and positions, as a decoder layer takes them.
        """
        both = torch.cat([self.embedding_norm(embeddings), self.hidden_norm(hidden)], -1)
        found = self.layer(self.projection(both), **context)
        return self.norm(found[0] if isinstance(found, tuple) else found)


class MTPHead(nn.Module):
    """All modules of a model.

    Args:
        model: Of transformers, whose embeddings, positions and head they share.
        count: How many.

    Attributes:
        modules_: In order of their depth.
    """

    def __init__(self, model: Any, count: int = 1) -> None:
        super().__init__()
        family = model.config.model_type
        if family not in _NAMES:
            raise UnsupportedModelError(
                f"model: {family} has no modules of multi-token prediction that are known; these "
                f"have: {list(_NAMES)}"
            )
        if count < 1:
            raise ValueError(message("count", "at least 1", count, "a model without has no head"))
        # held without being a part: neither is saved or moved twice
        self._model = (model,)
        decoder = model.get_decoder()
        config = copy.deepcopy(model.config)
        layers = int(config.num_hidden_layers)
        config.num_hidden_layers = layers + count
        if getattr(config, "layer_types", None):
            config.layer_types = [*config.layer_types, *["full_attention"] * count]
        if getattr(config, "mlp_only_layers", None) is not None:
            # modules have experts, whatever their number is
            config.mlp_only_layers, config.decoder_sparse_step = [], 1
        layer_class, norm_class = type(decoder.layers[-1]), type(decoder.norm)
        self.config = config
        self.modules_ = nn.ModuleList(
            MTPModule(config, layer_class, norm_class, layers + depth) for depth in range(count)
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path | Source, model: Any) -> MTPHead:
        """Read the modules of a folder.

        Args:
            folder: With a model and its modules, or a `slimmoe.weights.Source` of it.
            model: The same, loaded by transformers, which leaves modules aside.

        Raises:
            UnsupportedModelError: The family has none that are known.
            ValueError: The folder has none, or of another model.
        """
        source = folder if isinstance(folder, Source) else Source(folder)
        count = len({match.mtp for match in source.matches.values() if match.mtp is not None})
        if not count:
            remedy = "its files have no such tensors"
            raise ValueError(message("folder", "modules of MTP", str(source.path), remedy))
        with torch.device("meta"):
            made = cls(model, count)
        weight = model.get_input_embeddings().weight
        state = {name: tensor.to(weight) for name, tensor in made._read(source)}
        wanted = {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if found != wanted:
            differ = sorted(n for n in found.keys() | wanted if found.get(n) != wanted.get(n))
            raise ValueError(message("folder", "modules of this model", differ[:3], "they differ"))
        made.load_state_dict(state, assign=True)
        return made.train(model.training)

    @staticmethod
    def is_in(folder: str | Path | Source, config: Any) -> bool:
        """Return whether a folder has modules of a kind that is known.

        Args:
            folder: With safetensors, or a `slimmoe.weights.Source` of it.
            config: Of its model.
        """
        if config.model_type not in _NAMES:
            return False
        source = folder if isinstance(folder, Source) else Source(folder)
        return any(match.mtp is not None for match in source.matches.values())

    # --- names on disk ---------------------------------------------------------------------------

    def norms(self, depth: int) -> dict[str, nn.Module]:
        """Return norms over the residual stream of a module, by their names on disk."""
        parts, prefix = self._names(depth)
        module = self.modules_[depth]
        found = {name: getattr(module, part) for part, name in zip(_PARTS, parts, strict=True)
                 if part != "projection"}  # fmt: skip
        layer = self._layer(depth)
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[prefix + name] = getattr(layer, name)
        return found

    def _names(self, depth: int) -> tuple[list[str], str]:
        """Return names of a module's parts on disk, and what its layer's begin with."""
        layers = int(self.config.num_hidden_layers) - len(self.modules_)
        *parts, layer = (name.format(mtp=depth, layer=layers + depth)
                         for name in _NAMES[self.config.model_type])  # fmt: skip
        return parts, layer

    def _layer(self, depth: int) -> nn.Module:
        found = self.modules_[depth].layer
        assert isinstance(found, nn.Module)
        return found

    def _read(self, source: Source) -> Iterator[tuple[str, Tensor]]:
        """Return tensors by their names here."""

        def read(name: str) -> Tensor:
            if name not in source.matches:
                remedy = "its modules of MTP are not whole"
                raise ValueError(message("folder", f"a tensor {name}", str(source.path), remedy))
            return source.weights.read(name)

        for depth in range(len(self.modules_)):
            parts, prefix = self._names(depth)
            for part, name in zip(_PARTS, parts, strict=True):
                yield f"modules_.{depth}.{part}.weight", read(f"{name}.weight")
            count = source.family.count(source.config)
            for name in self._layer(depth).state_dict():
                here = f"modules_.{depth}.layer.{name}"
                if prefix + name in source.matches:
                    yield here, read(prefix + name)
                    continue
                experts = f"{prefix}{name.rpartition('.')[0]}."
                if name.endswith("experts.gate_up_proj"):
                    names = [[f"{experts}{e}.{part}.weight" for part in _PROJECTIONS[:2]]
                             for e in range(count)]  # fmt: skip
                    yield here, torch.stack([torch.cat(list(map(read, two))) for two in names])
                elif name.endswith("experts.down_proj"):
                    yield here, torch.stack([
                        read(f"{experts}{e}.down_proj.weight") for e in range(count)
                    ])  # fmt: skip

    def tensors(self, state: Mapping[str, Tensor] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Return tensors by their names on disk, experts apart as in released checkpoints.

        Args:
            state: Weights by their names here, where they are not those of ``state_dict()``.
        """
        state = self.state_dict() if state is None else state
        for depth in range(len(self.modules_)):
            parts, prefix = self._names(depth)
            before = f"modules_.{depth}."
            for part, name in zip(_PARTS, parts, strict=True):
                yield f"{name}.weight", state[f"{before}{part}.weight"]
            for name in self._layer(depth).state_dict():
                tensor = state[f"{before}layer.{name}"]
                experts = f"{prefix}{name.rpartition('.')[0]}."
                if name.endswith("experts.gate_up_proj"):
                    for e, both in enumerate(tensor):
                        for part, half in zip(_PROJECTIONS, both.chunk(2), strict=False):
                            yield f"{experts}{e}.{part}.weight", half.contiguous()
                elif name.endswith("experts.down_proj"):
                    for e, down in enumerate(tensor):
                        yield f"{experts}{e}.down_proj.weight", down
                else:
                    yield prefix + name, tensor

    # --- running ---------------------------------------------------------------------------------

    def forward(
        self,
        hidden: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> list[Tensor]:
        """Return what each module gives when it is told the tokens, ``(B, T - k, D)`` at depth k.

        Row i of depth k has seen tokens up to ``i + k`` and predicts token ``i + k + 1``.

        Args:
            hidden: ``(B, T, D)``, the model's last hidden state.
            input_ids: ``(B, T)``.
            attention_mask: ``(B, T)``, 0 where there is no token.
            position_ids: ``(B, T)`` of the tokens.

        Raises:
            ValueError: Sequences that are no longer than there are modules.
        """
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)
            position_ids = position_ids[None].expand_as(input_ids)
        found = []
        for depth in range(1, len(self.modules_) + 1):
            hidden = self.step(depth, hidden, input_ids, attention_mask, position_ids)
            found.append(hidden)
        return found

    def step(
        self,
        depth: int,
        hidden: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
    ) -> Tensor:
        """Return what the module of a depth gives, ``(B, T - depth, D)``.

        Args:
            depth: From 1 on.
            hidden: What the one before gave, ``(B, T - depth + 1, D)``.
            input_ids: Of `forward`.
            attention_mask: Of `forward`.
            position_ids: Of `forward`.

        Raises:
            ValueError: Sequences that are no longer than the depth.
        """
        size = input_ids.shape[1]
        if size <= depth:
            remedy = "a module looks ahead"
            raise ValueError(message("input_ids", f"over {depth} tokens", size, remedy))
        embeddings = self._model[0].get_input_embeddings()(input_ids[:, depth:])
        # a row is of two tokens: behind padding, the first that is told has none before it
        mask = None
        if attention_mask is not None:
            mask = attention_mask[:, depth:] * attention_mask[:, : size - depth]
        context = self.context(embeddings, mask, position_ids[:, depth:])
        return self.modules_[depth - 1](embeddings, hidden[:, : size - depth], **context)

    def context(
        self, embeddings: Tensor, attention_mask: Tensor | None, position_ids: Tensor
    ) -> dict[str, Any]:
        """Return masks and positions as a decoder layer takes them."""
        from transformers.masking_utils import create_causal_mask

        mask = create_causal_mask(
            config=self.config, inputs_embeds=embeddings, attention_mask=attention_mask,
            past_key_values=None, position_ids=position_ids,
        )  # fmt: skip
        rotary = self._model[0].get_decoder().rotary_emb
        return {"attention_mask": mask, "position_ids": position_ids,
                "position_embeddings": rotary(embeddings, position_ids)}  # fmt: skip
