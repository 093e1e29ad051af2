import json
import logging
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import textwrap
import time
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from zo2 import LogError, LogRecord, UpdateLog
from zo2.log import FLUSH, MAX_HEADER_BYTES, SKIPPED, record_dtype
from zo2.updates import folds, update_rows

HEADER = {"q": 1, "note": "test", "big": 2**64 - 1}


def write(path, n=10, q=1, **kwargs):
    with UpdateLog.create(path, {**HEADER, "q": q}, **kwargs) as log:
        for t in range(n):
            log.append(LogRecord(t, 2**63 + t, 1e-6 * t, 0.1, [0.5 * t + k for k in range(q)]))
    return path


def body_start(path):
    data = path.read_bytes()
    return 12 + int.from_bytes(data[8:12], "little") + 4


def test_records_come_back(tmp_path):
    path = write(tmp_path / "a.zolog", 5, q=3)
    with UpdateLog.open(path) as log:
        assert log.header == {**HEADER, "q": 3}
        assert len(log) == 5
        records = log.records
        assert log.verify().ok
    assert records["step"].tolist() == [0, 1, 2, 3, 4]
    assert records["seed"].tolist() == [2**63 + t for t in range(5)]
    np.testing.assert_array_equal(
        records["lr"], np.float32(1e-6) * 0 + np.float32([1e-6 * t for t in range(5)])
    )
    assert records["g"].tolist() == [[0.5 * t, 0.5 * t + 1, 0.5 * t + 2] for t in range(5)]


def test_layout_is_what_the_format_says(tmp_path):
    """Read with struct alone, independently of the module."""
    path = write(tmp_path / "a.zolog", 2)
    data = path.read_bytes()
    assert data[:8] == b"ZOLOG1\r\n"
    (length,) = struct.unpack_from("<I", data, 8)
    assert json.loads(data[12 : 12 + length]) == HEADER
    assert struct.unpack_from("<I", data, 12 + length)[0] == zlib.crc32(data[12 : 12 + length])
    records = data[16 + length :]
    assert len(records) == 2 * 32
    step, seed, lr, decay, g, flags, crc = struct.unpack("<IQfffII", records[32:])
    assert (step, seed, g, flags) == (1, 2**63 + 1, 0.5, 0)
    assert (lr, decay) == (np.float32(1e-6), np.float32(0.1))
    assert crc == zlib.crc32(records[32:60])


@given(
    st.integers(1, 9),
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=9, max_size=9),
)
@settings(max_examples=25, deadline=None)
def test_any_finite_scalars_survive(tmp_path_factory, q, values):
    path = tmp_path_factory.mktemp("log") / "a.zolog"
    with UpdateLog.create(path, {"q": q}) as log:
        log.append((0, 1, 0.1, 0.0, values[:q]))
    with UpdateLog.open(path) as log:
        assert log.records["g"][0].tolist() == values[:q]
        assert log.dtype.itemsize == 28 + 4 * q


@pytest.mark.parametrize("cut", [1, 4, 17, 31])
def test_torn_tail_is_reported_then_cut_when_continued(tmp_path, caplog, cut):
    path = write(tmp_path / "a.zolog", 10)
    os.truncate(path, path.stat().st_size - cut)
    with UpdateLog.open(path) as log:
        report = log.verify()
        assert (report.records, report.torn_bytes, report.ok) == (9, 32 - cut, False)
        assert report.usable == 9
        assert report.damage[0].kind == "torn tail"
        assert len(log.records) == 9
    with caplog.at_level(logging.WARNING), UpdateLog.open(path, "a") as log:
        assert f"torn tail of {32 - cut} bytes; 9 whole records" in caplog.text
        log.append(LogRecord(9, 1, 0.1, 0, [2.0]))
    with UpdateLog.open(path) as log:
        assert log.verify().ok
        assert log.records["g"][-1] == 2.0


def test_zeros_of_a_lost_write_are_a_torn_tail(tmp_path, caplog):
    path = write(tmp_path / "a.zolog", 4)
    with path.open("ab") as file:
        file.write(bytes(70))
    with caplog.at_level(logging.WARNING), UpdateLog.open(path, "a") as log:
        assert len(log) == 4
    assert "torn tail of 70 bytes" in caplog.text


