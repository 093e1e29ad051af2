"""The teacher: a small mixture of experts of the paper's family, with a module of MTP."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import torch
from slimmoe.mtp import MTPHead
from slimmoe.mtp.files import write_modules
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM

from findings.data import BLOCK, VOCABULARY

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from findings.data import Data

#: Weight of a module of MTP while the teacher is trained.
_MTP_WEIGHT = 0.3


def teacher_config(**sizes: Any) -> Qwen3NextConfig:
    """Return Qwen3-Next in small, with full attention alone.

    Its linear attention needs kernels that are not everywhere; what is studied here does not.
    """
    given = {
        "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 64, "num_experts": 32, "num_experts_per_tok": 4,
        "moe_intermediate_size": 192, "shared_expert_intermediate_size": 192,
    } | sizes  # fmt: skip
    return Qwen3NextConfig(
        vocab_size=VOCABULARY, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
        layer_types=["full_attention"] * given["num_hidden_layers"], router_aux_loss_coef=0.001,
        max_position_embeddings=4 * BLOCK, bos_token_id=0, eos_token_id=0, pad_token_id=0, **given,
    )  # fmt: skip


def dtype_on(device: str) -> torch.dtype:
    """Return what models are in: bfloat16 where it is fast."""
    return torch.float32 if device == "cpu" else torch.bfloat16


def fresh(config: Any, seed: int, device: str) -> tuple[Any, MTPHead]:
    """Return a model of a configuration and a module of MTP, drawn anew."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    head = MTPHead(model, 1)
    for module in head.modules():
        model._init_weights(module)
    return model.to(device, dtype_on(device)), head.to(device, dtype_on(device))


class MasterAdamW(torch.optim.AdamW):
    """AdamW on float32 copies of weights in bfloat16, as Megatron-LM has them."""

    def __init__(self, params: Any, **options: Any) -> None:
        groups = [g if isinstance(g, dict) else {"params": g} for g in params]
        groups = [{**group, "params": list(group["params"])} for group in groups if group["params"]]
        self._own = [p for group in groups for p in group["params"]]
        masters = [{**g, "params": [p.detach().float() for p in g["params"]]} for g in groups]
        super().__init__(masters, **options)
        self._masters = [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take a step on the copies, and round them."""
        for own, master in zip(self._own, self._masters, strict=True):
            master.grad = None if own.grad is None else own.grad.float()
        found = super().step(closure)
        torch._foreach_copy_(self._own, self._masters)
        return found

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients."""
        for own in self._own:
            own.grad = None


class _Pretraining(nn.Module):
    """Loss of a batch of blocks: next tokens, those after them, and the load of experts."""

    def __init__(self, model: Qwen3NextForCausalLM, head: MTPHead) -> None:
        super().__init__()
        self.model, self.head = model, head

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        seen = []
        hook = self.model.get_decoder().register_forward_hook(
            lambda _m, _a, output: seen.append(output.last_hidden_state)
        )
        with hook:
            out = self.model(
                ids, use_cache=False, output_router_logits=True, logits_to_keep=1,
            )  # fmt: skip
        weight = self.model.get_output_embeddings().weight
        (ahead,) = self.head(seen[0], ids)
        own = _loss(seen[0][:, :-1], weight, ids[:, 1:])
        further = _loss(ahead[:, :-1], weight, ids[:, 2:])
        balance = self.model.config.router_aux_loss_coef * out.aux_loss
        return own + _MTP_WEIGHT * further + balance, own.detach()


def _loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy((hidden @ weight.T).flatten(0, 1).float(), labels.flatten())


def train_teacher(
    data: Data, folder: str | Path, *, tokens: int, batch: int = 128, rate: float = 1.5e-3,
    seed: int = 0, device: str = "cuda", sizes: dict[str, Any] | None = None,
    seconds: float = math.inf, compiled: bool = False,
) -> list[tuple[int, float]]:  # fmt: skip
    """Train it from nothing, and write it as a checkpoint of transformers with its module.

    Under ``torchrun`` every process takes its part of each batch.

    Args:
        data: Blocks; they come again where tokens are more than there are.
        folder: For the checkpoint.
        tokens: In all.
        batch: Blocks of a step.
        rate: Of learning at its highest.
        seed: Of weights and order.
        device: Of training.
        sizes: Other than those of `teacher_config`.
        seconds: After which the rate of learning goes to nothing within a twentieth of the steps.
        compiled: Whether layers go through torch.compile.

    Returns:
        Tokens seen and loss, every twentieth of the run.
    """
    rank, world = 0, 1
    if torch.distributed.is_torchelastic_launched():
        torch.distributed.init_process_group()
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        device = f"cuda:{rank}"
        torch.cuda.set_device(rank)
    model, head = fresh(teacher_config(**(sizes or {})), seed, device)
    for layer in (*model.get_decoder().layers, head.modules_[0].layer) if compiled else ():
        layer.compile()
    module: Any = _Pretraining(model, head)
    if world > 1:
        module = nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)
    optimizer = MasterAdamW(
        [{"params": [p for p in module.parameters() if p.requires_grad]}], lr=rate,
        betas=(0.9, 0.95), weight_decay=0.1, fused=device != "cpu",
    )  # fmt: skip
    steps = max(1, tokens // (batch * BLOCK))
    order, begin, curve, stop = _order(data, steps * batch, seed), time.monotonic(), [], steps
    for step in tqdm(range(steps), desc="teacher", unit="step", disable=rank > 0):
        if step >= stop:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 100) * _decay(step, stop)
        rows = order[step * batch : (step + 1) * batch][rank::world]
        ids = data.train[rows].to(device).long()
        loss, own = module(ids)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, steps // 20) == 0 or step + 1 == stop:
            late = torch.tensor(time.monotonic() - begin > seconds, device=device)
            if world > 1:
                torch.distributed.broadcast(late, 0)
            if bool(late) and stop == steps:
                stop = min(steps, step + steps // 20)
            curve.append(((step + 1) * batch * BLOCK, own.item()))
            tqdm.write(f"{curve[-1]} {time.monotonic() - begin:.0f} s") if rank == 0 else None
    if rank == 0:
        save(model, head, folder, data.folder)
    if world > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    return curve


def save(model: Any, head: MTPHead, folder: str | Path, tokenizer: str | Path) -> None:
    """Write a checkpoint with a module of MTP and a tokenizer."""
    from transformers import AutoTokenizer

    model.save_pretrained(folder)
    write_modules(folder, head)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


def _order(data: Data, count: int, seed: int) -> Tensor:
    """Return blocks of all steps: each once before any comes again."""
    draws = torch.Generator().manual_seed(seed)
    rounds = -(-count // len(data.train))
    return torch.cat([torch.randperm(len(data.train), generator=draws) for _ in range(rounds)])


def _decay(step: int, stop: int) -> float:
    """Return the rate's share: even, then straight to nothing over the last fifth."""
    return min(1.0, (stop - step) / max(1, stop // 5))
