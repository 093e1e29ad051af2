"""The ``flashdp`` command line: noise for a budget, the cost of noise, models, audits, reports.

Results go to stdout, messages to stderr; ``--json`` prints one JSON document instead of tables.
Exit status: 0 done, 1 the work failed or the target cannot be reached, 2 bad input. No command
loads torch before it runs.
"""

from __future__ import annotations

import math
from pathlib import Path  # noqa: TC003 (cyclopts reads the annotations)
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter
from shared_kernels.console import JsonFlag, print_json, print_table, run_app

from flashdp.config import AccountantKind  # noqa: TC001 (as above)

app = App(
    name="flashdp",
    help="Differentially private training of large models.",
    version=lambda: _version(),
    help_format="plaintext",
)

FallbackFlag = Annotated[bool, Parameter(negative="")]


@app.command
def calibrate(
    *,
    epsilon: float,
    delta: float,
    steps: int,
    sample_rate: float | None = None,
    batch_size: float | None = None,
    units: int | None = None,
    max_batch_size: int | None = None,
    accountant: AccountantKind = "pld",
    json_output: JsonFlag = False,
) -> int:
    """Find the noise multiplier that spends a budget.

    Args:
        epsilon: Epsilon to reach.
        delta: Delta of the guarantee, far below 1 / units.
        steps: Optimizer steps.
        sample_rate: Probability with which each unit enters a step.
        batch_size: Expected units per step; with --units, instead of --sample-rate.
        units: Public number of units (rows, or users).
        max_batch_size: Larger draws are cut to a random subset of this size; needs --units.
        accountant: pld (tight) or rdp (fast, looser).
        json_output: Print JSON.
    """
    from flashdp.accounting import calibrate as find

    rate = _rate(sample_rate, batch_size, units)
    truncation = _truncation(max_batch_size, units)
    sigma = find(epsilon, delta, sample_rate=rate, steps=steps, kind=accountant, **truncation)
    return _print_cost(sigma, delta, rate, steps, accountant, truncation, json_output)


@app.command
def epsilon(
    *,
    noise_multiplier: float,
    delta: float,
    steps: int,
    sample_rate: float | None = None,
    batch_size: float | None = None,
    units: int | None = None,
    max_batch_size: int | None = None,
    accountant: AccountantKind = "pld",
    json_output: JsonFlag = False,
) -> int:
    """Compute what a run costs.

    Args:
        noise_multiplier: Standard deviation of the noise over the sensitivity.
        delta: Delta of the guarantee, far below 1 / units.
        steps: Optimizer steps.
        sample_rate: Probability with which each unit enters a step.
        batch_size: Expected units per step; with --units, instead of --sample-rate.
        units: Public number of units (rows, or users).
        max_batch_size: Larger draws are cut to a random subset of this size; needs --units.
        accountant: pld (tight) or rdp (fast, looser).
        json_output: Print JSON.
    """
    rate = _rate(sample_rate, batch_size, units)
    truncation = _truncation(max_batch_size, units)
    return _print_cost(noise_multiplier, delta, rate, steps, accountant, truncation, json_output)


@app.command
def check(
    model: str,
    *,
    lora_rank: int | None = None,
    fallback: FallbackFlag = False,
    json_output: JsonFlag = False,
) -> int:
    """Say whether a model can be trained privately, and which rule covers each layer.

    Only the configuration is read; the exit status is 1 if something is refused.

    Args:
        model: Folder with a config.json, such a file, or a name on the Hugging Face hub.
        lora_rank: Train LoRA adapters of this rank on every matrix but the head, nothing else.
        fallback: Allow one gradient per row where no rule fits.
        json_output: Print JSON.
    """
    from flashdp.check import check_model, outline

    found = check_model(outline(model, lora_rank=lora_rank), fallback=fallback)
    if json_output:
        print_json({"model": model, **found.to_dict()})
        return 0 if found.passed else 1
    print_table(
        [
            (e.name, str(e.count), e.kind, _shape(e.shape), f"{e.parameters:,}", e.rule or "none")
            for e in found.layers
        ],
        ("layers", "count", "class", "shape", "parameters", "rule"),
    )
    if found.passed:
        print(f"{found.parameters:,} parameters are covered, {found.frozen:,} are frozen.")
        return 0
    print("The model cannot be trained privately as it is:")
    for issue in found.issues:
        print(f"- {issue}")
    return 1


