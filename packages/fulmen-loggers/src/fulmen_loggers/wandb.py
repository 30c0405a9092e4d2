"""WandbLogger: a run of Weights & Biases."""

from __future__ import annotations

import os
import secrets
import string
from typing import TYPE_CHECKING, Literal, Protocol, cast

from fulmen_loggers._everybodys import Everybodys
from fulmen_loggers._folder import make_folder
from fulmen_loggers._guard import Guard
from fulmen_loggers._optional import need, require
from fulmen_loggers._uploads import Checkpoint, Uploads
from fulmen_loggers._values import JOIN_CHAR, as_mapping, as_number, prefixed, simplify
from fulmen_protocols.errors import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn

    from fulmen_protocols.logger import LoggerStatus

__all__ = ["WandbLogger"]

_STEP = "trainer/global_step"
_ID_LETTERS = string.ascii_lowercase + string.digits


class _Config(Protocol):
    def update(self, values: Mapping[str, object], allow_val_change: bool = False) -> None: ...


class _Artifact(Protocol):
    def add_file(self, local_path: str, name: str, policy: str) -> object: ...
    def download(self, root: str | None = None) -> str: ...


class Run(Protocol):
    """``wandb.Run``, as far as it is used here."""

    @property
    def id(self) -> str: ...
    @property
    def config(self) -> _Config: ...
    def log(self, data: Mapping[str, object]) -> None: ...
    def define_metric(self, name: str, step_metric: str = ..., step_sync: bool = ...) -> object: ...
    def watch(self, model: nn.Module, *, log: str | None, log_freq: int, log_graph: bool) -> None: ...
    def log_artifact(self, artifact: _Artifact, aliases: Sequence[str]) -> object: ...
    def use_artifact(self, artifact: str, type: str | None = None) -> _Artifact: ...
    def finish(self, exit_code: int | None = None) -> None: ...


class _Media(Protocol):
    def __call__(self, data: object, **kwargs: object) -> object: ...


class _Api(Protocol):
    def artifact(self, name: str, type: str | None = None) -> _Artifact: ...


class _MakesArtifact(Protocol):
    def __call__(self, name: str, type: str, metadata: Mapping[str, object]) -> _Artifact: ...


class _MakesApi(Protocol):
    def __call__(self) -> _Api: ...


class _MakesTable(Protocol):
    def __call__(self, columns: object = None, data: object = None, dataframe: object = None) -> object: ...


class _Wandb(Protocol):
    """The module ``wandb``, as far as it is used here."""

    run: Run | None
    Image: _Media
    Audio: _Media
    Video: _Media
    Table: _MakesTable
    Artifact: _MakesArtifact
    Api: _MakesApi

    def init(self, **kwargs: object) -> Run: ...


