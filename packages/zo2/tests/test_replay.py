"""Replay against hand-made trajectories and against a live engine; and everything it refuses."""

import json
import shutil

import numpy as np
import pytest
import torch
import zo2
from safetensors.torch import load_file, save_file
from shared_kernels.random import derive_seed, noise, param_uid
from shared_kernels.random.reference import dither_tiles, split_seed
from shared_kernels.testing.models import tiny_inputs, tiny_model
from zo2 import LogError, LogRecord, OffloadConfig, UpdateLog, ZOConfig
from zo2.fingerprint import LogHeader, hash_tensor, make_header, parameter_entries
from zo2.log import FLUSH, SKIPPED
from zo2.reference import exact_step, mezo_step


def make_log(path, tensors, records, *, store="fp32", unit=1, decay=(), fold_every=1, **zo):
    names = list(tensors)
    entries = parameter_entries(
        list(tensors.items()),
        units=dict.fromkeys(names, unit),
        decay=decay,
        stores=dict.fromkeys(names, store),
    )
    header = make_header(entries, ZOConfig(**zo), fold_every=fold_every)
    with UpdateLog.create(path, header) as log:
        for record in records:
            log.append(record)
    return path


def random_tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    shapes = {"a.weight": (67, 65), "a.bias": (65,), "scale": (), "empty": (0, 4)}
    return {n: torch.randn(s, generator=generator).mul(0.1).to(dtype) for n, s in shapes.items()}


def random_records(n, q=1, *, flush_at=(), skip_at=()):
    rng = np.random.default_rng(0)
    records = []
    for t in range(n):
        if t in flush_at:
            records.append(LogRecord(t, derive_seed(5, t + 2**40), 0, 0, [0.0] * q, FLUSH))
        g = rng.normal(size=q).astype(np.float32)
        if t in skip_at:
            records.append(LogRecord(t, derive_seed(5, t), 0.01, 0.1, [np.nan] * q, SKIPPED))
        else:
            records.append(LogRecord(t, derive_seed(5, t), 0.01 / (t + 1), 0.1, g))
    return records


def numpy_apply(y, name, record, decay, dist="gaussian"):
    """One record on a float32 array, as the contract words it."""
    f, q = np.float32, len(record.g)
    for k in range(q):
        z = noise(y.size, seed=record.seed, uid=param_uid(name), direction=k, dist=dist)
        z = z.numpy().reshape(y.shape)
        a, b = f(1), f(0)
        if not record.flags & SKIPPED:
            b = f(f(record.lr) / f(q)) * f(record.g[k])
            if k == 0 and decay:
                a = f(1) - f(record.lr) * f(record.weight_decay)
        y = a * y - b * z
    return y


@pytest.mark.parametrize("dist", ["gaussian", "rademacher"])
@pytest.mark.parametrize("q", [1, 3])
@pytest.mark.parametrize("store", ["fp32", "bf16x2"])
def test_exact_stores_equal_numpy_bit_for_bit(tmp_path, q, dist, store):
    base = random_tensors()
    records = random_records(7, q, skip_at={3}, flush_at={5})
    path = make_log(
        tmp_path / "a.zolog", base, records, store=store, decay={"a.weight"}, fold_every=4,
        q=q, dist=dist,
    )  # fmt: skip
    copies = {n: t.clone() for n, t in base.items()}
    for upto in (0, 1, 4, 7, None):
        out = zo2.replay(base, path, upto=upto, progress=False)
        for name, value in base.items():
            y = value.numpy()
            for record in records:
                if not record.flags & FLUSH and (upto is None or record.step < upto):
                    y = numpy_apply(y, name, record, name == "a.weight", dist)
            assert torch.equal(out[name], torch.as_tensor(y)), (name, upto)
    assert all(torch.equal(base[n], copies[n]) for n in base), "the base was changed"