@pytest.mark.parametrize("byte", range(32))
def test_flipped_byte_is_found_and_named(tmp_path, byte):
    path = write(tmp_path / "a.zolog", 10)
    data = bytearray(path.read_bytes())
    offset = body_start(path) + 6 * 32
    data[offset + byte] ^= 0x10
    path.write_bytes(data)
    with UpdateLog.open(path) as log:
        report = log.verify()
    assert [(d.kind, d.index, d.offset) for d in report.damage] == [("checksum", 6, offset)]
    assert report.usable == 6
    assert f"record 6 at byte {offset}" in report.damage[0].message
    with pytest.raises(LogError, match=f"record 6 at byte {offset}.*truncate .* 6"):
        UpdateLog.open(path, "a")


def test_flipped_header_byte_is_refused(tmp_path):
    path = write(tmp_path / "a.zolog", 1)
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data)
    with pytest.raises(LogError, match="header checksum"):
        UpdateLog.open(path)


def forge(path, rows):
    """Append records with right checksums, whatever they say."""
    out = np.zeros(len(rows), record_dtype(1))
    for k, (step, flags, g) in enumerate(rows):
        out[k] = (step, 1, 0.1, 0.0, [g], flags, 0)
        out["crc"][k] = zlib.crc32(out[k : k + 1].tobytes()[:-4])
    with path.open("ab") as file:
        file.write(out.tobytes())


@pytest.mark.parametrize(
    ("rows", "kind", "index"),
    [
        ([(3, 0, 1.0), (5, 0, 1.0)], "order", 4),
        ([(3, 0, 1.0), (3, 0, 1.0)], "order", 4),
        ([(2, 0, 1.0)], "order", 3),
        ([(4, FLUSH, 0.0)], "order", 3),
        ([(3, 4, 1.0)], "flags", 3),
        ([(3, 0, np.nan)], "value", 3),
        ([(3, FLUSH, 0.0), (3, SKIPPED, np.inf), (4, 0, np.inf)], "value", 5),
    ],
)
def test_verify_finds_what_a_checksum_cannot(tmp_path, rows, kind, index):
    path = write(tmp_path / "a.zolog", 3)
    forge(path, rows)
    with UpdateLog.open(path) as log:
        report = log.verify()
    assert [(d.kind, d.index) for d in report.damage] == [(kind, index)]


def test_flushes_and_skipped_steps_are_sound(tmp_path):
    path = write(tmp_path / "a.zolog", 2)
    with UpdateLog.open(path, "a") as log:
        log.append(LogRecord(2, 7, 0, 0, [0.0], FLUSH))
        log.append(LogRecord(2, 8, 0.1, 0, [float("nan")], SKIPPED))
        log.append(LogRecord(3, 9, 0.1, 0, [1.0]))
        report = log.verify()
    assert report.ok
    assert (report.records, report.updates) == (5, 4)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ((1, 0, 0.1, 0, [1.0]), "expected step 3, got the update of step 1"),
        ((3, 2**64, 0.1, 0, [1.0]), "seed in"),
        ((3, -1, 0.1, 0, [1.0]), "seed in"),
        ((3, 0, 0.1, 0, [1.0, 2.0]), r"g with 1 entries .* shape \(2,\)"),
        ((3, 0, 0.1, 0, [float("nan")]), "non-finite"),
        ((3, 0, float("inf"), 0, [1.0]), "non-finite"),
        ((3, 0, 0.1, 0, [1e39]), "non-finite"),
        ((3, 0, 0.1, 0, [1.0], 64), "unknown flags"),
    ],
)
def test_append_refuses(tmp_path, record, words):
    path = write(tmp_path / "a.zolog", 3)
    with UpdateLog.open(path, "a") as log:
        with pytest.raises(LogError, match=words):
            log.append(record)
        assert len(log) == 3
        log.append((3, 0, 0.1, 0, [1.0]))


def test_truncate_then_continue(tmp_path):
    path = write(tmp_path / "a.zolog", 10)
    with UpdateLog.open(path, "a") as log:
        with pytest.raises(LogError, match="0 to 10 records, got 11"):
            log.truncate(11)
        log.truncate(4)
        log.append(LogRecord(4, 0, 0.1, 0, [9.0]))
        assert log.records["g"][:, 0].tolist() == [0.0, 0.5, 1.0, 1.5, 9.0]
        log.truncate(0)
        log.append(LogRecord(0, 0, 0.1, 0, [1.0]))


