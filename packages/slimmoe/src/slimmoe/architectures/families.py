"""The families: Qwen2-MoE, Qwen3-MoE, Qwen3-Next, Mixtral, OLMoE, DeepSeek-V2 and -V3, GPT-OSS.

Names and shapes are those of files that transformers 5 writes, and of released checkpoints.
"""

from __future__ import annotations

from slimmoe.architectures.base import (
    ATTENTION,
    DENSE,
    EXPERTS,
    ROUTER,
    Architecture,
    Axis,
    E,
    N,
    O,
    R,
    V,
    behind,
    decoder,
    norms,
    shared,
    table,
)

_QWEN = (*ATTENTION, *DENSE, *ROUTER, *EXPERTS)
_GATED = (*shared("shared_expert"), *table({"mlp.shared_expert_gate.weight": (O, R)}))

QWEN3_MOE = Architecture(
    model_type="qwen3_moe",
    rows=decoder((*_QWEN, *norms())),
    experts=("num_experts", "num_local_experts"),
    neurons="moe_intermediate_size",
)
QWEN2_MOE = Architecture(
    model_type="qwen2_moe",
    rows=decoder((*_QWEN, *_GATED, *norms())),
    experts=("num_experts", "num_local_experts"),
    neurons="moe_intermediate_size",
)

_NEXT = (
    *_QWEN, *_GATED, *norms(1.0),
    *table({
        "linear_attn.in_proj_qkvz.weight": (O, R), "linear_attn.in_proj_ba.weight": (O, R),
        "linear_attn.conv1d.weight": (O, O, O), "linear_attn.A_log": (O,),
        "linear_attn.dt_bias": (O,), "linear_attn.norm.weight": (O,),
        "linear_attn.out_proj.weight": (R, O),
    }),
)  # fmt: skip
QWEN3_NEXT = Architecture(
    model_type="qwen3_next",
    rows=(
        *decoder(_NEXT, 1.0),
        *behind("mtp.layers.{mtp}.", _NEXT),
        *table({"mtp.fc.weight": (R, Axis.TWO_RESIDUALS)}),
        *table({
            "mtp.norm.weight": (R,), "mtp.pre_fc_norm_embedding.weight": (R,),
            "mtp.pre_fc_norm_hidden.weight": (R,),
        }, norm=1.0),
    ),
    experts=("num_experts", "num_local_experts"),
    neurons="moe_intermediate_size",
)  # fmt: skip

MIXTRAL = Architecture(
    model_type="mixtral",
    rows=decoder((
        *ATTENTION, *norms(), *EXPERTS, *ROUTER,
        *table({"block_sparse_moe.gate.weight": (E, R)}, router=True),
        *table({
            "block_sparse_moe.experts.{expert}.w1.weight": (N, R),
            "block_sparse_moe.experts.{expert}.w2.weight": (R, N),
            "block_sparse_moe.experts.{expert}.w3.weight": (N, R),
        }),
    )),
    experts=("num_local_experts",),
    neurons="intermediate_size",
    renormalises=lambda config: True,
)  # fmt: skip
OLMOE = Architecture(
    model_type="olmoe",
    rows=decoder((*ATTENTION, *norms(), *EXPERTS, *ROUTER)),
    experts=("num_experts", "num_local_experts"),
    neurons="intermediate_size",
    no_width="the norms of its queries and keys are as wide as hidden_size says",
)

_MLA = table({
    "self_attn.q_proj.weight": (O, R), "self_attn.q_a_proj.weight": (O, R),
    "self_attn.q_a_proj.bias": (O,), "self_attn.q_a_layernorm.weight": (O,),
    "self_attn.q_b_proj.weight": (O, O), "self_attn.kv_a_proj_with_mqa.weight": (O, R),
    "self_attn.kv_a_proj_with_mqa.bias": (O,), "self_attn.kv_a_layernorm.weight": (O,),
    "self_attn.kv_b_proj.weight": (O, O), "self_attn.o_proj.weight": (R, O),
    "self_attn.o_proj.bias": (R,),
})  # fmt: skip
_DEEPSEEK = (*_MLA, *norms(), *DENSE, *ROUTER, *EXPERTS, *shared("shared_experts"))
_SHARED_WIDTH = "its shared experts are as many times as wide as a routed one"
DEEPSEEK_V2 = Architecture(
    model_type="deepseek_v2",
    rows=decoder(_DEEPSEEK),
    experts=("n_routed_experts", "num_local_experts"),
    neurons="moe_intermediate_size",
    no_neurons=_SHARED_WIDTH,
    # the class of transformers does not read norm_topk_prob
    renormalises=lambda config: False,
)
DEEPSEEK_V3 = Architecture(
    model_type="deepseek_v3",
    rows=decoder((
        *_DEEPSEEK,
        *table({"mlp.gate.e_score_correction_bias": (E,)}),
        *table({"enorm.weight": (R,), "hnorm.weight": (R,), "shared_head.norm.weight": (R,)},
               norm=0.0),
        *table({"eh_proj.weight": (R, Axis.TWO_RESIDUALS), "embed_tokens.weight": (V, R),
                "shared_head.head.weight": (V, R)}),
    )),
    experts=("n_routed_experts", "num_local_experts"),
    neurons="moe_intermediate_size",
    no_neurons=_SHARED_WIDTH,
    mtp_layers="num_nextn_predict_layers",
    mtp_behind=True,
    # a sigmoid of each logit alone
    renormalises=lambda config: True,
)  # fmt: skip

GPT_OSS = Architecture(
    model_type="gpt_oss",
    rows=decoder((
        *ATTENTION, *norms(),
        *table({"self_attn.sinks": (O,), "mlp.router.bias": (E,)}),
        *table({"mlp.router.weight": (E, R)}, router=True),
        *table({
            "mlp.experts.gate_up_proj": (E, R, Axis.GATE_UP_IN_TURNS),
            "mlp.experts.gate_up_proj_bias": (E, Axis.GATE_UP_IN_TURNS),
            "mlp.experts.down_proj": (E, N, R), "mlp.experts.down_proj_bias": (E, R),
        }),
    )),
    experts=("num_local_experts",),
    neurons="intermediate_size",
    renormalises=lambda config: True,
)  # fmt: skip

ALL = (QWEN2_MOE, QWEN3_MOE, QWEN3_NEXT, MIXTRAL, OLMOE, DEEPSEEK_V2, DEEPSEEK_V3, GPT_OSS)
