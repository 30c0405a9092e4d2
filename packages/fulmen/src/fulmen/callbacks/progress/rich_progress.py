"""RichProgressBar: bars by rich, or plain lines where there is no terminal."""

from __future__ import annotations

import builtins
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fulmen.callbacks.progress._bars import Bar, PlainBar, shows_widgets
from fulmen.callbacks.progress._drawn import DrawnProgressBar
from fulmen_protocols.errors import MissingPackage

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fulmen.trainer import Trainer

__all__ = ["RichProgressBar", "RichProgressBarTheme"]


@dataclass
class RichProgressBarTheme:
    """Styles of the parts of a bar, in rich's notation; see rich's documentation for names and colours."""

    description: str = ""
    progress_bar: str = "#6206E0"
    progress_bar_finished: str = "#6206E0"
    progress_bar_pulse: str = "#6206E0"
    batch_progress: str = ""
    time: str = "dim"
    processing_speed: str = "dim underline"
    metrics: str = "italic"
    metrics_text_delimiter: str = " "
    """Between two metrics."""
    metrics_format: str = ".3f"
    """Format of float metrics."""


class RichProgressBar(DrawnProgressBar):
    """Progress bars by rich: one for training, and one for each loader of an evaluation.

    They are drawn at most ten times a second and less where drawing is slow, by the training process itself; there is
    no drawing thread. Where the console is no terminal, nor a notebook with ipywidgets, plain lines are printed
    instead: one for each epoch, and one every 10 seconds. Override ``configure_columns`` to change the bars,
    ``get_metrics`` to change what stands behind.

    Args:
        refresh_rate: draw at most so many times a second, and never more than ten; 0: no bar.
        leave: keep the bar of every epoch on screen.
        theme: styles.
        console_kwargs: arguments of ``rich.console.Console``.

    Raises:
        MissingPackage: rich is not installed.
    """

    def __init__(
        self,
        refresh_rate: float = 100,
        leave: bool = False,
        theme: RichProgressBarTheme | None = None,
        console_kwargs: dict[str, Any] | None = None,
    ) -> None:
        try:
            import rich  # noqa: F401  # pyright: ignore[reportUnusedImport]
        except ImportError as error:
            raise MissingPackage(
                "RichProgressBar needs rich, which is not installed: pip install 'fulmen[rich]'"
            ) from error
        super().__init__(refresh_rate, leave, at_most_per_s=refresh_rate)
        self.theme = RichProgressBarTheme() if theme is None else theme
        self._console_kwargs = {} if console_kwargs is None else console_kwargs
        self._progress: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_progress": None}

    @property
    def refresh_rate(self) -> float:
        """Drawings per second that were asked for; 0: nothing is drawn."""
        return self._refresh_rate

    @property
    def train_progress_bar(self) -> Any:
        """The bar of training, or None."""
        return self._train_bar

    @property
    def val_progress_bar(self) -> Any:
        """The bar of the running evaluation, or None."""
        return self._eval_bar

    val_sanity_check_bar = val_progress_bar
    test_progress_bar = val_progress_bar
    predict_progress_bar = val_progress_bar

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        """The columns of a bar, ``rich.progress.ProgressColumn`` each. Override to change them.

        A task's ``fields["metrics"]`` holds the metrics as one line of text.
        """
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.table import Column

        theme = self.theme
        return [
            TextColumn("[progress.description]{task.description}", style=theme.description or "none"),
            BarColumn(
                complete_style=theme.progress_bar,
                finished_style=theme.progress_bar_finished,
                pulse_style=theme.progress_bar_pulse,
            ),
            TextColumn("{task.fields[batches]}", style=theme.batch_progress or "none"),
            _styled(TimeElapsedColumn, theme.time),
            _styled(TimeRemainingColumn, theme.time),
            TextColumn("{task.fields[speed]}", style=theme.processing_speed),
            # The only text that may wrap: rich takes the room that is missing from it.
            TextColumn("{task.fields[metrics]}", style=theme.metrics, table_column=Column(overflow="fold")),
        ]

    def _open(self, stage: str) -> Bar:
        inside = stage == "sanity" or (stage == "validate" and self._train_bar is not None)
        progress = self._started_progress()
        if progress is None:
            return PlainBar(speaks_at_end=not inside)
        return _RichBar(progress, self.theme, leave=not inside)

    def _started_progress(self) -> Any:
        """The display of all bars; None where the console cannot be redrawn."""
        if self._progress is None:
            from rich.console import Console
            from rich.progress import Progress

            console = Console(**self._console_kwargs)
            if not (shows_widgets() if console.is_jupyter else console.is_terminal):
                return None
            # auto_refresh would start a thread that draws while the training process computes.
            self._progress = Progress(*self.configure_columns(self.trainer), console=console, auto_refresh=False)
            self._progress.start()
        return self._progress

    def refresh(self, hard: bool = False) -> None:
        """Draw now. ``hard`` changes nothing; it is there for code written for a drawing thread."""
        if self._progress is not None:
            self._progress.refresh()

    def _finish(self) -> None:
        progress, self._progress = self._progress, None
        if progress is not None:
            progress.stop()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bars."""
        if self._progress is None:
            builtins.print(*args, **kwargs)
        else:
            self._progress.console.print(*args, **kwargs)


class _RichBar:
    """A task of a ``rich.progress.Progress``, in tqdm's terms."""

    def __init__(self, progress: Any, theme: RichProgressBarTheme, *, leave: bool) -> None:
        self._progress = progress
        self._theme = theme
        self._leave = leave
        self._description = ""
        self._metrics = ""
        self.n: float = 0
        self.total: float | None = None
        self.task_id = progress.add_task("", total=None, batches="", speed="", metrics="")

    def set_description(self, desc: str | None = None, refresh: bool | None = True) -> None:
        self._description = desc or ""

    def set_postfix(self, ordered_dict: Mapping[str, object] | None = None, refresh: bool | None = True) -> None:
        shown: Mapping[str, object] = {} if ordered_dict is None else ordered_dict
        self._metrics = self._theme.metrics_text_delimiter.join(
            f"{name}: {format(value, self._theme.metrics_format) if isinstance(value, float) else value}"
            for name, value in shown.items()
        )

    def reset(self, total: float | None = None) -> None:
        self.n = 0
        self.total = total
        self._progress.reset(self.task_id, total=total, completed=0)

    def refresh(self) -> None:
        task = self._progress.tasks[self._progress.task_ids.index(self.task_id)]
        elapsed = task.elapsed or 0.0
        total = "--" if self.total is None or math.isinf(self.total) else f"{self.total:g}"
        self._progress.update(
            self.task_id,
            description=self._description,
            completed=self.n,
            total=self.total,
            batches=f"{self.n:g}/{total}",
            speed=f"{self.n / elapsed:.2f}it/s" if elapsed > 0 else "",
            metrics=self._metrics,
        )
        self._progress.refresh()

    def close(self) -> None:
        if self._leave:
            self._progress.stop_task(self.task_id)
        else:
            self._progress.update(self.task_id, visible=False)
        self._progress.refresh()


def _styled(column: Any, style: str) -> Any:
    """A time column in a style of the theme; rich gives these columns a fixed one."""
    from rich.table import Column
    from rich.text import Text

    class Styled(column):  # type: ignore[misc]  # the parent is known at run time
        def render(self, task: Any) -> Any:
            """The parent's text in the theme's style."""
            parent: Any = super()
            return Text(parent.render(task).plain, style=style)

    return Styled(table_column=Column(no_wrap=True))
