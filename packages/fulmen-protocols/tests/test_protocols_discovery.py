"""Discovery, with real distributions written to disk and a fresh interpreter for each look."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import fulmen_protocols

if TYPE_CHECKING:
    from collections.abc import Mapping

SOURCES = str(Path(fulmen_protocols.__file__).parents[1])

GOOD_ACCELERATOR = """
class Good:
    def name(self): return "good"
    def is_available(self): return True
    def auto_device_count(self): return 1
    def parse_devices(self, devices): return [0]
    def get_parallel_devices(self, devices): return []
    def setup_device(self, device): pass
    def teardown(self): pass

class Absent(Good):
    def is_available(self): return False

class Incomplete:
    def name(self): return "incomplete"

class Raising(Good):
    def is_available(self): raise OSError("the driver is gone")
"""


class Site:
    """A folder of installed distributions, and nothing else on ``sys.path`` but the protocols."""

    def __init__(self, folder: Path) -> None:
        self.folders = [folder]
        folder.mkdir()
        self.install("fulmen-protocols", "9.9", {"fulmen.commands.v1": {"plugins": "fulmen_protocols.plugins:command"}})

    def further_down(self, folder: Path) -> None:
        """Install what follows into a folder at the end of ``sys.path``."""
        folder.mkdir()
        self.folders.append(folder)

    def install(
        self, name: str, version: str, groups: Mapping[str, Mapping[str, str]], modules: Mapping[str, str] | None = None
    ) -> None:
        info = self.folders[-1] / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        lines = []
        for group, points in groups.items():
            lines += [f"[{group}]", *(f"{key} = {value}" for key, value in points.items()), ""]
        (info / "entry_points.txt").write_text("\n".join(lines))
        for module, source in (modules or {}).items():
            (self.folders[-1] / f"{module}.py").write_text(source)

    def run(self, code: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([SOURCES, *map(str, self.folders)])
        return subprocess.run(
            [sys.executable, "-S", "-W", "error", "-c", code],
            env={"PYTHONPATH": path, "PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def says(self, code: str) -> str:
        done = self.run(code)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def fulmen(self, *argv: str) -> subprocess.CompletedProcess[str]:
        return self.run(f"import sys; from fulmen_protocols.cli import main; sys.exit(main({list(argv)!r}))")

    def error_of(self, call: str) -> str:
        return self.says(
            "from fulmen_protocols import *\n"
            f"try:\n    {call}\n"
            "except Exception as error:\n    print(type(error).__name__ + ': ' + str(error))\n"
        )


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "site")


def test_importing_the_protocols_imports_neither_torch_nor_the_reader_of_entry_points(site: Site) -> None:
    loaded = site.says(
        "import sys, fulmen_protocols; print([m for m in sys.modules if m.split('.')[0] in ('torch', 'importlib')])"
    )

    assert "torch" not in loaded
    assert "importlib.metadata" not in loaded


def test_importing_the_protocols_writes_nothing_to_the_environment(site: Site) -> None:
    assert site.says("import os; a = dict(os.environ); import fulmen_protocols; print(a == dict(os.environ))") == "True"


def test_names_are_listed_without_an_import(site: Site) -> None:
    points = {"fulmen.loggers.v1": {"zeta": "not_there:X", "alpha": "not_there:Y"}}
    site.install("acme", "1.0", points)

    assert site.says("from fulmen_protocols import *; print(available(LOGGERS))") == "['alpha', 'zeta']"


def test_a_backend_is_built_with_its_options_and_checked(site: Site) -> None:
    source = GOOD_ACCELERATOR + "\ndef make(count=1):\n    good = Good(); good.count = count; return good\n"
    site.install("acme", "1.0", {"fulmen.accelerators.v1": {"acme": "acme_a:make"}}, {"acme_a": source})

    assert site.says("from fulmen_protocols import *; print(load(ACCELERATORS, 'acme', count=7).count)") == "7"


def test_an_unknown_name_is_answered_with_the_closest_one_whatever_its_capitals(site: Site) -> None:
    site.install("acme", "1.0", {"fulmen.strategies.v1": {"FSDP": "x:X", "ddp": "x:Y"}})

    assert site.error_of("load(STRATEGIES, 'fdsp')") == (
        "BackendNotFound: no strategy is named 'fdsp'. Did you mean 'FSDP'? Installed: FSDP, ddp."
    )


def test_with_nothing_installed_the_message_says_what_to_install(site: Site) -> None:
    assert site.error_of("load(STRATEGIES, 'ddp')") == (
        "BackendNotFound: no strategy is named 'ddp'. Installed: none. Ours come with: pip install fulmen-strategies"
    )


def test_where_our_package_is_installed_the_message_does_not_tell_to_install_it(site: Site) -> None:
    site.install("fulmen-strategies", "1.0", {"fulmen.strategies.v1": {"ddp": "x:X"}})

    assert site.error_of("load(STRATEGIES, 'zzz')") == "BackendNotFound: no strategy is named 'zzz'. Installed: ddp."


@pytest.mark.parametrize(("theirs", "update"), [("v2", "fulmen-protocols"), ("v0", "acme-fulmen")])
def test_a_backend_for_another_version_of_the_seam_is_mentioned_and_not_used(
    site: Site, theirs: str, update: str
) -> None:
    site.install(
        "acme-fulmen", "3.1", {f"fulmen.strategies.{theirs}": {"acme": "x:X"}, "fulmen.strategies.vx": {"a": "b:c"}}
    )

    message = site.error_of("load(STRATEGIES, 'acme')")

    assert message == (
        "BackendNotFound: no strategy is named 'acme'. Installed: none. acme-fulmen 3.1 registers 'acme' in "
        f"'fulmen.strategies.{theirs}', but 'fulmen.strategies.v1' is read here: update {update}."
    )


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import nothing_of_that_name", "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("raise OSError('libacme.so is missing')", "OSError: libacme.so is missing"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("Other = 1", "AttributeError: module 'acme_s' has no attribute 'Acme'"),
        ("def (", "SyntaxError: invalid syntax"),
    ],
)
def test_a_broken_plugin_is_named_with_its_distribution(site: Site, source: str, said: str) -> None:
    site.install("acme-fulmen", "0.3.0", {"fulmen.strategies.v1": {"acme": "acme_s:Acme"}}, {"acme_s": source})

    message = site.error_of("load(STRATEGIES, 'acme')")

    assert message.startswith(
        "BrokenPlugin: strategy 'acme' of acme-fulmen 0.3.0 cannot be imported from 'acme_s:Acme': " + said
    )


def test_a_missing_package_error_of_ours_is_passed_on(site: Site) -> None:
    source = "from fulmen_protocols import MissingPackage\nraise MissingPackage('install it: pip install acme-sdk')"
    site.install("acme", "1", {"fulmen.loggers.v1": {"acme": "acme_l:L"}}, {"acme_l": source})

    assert site.error_of("load(LOGGERS, 'acme')") == "MissingPackage: install it: pip install acme-sdk"


def test_an_incomplete_backend_is_refused_with_what_it_lacks(site: Site) -> None:
    site.install("acme", "1", {"fulmen.accelerators.v1": {"acme": "acme_a:Incomplete"}}, {"acme_a": GOOD_ACCELERATOR})

    assert site.error_of("load(ACCELERATORS, 'acme')") == (
        "NotConforming: Incomplete does not satisfy Accelerator: it lacks auto_device_count, get_parallel_devices, "
        "is_available, parse_devices, setup_device, teardown."
    )


def test_a_class_in_the_place_of_a_backend_is_refused(site: Site) -> None:
    site.install("acme", "1", {}, {"acme_a": GOOD_ACCELERATOR})

    message = site.error_of("from acme_a import Good; check(ACCELERATORS, Good)")

    assert message.startswith("NotConforming: Good is a class")
    assert "Good()" in message


def test_what_cannot_be_called_is_refused(site: Site) -> None:
    site.install("acme", "1", {"fulmen.loggers.v1": {"acme": "acme_l:L"}}, {"acme_l": "L = 5"})

    assert "NotConforming: logger 'acme' is registered as 5, which cannot be called" in site.error_of(
        "load(LOGGERS, 'acme')"
    )


def test_a_property_that_raises_before_launch_counts_as_there(site: Site) -> None:
    code = """
