"""ChaCha20 against RFC 8439, and the secure normals against their definition and float64."""

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_kernels.random.chacha import chacha20_words, key_from_seed, new_key
from shared_kernels.random.chacha import constants as k
from shared_kernels.random.chacha.keys import key_words
from shared_kernels.random.chacha.op import chacha20_words_
from shared_kernels.random.chacha.reference import (
    box_muller,
    minus_two_log,
    standard_normals,
    stream_nonce,
)
from shared_kernels.testing import check_op

IMPLS = ["reference", "numba", "triton"]
KEY = key_from_seed(7)
EXTREMES = [0, 1, 0x3FFFFFFF, 0x40000000, 0x7FFFFFFF, 0x80000000, 0xC0000000, 0xFFFFFFFF]

# RFC 8439, section 2.3.2 and appendix A.1: key, nonce, block counter, key stream
RFC_8439 = {
    "2.3.2": (
        bytes(range(32)),
        "000000090000004a00000000",
        1,
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e",
    ),
    "A.1 #1": (
        bytes(32),
        "00" * 12,
        0,
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
    ),
    "A.1 #2": (
        bytes(32),
        "00" * 12,
        1,
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
    ),
    "A.1 #3": (
        bytes(31) + b"\x01",
        "00" * 12,
        1,
        "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"
        "8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0",
    ),
    "A.1 #4": (
        b"\x00\xff" + bytes(30),
        "00" * 12,
        2,
        "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca"
        "13b25aa26cb4a648cb9b9d1be65b2c0924a66c54d545ec1b7374f4872e99f096",
    ),
    "A.1 #5": (
        bytes(32),
        "00" * 11 + "02",
        0,
        "c2c64d378cd536374ae204b9ef933fcd1a8b2288b3dfa49672ab765b54ee27c7"
        "8a970e0e955c14f3a88e741b97c286f75f8fc299e8148362fa198a39531bed6d",
    ),
}


def as_key(key: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(key, "<i4").astype(np.int32))


def device_of(impl: str) -> str:
    return "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("vector", RFC_8439)
def test_rfc_8439(vector, impl):
    key, nonce, counter, stream = RFC_8439[vector]
    words = chacha20_words(
        1,
        key=as_key(key),
        nonce=np.frombuffer(bytes.fromhex(nonce), "<u4").tolist(),
        counter=counter,
        device=device_of(impl),
        impl=impl,
    )
    assert words.cpu().numpy().astype("<i4").tobytes().hex() == stream


@pytest.mark.parametrize("impl", ["numba", "triton"])
@pytest.mark.parametrize(
    ("counter", "count"),
    [(0, 0), (0, 257), (3, 1), (0x7FFFFFF0, 300), ((1 << 32) - 255, 255), ((1 << 32) - 1, 1)],
)
def test_words_are_the_reference(impl, counter, count):
    stream = {"key": KEY, "nonce": (0xFFFFFFFF, 1, 0x80000000), "counter": counter}
    expected = chacha20_words(count, impl="reference", **stream)
    got = chacha20_words(count, impl=impl, device=device_of(impl), **stream)
    assert torch.equal(got.cpu(), expected)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, (1 << 64) - 1),
    nonce=st.tuples(*[st.integers(0, 0xFFFFFFFF)] * 3),
    counter=st.integers(0, (1 << 32) - 600),
    count=st.integers(0, 600),
)
def test_any_words_are_the_reference(seed, nonce, counter, count):
    stream = {"key": key_from_seed(seed), "nonce": nonce, "counter": counter}
    expected = chacha20_words(count, impl="reference", **stream)
    assert torch.equal(chacha20_words(count, impl="numba", **stream), expected)


def test_threads_do_not_change_the_words():
    stream = {"key": KEY, "nonce": (1, 2, 3), "counter": 9}
    one = chacha20_words(9000, **stream)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        assert torch.equal(chacha20_words(9000, **stream), one)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("impl", IMPLS)
def test_op_checklist(impl):
    def make_args(count):
        out = torch.zeros(count, 16, dtype=torch.int32, device=device_of(impl))
        return out, KEY, 1, 2, 0xFFFFFFFF, 5, impl

    sizes = [3, 257] if impl == "triton" else [257, 0, 1, 255, 256]
    check_op(chacha20_words_, make_args, sizes=sizes)


# --- nonces and keys ----------------------------------------------------------------------------


