"""Names of files: what is a staging file, and whose."""

from __future__ import annotations

import hashlib
import os
import re
import socket
from functools import cache
from pathlib import Path
from secrets import token_hex
from typing import Final, Literal, NamedTuple

__all__ = ["FORMATS", "MANIFEST", "Format", "StagingName", "is_staging", "parse_staging", "staging_name"]

Format = Literal["torch", "sharded", "safetensors"]
FORMATS: tuple[Format, ...] = ("torch", "sharded", "safetensors")
"""The formats that are written."""

MANIFEST: Final = "manifest.json"
"""The file that makes a folder a checkpoint. It is written last and deleted first."""

# NAME_MAX of every common file system is 255 bytes; the decoration needs about 45.
_LONGEST_TARGET = 180
_PATTERN = re.compile(r"\.(?P<target>.+)\.(?P<pid>\d+)\.(?P<machine>[0-9a-f]{8})(?P<random>[0-9a-f]{8})\.partial")


class StagingName(NamedTuple):
    """What the name ``.TARGET.PID.RANDOM.partial`` of a staging file tells."""

    target: str
    """Name of the file that was being written (its first 180 bytes)."""
    pid: int
    """Process that wrote it."""
    machine: str
    """First half of RANDOM: the boot of the machine it ran on, see ``this_machine``."""


def staging_name(target: str) -> str:
    """A fresh name, beside ``target``, for the bytes that will become ``target``."""
    return f".{_shortened(target)}.{os.getpid()}.{this_machine()}{token_hex(4)}.partial"


def parse_staging(name: str) -> StagingName | None:
    """Read a staging file's name; None when ``name`` is not one."""
    match = _PATTERN.fullmatch(name)
    return StagingName(match["target"], int(match["pid"]), match["machine"]) if match else None


def is_staging(path: str) -> bool:
    """Whether the last part of ``path`` is the name of a staging file."""
    return parse_staging(path.rstrip("/").rsplit("/", 1)[-1]) is not None


def stages(name: str, target: str) -> StagingName | None:
    """Read ``name`` if it is a staging file of ``target``, both without folders; None otherwise."""
    parsed = parse_staging(name)
    return parsed if parsed is not None and parsed.target == _shortened(target) else None


@cache
def this_machine() -> str:
    """Eight hex digits for this boot of this machine: process ids and file locks mean something only within it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    except OSError:
        boot = ""
    return hashlib.blake2b(f"{socket.gethostname() if not boot else ''} {boot}".encode(), digest_size=4).hexdigest()


def _shortened(target: str) -> str:
    return target.encode()[:_LONGEST_TARGET].decode(errors="ignore")
