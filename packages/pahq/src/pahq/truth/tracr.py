"""Programs as transformers, whose circuit can be read off their weights.

tracr (arXiv:2301.05062) compiles a program of RASP. Each variable of it has directions of the
residual stream of its own, and no norm mixes them: an edge can only matter if its sender writes a
direction that its receiver reads. Most of these edges do matter. Those that do not have one of two
reasons: a head that selects all tokens gives all keys the same score, whatever its queries and keys
are; and a head attends to the BOS token where no key is selected, which is read for nothing if that
never happens. What matters is told from the rest by trying each edge on every input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from shared_kernels._checks import check_range, message
from torch import nn
from torch.nn import functional

from pahq.ablation import from_senders
from pahq.adapters import adapter_of
from pahq.circuit import Circuit
from pahq.forward import Executor
from pahq.graph import Graph
from pahq.metrics import CustomMetric
from pahq.tasks import Task

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    #: What inputs hold.
    Value = str | float

#: Inputs that are all tried; programs with more want ``n``.
_MOST = 1 << 16
#: Of an edge that matters, the least change of an output. Outputs are 0 and 1, or shares.
_CHANGE = 1e-3
#: Parameters of a block, and what tracr calls them.
_LINEARS = {
    "parts.q": "attn/query", "parts.k": "attn/key", "parts.v": "attn/value",
    "output": "attn/linear", "inner": "mlp/linear_1", "outer": "mlp/linear_2",
}  # fmt: skip


# --- the model ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TracrConfig:
    """Sizes of a model.

    Attributes:
        layers: L.
        heads: H.
        head_dim: d.
        hidden_size: D.
        inner: F, of MLPs.
        vocabulary: Tokens, BOS and padding among them.
        max_position_embeddings: Positions, that of BOS among them.
        outputs: Logits.
        causal: Whether queries see the keys up to their own position only.
    """

    layers: int
    heads: int
    head_dim: int
    hidden_size: int
    inner: int
    vocabulary: int
    max_position_embeddings: int
    outputs: int
    causal: bool

    model_type = "tracr"

    def get_text_config(self) -> TracrConfig:
        """Return itself, as configurations of transformers do."""
        return self


class Output(NamedTuple):
    """What a model returns.

    Attributes:
        logits: ``(N, T, V)``; the numbers themselves where the output is numerical, with V = 1.
    """

    logits: Tensor


class Block(nn.Module):
    """Attention without norms, and an MLP with a rectifier."""

    def __init__(self, config: TracrConfig) -> None:
        super().__init__()
        self.config = config
        width, joint = config.hidden_size, config.heads * config.head_dim
        self.parts = nn.ModuleDict({part: nn.Linear(width, joint) for part in "qkv"})
        self.output = nn.Linear(joint, width)
        self.inner = nn.Linear(width, config.inner)
        self.outer = nn.Linear(config.inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the residual stream ``(N, T, D)`` after the block."""
        q, k, v = (
            self.parts[part](x).unflatten(-1, (self.config.heads, -1)).transpose(1, 2)
            for part in "qkv"
        )
        found = functional.scaled_dot_product_attention(q, k, v, is_causal=self.config.causal)
        x = x + self.output(found.transpose(1, 2).flatten(2))
        return x + self.outer(self.inner(x).relu())


class TracrModel(nn.Module):
    """What tracr compiles to, in torch: token and position embeddings, blocks, and a projection.

    Args:
        config: Its sizes.
    """

    def __init__(self, config: TracrConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.hidden_size)
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.unembed = nn.Linear(config.hidden_size, config.outputs, bias=False)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Return what enters the residual stream, ``(N, T, D)``."""
        index = torch.arange(input_ids.shape[1], device=input_ids.device)
        return self.tokens(input_ids) + self.positions(index)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Output:
        """Run on int64 ``(N, T)``.

        Args:
            input_ids: BOS and what follows it.
            use_cache: As models of transformers have it; there is no cache.
        """
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return Output(self.unembed(x))

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the embeddings of tokens."""
        return self.tokens

    def get_output_embeddings(self) -> nn.Linear:
        """Return what reads logits."""
        return self.unembed


