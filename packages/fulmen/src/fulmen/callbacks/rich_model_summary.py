"""RichModelSummary: the summary of a module as a table drawn by rich."""

from __future__ import annotations

from multiprocessing import parent_process
from typing import Any

from fulmen.callbacks.model_summary import ModelSummary
from fulmen.utilities.model_summary import get_formatted_model_size, get_human_readable_count
from fulmen_protocols.errors import MissingPackage

__all__ = ["RichModelSummary"]


class RichModelSummary(ModelSummary):
    """Prints layers, parameters and memory of the module at the start of ``fit``, in colour on a terminal.

    Args:
        max_depth: levels of submodules to list; -1: all; 0: print nothing.
        summarize_kwargs: passed to ``summarize``: ``header_style`` is rich's style of the headings.

    Raises:
        MissingPackage: rich is not installed.
    """

    def __init__(self, max_depth: int = 1, **summarize_kwargs: Any) -> None:
        try:
            import rich  # noqa: F401  # pyright: ignore[reportUnusedImport]
        except ImportError as error:
            raise MissingPackage(
                "RichModelSummary needs rich, which is not installed: pip install 'fulmen[rich]'"
            ) from error
        super().__init__(max_depth, **summarize_kwargs)

    @staticmethod
    def summarize(
        summary_data: list[tuple[str, list[str]]],
        total_parameters: int,
        trainable_parameters: int,
        model_size: float,
        total_training_modes: dict[str, int],
        total_flops: int,
        **summarize_kwargs: Any,
    ) -> None:
        """Print the columns and totals; ``model_size`` is in MB. Override to print them otherwise."""
        from rich.console import Console
        from rich.table import Table

        # What a process forked by a notebook's kernel displays is dropped; its text is not.
        console = Console(force_jupyter=None if parent_process() is None else False)
        table = Table(header_style=summarize_kwargs.get("header_style", "bold magenta"))
        for heading, _ in summary_data:
            right = heading in ("Params", "FLOPs", "In sizes", "Out sizes")
            table.add_column(heading, justify="right" if right else "left", no_wrap=heading == "Name")
        for row in zip(*(cells for _, cells in summary_data), strict=True):
            table.add_row(*row)
        if table.row_count:
            console.print(table)
        totals = Table.grid(padding=(0, 1))
        totals.add_row("[bold]Trainable params[/]", get_human_readable_count(trainable_parameters))
        totals.add_row(
            "[bold]Non-trainable params[/]", get_human_readable_count(total_parameters - trainable_parameters)
        )
        totals.add_row("[bold]Total params[/]", get_human_readable_count(total_parameters))
        totals.add_row("[bold]Total estimated model params size (MB)[/]", get_formatted_model_size(model_size))
        totals.add_row("[bold]Modules in train mode[/]", str(total_training_modes["train"]))
        totals.add_row("[bold]Modules in eval mode[/]", str(total_training_modes["eval"]))
        if total_flops:
            totals.add_row("[bold]Total FLOPs[/]", get_human_readable_count(total_flops))
        console.print(totals)
