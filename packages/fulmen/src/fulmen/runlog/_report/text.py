"""Numbers as people read them."""

from __future__ import annotations

import math
import time

__all__ = ["amount", "bytes_text", "compact", "date", "duration", "short"]


def short(value: float) -> str:
    """Four significant digits; very large and very small ones with an exponent."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "\u221e" if value > 0 else "\u2212\u221e"
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-3:
        digits, _, exponent = f"{value:.3e}".partition("e")
        digits = digits.rstrip("0").rstrip(".")
        return f"{digits}e{int(exponent)}".replace("-", "\u2212")
    text = f"{value:.4g}" if size < 1e4 else f"{value:.0f}"
    return text.replace("-", "\u2212")


def compact(value: float) -> str:
    """For an axis: 1.5k, 20M."""
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.4g}{letter}".replace("-", "\u2212")
    return short(value)


def amount(value: int) -> str:
    """With a thin space between groups of three digits."""
    return f"{value:,}".replace(",", "\u2009")


def duration(seconds: float) -> str:
    """Two units at most: 3 h 12 min, 1 min 5 s, 4.2 s, 12 ms."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole % 86400 // 3600, whole % 3600 // 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def bytes_text(size: float) -> str:
    """In binary units: 1.4 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def date(seconds: float) -> str:
    """Local date and time."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
