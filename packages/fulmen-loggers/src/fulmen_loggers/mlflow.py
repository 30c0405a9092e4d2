"""MLFlowLogger: a run on an MLflow tracking server, or in a database file."""

from __future__ import annotations

import os
import re
import socket
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, cast
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import yaml

from fulmen_loggers._everybodys import Everybodys
from fulmen_loggers._folder import make_folder
from fulmen_loggers._guard import Guard
from fulmen_loggers._optional import need, require
from fulmen_loggers._uploads import Checkpoint, Uploads
from fulmen_loggers._values import JOIN_CHAR, as_mapping, as_number, flatten, prefixed, simplify
from fulmen_protocols.errors import BackendUnavailable, MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from fulmen_protocols.logger import LoggerStatus

__all__ = ["MLFlowLogger"]

_FORBIDDEN = re.compile(r"[^a-zA-Z0-9_/. \-]+")
_VALUE_LENGTH = 250
_PARAMS_A_CALL = 100
_METRICS_A_CALL = 1000
_ADDRESS = "MLFLOW_TRACKING_URI"
_CONNECT_S = 5.0
_STAYS_UNREACHABLE_S = 30.0


class _ExperimentInfo(Protocol):
    experiment_id: str
    lifecycle_stage: str


class _RunInfo(Protocol):
    run_id: str
    experiment_id: str


class _Run(Protocol):
    info: _RunInfo


class Client(Protocol):
    """``mlflow.tracking.MlflowClient``, as far as it is used here."""

    def get_experiment_by_name(self, name: str) -> _ExperimentInfo | None: ...
    def create_experiment(self, name: str, artifact_location: str | None = None) -> str: ...
    def get_run(self, run_id: str) -> _Run: ...
    def create_run(
        self, experiment_id: str, *, tags: Mapping[str, str] | None = None, run_name: str | None = None
    ) -> _Run: ...
    def update_run(self, run_id: str, status: str | None = None) -> None: ...
    def set_terminated(self, run_id: str, status: str | None = None) -> None: ...
    def log_artifact(self, run_id: str, local_path: str, artifact_path: str | None = None) -> None: ...
    def log_artifacts(self, run_id: str, local_dir: str, artifact_path: str | None = None) -> None: ...
    def log_batch(
        self,
        run_id: str,
        metrics: Sequence[object] = (),
        params: Sequence[object] = (),
        tags: Sequence[object] = (),
        synchronous: bool | None = None,
    ) -> object: ...


class _Tracking(Protocol):
    def MlflowClient(self, tracking_uri: str) -> Client: ...  # noqa: N802  MLflow's name


class _Entities(Protocol):
    def Metric(self, key: str, value: float, timestamp: int, step: int) -> object: ...  # noqa: N802  MLflow's name
    def Param(self, key: str, value: str) -> object: ...  # noqa: N802  MLflow's name


class _Mlflow(Protocol):
    def set_tracking_uri(self, uri: str) -> None: ...
    def flush_async_logging(self) -> None: ...


