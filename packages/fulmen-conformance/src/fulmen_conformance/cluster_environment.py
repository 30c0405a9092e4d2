"""The kit for cluster environments."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, NamedTuple, cast

import pytest

from fulmen_conformance._kit import Kit, need, whole_or_absent
from fulmen_protocols import ClusterEnvironment, SupportsRequeue, missing_members

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["ClusterEnvironmentConformance", "Place"]


class Place(NamedTuple):
    """What a process must read from its environment, by the scheduler's own documentation."""

    world_size: int = 1
    global_rank: int = 0
    local_rank: int = 0
    node_rank: int = 0
    creates_processes_externally: bool = True
    main_address: str | None = None
    """None: any."""
    main_port: int | None = None
    """None: any free port, the same on every read."""
    num_nodes: int = 1
    num_devices: int = 1
    """Processes of each node."""


class ClusterEnvironmentConformance(Kit):
    """Proves a ``ClusterEnvironment``.

    Give the fixtures ``make_environment``, ``environment_variables`` (what the scheduler sets in one process,
    preferably not of rank 0) and ``expected``. Subclass once more for each further place worth proving.
    """

    @pytest.fixture
    def make_environment(self) -> Callable[[], ClusterEnvironment]:
        """A class or function of no arguments that returns the environment under test."""
        raise NotImplementedError("define a fixture `make_environment` that returns the class under test")

    @pytest.fixture
    def environment_variables(self) -> Mapping[str, str]:
        """The variables that the scheduler sets in this process; the kit sets them, and removes them elsewhere."""
        raise NotImplementedError("define a fixture `environment_variables`: what the scheduler sets in a process")

    @pytest.fixture
    def expected(self) -> Place:
        """What the environment must read from ``environment_variables``."""
        raise NotImplementedError("define a fixture `expected` that returns a fulmen_conformance.Place")

    @pytest.fixture
    def is_fallback(self) -> bool:
        """Whether this environment also serves where no scheduler is: then ``detect()`` may be true anywhere."""
        return False

    @pytest.fixture
    def kit_environment(
        self,
        make_environment: Callable[[], ClusterEnvironment],
        environment_variables: Mapping[str, str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> ClusterEnvironment:
        """The environment, made where the scheduler has set its variables. Not to be replaced."""
        for name, value in environment_variables.items():
            monkeypatch.setenv(name, value)
        return make_environment()

    def test_it_has_every_member_of_the_protocol(self, kit_environment: ClusterEnvironment) -> None:
        """``ClusterEnvironment`` has no optional member. On failure look at the names listed as missing."""
        assert missing_members(ClusterEnvironment, kit_environment) == []

    def test_each_ability_is_whole_or_absent(self, kit_environment: ClusterEnvironment) -> None:
        """Half an ability is never used. On failure add the members listed, or remove their siblings."""
        assert whole_or_absent(kit_environment, (SupportsRequeue,)) == []

    def test_what_announces_the_end_of_a_job_can_be_caught(self, kit_environment: ClusterEnvironment) -> None:
        """A fit installs a handler for it. On failure look at ``requeue_signal``: a member of ``signal.Signals``.

        Whether ``requeue`` reaches the scheduler is yours to test: the kit queues no job.
        """
        need(kit_environment, SupportsRequeue)
        requeued = cast("SupportsRequeue", kit_environment)
        number = requeued.requeue_signal

        assert type(requeued.auto_requeue) is bool
        if number is not None:
            assert isinstance(number, signal.Signals)
            assert number.name not in ("SIGKILL", "SIGSTOP", "SIGINT"), "no process can catch it, or Ctrl+C sends it"

    def test_it_is_detected_where_its_scheduler_runs(self, kit_environment: ClusterEnvironment) -> None:
        """``"auto"`` asks. On failure look at which variables ``detect()`` requires."""
        assert kit_environment.detect() is True

    def test_it_is_not_detected_elsewhere(
        self,
        make_environment: Callable[[], ClusterEnvironment],
        environment_variables: Mapping[str, str],
        is_fallback: bool,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """On failure look at variables that others set too: ``detect()`` asks for what only this scheduler sets."""
        if is_fallback:
            pytest.skip("is_fallback: it serves where no scheduler is found")
        for name, value in environment_variables.items():
            monkeypatch.setenv(name, value)
        environment = make_environment()
        for name in environment_variables:
            monkeypatch.delenv(name)

        assert environment.detect() is False

    def test_it_reads_this_process_s_place(self, kit_environment: ClusterEnvironment, expected: Place) -> None:
        """On failure look at which variable each method reads: global, local and node rank are easily swapped."""
        got = {
            "world_size": kit_environment.world_size(),
            "global_rank": kit_environment.global_rank(),
            "local_rank": kit_environment.local_rank(),
            "node_rank": kit_environment.node_rank(),
            "creates_processes_externally": kit_environment.creates_processes_externally,
        }

        assert got == {name: expected._asdict()[name] for name in got}
        assert [type(value) for value in got.values()] == [int, int, int, int, bool]

    def test_it_knows_where_the_processes_meet(self, kit_environment: ClusterEnvironment, expected: Place) -> None:
        """On failure look at ``main_address`` and ``main_port``, and at host lists that must be expanded."""
        address, port = kit_environment.main_address, kit_environment.main_port

        assert isinstance(address, str)
        assert address
        assert type(port) is int
        assert 0 < port < 65536
        if expected.main_address is not None:
            assert address == expected.main_address
        if expected.main_port is not None:
            assert port == expected.main_port

    def test_the_meeting_point_stays_the_same(self, kit_environment: ClusterEnvironment) -> None:
        """It is read by several parts. On failure look for a free port chosen anew on every read."""
        first = [(kit_environment.main_address, kit_environment.main_port) for _ in range(3)]

        assert len(set(first)) == 1

    def test_reading_writes_nothing_to_the_environment(
        self, kit_environment: ClusterEnvironment, expected: Place
    ) -> None:
        """Child processes inherit what is written. On failure look for ``os.environ[...] =`` and ``setdefault``."""
        before = dict(os.environ)

        kit_environment.detect()
        _ = (kit_environment.main_address, kit_environment.main_port, kit_environment.creates_processes_externally)
        for read in (
            kit_environment.world_size,
            kit_environment.global_rank,
            kit_environment.local_rank,
            kit_environment.node_rank,
        ):
            read()
        kit_environment.validate_settings(expected.num_devices, expected.num_nodes)

        assert dict(os.environ) == before

    def test_settings_that_fit_are_accepted(self, kit_environment: ClusterEnvironment, expected: Place) -> None:
        """On failure look at ``validate_settings`` for the numbers that the scheduler really started."""
        kit_environment.validate_settings(expected.num_devices, expected.num_nodes)

    def test_settings_that_contradict_are_refused_with_both_values(
        self, kit_environment: ClusterEnvironment, expected: Place
    ) -> None:
        """Two processes asked for, four started. On failure look at ``validate_settings`` and at its message."""
        if not expected.creates_processes_externally:
            pytest.skip("it starts the processes itself, so nothing can contradict")

        asked = expected.num_devices + 1
        with pytest.raises(ValueError, match=str(asked)) as caught:
            kit_environment.validate_settings(asked, expected.num_nodes)

        found = {str(expected.world_size), str(expected.num_devices)}
        assert any(value in str(caught.value) for value in found), f"what was found is not said: {caught.value}"
