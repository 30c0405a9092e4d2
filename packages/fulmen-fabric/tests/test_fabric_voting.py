"""A vote of real processes through a real TCPStore, and how it is when one does not come."""

from __future__ import annotations

import random
import socket
import time
from datetime import timedelta

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from fulmen_fabric.voting import HostVote, group_store, new_name
from fulmen_protocols import RankFailure

QUESTIONS = 60


def _says_yes(rank, question):
    return random.Random(f"{rank} {question}").random() < 0.25


def _run_rank(rank, world_size, port, out):
    store = dist.TCPStore("127.0.0.1", port, world_size, is_master=rank == 0, wait_for_workers=False)
    paces = random.Random(rank)
    answers = []
    for run in range(2):
        vote = HostVote(store, world_size, name=f"run{run}", timeout=timedelta(seconds=60))
        for question in range(QUESTIONS):
            time.sleep(paces.choice((0.0, 0.0, 0.003)))
            answers.append(vote.any(_says_yes(rank, question + run)))
    store.add("done", 1)
    while rank == 0 and store.add("done", 0) < world_size:  # the master's store must outlive the others
        time.sleep(0.01)
    out.put((rank, answers, store.num_keys() if rank == 0 else 0))


@pytest.mark.processes
def test_every_rank_learns_whether_one_said_yes_and_the_store_does_not_grow():
    world_size = 3
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    out = context.Queue()
    ranks = [context.Process(target=_run_rank, args=(rank, world_size, port, out)) for rank in range(world_size)]
    for one in ranks:
        one.start()
    results = {rank: (answers, keys) for rank, answers, keys in (out.get(timeout=120) for _ in ranks)}
    for one in ranks:
        one.join(60)
        assert one.exitcode == 0
    expected = [
        any(_says_yes(rank, question + run) for rank in range(world_size))
        for run in range(2)
        for question in range(QUESTIONS)
    ]
    assert {True, False} == set(expected)
    for answers, keys in results.values():
        assert answers == expected
        assert keys < 10  # the last answer of each run, "done", and the store's own


def test_a_rank_that_does_not_come_is_noticed():
    vote = HostVote(dist.HashStore(), 2, name="x", timeout=timedelta(seconds=0.2))
    with pytest.raises(RankFailure, match=r"not all of 2 ranks came to a point that all must come to within 0:00:00.2"):
        vote.any(True)


def test_without_a_group_there_is_no_store_and_names_are_new():
    assert group_store() is None
    assert len({new_name("x") for _ in range(3)}) == 3
