"""What plans choose, against the formulas of arXiv:2605.08738 written out."""

import logging
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from slimmoe.configuration import IMPORTANCES, SIMILARITIES, CompressionConfig
from slimmoe.errors import UnsupportedModelError
from slimmoe.memory import compress_model
from slimmoe.merging.grouping import grouped
from slimmoe.merging.merge import average
from slimmoe.planning import plan
from slimmoe.pruning.experts import importance
from slimmoe.streaming import write
from slimmoe.weights import Source
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
import made
from moe_families import FAMILIES, config, model, tokens


def cosine(a, b):
    a, b = [float(x) for x in a.flatten()], [float(x) for x in b.flatten()]
    size = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / size if size else 0.0


# --- experts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", IMPORTANCES)
def test_importance(name):
    found = made.statistics(model("qwen3_moe")).experts[0]
    found.count[3] = 0
    scores = importance(found, name)
    for e in range(8):
        often, whole = float(found.count[e]), found.tokens
        wanted = {
            "freq": often / whole, "soft": float(found.share_sum[e]) / whole,
            "reap": float(found.weighted_norm_sum[e]) / often if often else 0,
            "reap_total": float(found.weighted_norm_sum[e]) / whole,
            "norm_mean": float(found.norm_sum[e]) / often if often else 0,
            "norm_total": float(found.norm_sum[e]), "norm_max": float(found.norm_max[e]),
        }[name]  # fmt: skip
        assert float(scores[e]) == pytest.approx(wanted if often else 0, rel=1e-12)


def algorithm_1(scores, alike, count, preserve):
    """Kept, preserved and bases, groups with weights: the paper's algorithm, in plain Python."""
    order = sorted(range(len(scores)), key=lambda e: (-scores[e], e))
    preserved = order[: math.floor(count * preserve)]
    bases = order[len(preserved) : count]
    groups = {e: [e] for e in order[:count]}
    for e in range(len(scores)):
        if e not in groups and bases:
            best = max(sorted(bases), key=lambda base: alike(e, base))
            groups[best].append(e)
    weights = {}
    for base, group in groups.items():
        total = sum(scores[e] for e in group)
        weights[base] = [scores[e] / total for e in group]
    return groups, weights


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize(("method", "preserve"), [
    ("prune", 1.0), ("merge", 0.0), ("partial_merge", 0.5), ("partial_merge", 0.3),
])  # fmt: skip
def test_experts_are_those_of_the_algorithm(similarity, method, preserve):
    before = model("qwen3_moe")
    found, state = made.statistics(before), before.state_dict()
    options = CompressionConfig(
        num_experts=5, expert_method=method, importance="soft", similarity=similarity,
        preserve_ratio=preserve,
    )  # fmt: skip
    decided = plan(before, found, options)
    for layer in range(4):
        told = found.experts[layer]
        scores = [float(x) / told.tokens for x in told.share_sum]
        vectors = {
            "router_weight": list(state[f"model.layers.{layer}.mlp.gate.weight"]),
            "expert_output": [told.output_sum[e] / told.count[e] for e in range(8)],
            "expert_weight": [
                torch.cat([state[f"model.layers.{layer}.mlp.experts.{part}"][e].flatten()
                           for part in ("gate_up_proj", "down_proj")]) for e in range(8)
            ],
        }  # fmt: skip
        gram = told.logit_gram

        def alike(a, b, gram=gram, vectors=vectors):
            if similarity == "router_logit":
                return float(gram[a, b] / (gram[a, a] * gram[b, b]).sqrt())
            return cosine(vectors[similarity][a], vectors[similarity][b])

        groups, weights = algorithm_1(scores, alike, 5, preserve)
        ours = decided.experts[layer]
        assert ours.kept == sorted(groups)
        assert ours.members == [groups[e] for e in ours.kept]
        for mine, base in zip(ours.weights, ours.kept, strict=True):
            assert mine == pytest.approx(weights[base], rel=1e-12)
            assert sum(mine) == pytest.approx(1, abs=1e-12)
        dropped = [e for e in range(8) if e not in groups]
        wanted = float(told.count[dropped].sum() / told.count.sum())
        assert decided.report[str(layer)] == pytest.approx({
            "dropped_selections": wanted, "least_tokens": float(min(told.count)),
            "mean_tokens": float(sum(told.count)) / 8,
        })  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_experts_are_read_in_parts(family, tmp_path):
    """Products of experts' weights in parts, from one tensor and from one for each expert."""
    before = model(family)
    before.save_pretrained(tmp_path)
    options = CompressionConfig(num_experts=4, expert_method="merge", similarity="expert_weight")
    found = made.statistics(before)
    assert plan(before, found, options).experts == plan(tmp_path, found, options).experts


