"""Results: statistics of the measurements, the JSON file, the Markdown table."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from shared_kernels.files import write_text
from shared_kernels.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from shared_kernels.bench.arms import Workload
    from shared_kernels.bench.ceilings import Ceilings
    from shared_kernels.bench.timing import Measurement

SCHEMA = "shared-kernels-bench"
SCHEMA_VERSION = 1
_RESAMPLES = 2000
# Growth of the resident set below this is the process's own, not the arm's.
_SAMPLED_BYTES_MIN = 1 << 20

Result = dict[str, Any]
"""A result file, or a part of it, as JSON values."""


def speedup(baseline: Sequence[float], arm: Sequence[float]) -> dict[str, float]:
    """Return how many times faster ``arm`` is than ``baseline``, with an interval.

    The ratio of the medians, and its 95 % interval by a percentile bootstrap that resamples whole
    rounds: entries ``i`` of both sequences were measured side by side and stay together.

    Args:
        baseline: Seconds, one per round.
        arm: Seconds of the same rounds.

    Returns:
        ``{"ratio", "low", "high"}``; above 1 means that the arm is faster.
    """
    if len(baseline) != len(arm) or len(arm) == 0:
        raise ValueError(
            f"expected times of the same rounds; got {len(baseline)} and {len(arm)} of them"
        )
    before, after = np.asarray(baseline), np.asarray(arm)
    rounds = np.random.default_rng(0).integers(0, len(arm), (_RESAMPLES, len(arm)))
    ratios = np.median(before[rounds], axis=1) / np.median(after[rounds], axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return {
        "ratio": _rounded(np.median(before) / np.median(after)),
        "low": _rounded(low),
        "high": _rounded(high),
    }


def summarize(
    workload: Workload, measurements: Mapping[str, Measurement], ceilings: Ceilings
) -> Result:
    """Turn the measurements of one workload into its part of the result file."""
    baseline = measurements[workload.baseline]
    arms = []
    for arm in workload.arms:
        measured = measurements[arm.name]
        row: Result = {"name": arm.name, "error": measured.error}
        if not measured.error:
            quantiles = np.quantile(measured.seconds, [0.2, 0.25, 0.5, 0.75, 0.8])
            names = ("p20", "p25", "median", "p75", "p80")
            row |= {
                "rounds": len(measured.seconds),
                "seconds": dict(zip(names, map(_rounded, quantiles), strict=True)),
                "speedup": None if baseline.error else speedup(baseline.seconds, measured.seconds),
                "peak_device_bytes": measured.peak_device_bytes,
                "peak_host_bytes": measured.peak_host_bytes,
            }
        counts = ("bytes", "flops", "h2d_bytes", "d2h_bytes")
        row["counts"] = {name: getattr(arm, name) for name in counts if getattr(arm, name)}
        limit = ceilings.limit(arm)
        if limit:
            seconds, by = limit
            row["limit"] = {"seconds": _rounded(seconds), "by": by}
            if not measured.error:
                row["limit"]["fraction"] = _rounded(seconds / row["seconds"]["median"])
        arms.append(row)
    return {
        "name": workload.name,
        "params": dict(workload.params),
        "clock": workload.clock,
        "baseline": workload.baseline,
        "arms": arms,
    }


def _rounded(value: float) -> float:
    """Six significant digits: more than any of these measurements has."""
    return float(f"{value:.6g}")


def result_name(stem: str, device_name: str, only: str | None = None) -> str:
    """Return the stem of a result file: one per benchmark file and device, ``zo-nvidia-h200``.

    Measuring again replaces the file; the date is inside it, the history is the repository's.
    """
    parts = [stem, only or "", device_name]
    slugs = [re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-") for part in parts]
    return "-".join(slug for slug in slugs if slug)


def write_result(result: Result, path: Path) -> None:
    """Write a result file so that a reader sees the old one or the new one, never half of it."""
    write_text(path, to_json(result))


def to_json(value: object) -> str:
    """Encode results as JSON, one field per line."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def read_result(path: Path) -> Result:
    """Read a result file.

    Raises:
        ValueError: It is not a result file, or of another schema version.
    """
    result = json.loads(path.read_text(encoding="utf-8"))
    found = (result.get("schema"), result.get("schema_version"))
    if found != (SCHEMA, SCHEMA_VERSION):
        raise ValueError(
            f"expected schema {SCHEMA} version {SCHEMA_VERSION} in {path.name}; got {found}: "
            "measure again with this version"
        )
    return result


