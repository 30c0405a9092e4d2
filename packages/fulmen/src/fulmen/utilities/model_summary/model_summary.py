"""ModelSummary: what a module consists of, how large it is, and what one example costs."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Generator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from fulmen_fabric.abilities import supports
from fulmen_fabric.flops import counting_flops
from fulmen_fabric.rank_zero import rank_zero_warn
from fulmen_protocols import SupportsInputConversion, SupportsPrecisionPlan
from fulmen_protocols.errors import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.utils.hooks import RemovableHandle

__all__ = [
    "LayerSummary",
    "ModelSummary",
    "format_summary_table",
    "get_formatted_model_size",
    "get_human_readable_count",
    "parse_batch_shape",
    "summarize",
]

UNKNOWN_SIZE = "?"
NOT_APPLICABLE = "n/a"
LEFTOVER_PARAMS_NAME = "other params"


class LayerSummary:
    """One submodule: its type, parameters and mode, and the sizes that went through it in the example's forward pass.

    Args:
        module: what to describe.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._hook: RemovableHandle | None = module.register_forward_hook(self._note_sizes, with_kwargs=True)
        self._in_size: object = None
        self._out_size: object = None

    def _note_sizes(self, _: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
        inputs = args if args else tuple(kwargs.values())
        self._in_size = parse_batch_shape(inputs[0] if len(inputs) == 1 else inputs)
        self._out_size = parse_batch_shape(output)
        self.detach_hook()

    def detach_hook(self) -> None:
        """Stop looking at forward passes."""
        hook, self._hook = self._hook, None
        if hook is not None:
            hook.remove()

    @property
    def in_size(self) -> object:
        """Shape of the first input, or a list of shapes; ``"?"`` before a forward pass."""
        return UNKNOWN_SIZE if self._in_size is None else self._in_size

    @property
    def out_size(self) -> object:
        """Shape of the output, or a list of shapes; ``"?"`` before a forward pass."""
        return UNKNOWN_SIZE if self._out_size is None else self._out_size

    @property
    def layer_type(self) -> str:
        """Name of the class; of a compiled module, the original's."""
        module: Any = self._module
        return type(getattr(module, "_orig_mod", module)).__name__

    @property
    def num_parameters(self) -> int:
        """Elements of all parameters, of shards those of the whole; parameters without a shape yet count 0."""
        return sum(_elements(parameter) for parameter in self._module.parameters())

    @property
    def training(self) -> bool:
        """Whether it is in train mode."""
        return self._module.training


class ModelSummary:
    """Layers, parameters, memory, modes, and with an ``example_input_array`` also sizes and floating point operations.

    Args:
        model: any module. If it has an ``example_input_array`` (a tensor, a tuple of positional arguments or a dict of
            keyword arguments), that goes through ``forward`` once: in eval mode, without gradients, with the random
            state kept.
        max_depth: levels of submodules to list; -1: all; 0: totals alone.

    Raises:
        MisconfigurationException: ``max_depth`` is below -1.
    """

    def __init__(self, model: nn.Module, max_depth: int = 1) -> None:
        if type(max_depth) is not int or max_depth < -1:
            raise MisconfigurationException(
                f"ModelSummary(max_depth={max_depth!r}): use 0 for totals alone, -1 for every level, or a number."
            )
        self._model = model
        self._max_depth = max_depth
        self._flops: dict[str, int] = {}
        self._layers = self.summarize()
        self._total = sum(_elements(parameter) for parameter in model.parameters())
        self._trainable = sum(_elements(parameter) for parameter in model.parameters() if parameter.requires_grad)
        self._bytes = sum(_elements(parameter) * _element_bytes(parameter) for parameter in model.parameters())
        if any(_is_lazy(parameter) for parameter in model.parameters()):
            rank_zero_warn(
                "the model has lazy parameters, which have no shape before the first forward pass: the summary counts "
                "them as 0. Run an example through it first to have them counted."
            )

    @property
    def named_modules(self) -> list[tuple[str, nn.Module]]:
        """The submodules that are listed, with their paths."""
        if self._max_depth == 0:
            return []
        everything = cast("Any", self._model).named_modules()
        modules: list[tuple[str, nn.Module]] = [(name, module) for name, module in everything if name]
        if self._max_depth == -1:
            return modules
        return [(name, module) for name, module in modules if name.count(".") < self._max_depth]

    def summarize(self) -> dict[str, LayerSummary]:
        """Look at every listed submodule, and run the example through the model if it has one."""
        layers = OrderedDict((name, LayerSummary(module)) for name, module in self.named_modules)
        try:
            example = getattr(self._model, "example_input_array", None)
            if example is not None:
                self._run(example)
        finally:
            for layer in layers.values():
                layer.detach_hook()
        return layers

    def _run(self, example: object) -> None:
        model = self._model
        arguments = _to_device_of(model, _cast_for(model, example))
        try:
            with _unchanged(model), torch.no_grad(), _precision_of(model), counting_flops() as counter:
                if isinstance(arguments, Mapping):
                    model(**cast("Mapping[str, object]", arguments))
                elif isinstance(arguments, (list, tuple)):
                    model(*cast("Sequence[object]", arguments))
                else:
                    model(arguments)
        except Exception as error:  # noqa: BLE001  # a summary must not end a run that would have gone well
            rank_zero_warn(
                f"example_input_array did not go through {type(model).__name__}.forward ({type(error).__name__}: "
                f"{error}): the summary has no sizes. Set it to what forward takes, or to None."
            )
            return
        root = type(model).__name__
        for name, counts in counter.get_flop_counts().items():
            self._flops[name.removeprefix(root).removeprefix(".")] = sum(counts.values())

    @property
    def layer_names(self) -> list[str]:
        """Paths of the listed submodules."""
        return list(self._layers)

    @property
    def layer_types(self) -> list[str]:
        """Class names of the listed submodules."""
        return [layer.layer_type for layer in self._layers.values()]

    @property
    def in_sizes(self) -> list[object]:
        """Input shapes of the listed submodules."""
        return [layer.in_size for layer in self._layers.values()]

    @property
    def out_sizes(self) -> list[object]:
        """Output shapes of the listed submodules."""
        return [layer.out_size for layer in self._layers.values()]

    @property
    def param_nums(self) -> list[int]:
        """Elements of the parameters of each listed submodule."""
        return [layer.num_parameters for layer in self._layers.values()]

    @property
    def training_modes(self) -> list[bool]:
        """Whether each listed submodule is in train mode."""
        return [layer.training for layer in self._layers.values()]

    @property
    def flop_counts(self) -> list[int]:
        """Floating point operations of the example in each listed submodule, a multiply-add counted as two."""
        return [self._flops.get(name, 0) for name in self._layers]

    @property
    def total_training_modes(self) -> dict[str, int]:
        """How many submodules of the whole model are in ``"train"`` and in ``"eval"`` mode."""
        modes = [module.training for module in self._model.modules()][1:]
        return {"train": modes.count(True), "eval": modes.count(False)}

    @property
    def total_parameters(self) -> int:
        """Elements of all parameters; one that is shared counts once."""
        return self._total

    @property
    def trainable_parameters(self) -> int:
        """Elements of the parameters that require a gradient."""
        return self._trainable

    @property
    def total_layer_params(self) -> int:
        """Sum of ``param_nums``: with nested submodules listed, parameters count at every level."""
        return sum(self.param_nums)

    @property
    def model_size(self) -> float:
        """Megabytes (10^6 bytes) of all parameters in the dtypes that they have."""
        return self._bytes / 1e6

    @property
    def total_flops(self) -> int:
        """Floating point operations of the example's forward pass, 0 without an example."""
        return self._flops.get("", self._flops.get("Global", 0))

    @property
    def _leftover(self) -> int:
        """Elements of parameters that belong to no listed top-level submodule."""
        listed = {id(p) for name, module in self.named_modules if "." not in name for p in module.parameters()}
        return sum(_elements(parameter) for parameter in self._model.parameters() if id(parameter) not in listed)

    def _get_summary_data(self) -> list[tuple[str, list[str]]]:
        """The table's columns: a heading and the cells below it."""
        columns: list[tuple[str, list[str]]] = [
            (" ", [str(index) for index in range(len(self._layers))]),
            ("Name", self.layer_names),
            ("Type", self.layer_types),
            ("Params", [get_human_readable_count(number) for number in self.param_nums]),
            ("Mode", ["train" if mode else "eval" for mode in self.training_modes]),
        ]
        if self._flops:
            columns.append(("FLOPs", [get_human_readable_count(number) for number in self.flop_counts]))
            columns.append(("In sizes", [str(size) for size in self.in_sizes]))
            columns.append(("Out sizes", [str(size) for size in self.out_sizes]))
        if self._layers and self._leftover:
            own = {" ": " ", "Name": LEFTOVER_PARAMS_NAME, "Params": get_human_readable_count(self._leftover)}
            for heading, cells in columns:
                cells.append(own.get(heading, NOT_APPLICABLE))
        return columns

    def __str__(self) -> str:
        return format_summary_table(
            self.total_parameters,
            self.trainable_parameters,
            self.model_size,
            self.total_training_modes,
            self.total_flops,
            *self._get_summary_data(),
        )

    __repr__ = __str__


def summarize(lightning_module: nn.Module, max_depth: int = 1) -> ModelSummary:
    """A ``ModelSummary`` of any module; print it to see the table."""
    return ModelSummary(lightning_module, max_depth=max_depth)


def format_summary_table(
    total_parameters: int,
    trainable_parameters: int,
    model_size: float,
    total_training_modes: Mapping[str, int],
    total_flops: int,
    *columns: tuple[str, Sequence[str]],
) -> str:
    """The columns side by side, and the totals below, as plain text."""
    widths = [max([len(heading), *map(len, cells)]) for heading, cells in columns]
    header = " | ".join(heading.ljust(width) for (heading, _), width in zip(columns, widths, strict=True))
    rule = "-" * len(header)
    rows = [
        " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in zip(*(cells for _, cells in columns), strict=True)
    ]
    totals = [
        (get_human_readable_count(trainable_parameters), "Trainable params"),
        (get_human_readable_count(total_parameters - trainable_parameters), "Non-trainable params"),
        (get_human_readable_count(total_parameters), "Total params"),
        (get_formatted_model_size(model_size), "Total estimated model params size (MB)"),
        (str(total_training_modes["train"]), "Modules in train mode"),
        (str(total_training_modes["eval"]), "Modules in eval mode"),
    ]
    if total_flops:
        totals.append((get_human_readable_count(total_flops), "Total FLOPs"))
    below = [f"{value:<10}{label}" for value, label in totals]
    table = [header, rule, *rows, rule] if rows else []
    return "\n".join(line.rstrip() for line in (*table, *below))


def get_human_readable_count(number: int) -> str:
    """``123``, ``1.2 K``, ``12.3 M``, ``123 B``: at most three digits, up to trillions.

    Raises:
        ValueError: ``number`` is negative.
    """
    if number < 0:
        raise ValueError(f"a count of {number!r} is negative: counts start at 0.")
    units = ("", " K", " M", " B", " T")
    power = min(len(str(int(number))) - 1, 3 * len(units) - 1) // 3
    scaled = number / 1000**power
    if power == 0:
        return str(int(number))
    return f"{int(scaled):,d}{units[power]}" if scaled >= 100 else f"{math.floor(scaled * 10) / 10:.1f}{units[power]}"


def get_formatted_model_size(total_model_size: float) -> str:
    """Megabytes with three decimals."""
    return f"{total_model_size:,.3f}"


def parse_batch_shape(batch: object) -> object:
    """Shape of a tensor as a list; of a list or tuple, a list of those; ``"?"`` for anything else."""
    if isinstance(batch, Tensor):
        return list(batch.shape)
    if isinstance(batch, (list, tuple)):
        return [parse_batch_shape(each) for each in cast("Sequence[object]", batch)]
    if isinstance(batch, Mapping):
        return [parse_batch_shape(each) for each in cast("Mapping[object, object]", batch).values()]
    return UNKNOWN_SIZE


def _is_lazy(parameter: Tensor) -> bool:
    return isinstance(parameter, nn.UninitializedParameter)


def _elements(parameter: Tensor) -> int:
    """Elements of the whole parameter: DTensor counts that way, DeepSpeed keeps the number aside."""
    if _is_lazy(parameter):
        return 0
    aside: int | None = getattr(parameter, "ds_numel", None)
    return parameter.numel() if aside is None else aside


def _element_bytes(parameter: Tensor) -> int:
    return 0 if _is_lazy(parameter) else parameter.element_size()


def _to_device_of(model: nn.Module, example: object) -> object:
    """The example where the model is; a LightningModule moves it as it moves a batch."""
    tensor = next((t for t in (*model.parameters(), *model.buffers())), None)
    if tensor is None:
        return example
    module: Any = model
    if not hasattr(module, "transfer_batch_to_device"):
        return _moved(example, tensor.device)
    moved = module.transfer_batch_to_device(module.on_before_batch_transfer(example, 0), tensor.device, 0)
    return module.on_after_batch_transfer(moved, 0)


def _moved(value: object, device: torch.device) -> object:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: _moved(each, device) for name, each in cast("Mapping[object, object]", value).items()}
    if isinstance(value, (list, tuple)):
        return [_moved(each, device) for each in cast("Sequence[object]", value)]
    return value


@contextmanager
def _unchanged(model: nn.Module) -> Generator[None]:
    """Eval mode within; afterwards every submodule's mode and the random state are what they were."""
    modes = [(module, module.training) for module in model.modules()]
    cuda = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=cuda):
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode


def _cast_for(model: nn.Module, example: object) -> object:
    """The example in the dtype of a batch, for a module that is attached to a Trainer."""
    trainer = _trainer_of(model)
    if trainer is None or supports(trainer.assembly.strategy, SupportsPrecisionPlan):  # which casts in forward itself
        return example
    precision = trainer.assembly.precision
    return precision.convert_input(example) if supports(precision, SupportsInputConversion) else example


def _precision_of(model: nn.Module) -> Any:
    """The forward context of the Trainer's precision, for a module that is attached to one."""
    context = getattr(getattr(_trainer_of(model), "precision_plugin", None), "forward_context", None)
    return nullcontext() if context is None else context()


def _trainer_of(model: nn.Module) -> Any:
    return model.__dict__.get("_trainer")
