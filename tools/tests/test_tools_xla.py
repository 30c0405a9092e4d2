"""The stubs of NVIDIA's libraries, from what binutils say; and what the environment for torch-xla is made of."""

from __future__ import annotations

from tools import xla
from tools.cuda_stubs import Needs, by_library, read_dynamic, read_symbols, source
from tools.workspace import requirement_name

DYNAMIC = """
Dynamic Section:
  NEEDED               libc10.so
  NEEDED               libcublas.so.12
Version References:
  required from libcublas.so.12:
    0x0a1b2c3d 0x00 07 libcublas.so.12
  required from libc.so.6:
    0x0d696914 0x00 05 GLIBC_2.4
"""
SYMBOLS = """
Symbol table '.dynsym' contains 4 entries:
   Num:    Value          Size Type    Bind   Vis      Ndx Name
     1: 0000000000000000     0 FUNC    GLOBAL DEFAULT  UND cublasCreate_v2@libcublas.so.12 (7)
     2: 0000000000000000     0 FUNC    GLOBAL DEFAULT  UND cudnnCreate
     3: 0000000000000000     0 OBJECT  GLOBAL DEFAULT  UND cudaTable@libcublas.so.12 (7)
     4: 0000000000000000     0 FUNC    GLOBAL DEFAULT  UND memcpy@GLIBC_2.14 (2)
     5: 0000000000001000     8 FUNC    GLOBAL DEFAULT   12 cudaOurs
     6: 0000000000000000     0 FUNC    GLOBAL DEFAULT  UND cudaOurs
"""


def needs() -> Needs:
    found = Needs()
    read_dynamic(DYNAMIC, found)
    read_symbols(SYMBOLS, found)
    return found


def test_only_nvidia_s_libraries_and_symbols_get_a_stub() -> None:
    made = by_library(needs())

    assert {library: {v: dict(names) for v, names in versions.items()} for library, versions in made.items()} == {
        "libcublas.so.12": {"libcublas.so.12": {"cublasCreate_v2": False, "cudaTable": True}},
        "libcudnn.so.9": {"": {"cudnnCreate": False}},
    }


def test_a_stub_defines_functions_that_fail_and_data_in_the_versions_asked_for() -> None:
    code, script = source("libcublas.so.12", {"libcublas.so.12": {"cublasCreate_v2": False, "cudaTable": True}})

    assert "int cublasCreate_v2(void) { return 100; }" in code
    assert "char cudaTable[4096];" in code
    assert script == "libcublas.so.12 { global: cublasCreate_v2; cudaTable; };\n"
    assert "return 0;" in source("x", {"": {"__cudaRegisterFunction": False}})[0]


def test_the_environment_has_one_torch_and_everything_else_that_is_tested() -> None:
    names = {requirement_name(one) for one in xla.requirements()}

    assert {"pytest", "fsspec", "tqdm", "numpy", "absl-py"} <= names
    assert not names & xla.OF_ANOTHER_TORCH
    assert [requirement_name(one) for one in xla.PAIR] == ["torch", "torch-xla"]
