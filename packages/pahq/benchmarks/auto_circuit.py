"""ACDC of auto-circuit 1.0.1 and of this package, seconds for each removal that is tried.

Both have the same random weights, pairs and metric. It runs from the top folder of the checkout in
an environment that has both:

    uv run --with auto-circuit==1.0.1 --with transformer-lens==1.19.0 \\
        python -m shared_kernels.bench packages/pahq/benchmarks/auto_circuit.py

TransformerLens 1.19.0 is the fastest for auto-circuit of those that were tried (1.19.0, 2.18.0,
3.9.0): later ones compute what each head writes as a product that is summed up afterwards, and a
run takes four times as long on a CPU. It imports beside transformers 5 once a folder is given that
transformers no longer names.

auto-circuit tries edges into one layer in the order of a Python set, heads and q, k and v mixed.
Here its set of edges is replaced by a list in the order of `Graph.order` and `Graph.candidates`, so
that both have the same decisions to make, which are compared before anything is timed. Edges that
can have no effect cost it a run like others; this package removes them without, and they do not
count as tried. What an edge costs auto-circuit hardly depends on decisions before it: it is timed
on forty of those edges that this package tries, and the time without any edge is taken off.

Its circuits, gradients by masks and prune scores are compared, too; the numbers are in the result.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import time

import torch
from shared_kernels.bench import Arm, Workload, benchmark

THRESHOLD = 1e-3
#: Edges on which auto-circuit is timed.
SAMPLE = 40


def need(module):
    """Refuse where another package is not installed."""
    if importlib.util.find_spec(module) is None:
        raise ImportError(f"{module} is not installed: the command is at the top of the file")


def versions(*names):
    """Return versions, and commits of what was installed from a repository."""
    found = {}
    for name in names:
        package = importlib.metadata.distribution(name)
        source = json.loads(package.read_text("direct_url.json") or "{}")
        commit = source.get("vcs_info", {}).get("commit_id")
        found[name] = package.version + (f", commit {commit}" if commit else "")
    return found


# --- the same model and task for all ----------------------------------------------------------


def lively(model, seed=0):
    """Return a model whose heads and MLPs matter."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p += 0.1 * torch.randn(p.shape, generator=draws)
            elif not any(part in name for part in ("wte", "wpe", "embed", "lm_head")):
                p *= 4
    return model.eval().requires_grad_(False)


def gpt2(layers, width=64, heads=4, vocabulary=97, seed=0):
    """Return a GPT-2 of transformers with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocabulary, n_layer=layers, n_head=heads, n_embd=width, n_positions=64,
        attn_pdrop=0, embd_pdrop=0, resid_pdrop=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return lively(GPT2LMHeadModel(config), seed)


def llama(key_heads):
    """Return a Llama of transformers with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=key_heads, max_position_embeddings=64,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return lively(LlamaForCausalLM(config))


def hooked(model, device="cpu"):
    """Return a model as a HookedTransformer, with the weights as they are."""
    import transformer_lens

    try:
        from transformer_lens.pretrained import weight_conversions as convert
    except ImportError:
        from transformer_lens import loading_from_pretrained as convert
    have = model.config
    sizes = {"n_ctx": 64, "d_vocab": have.vocab_size, "original_architecture": type(model).__name__}
    if have.model_type == "gpt2":
        convert = convert.convert_gpt2_weights
        width, layers, heads = have.n_embd, have.n_layer, have.n_head
        sizes |= {"d_mlp": 4 * width, "act_fn": "gelu_new", "normalization_type": "LN",
                  "eps": have.layer_norm_epsilon}  # fmt: skip
    else:
        convert = convert.convert_llama_weights
        width, layers, heads = have.hidden_size, have.num_hidden_layers, have.num_attention_heads
        shared = have.num_key_value_heads != heads
        sizes |= {
            "d_mlp": have.intermediate_size, "act_fn": "silu", "normalization_type": "RMS",
            "eps": have.rms_norm_eps, "gated_mlp": True, "final_rms": True,
            "positional_embedding_type": "rotary", "rotary_dim": width // heads,
            "rotary_adjacent_pairs": False, "rotary_base": 10_000,
            "n_key_value_heads": have.num_key_value_heads if shared else None,
        }  # fmt: skip
    config = transformer_lens.HookedTransformerConfig(
        d_model=width, n_layers=layers, n_heads=heads, d_head=width // heads, device=device, seed=0,
        **sizes,
    )  # fmt: skip
    made = transformer_lens.HookedTransformer(config)
    plain = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False,
             "fold_value_biases": False}  # fmt: skip
    made.load_and_process_state_dict(convert(model, config), **plain)
    made.set_use_attn_result(True)
    made.set_use_split_qkv_input(True)
    made.set_use_hook_mlp_in(True)
    if config.n_key_value_heads is not None:
        made.set_ungroup_grouped_query_attention(True)
    return made.eval().requires_grad_(False)


