"""A step of distillation beside one of the language model's loss alone.

Student and teacher are layers of Qwen3-MoE with random weights, which prove time and bytes and
nothing of a model. ``6 P_s`` FLOPs a token are a language model's step with P_s active parameters,
and ``2 P_t`` more its teacher's pass: their ratio is what distillation may cost at least.

- ``language model`` is the loss of transformers, from logits of all tokens.
- ``logits`` is distillation from logits of all tokens of both, in float32, by autograd.
- ``ours`` is what `DistillationTrainer` does.

No optimizer takes part; it would cost all the same.
"""

import tempfile

import torch
from shared_kernels.bench import Arm, Workload, benchmark
from torch.nn.functional import cross_entropy, kl_div, log_softmax

KD_WEIGHT = 0.75


def models(device):
    """Return a student and a teacher, and tokens of a step."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    common = {"num_experts_per_tok": 8, "norm_topk_prob": True, "max_position_embeddings": 4096}
    if device == "cuda":
        common |= {"vocab_size": 151936, "moe_intermediate_size": 768, "num_attention_heads": 32,
                   "num_key_value_heads": 4, "head_dim": 128}  # fmt: skip
        sizes = ({"hidden_size": 1536, "num_experts": 64, "num_hidden_layers": 6},
                 {"hidden_size": 2048, "num_experts": 128, "num_hidden_layers": 8})  # fmt: skip
        shape, dtype = (8, 2048), torch.bfloat16
    else:
        common |= {"vocab_size": 32768, "moe_intermediate_size": 64, "num_attention_heads": 8,
                   "num_key_value_heads": 4, "head_dim": 32}  # fmt: skip
        sizes = ({"hidden_size": 192, "num_experts": 16, "num_hidden_layers": 3},
                 {"hidden_size": 256, "num_experts": 32, "num_hidden_layers": 4})  # fmt: skip
        shape, dtype = (2, 512), torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        made = [Qwen3MoeForCausalLM(Qwen3MoeConfig(**common, **size)).to(dtype) for size in sizes]
        ids = torch.randint(common["vocab_size"], shape)
    for model in made:
        model.set_experts_implementation("grouped_mm")
    return *made, ids


@benchmark
def step(device):
    """Forward and backward of one batch."""
    from slimmoe import sizes
    from slimmoe.distillation import DistillationArguments, DistillationTrainer

    student, teacher, ids = models(device)
    args = DistillationArguments(
        tempfile.mkdtemp(), kd_weight=KD_WEIGHT, report_to="none", use_cpu=device == "cpu",
        disable_tqdm=True, router_aux_loss_coef=0.0,
    )  # fmt: skip
    trainer = DistillationTrainer(student, teacher, args)
    labels, teacher = ids[:, 1:].flatten(), teacher.eval().requires_grad_(False)

    def forget():
        student.zero_grad(set_to_none=True)

    def logits_of(model):
        return model(ids, use_cache=False).logits[:, :-1].flatten(0, 1).float()

    def language_model():
        forget()
        cross_entropy(logits_of(student), labels).backward()

    def naive():
        forget()
        s = logits_of(student)
        with torch.no_grad():
            q = log_softmax(logits_of(teacher), -1)
        kl = kl_div(log_softmax(s, -1), q, log_target=True, reduction="batchmean")
        ((1 - KD_WEIGHT) * cross_entropy(s, labels) + KD_WEIGHT * kl).backward()

    def ours():
        forget()
        trainer.compute_loss(student.train(), {"input_ids": ids}).backward()

    def check():
        found = []
        for run in (naive, ours):
            run()
            found.append([p.grad.double() for p in student.parameters()])
        apart = sum((a - b).square().sum() for a, b in zip(*found, strict=True))
        whole = sum(a.square().sum() for a in found[0])
        assert (apart / whole).sqrt() < (1e-4 if device == "cpu" else 5e-2)

    tokens = ids.numel()
    active = [sizes(model).active_parameters for model in (student, teacher)]
    flops = {"language model": 6 * active[0] * tokens}
    flops["ours"] = flops["logits"] = flops["language model"] + 2 * active[1] * tokens
    kind = {"flops_dtype": "bf16" if device == "cuda" else "fp32"}
    runs = {"language model": language_model, "logits": naive, "ours": ours}
    yield Workload(
        name="step/qwen3-moe", device=device, check=check, baseline="language model", clock="wall",
        params={
            "tokens": tokens, "active parameters": {"student": active[0], "teacher": active[1]},
            "least ratio": flops["ours"] / flops["language model"],
        },
        arms=[Arm(name=name, fn=run, flops=flops[name], **kind) for name, run in runs.items()],
    )  # fmt: skip