def test_averages_are_those_of_weights():
    before = model("olmoe")
    decided = plan(before, made.statistics(before),
                   CompressionConfig(num_experts=3, expert_method="merge"))  # fmt: skip
    after, state = compress_model(before, decided).state_dict(), before.state_dict()
    for layer, experts in decided.experts.items():
        for part in ("gate_up_proj", "down_proj"):
            name = f"model.layers.{layer}.mlp.experts.{part}"
            for at, (members, weights) in enumerate(
                zip(experts.members, experts.weights, strict=True)
            ):
                wanted = sum(w * state[name][m].double()
                             for m, w in zip(members, weights, strict=True))  # fmt: skip
                torch.testing.assert_close(after[name][at].double(), wanted, rtol=1e-5, atol=1e-7)
        name = f"model.layers.{layer}.mlp.gate.weight"
        assert torch.equal(after[name], state[name][experts.kept])


def test_averages_are_rounded_once():
    draws = torch.Generator().manual_seed(0)
    parts = [torch.randn(50, 40, generator=draws).bfloat16() for _ in range(5)]
    weights = [0.3, 0.3, 0.2, 0.1, 0.1]
    found = average([lambda part=part: part for part in parts], weights)
    exact = sum(w * part.double() for w, part in zip(weights, parts, strict=True))
    assert found.dtype == torch.bfloat16
    # half of the last of 8 bits, and what float32 adds
    assert ((found.double() - exact).abs() <= exact.abs() / 256 + 1e-6).all()


def test_neurons_of_averages_are_those_of_members():
    """By the mean activations of what is averaged, weighted as it is."""
    before = model("qwen3_moe")
    found = made.statistics(before)
    options = {"num_experts": 4, "expert_method": "merge", "moe_intermediate_size": 16}
    for alignment in ("none", "hungarian"):
        decided = plan(before, found, CompressionConfig(alignment=alignment, **options))
        for layer, experts in decided.experts.items():
            told = found.experts[layer]
            for at, (members, weights) in enumerate(
                zip(experts.members, experts.weights, strict=True)
            ):
                if alignment == "hungarian":
                    members, weights = members[:1], [1.0]
                means = [sum(w * float(told.activation_sum[m, n] / told.count[m])
                             for m, w in zip(members, weights, strict=True))
                         for n in range(24)]  # fmt: skip
                wanted = sorted(sorted(range(24), key=lambda n: -means[n])[:16])
                assert decided.neurons[layer][at] == wanted


def test_experts_that_are_never_selected_are_averaged_alike(caplog):
    alike = torch.eye(4, dtype=torch.float64)
    alike[3, 1] = 0.5
    with caplog.at_level(logging.WARNING):
        found = grouped(torch.tensor([3.0, 0.0, 0.0, 0.0]), alike, 2, 0.0, name="layer 7")
    assert found.kept == [0, 1]
    assert found.members == [[0, 2], [1, 3]]
    assert found.weights == [[1.0, 0.0], [0.5, 0.5]]
    assert "layer 7: experts [1, 3] were never selected" in caplog.text
    assert "[0, 2]" not in caplog.text


def test_an_expert_without_output_is_like_none():
    """What was never selected has no mean output, and a cosine with it is 0, not undefined."""
    before = model("qwen3_moe")
    found = made.statistics(before)
    for told in found.experts.values():
        told.count[[2, 6]], told.output_sum[[2, 6]] = 0, 0
        told.weighted_norm_sum[[2, 6]] = 0
    options = CompressionConfig(num_experts=4, expert_method="merge", importance="reap")
    for experts in plan(before, found, options).experts.values():
        # all bases are as unlike them: they go to the first
        assert {2, 6} <= set(experts.members[0])
        assert all(math.isfinite(w) for weights in experts.weights for w in weights)


