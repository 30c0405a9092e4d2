"""Let a torch wheel that was built for CUDA load on a machine without CUDA's libraries.

``python -m tools.cuda_stubs SITE_PACKAGES/torch/lib FOLDER``, then run with ``LD_LIBRARY_PATH=FOLDER``.

torch_xla is made for torch's wheel from PyPI, which links against some four gigabytes of NVIDIA's libraries. On a CPU
none of their functions is ever called, but the loader wants each library and each symbol to be there. So each gets a
stub: a library of its name that defines the symbols torch looks for, in the versions it looks for; the functions return
an error, and ``torch.cuda.is_available()`` is False. Good for tests and for nothing else. Needs gcc and binutils.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

THEIRS = re.compile(r"lib(cu|nccl|nv)")
"""Libraries that are NVIDIA's."""

PREFIXES = re.compile(
    r"(cu[A-Z]|cuda|cublas|cudnn|cufft|cusparse|cusolver|curand|nccl|nvshmem|cupti|nvml|__cuda|nvrtc|cufile|Cupti)"
)
"""Names of symbols that are NVIDIA's, for those that carry no version to tell by."""

UNVERSIONED_GO_TO = "libcudnn.so.9"
"""Which of the stubs has the symbols without a version; the loader does not care."""

_NO_DEVICE = 100  # cudaErrorNoDevice


@dataclass
class Needs:
    """What torch's libraries want of others."""

    libraries: set[str] = field(default_factory=set)
    file_of_version: dict[str, str] = field(default_factory=dict)
    undefined: dict[tuple[str, str], bool] = field(default_factory=dict)
    """Symbol and version (or an empty text), and whether it is data, not a function."""
    defined: set[str] = field(default_factory=set)


def _output(*command: str | Path) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def read_dynamic(text: str, needs: Needs) -> None:
    """Take from ``objdump -p`` the libraries, and which of them has which symbol version."""
    library = ""
    for line in text.splitlines():
        if match := re.match(r"\s+NEEDED\s+(\S+)", line):
            if THEIRS.match(match[1]):
                needs.libraries.add(match[1])
        elif match := re.match(r"\s+required from (\S+):", line):
            library = match[1]
        elif (match := re.match(r"\s+0x\w+ 0x\w+ \d+ (\S+)", line)) and THEIRS.match(library):
            needs.file_of_version[match[1]] = library


def read_symbols(text: str, needs: Needs) -> None:
    """Take from ``readelf --dyn-syms`` what is wanted and what is there."""
    for line in text.splitlines():
        columns = line.split()
        if len(columns) < 8 or not columns[0].rstrip(":").isdigit():
            continue
        kind, section, symbol = columns[3], columns[6], columns[7]
        name, _, version = symbol.partition("@")
        if section == "UND":
            needs.undefined[name, version.lstrip("@")] = kind == "OBJECT"
        else:
            needs.defined.add(name)


def by_library(needs: Needs) -> dict[str, dict[str, dict[str, bool]]]:
    """For each library to make: version, then symbol, then whether it is data."""
    found: dict[str, dict[str, dict[str, bool]]] = {library: defaultdict(dict) for library in needs.libraries}
    for (name, version), is_data in needs.undefined.items():
        if version in needs.file_of_version:
            found.setdefault(needs.file_of_version[version], defaultdict(dict))[version][name] = is_data
        elif not version and name not in needs.defined and PREFIXES.match(name):
            found.setdefault(UNVERSIONED_GO_TO, defaultdict(dict))[""][name] = is_data
    return found


def source(library: str, versions: dict[str, dict[str, bool]]) -> tuple[str, str]:
    """The C file and the linker's version script of one stub."""
    lines = [f"long stub_{re.sub(r'[^A-Za-z0-9]', '_', library)};"]
    script = ""
    for version, symbols in versions.items():
        for name, is_data in symbols.items():
            # A registration that runs while torch is loaded must succeed.
            answer = 0 if name.startswith("__cuda") else _NO_DEVICE
            lines.append(f"char {name}[4096];" if is_data else f"int {name}(void) {{ return {answer}; }}")
        if version:
            script += f"{version} {{ global: {'; '.join(symbols)}; }};\n"
    return "\n".join(lines) + "\n", script


def make(torch_lib: Path, folder: Path) -> list[str]:
    """Write the stubs that the libraries in ``torch_lib`` need into ``folder``; return their names."""
    needs = Needs()
    for file in sorted(torch_lib.glob("lib*.so*")):
        read_dynamic(_output("objdump", "-p", file), needs)
        read_symbols(_output("readelf", "-W", "--dyn-syms", file), needs)
    folder.mkdir(parents=True, exist_ok=True)
    made = by_library(needs)
    with tempfile.TemporaryDirectory() as scratch:
        code, versions = Path(scratch, "stub.c"), Path(scratch, "stub.map")
        for library, symbols in made.items():
            text, script = source(library, symbols)
            code.write_text(text)
            versions.write_text(script)
            link = [f"-Wl,-soname,{library}", *([f"-Wl,--version-script={versions}"] if script else [])]
            _output("gcc", "-w", "-shared", "-fPIC", "-fno-builtin", *link, "-o", folder / library, code)
    return sorted(made)


if __name__ == "__main__":
    print("made", *make(Path(sys.argv[1]), Path(sys.argv[2])))
