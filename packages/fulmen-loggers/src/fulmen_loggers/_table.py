"""A CSV file that gains rows and columns, in time linear in what it holds."""

from __future__ import annotations

import csv
import io
import os
from contextlib import suppress
from typing import IO, TYPE_CHECKING

from fulmen_protocols.errors import MisconfigurationException

if TYPE_CHECKING:
    from fulmen_loggers._folder import RunFolder

__all__ = ["Table", "read_rows"]

_BLOCK_BYTES = 1 << 20


class Table:
    """Rows are appended. A new column means one copy of the file, with a wider header and a comma more in each row.

    What the file holds already, from an earlier process of the same run, is kept. On storages without appending (URLs)
    the whole file is kept in memory and put in one piece.
    """

    def __init__(self, folder: RunFolder, path: str) -> None:
        self._folder = folder
        self._path = path
        self._columns: dict[str, int] = {}
        self._opened = False
        self._remote = bytearray()
        self.rows = 0
        """Rows on disk."""

    def append(self, rows: list[dict[str, float]]) -> None:
        """Write ``rows``; cells without a value stay empty. Columns are in order of first appearance.

        What fails leaves the table as it was, so that it can be tried again.
        """
        if not self._opened:
            self._open()
            self._opened = True
        known = len(self._columns)
        before = dict(self._columns)
        for row in rows:
            if not row.keys() <= self._columns.keys():
                for name in row:
                    self._columns.setdefault(name, len(self._columns))
        if len(self._columns) > known:
            try:
                self._widen(len(self._columns) - known, known)
            except BaseException:
                self._columns = before
                raise
        self._add(self._lines(rows))
        self.rows += len(rows)

    def _lines(self, rows: list[dict[str, float]]) -> bytes:
        names = list(self._columns)
        lines: list[str] = []
        for row in rows:
            value = row.get
            # repr of a float is the shortest text that reads back as the same float.
            lines.append(",".join(["" if (cell := value(name)) is None else repr(cell) for name in names]))
        return ("\n".join(lines) + "\n").encode() if lines else b""

    def _header(self) -> bytes:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(self._columns)
        return text.getvalue().encode()

    def _open(self) -> None:
        """Learn what the file holds."""
        if self._folder.is_remote:
            data = self._folder.read(self._path) or b""
            self._remote = bytearray(data[: data.rfind(b"\n") + 1])
            stream: IO[bytes] = io.BytesIO(self._remote)
        else:
            try:
                _cut_half_a_line(self._path)
                stream = open(self._path, "rb")  # noqa: SIM115 - closed below
            except FileNotFoundError:
                return
            except OSError as error:
                raise self._folder.unwritable(self._path, error) from error
        with stream:
            header = stream.read(_end_of_header(stream, 1))
            try:
                names = next(iter(list(csv.reader(io.StringIO(header.decode(), newline="")))), list[str]())
            except (UnicodeDecodeError, csv.Error) as error:
                raise MisconfigurationException(
                    f"{self._path!r} exists and is no table of metrics ({error}). Move it away, or use another version."
                ) from error
            self._columns = {name: index for index, name in enumerate(names)}

    def _widen(self, by: int, known: int) -> None:
        header, commas = self._header(), b"," * by + b"\n"
        if self._folder.is_remote:
            start = _end_of_header(io.BytesIO(self._remote), known)
            self._remote = bytearray(header + _lengthened(bytes(self._remote[start:]), commas))
            return
        staging = f"{self._path}.{os.getpid()}.partial"
        try:
            with open(staging, "wb") as wide:
                wide.write(header)
                if known:
                    with open(self._path, "rb") as narrow:
                        narrow.seek(_end_of_header(narrow, known))
                        while block := narrow.read(_BLOCK_BYTES):
                            wide.write(_lengthened(block, commas))
            os.replace(staging, self._path)
        except OSError as error:
            raise self._folder.unwritable(self._path, error) from error

    def _add(self, lines: bytes) -> None:
        if self._folder.is_remote:
            self._folder.write(self._path, bytes(self._remote + lines))
            self._remote += lines
            return
        size = os.path.getsize(self._path) if os.path.exists(self._path) else 0
        try:
            with open(self._path, "ab") as stream:
                stream.write(lines)
        except OSError as error:
            with suppress(OSError):
                os.truncate(self._path, size)
            raise self._folder.unwritable(self._path, error) from error


def read_rows(folder: RunFolder, path: str) -> list[dict[str, str]]:
    """The rows of a file as texts by column; none where there is no file. A row that is not whole is left out."""
    data = folder.read(path) or b""
    whole = data[: data.rfind(b"\n") + 1].decode("utf-8", "replace")
    return [
        {name: text for name, text in row.items() if text is not None}
        for row in csv.DictReader(io.StringIO(whole, newline=""))
    ]


def _lengthened(rows: bytes, commas: bytes) -> bytes:
    # Cells are numbers: every line feed after the header ends a row. Lightning's rows end in "\r\n".
    return rows.replace(b"\r", b"").replace(b"\n", commas)


def _end_of_header(stream: IO[bytes], columns: int) -> int:
    """Bytes of the header; a quoted name in it may hold line feeds."""
    if columns == 0:
        return 0
    size, quotes = 0, 0
    stream.seek(0)
    while True:
        line = stream.readline()
        size += len(line)
        quotes += line.count(b'"')
        if quotes % 2 == 0 or not line:
            stream.seek(0)
            return size


def _cut_half_a_line(path: str) -> None:
    """A process killed while it wrote may have left half a row."""
    with open(path, "r+b") as stream:
        end = stream.seek(0, os.SEEK_END)
        whole = end
        while whole:
            start = max(0, whole - 4096)
            stream.seek(start)
            found = stream.read(whole - start).rfind(b"\n")
            whole = start if found < 0 else start + found + 1
            if found >= 0:
                break
        if whole < end:
            stream.truncate(whole)
