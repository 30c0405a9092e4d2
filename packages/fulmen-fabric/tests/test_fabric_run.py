"""``fulmen run``: what its command line means and what it refuses. Real runs are in the integration tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from fulmen_fabric.run import Request, command, parse
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").touch()
    return "train.py"


@pytest.mark.proves("8.21")
def test_options_are_known_before_and_after_the_script_and_others_are_the_scripts(script: str) -> None:
    asked = parse(
        ["--devices=2", script, "--lr", "0.1", "--num_nodes", "2", "--main-address", "a", "x", "--", "--devices=3"]
    )
    assert (asked.script, asked.devices, asked.num_nodes) == ([script], "2", 2)
    assert asked.script_args == ["--lr", "0.1", "x", "--devices=3"]
    assert parse([script]).variables("1") == {
        "LT_CLI_USED": "1", "LT_DEVICES": "1", "LT_NUM_NODES": "1",
        "FULMEN_TRAINER_DEVICES": "1", "FULMEN_TRAINER_NUM_NODES": "1",
    }  # fmt: skip


@pytest.mark.proves("8.21")
def test_every_option_of_lightnings_command_is_known_with_its_default(script: str) -> None:
    words = [
        "--accelerator=cuda", "--strategy=fsdp", "--devices=0,1", "--num-nodes=2", "--node-rank=1",
        "--main-address=10.0.0.1", "--main-port=29500", "--precision=bf16-mixed",
    ]  # fmt: skip

    asked, plain = parse([script, *words]), parse([script])

    assert asked == Request(
        [script], [], accelerator="cuda", strategy="fsdp", devices="0,1", num_nodes=2, node_rank=1,
        main_address="10.0.0.1", main_port=29500, precision="bf16-mixed",
    )  # fmt: skip
    assert plain == Request([script])
    assert (plain.devices, plain.num_nodes, plain.node_rank) == ("1", 1, 0)
    underscores = [word.replace("-", "_").replace("__", "--", 1) for word in words]
    assert parse([script, *underscores[3:7]]) == parse([script, *words[3:7]])
    assert asked.variables("0,1") == {
        "LT_CLI_USED": "1", "LT_ACCELERATOR": "cuda", "LT_STRATEGY": "fsdp", "LT_DEVICES": "0,1", "LT_NUM_NODES": "2",
        "LT_PRECISION": "bf16-mixed", "FULMEN_TRAINER_ACCELERATOR": "cuda", "FULMEN_TRAINER_STRATEGY": "fsdp",
        "FULMEN_TRAINER_DEVICES": "[0,1]", "FULMEN_TRAINER_NUM_NODES": "2", "FULMEN_TRAINER_PRECISION": "bf16-mixed",
    }  # fmt: skip


def test_a_module_takes_the_first_word_as_its_own(script: str) -> None:
    asked = parse(["--devices", "2", "-m", "project.train", "fit", "--lr", "1"])
    assert (asked.script, asked.script_args) == (["-m", "project.train"], ["fit", "--lr", "1"])


def test_the_names_of_torchrun_are_understood(script: str) -> None:
    words = ["--nnodes=2", "--nproc_per_node=4", "--node-rank=1", "--master-addr=b", "--master_port=29501", script]
    asked = parse(words)
    assert (asked.num_nodes, asked.devices, asked.node_rank) == (2, "4", 1)
    assert (asked.main_address, asked.main_port) == ("b", 29501)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no SCRIPT was named: write fulmen run train.py"),
        (["nowhere.py"], "SCRIPT='nowhere.py': there is no such file in"),
        (["--lr", "0.1", "train.py"], "SCRIPT='0.1': there is no such file.*'--lr' is no option of fulmen run"),
        (["train.py", "--num-nodes=two"], "--num-nodes='two' is not a whole number of at least 1"),
        (["train.py", "--main-port=70000"], "--main-port='70000' is not a .* of at least 1 and at most 65535"),
        (["train.py", "--max-restarts=-1"], "--max-restarts='-1' is not a whole number of at least 0"),
        (["train.py", "--num-nodes=2", "--main-address=a", "--node-rank=2"], "--node-rank=2 must be below --num-"),
        (["train.py", "--num-nodes=2"], "--num-nodes=2 needs --main-address: the host of node 0"),
        (["train.py", "--min-devices=1"], "--min-devices=1 says how to start again, and --max-restarts=0 never does"),
        (
            ["train.py", "--num-nodes=2", "--main-address=a", "--max-restarts=1", "--min-devices=1"],
            "--min-devices=1 works on one node, and --num-nodes=2",
        ),
        (["train.py", "--num-nodes=0", "--max-restarts=x"], "(?s)1. --num-nodes='0'.*2. --max-restarts='x'"),
    ],
)  # fmt: skip
def test_a_wrong_command_line_says_what_to_do(words: list[str], said: str, script: str) -> None:
    with pytest.raises(MisconfigurationException, match=said):
        parse(words)


def test_help_and_an_argument_without_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["--help"]) == 0
    assert "--max-restarts" in capsys.readouterr().out
    assert command(["--devices"]) == 2