class MLFlowLogger(Everybodys):
    """Logs to one run of an MLflow experiment. Satisfies ``fulmen_protocols.Logger``.

    The run is made at the first use. Its status is RUNNING, then FINISHED or FAILED; logging again sets it back.

    Args:
        experiment_name: made if it does not exist.
        run_name: shown for the run; MLflow makes one up otherwise.
        tracking_uri: of the server or database; None: ``MLFLOW_TRACKING_URI``, else ``SAVE_DIR/mlflow.db``.
        tags: of the run.
        save_dir: folder of the database and the artifacts where no server is named.
        log_model: upload checkpoints: True at the end, ``"all"`` each as it is saved.
        prefix: put before the names of metrics, with a dash.
        artifact_location: of an experiment that has to be made.
        run_id: go on with this run.
        synchronous: False: MLflow sends rows in the background. None: as MLflow is configured.

    Raises:
        MissingPackage: mlflow is not installed.
        MisconfigurationException: neither an address nor a folder is known.
    """

    LOGGER_JOIN_CHAR = JOIN_CHAR

    def __init__(
        self,
        experiment_name: str = "lightning_logs",
        run_name: str | None = None,
        tracking_uri: str | None = None,
        tags: Mapping[str, object] | None = None,
        save_dir: str | os.PathLike[str] | None = "./mlruns",
        log_model: bool | Literal["all"] = False,
        prefix: str = "",
        artifact_location: str | None = None,
        run_id: str | None = None,
        synchronous: bool | None = None,
    ) -> None:
        require("MLFlowLogger", "mlflow", "mlflow")
        self._folder: str | None = None
        address = tracking_uri or os.environ.get(_ADDRESS)
        if not address:
            if save_dir is None:
                raise MisconfigurationException(
                    "MLFlowLogger(tracking_uri=None, save_dir=None) has nowhere to log to. Give one of them, or set "
                    "MLFLOW_TRACKING_URI."
                )
            self._folder = os.path.abspath(os.path.expanduser(os.fspath(save_dir)))
            address = f"sqlite:///{os.path.join(self._folder, 'mlflow.db')}"
            if artifact_location is None:
                artifact_location = Path(self._folder, "artifacts").as_uri()
        self._address = address
        self._experiment_name, self._run_name, self._run_id = experiment_name, run_name, run_id
        self._experiment_id: str | None = None
        self._artifact_location = artifact_location
        self.tags = dict(tags or {})
        self._prefix = prefixed(prefix, self.LOGGER_JOIN_CHAR)
        self._synchronous = synchronous
        self._client: Client | None = None
        self._is_running = False
        self._next_step = 0
        self._renamed: set[str] = set()
        self._guard = Guard()
        self._unreachable: tuple[float, str] | None = None
        self._uploads = Uploads("MLFlowLogger", log_model, self._upload)

    @property
    def experiment(self) -> Client:
        """The ``MlflowClient``; makes experiment and run at the first use.

        Raises:
            BackendUnavailable: no server answers at the address. The answer holds for half a minute.
            MisconfigurationException: ``save_dir`` cannot be written.
        """
        client = self._client
        if client is not None:
            return client
        with self._guard:
            return self._connect()

    def _connect(self) -> Client:
        if self._client is None:
            self._see_that_a_server_listens()
            if self._folder is not None:
                make_folder("MLFlowLogger", "save_dir", self._folder)
            tracking = cast("_Tracking", need("MLFlowLogger", "mlflow.tracking", "mlflow"))
            mlflow = cast("_Mlflow", need("MLFlowLogger", "mlflow", "mlflow"))
            _go_to_by_default(mlflow, self._address)
            self._client = self._open(tracking.MlflowClient(self._address))
        return self._client

    def _see_that_a_server_listens(self) -> None:
        """MLflow itself tries for minutes before it says that nobody is there."""
        place = urlsplit(self._address)
        if place.scheme not in ("http", "https") or place.hostname is None or _goes_through_a_proxy(place.hostname):
            return
        if self._unreachable is not None and time.monotonic() - self._unreachable[0] < _STAYS_UNREACHABLE_S:
            raise BackendUnavailable(self._unreachable[1])
        port = place.port or (443 if place.scheme == "https" else 80)
        try:
            socket.create_connection((place.hostname, port), timeout=_CONNECT_S).close()
        except OSError as error:
            why = (
                f"MLFlowLogger(tracking_uri={self._address!r}): no server answers there ({type(error).__name__}: "
                f"{error}). Start it, correct tracking_uri or MLFLOW_TRACKING_URI, or give run_id=... to log to a run "
                "that is known, whose rows are delivered when the server is back."
            )
            self._unreachable = (time.monotonic(), why)
            raise BackendUnavailable(why) from error
        self._unreachable = None

    def _running(self) -> Client:
        """The client, with a run that is marked as running, also when it had ended before."""
        client = self.experiment
        if not self._is_running:
            client.update_run(self.run_id, status="RUNNING")
            self._is_running = True
        return client

    def _open(self, client: Client) -> Client:
        if self._run_id is not None:
            self._experiment_id = client.get_run(self._run_id).info.experiment_id
            return client
        known = client.get_experiment_by_name(self._experiment_name)
        if known is not None and known.lifecycle_stage != "deleted":
            self._experiment_id = known.experiment_id
        else:
            self._experiment_id = client.create_experiment(self._experiment_name, self._artifact_location)
        tags = {name: str(value) for name, value in self.tags.items()}
        context = need("MLFlowLogger", "mlflow.tracking.context.registry", "mlflow")
        resolve_tags = cast("Callable[[dict[str, str]], dict[str, str]]", context.resolve_tags)  # type: ignore[attr-defined]
        self._run_id = client.create_run(
            self._experiment_id, tags=resolve_tags(tags), run_name=self._run_name
        ).info.run_id
        return client

    @property
    def run_id(self) -> str:
        """The run's id."""
        if self._run_id is None:
            _ = self.experiment
        return cast("str", self._run_id)

    @property
    def experiment_id(self) -> str:
        """The experiment's id."""
        _ = self.experiment
        return cast("str", self._experiment_id)

    @property
    def name(self) -> str:
        """The experiment's id."""
        return self.experiment_id

    @property
    def version(self) -> str:
        """The run's id. Setting it, before the first use, joins the run of another process."""
        return self.run_id

    @version.setter
    def version(self, version: str) -> None:
        self._run_id = version

    @property
    def save_dir(self) -> str | None:
        """The folder of database and artifacts; None with a server."""
        return self._folder

    @property
    def log_dir(self) -> str | None:
        """None: a run has no folder of its own."""
        return None

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Record values at ``step``; None: one more than before. Names lose the characters that MLflow forbids.

        Raises:
            MisconfigurationException: a value is not a single number.
        """
        self.log_metrics_at(metrics, self._next_step if step is None else int(step), time.time())

    def log_metrics_at(self, metrics: Mapping[str, float], step: int, time_s: float) -> None:
        """``log_metrics`` of what was logged ``time_s`` seconds after the epoch. The same row twice is there once."""
        at = step
        self._next_step = at + 1
        now_ms = int(time_s * 1000)
        entities = cast("_Entities", need("MLFlowLogger", "mlflow.entities", "mlflow"))
        row = [
            entities.Metric(self._allowed(self._prefix + name), as_number(name, value), now_ms, at)
            for name, value in metrics.items()
        ]
        for start in range(0, len(row), _METRICS_A_CALL):
            self._running().log_batch(
                self.run_id, metrics=row[start : start + _METRICS_A_CALL], synchronous=self._synchronous
            )

    def _allowed(self, name: str) -> str:
        allowed = _FORBIDDEN.sub("", name)
        if allowed != name and name not in self._renamed:
            self._renamed.add(name)
            warnings.warn(
                f"MLflow takes letters, digits, '_', '/', '.', '-' and spaces in names of metrics: {name!r} is logged "
                f"as {allowed!r}.",
                stacklevel=3,
            )
        return allowed

    def log_hyperparams(self, params: object = None, **more: object) -> None:
        """Record settings: a dict, a dataclass or a namespace; at most 250 characters of each value are kept.

        A setting that was recorded with another value keeps it: MLflow lets none be changed.
        """
        values = {**({} if params is None else as_mapping(params)), **more}
        entities = cast("_Entities", need("MLFlowLogger", "mlflow.entities", "mlflow"))
        flat = flatten(cast("dict[str, object]", simplify(values)))
        found = [entities.Param(self._allowed(name), str(value)[:_VALUE_LENGTH]) for name, value in flat.items()]
        for start in range(0, len(found), _PARAMS_A_CALL):
            self._running().log_batch(
                self.run_id, params=found[start : start + _PARAMS_A_CALL], synchronous=self._synchronous
            )

    def after_save_checkpoint(self, checkpoint_callback: object) -> None:
        """Upload what was saved, as ``log_model`` says."""
        self._uploads.saved(checkpoint_callback)

    def checkpoint_upload(self, checkpoint_callback: object | None) -> Callable[[], None] | None:
        """What uploads the callback's files as they are now, as ``log_model`` says; see ``SupportsDeferredUpload``."""
        return self._uploads.set_aside(checkpoint_callback)

    def save(self) -> None:
        """Wait for rows that MLflow sends in the background."""
        if self._client is not None and self._synchronous is False:
            cast("_Mlflow", need("MLFlowLogger", "mlflow", "mlflow")).flush_async_logging()

    def finalize(self, status: LoggerStatus) -> None:
        """Upload checkpoints kept for the end, and set the run's status."""
        if self._client is None:
            return
        if status == "success":
            self._uploads.finish()
        self.save()
        self._client.set_terminated(self.run_id, "FAILED" if status == "failed" else "FINISHED")
        self._is_running = False

    def reopen_options(self) -> dict[str, object]:
        """Arguments with which another process goes on with this run."""
        return {
            "experiment_name": self._experiment_name,
            "run_name": self._run_name,
            "tracking_uri": self._address,
            "tags": dict(self.tags),
            "prefix": self._prefix.removesuffix(self.LOGGER_JOIN_CHAR),
            "artifact_location": self._artifact_location,
            "run_id": self._run_id,
        }

    def __getstate__(self) -> dict[str, object]:
        """The copy goes on with the same run."""
        return {**self.__dict__, "_client": None}

    def _upload(self, checkpoint: Checkpoint) -> None:
        client, run_id, folder = self._running(), self.run_id, Path(checkpoint.path).stem
        client.log_artifact(run_id, checkpoint.path, folder)
        with tempfile.TemporaryDirectory() as staging:
            Path(staging, "metadata.yaml").write_text(yaml.safe_dump(checkpoint.metadata), encoding="utf-8")
            Path(staging, "aliases.txt").write_text(str(checkpoint.aliases), encoding="utf-8")
            client.log_artifacts(run_id, staging, folder)


def _go_to_by_default(mlflow: _Mlflow, address: str) -> None:
    """Have the user's own calls of mlflow go to ``address``.

    MLflow writes it into the environment as well, where the next logger would take it for what the user has set.
    """
    before = os.environ.get(_ADDRESS)
    mlflow.set_tracking_uri(address)
    if before is None:
        os.environ.pop(_ADDRESS, None)
    else:
        os.environ[_ADDRESS] = before


def _goes_through_a_proxy(host: str) -> bool:
    return bool(getproxies()) and not proxy_bypass(host)
