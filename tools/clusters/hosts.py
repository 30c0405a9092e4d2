"""Hosts on one machine: network namespaces with addresses, a loopback and a name of their own. Needs root and iproute2.

Each host has one interface in a network of its own, and a router joins these networks, as between racks. So packets
can be lost silently without the kernel's traffic control: the router stops to forward.

    with Hosts(2) as (main, other):
        process = main.start([sys.executable, "train.py"])
        other.cut_power()
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

_numbers = itertools.count()


def why_not() -> str:
    """Why hosts cannot be made here; "" where they can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return "network namespaces need ip (iproute2) and unshare (util-linux)"
    name = f"fulmen-probe-{os.getpid()}"
    made = _ip("netns", "add", name, check=False)
    if made.returncode != 0:
        return f"this machine makes no network namespace: {made.stderr.strip()}"
    with contextlib.suppress(subprocess.CalledProcessError):
        _ip("netns", "del", name)
    return ""


def _ip(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], check=check, capture_output=True, text=True)


def _remove_leftovers() -> None:
    """Of processes that were killed before they could remove their hosts."""
    for line in _ip("netns", "list").stdout.splitlines():
        name = line.split()[0]
        found = re.fullmatch(r"fulmen-(\d+)-\d+-\w", name)
        if found and not Path(f"/proc/{found[1]}").exists():
            for pid in map(int, _ip("netns", "pids", name, check=False).stdout.split()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            _ip("netns", "del", name, check=False)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)


class Host:
    """One of ``Hosts``.

    Attributes:
        name: what its processes find as their host's name.
        address: in its network.
        namespace: the name of its network namespace.
        interface: beside the loopback, its only one.
    """

    def __init__(self, name: str, address: str, namespace: str, interface: str) -> None:
        self.name, self.address, self.namespace, self.interface = name, address, namespace, interface

    def start(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        stdout: int | IO[str] | None = subprocess.PIPE,
        own_folders: Sequence[str] = (),
    ) -> subprocess.Popen[str]:
        """Start a process on this host; what it prints, errors too, goes to ``stdout``.

        Args:
            command: the program and its arguments.
            env: its environment; None: that of this process.
            cwd: where it works.
            stdout: as of ``subprocess.Popen``.
            own_folders: folders that exist here, in the place of which it finds its host's own, empty at its start.
        """
        shell = f"hostname {self.name}; " + "".join(f"mount -t tmpfs none '{each}'; " for each in own_folders)
        # `ip netns exec` shows it /etc/netns/NAMESPACE/hosts as /etc/hosts.
        words = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "--mount", "sh", "-c", shell + 'exec "$@"']
        return subprocess.Popen(
            [*words, "sh", *command], env=env, cwd=cwd, stdout=stdout, stderr=subprocess.STDOUT, text=True
        )

    def pids(self) -> list[int]:
        """Of all processes on this host."""
        return [int(word) for word in _ip("netns", "pids", self.namespace, check=False).stdout.split()]

    def kill_all(self) -> None:
        """SIGKILL for every process on this host at once; its kernel lives and closes their connections."""
        pids = self.pids()
        for signum in (signal.SIGSTOP, signal.SIGKILL):  # none of them may see another end
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signum)

    def cut_power(self) -> None:
        """End every process on this host without a word to the others."""
        self.link("down")
        self.kill_all()

    def link(self, state: str) -> None:
        """Take this host's interface ``"down"`` or ``"up"`` again; its own sends fail, others hear nothing of it."""
        _ip("-n", self.namespace, "link", "set", self.interface, state)
        if state == "up":
            self._find_the_way()

    def _find_the_way(self) -> None:
        _ip("-n", self.namespace, "route", "replace", "default", "via", self.address.rpartition(".")[0] + ".1")

    def names(self, lines: Sequence[str]) -> None:
        """What /etc/hosts says here."""
        folder = Path("/etc/netns") / self.namespace
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "hosts").write_text("".join(f"{line}\n" for line in lines))


class Hosts:
    """So many hosts for the time of a ``with``; what still runs on them at its end is killed.

    By default each host's name is known to all, with its address.
    """

    def __init__(self, number: int) -> None:
        mark = f"{os.getpid()}-{next(_numbers)}"
        self._router = f"fulmen-{mark}-r"
        net = 64 + os.getpid() % 128
        self.hosts = [
            Host(f"host{'abcdefgh'[i]}", f"10.{net}.{i}.2", f"fulmen-{mark}-{'abcdefgh'[i]}", "eth0")
            for i in range(number)
        ]

    def __enter__(self) -> Hosts:
        _remove_leftovers()
        _ip("netns", "add", self._router)
        self.pass_packets(True)
        for i, host in enumerate(self.hosts):
            _ip("netns", "add", host.namespace)
            _ip("-n", host.namespace, "link", "set", "lo", "up")
            port = f"port{i}"
            _ip("-n", self._router, "link", "add", port, "type", "veth", "peer", "name", host.interface,
                "netns", host.namespace)  # fmt: skip
            network = host.address.rpartition(".")[0]
            _ip("-n", self._router, "addr", "add", f"{network}.1/24", "dev", port)
            _ip("-n", self._router, "link", "set", port, "up")
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", host.interface)
            host.link("up")
            host.names(["127.0.0.1 localhost", *(f"{each.address} {each.name}" for each in self.hosts)])
        return self

    def __iter__(self) -> Iterator[Host]:
        return iter(self.hosts)

    def __getitem__(self, index: int) -> Host:
        return self.hosts[index]

    def __exit__(self, *_: object) -> None:
        for host in self.hosts:
            for _ in range(50):
                if not host.pids():
                    break
                host.kill_all()
                time.sleep(0.1)
            _ip("netns", "del", host.namespace, check=False)
            shutil.rmtree(Path("/etc/netns") / host.namespace, ignore_errors=True)
        _ip("netns", "del", self._router, check=False)

    def pass_packets(self, whether: bool) -> None:
        """Whether the router forwards; where it does not, packets between hosts are lost and nobody is told."""
        command = ["sysctl", "-q", "-w", f"net.ipv4.ip_forward={int(whether)}"]
        _ip("netns", "exec", self._router, *command)

    def running(self) -> dict[str, list[int]]:
        """The processes that each host has, where there are any."""
        return {host.name: pids for host in self.hosts if (pids := host.pids())}