def to_torch(assembled: Any) -> TracrModel:
    """Return the model that tracr assembled, float32, in evaluation mode.

    Args:
        assembled: What ``tracr.compiler.compiling.compile_rasp_to_model`` returns.

    Raises:
        ValueError: It has layer norms or another activation than tracr's own models.
    """
    # what unembeds is no parameter, but part of a function
    import haiku

    params, shape = assembled.params, assembled.model_config
    if shape.layer_norm or shape.activation_function(-1.0) or shape.activation_function(2.0) != 2:
        remedy = "tracr compiles to such models"
        raise ValueError(message("assembled", "no norms, and rectifiers", shape, remedy))

    def unembedded(x: Any) -> Any:
        return assembled.get_compiled_model().unembed(x, use_unembed_argmax=False)

    def read(module: str, name: str) -> Tensor:
        return torch.from_numpy(np.array(params[module][name]))

    state = {
        "tokens.weight": read("token_embed", "embeddings"),
        "positions.weight": read("pos_embed", "embeddings"),
    }
    width = state["tokens.weight"].shape[1]
    every = np.eye(width, dtype=np.float32)
    head = haiku.without_apply_rng(haiku.transform(unembedded)).apply(params, every)
    # of a single output the last dimension is left out
    state["unembed.weight"] = torch.from_numpy(np.array(head)).view(width, -1).T
    for layer in range(shape.num_layers):
        for name, theirs in _LINEARS.items():
            module = f"transformer/layer_{layer}/{theirs}"
            state[f"blocks.{layer}.{name}.weight"] = read(module, "w").T
            state[f"blocks.{layer}.{name}.bias"] = read(module, "b")
    model = TracrModel(TracrConfig(
        layers=shape.num_layers, heads=shape.num_heads, head_dim=shape.key_size, hidden_size=width,
        inner=shape.mlp_hidden_size, vocabulary=len(state["tokens.weight"]),
        max_position_embeddings=len(state["positions.weight"]),
        outputs=len(state["unembed.weight"]), causal=shape.causal,
    ))  # fmt: skip
    model.load_state_dict(state)
    return model.eval()


# --- which edges there are ------------------------------------------------------------------------


def supported(model: TracrModel) -> Circuit:
    """Return the edges that weights have.

    The sender writes a dimension of the residual stream that the receiver reads, and from the
    receiver such edges lead on to the logits. What heads and MLPs write from inner dimensions that
    nothing enters does not count, nor what they read into those that nothing leaves.
    """
    adapter, config = adapter_of(model), model.config
    graph = Graph(config.layers, config.heads, config.heads)
    embedded = torch.cat([model.tokens.weight, model.positions.weight]).detach()
    # (n, D) each, in the order of senders and of receivers
    writes, reads = [embedded.any(0)[None]], []
    for layer in range(config.layers):
        (q, q_in), (k, k_in), (v, v_in) = (_entered(*adapter.weights(layer, p)) for p in "qkv")
        o, block = adapter.output(layer)[0] != 0, adapter.feed_forward(layer)
        inner, inner_in = _entered(block.inner, block.inner_bias)
        outer = block.outer != 0
        reads += [_through(q, k_in), _through(k, q_in), _through(v, o.any(1))]
        reads.append(_through(inner, outer.any(0))[None])
        writes += [_through(o.mT, v_in), _through(outer.T, inner_in)[None]]
    reads.append((model.unembed.weight.detach() != 0).any(0)[None])
    share = torch.cat(writes).float() @ torch.cat(reads).float().T
    present = (share.cpu() > 0) & torch.from_numpy(graph.full())
    for receiver in graph.order():
        readers = graph.readers(receiver)
        if readers and not present[readers].any():
            present[:, receiver] = False
    return Circuit(graph, present, present.float(), {"method": "weights"})


