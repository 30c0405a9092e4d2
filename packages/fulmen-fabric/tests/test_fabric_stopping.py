"""Stop signals in this process, and the agreement of several real processes through a real TCPStore."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from fulmen_fabric import StopAgreement, StopSignal
from fulmen_protocols import RankFailure


def test_a_signal_becomes_a_reason_and_nothing_is_raised():
    with StopSignal() as stop:
        assert stop.poll() is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.poll() == "received SIGTERM"


def test_the_users_handler_is_called_too_and_comes_back():
    calls = []
    before = signal.signal(signal.SIGUSR1, lambda *_: calls.append(1))
    try:
        mine = signal.getsignal(signal.SIGUSR1)
        with StopSignal([signal.SIGUSR1]) as stop:
            signal.raise_signal(signal.SIGUSR1)
            assert calls == [1]
            assert stop.reason == "received SIGUSR1"
        assert signal.getsignal(signal.SIGUSR1) is mine
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_handler_set_meanwhile_is_not_overwritten():
    before = signal.getsignal(signal.SIGUSR1)
    stop = StopSignal([signal.SIGUSR1])
    stop.install()
    try:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        stop.restore()
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_bypassed_signal_neither_stops_nor_ends_the_process():
    with StopSignal([signal.SIGUSR1], bypassed=[signal.SIGUSR2]) as stop:
        os.kill(os.getpid(), signal.SIGUSR2)
        assert stop.poll() is None
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.poll() == "received SIGUSR1"
    assert signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL


def test_ctrl_c_interrupts_as_always():
    before = signal.getsignal(signal.SIGINT)
    with StopSignal():
        assert signal.getsignal(signal.SIGINT) is before


def test_outside_the_main_thread_only_the_clock_is_watched():
    found = []

    def work():
        stop = StopSignal(max_time=timedelta(0))
        found.extend([stop.install(), stop.poll()])
        stop.restore()

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False, "the time limit of 0:00:00 has passed"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_clock_starts_at_install_and_the_first_reason_stays():
    stop = StopSignal(max_time=timedelta(0))
    assert stop.poll() is None
    with stop:
        stop.reason = "asked by a callback"
        assert stop.poll() == "asked by a callback"


def test_one_process_stops_at_once():
    agreement = StopAgreement(None, 0, 1, name="alone")
    assert not agreement.point(None)
    assert agreement.point("enough")
    assert agreement.reason == "enough"


def test_several_processes_need_a_store():
    with pytest.raises(ValueError, match="without a store"):
        StopAgreement(None, 0, 2, name="x")


def _run_rank(rank, world_size, port, wishes, out):
    store = dist.TCPStore("127.0.0.1", port, world_size, is_master=rank == 0, wait_for_workers=False)
    stops = []
    for run, (who, when, paces) in enumerate(wishes):
        agreement = StopAgreement(store, rank, world_size, name=f"run{run}")
        for point in itertools.count(1):  # a fast rank goes on for as long as it takes the slow one to ask
            time.sleep(paces[rank])
            if agreement.point("tired" if rank in who and point >= when else None):
                break
        stops.append((point, agreement.reason))
    out.put((rank, stops))
    # the master's store must outlive the others
    store.add("done", 1)
    while rank == 0 and store.add("done", 0) < world_size:
        time.sleep(0.01)


def test_all_ranks_stop_at_the_same_point_however_far_apart_they_are():
    world_size = 3
    slow, fast = 0.004, 0.0
    wishes = [
        ([0], 5, [slow] + [fast] * 2),  # the one who asks is behind: the others are far ahead
        ([1], 5, [slow] + [fast] * 2),  # the one who asks is ahead
        ([0, 1], 7, [fast] * 3),  # several ask at about the same time
        ([0, 1], 3, [fast, slow, fast]),
    ]
    context = mp.get_context("spawn")
    out = context.Queue()
    port = _free_port()
    ranks = [
        context.Process(target=_run_rank, args=(rank, world_size, port, wishes, out)) for rank in range(world_size)
    ]
    for one in ranks:
        one.start()
    results = dict(out.get(timeout=120) for _ in ranks)
    for one in ranks:
        one.join(60)
        assert one.exitcode == 0
    for run, (who, when, _) in enumerate(wishes):
        stopped = {results[rank][run] for rank in range(world_size)}
        assert len(stopped) == 1, f"run {run}: {results}"
        point, reason = stopped.pop()
        assert when < point
        assert reason in {f"rank {rank}: tired" for rank in who}


def test_a_rank_that_dies_while_proposing_is_noticed():
    store = dist.HashStore()
    dist.PrefixStore("x", store).set("wish", "1")
    agreement = StopAgreement(store, 0, 2, name="x", timeout=timedelta(seconds=0.1))
    with pytest.raises(RankFailure, match="proposed no point"):
        agreement.point(None)


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
