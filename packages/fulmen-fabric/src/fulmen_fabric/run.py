"""``fulmen run SCRIPT``: one process for each device by torch's elastic agent, started again when one of them fails."""

from __future__ import annotations

import gc
import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Request", "command", "parse"]

_EXAMPLES = """
A Fabric takes what is given here, and its code must not say something else; a Trainer takes it where its code says
nothing.
What is not known here, and everything after `--`, goes to the script.

examples:
  fulmen run --devices 2 train.py --lr 0.1
  fulmen run --devices 4 --max-restarts 3 -m project.train
  fulmen run --devices 8 --num-nodes 2 --node-rank 0 --main-address 10.0.0.1 train.py
"""


@dataclass(frozen=True)
class Request:
    """The arguments of one ``fulmen run``."""

    script: list[str]
    """The script, or ``-m`` and the module."""
    script_args: list[str] = field(default_factory=list[str])
    accelerator: str | None = None
    strategy: str | None = None
    devices: str = "1"
    num_nodes: int = 1
    node_rank: int = 0
    main_address: str | None = None
    main_port: int | None = None
    precision: str | None = None
    max_restarts: int = 0
    min_devices: int | None = None

    def variables(self, devices: str) -> Mapping[str, str]:
        """What the script's Fabric or Trainer finds in its environment, for these ``devices`` of a node."""
        asked = {
            "ACCELERATOR": self.accelerator,
            "STRATEGY": self.strategy,
            "DEVICES": devices,
            "NUM_NODES": str(self.num_nodes),
            "PRECISION": self.precision,
        }
        given = {name: value for name, value in asked.items() if value is not None}
        return {
            "LT_CLI_USED": "1",
            **{f"LT_{name}": value for name, value in given.items()},
            # A Trainer reads literals, and two device ids would become a tuple: it wants a list of them.
            **{f"FULMEN_TRAINER_{name}": f"[{v}]" if "," in v else v for name, v in given.items()},
        }


def command(argv: Sequence[str]) -> int:
    """Run a script in one process for each device, and start it again when one of them fails.

    Returns:
        The script's exit status, 128 + signal if it was killed; 2 when the arguments are wrong.
    """
    # As with `python -m`, a module of the folder that one works in can be named.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        request = parse(argv)
        from fulmen_fabric._agent import plan, supervise  # imports torch; --help and typing errors need not wait

        processes = plan(request)
    except MisconfigurationException as error:
        print(f"fulmen run: {error}", file=sys.stderr)
        return 2
    except SystemExit as stop:  # argparse has printed help, or what is wrong
        return int(stop.code or 0)
    status = supervise(request, processes)
    gc.freeze()  # nothing is left to do, and looking for garbage would take most of the second until the shell goes on
    return status


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="fulmen run",
        usage="fulmen run [OPTION ...] SCRIPT [ARGUMENT ...]",
        description="Run a script in one process for each device, by torch's elastic agent.",
        epilog=_EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("script", nargs="?", metavar="SCRIPT", help="the Python file to run")
    add("-m", "--module", metavar="MODULE", help="run a module instead, as `python -m` does")
    add("--accelerator", help="cpu, cuda, gpu, mps, auto, or the name of an installed one")
    add("--strategy", help="ddp, fsdp, ... (see `fulmen plugins`)")
    add("--devices", "--nproc-per-node", "--nproc_per_node", default="1", help="of a node: a count, ids (0,1) or auto")
    add("--num-nodes", "--num_nodes", "--nnodes", default="1", help="number of machines; run this on each of them")
    add("--node-rank", "--node_rank", default="0", help="which of them this one is, from 0")
    add("--main-address", "--main_address", "--master-addr", "--master_addr", help="host of node 0 (127.0.0.1)")
    add("--main-port", "--main_port", "--master-port", "--master_port", help="port there (29400; one node: any free)")
    add("--precision", help="such as bf16-mixed")
    add("--max-restarts", "--max_restarts", default="0", help="how often all processes start again after a failure")
    add(
        "--min-devices",
        "--min_devices",
        help="start again without the device whose process failed, as long as so many are left (one node)",
    )
    return parser


def parse(argv: Sequence[str]) -> Request:
    """Read the command line.

    Raises:
        MisconfigurationException: no script, or a number that is none; all that is wrong is said at once.
    """
    words = list(argv)
    cut = words.index("--") if "--" in words else len(words)
    own, rest = words[:cut], words[cut + 1 :]
    given, unknown = _parser().parse_known_args(own)
    wrong: list[str] = []
    if given.module is not None:
        # The word taken for a script is the module's first argument.
        script, rest = ["-m", given.module], [*([given.script] if given.script else []), *unknown, *rest]
    else:
        found = given.script if given.script is not None else (rest.pop(0) if rest else None)
        script, rest = [found or ""], [*unknown, *rest]
        if found is None:
            wrong.append("no SCRIPT was named: write fulmen run train.py, or fulmen run -m package.module.")
        elif not os.path.isfile(found):
            why = f" {unknown[0]!r} is no option of fulmen run: options of the script come after it." if unknown else ""
            wrong.append(f"SCRIPT={found!r}: there is no such file in {os.getcwd()!r}.{why}")

    def number(flag: str, text: str | None, least: int, most: int = 2**31) -> int:
        if text is None:
            return least
        if text.isdigit() and least <= int(text) <= most:
            return int(text)
        upper = f" and at most {most}" if most < 2**31 else ""
        wrong.append(f"{flag}={text!r} is not a whole number of at least {least}{upper}.")
        return least

    num_nodes = number("--num-nodes", given.num_nodes, 1)
    node_rank = number("--node-rank", given.node_rank, 0)
    min_devices = None if given.min_devices is None else number("--min-devices", given.min_devices, 1)
    max_restarts = number("--max-restarts", given.max_restarts, 0)
    port = None if given.main_port is None else number("--main-port", given.main_port, 1, 2**16 - 1)
    if node_rank >= num_nodes:
        wrong.append(f"--node-rank={node_rank} must be below --num-nodes={num_nodes}: the first node is 0.")
    if num_nodes > 1 and given.main_address is None:
        wrong.append(f"--num-nodes={num_nodes} needs --main-address: the host of node 0, the same on every node.")
    if min_devices is not None and max_restarts == 0:
        wrong.append(f"--min-devices={min_devices} says how to start again, and --max-restarts=0 never does: raise it.")
    if min_devices is not None and num_nodes > 1:
        wrong.append(
            f"--min-devices={min_devices} works on one node, and --num-nodes={num_nodes}: all nodes must have as many "
            "processes. Leave it out; a failed process is started again where it was."
        )
    if wrong:
        raise MisconfigurationException(_listed(wrong))
    return Request(
        script=script,
        script_args=rest,
        accelerator=given.accelerator,
        strategy=given.strategy,
        devices=given.devices,
        num_nodes=num_nodes,
        node_rank=node_rank,
        main_address=given.main_address,
        main_port=port,
        precision=given.precision,
        max_restarts=max_restarts,
        min_devices=min_devices,
    )


def _listed(wrong: Sequence[str]) -> str:
    return wrong[0] if len(wrong) == 1 else "\n".join(f"{i}. {each}" for i, each in enumerate(wrong, 1))