from fulmen_protocols import *
class Early:
    @property
    def root_device(self): raise RuntimeError("not set up")
    setup_environment = module_context = place = prepare_optimizers = teardown = lambda self: None
print(missing_members(Strategy, Early()))
class Wrapper:
    def __getattr__(self, name): return getattr(Early, name)
print(missing_members(Strategy, Wrapper()))
"""
    assert site.says(code).splitlines() == ["[]", "[]"]


def test_the_first_distribution_on_the_path_wins_a_name(site: Site, tmp_path: Path) -> None:
    site.install("first", "1", {"fulmen.loggers.v1": {"acme": "first_l:f"}}, {"first_l": "def f(): return 'first'"})
    site.further_down(tmp_path / "later")
    site.install("second", "2", {"fulmen.loggers.v1": {"acme": "second_l:f"}}, {"second_l": "def f(): return 'second'"})

    assert site.says("from fulmen_protocols import *; print(load_factory(LOGGERS, 'acme')())") == "first"


def test_a_distribution_installed_while_the_process_runs_is_found(site: Site) -> None:
    info = site.folders[0] / "late-1.dist-info"
    code = f"""
from pathlib import Path
from fulmen_protocols import *
print(available(LOGGERS))
info = Path({str(info)!r}); info.mkdir()
(info / "METADATA").write_text("Name: late\\nVersion: 1\\n")
(info / "entry_points.txt").write_text("[fulmen.loggers.v1]\\nlate = builtins:dict\\n")
print(load_factory(LOGGERS, "late"))
"""
    assert site.says(code).splitlines() == ["[]", "<class 'dict'>"]


def test_plugins_lists_every_backend_and_why_one_cannot_be_used(site: Site, tmp_path: Path) -> None:
    site.install(
        "acme-fulmen",
        "0.3.0",
        {
            "fulmen.accelerators.v1": {
                "good": "acme_a:Good",
                "absent": "acme_a:Absent",
                "raising": "acme_a:Raising",
                "part": "acme_a:Incomplete",
            },
            "fulmen.strategies.v1": {"broken": "acme_b:X", "noisy": "acme_n:X", "number": "acme_n:five"},
            "fulmen.strategies.v2": {"newer": "acme_n:X"},
        },
        {
            "acme_a": GOOD_ACCELERATOR,
            "acme_b": "raise OSError('libacme.so is missing')",
            "acme_n": "print('hello from acme')\nfive = 5\ndef X(): raise AssertionError('was built')",
        },
    )  # fmt: skip
    site.further_down(tmp_path / "later")
    site.install("second", "2.0", {"fulmen.strategies.v1": {"noisy": "other:Y"}})

    done = site.fulmen("plugins", "--json")

    assert done.returncode == 0, done.stderr
    rows = {(row["name"], row["distribution"]): row for row in json.loads(done.stdout)}
    assert rows["good", "acme-fulmen"] == {
        "seam": "accelerator",
        "group": "fulmen.accelerators.v1",
        "name": "good",
        "distribution": "acme-fulmen",
        "version": "0.3.0",
        "object_path": "acme_a:Good",
        "usable": True,
        "reason": "",
    }
    reasons = {name: row["reason"] for (name, _), row in rows.items() if not row["usable"]}
    assert reasons["absent"] == "no such device on this machine"
    assert reasons["raising"] == "OSError: the driver is gone"
    assert "it lacks auto_device_count" in reasons["part"]
    assert reasons["broken"] == "it cannot be imported: OSError: libacme.so is missing"
    assert reasons["number"] == "it is 5, which cannot be called"
    assert reasons["newer"] == "it is made for fulmen.strategies.v2; this fulmen-protocols reads fulmen.strategies.v1"
    assert rows["noisy", "acme-fulmen"]["usable"]
    assert rows["noisy", "second"]["reason"] == "'noisy' is taken by acme-fulmen 0.3.0, which comes first on sys.path"


def test_plugins_as_text_has_one_line_for_each_backend(site: Site) -> None:
    site.install("acme", "1.0", {"fulmen.loggers.v1": {"a": "acme_l:L", "bb": "gone:L"}}, {"acme_l": "class L: pass"})

    lines = site.fulmen("plugins").stdout.splitlines()

    assert lines[0] == "logger"
    assert lines[1].split() == ["a", "acme", "1.0", "acme_l:L", "usable"]
    assert lines[2].split()[:6] == ["bb", "acme", "1.0", "gone:L", "not", "usable:"]
    assert "No module named 'gone'" in lines[2]
    assert len(lines) == 3


def test_plugins_with_nothing_installed_says_what_to_do(site: Site) -> None:
    assert site.fulmen("plugins").stdout == "No backend is installed. fulmen's own come with: pip install fulmen\n"


def test_an_option_that_plugins_does_not_have_is_status_2(site: Site) -> None:
    done = site.fulmen("plugins", "--jsn")

    assert done.returncode == 2
    assert "--jsn" in done.stderr


GREET = '''
def greet(argv):
    """Say hello to the arguments.

    More text.
    """
    print("hello", *argv)
    return 7
'''


@pytest.fixture
def commands(site: Site) -> Site:
    points = {"fulmen.commands.v1": {"greet": "acme_greet:greet", "gone": "acme_gone:run"}}
    site.install("acme", "1.0", points, {"acme_greet": GREET, "acme_gone": "import nothing_of_that_name"})
    return site


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]], ids=repr)
def test_help_lists_every_command_with_the_first_line_of_its_docstring(commands: Site, argv: list[str]) -> None:
    done = commands.fulmen(*argv)

    assert done.returncode == 0, done.stderr
    assert "  greet    Say hello to the arguments." in done.stdout.splitlines()
    assert "  plugins  List every installed backend, and why one cannot be used here." in done.stdout.splitlines()
    assert "(broken) command 'gone' of acme 1.0 cannot be imported" in done.stdout


def test_a_command_gets_its_arguments_and_gives_the_exit_status(commands: Site) -> None:
    done = commands.fulmen("greet", "--loud", "you")

    assert (done.returncode, done.stdout) == (7, "hello --loud you\n")


def test_an_unknown_command_is_answered_with_the_closest_one(commands: Site) -> None:
    done = commands.fulmen("gret")

    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(
        "fulmen: no command is named 'gret'. Did you mean 'greet'? Installed: gone, greet, plugins."
    )


def test_a_broken_command_is_an_error_only_when_it_is_asked_for(commands: Site) -> None:
    done = commands.fulmen("gone")

    assert done.returncode == 1
    assert "command 'gone' of acme 1.0 cannot be imported" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_option_is_no_command(commands: Site) -> None:
    done = commands.fulmen("--greet")

    assert done.returncode == 2
    assert "no option is named '--greet'" in done.stderr


def test_versions_of_the_installed_packages_are_printed(site: Site) -> None:
    site.install("fulmen-extra", "1.2", {})

    assert site.fulmen("--version").stdout.splitlines() == ["fulmen-extra 1.2", "fulmen-protocols 9.9"]


def test_an_interrupt_ends_with_the_status_of_a_shell(site: Site) -> None:
    source = 'def run(argv):\n    """Wait."""\n    raise KeyboardInterrupt\n'
    site.install("acme", "1", {"fulmen.commands.v1": {"wait": "acme_w:run"}}, {"acme_w": source})

    done = site.fulmen("wait")

    assert (done.returncode, done.stderr) == (130, "")


def test_a_reader_that_goes_away_is_no_error(site: Site) -> None:
    source = 'import os, sys\ndef run(argv):\n    """Talk."""\n    print("x" * 100000, flush=True)\n    return 0\n'
    site.install("acme", "1", {"fulmen.commands.v1": {"talk": "acme_t:run"}}, {"acme_t": source})
    reader, writer = os.pipe()
    os.close(reader)
    path = os.pathsep.join([SOURCES, *map(str, site.folders)])

    done = subprocess.run(
        [sys.executable, "-S", "-c", "import sys; from fulmen_protocols.cli import main; sys.exit(main(['talk']))"],
        env={"PYTHONPATH": path},
        stdout=writer,
        stderr=subprocess.PIPE,
        timeout=60,
        check=False,
    )
    os.close(writer)

    assert (done.returncode, done.stderr) == (141, b"")


def test_every_error_is_also_a_builtin_one() -> None:
    expected = {
        "MisconfigurationException": ValueError,
        "MisconfigurationTypeError": TypeError,
        "BackendNotFound": LookupError,
        "BackendUnavailable": RuntimeError,
        "BrokenPlugin": ImportError,
        "MissingPackage": ImportError,
        "NotConforming": TypeError,
        "CheckpointError": RuntimeError,
        "CheckpointNotFound": FileNotFoundError,
        "CheckpointCorrupt": ValueError,
        "RankFailure": RuntimeError,
    }
    for name, builtin in expected.items():
        error = getattr(fulmen_protocols, name)
        assert issubclass(error, fulmen_protocols.FulmenError)
        assert issubclass(error, builtin)
        assert str(error("one sentence")) == "one sentence"


def test_the_hooks_are_those_that_lightning_users_know() -> None:
    assert len(fulmen_protocols.HOOKS) == 37
    assert fulmen_protocols.HOOKS["on_train_batch_end"] == ("outputs", "batch", "batch_idx")