def test_reading_and_closed_logs_refuse_to_write(tmp_path):
    path = write(tmp_path / "a.zolog", 1)
    log = UpdateLog.open(path)
    for call in (lambda: log.append((1, 0, 0, 0, [1.0])), lambda: log.truncate(0)):
        with pytest.raises(ValueError, match="open for reading"):
            call()
    log.close()
    log.close()
    with pytest.raises(ValueError, match="closed"):
        _ = log.records
    with pytest.raises(ValueError, match="mode 'r'"):
        UpdateLog.open(path, "w")


def test_create_never_overwrites(tmp_path):
    path = write(tmp_path / "a.zolog", 3)
    with pytest.raises(FileExistsError, match="mode='a'"):
        UpdateLog.create(path, HEADER)
    with UpdateLog.open(path) as log:
        assert len(log) == 3


@pytest.mark.parametrize(
    "header",
    [{}, {"q": 0}, {"q": "1"}, {"q": 10**6}, {"q": 1, "x": float("nan")}, {"q": 1, "x": object()}],
)
def test_bad_headers_are_refused_before_a_file_is_made(tmp_path, header):
    with pytest.raises(LogError):
        UpdateLog.create(tmp_path / "a.zolog", header)
    assert not (tmp_path / "a.zolog").exists()


def framed(text, length=None, crc=None):
    crc = zlib.crc32(text) if crc is None else crc
    return (
        b"ZOLOG1\r\n"
        + struct.pack("<I", len(text) if length is None else length)
        + text
        + struct.pack("<I", crc)
    )


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "never finished"),
        (b"ZOLO", "never finished"),
        (b"ZOLOG1\r\n\x05", "never finished"),
        (b"PK\x03\x04 something else", "not an update log"),
        (framed(b"{}", length=MAX_HEADER_BYTES + 1), "the format's limit"),
        (framed(b'{"q":1}', length=2**20), "never finished"),
        (framed(b"{q}"), "not JSON"),
        (framed(b"[" * 100000), "not JSON"),
        (framed(b'{"q":1000000000}'), "1 to 4096"),
        (framed(b'{"q":true}'), "1 to 4096"),
        (framed(b"[1]"), "1 to 4096"),
    ],
)
def test_foreign_and_hostile_files_are_refused(tmp_path, data, words):
    path = tmp_path / "a.zolog"
    path.write_bytes(data)
    with pytest.raises(LogError, match=words):
        UpdateLog.open(path)


def test_a_sparse_giant_does_not_fill_memory(tmp_path):
    path = write(tmp_path / "a.zolog", 1)
    os.truncate(path, 2**40)
    with UpdateLog.open(path) as log:
        with pytest.raises(LogError, match="read\\(start, stop\\)"):
            _ = log.records
        assert log.read(0, 2)["step"].tolist() == [0, 0]


CHILD = """
    import sys, time
    from zo2 import UpdateLog
    log = UpdateLog.open(sys.argv[1], "a", fsync_every=64)
    t = len(log)
    print("ready", flush=True)
    while True:
        log.append((t, t, 0.1, 0.0, [float(t)]))
        t += 1
"""


def start_writer(path):
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CHILD), str(path)], stdout=subprocess.PIPE
    )
    assert child.stdout.readline().strip() == b"ready"
    return child


def test_second_writer_is_refused_readers_are_not(tmp_path):
    path = write(tmp_path / "a.zolog", 3)
    child = start_writer(path)
    try:
        with pytest.raises(BlockingIOError, match="another process"):
            UpdateLog.open(path, "a")
        with UpdateLog.open(path) as log:
            assert len(log) >= 3
    finally:
        child.kill()
        child.wait()
    with UpdateLog.open(path, "a") as log, pytest.raises(BlockingIOError):
        UpdateLog.open(path, "a")