def test_bf16_stores_fold_with_stochastic_rounding_where_the_rule_says(tmp_path):
    base = random_tensors(torch.bfloat16)
    records = random_records(11, flush_at={6})
    unit, fold_every = 2, 3
    path = make_log(
        tmp_path / "a.zolog", base, records, store="bf16", unit=unit, fold_every=fold_every
    )

    def fold(y, name, seed):
        start = torch.arange(0, max(y.size, 1), 4096)
        uid = torch.full_like(start, param_uid(name))
        dither = dither_tiles(uid, start, split_seed(seed)).flatten()[: y.size].numpy()
        bits = (y.reshape(-1).view(np.uint32).astype(np.int64) + dither) >> 16 << 16
        return bits.astype(np.uint32).view(np.float32).reshape(y.shape)

    for upto in (2, 6, 7, 10, None):
        out = zo2.replay(base, path, upto=upto, progress=False)
        for name, value in base.items():
            y, pending = value.float().numpy(), []
            limit = 11 if upto is None else upto
            for record in records:
                if record.step >= limit:
                    break
                if record.flags & FLUSH or (record.step + unit) % fold_every == 0:
                    for earlier in pending:
                        y = numpy_apply(y, name, earlier, decay=False)
                    y = fold(y, name, record.seed) if pending else y
                    pending = []
                if not record.flags & FLUSH:
                    pending.append(record)
            for earlier in pending:
                y = numpy_apply(y, name, earlier, decay=False)
            assert torch.equal(out[name], torch.as_tensor(y).bfloat16()), (name, upto)


def test_a_flush_after_the_last_update_counts_only_without_upto(tmp_path):
    base = random_tensors(torch.bfloat16)
    records = random_records(4)
    records.append(LogRecord(4, 99, 0, 0, [0.0], FLUSH))
    path = make_log(tmp_path / "a.zolog", base, records, store="bf16", fold_every=64)
    flushed = zo2.replay(base, path, progress=False)["a.weight"]
    pending = zo2.replay(base, path, upto=4, progress=False)["a.weight"]
    assert not torch.equal(flushed, pending)
    assert (flushed.float() - pending.float()).abs().max() < 0.01


def test_pieces_of_a_parameter_join_seamlessly(tmp_path, monkeypatch):
    base = {"w": torch.randn(300, 301)}
    path = make_log(tmp_path / "a.zolog", base, random_records(3))
    whole = zo2.replay(base, path, progress=False)["w"]
    monkeypatch.setattr("zo2._replay._CHUNK", 8192)
    monkeypatch.setattr("zo2._replay._LEAST_CHUNK", 4096)
    assert torch.equal(zo2.replay(base, path, progress=False)["w"], whole)


# -- against the reference step and a live engine -------------------------------------------------


def loss_of(name, seed):
    return lambda model: model(**tiny_inputs(name, batch=2, seed=seed)).loss


def test_replay_equals_the_reference_trajectory(tmp_path):
    model = tiny_model("llama")
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    records, masters = [], {}
    for t in range(6):
        seed = derive_seed(0, t)
        step = exact_step(
            model, loss_of("llama", t), seed=seed, lr=1e-2, weight_decay=0.1, q=2, masters=masters,
            decay={"model.embed_tokens.weight"},
        )  # fmt: skip
        records.append(LogRecord(t, seed, 1e-2, 0.1, step.g.tolist()))
    path = make_log(tmp_path / "a.zolog", base, records, decay={"model.embed_tokens.weight"}, q=2)
    out = zo2.replay(base, path, progress=False)
    assert all(torch.equal(out[n], masters[n]) for n in base)


RUNS = {
    "tied-fp32": ("llama", torch.float32, "fp32", 1),
    "bf16x2": ("opt", torch.bfloat16, "bf16x2", 4),
    "bf16": ("opt", torch.bfloat16, "bf16", 3),
}


@pytest.fixture(scope="module", params=RUNS)
def run(request, tmp_path_factory):
    """A finished run: base folder, log, and the live weights after 5 and after all steps."""
    name, dtype, store, fold_every = RUNS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny_model(name, dtype=dtype)
    model.save_pretrained(folder / "base", max_shard_size="20KB")
    (folder / "base" / "tokenizer.json").write_text("{}")
    (folder / "base" / "pytorch_model.bin").write_bytes(b"stale")
    engine = zo2.prepare(
        model,
        ZOConfig(seed=3, weight_decay=0.1, clip_g=1e3),
        OffloadConfig(store=store, fold_every=fold_every),
        log=folder / "run.zolog",
    )
    live = {}
    for t in range(9):
        engine.step(tiny_inputs(name, batch=2, seed=t), lr=1e-2)
        if t in (4, 8):
            live[t + 1] = engine.state_dict()
        if t == 6:
            engine.flush()
    engine.close()
    return {"name": name, "dtype": dtype, "folder": folder, "live": live}


