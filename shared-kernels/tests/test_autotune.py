"""The choice of launch configurations."""

import json

import pytest
import torch
from shared_kernels import _autotune
from shared_kernels._autotune import choose, load_table, table_name

CONFIGS = ({"num_warps": 4}, {"num_warps": 8})


@pytest.fixture
def gpu(monkeypatch):
    """Pretend that a GPU is there and that the kernels are compiled."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(_autotune, "_gpu_name", lambda index: "Test GPU-1")
    monkeypatch.setattr(_autotune, "_measured", {})
    return "Test GPU-1"


def never(config):
    raise AssertionError("a candidate was launched")


def test_the_interpreter_gets_one_configuration(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("SHARED_KERNELS_AUTOTUNE", "full")
    assert choose("op", "kind", CONFIGS, never) == CONFIGS[0]


def test_off_takes_the_first(gpu, monkeypatch):
    monkeypatch.setenv("SHARED_KERNELS_AUTOTUNE", "off")
    assert choose("op", "kind", CONFIGS, never) == CONFIGS[0]


def test_table_takes_the_entry_of_this_gpu_only(gpu, monkeypatch, tmp_path):
    monkeypatch.setenv("SHARED_KERNELS_AUTOTUNE", "table")
    (tmp_path / "tuned").mkdir()
    entry = {"op": {"kind": {"num_warps": 16}}}
    (tmp_path / "tuned" / "Test_GPU_1.json").write_text(json.dumps(entry))
    monkeypatch.setattr(_autotune.resources, "files", lambda package: tmp_path)
    load_table.cache_clear()
    try:
        assert choose("op", "kind", CONFIGS, never) == {"num_warps": 16}
        assert choose("op", "another", CONFIGS, never) == CONFIGS[0]
        monkeypatch.setattr(_autotune, "_gpu_name", lambda index: "Test GPU-2")
        assert choose("op", "kind", CONFIGS, never) == CONFIGS[0]
    finally:
        load_table.cache_clear()


def test_full_times_every_candidate_once(gpu, monkeypatch):
    testing = pytest.importorskip("triton.testing")
    monkeypatch.setenv("SHARED_KERNELS_AUTOTUNE", "full")
    launched = []

    def do_bench(run, **kwargs):
        run()
        return {4: 2.0, 8: 1.0}[launched[-1]["num_warps"]]

    monkeypatch.setattr(testing, "do_bench", do_bench)
    assert choose("op", "kind", CONFIGS, launched.append) == CONFIGS[1]
    assert launched == list(CONFIGS)
    assert choose("op", "kind", CONFIGS, never) == CONFIGS[1]


def test_bad_settings(gpu, monkeypatch):
    monkeypatch.setenv("SHARED_KERNELS_AUTOTUNE", "always")
    with pytest.raises(ValueError, match="AUTOTUNE: expected one of off, table, full"):
        choose("op", "kind", CONFIGS, never)
    with pytest.raises(ValueError, match="at most 12 configurations, got 13"):
        choose("op", "kind", CONFIGS[:1] * 13, never)


def test_table_name():
    assert table_name("NVIDIA H200") == "NVIDIA_H200.json"


def test_shipped_tables_hold_known_configurations():
    from shared_kernels.ops.zo.op import CONFIGS as zo_configs

    assert len(zo_configs) <= _autotune.MAX_CONFIGS
    folder = _autotune.resources.files("shared_kernels") / "tuned"
    for path in folder.iterdir() if folder.is_dir() else ():
        for config in json.loads(path.read_text()).get("zo_materialize", {}).values():
            assert config in zo_configs, f"{path.name}: {config}"
