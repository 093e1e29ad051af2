"""Training and calibrating a predictor on what was collected."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from forelen.binning import Bins
from forelen.calibration import Calibration
from forelen.configuration_forelen import LengthPredictorConfig
from forelen.dataset import LengthDataset, collate
from forelen.metrics import Report, evaluate
from forelen.modeling_forelen import LengthPredictor

if TYPE_CHECKING:
    import os

    from torch import Tensor
    from transformers import TrainingArguments

    from forelen.distribution import LengthDistribution
    from forelen.store import Collected

#: Ages from which answers are calibrated apart: each twice the last.
AGES = (0, *(1 << power for power in range(24)))
#: Prompts that a part of a calibration has at least.
FEWEST = 40
_BATCH = 8192


def new_predictor(found: Collected, **settings: Any) -> LengthPredictor:
    """Return an untrained predictor for collected answers: its bins, scales and marginal fit them.

    Args:
        found: Training prompts.
        **settings: Of `LengthPredictorConfig`.
    """
    header = found.header
    lengths, censored = found.lengths.flatten(), found.censored.flatten()
    if "bins" not in settings:
        scale = "linear" if settings.get("head") == "paper" else "log1p"
        count = 20 if settings.get("head") == "paper" else 64
        if bool(censored.all()):
            raise ValueError(
                f"found: all {len(lengths)} answers were stopped by their cap, so nothing is known "
                "of their lengths; collect with a larger max_new_tokens"
            )
        settings["bins"] = Bins.fit(lengths[~censored], count, scale=scale).to_dict()
    config = LengthPredictorConfig(
        hidden_size=header["model"]["hidden_size"], fingerprint=header["model"],
        sampling=header["sampling"], span=header["span"], **settings,
    )  # fmt: skip
    predictor = LengthPredictor(config)
    weights = torch.ones(len(lengths), dtype=torch.float64)
    bins = predictor.bins
    # answers that were stopped are longer than their tokens: share them among longer ones
    marginal = torch.zeros(len(bins), dtype=torch.float64)
    marginal.index_add_(0, bins.index(lengths[~censored]), weights[~censored])
    if bool(censored.any()):
        above = (1 - bins.below(lengths[censored])) * (marginal + 1e-9)
        marginal = marginal + (above / above.sum(-1, keepdim=True).clamp(min=1e-300)).sum(0)
    predictor.marginal.copy_((marginal / marginal.sum()).float())
    if config.head != "paper":
        _fit_scales(predictor, LengthDataset(found, config))
    return predictor


def _fit_scales(predictor: LengthPredictor, rows: LengthDataset) -> None:
    """Set what brings each number that goes in to mean 0 and deviation 1, over the rows."""
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:20_000]
    parts = [rows.batch(chosen)["prompt_features"]]
    if predictor.config.plp:
        later = chosen[rows.time[chosen] > 0] if predictor.two_heads else chosen
        parts.append(rows.batch(later)["decode_features"])
    moments = [_moments(part) for part in parts]
    mean, scale = (torch.cat(found) for found in zip(*moments, strict=True))
    predictor.input_mean.copy_(mean)
    predictor.input_scale.copy_(scale)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the deviation, 1 where there is none, of each column."""
    if len(x) < 2:
        return torch.zeros(x.shape[1]), torch.ones(x.shape[1])
    x = torch.where(x.isfinite(), x, 0.0).double()
    scale = x.std(0)
    return x.mean(0).float(), torch.where(scale > 1e-6, scale, 1.0).float()


def train(
    found: Collected,
    *,
    output_dir: str | os.PathLike[str],
    validation: Collected | None = None,
    arguments: TrainingArguments | None = None,
    resume: bool = False,
    **settings: Any,
) -> LengthPredictor:
    """Train a predictor by the stock Trainer.

    Args:
        found: Training prompts.
        output_dir: Checkpoints go here.
        validation: Prompts to choose the best epoch by.
        arguments: Of the Trainer; by default AdamW with a learning rate of 1e-3 that falls
            linearly, batches of 512 rows and 12 epochs. The paper's: 2e-5, 16 and 10.
        resume: Go on from the newest checkpoint in ``output_dir``.
        **settings: Of `LengthPredictorConfig`.

    Returns:
        The predictor of the best epoch, on the CPU, not calibrated.
    """
    from transformers import Trainer, set_seed

    arguments = arguments or default_arguments(output_dir, validation is not None)
    set_seed(arguments.seed)
    predictor = new_predictor(found, **settings)
    rows = LengthDataset(found, predictor.config)
    trainer = Trainer(
        predictor,
        arguments,
        train_dataset=rows,
        eval_dataset=None if validation is None else LengthDataset(validation, predictor.config),
        data_collator=collate,
    )
    trainer.train(resume_from_checkpoint=resume or None)
    return predictor.cpu().eval()


