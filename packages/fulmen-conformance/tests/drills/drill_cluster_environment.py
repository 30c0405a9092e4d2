"""A minimal correct cluster environment, and broken ones that ClusterEnvironmentConformance must catch."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, ClassVar

import pytest

from fulmen_conformance import ClusterEnvironmentConformance, Place

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from fulmen_protocols import ClusterEnvironment


class Good:
    """Variables of a made-up scheduler."""

    creates_processes_externally = True

    @property
    def main_address(self) -> str:
        return os.environ["ACME_HOST"]

    @property
    def main_port(self) -> int:
        return int(os.environ["ACME_PORT"])

    @staticmethod
    def detect() -> bool:
        return "ACME_JOB" in os.environ

    def world_size(self) -> int:
        return int(os.environ["ACME_SIZE"])

    def global_rank(self) -> int:
        return int(os.environ["ACME_RANK"])

    def local_rank(self) -> int:
        return self.global_rank() % 4

    def node_rank(self) -> int:
        return self.global_rank() // 4

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        if num_devices * num_nodes != self.world_size():
            raise ValueError(
                f"devices={num_devices} on num_nodes={num_nodes}, but ACME started {self.world_size()} processes"
            )


class TestGood(ClusterEnvironmentConformance):
    caught_by: ClassVar[set[str]] = set()
    backend: ClassVar[type[Good]] = Good

    @pytest.fixture
    def make_environment(self) -> Callable[[], ClusterEnvironment]:
        return self.backend

    @pytest.fixture
    def environment_variables(self) -> Mapping[str, str]:
        return {"ACME_JOB": "1", "ACME_HOST": "node7", "ACME_PORT": "1234", "ACME_SIZE": "8", "ACME_RANK": "6"}

    @pytest.fixture
    def expected(self) -> Place:
        return Place(
            world_size=8,
            global_rank=6,
            local_rank=2,
            node_rank=1,
            main_address="node7",
            main_port=1234,
            num_nodes=2,
            num_devices=4,
        )


def broken(backend: type[Good], *tests: str) -> type[ClusterEnvironmentConformance]:
    """The drill with another backend, which exactly ``tests`` must catch."""
    return type(f"Test{backend.__name__}", (TestGood,), {"backend": backend, "caught_by": set(tests)})


class AlwaysDetected(Good):
    @staticmethod
    def detect() -> bool:
        return True


class NeverDetected(Good):
    @staticmethod
    def detect() -> bool:
        return False


class SwappedRanks(Good):
    def local_rank(self) -> int:
        return self.global_rank()


class TextRank(Good):
    def global_rank(self) -> int:
        return os.environ["ACME_RANK"]

    def local_rank(self) -> int:
        return 2

    def node_rank(self) -> int:
        return 1


class NewPortEachTime(Good):
    ports = iter(range(2000, 9000))

    @property
    def main_port(self) -> int:
        return next(self.ports)


class Writes(Good):
    def world_size(self) -> int:
        os.environ["WORLD_SIZE"] = "8"
        os.environ["ACME_WROTE"] = str(len(os.environ))
        return 8


class AcceptsAnything(Good):
    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        pass


class SaysLittle(Good):
    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        if num_devices * num_nodes != self.world_size():
            raise ValueError("wrong number of devices")


class RefusesRight(Good):
    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        if num_devices != self.world_size():
            raise ValueError(f"devices={num_devices}, but ACME started {self.world_size()}")


class QueuesAgain(Good):
    auto_requeue = True
    requeue_signal: object = signal.SIGUSR1

    def requeue(self) -> None:
        raise RuntimeError("ACME is not installed here")


class TestQueuesAgain(TestGood):
    backend = QueuesAgain


class CannotBeAsked(Good):
    auto_requeue = True
    requeue_signal = signal.SIGUSR1


class AnnouncesByNumber(QueuesAgain):
    requeue_signal = 10


class AnnouncesByKilling(QueuesAgain):
    requeue_signal = signal.SIGKILL


TestCannotBeAsked = broken(CannotBeAsked, "test_each_ability_is_whole_or_absent")
TestAnnouncesByNumber = broken(AnnouncesByNumber, "test_what_announces_the_end_of_a_job_can_be_caught")
TestAnnouncesByKilling = broken(AnnouncesByKilling, "test_what_announces_the_end_of_a_job_can_be_caught")
TestAlwaysDetected = broken(AlwaysDetected, "test_it_is_not_detected_elsewhere")
TestNeverDetected = broken(NeverDetected, "test_it_is_detected_where_its_scheduler_runs")
TestSwappedRanks = broken(SwappedRanks, "test_it_reads_this_process_s_place")
TestTextRank = broken(TextRank, "test_it_reads_this_process_s_place")
TestNewPortEachTime = broken(
    NewPortEachTime, "test_it_knows_where_the_processes_meet", "test_the_meeting_point_stays_the_same"
)
TestWrites = broken(Writes, "test_reading_writes_nothing_to_the_environment")
TestAcceptsAnything = broken(AcceptsAnything, "test_settings_that_contradict_are_refused_with_both_values")
TestSaysLittle = broken(SaysLittle, "test_settings_that_contradict_are_refused_with_both_values")
TestRefusesRight = broken(
    RefusesRight, "test_settings_that_fit_are_accepted", "test_reading_writes_nothing_to_the_environment"
)
