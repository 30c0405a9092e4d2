"""A loop learns from a signal, a time limit or the scheduler that it should save and leave."""

from __future__ import annotations

import logging
import os
import signal
from datetime import timedelta

import pytest
import torch

from fulmen_fabric import Fabric
from fulmen_protocols import MisconfigurationRuntimeError


class Scheduler:
    """A cluster environment, as a vendor writes it, whose scheduler announces the end of a job."""

    creates_processes_externally = True
    main_address, main_port = "127.0.0.1", 29400
    auto_requeue = True
    requeue_signal = signal.SIGUSR1

    def __init__(self):
        self.queued = 0

    @classmethod
    def detect(cls):
        return True

    def world_size(self):
        return 1

    global_rank = local_rank = node_rank = lambda self: 0

    def validate_settings(self, num_devices, num_nodes):
        pass

    def requeue(self):
        self.queued += 1


@pytest.fixture
def scheduler():
    return Scheduler()


def loop(watch, send=None, at=3, steps=10):
    """How many steps a loop does; it gets the signal in the middle of step ``at``."""
    with watch:
        for step in range(1, steps + 1):
            if step == at and send is not None:
                os.kill(os.getpid(), send)
            torch.ones(2).sum()
            if watch.should_stop():
                return step
    return steps


def test_the_loop_leaves_after_the_step_in_which_the_signal_came():
    fabric = Fabric(accelerator="cpu", devices=1)
    before = signal.getsignal(signal.SIGTERM)
    watch = fabric.preemption_watch()
    assert loop(watch, signal.SIGTERM) == 3
    assert watch.reason == "received SIGTERM"
    assert not watch.is_preempted
    assert not watch.requeue()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_loop_that_nobody_stops_runs_to_its_end():
    watch = Fabric(accelerator="cpu", devices=1).preemption_watch()
    assert loop(watch) == 10
    assert watch.reason is None
    with pytest.raises(MisconfigurationRuntimeError, match="should_stop"):
        watch.requeue()


def test_signals_of_ones_own_and_a_time_limit_stop_too():
    fabric = Fabric(accelerator="cpu", devices=1)
    assert loop(fabric.preemption_watch(signals=[signal.SIGUSR2]), signal.SIGUSR2, at=5) == 5
    watch = fabric.preemption_watch(max_time=timedelta(0))
    assert loop(watch) == 1
    assert "time limit of 0:00:00" in watch.reason


def test_the_schedulers_signal_means_save_and_be_queued_again(scheduler):
    fabric = Fabric(accelerator="cpu", devices=1, plugins=scheduler)
    watch = fabric.preemption_watch()
    assert loop(watch, signal.SIGUSR1) == 3
    assert watch.is_preempted
    assert watch.requeue()
    assert watch.requeue()
    assert scheduler.queued == 1


def test_sigterm_beside_an_announcement_does_not_end_the_process(scheduler):
    fabric = Fabric(accelerator="cpu", devices=1, plugins=scheduler)
    assert loop(fabric.preemption_watch(), signal.SIGTERM) == 10
    assert scheduler.queued == 0


def test_an_announcement_that_the_program_handles_itself_is_left_to_it(scheduler, caplog):
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
    try:
        with caplog.at_level(logging.INFO):
            watch = Fabric(accelerator="cpu", devices=1, plugins=scheduler).preemption_watch()
        assert "SIGUSR1 announces the end of this job, but the program has a handler" in caplog.text
        assert loop(watch, signal.SIGUSR1) == 10
        assert heard == [1]
    finally:
        signal.signal(signal.SIGUSR1, before)