def test_experts_stay_in_their_groups():
    """DeepSeek's router selects groups first: as many experts of each are kept, in their places."""
    before = model("deepseek_v3")
    found = made.statistics(before)
    for told in found.experts.values():
        told.weighted_norm_sum[:4] += 1000
    decided = plan(before, found, CompressionConfig(num_experts=4, expert_method="merge"))
    for experts in decided.experts.values():
        assert [e < 4 for e in experts.kept] == [True, True, False, False]
        for members in experts.members:
            assert len({e < 4 for e in members}) == 1
    with pytest.raises(ValueError, match="num_experts: expected a multiple of 2"):
        plan(before, found, CompressionConfig(num_experts=5))
    with pytest.raises(ValueError, match="num_experts: expected at least 4"):
        plan(before, found, CompressionConfig(num_experts=2))
    # DeepSeek-V2 has groups, too, and selects of all experts where its method is greedy
    other = model("deepseek_v2")
    assert other.config.n_group == 2
    assert len(plan(other, made.statistics(other), CompressionConfig(num_experts=5)).experts) == 3
    # of two groups a token sees one
    with pytest.raises(ValueError, match="num_experts_per_tok: expected at most 2"):
        plan(before, found, CompressionConfig(num_experts=4, num_experts_per_tok=3))


# --- channels ------------------------------------------------------------------------------------


def test_channels_and_corrections_are_those_of_the_formulas():
    before = model("qwen3_next")
    found = made.statistics(before)
    decided = plan(before, found, CompressionConfig(hidden_size=24, drop_layers=(0,)))
    assert len(found.norms) == 2 * 4 + 1
    sizes = [sum(float(n.output_abs_sum[c]) / n.tokens for n in found.norms.values())
             for c in range(32)]  # fmt: skip
    assert decided.channels == sorted(sorted(range(32), key=lambda c: -sizes[c])[:24])
    assert set(decided.norms) == {site for site in found.norms if ".0." not in site}
    after, state = compress_model(before, decided).state_dict(), before.state_dict()
    for site, factor in decided.norms.items():
        squares = found.norms[site].input_square_sum
        share = sum(float(squares[c]) for c in decided.channels) / float(squares.sum())
        assert factor == pytest.approx(math.sqrt(share * 32 / 24), rel=1e-12)
        name = f"{site}.weight"
        new = name.replace("layers.1", "layers.0").replace("layers.2", "layers.1")
        new = new.replace("layers.3", "layers.2")
        # the norm multiplies by one more than its weight
        wanted = (1 + state[name][decided.channels].double()) * factor - 1
        torch.testing.assert_close(after[new].double(), wanted, rtol=1e-6, atol=1e-6)
    plain = plan(before, found, CompressionConfig(hidden_size=24, rms_correction=False))
    assert plain.norms == {}


# --- layers that are not alike -------------------------------------------------------------------


def test_layers_without_experts_keep_their_places(tmp_path):
    """Which layers have experts follows from their numbers, which change."""
    changes = {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    before = model("qwen2_moe", **changes)
    decided = plan(before, None, CompressionConfig(drop_layers=(0, 2)))
    assert decided.config["decoder_sparse_step"] == 1
    assert decided.config["mlp_only_layers"] == [1, 2]
    after = compress_model(before, decided)
    kinds = [
        "experts" if hasattr(layer.mlp, "experts") else "dense" for layer in after.model.layers
    ]
    assert kinds == ["experts", "dense", "dense", "experts"]
    before.save_pretrained(tmp_path / "before")
    write(tmp_path / "before", tmp_path / "after", decided, progress=False)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "after")
    ids = tokens(before)
    with torch.no_grad():
        assert torch.equal(found(ids).logits, after(ids).logits)


def test_dense_layers_come_first():
    before = model("deepseek_v2", num_hidden_layers=5, first_k_dense_replace=2)
    decided = plan(before, None, CompressionConfig(drop_layers=(1, 3)))
    assert decided.config["first_k_dense_replace"] == 1
    after = compress_model(before, decided)
    assert [hasattr(layer.mlp, "experts") for layer in after.model.layers] == [False, True, True]


def test_kinds_of_layers_follow():
    before = model("gpt_oss", num_hidden_layers=4)
    decided = plan(before, None, CompressionConfig(drop_layers=(0,)))
    assert decided.config["layer_types"] == config("gpt_oss").layer_types[1:]
    with pytest.raises(UnsupportedModelError, match=r"none of .* has attention over all"):
        plan(model("qwen3_next"), None, CompressionConfig(num_layers=3))
    strange = model("qwen3_moe")
    strange.config.rotary_pattern = [1, 2, 3, 4]
    with pytest.raises(UnsupportedModelError, match="rotary_pattern has an entry for each layer"):
        plan(strange, None, CompressionConfig(num_layers=2))