class WandbLogger(Everybodys):
    """Logs to one run of Weights & Biases, online or to files. Satisfies ``fulmen_protocols.Logger``.

    The run is opened at the first use, and once more if somebody finished it; each row carries the training step as
    ``trainer/global_step``, which is the x axis. A run that fails is finished as failed; one that succeeds stays open
    for what a script still wants to add, until ``wandb.finish()`` or the end of the process.

    Args:
        name: shown for the run.
        save_dir: where files are written, unless ``dir`` says so.
        version: the run's id, unless ``id`` says so; an id that exists is resumed.
        offline: write files only; ``wandb sync`` uploads them later.
        dir: the same as ``save_dir``.
        id: the same as ``version``.
        anonymous: kept for old code; wandb ignores it.
        project: the run's project; by default ``WANDB_PROJECT`` or ``lightning_logs``.
        log_model: upload checkpoints: True at the end, ``"all"`` each as it is saved.
        experiment: a run that is already open, to be used instead of one of its own.
        prefix: put before the names of metrics, with a dash.
        checkpoint_name: of the artifact; by default ``model-ID``.
        add_file_policy: ``"immutable"`` adds checkpoints to artifacts without copying them first.
        **kwargs: further arguments of ``wandb.init``: ``entity``, ``group``, ``tags``, ...

    Raises:
        MissingPackage: wandb is not installed.
        MisconfigurationException: checkpoints cannot be uploaded offline.
    """

    LOGGER_JOIN_CHAR = JOIN_CHAR

    def __init__(
        self,
        name: str | None = None,
        save_dir: str | os.PathLike[str] | None = ".",
        version: str | None = None,
        offline: bool = False,
        dir: str | os.PathLike[str] | None = None,  # wandb's name
        id: str | None = None,  # wandb's name
        anonymous: bool | None = None,
        project: str | None = None,
        log_model: bool | Literal["all"] = False,
        experiment: Run | None = None,
        prefix: str = "",
        checkpoint_name: str | None = None,
        add_file_policy: Literal["mutable", "immutable"] = "mutable",
        **kwargs: object,
    ) -> None:
        require("WandbLogger", "wandb", "wandb")
        if offline and log_model:
            raise MisconfigurationException(
                f"WandbLogger(log_model={log_model!r}, offline={offline!r}): checkpoints cannot be uploaded offline. "
                "Drop one of the two."
            )
        if add_file_policy not in ("mutable", "immutable"):
            raise MisconfigurationException(
                f"WandbLogger(add_file_policy={add_file_policy!r}) must be 'mutable' or 'immutable'."
            )
        folder = dir if dir is not None else save_dir
        self._init: dict[str, object] = {
            "name": name,
            "project": project if project is not None else os.environ.get("WANDB_PROJECT", "lightning_logs"),
            "dir": None if folder is None else os.fspath(folder),
            "id": version if version is not None else id,
            "resume": "allow",
            **({"mode": "offline"} if offline else {}),
            **kwargs,
        }
        self._prefix = prefixed(prefix, self.LOGGER_JOIN_CHAR)
        self._run = experiment
        self._is_given = experiment is not None
        self._checkpoint_name = checkpoint_name
        self._add_file_policy = add_file_policy
        self._guard = Guard()
        self._uploads = Uploads("WandbLogger", log_model, self._upload)

    @property
    def name(self) -> str | None:
        """The project."""
        return cast("str | None", self._init["project"])

    @property
    def version(self) -> str:
        """The run's id; one is made up when it is first asked for. Settable before the run is opened."""
        if self._run is not None:
            return self._run.id
        if self._init["id"] is None:
            self._init["id"] = "".join(secrets.choice(_ID_LETTERS) for _ in range(8))
        return cast("str", self._init["id"])

    @version.setter
    def version(self, version: str) -> None:
        self._init["id"] = version

    @property
    def save_dir(self) -> str | None:
        """Where files are written."""
        return cast("str | None", self._init["dir"])

    @property
    def log_dir(self) -> str | None:
        """None: wandb names the run's folder itself."""
        return None

    @property
    def experiment(self) -> Run:
        """The ``wandb.Run``; opens it, and again when it was finished.

        A run that is open already, made by ``wandb.init`` or by a sweep, is used as it is.

        Raises:
            MisconfigurationException: ``save_dir`` cannot be written.
        """
        run = self._run
        if run is not None and (self._is_given or not getattr(run, "_is_finished", False)):
            return run
        with self._guard:
            return self._open()

    def _open(self) -> Run:
        if self._run is None or getattr(self._run, "_is_finished", False):
            wandb = self._wandb()
            if wandb.run is not None:
                self._run = wandb.run
            else:
                if self.save_dir is not None:
                    make_folder("WandbLogger", "save_dir", self.save_dir)
                self._init["id"] = self.version if self._run is None else self._run.id
                self._run = wandb.init(**self._init)
            self._run.define_metric(_STEP)
            self._run.define_metric("*", step_metric=_STEP, step_sync=True)
        return self._run

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add a row at ``trainer/global_step`` = ``step``; None: at the last one.

        Raises:
            MisconfigurationException: a value is not a single number.
        """
        row = {self._prefix + name: as_number(name, value) for name, value in metrics.items()}
        self.experiment.log(row if step is None else {**row, _STEP: int(step)})

    def log_hyperparams(self, params: object = None, **more: object) -> None:
        """Put settings into the run's config: a dict, a dataclass or a namespace. Later calls add to earlier ones."""
        values = {**({} if params is None else as_mapping(params)), **more}
        self.experiment.config.update(cast("dict[str, object]", simplify(values)), allow_val_change=True)

    def watch(
        self, model: nn.Module, log: str | None = "gradients", log_freq: int = 100, log_graph: bool = True
    ) -> None:
        """Record histograms of gradients, parameters or both (``"all"``), every ``log_freq`` batches."""
        self.experiment.watch(model, log=log, log_freq=log_freq, log_graph=log_graph)

    def log_table(
        self,
        key: str,
        columns: Sequence[str] | None = None,
        data: Sequence[Sequence[object]] | None = None,
        dataframe: object = None,
        step: int | None = None,
    ) -> None:
        """Record a table: of ``columns`` and rows of ``data``, or a pandas ``dataframe``."""
        rows = None if data is None else [list(row) for row in data]
        names = None if columns is None else list(columns)
        self._log_objects({key: self._wandb().Table(columns=names, data=rows, dataframe=dataframe)}, step)

    def log_text(
        self,
        key: str,
        columns: Sequence[str] | None = None,
        data: Sequence[Sequence[str]] | None = None,
        dataframe: object = None,
        step: int | None = None,
    ) -> None:
        """Record texts as a table."""
        self.log_table(key, columns, data, dataframe, step)

    def log_image(self, key: str, images: list[object], step: int | None = None, **kwargs: object) -> None:
        """Record images (arrays, tensors, PIL images or paths); further arguments are lists, one value an image."""
        self._log_media("log_image", self._wandb().Image, key, images, step, kwargs)

    def log_audio(self, key: str, audios: list[object], step: int | None = None, **kwargs: object) -> None:
        """Record sounds (arrays or paths); further arguments are lists, one value a sound."""
        self._log_media("log_audio", self._wandb().Audio, key, audios, step, kwargs)

    def log_video(self, key: str, videos: list[object], step: int | None = None, **kwargs: object) -> None:
        """Record videos (arrays or paths); further arguments are lists, one value a video."""
        self._log_media("log_video", self._wandb().Video, key, videos, step, kwargs)

    @staticmethod
    def download_artifact(
        artifact: str,
        save_dir: str | os.PathLike[str] | None = None,
        artifact_type: str | None = None,
        use_artifact: bool = True,
    ) -> str:
        """Fetch an artifact from the server and return its folder.

        Args:
            artifact: its path, such as ``entity/project/model-ID:best``.
            save_dir: where to put it; None: wandb's cache.
            artifact_type: checked if given.
            use_artifact: note in the open run, if there is one, that it used the artifact.
        """
        wandb = cast("_Wandb", need("WandbLogger", "wandb", "wandb"))
        if wandb.run is not None and use_artifact:
            found = wandb.run.use_artifact(artifact, type=artifact_type)
        else:
            found = wandb.Api().artifact(artifact, type=artifact_type)
        return found.download(root=None if save_dir is None else os.fspath(save_dir))

    def use_artifact(self, artifact: str, artifact_type: str | None = None) -> object:
        """Note that this run uses an artifact, and return it."""
        return self.experiment.use_artifact(artifact, type=artifact_type)

    def after_save_checkpoint(self, checkpoint_callback: object) -> None:
        """Upload what was saved, as ``log_model`` says."""
        self._uploads.saved(checkpoint_callback)

    def checkpoint_upload(self, checkpoint_callback: object | None) -> Callable[[], None] | None:
        """What uploads the callback's files as they are now, as ``log_model`` says; see ``SupportsDeferredUpload``."""
        return self._uploads.set_aside(checkpoint_callback)

    def save(self) -> None:
        """Nothing to do: wandb writes by itself."""

    def finalize(self, status: LoggerStatus) -> None:
        """Upload checkpoints kept for the end of a successful run; mark a failed run as failed."""
        if self._run is None:
            return
        if status == "success":
            self._uploads.finish()
        elif status == "failed" and not self._is_given and not getattr(self._run, "_is_finished", False):
            self._run.finish(exit_code=1)

    def reopen_options(self) -> dict[str, object]:
        """Arguments with which another process goes on with this run."""
        chosen = {name: value for name, value in self._init.items() if name not in ("id", "dir", "resume", "mode")}
        return {
            **{name: value for name, value in chosen.items() if value is None or isinstance(value, (str, int, float))},
            "id": self.version,
            "save_dir": self.save_dir,
            "offline": self._init.get("mode") == "offline",
            "prefix": self._prefix.removesuffix(self.LOGGER_JOIN_CHAR),
        }

    def __getstate__(self) -> dict[str, object]:
        """The copy opens the same run again, by its id."""
        self._init["id"] = self.version
        return {**self.__dict__, "_run": None, "_is_given": False}

    def _wandb(self) -> _Wandb:
        return cast("_Wandb", need("WandbLogger", "wandb", "wandb"))

    def _log_objects(self, objects: Mapping[str, object], step: int | None) -> None:
        self.experiment.log(objects if step is None else {**objects, _STEP: int(step)})

    def _log_media(
        self, method: str, kind: _Media, key: str, items: list[object], step: int | None, each: Mapping[str, object]
    ) -> None:
        for name, values in {key: items, **each}.items():
            if not isinstance(values, list):
                raise TypeError(f"{method}({name}=...) needs a list, one value for each; got {type(values).__name__}.")
            count = len(cast("list[object]", values))
            if count != len(items):
                raise ValueError(f"{method}({name}=...) has {count} values for {len(items)} items; give one for each.")
        per_item = [
            {name: cast("list[object]", values)[index] for name, values in each.items()} for index in range(len(items))
        ]
        made = [kind(item, **arguments) for item, arguments in zip(items, per_item, strict=True)]
        self._log_objects({key: made}, step)

    def _upload(self, checkpoint: Checkpoint) -> None:
        name = self._checkpoint_name or f"model-{self.experiment.id}"
        artifact = self._wandb().Artifact(name=name, type="model", metadata=checkpoint.metadata)
        artifact.add_file(checkpoint.path, name="model.ckpt", policy=self._add_file_policy)
        logged = self.experiment.log_artifact(artifact, aliases=checkpoint.aliases)
        wait = getattr(logged, "wait", None)
        if self._add_file_policy == "immutable" and callable(wait):
            wait()  # wandb reads the file itself until it is uploaded
