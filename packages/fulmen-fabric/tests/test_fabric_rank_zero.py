"""What happens once per run."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings

import pytest

from fulmen_fabric import (
    LightningDeprecationWarning,
    PossibleUserWarning,
    WarningCache,
    disable_possible_user_warnings,
    rank_prefixed_message,
    rank_zero_debug,
    rank_zero_deprecation,
    rank_zero_info,
    rank_zero_only,
    rank_zero_warn,
)


@pytest.fixture(autouse=True)
def _as_a_fresh_process(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK", "POSSIBLE_USER_WARNINGS"):
        monkeypatch.delenv(name, raising=False)
    rank_zero_only.rank = None
    yield
    rank_zero_only.rank = None


@pytest.mark.proves("13.13")
def test_a_function_runs_on_rank_zero_only():
    @rank_zero_only
    def where(x):
        """Doc."""
        return x

    assert where(3) == 3
    assert where.__doc__ == "Doc."
    rank_zero_only.rank = 1
    assert where(3) is None


def test_other_ranks_get_the_default():
    rank_zero_only.rank = 2
    assert rank_zero_only(lambda: "here", default="elsewhere")() == "elsewhere"


@pytest.mark.proves("13.13")
@pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"])
def test_before_launch_the_launchers_variables_tell_the_rank(monkeypatch, variable):
    assert rank_zero_only.rank == 0
    monkeypatch.setenv(variable, "3")
    assert rank_zero_only.rank == 3


@pytest.mark.proves("13.13")
def test_the_global_rank_wins_over_the_local_one(monkeypatch):
    monkeypatch.setenv("RANK", "4")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert rank_zero_only.rank == 4


@pytest.mark.proves("13.13")
def test_log_lines_come_from_rank_zero(caplog):
    with caplog.at_level(logging.DEBUG, logger="fulmen"):
        rank_zero_info("one %s", "line")
        rank_zero_debug("two")
        rank_zero_only.rank = 1
        rank_zero_info("three")
        rank_zero_debug("four")
    assert caplog.messages == ["one line", "two"]


def test_without_logging_set_up_lines_go_to_standard_error_unless_silenced():
    code = (
        "import logging; from fulmen_fabric import rank_zero_info; rank_zero_info('seen %s', 1);"
        "logging.getLogger('fulmen').setLevel(logging.WARNING); rank_zero_info('hidden')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr == "seen 1\n"
    assert done.stdout == ""


def test_a_warning_blames_the_users_line():
    with pytest.warns(UserWarning, match="look") as caught:
        rank_zero_warn("look")
    assert caught[0].filename == __file__


@pytest.mark.proves("13.13")
def test_other_ranks_do_not_warn():
    rank_zero_only.rank = 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rank_zero_warn("nobody sees this")
        rank_zero_deprecation("nor this")


def test_deprecations_have_their_own_category():
    with pytest.warns(LightningDeprecationWarning, match="goes"):
        rank_zero_deprecation("goes")


def test_possible_user_warnings_can_be_turned_off(monkeypatch):
    with pytest.warns(PossibleUserWarning):
        rank_zero_warn("perhaps", PossibleUserWarning)
    monkeypatch.setenv("POSSIBLE_USER_WARNINGS", "off")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rank_zero_warn("perhaps", PossibleUserWarning)


def test_possible_user_warnings_can_be_turned_off_in_code():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        disable_possible_user_warnings()
        rank_zero_warn("perhaps", PossibleUserWarning)
        with pytest.raises(UserWarning):
            rank_zero_warn("certainly")


def test_a_cache_says_each_thing_once(caplog):
    cache = WarningCache()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for message in ("a", "a", "b"):
            cache.warn(message)
    assert [str(one.message) for one in caught] == ["a", "b"]
    assert "a" in cache
    with caplog.at_level(logging.INFO, logger="fulmen"):
        cache.info("c")
        cache.info("c")
    assert caplog.messages == ["c"]


def test_messages_name_the_rank():
    assert rank_prefixed_message("hello", 2) == "[rank: 2] hello"
    assert rank_prefixed_message("hello", None) == "hello"


def test_importing_changes_nothing():
    code = (
        "import os, signal, warnings, logging, random\n"
        "def look():\n"
        "    handlers = signal.getsignal(signal.SIGTERM), logging.root.handlers[:]\n"
        "    return dict(os.environ), random.getstate(), handlers\n"
        "before = look()\n"
        "import torch; filters = list(warnings.filters); seed = torch.initial_seed()\n"
        "import fulmen_fabric\n"
        "assert before == look()\n"
        "assert filters == list(warnings.filters) and seed == torch.initial_seed()\n"
        "import sys; loaded = [m for m in sys.modules if m.startswith('fulmen_')]\n"
        "assert {m.split('.')[0] for m in loaded} <= {'fulmen_fabric', 'fulmen_protocols', 'fulmen_data'}\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=dict(os.environ))