def default_arguments(
    output_dir: str | os.PathLike[str], validate: bool, **options: Any
) -> TrainingArguments:
    """Return the arguments that `train` takes by default; others may be given by name."""
    from transformers import TrainingArguments

    every = "epoch" if validate else "no"
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 512,
        "per_device_eval_batch_size": 2048,
        "num_train_epochs": 12,
        "learning_rate": 1e-3,
        "weight_decay": 0.01,
        "remove_unused_columns": False,
        "eval_strategy": every,
        "save_strategy": every,
        "save_total_limit": 2,
        "load_best_model_at_end": validate,
        "metric_for_best_model": "loss",
        "logging_strategy": "epoch",
        "report_to": [],
        "dataloader_num_workers": 0,
        "seed": 42,
        "label_names": ["labels"],
        "prediction_loss_only": True,
    }
    return TrainingArguments(output_dir=str(output_dir), **(settings | options))


@torch.no_grad()
def predict_rows(
    predictor: LengthPredictor, rows: LengthDataset, *, chosen: Tensor | None = None, time: int = 0
) -> LengthDistribution:
    """Return distributions of rows of a data set, on the CPU."""
    device = next(predictor.parameters()).device
    chosen = torch.arange(len(rows)) if chosen is None else chosen
    predictor.eval()
    logits = [torch.empty(0, len(predictor.bins))]
    for low in range(0, len(chosen), _BATCH):
        batch = rows.batch(chosen[low : low + _BATCH])
        names = ("prompt_features", "decode_features", "times")
        arguments = {name: batch[name].to(device) for name in names if name in batch}
        logits.append(predictor(**arguments).logits.cpu())
    return predictor.distribution(torch.cat(logits), time=time)


def calibrate(predictor: LengthPredictor, found: Collected) -> LengthPredictor:
    """Calibrate a predictor on prompts that it was not trained on, by age of the answers.

    Ages with fewer than 40 prompts share the calibration of younger ones.

    Returns:
        The predictor; its config holds the calibration.

    Raises:
        ValueError: Too few prompts to say anything.
    """
    if len(found) < FEWEST:
        raise ValueError(
            f"found: expected at least {FEWEST} prompts, got {len(found)}; intervals that hold "
            "95 % of the answers cannot be learnt from fewer"
        )
    predictor.config.calibration = {}
    rows = LengthDataset(found, predictor.config)
    parts = {}
    ages = AGES if predictor.config.plp else (0,)
    for begin, end in zip(ages, (*ages[1:], 1 << 31), strict=True):
        chosen = ((rows.time >= begin) & (rows.time < end)).nonzero()[:, 0]
        groups = rows.group[chosen]
        if len(groups.unique()) < FEWEST:
            continue
        fitted = Calibration.fit(
            predict_rows(predictor, rows, chosen=chosen), rows.labels[chosen], groups,
            censored=rows.censored[chosen],
        )  # fmt: skip
        parts[str(begin)] = fitted.to_dict()
    predictor.config.calibration = parts
    return predictor


def evaluate_collected(
    predictor: LengthPredictor, found: Collected, *, constant: float, time: int = 0
) -> Report:
    """Evaluate a predictor on prompts that neither trained nor calibrated it.

    Args:
        predictor: With ``plp`` for a time above 0.
        found: Test prompts.
        constant: The median of training's lengths.
        time: Tokens that were read; only answers that went on then.

    Raises:
        ValueError: No answers went on so long.
    """
    rows = LengthDataset(found, predictor.config)
    chosen = (rows.time == time).nonzero()[:, 0]
    if not len(chosen):
        raise ValueError(f"time: no answer was kept at {time} tokens; 0 is before it begins")
    cap = found.header["sampling"]["max_new_tokens"]
    return evaluate(
        predict_rows(predictor, rows, chosen=chosen, time=time),
        rows.labels[chosen],
        rows.group[chosen],
        constant=max(1.0, constant - time),
        cap=None if cap is None else cap - time,
        censored=rows.censored[chosen],
    )