def test_heads_keep_their_width():
    before = model("mixtral")
    assert before.config.head_dim is None
    decided = plan(before, made.statistics(before), CompressionConfig(hidden_size=16))
    assert decided.config["head_dim"] == 8
    assert compress_model(before, decided).model.layers[0].self_attn.head_dim == 8


# --- modules of multi-token prediction -----------------------------------------------------------


def with_mtp(folder):
    """A folder of Qwen3-Next as released, with a module that transformers leaves aside."""
    before = model("qwen3_next")
    before.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    draws = torch.Generator().manual_seed(7)
    module = {
        name.replace("model.layers.3.", "mtp.layers.0."): tensor.clone()
        for name, tensor in state.items() if name.startswith("model.layers.3.")
    }  # fmt: skip
    module |= {"mtp.fc.weight": torch.randn(32, 64, generator=draws)}
    for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        module[f"mtp.{name}.weight"] = torch.randn(32, generator=draws)
    save_file(state | module, folder / "model.safetensors", metadata={"format": "pt"})
    return module


def test_a_module_of_qwen3_next_is_compressed(tmp_path):
    module = with_mtp(tmp_path / "before")
    source = Source(tmp_path / "before")
    assert source.places() == [0, 1, 2, 3, 4]
    found = made.statistics(source)
    options = CompressionConfig(
        num_experts=5, hidden_size=24, moe_intermediate_size=16, drop_layers=(1,),
        expert_method="prune",
    )  # fmt: skip
    decided = plan(source, found, options)
    write(source, tmp_path / "after", decided, progress=False)
    after = load_file(tmp_path / "after" / "model.safetensors")
    kept, channels = decided.experts[4].kept, decided.channels
    assert {name for name in after if name.startswith("mtp.")} == {
        name for name in module if ".experts." not in name
    } | {f"mtp.layers.0.mlp.experts.{e}.{p}_proj.weight" for e in range(5)
         for p in ("gate", "up", "down")}  # fmt: skip
    both = [*channels, *(c + 32 for c in channels)]
    assert torch.equal(after["mtp.fc.weight"], module["mtp.fc.weight"][channels][:, both])
    assert torch.equal(after["mtp.layers.0.mlp.gate.weight"],
                       module["mtp.layers.0.mlp.gate.weight"][kept][:, channels])  # fmt: skip
    for at, expert in enumerate(kept):
        name = "mtp.layers.0.mlp.experts.{}.down_proj.weight"
        neurons = decided.neurons[4][at]
        assert torch.equal(after[name.format(at)],
                           module[name.format(expert)][channels][:, neurons])  # fmt: skip
    name = "mtp.pre_fc_norm_hidden"
    wanted = (1 + module[f"{name}.weight"][channels].double()) * decided.norms[name] - 1
    torch.testing.assert_close(after[f"{name}.weight"].double(), wanted, rtol=1e-6, atol=1e-6)
    # plain transformers leaves the module aside
    _, told = AutoModelForCausalLM.from_pretrained(tmp_path / "after", output_loading_info=True)
    assert not any(told.values())


def test_a_module_without_statistics_is_refused_or_dropped(tmp_path):
    with_mtp(tmp_path / "before")
    found = made.statistics(model("qwen3_next"))
    with pytest.raises(ValueError, match=r"experts of layer 4, .*give mtp='drop'"):
        plan(tmp_path / "before", found, CompressionConfig(num_experts=5))
    with pytest.raises(ValueError, match=r"those of mtp\.[\w.]+, .*give mtp='drop'"):
        plan(tmp_path / "before", found, CompressionConfig(hidden_size=24))
    options = CompressionConfig(num_experts=5, hidden_size=24, mtp="drop")
    write(tmp_path / "before", tmp_path / "after", plan(tmp_path / "before", found, options),
          progress=False)  # fmt: skip
    after = load_file(tmp_path / "after" / "model.safetensors")
    assert not any(name.startswith("mtp.") for name in after)