def pairs(vocabulary, examples, tokens, seed=0):
    """Return a task of random tokens, answered behind the last one."""
    from pahq import Task

    draws = torch.Generator().manual_seed(seed)
    clean, corrupted = torch.randint(vocabulary, (2, examples, tokens), generator=draws)
    last = torch.full((examples,), tokens - 1)
    return Task(clean, corrupted, last, torch.arange(examples), torch.arange(examples) + examples)


def some(graph, seed, share):
    """Return a circuit of random edges, with random scores."""
    from pahq import Circuit

    draws = torch.Generator().manual_seed(seed)
    shape = (graph.senders, graph.receivers)
    present = torch.rand(shape, generator=draws) < share
    return Circuit(graph, present, torch.rand(shape, generator=draws) + 0.1)


def largest(pairs):
    """Return the largest difference, and the largest absolute value of the second of a pair."""
    pairs = [(torch.as_tensor(a).double(), torch.as_tensor(b).double()) for a, b in pairs]
    apart, size = ([float(x.abs().max()) for x in found]
                   for found in ([a - b for a, b in pairs], [b for _, b in pairs]))  # fmt: skip
    return {"largest difference": max(apart), "largest value": max(size)}


# --- auto-circuit -----------------------------------------------------------------------------


class Both:
    """A model and a task for auto-circuit and for this package.

    Args:
        model: Of transformers.
        examples: Pairs of the task.
        tokens: Of a prompt.
        device: Of the model.
    """

    def __init__(self, model, examples, tokens, device="cpu", seed=0):
        import transformers

        vars(transformers).setdefault("TRANSFORMERS_CACHE", None)
        from auto_circuit import prune
        from auto_circuit.data import PromptDataLoader, PromptDataset
        from auto_circuit.prune_algos import ACDC, mask_gradient
        from auto_circuit.utils.graph_utils import patchable_model
        from pahq import CircuitFinder
        from tqdm import tqdm

        for module in (prune, ACDC, mask_gradient):
            module.tqdm = functools.partial(tqdm, disable=True)
        self.finder, self.device = CircuitFinder(model.to(device)), torch.device(device)
        self.graph = graph = self.finder.graph
        self.task = pairs(model.config.vocab_size, examples, tokens, seed)
        self.patchable = patchable_model(
            hooked(model, device), factorized=True, slice_output="last_seq", separate_qkv=True,
            device=self.device,
        )  # fmt: skip
        texts = (list(ids.to(device)) for ids in (self.task.clean, self.task.corrupted))
        answers = (list(ids[:, None].to(device)) for ids in self.answers)
        self.loader = PromptDataLoader(
            PromptDataset(*texts, *answers), seq_len=tokens, diverge_idx=0, batch_size=examples
        )
        self.edges = {self.place(edge): edge for edge in self.patchable.edges}
        self.order = [self.edges[s, r] for r in graph.order() for s in graph.candidates(r)]
        assert len(self.edges) == len(self.order) == graph.edges

    @property
    def answers(self):
        return self.task.answers, self.task.wrong_answers

    def place(self, edge):
        """Return an edge's sender and receiver."""
        _, layer, hook = edge.dest.module_name.split(".")
        if hook == "hook_resid_post":
            return edge.src.src_idx, self.graph.logits
        part = hook.removeprefix("hook_").removesuffix("_input").removesuffix("_in")
        columns = self.graph.columns(int(layer), part)
        return edge.src.src_idx, columns.start + (edge.dest.head_idx or 0)

    def theirs(self, edges, threshold=None):
        """Return seconds and prune scores of its search among edges."""
        from auto_circuit.prune_algos.ACDC import acdc_prune_scores

        self.patchable.edges, bases = edges, [threshold or THRESHOLD]
        begin = time.perf_counter()
        found = acdc_prune_scores(
            self.patchable, self.loader, None, tao_exps=[0], tao_bases=bases
        )  # fmt: skip
        return time.perf_counter() - begin, found

    def theirs_each(self):
        """Return its seconds for an edge, on some of those that this package tries."""
        tried = ~self.found.scores.isnan()
        edges = [edge for edge in self.order if tried[self.place(edge)]]
        stride = len(edges) // SAMPLE
        sample = edges[stride // 2 :: stride]
        spent, nothing = (self.theirs(given)[0] for given in (sample, []))
        return (spent - nothing) / len(sample)

    def ours_each(self):
        """Return this package's seconds for an edge that it tries."""
        begin = time.perf_counter()
        self.found = self.finder.acdc(self.task, THRESHOLD, progress=False)
        return (time.perf_counter() - begin) / self.found.provenance["tested"]

    def about(self):
        """Return what this package's search did."""
        counts = ("tested", "skipped", "batches", "rows")
        found = {key: self.found.provenance[key] for key in counts}
        return {"edges": self.graph.edges, "kept": len(self.found), **found}

    def decisions(self, threshold=THRESHOLD, count=None):
        """Compare which edges stay, of all or the first of them."""
        from pahq.formats import from_auto_circuit

        edges = self.order[:count]
        spent, values = self.theirs(edges, threshold)
        begin = time.perf_counter()
        found = self.finder.acdc(self.task, threshold, progress=False)
        own = time.perf_counter() - begin
        # those that it does not try are infinite, as those that stay
        values = {name: value.cpu() for name, value in values.items()}
        theirs = from_auto_circuit(values, self.graph, threshold=2 * threshold).present
        places = [self.place(edge) for edge in edges]
        unlike = sum(bool(found.present[place] != theirs[place]) for place in places)
        effects = found.scores[tuple(zip(*places, strict=True))]
        nearest = (effects[~effects.isnan()] - threshold).abs().min()
        return {
            "threshold": threshold, "edges": self.graph.edges, "compared": len(edges),
            "kept of these": int(sum(found.present[place] for place in places)),
            "differing": unlike, "effect nearest to the threshold, less it": float(nearest),
            "seconds of auto-circuit": round(spent, 3),
            "seconds of pahq, all edges": round(own, 3),
        }  # fmt: skip


@benchmark
def search(device):
    """GPT-2 as wide as the small one, of four layers and of two, of which more edges stay."""
    need("auto_circuit")
    for layers in (4, 2):
        both = Both(gpt2(layers, 768, 12, 1000), 8, 15, device)
        # edges into the logits and the last layer are tried first, and take auto-circuit long
        last = sum(both.graph.upstream(r) for r in range(both.graph.receivers)
                   if both.graph.place(r)[0] >= layers - 1)  # fmt: skip
        agreement = functools.cache(
            lambda both=both, last=last: {"search": both.decisions(count=last)}
        )
        if layers == 2:
            agreement = functools.cache(lambda both=both: small() | wide(both))

        def check(both=both, agreement=agreement):
            both.ours_each()
            assert agrees(agreement())

        check()
        yield Workload(
            name=f"acdc/{layers}-layers", device=device, check=check, baseline="auto-circuit",
            clock="returned",
            params={
                "model": f"GPT2Config, {layers} layers, 12 heads, 768 wide, random weights",
                "vocabulary": 1000, "examples": 8, "tokens": 15, "threshold": THRESHOLD,
                "search of pahq": both.about(), "timed edges of auto-circuit": SAMPLE,
                "agreement": agreement(), "peers": versions("auto-circuit", "transformer-lens"),
            },
            arms=[Arm(name="auto-circuit", fn=both.theirs_each),
                  Arm(name="pahq", fn=both.ours_each)],
        )  # fmt: skip


def wide(both):
    """Compare all decisions on a model, and random circuits of it."""
    return {"search": both.decisions(), "random circuits": circuits(both)}


def small():
    """Compare decisions on small models, and prune scores of one."""
    return {
        "small models": [
            {"seed": seed, **Both(gpt2(3, seed=seed), 4, 10, seed=seed).decisions(threshold)}
            for seed in range(4)
            for threshold in (1e-3, 1e-4, 1e-5)
        ],
        "prune scores": prune_scores(Both(gpt2(3), 4, 10)),
    }


def agrees(found):
    """Tell whether what was compared is the same."""
    same = [not one["differing"] for one in (found["search"], *found.get("small models", []))]
    if "random circuits" in found:
        ran, scores = found["random circuits"], found["prune scores"]
        same += [ran[name]["largest difference"] < 1e-4 for name in ("logits", "kl", "logit_diff")]
        same += [
            not scores["differing edges of 20 circuits"], scores["written again equal"],
            scores["eap"]["largest difference"] < 1e-5 * scores["eap"]["largest value"],
        ]  # fmt: skip
    return all(same)


@torch.no_grad()
def circuits(both, count=50):
    """Compare random circuits, run by run_circuits with TREE_PATCH."""
    from auto_circuit.prune import run_circuits
    from auto_circuit.types import PatchType
    from auto_circuit.utils.tensor_ops import multibatch_kl_div
    from pahq.formats import to_auto_circuit

    task, finder = both.task, both.finder
    both.patchable.edges = set(both.order)
    clean = finder.model(task.clean.to(both.device)).logits[:, -1].log_softmax(-1).cpu()
    found = {"logits": [], "kl": [], "logit_diff": []}
    for number in range(count):
        circuit = some(both.graph, number, (number + 1) / (count + 1))
        ran = run_circuits(
            both.patchable, both.loader, [len(circuit)], to_auto_circuit(circuit),
            PatchType.TREE_PATCH,
        )[len(circuit)]  # fmt: skip
        (theirs,) = ran.values()
        values = finder.evaluate(circuit, task)
        theirs = theirs.cpu()
        kl = multibatch_kl_div(theirs.log_softmax(-1), clean)
        apart = [theirs.gather(1, ids[:, None]) for ids in (task.wrong_answers, task.answers)]
        ours = finder.run(circuit, task.clean, task.corrupted)[:, -1].cpu()
        found["logits"].append((ours, theirs))
        found["kl"].append((values["kl"]["circuit"], kl))
        found["logit_diff"].append((values["logit_diff"]["circuit"], (apart[0] - apart[1]).mean()))
    return {"circuits": count, **{name: largest(values) for name, values in found.items()}}


def prune_scores(both):
    """Read what it makes of a set of edges, and gradients by its masks; write them again."""
    from auto_circuit.prune_algos.mask_gradient import mask_gradient_prune_scores
    from pahq.formats import from_auto_circuit, to_auto_circuit

    graph, differing = both.graph, 0
    for number in range(20):
        circuit = some(graph, number, 0.3)
        edges = {both.edges[tuple(place)] for place in circuit.present.nonzero().tolist()}
        read = from_auto_circuit(both.patchable.circuit_prune_scores(edges=edges), graph)
        differing += int((read.present != circuit.present).sum())
    gradients = mask_gradient_prune_scores(
        both.patchable, both.loader, None, "logit", "avg_diff", mask_val=0.0
    )
    read = from_auto_circuit(gradients, graph)
    again = to_auto_circuit(read)
    return {
        "differing edges of 20 circuits": differing,
        "eap": largest([(both.finder.eap(both.task).scores, read.scores.nan_to_num())]),
        "written again equal": all(torch.equal(again[name], gradients[name]) for name in gradients),
    }
