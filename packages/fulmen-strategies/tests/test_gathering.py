"""How ranks of several hosts come together at a real store, and what gloo is told about interfaces."""

from __future__ import annotations

import socket
import threading
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
import torch
from torch.distributed import PrefixStore

from fulmen_protocols.errors import MisconfigurationException
from fulmen_protocols.topology import Topology
from fulmen_strategies import _gathering, _interfaces
from fulmen_strategies._gathering import Waiting, gather, open_store

if TYPE_CHECKING:
    from collections.abc import Callable

SOON = timedelta(seconds=60)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def place(rank: int, port: int, *, world_size: int = 2, num_nodes: int = 2) -> Topology:
    return Topology(
        (torch.device("cpu"),), rank=rank, node_rank=rank, world_size=world_size, num_nodes=num_nodes,
        main_address="127.0.0.1", main_port=port,
    )  # fmt: skip


def come(topology: Topology, patience: timedelta = SOON) -> None:
    with Waiting(topology) as waiting:
        store = PrefixStore("run", open_store(topology, patience))
        gather(store, topology, patience, waiting=waiting, is_new=True)
        kept.append(store)


kept: list[object] = []
"""Stores whose server must outlive the others' questions."""


def together(*topologies: Topology) -> list[BaseException | None]:
    """What each raises, the first coming first."""
    errors: list[BaseException | None] = [None] * len(topologies)

    def run(index: int, function: Callable[[], None]) -> None:
        try:
            function()
        except (RuntimeError, MisconfigurationException) as error:
            errors[index] = error

    threads = [
        threading.Thread(target=run, args=(i, lambda each=each: come(each, timedelta(seconds=6))), daemon=True)
        for i, each in enumerate(topologies)
    ]
    for thread in threads:
        thread.start()
        thread.join(1.5)  # the next one comes when this one has come, or failed
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return errors


def test_ranks_with_the_same_settings_come_together() -> None:
    port = free_port()
    assert together(place(0, port), place(1, port)) == [None, None]


@pytest.mark.parametrize(
    ("other", "said"),
    [({"world_size": 4}, "num_nodes=2 and devices=2"), ({"world_size": 3, "num_nodes": 3}, "num_nodes=3")],
)
def test_a_host_with_other_settings_is_refused_with_both(other: dict[str, int], said: str) -> None:
    port = free_port()
    _, second = together(place(0, port), place(1, port, **other))
    assert isinstance(second, MisconfigurationException)
    assert said in str(second)
    assert "num_nodes=2 and devices=1: start the same command on every host" in str(second)


def test_a_second_process_of_a_rank_is_refused() -> None:
    port = free_port()
    first = place(0, port)
    thread = threading.Thread(target=come, args=(first,), daemon=True)
    thread.start()
    store = PrefixStore("run", open_store(place(1, port), SOON))
    store.set("is/1", "hostb, process 7")  # what another process has written there
    with pytest.raises(MisconfigurationException, match=r"two processes are rank 1: hostb, process 7, and .*NODE_RANK"):
        come(place(1, port))
    store.delete_key("is/1")
    come(place(1, port))
    thread.join(60)
    assert not thread.is_alive()


def test_the_rank_that_has_not_come_is_named() -> None:
    port = free_port()
    errors = together(*[place(rank, port, world_size=3, num_nodes=3) for rank in (0, 1)])
    for error in errors:
        assert isinstance(error, RuntimeError)
        assert f"rank 2 has not come to 127.0.0.1:{port}" in "".join(error.__notes__)


def test_a_port_in_use_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            MisconfigurationException, match=f"port {port} of 127.0.0.1, which another process of .* uses"
        ):
            come(place(0, port))


def test_a_name_without_an_address_is_an_error_that_says_where_to_give_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gathering, "_NAME_S", 0.5)
    with pytest.raises(MisconfigurationException, match=r"'nowhere\.invalid', and no address is known for that name"):
        come(place(1, 29500)._replace(main_address="nowhere.invalid"))


def test_a_rank_that_waits_says_what_the_main_host_answers() -> None:
    port = free_port()
    waiting = Waiting(place(1, port))
    assert f"127.0.0.1:{port} refuses connections" in waiting.sentence()
    assert "rank 1 of 2 on" in waiting.sentence()


def test_the_loopback_is_no_way_to_other_hosts() -> None:
    assert _interfaces.interface_towards("127.0.0.1") is None


def test_an_interface_that_the_user_has_named_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    assert _interfaces.interface_for_gloo("10.0.0.1") is None