def test_a_module_of_deepseek_v3_moves(tmp_path):
    """It is numbered as the layer behind the last."""
    before = model("deepseek_v3")
    before.save_pretrained(tmp_path / "before")
    file = tmp_path / "before" / "model.safetensors"
    state = load_file(file)
    module = {
        name.replace("model.layers.3.", "model.layers.4."): tensor.clone()
        for name, tensor in state.items() if name.startswith("model.layers.3.")
    }  # fmt: skip
    module |= {f"model.layers.4.{n}.weight": torch.randn(32) for n in ("enorm", "hnorm")}
    module |= {"model.layers.4.eh_proj.weight": torch.randn(32, 64),
               "model.layers.4.shared_head.norm.weight": torch.randn(32),
               "model.layers.4.shared_head.head.weight": torch.randn(96, 32),
               "model.layers.4.embed_tokens.weight": torch.randn(96, 32)}  # fmt: skip
    save_file(state | module, file, metadata={"format": "pt"})
    source = Source(tmp_path / "before")
    options = CompressionConfig(num_experts=4, hidden_size=24, drop_layers=(1, 2))
    decided = plan(source, made.statistics(source), options)
    assert sorted(decided.experts) == [3, 4]
    write(source, tmp_path / "after", decided, progress=False)
    after = load_file(tmp_path / "after" / "model.safetensors")
    assert not any(".layers.4." in name or ".layers.3." in name for name in after)
    channels = decided.channels
    both = [*channels, *(c + 32 for c in channels)]
    wanted = module["model.layers.4.eh_proj.weight"][channels][:, both]
    assert torch.equal(after["model.layers.2.eh_proj.weight"], wanted)
    assert after["model.layers.2.mlp.experts.3.up_proj.weight"].shape == (24, 24)
    assert decided.config["num_nextn_predict_layers"] == 1
    dropped = plan(source, made.statistics(source), CompressionConfig(num_layers=2, mtp="drop"))
    assert dropped.config["num_nextn_predict_layers"] == 0


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "match"), [
    ({"num_experts": 9}, "num_experts: expected at most 8"),
    ({"num_experts": 1}, "num_experts_per_tok: expected at most 1, got int 2"),
    ({"num_experts_per_tok": 9}, "num_experts_per_tok: expected at most 8"),
    ({"hidden_size": 40}, "hidden_size: expected at most 32"),
    ({"moe_intermediate_size": 32}, "moe_intermediate_size: expected at most 24"),
    ({"num_layers": 5}, "num_layers: expected 1 to 4"),
    ({"drop_layers": (4,)}, r"drop_layers: expected numbers below 4"),
    ({"drop_layers": (0, 1, 2, 3)}, "num_layers: expected 1 to 4"),
])  # fmt: skip
def test_sizes_that_there_cannot_be(options, match):
    before = model("qwen3_moe")
    with pytest.raises(ValueError, match=match):
        plan(before, made.statistics(before), CompressionConfig(**options))


@pytest.mark.parametrize(("options", "match"), [
    ({"num_experts": 0}, "num_experts"), ({"hidden_size": 20}, "a multiple of 8, got int 20"),
    ({"preserve_ratio": 1.5}, "preserve_ratio: expected 0 to 1"),
    ({"importance": "magic"}, "importance: expected one of"),
    ({"similarity": "magic"}, "similarity: expected one of"),
    ({"expert_method": "magic"}, "expert_method: expected one of"),
    ({"num_layers": 2, "drop_layers": (1,)}, "drop_layers: expected none beside num_layers"),
])  # fmt: skip
def test_options_that_there_are_not(options, match):
    with pytest.raises(ValueError, match=match):
        CompressionConfig(**options)


def test_options_are_files():
    options = CompressionConfig(drop_layers=(3, 1), num_experts=4)
    assert options.drop_layers == (1, 3)
    assert CompressionConfig.from_json(options.to_json()) == options
    with pytest.raises(ValueError, match=r"config: expected fields .* got list \['experts'\]"):
        CompressionConfig.from_json('{"experts": 4}')


def test_families_that_cannot():
    for family, options, match in (
        ("olmoe", {"hidden_size": 24}, "norms of its queries and keys"),
        ("deepseek_v3", {"moe_intermediate_size": 16}, "shared experts are as many times"),
    ):
        before = model(family)
        with pytest.raises(UnsupportedModelError, match=match):
            plan(before, made.statistics(before), CompressionConfig(**options))


def test_statistics_of_another_model():
    before = model("qwen3_moe")
    with pytest.raises(ValueError, match="statistics: expected some, for these sizes"):
        plan(before, None, CompressionConfig(num_experts=4))
    for other in (model("olmoe"), model("qwen3_moe", num_hidden_layers=3)):
        with pytest.raises(ValueError, match="statistics: expected those of"):
            plan(before, made.statistics(other), CompressionConfig(num_experts=4))
