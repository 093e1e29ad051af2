"""The command line, in process and through a subprocess: output, JSON and exit status."""

import json
import subprocess
import sys

import pytest
from flashdp.accounting import Mechanism
from flashdp.cli import main
from flashdp.report import PrivacyReport

RUN = ["--sample-rate", "0.01024", "--steps", "1000", "--delta", "1e-5"]


def run(capsys, *args):
    status = main([str(a) for a in args])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture
def folder(tmp_path):
    PrivacyReport(
        epsilon=2.0,
        delta=1e-6,
        history=((Mechanism(noise_multiplier=0.9, sample_rate=0.01), 7),),
        max_grad_norm=1.0,
        thresholds={},
        grouping="module",
        clipping="abadi",
        noise_allocation="global",
        expected_batch_size=32,
        accountant="pld",
        accountant_version="dp-accounting 0.6.0",
        rng="ChaCha20",
        secure_rng=True,
        coverage=(),
        public_n=3200,
    ).save(tmp_path)
    return tmp_path


def test_epsilon(capsys):
    status, out, _ = run(capsys, "epsilon", "--noise-multiplier", 1.0, *RUN, "--json")
    found = json.loads(out)
    assert status == 0
    assert found["epsilon"] == pytest.approx(1.876, abs=5e-4)
    assert found["delta"] == 1e-5
    rdp = run(capsys, "epsilon", "--noise-multiplier", 1, *RUN, "--accountant", "rdp", "--json")
    assert json.loads(rdp[1])["epsilon"] == pytest.approx(2.150, abs=5e-4)
    status, out, _ = run(capsys, "epsilon", "--noise-multiplier", 1.0, *RUN)
    assert status == 0
    assert "1.876" in out


def test_no_noise_is_infinite_and_still_json(capsys):
    status, out, _ = run(capsys, "epsilon", "--noise-multiplier", 0, *RUN, "--json")
    assert status == 0
    assert json.loads(out)["epsilon"] == "inf"


def test_calibrate(capsys):
    args = ("--sample-rate", 0.02, "--steps", 30, "--delta", "1e-6", "--json")
    args += ("--accountant", "rdp")
    status, out, _ = run(capsys, "calibrate", "--epsilon", 1, *args)
    found = json.loads(out)
    assert status == 0
    assert found["epsilon"] <= 1.0
    back = run(capsys, "epsilon", "--noise-multiplier", found["noise_multiplier"], *args)
    assert json.loads(back[1])["epsilon"] == found["epsilon"]


def test_a_batch_size_and_a_number_of_units_make_a_rate(capsys):
    rate = run(
        capsys, "epsilon", "--noise-multiplier", 2, "--steps", 3, "--delta", "1e-5",
        "--batch-size", 20, "--units", 200, "--accountant", "rdp", "--json",
    )  # fmt: skip
    assert json.loads(rate[1])["sample_rate"] == 0.1


def test_a_cap_is_accounted_as_truncation(capsys):
    args = ("--noise-multiplier", 2, "--steps", 3, "--delta", "1e-5", "--batch-size", 20)
    free = run(capsys, "epsilon", *args, "--units", 200, "--json")
    capped = run(capsys, "epsilon", *args, "--units", 200, "--max-batch-size", 20, "--json")
    assert json.loads(capped[1])["epsilon"] > json.loads(free[1])["epsilon"]


def test_report(folder, capsys):
    status, out, _ = run(capsys, "report", folder)
    assert status == 0
    assert out == PrivacyReport.load(folder).to_markdown()
    status, out, _ = run(capsys, "report", folder, "--json")
    assert json.loads(out) == PrivacyReport.load(folder).to_dict()


@pytest.fixture(scope="module")
def configuration(tmp_path_factory):
    """The folder of a small model's configuration, without weights."""
    from shared_kernels.testing.models import tiny_model

    path = tmp_path_factory.mktemp("model")
    tiny_model("llama").config.save_pretrained(path)
    return path


def test_check_lists_layers_and_rules(configuration, capsys):
    status, out, _ = run(capsys, "check", configuration, "--json")
    found = json.loads(out)
    assert status == 0
    assert found["passed"] is True
    assert found["issues"] == []
    rules = {layer["name"]: layer["rule"] for layer in found["layers"]}
    assert rules["model.embed_tokens"] == "table"
    assert rules["model.layers.*.self_attn.q_proj"] == "matrix"
    assert sum(layer["parameters"] for layer in found["layers"]) == found["parameters"]
    status, out, _ = run(capsys, "check", configuration)
    assert status == 0
    assert "model.layers.*.mlp.down_proj" in out
    assert f"{found['parameters']:,} parameters are covered" in out


def test_check_exits_with_1_for_a_model_that_is_refused(tmp_path, capsys):
    from transformers import MambaConfig

    MambaConfig(
        vocab_size=31, hidden_size=8, state_size=4, num_hidden_layers=1, time_step_rank=2
    ).save_pretrained(tmp_path)
    status, out, _ = run(capsys, "check", tmp_path, "--json")
    found = json.loads(out)
    assert status == 1
    assert found["passed"] is False
    assert any("A_log" in issue["name"] for issue in found["issues"])
    assert all(issue["remedy"] for issue in found["issues"])
    status, out, _ = run(capsys, "check", tmp_path)
    assert status == 1
    assert "A_log" in out
    assert "register_dp_rule" in out


def test_plan(configuration, capsys):
    args = ("plan", configuration, "--tokens", 128, "--batch", 4)
    status, out, _ = run(capsys, *args, "--json")
    found = json.loads(out)
    assert status == 0
    assert (found["units"], found["tokens"], found["device"]) == (4, 128, "cpu")
    assert found["sums"] == 4 * found["parameters"]
    assert found["per_sample"] == 4 * found["sums"]
    status, out, _ = run(capsys, *args)
    assert status == 0
    assert "model.layers.*.self_attn.q_proj" in out
    assert "Estimates" in out


