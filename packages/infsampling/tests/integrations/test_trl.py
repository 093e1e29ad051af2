"""TRL's own trainer on our rollouts: numbers of samples, log-probabilities, and a rising reward."""

import pytest
import torch
from datasets import Dataset
from infsampling import InfiniteSampler, SamplingConfig
from infsampling.integrations.trl import make_rollout_func
from infsampling.trainer import LOSS_TYPES, grpo_loss, loss_items
from shared_kernels.testing.models import tiny_model

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.peer
WANTED = 42


def args(tmp_path, **changes):
    base = {
        "output_dir": str(tmp_path), "per_device_train_batch_size": 16, "num_generations": 8,
        "max_completion_length": 8, "learning_rate": 2e-2, "max_steps": 2, "report_to": [],
        "bf16": False, "use_cpu": True, "seed": 5, "logging_steps": 1, "save_strategy": "no",
        "disable_tqdm": True, "temperature": 0.9, "lr_scheduler_type": "constant",
    }  # fmt: skip
    return trl.GRPOConfig(**base | changes)


def share(completion_ids, **kwargs):
    return [sum(token == WANTED for token in ids) / len(ids) for ids in completion_ids]


def trainer(tmp_path, tokenizer, rollout, prompts, **changes):
    return trl.GRPOTrainer(
        model=tiny_model("llama"), reward_funcs=share, args=args(tmp_path, **changes),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=tokenizer, rollout_func=rollout,
    )  # fmt: skip


def recording(rollout, found):
    def call(prompts, trainer):
        weights = tiny_model("llama")
        weights.load_state_dict(trainer.model.state_dict())
        made = rollout(prompts, trainer)
        found.append((weights, trainer.state.global_step, prompts, made))
        return made

    return call


def test_rollouts_are_the_samplers(tmp_path, tokenizer):
    rollout, calls = make_rollout_func(SamplingConfig(max_slots=8, policy="fifo")), []
    made = trainer(tmp_path, tokenizer, recording(rollout, calls), ["w20 w21", "w30"])
    made.train()
    assert len(calls) == 2
    for model, step, prompts, got in calls:
        assert len(prompts) == 16
        settings = SamplingConfig.from_trl(made.args, max_slots=8, eos_token_id=(2,))
        unique = list(dict.fromkeys(map(tuple, got["prompt_ids"])))
        assert sorted(unique) == [(20, 21), (30,)]
        direct = InfiniteSampler(model, settings).generate(unique, 8, step=2 * step + 1)
        assert direct.completion_ids == got["completion_ids"]
        for ids, tokens, logprobs in zip(*got.values(), strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([[*ids, *tokens]])).logits[0, len(ids) - 1 : -1] / 0.9
            law = logits.log_softmax(-1)[range(len(tokens)), tokens]
            torch.testing.assert_close(torch.tensor(logprobs), law, rtol=0, atol=2e-5)
    # the weights of the second are other ones, and its samples are new
    assert calls[0][3]["completion_ids"] != calls[1][3]["completion_ids"]
    assert rollout.stats.prefill_tokens == 3
    # nothing is held while the trainer learns
    assert rollout._sampler._engine is None
    assert made.model.training
    assert {p.dtype for p in made.model.parameters()} == {torch.float32}


def test_the_reward_rises(tmp_path, tokenizer):
    made = trainer(tmp_path, tokenizer, make_rollout_func(), ["w20 w21", "w30"], max_steps=12)
    made.train()
    rewards = [line["reward"] for line in made.state.log_history if "reward" in line]
    assert len(rewards) == 12
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2


def test_conversations(tmp_path, tokenizer):
    rollout, calls = make_rollout_func(SamplingConfig(max_slots=8)), []
    prompts = [[{"role": "user", "content": "w20"}], [{"role": "user", "content": "w33"}]]
    made = trainer(tmp_path, tokenizer, recording(rollout, calls), prompts, max_steps=1)
    made.train()
    assert {tuple(ids) for ids in calls[0][3]["prompt_ids"]} == {(9, 20, 10), (9, 33, 10)}
    picture = [[{"role": "user", "content": [{"type": "image", "image": "x"}]}]]
    with pytest.raises(ValueError, match="a part that is no text"):
        rollout(picture, made)


class _Accelerator:
    num_processes, process_index = 1, 0


def test_numbers_go_on_within_a_step():
    rollout = make_rollout_func()
    ids = [[7]] * 3 + [[8]] * 2
    assert rollout._number(ids, (0, True), _Accelerator) == [0, 1, 2, 0, 1]
    assert rollout._number(ids, (0, True), _Accelerator) == [3, 4, 5, 2, 3]
    assert rollout._number(ids, (0, False), _Accelerator) == [0, 1, 2, 0, 1]
    assert rollout._number(ids, (1, True), _Accelerator) == [0, 1, 2, 0, 1]


def test_siblings_on_two_ranks_have_different_numbers(monkeypatch):
    everybody = [[[7]] * 3 + [[8]], [[7]] * 2 + [[9]]]
    from infsampling.keys import prompt_uid

    uids = [[prompt_uid(ids) for ids in rank] for rank in everybody]
    monkeypatch.setattr("accelerate.utils.gather_object", lambda mine: uids)
    found = []
    for rank in range(2):
        accelerator = type("A", (), {"num_processes": 2, "process_index": rank})
        rollout = make_rollout_func()
        found.append([rollout._number(everybody[rank], (0, True), accelerator) for _ in range(2)])
    assert found[0] == [[0, 1, 2, 0], [5, 6, 7, 1]]
    assert found[1] == [[3, 4, 0], [8, 9, 1]]


def test_fsdp_is_refused():
    trainer = type("T", (), {"is_fsdp_enabled": True})
    with pytest.raises(ValueError, match="FSDP"):
        make_rollout_func()([], trainer)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("corrected", [False, True])
def test_the_losses_are_trls(tmp_path, tokenizer, loss_type, corrected):
    """The trainer's own method on the same tensors."""
    options = {"epsilon": 0.2, "epsilon_high": 0.28}
    made = trainer(
        tmp_path, tokenizer, make_rollout_func(), ["w20"], loss_type=loss_type, **options
    )
    # with this from the beginning it would load a reference model
    made.beta = options["beta"] = 0.05
    made.args.use_bias_correction_kl = options["use_bias_correction_kl"] = corrected
    g = torch.Generator().manual_seed(0)
    logps = -torch.rand(8, 8, generator=g)
    old, ref = (logps + 0.5 * torch.randn(8, 8, generator=g) for _ in range(2))
    mask = (torch.arange(8) < torch.randint(1, 9, (8, 1), generator=g)).int()
    advantages = torch.randn(8, generator=g)
    theirs, ours = (logps.clone().requires_grad_() for _ in range(2))
    made._get_per_token_logps_and_entropies = lambda *a, **k: (theirs, torch.zeros(8, 8), None)
    made.current_gradient_accumulation_steps = 1
    made.model.train()
    ids = torch.zeros(8, 2, dtype=torch.long)
    expected = made._compute_loss(made.model, {
        "prompt_ids": ids, "prompt_mask": torch.ones_like(ids), "completion_mask": mask,
        "completion_ids": torch.zeros(8, 8, dtype=torch.long), "advantages": advantages,
        "old_per_token_logps": old, "ref_per_token_logps": ref, "num_items_in_batch": mask.sum(),
    })  # fmt: skip
    expected.backward()
    found = grpo_loss(ours, old, ref, advantages, mask, loss_type=loss_type,
                      num_items=loss_items(mask, loss_type, 8), **options)  # fmt: skip
    found.backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), abs=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-6)
