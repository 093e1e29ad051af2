"""From collected answers to a predictor: calibrated, saved, resumed, and against a plain loop."""

import copy

import pytest
import torch
from forelen import LengthPredictor
from forelen.dataset import LengthDataset, collate
from forelen.training import (
    calibrate,
    default_arguments,
    evaluate_collected,
    new_predictor,
    predict_rows,
    train,
)
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModel, Trainer, TrainerCallback

QUIET = {"disable_tqdm": True, "logging_strategy": "no"}


def arguments(folder, validate=False, **options):
    settings = {"per_device_train_batch_size": 64, "num_train_epochs": 3} | QUIET | options
    return default_arguments(folder, validate, **settings)


def test_rows(collected):
    config = new_predictor(collected, plp=True).config
    rows = LengthDataset(collected, config)
    lengths = collected.lengths.flatten()
    assert len(rows) == len(lengths) + int(
        (collected.step_time < lengths[collected.step_sample]).sum()
    )
    batch = rows.batch(range(len(rows)))
    assert (batch["labels"] >= 1).all()
    assert torch.equal(batch["labels"] + batch["times"], lengths[rows.sample])
    assert not batch["decode_features"][: len(lengths)].any()
    assert batch["decode_features"][len(lengths) :].any(-1).all()
    # log1p of the tokens is the first of the step's numbers
    found = torch.expm1(batch["decode_features"][len(lengths) :, -4])
    torch.testing.assert_close(found, rows.time[len(lengths) :].float(), rtol=2e-2, atol=0)
    # an answer's steps weigh one together
    later = rows.time > 0
    total = torch.zeros(len(lengths)).index_add(0, rows.sample[later], rows.weights[later])
    assert set(total[total > 0].round(decimals=4).tolist()) == {1.0}
    one = rows[3]
    assert one["prompt_features"].shape == (32,)
    assert torch.equal(collate([rows[3], rows[5]])["labels"], batch["labels"][[3, 5]])
    loaded = next(iter(DataLoader(rows, batch_size=7, collate_fn=collate)))
    assert torch.equal(loaded["prompt_features"], batch["prompt_features"][:7])


def test_splits_keep_prompts_together(collected):
    names = ("train", "validation", "calibration", "test")
    parts = [collected.split(name) for name in names]
    assert sum(map(len, parts)) == len(collected)
    hashes = [set(part.hashes.tolist()) for part in parts]
    assert sum(map(len, hashes)) == len(set().union(*hashes))
    for part in parts:
        if len(part):
            place = collected.hashes.tolist().index(int(part.hashes[0]))
            assert torch.equal(part.lengths[0], collected.lengths[place])
            own = part.step_sample // 4 == 0
            whole = collected.step_sample // 4 == place
            assert torch.equal(part.steps[own], collected.steps[whole])
            # which of its answers each step is of
            assert torch.equal(part.step_sample[own], collected.step_sample[whole] % 4)
    families = [set(collected.split(name, by="family").families) for name in names]
    assert sum(map(len, families)) == len(set().union(*families)) == 5
    with pytest.raises(ValueError, match="dev"):
        collected.split("dev")


def test_scales_and_marginal(collected):
    predictor = new_predictor(collected, plp=True)
    rows = LengthDataset(collected, predictor.config)
    batch = rows.batch(range(len(rows)))
    begun = batch["decode_features"][batch["times"] > 0]
    for x, low in ((batch["prompt_features"], 0), (begun, predictor.prompt_size)):
        chosen = slice(low, low + x.shape[1])
        x = (x - predictor.input_mean[chosen]) / predictor.input_scale[chosen]
        assert float(x.mean(0).abs().max()) < 1e-4
        assert ((x.std(0) - 1).abs() < 1e-3).all()
    assert float(predictor.marginal.sum()) == pytest.approx(1, abs=1e-5)
    # answers that ended are in their bins, and those that were stopped in longer ones
    ended, stopped = (collected.lengths[collected.censored == c] for c in (False, True))
    counts = predictor.bins.index(ended).bincount(minlength=len(predictor.bins))
    found = predictor.marginal * collected.lengths.numel()
    assert (found >= counts - 1e-3).all()
    assert float((found - counts).sum()) == pytest.approx(len(stopped), abs=1e-2)
    assert float((found - counts)[: int(predictor.bins.index(stopped).min())].max()) < 1e-3
    plain = new_predictor(collected, head="paper")
    assert not plain.input_mean.any()
    assert len(plain.bins) == 20