def markdown_table(result: Result) -> str:
    """Render a result file as a Markdown table with a caption that says where it comes from."""
    lines = [
        "| workload | arm | median | p20 to p80 | speed-up (95 %) | of limit | peak memory |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for workload in result["workloads"]:
        for index, arm in enumerate(workload["arms"]):
            name = f"`{workload['name']}`" if index == 0 else ""
            cells = [name, arm["name"], *_cells(arm, workload)]
            # a bar in a name would be a column's end
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, "", caption(result)])


def _cells(arm: Result, workload: Result) -> list[str]:
    if arm["error"]:
        return [arm["error"], "", "", "", ""]
    seconds, ratio, limit = arm["seconds"], arm["speedup"], arm.get("limit")
    speed = ""
    if arm["name"] == workload["baseline"]:
        speed = "1 (baseline)"
    elif ratio:
        speed = f"**{ratio['ratio']:.3g}x** ({ratio['low']:.3g} to {ratio['high']:.3g})"
    if arm["peak_device_bytes"] is not None:
        peak = format_bytes(arm["peak_device_bytes"])
    elif arm["peak_host_bytes"] < _SAMPLED_BYTES_MIN:
        peak = f"< {format_bytes(_SAMPLED_BYTES_MIN)}"
    else:
        peak = format_bytes(arm["peak_host_bytes"])
    return [
        format_seconds(seconds["median"]),
        f"{format_seconds(seconds['p20'])} to {format_seconds(seconds['p80'])}",
        speed,
        f"{limit['fraction']:.1%} ({limit['by']})" if limit else "",
        peak,
    ]


def params_table(result: Result, names: Sequence[str]) -> str:
    """Render parameters of workloads as a Markdown table, with the caption of `markdown_table`.

    Args:
        result: A result file.
        names: Of parameters that are mappings. Their keys are rows; values that are mappings again
            have a column for each of their keys, others one with the parameter's name. Numbers
            below ``bytes`` are shown as sizes.

    Raises:
        ValueError: No workload has all of them.
    """
    rows: dict[str, dict[str, str]] = {}
    for workload in result["workloads"]:
        params = workload["params"]
        if not all(isinstance(params.get(name), dict) for name in names):
            continue
        for name in names:
            for row, value in params[name].items():
                cells = value if isinstance(value, dict) else {name: value}
                rows.setdefault(row, {}).update({k: _shown(k, v) for k, v in cells.items()})
    if not rows:
        known = sorted({
            name for workload in result["workloads"] for name, value in workload["params"].items()
            if isinstance(value, dict)
        })  # fmt: skip
        raise ValueError(f"expected parameters that are mappings; got {list(names)} of {known}")
    columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
    lines = [["", *columns], ["---", *["--:"] * len(columns)]]
    lines += [[row, *(cells.get(column, "") for column in columns)] for row, cells in rows.items()]
    table = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join([*table, "", caption(result)])


def _shown(name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if "bytes" in name:
        return format_bytes(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def caption(result: Result) -> str:
    """Return one paragraph: machine, versions, commit, date, command, measured ceilings.

    A machine that had more to do than it has cores when the run began is called busy: its times
    are not worth quoting.
    """
    made = result["provenance"]
    versions = made["versions"]
    machine = made["gpu"]["name"] if made["gpu"] else made["cpu"]["model"]
    if not made["gpu"]:
        machine += f", torch threads: {made['cpu']['torch_threads']}"
    commit = (made["commit"] or "unknown")[:12] + ("+changes" if made["dirty"] else "")
    rates = ", ".join(
        f"{name} {rate / 1e12:.3g} {'TFLOP/s' if name.startswith('gemm') else 'TB/s'}"
        if rate >= 1e12
        else f"{name} {rate / 1e9:.3g} {'GFLOP/s' if name.startswith('gemm') else 'GB/s'}"
        for name, rate in result["ceilings"].items()
    )
    libraries = [f"torch {versions['torch']}"]
    if made["gpu"] and versions["triton"]:
        libraries.append(f"triton {versions['triton']}")
    load, cores = made["load_average"][0], made["cpu"]["usable_cores"]
    if load > cores:
        machine += f", BUSY (load {load:.1f} on {cores} cores)"
    return (
        f"{machine}; {', '.join(libraries)}; commit {commit}; {made['date'][:10]}; "
        f"limits measured in the same run: {rates or 'none'}. Remake with `{made['command']}`."
    )
