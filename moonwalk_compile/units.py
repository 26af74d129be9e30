"""Bytes and seconds as people read them."""

from __future__ import annotations

_BINARY_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB")
_SECONDS_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))


def format_bytes(n: int) -> str:
    """`n` bytes with one decimal in the largest binary unit that fits: 80845209 -> "77.1 MiB", 12 -> "12 B"."""
    if n < 0:
        return "-" + format_bytes(-n)
    if n < 1024:
        return f"{n} B"
    size = float(n)
    for unit in _BINARY_UNITS:
        size /= 1024
        if round(size, 1) < 1024:
            return f"{size:.1f} {unit}"
    return f"{size:.1f} {_BINARY_UNITS[-1]}"


def format_seconds(t: float) -> str:
    """`t` seconds with three significant digits: 0.0123 -> "12.3 ms", 0.0 -> "0 s"."""
    if t == 0:
        return "0 s"
    scale, unit = next((pair for pair in _SECONDS_UNITS if abs(t) >= pair[0]), _SECONDS_UNITS[-1])
    return f"{_three_digits(t / scale)} {unit}"


def _three_digits(x: float) -> str:
    return f"{x:#.3g}".rstrip(".") if abs(x) < 999.5 else f"{x:.0f}"