def _entered(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return where ``(..., n, D)`` is not 0, and which of n inner dimensions anything enters."""
    found = weight != 0
    return found, found.any(-1) if bias is None else found.any(-1) | (bias != 0)


def _through(weight: Tensor, inner: Tensor) -> Tensor:
    """Return which dimensions ``(..., D)`` weights ``(..., n, D)`` join to some inner ones."""
    return (weight & inner[..., None]).any(-2)


@torch.no_grad()
def _changes(model: TracrModel, support: Circuit, inputs: Sequence[Tensor]) -> Tensor:
    """Return how much an output changes at most where an edge carries nothing, ``(S, R)``.

    Args:
        model: Of the edges.
        support: Those that are tried.
        inputs: int64 ``(N, T)`` each, BOS first; its own output says nothing.
    """
    executor, graph = Executor(adapter_of(model), support.graph), support.graph
    changes = torch.zeros(graph.senders, graph.receivers)
    for ids in inputs:
        plain = executor.plain(ids)
        nothing = from_senders(executor, torch.zeros_like(plain.senders))
        whole = executor.adapter.logits(plain.final)
        for sender, receiver in support.present.nonzero().tolist():
            present = torch.from_numpy(graph.full())
            present[sender, receiver] = False
            found = executor.adapter.logits(executor.run(present, ids, nothing).final)
            change = float((found - whole)[:, 1:].abs().max())
            changes[sender, receiver] = max(change, float(changes[sender, receiver]))
    return changes


# --- programs -------------------------------------------------------------------------------------


@dataclass
class Program:
    """A compiled program and what is true of it.

    Attributes:
        model: It, in torch.
        circuit: The edges that matter: some output changes if one of them carries nothing. Each has
            a score of 1, all others 0. It is the circuit for ``ablation="zero"``: on a corrupted
            input of the same length an edge may carry what it did.
        support: Those that weights have, `supported`; the circuit is a part of it.
        tokens: Ids of all values that inputs have.
        bos: Id of what stands before each input.
        outputs: The values that logits stand for; None if the output is a number, the only logit.
    """

    model: TracrModel
    circuit: Circuit
    support: Circuit
    tokens: Mapping[Value, int]
    bos: int
    outputs: Sequence[Value] | None

    def encode(self, inputs: Sequence[Sequence[Value]]) -> Tensor:
        """Return int64 ``(N, T)``: BOS and N inputs of T - 1 values each."""
        return torch.tensor([[self.bos, *(self.tokens[value] for value in x)] for x in inputs])

    @torch.no_grad()
    def task(self, n: int | None = None, *, length: int | None = None, seed: int = 0) -> Task:
        """Return inputs of one length, with an example for each token of each.

        The answer is the model's, wrong answers are all others; a numerical output has 0 as its
        answer, the only logit, and is judged by `metric`. What is corrupted is another input.

        Args:
            n: Inputs that are drawn; all of that length by default.
            length: Values of an input; one less than the model takes by default, for a count of
                nothing is what a program takes for that of the longest input.
            seed: Of the draws.

        Raises:
            ValueError: A length that the model does not take, fewer than one input, or too many
                for all.
        """
        config = self.model.config
        longest = config.max_position_embeddings - 1
        if length is None:
            length = max(1, longest - 1)
        check_range("length", length, 1, longest + 1, "what the program was compiled for")
        draws = torch.Generator().manual_seed(seed)
        ids = _inputs(self.bos, list(self.tokens.values()), length, n, draws)
        order = torch.randperm(len(ids), generator=draws)
        other = torch.empty_like(ids)
        other[order] = ids[order.roll(1)]
        clean, corrupted = (x.repeat_interleave(length, 0) for x in (ids, other))
        positions = torch.arange(1, length + 1).repeat(len(ids))
        if self.outputs is None:
            answers, wrong = torch.zeros_like(positions), None
        else:
            answers = self.model(ids.to(self.model.unembed.weight.device)).logits[:, 1:].argmax(-1)
            answers = answers.flatten().cpu()
            every = torch.arange(config.outputs).expand(len(answers), -1)
            wrong = every[every != answers[:, None]].view(len(answers), -1)
        return Task(clean, corrupted, positions, answers, wrong, {"name": "tracr", "seed": seed})

    @torch.no_grad()
    def metric(self, task: Task) -> str | CustomMetric:
        """Return what fits the output: ``kl``, or of a number its mean squared distance.

        Args:
            task: Of this program; the distance is that from the model's outputs on it.
        """
        if self.outputs is not None:
            return "kl"
        clean = task.clean.to(self.model.unembed.weight.device)
        rows = torch.arange(len(clean), device=clean.device)
        whole = self.model(clean).logits[rows, task.positions.to(clean.device)]
        return CustomMetric(
            lambda logits: (logits - whole).square().sum(-1).mean(-1), "squared_distance"
        )


def program(assembled: Any, n: int | None = None, *, seed: int = 0) -> Program:
    """Take over what tracr compiled.

    Args:
        assembled: What ``tracr.compiler.compiling.compile_rasp_to_model`` returns.
        n: Inputs of each length that edges are tried on; all by default.
        seed: Of their draws.

    Raises:
        ValueError: Another model than tracr's own, fewer than one input, or too many for all.
    """
    model = to_torch(assembled)
    encoder = assembled.input_encoder
    tokens = dict(encoder.encoding_map)
    bos = tokens.pop(encoder.bos_token)
    del tokens[encoder.pad_token]
    support = supported(model)
    draws = torch.Generator().manual_seed(seed)
    inputs = [
        _inputs(bos, list(tokens.values()), length, n, draws)
        for length in range(1, model.config.max_position_embeddings)
    ]
    matters = _changes(model, support, inputs) > _CHANGE
    circuit = Circuit(support.graph, matters, matters.float(), {"method": "tracr"})
    # of a numerical output there is nothing to be decoded
    named = getattr(assembled.output_encoder, "encoding_map", None)
    return Program(model, circuit, support, tokens, bos, None if named is None else [*named])


def _inputs(
    bos: int, tokens: list[int], length: int, n: int | None, draws: torch.Generator
) -> Tensor:
    """Return int64 ``(N, 1 + length)``: all inputs, or some that are drawn."""
    values = torch.tensor(tokens)
    if n is not None:
        check_range("n", n, 1, 1 << 20, "a task has an input")
        found = values[torch.randint(len(values), (n, length), generator=draws)]
    elif len(values) ** length > _MOST:
        count = len(values) ** length
        raise ValueError(message("n", f"a number where there are over {_MOST}", count, "give it"))
    else:
        found = torch.cartesian_prod(*[values] * length).view(-1, length)
    return functional.pad(found, (1, 0), value=bos)


def reverse(vocabulary: Sequence[Value] = ("a", "b", "c"), length: int = 5) -> Program:
    """Compile the program that turns its input round.

    Args:
        vocabulary: Values that inputs have.
        length: Of inputs, at most.

    Raises:
        ImportError: tracr is not installed.
    """
    return _compiled(lambda lib, rasp: lib.make_reverse(rasp.tokens), vocabulary, length)


def proportion(
    vocabulary: Sequence[Value] = ("w", "x", "y", "z"),
    length: int = 5,
    *,
    value: Value = "x",
) -> Program:
    """Compile the program that tells which share of the input so far is one value.

    Args:
        vocabulary: Values that inputs have.
        length: Of inputs, at most.
        value: That is counted.

    Raises:
        ImportError: tracr is not installed.
    """
    return _compiled(
        lambda lib, rasp: lib.make_frac_prevs(rasp.tokens == value), vocabulary, length
    )


def sort(vocabulary: Sequence[int] = (1, 2, 3), length: int = 4) -> Program:
    """Compile the program that sorts its input, with repetitions.

    Args:
        vocabulary: Positive numbers that inputs have.
        length: Of inputs, at most.

    Raises:
        ImportError: tracr is not installed.
    """
    return _compiled(
        lambda lib, rasp: lib.make_sort(rasp.tokens, rasp.tokens, max_seq_len=length, min_key=1),
        vocabulary, length,
    )  # fmt: skip


def _compiled(make: Callable[[Any, Any], Any], vocabulary: Sequence[Value], length: int) -> Program:
    """Compile a program of tracr's library."""
    try:
        from tracr.compiler import compiling, lib
        from tracr.rasp import rasp
    except ImportError as error:
        command = "pip install 'pahq[tracr]'"
        raise ImportError(f"pahq.truth.tracr compiles with tracr: {command}") from error
    made = compiling.compile_rasp_to_model(
        make(lib, rasp), vocab=set(vocabulary), max_seq_len=length
    )
    return program(made)