def test_nonces_are_unique_to_the_last_value_of_every_field():
    edge = lambda bits: [0, 1, 1 << (bits - 1), (1 << bits) - 1]  # noqa: E731
    steps = [*edge(k.STEP_BITS), 1 << 32, (1 << 32) - 1]
    blocks = [*edge(k.BLOCK_BITS), 1 << 32, (1 << 32) - 1]
    positions = {
        (*stream_nonce(step, uid, domain, block), block & 0xFFFFFFFF)
        for step in steps
        for uid in edge(32)
        for domain in edge(k.DOMAIN_BITS)
        for block in blocks
    }
    assert len(positions) == len(steps) * 4 * 4 * len(blocks)
    assert all(0 <= word < 1 << 32 for position in positions for word in position)


def test_small_steps_and_parameters_are_the_plain_nonce():
    assert stream_nonce(5, 9, 0, 1000) == (5, 0, 9)
    assert stream_nonce(1, 9, 2, 3 << 32) == (1, (2 << 24) | (3 << 8), 9)


def test_new_keys_are_fresh():
    keys = {tuple(new_key().tolist()) for _ in range(16)}
    assert len(keys) == 16
    assert new_key().dtype == torch.int32
    assert new_key().shape == (8,)


def test_new_keys_are_the_systems(monkeypatch):
    monkeypatch.setattr("os.urandom", lambda count: bytes(range(count)))
    assert key_words(new_key()) == np.frombuffer(bytes(range(32)), "<u4").tolist()


def test_key_from_seed_is_sha_256():
    digest = hashlib.sha256(b"shared-kernels chacha20 key" + (258).to_bytes(8, "little")).digest()
    assert key_words(key_from_seed(258)) == np.frombuffer(digest, "<u4").tolist()
    assert not torch.equal(key_from_seed(258), key_from_seed(259))


@pytest.mark.parametrize("seed", [-1, 1 << 64])
def test_bad_seeds(seed):
    with pytest.raises(ValueError, match="seed: expected an integer in"):
        key_from_seed(seed)


# --- normals ------------------------------------------------------------------------------------


def words(seed: int = 0, count: int = 1 << 16) -> torch.Tensor:
    """Random words and all combinations of extreme ones, int64 ``(4, n)`` of uint32 values."""
    g = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, 1 << 32, (4, count), generator=g)
    extreme = torch.tensor(EXTREMES)
    return torch.cat([drawn, torch.cartesian_prod(*[extreme] * 4).T], dim=1)


