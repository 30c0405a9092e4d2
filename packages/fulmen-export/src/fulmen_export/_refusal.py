"""Why a module cannot be exported: the op, and the line of the user's code, out of what torch says."""

from __future__ import annotations

import linecache
import os
import re
import sysconfig
import traceback
from typing import TYPE_CHECKING

import torch

from fulmen_protocols.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn
    from torch.export import ExportedProgram

__all__ = ["CAPTURE_ADVICE", "unexportable"]

CAPTURE_ADVICE = (
    "torch.export records one graph of tensor operations: use torch.where or torch.cond where Python decides on a "
    "tensor's values, and torch's own operations where tensors leave torch."
)

_TORCH = os.path.dirname(torch.__file__)
_HERE = os.path.dirname(__file__)
_STANDARD = sysconfig.get_paths()["stdlib"]
_PLACE = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)(?:, in (?P<function>\w+))?')
_OPS = (
    re.compile(r"OpOverload\(op='(?P<op>[\w.:]+)'"),
    re.compile(r"target=torch\.ops\.(?P<op>[\w.]+)"),
    re.compile(r"[Uu]nknown builtin op: (?P<op>[\w:]+)"),
    re.compile(r"torch\.ops\.(?P<op>aten\.\w+)"),
)
_NODE = re.compile(r"translating node %(?P<node>\w+)")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


def unexportable(
    what: str, module: nn.Module, error: BaseException, advice: str, program: ExportedProgram | None = None
) -> ExportError:
    """The error for ``module``, from what torch raised while it was exported.

    Args:
        what: the exporter.
        module: the user's.
        error: torch's, with its causes.
        advice: what to do about it.
        program: the captured graph, where there is one: its nodes know the lines that they come from.
    """
    chain = list(_causes(error))
    texts = [_ANSI.sub("", str(link)) for link in chain]
    op = next((match["op"] for pattern in _OPS for text in texts for match in [pattern.search(text)] if match), None)
    place = _from_program(program, texts, op) or _from_texts(texts) or _from_traceback(chain)
    if op is None and "DataDependent" in type(chain[-1]).__name__:
        op = "item (Python decides on the values of a tensor)"
    at = f" at {place}" if place else ""
    operation = f": operation {op}{at}" if op else at
    reason = next((line.strip() for text in reversed(texts) for line in text.splitlines() if line.strip()), "")
    return ExportError(
        f"{what} cannot export {type(module).__name__}{operation}: {type(chain[-1]).__name__}: "
        f"{reason[:300].rstrip('.')}. {advice}"
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__


def _from_program(program: ExportedProgram | None, texts: list[str], op: str | None) -> str | None:
    if program is None:
        return None
    names = {match["node"] for text in texts for match in [_NODE.search(text)] if match}
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    # The translator works on a decomposed copy, whose names may be others: then the operation tells.
    found = [node for node in nodes if node.name in names] or [node for node in nodes if op and op in str(node.target)]
    return next((place for node in found for place in [_last_place(node.meta.get("stack_trace") or "")] if place), None)


def _from_texts(texts: list[str]) -> str | None:
    return next((place for text in texts for place in [_last_place(text)] if place), None)


def _from_traceback(chain: list[BaseException]) -> str | None:
    for error in chain:
        frames = traceback.extract_tb(error.__traceback__)
        for frame in reversed(frames):
            if frame.lineno is not None and _is_users(frame.filename):
                return _told(frame.filename, frame.lineno, frame.name)
    return None


def _last_place(text: str) -> str | None:
    places = [match for match in _PLACE.finditer(text) if _is_users(match["file"])]
    return _told(places[-1]["file"], int(places[-1]["line"]), places[-1]["function"]) if places else None


def _told(file: str, line: int, function: str | None) -> str:
    code = linecache.getline(file, line).strip()
    where = f"{file}:{line}" + (f", in {function}" if function else "")
    return f"{where} (`{code}`)" if code else where


def _is_users(file: str) -> bool:
    if file.startswith(("<", _TORCH, _HERE)):
        return False
    return not file.startswith(_STANDARD) or "site-packages" in file
