"""Directions of the residual stream, and weights written into modules of transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from shared_kernels._checks import check_choice, message

if TYPE_CHECKING:
    from torch import Tensor

    from pahq.graph import Graph

FAMILIES = ("gpt2", "llama")
#: What one unit of a signal is divided by in a norm: the root mean square of the constant.
SCALE = 100.0


class Frame:
    """Orthonormal directions of the residual stream, one of which holds a large constant.

    Norms divide by the length of the stream. The constant is so much larger than all signals that
    the length, and with it what norms make of a signal, stays as it is: a signal ``x`` comes out as
    ``x / SCALE``, off by the squared length of all signals over ``2 SCALE^2 D``. It lies in the
    first coordinate, that of signals is 0, so they are not rounded to its precision; with a layer
    norm in the first two, one the negative of the other, and all directions have mean 0, so that
    subtracting the mean moves nothing. All others are turned at random.

    Args:
        family: One of `FAMILIES`; GPT-2 has layer norms.
        width: D.
        features: Directions of the embeddings.
        senders: Numbers of the heads and MLPs that have a direction each.
        draws: Where directions come from.

    Attributes:
        constant: float64 ``(D,)``.
        features: float64 ``(F, D)``.
        of: By sender, float64 ``(D,)``.
        junk: float64 ``(J, D)``, what no part of the circuit reads.

    Raises:
        ValueError: The width has no room for them and two directions of junk.
    """

    def __init__(
        self, family: str, width: int, features: int, senders: list[int], draws: torch.Generator
    ) -> None:
        apart = 2 if family == "gpt2" else 1
        room = width - apart - (apart == 2)
        needed = width - room + features + len(senders) + 2
        if width < needed:
            remedy = "each part of the circuit has a direction of its own"
            raise ValueError(message("width", f"at least {needed}", width, remedy))
        columns = torch.randn(width - apart, width - apart, dtype=torch.float64, generator=draws)
        if apart == 2:
            columns[:, 0] = 1
        turned = torch.linalg.qr(columns)[0].T[-room:]
        rows = torch.cat([turned.new_zeros(room, apart), turned], 1)
        self.constant = torch.zeros(width, dtype=torch.float64)
        self.constant[:apart] = torch.tensor([1.0, -1.0][:apart]) / apart**0.5
        self.features = rows[:features]
        self.of = dict(zip(senders, rows[features:], strict=False))
        self.junk = rows[features + len(senders) :]

    @property
    def offset(self) -> Tensor:
        """Return what reads 1 behind a norm, ``(D,)``."""
        return self.constant / self.constant.numel() ** 0.5

    def reader(self, count: int, draws: torch.Generator) -> Tensor:
        """Return random rows that read all signals but not the constant, ``(n, D)``."""
        width = self.constant.numel()
        rows = torch.randn(count, width, dtype=torch.float64, generator=draws)
        return SCALE * rows * (self.constant == 0) / width**0.5

    def writer(self, count: int, draws: torch.Generator) -> Tensor:
        """Return random columns that write to the junk alone, ``(D, n)``."""
        mix = torch.randn(len(self.junk), count, dtype=torch.float64, generator=draws)
        return self.junk.T @ mix


def new_model(family: str, graph: Graph, width: int, inner: int, vocabulary: int) -> Any:
    """Return a float64 model of that shape in evaluation mode, with norms of ones.

    Raises:
        ValueError: Another family, heads that do not divide the width into parts of an even
            number of dimensions, or what a family does not have: grouped keys in GPT-2.
    """
    import transformers

    check_choice("family", family, FAMILIES)
    if graph.parallel:
        raise ValueError(message("graph", "MLPs after heads", graph, "no family here has others"))
    if width % (2 * graph.heads):
        remedy = "each head has an even number of dimensions"
        raise ValueError(message("width", f"a multiple of {2 * graph.heads}", width, remedy))
    common: dict[str, Any] = {
        "vocab_size": vocabulary, "tie_word_embeddings": False, "bos_token_id": None,
        "eos_token_id": None,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        if family == "gpt2":
            if graph.key_heads != graph.heads:
                remedy = "GPT-2 has no grouped keys"
                raise ValueError(message("graph", "key_heads equal to heads", graph, remedy))
            config = transformers.GPT2Config(
                n_layer=graph.layers, n_head=graph.heads, n_embd=width, n_inner=inner,
                n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **common,
            )  # fmt: skip
            model: Any = transformers.GPT2LMHeadModel(config)
        else:
            config = transformers.LlamaConfig(
                num_hidden_layers=graph.layers, num_attention_heads=graph.heads,
                num_key_value_heads=graph.key_heads, hidden_size=width, intermediate_size=inner,
                max_position_embeddings=64, **common,
                rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            )  # fmt: skip
            model = transformers.LlamaForCausalLM(config)
    return model.double().eval()


def write_embeddings(model: Any, tokens: Tensor, positions: Tensor, head: Tensor) -> None:
    """Set what tokens ``(V, D)`` and positions ``(P, D)`` add, and what reads logits ``(V, D)``.

    A family without embeddings of positions does without them.
    """
    model.get_input_embeddings().weight.copy_(tokens)
    model.get_output_embeddings().weight.copy_(head)
    if model.config.model_type == "gpt2":
        model.transformer.wpe.weight.copy_(positions)


def write_attention(model: Any, layer: int, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> None:
    """Set a layer's heads: ``(H, d, D)``, keys and values ``(K, d, D)``, and ``(H, D, d)``."""
    parts = [part.flatten(0, 1) for part in (q, k, v)]
    out = o.transpose(0, 1).flatten(1)
    if model.config.model_type == "gpt2":
        attention = model.transformer.h[layer].attn
        # Conv1D: (in, out)
        attention.c_attn.weight.copy_(torch.cat(parts).T)
        attention.c_proj.weight.copy_(out.T)
        return
    attention = model.model.layers[layer].self_attn
    for name, part in zip("qkv", parts, strict=True):
        getattr(attention, f"{name}_proj").weight.copy_(part)
    attention.o_proj.weight.copy_(out)


def write_mlp(model: Any, layer: int, into: Tensor, gain: Tensor, out: Tensor) -> None:
    """Set a layer's MLP: what is activated ``(m, D)``, what multiplies it, and ``(D, m)``.

    A family without gates does without what multiplies.
    """
    if model.config.model_type == "gpt2":
        mlp = model.transformer.h[layer].mlp
        mlp.c_fc.weight.copy_(into.T)
        mlp.c_proj.weight.copy_(out.T)
        return
    mlp = model.model.layers[layer].mlp
    mlp.gate_proj.weight.copy_(into)
    mlp.up_proj.weight.copy_(gain)
    mlp.down_proj.weight.copy_(out)
