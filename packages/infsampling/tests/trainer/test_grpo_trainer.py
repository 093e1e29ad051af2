"""Packed completions and the trainer, against separate rows, plain loops and TRL's trainer."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from infsampling import GRPOConfig, GRPOTrainer
from infsampling.attention import NAME
from infsampling.trainer import LOSS_TYPES, grpo_loss, loss_items
from infsampling.trainer.batches import Samples, StepSampler, micro_batches
from infsampling.trainer.logprobs import packed_logprobs
from shared_kernels.models import attention_of, configs_of
from shared_kernels.testing.models import tiny_model

WANTED = 42
PROMPTS = [{"prompt": "w20 w21", "bonus": 0.5}, {"prompt": "w30", "bonus": 0.25}]


def share(completion_ids, **kwargs):
    return [sum(token == WANTED for token in ids) / len(ids) for ids in completion_ids]


def args(tmp_path, **changes):
    base = {
        "output_dir": str(tmp_path), "per_device_train_batch_size": 8, "num_generations": 8,
        "gradient_accumulation_steps": 2, "max_completion_length": 8, "learning_rate": 2e-2,
        "max_steps": 2, "report_to": [], "use_cpu": True, "seed": 5, "logging_steps": 1,
        "save_strategy": "no", "disable_tqdm": True, "temperature": 0.9,
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    return GRPOConfig(**base | changes)


def trainer(tmp_path, tokenizer, reward=share, rows=PROMPTS, model=None, **changes):
    extra = {k: changes.pop(k) for k in ("eval_dataset", "peft_config") if k in changes}
    return GRPOTrainer(
        model=model or tiny_model("llama"), reward_funcs=reward, args=args(tmp_path, **changes),
        train_dataset=Dataset.from_list(rows), processing_class=tokenizer, **extra,
    )  # fmt: skip


def samples(vocabulary=96):
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(4, vocabulary, (n,), generator=generator).tolist()  # noqa: E731
    prompts = [draw(5)] * 4 + [draw(2)] * 4
    completions = [draw(n) for n in (3, 1, 7, 2, 4, 6, 1, 5)]
    logprobs = [[-1.0] * len(c) for c in completions]
    return Samples(prompts, completions, logprobs, [False] * 8)


def rows_of(model, found, temperature):
    """Log-probabilities of each completion behind a prompt of its own."""
    lines = []
    for prompt, tokens in zip(found.prompts, found.completions, strict=True):
        logits = model(input_ids=torch.tensor([[*prompt, *tokens]]), use_cache=False).logits[0]
        law = (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)
        lines.append(law[range(len(tokens)), tokens])
    return torch.nn.utils.rnn.pad_sequence(lines, batch_first=True)


def packed(model, batch, temperature):
    with attention_of(configs_of(model), NAME):
        return packed_logprobs(model, model, batch, temperature)


ARCHITECTURES = [
    "llama", "qwen3", "mistral", "gemma2", "gemma3", "cohere2", "granite", "olmo2", "phi3", "gpt2",
    "gpt_neox", "gpt_oss", "qwen3_moe",
]  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_logprobs_and_gradients_are_those_of_separate_rows(name):
    wide = name not in ("gpt_oss", "qwen3_moe")
    model = tiny_model(name).to(torch.float64 if wide else torch.float32).eval()
    found = samples(model.config.get_text_config().vocab_size)
    (batch,) = micro_batches(found, torch.zeros(8), [True] * 8, 1)
    weights = torch.randn(8, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for logps in (rows_of(model, found, 0.7), packed(model, batch, 0.7)[0]):
        model.zero_grad()
        # values behind a completion's end are padding
        (logps * weights.to(logps.dtype) * batch["mask"]).sum().backward()
        results.append((logps.detach(), {n: p.grad for n, p in model.named_parameters()}))
    (exact, gradients), (logps, ours) = results
    # embeddings, norms and positions of transformers are float32 in some places
    tolerance = 1e-11 if name in ("gpt2",) else 2e-5
    torch.testing.assert_close(logps, exact, rtol=0, atol=tolerance)
    for key, gradient in gradients.items():
        if gradient is not None:
            distance = (ours[key] - gradient).norm() / gradient.norm().clamp(min=1e-12)
            assert float(distance) < max(tolerance, 1e-11), key


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_micro_batches_add_up_to_the_whole_groups_gradient(loss_type, parts):
    model = tiny_model("gpt2").double().eval()
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(0.01 * torch.randn_like(p))
    found = samples()
    generator = torch.Generator().manual_seed(2)
    advantages = torch.randn(8, dtype=torch.float64, generator=generator)
    counted = [True, True, False, True, True, True, True, True]
    options = {"loss_type": loss_type, "beta": 0.1, "use_bias_correction_kl": True}

    def gradient(losses):
        model.zero_grad()
        for loss in losses:
            loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    def by_rows():
        logps = rows_of(model, found, 0.7)
        with torch.no_grad():
            ref = rows_of(reference, found, 0.7)
        mask = torch.zeros_like(logps)
        for row, (tokens, on) in enumerate(zip(found.completions, counted, strict=True)):
            mask[row, : len(tokens)] = float(on)
        items = loss_items(mask, loss_type, 9)
        yield grpo_loss(logps, None, ref, advantages, mask, num_items=items, **options)

    def by_parts():
        batches = micro_batches(found, advantages, counted, parts)
        assert len(batches) == parts
        items = sum(loss_items(batch["mask"], loss_type, 9) for batch in batches)
        for batch in batches:
            with torch.no_grad():
                ref = packed(reference, batch, 0.7)[0]
            yield grpo_loss(packed(model, batch, 0.7)[0], None, ref, batch["advantages"],
                            batch["mask"], num_items=items, **options)  # fmt: skip

    exact, ours = gradient(by_rows()), gradient(by_parts())
    assert float((ours - exact).norm() / exact.norm()) < 1e-11


def test_the_head_runs_on_predicting_tokens_only_and_keeps_no_logits(monkeypatch):
    from infsampling.trainer import logprobs

    monkeypatch.setattr(logprobs, "_LOGITS", 4 * 96)
    model, found = tiny_model("llama").eval(), samples()
    (batch,) = micro_batches(found, torch.zeros(8), [True] * 8, 1)
    seen = []
    model.lm_head.register_forward_hook(lambda m, a, out: seen.append(out.shape[-2]))
    whole, entropies = packed(model, batch, 1.0)
    assert seen == [1, *[4] * 7, 1]
    whole.sum().backward()
    assert seen[9:] == [1, *[4] * 7]
    assert not entropies.requires_grad
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        packed(model, batch, 1.0)
    assert kept
    assert torch.Size([4, 96]) not in kept


def test_dropout_and_padding_change_nothing(tmp_path, tokenizer):
    model = tiny_model("gpt2")
    assert any(isinstance(m, torch.nn.Dropout) for m in model.modules())
    made = trainer(tmp_path, tokenizer, model=model)
    assert all(m.p == 0 for m in model.modules() if isinstance(m, torch.nn.Dropout))
    made.train()


def test_the_reward_rises_and_what_happened_is_logged(tmp_path, tokenizer):
    made = trainer(tmp_path, tokenizer, max_steps=12)
    made.train()
    lines = [line for line in made.state.log_history if "reward" in line]
    rewards = [line["reward"] for line in lines]
    assert len(rewards) == 12
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2
    for line in lines:
        assert line["rewards/share/mean"] == pytest.approx(line["reward"])
        assert line["sampling/logprob_gap"] < 1e-5
        assert 0 < line["completions/mean_length"] <= 8
        assert line["entropy"] > 0
        assert line["sampling/steps"] >= 1
    assert made.model.training
    assert made.model.config._attn_implementation != NAME


def test_a_step_of_sgd_is_the_gradient_of_the_whole_group(tmp_path, tokenizer):
    changes = {"optim": "sgd", "max_steps": 1, "max_grad_norm": 0.0, "learning_rate": 0.5}
    whole = trainer(tmp_path, tokenizer, per_device_train_batch_size=16,
                    gradient_accumulation_steps=1, **changes)  # fmt: skip
    parts = trainer(tmp_path, tokenizer, per_device_train_batch_size=4,
                    gradient_accumulation_steps=4, **changes)  # fmt: skip
    checkpoints = trainer(tmp_path, tokenizer, gradient_checkpointing=True, **changes)
    start = torch.cat([p.detach().flatten().clone() for p in whole.model.parameters()])
    found = []
    for made in (whole, parts, checkpoints):
        made.train()
        found.append(torch.cat([p.detach().flatten() for p in made.model.parameters()]))
    assert float((found[0] - start).norm()) > 1e-3
    for other in found[1:]:
        assert float((other - found[0]).norm() / (found[0] - start).norm()) < 1e-5


def test_a_resumed_run_goes_on_as_it_would_have(tmp_path, tokenizer):
    rows = [{"prompt": f"w{i}"} for i in range(20, 34)]
    whole = trainer(tmp_path / "a", tokenizer, rows=rows, max_steps=9)
    whole.train()
    first = trainer(tmp_path / "b", tokenizer, rows=rows, max_steps=9, save_strategy="steps",
                    save_steps=5)  # fmt: skip
    first.train()
    resumed = trainer(tmp_path / "b", tokenizer, rows=rows, max_steps=9)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-5"))
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_steps_on_the_same_completions(tmp_path, tokenizer):
    rolled, batches = [], []

    def reward(completion_ids, **kwargs):
        rolled.append(len(completion_ids))
        return share(completion_ids)

    changes = {"num_iterations": 3, "max_steps": 6, "optim": "sgd", "max_grad_norm": 0.0,
               "learning_rate": 8.0, "epsilon": 0.1, "epsilon_high": 0.3}  # fmt: skip
    made = trainer(tmp_path, tokenizer, reward, **changes)
    model = copy.deepcopy(made.model)
    take = made.get_batch_samples

    def recorded(*args):
        found = take(*args)
        batches.append(found[0])
        return found

    made.get_batch_samples = recorded
    made.train()
    assert rolled == [16, 16]
    # a plain loop
    clipped = []
    for step, parts in enumerate(batches):
        if step % 3 == 0:
            with torch.no_grad():
                old = [packed(model, batch, 0.9)[0] for batch in parts]
        model.zero_grad()
        for batch, before in zip(parts, old, strict=True):
            logps = packed(model, batch, 0.9)[0]
            grpo_loss(
                logps,
                before,
                None,
                batch["advantages"].float(),
                batch["mask"],
                epsilon=0.1,
                epsilon_high=0.3,
                num_items=sum(b["mask"].sum() for b in parts),
            ).backward()
            ratio, gain = (logps - before).exp(), batch["advantages"][:, None]
            cut = (ratio < 0.9) & (gain < 0) | (ratio > 1.3) & (gain > 0)
            clipped.append(float(cut[batch["mask"] > 0].double().mean()))
        with torch.no_grad():
            for p in model.parameters():
                p -= 8.0 * p.grad
    for a, b in zip(made.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    lines = [line for line in made.state.log_history if "loss" in line]
    assert ["reward" in line for line in lines] == [True, False, False] * 2
    told = [line.get("clip_ratio/region_mean", 0.0) for line in lines]
    assert told == pytest.approx([sum(clipped[i : i + 2]) / 2 for i in range(0, 12, 2)], abs=1e-6)
    assert max(told) > 0


def test_no_prompt_is_left_out_between_rollouts(tmp_path, tokenizer):
    seen = []

    def reward(prompts, **kwargs):
        seen.extend(prompts[::8])
        return [0.0] * len(prompts)

    rows = [{"prompt": f"w{i}"} for i in range(20, 26)]
    trainer(tmp_path, tokenizer, reward, rows=rows, num_iterations=2, max_steps=6).train()
    assert sorted(seen) == [row["prompt"] for row in rows]


@pytest.mark.parametrize("saved", [4, 5])
def test_resuming_between_steps_on_the_same_completions(tmp_path, tokenizer, saved):
    rows, rolled = [{"prompt": f"w{i}"} for i in range(20, 34)], []

    def reward(completion_ids, **kwargs):
        rolled.append(completion_ids)
        return share(completion_ids)

    options = {"rows": rows, "max_steps": 8, "num_iterations": 2}
    whole = trainer(tmp_path / "a", tokenizer, reward, **options)
    whole.train()
    first = trainer(tmp_path / "b", tokenizer, reward, save_strategy="steps", save_steps=saved,
                    **options)  # fmt: skip
    first.train()
    rolled.clear()
    resumed = trainer(tmp_path / "b", tokenizer, reward, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / f"checkpoint-{saved}"))
    same = all(map(torch.equal, whole.model.parameters(), resumed.model.parameters()))
    assert same == (saved == 4)
    assert len(rolled) == 2
    # another run of the same trainer begins anew
    rolled.clear()
    resumed.train()
    resumed.args.max_steps = 1
    for _ in range(2):
        resumed.train()
    assert len(rolled) == 6


def test_evaluation_samples_other_completions_and_learns_nothing(tmp_path, tokenizer):
    seen = []

    def reward(prompts, completion_ids, bonus, **kwargs):
        # prompts are in another order
        seen.append({tuple(ids) for ids in completion_ids})
        return bonus

    made = trainer(tmp_path, tokenizer, reward, eval_dataset=Dataset.from_list(PROMPTS),
                   learning_rate=0.0)  # fmt: skip
    before = [p.detach().clone() for p in made.model.parameters()]
    metrics = made.evaluate()
    assert metrics["eval_reward"] == pytest.approx(0.375)
    assert all(map(torch.equal, before, made.model.parameters()))
    made.train()
    assert len(seen[0] & seen[1]) < len(seen[0]) / 2
    # the second step has other samples than the first, though its weights have not changed
    assert len(seen[1] & seen[2]) < len(seen[1]) / 2


def test_completions_that_were_cut_teach_nothing_if_asked(tmp_path, tokenizer):
    def change(**options):
        made = trainer(tmp_path, tokenizer, max_completion_length=1, max_steps=1, optim="sgd",
                       learning_rate=0.5, **options)  # fmt: skip
        before = [p.detach().clone() for p in made.model.parameters()]
        made.train()
        # slots make room for activations
        assert made.sampler._engine is None
        return not all(map(torch.equal, before, made.model.parameters()))

    first = lambda completion_ids, **kwargs: [ids[0] / 96 for ids in completion_ids]  # noqa: E731
    assert change(reward=first)
    assert not change(reward=first, mask_truncated_completions=True)


def test_conversations_and_columns_reach_the_reward(tmp_path, tokenizer):
    seen = {}

    def reward(prompts, completions, completion_ids, bonus, **kwargs):
        seen.update(prompts=prompts, completions=completions, bonus=bonus, ids=completion_ids)
        return [None if n == 3 else 1.0 * (n % 2) for n in range(len(prompts))]

    rows = [{"prompt": [{"role": "user", "content": f"w{n}"}], "bonus": n} for n in (20, 33)]
    made = trainer(tmp_path, tokenizer, [reward, share], rows=rows, max_steps=1,
                   reward_weights=[1.0, 0.0])  # fmt: skip
    made.train()
    assert sorted(seen["bonus"]) == [20] * 8 + [33] * 8
    assert [p[0]["content"] for p in seen["prompts"]] == [f"w{n}" for n in seen["bonus"]]
    for message, ids in zip(seen["completions"], seen["ids"], strict=True):
        assert message[0]["role"] == "assistant"
        assert message[0]["content"] == tokenizer.decode(ids, skip_special_tokens=True)


def test_adapters_and_a_reference(tmp_path, tokenizer):
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    made = trainer(tmp_path, tokenizer, model=model, peft_config=config, beta=0.1)
    made.train()
    lines = [line for line in made.state.log_history if "kl" in line]
    # the reference is the model without its adapters
    assert lines[0]["kl"] > 1e-4
    base = made.model.get_base_model().state_dict()
    for name, value in before.items():
        kept = base.get(name, base.get(name.replace("_proj.", "_proj.base_layer.")))
        assert torch.equal(kept, value), name
    made = trainer(tmp_path, tokenizer, beta=0.1)
    made.train()
    lines = [line for line in made.state.log_history if "kl" in line]
    assert abs(lines[0]["kl"]) < 1e-9
    assert lines[1]["kl"] > 1e-4


def test_mixed_precision_keeps_the_weights(tmp_path, tokenizer):
    made = trainer(tmp_path, tokenizer, bf16=True)
    made.train()
    assert {p.dtype for p in made.model.parameters()} == {torch.float32}
    assert [line["sampling/logprob_gap"] < 0.05 for line in made.state.log_history if "reward" in
            line] == [True, True]  # fmt: skip


@pytest.mark.peer
@pytest.mark.parametrize(("loss_type", "iterations"), [("dapo", 1), ("grpo", 1), ("dapo", 2)])
def test_trls_trainer_makes_the_same_steps(tmp_path, tokenizer, loss_type, iterations):
    trl = pytest.importorskip("trl")
    from infsampling.integrations.trl import make_rollout_func

    shared = {
        "output_dir": str(tmp_path), "per_device_train_batch_size": 8, "num_generations": 8,
        "gradient_accumulation_steps": 2, "max_completion_length": 8, "learning_rate": 0.1,
        "max_steps": 4, "report_to": [], "use_cpu": True, "seed": 5, "logging_steps": 1,
        "save_strategy": "no", "disable_tqdm": True, "temperature": 0.9,
        "lr_scheduler_type": "constant", "optim": "sgd", "loss_type": loss_type, "bf16": False,
        "num_iterations": iterations,
    }  # fmt: skip
    theirs = trl.GRPOTrainer(
        model=tiny_model("llama"), reward_funcs=share, args=trl.GRPOConfig(**shared),
        train_dataset=Dataset.from_list(PROMPTS), processing_class=tokenizer,
        rollout_func=make_rollout_func(),
    )  # fmt: skip
    ours = trainer(tmp_path, tokenizer, **shared)
    start = [p.detach().clone() for p in ours.model.parameters()]
    theirs.train()
    ours.train()
    rewards = [
        [line["reward"] for line in made.state.log_history if "reward" in line]
        for made in (theirs, ours)
    ]
    assert rewards[0] == pytest.approx(rewards[1])
    moved = distance = 0.0
    for p, a, b in zip(start, theirs.model.parameters(), ours.model.parameters(), strict=True):
        moved += float((a - p).norm() ** 2)
        distance += float((a - b).norm() ** 2)
    assert moved > 1e-6
    assert (distance / moved) ** 0.5 < 1e-3


def test_samples_of_a_prompt_have_different_numbers_on_all_processes(
    tmp_path, tokenizer, monkeypatch
):
    made = trainer(tmp_path, tokenizer)
    assert made._numbers([[7], [8], [7]], 2) == [0, 1, 0, 1, 2, 3]
    monkeypatch.setattr(type(made.accelerator), "process_index", 1)
    assert made._numbers([[7], [8], [7]], 2) == [6, 7, 6, 7, 8, 9]


def test_step_sampler():
    made = StepSampler(11, 2, 3, 2, seed=0)
    batches = [*made]
    assert len(batches) == len(made) == 12
    steps = [batches[first : first + 6] for first in (0, 6)]
    taken = []
    for step in steps:
        # a process gets every other batch, the same one for all micro batches
        for process in range(2):
            own = step[process::2]
            assert own == [own[0]] * 3
            taken += own[0]
    assert len(set(taken)) == 8
    made.set_epoch(1)
    assert [*made] != batches
    assert [*StepSampler(4, 2, 1, 1, None)] == [[0, 1], [2, 3]]


RANK = """
import json, sys, torch
sys.path[:0] = sys.argv[2:]
import test_grpo_trainer as t
from words import make_tokenizer
from datasets import Dataset
from pathlib import Path