def test_kill_9_of_a_writer_loses_nothing_it_wrote(tmp_path):
    path = write(tmp_path / "a.zolog", 0)
    last = 0
    for _ in range(3):
        before = path.stat().st_size
        child = start_writer(path)
        time.sleep(0.15)
        while path.stat().st_size == before and child.poll() is None:
            time.sleep(0.01)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        with UpdateLog.open(path, "a") as log:
            assert log.verify().ok
            steps = log.records["step"]
            np.testing.assert_array_equal(steps, np.arange(len(steps)))
            assert len(steps) > last
            last = len(steps)


def _sit(event):
    event.wait(20)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_a_forked_worker_does_not_keep_the_lock(tmp_path):
    path = write(tmp_path / "a.zolog", 1)
    context = multiprocessing.get_context("fork")
    event = context.Event()
    log = UpdateLog.open(path, "a")
    worker = context.Process(target=_sit, args=(event,))
    worker.start()
    try:
        with pytest.raises(BlockingIOError):
            UpdateLog.open(path, "a")
        log.close()
        deadline = time.monotonic() + 10
        while True:
            try:
                UpdateLog.open(path, "a").close()
                break
            except BlockingIOError:
                assert time.monotonic() < deadline, "the worker holds the lock"
                time.sleep(0.05)
    finally:
        event.set()
        worker.join()


def test_a_full_disk_leaves_the_log_as_it_was(tmp_path, monkeypatch):
    path = write(tmp_path / "a.zolog", 3)
    with UpdateLog.open(path, "a") as log:
        real, calls = os.write, []

        def full(fd, data):
            calls.append(1)
            if len(calls) == 1:
                return real(fd, bytes(data)[:10])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            log.append((3, 0, 0.1, 0, [1.0]))
        monkeypatch.undo()
        assert log.verify().ok
        log.append((3, 0, 0.1, 0, [1.0]))
        assert log.verify().records == 4


def test_fsync_follows_the_given_rhythm(tmp_path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(fd), real(fd)))
    with UpdateLog.create(tmp_path / "a.zolog", HEADER, fsync_every=4) as log:
        synced.clear()
        for t in range(9):
            log.append((t, 0, 0.1, 0, [1.0]))
        assert len(synced) == 2
    assert len(synced) == 3


def records_of(*rows, q=1):
    out = np.zeros(len(rows), record_dtype(q))
    for k, (step, seed, lr, decay, g, flags) in enumerate(rows):
        out[k] = (step, seed, lr, decay, g, flags, 0)
    return out


def test_update_rows_follow_the_rule():
    records = records_of(
        (0, 2**63 + 5, 0.1, 0.01, [3.0, -7.0, 0.3], 0),
        (1, 6, 0.0, 0.0, [0.0] * 3, FLUSH),
        (1, 7, 0.3, 0.02, [np.nan, 1.0, 1.0], SKIPPED),
        q=3,
    )
    keys, coefs = update_rows(records)
    assert keys.dtype == np.int32
    assert coefs.dtype == np.float32
    words = keys.view(np.uint32).tolist()
    assert words == [[5, 2**31, k] for k in range(3)] + [[7, 0, k] for k in range(3)]
    lr, decay = np.float32(0.1), np.float32(0.01)
    assert coefs[0, 0] == np.float32(1) - np.float32(lr * decay)
    assert coefs[1:3, 0].tolist() == [1.0, 1.0]
    third = np.float32(lr / np.float32(3))
    assert coefs[:3, 1].tolist() == [third * np.float32(g) for g in (3.0, -7.0, 0.3)]
    assert coefs[3:].tolist() == [[1.0, 0.0]] * 3


@given(
    st.integers(1, 6),
    st.integers(0, 9),
    st.lists(st.booleans(), max_size=30),
)
@settings(max_examples=60, deadline=None)
def test_folds_equal_a_step_by_step_simulation(k, unit, flushes):
    rows, step = [], 0
    for index, flush in enumerate(flushes):
        rows.append((step, 100 + index, 0.1, 0, [1.0], FLUSH if flush else 0))
        step += not flush
    records = records_of(*rows)
    expected, pending = [], 0
    for index, (step, seed, *_, flags) in enumerate(rows):
        if (flags & FLUSH or (step + unit) % k == 0) and pending:
            expected.append((index, seed))
            pending = 0
        pending += not flags & FLUSH
    assert [tuple(f) for f in folds(records, unit, k)] == expected