def test_adapters_are_checked_and_planned(configuration, capsys):
    lora = ("--lora-rank", 4, "--json")
    found = json.loads(run(capsys, "check", configuration, *lora)[1])
    assert found["passed"] is True
    assert {layer["rule"] for layer in found["layers"]} == {"matrix"}
    assert all(".lora_" in layer["name"] for layer in found["layers"])
    assert found["frozen"] > found["parameters"]
    args = ("plan", configuration, "--tokens", 128, "--batch", 4)
    planned, whole = (json.loads(run(capsys, *args, *more)[1]) for more in (lora, ["--json"]))
    assert planned["parameters"] == found["parameters"]
    assert planned["sums"] < whole["sums"]
    assert 0 < planned["frozen_flops"] < planned["flops"]
    assert whole["frozen_flops"] == 0
    assert 1 < planned["slowdown"] < whole["slowdown"]
    status, _, error = run(capsys, "check", configuration, "--lora-rank", 0)
    assert (status, "expected at least 1, got 0" in error) == (2, True)


AUDIT = ("audit", "--noise-multiplier", 1, "--delta", "1e-5", "--seed", 3)


def test_audit_shows_less_than_is_claimed(capsys):
    status, out, _ = run(capsys, *AUDIT, "--json")
    found = json.loads(out)
    assert status == 0
    assert found["passed"] is True
    assert 0.5 * found["claim"] < found["epsilon_lower"] <= found["claim"]
    assert found["claim"] == pytest.approx(4.377, abs=1e-3)
    assert json.loads(run(capsys, *AUDIT, "--json")[1]) == found
    status, out, _ = run(capsys, *AUDIT, "--trials", 400)
    assert status == 0
    assert "compatible with the claim" in out


def test_audit_exits_with_1_when_the_claim_is_false(capsys):
    status, out, _ = run(capsys, *AUDIT, "--claim", 1, "--json")
    assert status == 1
    assert json.loads(out)["passed"] is False
    status, out, _ = run(capsys, *AUDIT, "--claim", 1)
    assert status == 1
    assert "THE CLAIM IS FALSE" in out


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        (["epsilon"], 2, "noise-multiplier"),
        (["epsilon", "--noise-multiplier", "1", "--steps", "3", "--delta", "1e-5"], 2, "units"),
        (["epsilon", "--noise-multiplier", "-1", *RUN], 2, "noise_multiplier: .*-1"),
        (["epsilon", "--noise-multiplier", "1", *RUN, "--batch-size", "3"], 2, "batch-size"),
        (["epsilon", "--noise-multiplier", "1", *RUN, "--accountant", "prv"], 2, "prv"),
        (["epsilon", "--noise-multiplier", "1", *RUN, "--max-batch-size", "9"], 2, "units"),
        (["calibrate", "--epsilon", "0", *RUN], 2, "epsilon"),
        (["report", "nowhere"], 2, "nowhere"),
        (["forecast"], 2, "forecast"),
        (["check", "nowhere/at/all"], 2, "nowhere/at/all"),
        (["plan", "nowhere/at/all", "--tokens", "8", "--batch", "2"], 2, "nowhere/at/all"),
        (["plan", "x", "--tokens", "8"], 2, "batch"),
        (["audit", "--noise-multiplier", "0", "--delta", "1e-5"], 2, "noise_multiplier"),
        (["audit", "--noise-multiplier", "1", "--delta", "2"], 2, "delta"),
        (["audit", "--noise-multiplier", "1", "--delta", "1e-5", "--claim", "-1"], 2, "claim"),
    ],
)
def test_bad_input_exits_with_2(capsys, args, status, words):
    import re

    found, out, err = run(capsys, *args)
    assert found == status
    assert re.search(words, out + err), out + err
    assert "Traceback" not in err


def test_an_unattainable_target_exits_with_1(capsys):
    args = ("--sample-rate", 0.5, "--steps", 1000, "--delta", "1e-30")
    args += ("--accountant", "rdp")
    status, out, err = run(capsys, "calibrate", "--epsilon", 0.001, *args)
    assert status == 1
    assert out == ""
    assert "no noise multiplier" in err


def test_the_flags_are_these(capsys):
    """Flags grow past anybody's control unless adding one is a decision."""
    import re

    shared = {
        "--sample-rate", "--batch-size", "--units", "--steps", "--delta", "--accountant",
        "--max-batch-size", "--json",
    }  # fmt: skip
    expected = {
        "calibrate": shared | {"--epsilon"},
        "epsilon": shared | {"--noise-multiplier"},
        "report": {"--run-dir", "--json"},
        "check": {"--model", "--lora-rank", "--fallback", "--json"},
        "plan": {"--model", "--tokens", "--batch", "--lora-rank", "--device", "--json"},
        "audit": {
            "--noise-multiplier",
            "--delta",
            "--claim",
            "--trials",
            "--confidence",
            "--seed",
            "--json",
        },
    }
    for command, flags in expected.items():
        status, out, _ = run(capsys, command, "--help")
        assert status == 0
        assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", out)) - {"--help", "--version"} == flags
    listed = run(capsys, "--help")[1]
    assert all(command in listed for command in expected)


def test_as_a_program(folder):
    command = [sys.executable, "-m", "flashdp", "report", str(folder), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 7
    done = subprocess.run([sys.executable, "-m", "flashdp", "--version"], capture_output=True)
    assert done.returncode == 0