@pytest.mark.slow
def test_training_and_calibrating(collected, tmp_path):
    predictor = train(
        collected, output_dir=tmp_path, validation=collected.split("validation"), plp=True,
        arguments=arguments(tmp_path, True, num_train_epochs=6),
    )  # fmt: skip
    constant = float(collected.lengths.double().median())
    report = evaluate_collected(predictor, collected, constant=constant)
    assert report.mae < 0.9 * report.constant
    assert report.prompts == 120
    calibrate(predictor, collected)
    assert "0" in predictor.config.calibration
    report = evaluate_collected(predictor, collected, constant=constant)
    # lengths are whole numbers: an interval may hold more than it must
    assert 0.87 <= report.coverage["0.9"] <= 0.97
    later = evaluate_collected(predictor, collected, constant=constant, time=16)
    assert later.answers < report.answers
    with pytest.raises(ValueError, match="at 5 tokens"):
        evaluate_collected(predictor, collected, constant=constant, time=5)
    with pytest.raises(ValueError, match="at least 40 prompts"):
        calibrate(predictor, collected.select(range(9)))
    # saved and loaded
    predictor.save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("*.bin"))
    for loaded in (
        LengthPredictor.from_pretrained(tmp_path / "saved"),
        AutoModel.from_pretrained(tmp_path / "saved"),
    ):
        rows = LengthDataset(collected, loaded.config)
        ours, theirs = (predict_rows(p, rows) for p in (predictor, loaded))
        assert torch.equal(ours.pmf, theirs.pmf)
        assert torch.equal(ours.quantile(0.9), theirs.quantile(0.9))
    assert AutoConfig.from_pretrained(tmp_path / "saved").model_type == "forelen"


def test_a_resumed_run_is_the_uninterrupted_one(collected, tmp_path):
    settings = {"save_strategy": "epoch", "num_train_epochs": 3}

    class Stop(TrainerCallback):
        def on_epoch_end(self, args, state, control, **rest):
            control.should_training_stop = state.epoch >= 1.5

    whole = train(
        collected, output_dir=tmp_path / "a", arguments=arguments(tmp_path / "a", **settings)
    )
    torch.manual_seed(42)
    cut = new_predictor(collected)
    trainer = Trainer(
        cut, arguments(tmp_path / "b", **settings), data_collator=collate, callbacks=[Stop()],
        train_dataset=LengthDataset(collected, cut.config),
    )  # fmt: skip
    trainer.train()
    assert trainer.state.epoch == 2
    resumed = train(
        collected, output_dir=tmp_path / "b", arguments=arguments(tmp_path / "b", **settings),
        resume=True,
    )  # fmt: skip
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
        assert name.startswith(("input", "marginal")) or not torch.equal(
            value, cut.state_dict()[name]
        )


def test_the_papers_head_is_a_plain_loop(collected, tmp_path):
    """Against the paper's network, loss and optimiser written out, on the Trainer's batches."""
    torch.manual_seed(42)
    start = new_predictor(collected, head="paper", dropout=0.0)
    layers = torch.nn.Sequential(
        torch.nn.Linear(32, 16), torch.nn.LayerNorm(16), torch.nn.ReLU(), torch.nn.Dropout(0.0),
        torch.nn.Linear(16, 20),
    )  # fmt: skip
    for place, module in ((0, start.inner), (1, start.norm), (4, start.out)):
        layers[place].load_state_dict(module.state_dict())
    rows = LengthDataset(collected, start.config)
    seen = []

    def keep(batch):
        found = collate(batch)
        seen.append(copy.deepcopy(found))
        return found

    options = {
        "learning_rate": 2e-5, "per_device_train_batch_size": 16, "num_train_epochs": 2,
        "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "weight_decay": 0.0,
    }  # fmt: skip
    trainer = Trainer(start, arguments(tmp_path, **options), train_dataset=rows, data_collator=keep)
    trainer.train()
    optimizer = torch.optim.AdamW(layers.parameters(), lr=2e-5, weight_decay=0.0)
    edges = torch.tensor(start.bins.edges)
    centers = (edges[1:] + edges[:-1]) / 2
    for batch in seen:
        y = batch["labels"]
        place = (torch.bucketize(y.double(), edges.double()) - 1).clamp(0, 19)
        label = torch.exp(-(torch.arange(20) - place[:, None]).abs().float())
        label = label / label.sum(-1, keepdim=True)
        logits = layers(batch["prompt_features"])
        p = logits.softmax(-1)
        cross = -(label * logits.log_softmax(-1)).sum(-1)
        loss = (0.95 * cross + 0.05 * (y.float() - p @ centers.float()) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for place, module in ((0, start.inner), (1, start.norm), (4, start.out)):
        for name, value in module.state_dict().items():
            torch.testing.assert_close(
                value, layers[place].state_dict()[name], rtol=1e-4, atol=1e-6
            )
    # a weight of the trained model has moved
    assert not torch.equal(start.out.weight, new_predictor(collected, head="paper").out.weight)


def test_what_was_not_collected(collected):
    with pytest.raises(ValueError, match=r"features: .*'mean\.-1\.content'"):
        new_predictor(collected, pooling="mean")
    config = new_predictor(collected).config
    config.fingerprint = config.fingerprint | {"hidden_size": 7}
    with pytest.raises(ValueError, match="collect answers of that model"):
        LengthDataset(collected, config)


def test_bad_input(collected):
    predictor = new_predictor(collected)
    with pytest.raises(ValueError, match="prompt_features"):
        predictor(torch.zeros(2, 31))
    with pytest.raises(ValueError, match="decode_features"):
        predictor(torch.zeros(2, 32), torch.zeros(2, 68))
    with pytest.raises(ValueError, match="times"):
        grown = new_predictor(collected, plp=True)
        grown(torch.zeros(2, 32), torch.zeros(2, grown.step_size))
    with pytest.raises(ValueError, match="plp"):
        new_predictor(collected, head="linear", plp=True)
    with pytest.raises(ValueError, match="head"):
        new_predictor(collected, head="deep")