def exact_normals(w: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Box and Muller's transform in extended precision, by the textbook."""
    high, low, _, angle_low = (word.numpy().astype(np.longdouble) for word in w)
    u = high * np.longdouble(2) ** -32 + (low + 0.5) * np.longdouble(2) ** -64
    radius = np.sqrt(-2 * np.log(u))
    signed = (((w[2] << 2) & 0xFFFFFFFF).to(torch.int32) >> 2).numpy().astype(np.longdouble)
    pi = np.longdouble("3.14159265358979323846264338327950288")
    t = (signed + (angle_low + 0.5) * np.longdouble(2) ** -32) * np.longdouble(2) ** -30 * pi / 2
    x = np.where((w[2].numpy() >> 31) & 1, -np.cos(t), np.cos(t))
    swap = (w[2].numpy() >> 30) & 1
    return radius * np.where(swap, np.sin(t), x), radius * np.where(swap, x, np.sin(t))


def test_logarithm_against_extended_precision():
    w = words()
    drawn = w[0].double() * 2.0**-32 + (w[1].double() + 0.5) * 2.0**-64
    steps = torch.arange(2000, dtype=torch.float64)
    u = torch.cat([drawn, 1 - steps * 2.0**-53, 2.0 ** -steps[:66]])
    exact = -2 * np.log(u.numpy().astype(np.longdouble))
    got = minus_two_log(u).numpy()
    assert bool((np.abs(got - exact) <= 2.0**-49 * exact).all())
    assert bool((got >= 0).all())


def test_normals_against_extended_precision():
    w = words()
    exact = exact_normals(w)
    u = w[0].double() * 2.0**-32 + (w[1].double() + 0.5) * 2.0**-64
    radius = minus_two_log(u).sqrt().numpy()
    # u itself is rounded to float64, which near 1 moves the radius absolutely
    bound = 2.0**-49 * radius + 2.0**-52 / np.maximum(radius, 2.0**-26)
    for got, expected in zip(box_muller(*w), exact, strict=True):
        assert bool((np.abs(got.numpy() - expected) <= bound).all())


def test_largest_normal():
    z = torch.cat(box_muller(*words()))
    assert 9.49 < float(z.abs().max()) < 9.493
    assert float(z.abs().max()) <= math.sqrt(130 * math.log(2)) * (1 + 1e-15)


def test_every_word_counts():
    """The low halves reach below the resolution of 32 bits, on which tails and lattices depend."""
    w = torch.full((4, 1), 0x12345678)
    base = torch.cat(box_muller(*w))
    for row in range(4):
        changed = w.clone()
        changed[row] ^= 1 << 12
        assert bool((torch.cat(box_muller(*changed)) != base).all()), row


def numba_box_muller(w: torch.Tensor) -> list[torch.Tensor]:
    from shared_kernels.random.chacha import cpu

    out = np.empty((2, w.shape[1]))
    for low in range(0, w.shape[1], 256):
        rows = np.ascontiguousarray(w[:, low : low + 256].numpy().astype(np.uint32)).reshape(-1)
        z = np.empty(512)
        cpu.box_muller_columns(rows, z)
        out[:, low : low + 256] = z.reshape(2, 256)
    return list(torch.from_numpy(out))


def test_numba_normals_are_the_reference():
    w = words(1, 1 << 14)
    for got, expected in zip(numba_box_muller(w), box_muller(*w), strict=True):
        assert torch.equal(got.view(torch.int64), expected.view(torch.int64))


triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
# conftest.py has chosen the interpreter or the GPU before this import decorates the functions
device_box_muller = pytest.importorskip("shared_kernels.random.chacha.triton").box_muller


@triton.jit
def box_muller_kernel(words_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(words_ptr + i).to(tl.uint32, bitcast=True)
    b = tl.load(words_ptr + n + i).to(tl.uint32, bitcast=True)
    c = tl.load(words_ptr + 2 * n + i).to(tl.uint32, bitcast=True)
    d = tl.load(words_ptr + 3 * n + i).to(tl.uint32, bitcast=True)
    z0, z1 = device_box_muller(a, b, c, d)
    tl.store(out_ptr + i, z0)
    tl.store(out_ptr + n + i, z1)


def test_triton_normals_are_the_reference(kernel_device):
    w = words(2, 1 << 14)
    n = w.shape[1]
    assert n % 1024 == 0
    out = torch.empty(2, n, dtype=torch.float64, device=kernel_device)
    bits = w.to(torch.int32).to(kernel_device)
    box_muller_kernel[(n // 1024,)](bits, out, n, BLOCK=1024, enable_fp_fusion=False)
    for got, expected in zip(out.cpu(), box_muller(*w), strict=True):
        assert torch.equal(got.view(torch.int64), expected.view(torch.int64))


@pytest.mark.parametrize("start", [0, 2047, (5 << 35) - 2048, (1 << 51) - 4096])
def test_layout_spelled_out_with_the_public_words(start):
    """An element's block, lane and nonce, from the documented table alone."""
    key, step, uid, domain = KEY, (3 << 32) + 5, 0x89ABCDEF, 7
    z = standard_normals(
        4096, key=key_words(key), step=step, uid=uid, domain=domain, start=start
    ).numpy()
    for i in (0, 1, 255, 256, 700, 2047, 2048, 4095):
        e = start + i
        block, lane = (e >> 11) * 256 + (e & 255), (e >> 8) & 7
        nonce = (step & 0xFFFFFFFF, (step >> 32) | (block >> 32 << 8) | (domain << 24), uid)
        words = chacha20_words(1, key=key, nonce=nonce, counter=block & 0xFFFFFFFF)
        four = (words.view(4, 4)[lane // 2].long() & 0xFFFFFFFF).view(4, 1)
        assert abs(z[i] - exact_normals(four)[lane % 2][0]) < 1e-13


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"count": -1}, ValueError, "count: expected an integer"),
        ({"count": 2, "counter": (1 << 32) - 1}, ValueError, "count: .*take another nonce"),
        ({"counter": 1 << 32}, ValueError, "counter: expected an integer"),
        ({"counter": 1.0}, TypeError, "counter: expected an integer, got float"),
        ({"nonce": (1, 2)}, ValueError, "nonce: expected three words"),
        ({"nonce": (1, 2, -3)}, ValueError, r"nonce\[2\]: expected an integer in \[0, 4294967296"),
        ({"key": KEY.long()}, TypeError, "key: expected int32, got int64"),
        ({"key": KEY[:4].clone()}, ValueError, "key: expected shape"),
        ({"impl": "cuda"}, ValueError, "impl: expected one of auto"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {"count": 1, "key": KEY, "nonce": (1, 2, 3), **change}
    with pytest.raises(error, match=message):
        chacha20_words(arguments.pop("count"), **arguments)
