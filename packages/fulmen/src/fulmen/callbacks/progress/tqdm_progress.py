"""TQDMProgressBar: bars by tqdm, or plain lines where there is no terminal."""

from __future__ import annotations

import builtins
import os
import sys
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from fulmen.callbacks.progress._bars import Bar, PlainBar, format_metric, in_notebook, is_drawable, shows_widgets
from fulmen.callbacks.progress._drawn import DrawnProgressBar
from fulmen_protocols.errors import MissingPackage

if TYPE_CHECKING:
    from tqdm import tqdm as Tqdm

__all__ = ["TQDMProgressBar", "Tqdm", "convert_inf"]

_COLAB_REFRESH_RATE = 20
"""Colab's output falls behind, and the page hangs, when it is drawn on more often."""


@cache
def _tqdm(*, widgets: bool) -> Any:
    """Tqdm's class for this output, with metrics at a fixed number of digits so that the bar does not jitter.

    Raises:
        MissingPackage: tqdm is not installed.
    """
    parent: Any
    try:
        if widgets:
            from tqdm.notebook import tqdm as parent
        else:
            from tqdm import tqdm as parent
    except ImportError as error:
        raise MissingPackage("TQDMProgressBar needs tqdm, which is not installed: pip install tqdm") from error

    class Tqdm(parent):  # type: ignore[misc]  # the parent is known at run time
        @staticmethod
        def format_num(n: object) -> str:
            """Floats by three significant digits; other values as they are."""
            return format_metric(n)

    return Tqdm


class TQDMProgressBar(DrawnProgressBar):
    """Progress bars by tqdm: one for training, and one for each loader of an evaluation.

    They are drawn at most ten times a second. Where standard output is no terminal, plain lines are printed instead:
    one for each epoch, and one every 10 seconds. Override the ``init_*_tqdm`` methods to change the bars,
    ``get_metrics`` to change what stands behind them.

    Args:
        refresh_rate: draw only at every so many batches; 0: no bar. It is at least the environment's ``TQDM_MINITERS``,
            and on Colab 20 unless you ask for another.
        process_position: lines to leave free above the bars, for several processes on one terminal.
        leave: keep the bar of every epoch on screen.
    """

    BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"

    def __init__(self, refresh_rate: int = 1, process_position: int = 0, leave: bool = False) -> None:
        resolved = _resolve_refresh_rate(refresh_rate)
        super().__init__(resolved, leave, every=max(resolved, 1))
        self._process_position = process_position

    @property
    def refresh_rate(self) -> int:
        """Batches between two drawings, if time allows; 0: nothing is drawn."""
        return int(self._refresh_rate)

    @property
    def process_position(self) -> int:
        """Lines left free above the bars."""
        return self._process_position

    @property
    def train_progress_bar(self) -> Any:
        """The bar of training.

        Raises:
            TypeError: it is not open.
        """
        return _opened(self._train_bar, "train_progress_bar")

    @train_progress_bar.setter
    def train_progress_bar(self, bar: Any) -> None:
        self._train_bar = bar

    def _eval_property(self, name: str) -> Any:
        return _opened(self._eval_bar, name)

    @property
    def val_progress_bar(self) -> Any:
        """The bar of the running validation.

        Raises:
            TypeError: it is not open.
        """
        return self._eval_property("val_progress_bar")

    @val_progress_bar.setter
    def val_progress_bar(self, bar: Any) -> None:
        self._eval_bar = bar

    @property
    def test_progress_bar(self) -> Any:
        """The bar of the running test.

        Raises:
            TypeError: it is not open.
        """
        return self._eval_property("test_progress_bar")

    @test_progress_bar.setter
    def test_progress_bar(self, bar: Any) -> None:
        self._eval_bar = bar

    @property
    def predict_progress_bar(self) -> Any:
        """The bar of the running prediction.

        Raises:
            TypeError: it is not open.
        """
        return self._eval_property("predict_progress_bar")

    @predict_progress_bar.setter
    def predict_progress_bar(self, bar: Any) -> None:
        self._eval_bar = bar

    def init_sanity_tqdm(self) -> Any:
        """A new bar for the sanity check. Override to change it."""
        return self._new(self.sanity_check_description, position=0, leave=False)

    def init_train_tqdm(self) -> Any:
        """A new bar for training. Override to change it."""
        return self._new(self.train_description, position=0, leave=True, smoothing=0.0)

    def init_validation_tqdm(self) -> Any:
        """A new bar for validation. Override to change it."""
        inside = self._train_bar is not None
        return self._new(self.validation_description, position=int(inside), leave=not inside)

    def init_test_tqdm(self) -> Any:
        """A new bar for a test. Override to change it."""
        return self._new(self.test_description, position=0, leave=True)

    def init_predict_tqdm(self) -> Any:
        """A new bar for prediction. Override to change it."""
        return self._new(self.predict_description, position=0, leave=True, smoothing=0.0)

    def _new(self, description: str, *, position: int, leave: bool, **options: Any) -> Any:
        if not is_drawable():
            return PlainBar(description, speaks_at_end=leave)
        widgets = shows_widgets()
        if in_notebook() and not widgets:
            position = 0  # a notebook's text has no line above the last; validation takes the place of training
        return _tqdm(widgets=widgets)(
            desc=description,
            position=2 * self._process_position + position,
            disable=self.is_disabled,
            leave=leave,
            dynamic_ncols=True,
            file=sys.stdout,
            bar_format=self.BAR_FORMAT,
            **options,
        )

    def _open(self, stage: str) -> Bar:
        new = {
            "sanity": self.init_sanity_tqdm,
            "train": self.init_train_tqdm,
            "validate": self.init_validation_tqdm,
            "test": self.init_test_tqdm,
            "predict": self.init_predict_tqdm,
        }[stage]
        return cast("Bar", new())

    def print(self, *args: Any, sep: str = " ", **kwargs: Any) -> None:
        """Print above the bars."""
        bar: Any = self._eval_bar or self._train_bar
        if self.is_disabled or bar is None or isinstance(bar, PlainBar):
            builtins.print(*args, sep=sep, **kwargs)
        else:
            bar.write(sep.join(map(str, args)), **kwargs)


def convert_inf(total: float | None) -> float | None:
    """A bar's total: None for tqdm where the number of batches is unknown or infinite."""
    return None if total is None or total == float("inf") or total != total else total


def _resolve_refresh_rate(asked: int) -> int:
    """What was asked, but Colab and whoever set the environment are spared; no bar stays no bar."""
    if asked == 1 and (os.environ.get("COLAB_GPU") or "google.colab" in sys.modules):
        return _COLAB_REFRESH_RATE
    miniters = os.environ.get("TQDM_MINITERS", "")
    return max(asked, int(miniters)) if asked > 0 and miniters.isdigit() else asked


def _opened(bar: Bar | None, name: str) -> Bar:
    if bar is None:
        raise TypeError(f"TQDMProgressBar.{name} is not open: it is there while its loop runs.")
    return bar


if not TYPE_CHECKING:  # a type checker would take every misspelt name for one that is found here

    def __getattr__(name: str) -> object:
        if name == "Tqdm":  # the class of a bar, for overrides of ``init_train_tqdm`` and its siblings
            return _tqdm(widgets=shows_widgets())
        raise AttributeError(f"module 'fulmen.callbacks.progress.tqdm_progress' has no attribute {name!r}")
