import pytest
from shared_kernels.units import format_bytes, format_seconds


@pytest.mark.parametrize(
    ("value", "text"),
    [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (1e-6, "1 µs"), (5e-9, "5 ns"), (0.0, "0 ns")],
)
def test_seconds(value, text):
    assert format_seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.50 KiB"),
        (5 << 20, "5.00 MiB"),
        (3 << 50, "3072.00 TiB"),
    ],
)
def test_bytes(value, text):
    assert format_bytes(value) == text
