"""The tour: every step runs, failures are told and stop nothing, the report stands alone."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from tenfold import cli, report, steps, tour
from tenfold.plots import svg
from tenfold.step import Context, Metric, Plot, StepFailed, StepResult, Table


class Good:
    name, title = "good", "A step that works"

    def run(self, context: Context) -> StepResult:
        context.progress(0.5, "half")
        (context.folder / "file").write_text("x")
        return StepResult(
            "It worked & <b>well</b>.",
            text=("One paragraph.",),
            metrics=(Metric("Speed", 2.0, "s", 4.0, "plain"), Metric("Count", 3, digits=0)),
            tables=(Table("Rows", ("a", "b"), (("1", "<script>x</script>"),)),),
            plots=(Plot("Figure", svg(lambda axes: axes.plot([1, 2]), title="Figure"), "See."),),
        )


class Broken:
    name, title = "broken", "A step whose promise is not kept"

    def run(self, context: Context) -> StepResult:
        raise StepFailed("expected 1, got 2")


class Crashing:
    name, title = "crashing", "A step that crashes"

    def run(self, context: Context) -> StepResult:
        return 1 / 0


@pytest.fixture
def fakes(monkeypatch):
    known = {step.name: step for step in (Broken(), Crashing(), Good())}
    monkeypatch.setattr(steps, "discover", lambda: known)


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    return stop.value.code


def test_failures_are_told_and_the_other_steps_run():
    told = []
    outcomes = list(
        tour.run([Broken(), Crashing(), Good()], progress=lambda *event: told.append(event))
    )
    assert [o.ok for o in outcomes] == [False, False, True]
    assert outcomes[0].error == "expected 1, got 2"
    assert outcomes[0].details == ""
    assert outcomes[1].error == "ZeroDivisionError: division by zero"
    assert "return 1 / 0" in outcomes[1].details
    assert ("good", 0.5, "half") in told
    assert told[-1] == ("good", 1.0, "done")


def test_exit_code_and_json_tell_of_a_failure(fakes, tmp_path, capsys):
    assert call("--json", "--out", str(tmp_path)) == 1
    found = json.loads(capsys.readouterr().out)
    assert {s["name"]: s["ok"] for s in found["steps"]} == {
        "broken": False, "crashing": False, "good": True,
    }  # fmt: skip
    assert (tmp_path / "index.html").is_file()


def test_exit_code_0_and_a_summary_for_chosen_steps(fakes, tmp_path, capsys):
    assert call("good", "good", "--out", str(tmp_path)) == 0
    printed = capsys.readouterr()
    assert "Speed: 2.0 s" in printed.out
    assert "4.0 s plain" in printed.out
    assert "crashing" not in printed.out
    assert "good: 50%, half" in printed.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["nope"], "no step named nope; the steps are broken, crashing, good"), (["--no"], "--no")],
)
def test_bad_arguments_exit_with_2_and_write_nothing(fakes, tmp_path, capsys, arguments, told):
    assert call(*arguments, "--out", str(tmp_path / "report")) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert told in printed.err
    assert not (tmp_path / "report").exists()


class Page(HTMLParser):
    """Collects what a page would fetch, and whether its elements are closed in order."""

    VOID = frozenset({"meta", "link", "img", "br", "hr", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched, self.open, self.ids, self.words = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "data") and not value.startswith("#"):
                self.fetched.append(value)
            if name == "id":
                self.ids.append(value)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


PROVENANCE = {
    "command": "uv run tenfold", "commit": None, "dirty": None, "date": "2026-01-01T00:00:00+00:00",
    "versions": {"python": "3.11.0", "torch": None}, "flags": {}, "gpu": None,
    "cpu": {"model": "A processor", "usable_cores": 2, "memory_bytes": 2**34},
    "load_average": [0.1, 0.2, 0.3],
}  # fmt: skip


def test_report_stands_alone():
    outcomes = list(tour.run([Crashing(), Good()]))
    text = report.render(outcomes, provenance=PROVENANCE, quick=True)
    page = Page(text)
    assert page.fetched == []
    assert not re.search(r"url\((?!#)|@import|<script", text)
    assert len(set(page.ids)) == len(page.ids)
    words = "".join(page.words)
    assert "It worked & <b>well</b>." in words
    assert "<script>x</script>" in words
    assert "ZeroDivisionError" in words
    assert "A quick run" in words
    assert "A quick run" not in report.render(outcomes, provenance=PROVENANCE, quick=False)


def test_report_survives_having_nothing_to_show():
    class Bare(Good):
        def run(self, context: Context) -> StepResult:
            return StepResult("Fine.")

    Page(report.render(list(tour.run([Bare()])), provenance=PROVENANCE, quick=False))
    Page(report.render([], provenance=PROVENANCE, quick=False))


def test_figures_follow_the_page_and_keep_their_ids_apart():
    one, two = (svg(lambda axes: axes.plot([1, 2]), title=title) for title in ("One", 'Two "2"'))
    assert "currentColor" in one
    assert one == svg(lambda axes: axes.plot([1, 2]), title="One")
    assert not set(Page(one).ids) & set(Page(two).ids)
    targets = re.findall(r'(?:href="#|url\(#)([^")]+)', two)
    assert targets
    assert set(targets) <= set(Page(two).ids)


@pytest.mark.parametrize(
    ("metric", "texts", "bars"),
    [
        (Metric("a", 2000.0, "s", 2.0), ("2,000.0 s", "2.0 s"), (100.0, 0.1)),
        (Metric("a", 50, "%", 100, digits=0), ("50%", "100%"), (50.0, 100.0)),
        (Metric("a", 3, digits=0), ("3", ""), None),
        (Metric("a", -1.0, "", 1.0), ("-1.0", "1.0"), None),
        (Metric("a", 0.0, "", 0.0), ("0.0", "0.0"), (0.0, 0.0)),
    ],
)  # fmt: skip
def test_metrics_are_shown_with_their_units(metric, texts, bars):
    assert (metric.text(metric.value), metric.text(metric.plain)) == texts
    assert report.bar(metric) == bars


@pytest.mark.parametrize(
    ("seconds", "text"), [(8.24, "8.2 s"), (59.99, "60.0 s"), (125, "2 min 05 s")]
)
def test_durations_are_for_people(seconds, text):
    assert report.duration(seconds) == text


def test_every_working_package_has_a_step(members):
    packages = {member.name for member in members} - {"shared-kernels", "tenfold"}
    found = steps.discover()
    assert set(found) == packages
    for name, step in found.items():
        assert step.name == name
        assert step.title


def test_help_and_discovery_load_nothing_heavy():
    code = (
        "import sys, tenfold.cli, tenfold.steps; tenfold.steps.discover(); "
        "print(*sorted({'torch', 'transformers', 'matplotlib', 'zo2'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.slow
def test_the_real_tour_runs_quickly_through_every_step(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tenfold", "--quick", "--json", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [s["name"] for s in found["steps"]] == sorted(steps.discover())
    assert all(s["ok"] and s["metrics"] for s in found["steps"])
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert Page(text).fetched == []
    for step in found["steps"]:
        assert step["headline"] in "".join(Page(text).words)