def reward(completion_ids, **kwargs):
    return [float(sum(ids)) for ids in completion_ids]

tokenizer = make_tokenizer()
made = t.trainer(Path(sys.argv[1]), tokenizer, reward, max_steps=1, optim="sgd", max_grad_norm=0.0,
                 learning_rate=0.5, rows=[{"prompt": f"w{i}"} for i in range(20, 24)])
start = {n: p.detach().clone() for n, p in made.model.named_parameters()}
batches = []
get = made.get_batch_samples
def recorded(*args):
    found = get(*args)
    batches.extend(found[0])
    return found
made.get_batch_samples = recorded
made.train()
torch.save([start, batches, {n: p.detach() for n, p in made.model.named_parameters()}],
           f"{sys.argv[1]}/{made.accelerator.process_index}.pt")
"""


def test_two_processes_with_different_lengths_make_one_step(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29617",
        str(script), str(tmp_path), str(Path(__file__).parent), str(Path(__file__).parent.parent),
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    model = tiny_model("llama")
    model.load_state_dict(ranks[0][0], strict=False)
    batches = [batch for rank in ranks for batch in rank[1]]
    assert len(batches) == 4
    tokens = [int(batch["mask"].sum()) for batch in batches]
    assert tokens[0] + tokens[1] != tokens[2] + tokens[3]
    assert len({json.dumps(batch["input_ids"].tolist()) for batch in batches}) == 4
    for batch in batches:
        grpo_loss(packed(model, batch, 0.9)[0], None, None, batch["advantages"], batch["mask"],
                  num_items=sum(tokens)).backward()  # fmt: skip
    for name, p in model.named_parameters():
        expected = p.detach() - 0.5 * p.grad
        for rank in ranks:
            torch.testing.assert_close(rank[2][name], expected, rtol=0, atol=1e-6)


def test_bad_input(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"num_generations: expected a divisor of .* = 16"):
        args(tmp_path, num_generations=3)
    with pytest.raises(ValueError, match="temperature: expected a positive number"):
        args(tmp_path, temperature=0.0)
    with pytest.raises(ValueError, match="num_iterations: expected"):
        args(tmp_path, num_iterations=0)
    with pytest.raises(ValueError, match="loss_type: expected one of"):
        args(tmp_path, loss_type="ppo")
    with pytest.raises(ValueError, match="at least the 2 prompts of a step, got 1"):
        trainer(tmp_path, tokenizer, rows=PROMPTS[:1]).train()
    with pytest.raises(ValueError, match="prompt of row 0: expected a text"):
        trainer(tmp_path, tokenizer, rows=[{"question": "w3"}] * 2).train()
    with pytest.raises(ValueError, match="16 numbers from <lambda>"):
        trainer(tmp_path, tokenizer, lambda **kwargs: [1.0]).train()
    with pytest.raises(ValueError, match="got None from all"):
        trainer(tmp_path, tokenizer, lambda prompts, **kwargs: [None] * len(prompts)).train()
    with pytest.raises(ValueError, match="reward_weights: expected 1 numbers"):
        trainer(tmp_path, tokenizer, reward_weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="processing_class: expected the model's tokenizer"):
        GRPOTrainer(tiny_model("llama"), share, args(tmp_path))
