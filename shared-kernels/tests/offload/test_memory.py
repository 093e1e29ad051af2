"""Host memory is of exact size, and limits are known before anything is allocated."""

from __future__ import annotations

import mmap

import psutil
import pytest
import torch
from shared_kernels.offload import HostBuffer, HostMemoryError, memory_limits, require_host_memory
from shared_kernels.offload import memory as module


def test_buffer_has_the_exact_size_and_is_resident():
    # 80 MiB would become 128 MiB in an allocator that rounds up to powers of two.
    nbytes = (80 << 20) + 5
    before = psutil.Process().memory_info().rss
    buffer = HostBuffer(nbytes, pin="none")
    grown = psutil.Process().memory_info().rss - before
    assert buffer.tensor.shape == (nbytes,)
    assert buffer.tensor.dtype is torch.uint8
    assert 0.95 * nbytes < grown < 1.05 * nbytes + (1 << 20)


def test_buffer_outlives_its_owner():
    view = HostBuffer(10, pin="none").tensor[3:5]
    view.fill_(7)
    assert view.tolist() == [7, 7]


def test_several_chunks_are_filled_in_by_threads(monkeypatch):
    monkeypatch.setattr(module, "_PREFAULT_CHUNK", 4 * mmap.PAGESIZE)
    assert int(HostBuffer(17 * mmap.PAGESIZE, pin="none", threads=3).tensor.sum()) == 0


def test_limits_are_plausible():
    limits = memory_limits()
    assert 0 < limits.free <= psutil.virtual_memory().total


def test_too_much_is_refused_with_both_numbers():
    with pytest.raises(HostMemoryError, match=r"need 1024\.00 TiB .*can be had.*use store='bf16'"):
        require_host_memory(1 << 50)
    with pytest.raises(HostMemoryError, match=r"need 2\.00 KiB .* limit is 1\.00 KiB"):
        require_host_memory(2048, limit=1024)


@pytest.mark.parametrize("version", [1, 2])
def test_cgroup_limits_are_read(tmp_path, monkeypatch, version):
    folder = tmp_path / ("memory/job" if version == 1 else "job")
    folder.mkdir(parents=True)
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }[version]
    (folder / names[0]).write_text("1000\n")
    (folder / names[1]).write_text("700\n")
    (folder / "memory.stat").write_text(f"anon 1\n{names[2]} 50\n")
    monkeypatch.setattr(
        module, "_cgroup_folders", lambda root, v1: [folder] * (v1 == (version == 1))
    )
    assert module._cgroup_free(tmp_path) == 350
    (folder / names[0]).write_text("max" if version == 2 else str(1 << 63))
    assert module._cgroup_free(tmp_path) is None
