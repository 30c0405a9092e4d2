"""What a module consists of, and how large it is."""

from fulmen.utilities.model_summary.model_summary import (
    LayerSummary,
    ModelSummary,
    format_summary_table,
    get_formatted_model_size,
    get_human_readable_count,
    parse_batch_shape,
    summarize,
)

__all__ = [
    "LayerSummary",
    "ModelSummary",
    "format_summary_table",
    "get_formatted_model_size",
    "get_human_readable_count",
    "parse_batch_shape",
    "summarize",
]