@pytest.mark.parametrize("upto", [5, None])
def test_replay_of_a_folder_equals_the_live_engine(run, tmp_path, upto):
    live = run["live"][upto or 9]
    base = run["folder"] / "base"
    out = zo2.replay(
        base, run["folder"] / "run.zolog", upto=upto, out=tmp_path / "o", progress=False
    )
    files = sorted(f.name for f in base.glob("*.safetensors"))
    assert sorted(f.name for f in out.glob("*.safetensors")) == files
    assert len(files) > 1
    for file in files:
        before, after = load_file(base / file), load_file(out / file)
        assert list(before) == list(after)
        for n, value in after.items():
            assert torch.equal(value, live[n]), n
    assert any(
        not torch.equal(load_file(base / f)[n], load_file(out / f)[n])
        for f in files
        for n in load_file(base / f)
    )
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert (out / "tokenizer.json").exists()
    assert not (out / "pytorch_model.bin").exists()
    index = "model.safetensors.index.json"
    theirs, ours = (json.loads((f / index).read_text()) for f in (base, out))
    assert theirs["weight_map"] == ours["weight_map"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o"], "a temporary folder was left"


def test_the_written_folder_loads_and_gives_the_live_loss(run, tmp_path):
    from transformers import AutoModelForCausalLM

    out = zo2.replay(
        run["folder"] / "base", run["folder"] / "run.zolog", out=tmp_path / "o", progress=False
    )
    model = AutoModelForCausalLM.from_pretrained(out, dtype=run["dtype"]).eval()
    for n, p in model.named_parameters():
        assert torch.equal(p, run["live"][9][n])


def test_replay_into_a_model(run, tmp_path):
    model = tiny_model(run["name"], dtype=run["dtype"])
    assert zo2.replay(model, run["folder"] / "run.zolog", progress=False) is model
    assert all(torch.equal(p, run["live"][9][n]) for n, p in model.named_parameters())
    model = tiny_model(run["name"], dtype=run["dtype"])
    out = zo2.replay(model, run["folder"] / "run.zolog", out=tmp_path / "o", progress=False)
    saved = load_file(out / "model.safetensors")
    assert all(torch.equal(v, run["live"][9][n]) for n, v in saved.items())


def test_a_log_continued_by_a_new_engine_goes_on_bit_for_bit(run, tmp_path):
    log = tmp_path / "run.zolog"
    shutil.copy(run["folder"] / "run.zolog", log)
    keep = 5
    with UpdateLog.open(log, "a") as opened:
        opened.truncate(keep)
    name, dtype, store, fold_every = next(v for v in RUNS.values() if v[2] == _store_of(log))
    engine = zo2.prepare(
        tiny_model(name, dtype=dtype),
        ZOConfig(seed=3, weight_decay=0.1, clip_g=1e3),
        OffloadConfig(store=store, fold_every=fold_every),
        log=log,
    )
    assert engine.global_step == keep
    for t in range(keep, 9):
        engine.step(tiny_inputs(name, batch=2, seed=t), lr=1e-2)
        if t == 6:
            engine.flush()
    weights = engine.state_dict()
    engine.close()
    assert all(torch.equal(weights[n], v) for n, v in run["live"][9].items())
    assert log.read_bytes() == (run["folder"] / "run.zolog").read_bytes()


def _store_of(path):
    with UpdateLog.open(path) as log:
        return log.header["parameters"][0]["store"]


def test_mezo_arithmetic_is_replayed_with_its_restore_rounding(tmp_path):
    model = tiny_model("llama", dtype=torch.bfloat16)
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    records = []
    for t in range(4):
        seed = derive_seed(0, t)
        step = mezo_step(model, loss_of("llama", t), seed=seed, eps=1e-2, lr=1e-2, weight_decay=0.1)
        records.append(LogRecord(t, seed, 1e-2, 0.1, step.g.tolist()))
    decay = {n for n in base if "layernorm" not in n}
    path = make_log(tmp_path / "a.zolog", base, records, arithmetic="mezo", eps=1e-2, decay=decay)
    out = zo2.replay(base, path, device="cpu", progress=False)
    live = dict(model.named_parameters())
    drift = sum((out[n] != live[n]).sum().item() for n in base)
    # lr and λ are float32 in the log and double in the reference: at most a rounding apart.
    assert drift <= 0.001 * sum(t.numel() for t in base.values())
    assert sum((out[n] != base[n]).sum().item() for n in base) > 100 * max(drift, 1)


# -- what is refused -------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path):
    base = random_tensors()
    return base, make_log(tmp_path / "a.zolog", base, random_records(5))


def edit_header(path, change):
    with UpdateLog.open(path) as log:
        header, records = dict(log.header), log.records.copy()
    change(header)
    path.unlink()
    with UpdateLog.create(path, header) as log:
        for row in records:
            log.append(tuple(row)[:6])


def rename(header):
    header["parameters"][0]["name"] = "b.weight"


def reshape(header):
    header["parameters"][0]["shape"] = [65, 67]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (rename, "no tensor 'b.weight'"),
        (reshape, r"parameter table: 'a.weight' has shape \(65, 67\)"),
        (lambda h: h["parameters"][0].update(uid=1), "parameter table: 'a.weight' has uid 0x0000"),
        (lambda h: h["parameters"][0].update(hash="0" * 32), "base hash: 'a.weight'"),
        (lambda h: h["parameters"][0].update(dtype="bfloat16"), "base hash: 'a.weight'"),
        (lambda h: h["parameters"][0].update(dtype="pickle"), "dtype 'pickle'"),
        (lambda h: h["parameters"][0].update(extra=1), "missing or unknown"),
        (lambda h: h["parameters"][0].pop("uid"), "missing or unknown"),
        (lambda h: h["parameters"].append(h["parameters"][0]), "'a.weight' is listed twice"),
        (lambda h: h.update(dist="rademacher"), "RNG fingerprint: the log's rademacher noise"),
        (lambda h: h.update(rng="0" * 32), "RNG fingerprint"),
        (lambda h: h.update(arithmetic="mezo"), "RNG fingerprint.*torch's generator"),
        (lambda h: h.update(format=2), "format 1, got 2"),
        (lambda h: h.pop("rng"), "rng"),
        (lambda h: h.update(fold_every=0), "fold_every"),
        (lambda h: h.update(rounding="up"), "rounding"),
    ],
)
def test_a_log_that_does_not_fit_is_refused_with_the_reason(small, change, words):
    base, path = small
    edit_header(path, change)
    with pytest.raises(LogError, match=words):
        zo2.replay(base, path, progress=False)


