"""Plots of curves."""

import sys
from dataclasses import replace

import pytest
from pahq.evaluation import Roc, SizeCurve, plot_curve, plot_roc, plots

CURVE = SizeCurve("kl", True, (1, 10, 100), (2, 20, 200), (0.5, 0.5, 1.0), 0.0, 2.0)
ROC = Roc("pessimistic", (0, 0.25, 1), (0, 0.5, 1), 8, 40, 0.375)


def text(path):
    return path.read_text()


@pytest.mark.parametrize(("plot", "curve", "label"), [
    (plot_curve, CURVE, "CPR 0.720, CMD 0.270"), (plot_roc, ROC, "AUC 0.375 (pessimistic)"),
])  # fmt: skip
def test_files(plot, curve, label, tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("a", "b"):
        plot(curve, tmp_path / "new" / f"{name}.svg")
    assert text(tmp_path / "new" / "a.svg") == text(tmp_path / "new" / "b.svg")
    assert label in text(tmp_path / "new" / "a.svg")
    plot({"EAP": curve, "ACDC": curve}, str(tmp_path / "both.svg"))
    both = text(tmp_path / "both.svg")
    assert f"EAP {label}" in both
    assert f"ACDC {label}" in both
    plot(curve, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"ends with .svg or .png; got 'a.pdf'"):
        plot(curve, tmp_path / "a.pdf")


def test_curves_are_joined_as_their_areas_are(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, axes, path: drawn.append(axes))
    for mode, style in (("pessimistic", "steps-post"), ("trapezoid", "default")):
        plot_roc(replace(ROC, mode=mode), tmp_path / "a.svg")
        line = drawn.pop().lines[-1]
        assert line.get_drawstyle() == style
        assert (*line.get_xdata(),) == ROC.fpr
        assert (*line.get_ydata(),) == ROC.tpr
    plot_curve(CURVE, tmp_path / "a.svg")
    line = drawn.pop().lines[-1]
    assert (*line.get_xdata(),) == CURVE.sizes
    assert (*line.get_ydata(),) == CURVE.recovered


@pytest.mark.parametrize(("plot", "curve"), [(plot_curve, CURVE), (plot_roc, ROC)])
def test_without_matplotlib(plot, curve, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'pahq\[plot\]'"):
        plot(curve, tmp_path / "a.svg")
