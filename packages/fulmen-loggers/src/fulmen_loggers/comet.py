"""CometLogger: an experiment of Comet."""

from __future__ import annotations

import os
import uuid
from typing import TYPE_CHECKING, Literal, Protocol, cast

from fulmen_loggers._everybodys import Everybodys
from fulmen_loggers._folder import make_folder
from fulmen_loggers._guard import Guard
from fulmen_loggers._optional import need, require
from fulmen_loggers._values import as_mapping, as_number, flatten, simplify
from fulmen_protocols.errors import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from fulmen_protocols.logger import LoggerStatus

__all__ = ["CometLogger"]

_MODES = (None, "get_or_create", "get", "create")
_OLD_NAMES = {
    "experiment_name": "name",
    "project_name": "project",
    "save_dir": "offline_directory",
    "offline": "online",
}


class Experiment(Protocol):
    """``comet_ml.CometExperiment``, as far as it is used here."""

    def log_other(self, key: str, value: object) -> None: ...
    def log_parameters(self, parameters: Mapping[str, object]) -> None: ...
    def set_model_graph(self, graph: object) -> object: ...
    def flush(self) -> bool: ...
    def log_metrics(
        self, dic: Mapping[str, object], prefix: str | None = None, step: int | None = None, epoch: int | None = None
    ) -> None: ...


class _Comet(Protocol):
    """The module ``comet_ml``, as far as it is used here."""

    def start(self, **kwargs: object) -> Experiment: ...
    def ExperimentConfig(self, **kwargs: object) -> object: ...  # noqa: N802  Comet's name


class CometLogger(Everybodys):
    """Logs to one experiment of Comet, online or to an archive. Satisfies ``fulmen_protocols.Logger``.

    The experiment is opened at the first use and stays open after a run, so that a script can add to it; Comet ends it
    with the process, or call ``logger.experiment.end()``.

    Args:
        api_key: of the account; by default as ``comet login`` stored it.
        workspace: by default the account's own.
        project: by default ``Uncategorized``.
        experiment_key: of the experiment to go on with, or to make: 32 to 50 letters and digits; None: a new one.
        mode: ``"get"`` goes on with an experiment, ``"create"`` makes one, ``"get_or_create"`` does what it can.
        online: False: write an archive into ``offline_directory``; ``comet upload`` sends it later.
        prefix: put before the names of metrics, with an underscore.
        **kwargs: of ``comet_ml.ExperimentConfig``: ``name``, ``tags``, ``offline_directory``, ``log_code``, ...

    Raises:
        MissingPackage: comet_ml is not installed.
        MisconfigurationException: an argument has another name in Comet, or ``mode`` is unknown.
    """

    def __init__(
        self,
        *,
        api_key: str | None = None,
        workspace: str | None = None,
        project: str | None = None,
        experiment_key: str | None = None,
        mode: Literal["get_or_create", "get", "create"] | None = None,
        online: bool | None = None,
        prefix: str | None = None,
        **kwargs: object,
    ) -> None:
        require("CometLogger", "comet_ml", "comet")
        if mode not in _MODES:
            raise MisconfigurationException(f"CometLogger(mode={mode!r}) must be 'get_or_create', 'get' or 'create'.")
        for old, new in _OLD_NAMES.items():
            if old in kwargs:
                raise MisconfigurationException(f"CometLogger({old}={kwargs[old]!r}) is now called {new}.")
        self._start: dict[str, object] = {
            "api_key": api_key,
            "workspace": workspace,
            "project": project,
            "experiment_key": experiment_key,
            "mode": mode,
            "online": online,
        }
        self._config = kwargs
        self._prefix = prefix
        self._next_step = 0
        self._experiment: Experiment | None = None
        self._graph: str | None = None
        self._guard = Guard()

    @property
    def experiment(self) -> Experiment:
        """The ``CometExperiment``; opens it.

        Raises:
            MisconfigurationException: ``offline_directory`` cannot be written.
        """
        experiment = self._experiment
        if experiment is not None:
            return experiment
        with self._guard:
            return self._open()

    def _open(self) -> Experiment:
        if self._experiment is None:
            # Comet's own hooks into torch would log everything a second time.
            os.environ.setdefault("COMET_DISABLE_AUTO_LOGGING", "1")
            comet = cast("_Comet", need("CometLogger", "comet_ml", "comet"))
            folder, self._start["experiment_key"] = self.save_dir, self.version
            if folder is not None:
                make_folder("CometLogger", "offline_directory", folder)
            self._experiment = comet.start(**self._start, experiment_config=comet.ExperimentConfig(**self._config))
            self._experiment.log_other("Created from", "fulmen")
        return self._experiment

    @property
    def name(self) -> str | None:
        """The project."""
        return cast("str | None", self._start["project"])

    @property
    def version(self) -> str:
        """The experiment's key; one is made up when it is first asked for. Settable before the first use."""
        if self._start["experiment_key"] is None:
            self._start["experiment_key"] = uuid.uuid4().hex
        return cast("str", self._start["experiment_key"])

    @version.setter
    def version(self, version: str) -> None:
        self._start["experiment_key"] = version

    @property
    def save_dir(self) -> str | None:
        """The folder of archives, if one was given."""
        return cast("str | None", self._config.get("offline_directory"))

    @property
    def log_dir(self) -> str | None:
        """None: an experiment has no folder of its own."""
        return None

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Record values at ``step``; None: one more than before. A metric named ``epoch`` becomes Comet's epoch.

        Raises:
            MisconfigurationException: a value is not a single number.
        """
        at = self._next_step if step is None else int(step)
        self._next_step = at + 1
        row: dict[str, object] = {name: as_number(name, value) for name, value in metrics.items()}
        epoch = row.pop("epoch", None)
        number = None if epoch is None else int(cast("float", epoch))
        self.experiment.log_metrics(row, prefix=self._prefix, step=at, epoch=number)

    def log_hyperparams(self, params: object = None, **more: object) -> None:
        """Record settings: a dict, a dataclass or a namespace. Later calls add to earlier ones."""
        values = {**({} if params is None else as_mapping(params)), **more}
        self.experiment.log_parameters(flatten(cast("dict[str, object]", simplify(values))))

    def log_graph(self, model: nn.Module, input_array: object | None = None) -> None:
        """Record the model's structure as text: the text is taken now, and sent by ``save`` or ``finalize``."""
        self._graph = str(model)

    def save(self) -> None:
        """Send the model's graph, if there is one; Comet writes all else by itself."""
        graph = self._graph
        if graph is not None:
            self.experiment.set_model_graph(graph)
            self._graph = None

    def finalize(self, status: LoggerStatus) -> None:
        """Send everything, and note how the run ended."""
        self.save()
        if self._experiment is None:
            return
        self._experiment.log_other("status", status)
        self._experiment.flush()

    def reopen_options(self) -> dict[str, object]:
        """Arguments with which another process goes on with this experiment; the account's key is not among them."""
        return {
            "workspace": self._start["workspace"],
            "project": self._start["project"],
            "experiment_key": self.version,
            "online": self._start["online"],
            "prefix": self._prefix,
            **({} if self.save_dir is None else {"offline_directory": os.path.abspath(self.save_dir)}),
        }

    def __getstate__(self) -> dict[str, object]:
        """The copy goes on with the same experiment, by its key."""
        return {**self.__dict__, "_experiment": None}