def test_another_base_is_refused_and_nothing_is_written(small, tmp_path):
    base, path = small
    base["a.bias"][3] += 1e-6
    with pytest.raises(LogError, match=r"base hash: 'a.bias'.*not the weights the log started"):
        zo2.replay(base, path, out=tmp_path / "out", progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zolog"]


def test_a_refused_model_stays_as_it_was(tmp_path):
    model = tiny_model("opt")
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    path = make_log(tmp_path / "a.zolog", base, random_records(2))
    last = list(base)[-1]
    with torch.no_grad():
        model.get_parameter(last).view(-1)[0] += 1
    with pytest.raises(LogError, match="base hash"):
        zo2.replay(model, path, progress=False)
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n != last)


def test_damaged_records_are_refused_those_before_them_are_not(small, caplog):
    base, path = small
    good = zo2.replay(base, path, upto=3, progress=False)
    data = bytearray(path.read_bytes())
    data[-32 * 2 + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(LogError, match=r"record 3 at byte .* smaller upto"):
        zo2.replay(base, path, progress=False)
    again = zo2.replay(base, path, upto=3, progress=False)
    assert all(torch.equal(good[n], again[n]) for n in good)
    with pytest.raises(LogError, match=r"upto in 0..5, got 6"):
        zo2.replay(base, path, upto=6, progress=False)


def test_a_torn_tail_replays_to_the_last_whole_record(small, caplog):
    base, path = small
    good = zo2.replay(base, path, upto=4, progress=False)
    path.write_bytes(path.read_bytes()[:-7])
    out = zo2.replay(base, path, progress=False)
    assert all(torch.equal(good[n], out[n]) for n in good)
    assert "torn tail" in caplog.text


def test_an_existing_folder_is_not_overwritten(small, tmp_path):
    base, path = small
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(FileExistsError, match="not empty"):
        zo2.replay(base, path, out=tmp_path / "out", progress=False)


@pytest.mark.parametrize("kind", ["missing", "empty", "escape", "gone"])
def test_bad_folders(small, tmp_path, kind):
    _, path = small
    folder = tmp_path / "base"
    expected = FileNotFoundError
    if kind != "missing":
        folder.mkdir()
    if kind in ("escape", "gone"):
        name = "../x.safetensors" if kind == "escape" else "gone.safetensors"
        index = {"weight_map": {"a.weight": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        expected = ValueError
    with pytest.raises(expected):
        zo2.replay(folder, path, progress=False)


# -- names and dtypes ------------------------------------------------------------------------------


def test_tied_names_stored_twice_get_the_same_values(tmp_path):
    weight = torch.randn(9, 5)
    entries = parameter_entries(
        [("embed.weight", weight)],
        units={"embed.weight": 0},
        decay=(),
        stores={"embed.weight": "fp32"},
        aliases={"embed.weight": ("head.weight",)},
    )
    with UpdateLog.create(
        tmp_path / "a.zolog", make_header(entries, ZOConfig(), fold_every=1)
    ) as log:
        for record in random_records(3):
            log.append(record)
    both = {"embed.weight": weight, "head.weight": weight.clone(), "other": torch.arange(3)}
    out = zo2.replay(both, tmp_path / "a.zolog", progress=False)
    assert torch.equal(out["embed.weight"], out["head.weight"])
    assert not torch.equal(out["embed.weight"], weight)
    assert torch.equal(out["other"], torch.arange(3))
    alone = zo2.replay({"head.weight": weight}, tmp_path / "a.zolog", progress=False)
    assert torch.equal(alone["head.weight"], out["embed.weight"])


def test_a_model_prefix_is_bridged_and_dtype_follows_the_table(tmp_path):
    weight = torch.randn(64, 65)
    loaded = weight.bfloat16()
    records = random_records(3)
    path = make_log(tmp_path / "a.zolog", {"transformer.h.weight": loaded}, records, store="bf16x2")
    folder = tmp_path / "base"
    folder.mkdir()
    save_file({"h.weight": weight, "mask": torch.ones(2, 2)}, folder / "model.safetensors")
    out = load_file(
        zo2.replay(folder, path, out=tmp_path / "o", progress=False) / "model.safetensors"
    )
    expected = zo2.replay({"transformer.h.weight": loaded}, path, progress=False)
    assert torch.equal(out["h.weight"], expected["transformer.h.weight"])
    assert out["h.weight"].dtype is torch.bfloat16
    assert torch.equal(out["mask"], torch.ones(2, 2))


def test_a_header_survives_json(small):
    _, path = small
    with UpdateLog.open(path) as log:
        header = LogHeader.from_dict(log.header)
        assert header.to_dict() == log.header
    assert LogHeader.from_dict(header.to_dict()) == header
    assert json.loads(json.dumps(header.to_dict())) == header.to_dict()


def test_hashes_see_bytes_not_layout():
    t = torch.randn(8, 6)
    assert hash_tensor(t.t()) == hash_tensor(t.t().contiguous()) != hash_tensor(t)
    assert hash_tensor(t.bfloat16()) != hash_tensor(t)
    assert hash_tensor(torch.tensor(1.0)) == hash_tensor(torch.ones(1))
    assert hash_tensor(torch.empty(0)) == hash_tensor(torch.empty(0, 3))


def test_progress_reaches_every_element(small, monkeypatch):
    base, path = small
    bars = []
    import zo2._replay as module

    class Bar(module.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**kwargs, "disable": False})
            bars.append(self)

    monkeypatch.setattr(module, "tqdm", Bar)
    zo2.replay(base, path)
    assert bars[0].n == bars[0].total == sum(t.numel() for t in base.values())