@app.command
def plan(
    model: str,
    *,
    tokens: int,
    batch: int,
    lora_rank: int | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    json_output: JsonFlag = False,
) -> int:
    """Estimate what a private step costs, and how each layer's norms would be taken.

    Numbers are counted, not measured: FLOPs of the layers' products beside an ordinary step's,
    bytes moved and held beyond those of weights and activations, and the time that these take at
    the device's rates, relative to an ordinary step. All parameters are trained, or adapters only,
    clipped by module.

    Args:
        model: Folder with a config.json, such a file, or a name on the Hugging Face hub.
        tokens: Of each row.
        batch: Rows of a physical batch, a privacy unit each.
        lora_rank: Train LoRA adapters of this rank on every matrix but the head, nothing else.
        device: Whose rates decide: a typical CPU's, or this GPU's, measured.
        json_output: Print JSON.
    """
    from flashdp.check import outline
    from flashdp.forecast import forecast

    outlined = outline(model, lora_rank=lora_rank)
    found = forecast(outlined, units=batch, tokens=tokens, device=device)
    if json_output:
        return print_json({"model": model, **found.to_dict()})
    print_table(
        [
            (
                e.name, str(e.count), e.strategy,
                f"{e.flops / 1e9:,.1f}", f"{e.extra_flops / 1e9:,.1f}", _bytes(e.extra_bytes),
                f"{e.slowdown:.2f}", _bytes(e.workspace),
            )
            for e in found.layers
        ],
        ("layers", "count", "norms by", "GFLOP", "GFLOP added", "bytes added", "time", "workspace"),
    )  # fmt: skip
    rows = [
        ("FLOPs, relative to an ordinary step", f"{found.flops_ratio:.2f}"),
        ("time of the products, relative", f"{found.slowdown:.2f}"),
        ("float32 sums, in place of gradients", _bytes(found.sums)),
        ("largest workspace of a layer", _bytes(found.workspace)),
        ("one gradient per unit, which is not kept", _bytes(found.per_sample)),
    ]
    print_table(rows)
    where = "a typical CPU" if device == "cpu" else "this GPU, measured just now"
    print(f"Estimates, at the rates of {where}; attention's own products, elementwise work and")
    print("the noise are not counted.")
    return 0


@app.command
def audit(
    *,
    noise_multiplier: float,
    delta: float,
    claim: float | None = None,
    trials: int = 5000,
    confidence: float = 0.95,
    seed: int | None = None,
    json_output: JsonFlag = False,
) -> int:
    """Attack the noise that is drawn, and compare the epsilon this proves with the claimed one.

    One step that every unit is in, seen by an attacker who knows all but one bit. The exit status
    is 1 if the lower bound on epsilon is above the claim.

    Args:
        noise_multiplier: Standard deviation of the noise over the sensitivity.
        delta: Delta of both epsilons.
        claim: Epsilon to hold the noise to; by default what the noise multiplier costs.
        trials: Outputs with and without the canary, each.
        confidence: Of the lower bound.
        seed: Audit the repeatable noise of this seed instead of the secure one.
        json_output: Print JSON.
    """
    from dataclasses import asdict

    from flashdp.audit import audit_mechanism
    from flashdp.noise import NoiseSource

    if claim is not None and not claim >= 0:
        raise ValueError(f"--claim: expected at least 0, got {claim}")
    found = audit_mechanism(
        NoiseSource(secure=seed is None, seed=seed),
        noise_multiplier=noise_multiplier, delta=delta, trials=trials, confidence=confidence,
    )  # fmt: skip
    claimed = found.epsilon if claim is None else claim
    passed = found.epsilon_lower <= claimed
    if json_output:
        values = {**asdict(found), "noise_multiplier": noise_multiplier, "claim": claimed}
        print_json({**values, "passed": passed})
    else:
        print_table(
            [
                ("epsilon claimed", _short(claimed)),
                (f"epsilon shown, at {confidence:.0%} confidence", _short(found.epsilon_lower)),
                ("delta", _short(delta)),
                ("trials with and without the canary", f"{trials:,} each"),
                ("canaries found", f"{found.true_positive:.2%}"),
                ("false alarms", f"{found.false_positive:.2%}"),
                ("verdict", "compatible with the claim" if passed else "THE CLAIM IS FALSE"),
            ]
        )
    return 0 if passed else 1


@app.command
def report(run_dir: Path, *, json_output: JsonFlag = False) -> int:
    """Print the privacy report of a run.

    Args:
        run_dir: Folder of the run, with its privacy_report.json.
        json_output: Print JSON.
    """
    from flashdp.report import PrivacyReport

    found = PrivacyReport.load(run_dir)
    if json_output:
        return print_json(found.to_dict())
    print(found.to_markdown(), end="")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run_app(app, argv)


def _version() -> str:
    from flashdp._version import __version__

    return __version__


def _rate(sample_rate: float | None, batch_size: float | None, units: int | None) -> float:
    if (sample_rate is None) == (batch_size is None):
        raise ValueError("give either --sample-rate, or --batch-size with --units")
    if sample_rate is not None:
        return sample_rate
    if units is None or units < 1 or batch_size is None:
        raise ValueError(f"--batch-size needs --units of at least 1, got {units}")
    return batch_size / units


def _truncation(max_batch_size: int | None, units: int | None) -> dict[str, Any]:
    if max_batch_size is None:
        return {}
    if units is None:
        raise ValueError("--max-batch-size needs --units: a cap's cost depends on their number")
    return {
        "sampling": "truncated",
        "dataset_size": units,
        "truncated_batch_size": max_batch_size,
    }


def _print_cost(
    sigma: float,
    delta: float,
    rate: float,
    steps: int,
    kind: AccountantKind,
    truncation: dict[str, Any],
    json_output: bool,
) -> int:
    from flashdp.accounting import Accountant, Mechanism

    accountant = Accountant(kind)
    accountant.step(Mechanism(noise_multiplier=sigma, sample_rate=rate, **truncation), steps=steps)
    cost = accountant.epsilon(delta)
    values = {
        "noise_multiplier": sigma,
        "epsilon": cost if math.isfinite(cost) else str(cost),
        "delta": delta,
        "sample_rate": rate,
        "steps": steps,
        "max_batch_size": truncation.get("truncated_batch_size"),
        "accountant": kind,
        "version": accountant.version,
    }
    if json_output:
        return print_json(values)
    print_table([(name, _short(v)) for name, v in values.items() if v is not None])
    return 0


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(str(size) for size in shape)


def _bytes(count: int) -> str:
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"
