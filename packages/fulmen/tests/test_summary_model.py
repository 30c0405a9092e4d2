"""ModelSummary against counts by hand, and at the start of a real fit."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fulmen import LightningModule, Trainer
from fulmen.callbacks import ModelSummary as SummaryCallback
from fulmen.callbacks import RichModelSummary
from fulmen.utilities.model_summary import (
    ModelSummary,
    get_formatted_model_size,
    get_human_readable_count,
    parse_batch_shape,
    summarize,
)
from fulmen_protocols.errors import MisconfigurationException, MissingPackage


class Net(LightningModule):
    def __init__(self, example: Any = None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
        self.head = nn.Linear(3, 2)
        self.scale = nn.Parameter(torch.ones(7))
        self.head.weight.requires_grad = False
        self.example_input_array = example

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch[0]).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.proves("13.9")
def test_parameters_are_counted_as_torch_counts_them() -> None:
    summary = summarize(Net())
    assert summary.total_parameters == 4 * 3 + 3 + 3 + 3 + 3 * 2 + 2 + 7
    assert summary.trainable_parameters == summary.total_parameters - 6
    assert summary.param_nums == [21, 8]
    assert summary.model_size == pytest.approx(4 * 36 / 1e6)
    assert summary.layer_names == ["body", "head"]
    assert summary.layer_types == ["Sequential", "Linear"]


@pytest.mark.proves("13.9")
def test_parameters_of_no_submodule_have_a_row_of_their_own() -> None:
    table = str(summarize(Net()))
    (row,) = [line for line in table.splitlines() if "other params" in line]
    assert [cell.strip() for cell in row.split("|")] == ["", "other params", "n/a", "7", "n/a"]


@pytest.mark.proves("13.9")
@pytest.mark.parametrize(
    ("depth", "names"),
    [(0, []), (1, ["body", "head"]), (2, ["body", "body.0", "body.1", "body.2", "head"])],
)
def test_the_depth_says_which_levels_are_listed(depth: int, names: list[str]) -> None:
    assert summarize(Net(), max_depth=depth).layer_names == names
    assert summarize(Net(), max_depth=-1).layer_names == ["body", "body.0", "body.1", "body.2", "head"]


@pytest.mark.parametrize("depth", [-2, 1.5, "1", None])
def test_another_depth_is_refused(depth: Any) -> None:
    with pytest.raises(MisconfigurationException, match="max_depth"):
        ModelSummary(Net(), max_depth=depth)


@pytest.mark.proves("13.9")
def test_an_example_shows_sizes_and_operations() -> None:
    summary = summarize(Net(torch.zeros(5, 4)))
    assert summary.in_sizes == [[5, 4], [5, 3]]
    assert summary.out_sizes == [[5, 3], [5, 2]]
    assert summary.flop_counts == [2 * 5 * 4 * 3, 2 * 5 * 3 * 2]
    assert summary.total_flops == sum(summary.flop_counts)


@pytest.mark.parametrize("example", [(torch.zeros(5, 4),), {"x": torch.zeros(5, 4)}])
def test_an_example_may_be_arguments(example: Any) -> None:
    assert summarize(Net(example)).in_sizes[0] == [5, 4]


@pytest.mark.proves("13.9")
def test_trying_the_example_changes_nothing() -> None:
    net = Net(torch.randn(5, 4))
    net.body.eval()
    mean = net.body[1].running_mean.clone()
    torch.manual_seed(1)
    expected = torch.rand(3)

    torch.manual_seed(1)
    summary = summarize(net, max_depth=-1)

    assert torch.equal(torch.rand(3), expected), "the random state is kept"
    assert torch.equal(net.body[1].running_mean, mean)
    assert (net.training, net.body.training, net.head.training) == (True, False, True)
    assert all(not module._forward_hooks for module in net.modules())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert summary.training_modes == [False] * 4 + [True]
    assert summary.total_training_modes == {"train": 1, "eval": 4}


def test_an_example_that_does_not_fit_is_said_and_the_summary_goes_on() -> None:
    with pytest.warns(UserWarning, match="example_input_array did not go through Net.forward"):
        summary = summarize(Net(torch.zeros(5, 99)))
    assert summary.total_parameters == 36
    assert summary.in_sizes == ["?", "?"] or summary.out_sizes == ["?", "?"]


@pytest.mark.proves("13.9")
def test_lazy_parameters_count_nothing_and_are_said() -> None:
    with pytest.warns(UserWarning, match="lazy parameters"):
        summary = summarize(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2)))
    assert summary.param_nums == [0, 8]


@pytest.mark.proves("13.9")
def test_shared_parameters_count_once_in_total() -> None:
    net = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    net["b"].weight = net["a"].weight
    summary = summarize(net)
    assert summary.total_parameters == 9 + 3 + 3
    assert summary.total_layer_params == 12 + 12


@pytest.mark.proves("13.9")
def test_the_size_is_that_of_the_dtypes() -> None:
    net = nn.Sequential(nn.Linear(1000, 1000, bias=False), nn.Linear(1000, 1000, bias=False).half())
    assert summarize(net).model_size == pytest.approx(4 + 2)


@pytest.mark.proves("13.9")
def test_shards_count_as_the_whole() -> None:
    net = nn.Linear(2, 2, bias=False)
    net.weight.ds_numel = 1000  # as DeepSpeed leaves it  # type: ignore[assignment]  # replaced on purpose
    assert summarize(net).total_parameters == 1000


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (123, "123"),
        (999, "999"),
        (1234, "1.2 K"),
        (1999, "1.9 K"),
        (123456, "123 K"),
        (2_000_000, "2.0 M"),
        (3_500_000_000, "3.5 B"),
        (4_000_000_000_000, "4.0 T"),
        (5_000_000_000_000_000, "5,000 T"),
    ],
)
def test_counts_are_written_for_people(number: int, text: str) -> None:
    assert get_human_readable_count(number) == text


def test_negative_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        get_human_readable_count(-1)


def test_sizes_are_written_with_three_decimals() -> None:
    assert get_formatted_model_size(1234.56789) == "1,234.568"


def test_shapes_are_found_in_lists_and_dicts() -> None:
    assert parse_batch_shape(torch.zeros(2, 3)) == [2, 3]
    assert parse_batch_shape([torch.zeros(2), (torch.zeros(3), None)]) == [[2], [[3], "?"]]
    assert parse_batch_shape({"a": torch.zeros(2)}) == [[2]]


def test_the_example_goes_to_the_device_as_a_batch_does() -> None:
    class Boxed(Net):
        """Its batches are text, which only its own hooks make tensors of."""

        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return torch.tensor([float(word) for word in batch.split()])

        def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
            return batch.to(device)[None]

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch.expand(6, -1)

    assert summarize(Boxed("1 2 3 4")).in_sizes == [[6, 4], [6, 3]]


def test_a_fused_layer_is_counted_as_what_it_consists_of() -> None:
    net: Any = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    net.example_input_array = torch.zeros(3, 5, 8)
    projections, attention = 2 * 3 * 5 * 8 * (3 * 8 + 8 + 16 + 16), 2 * 2 * 3 * 5 * 5 * 8
    assert summarize(net).total_flops == pytest.approx(projections + attention, rel=0.02)


def fit(callback: Any) -> None:
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[callback],
    )
    trainer.fit(Net(torch.zeros(5, 4)), DataLoader(TensorDataset(torch.ones(4, 4)), batch_size=2))


@pytest.mark.proves("11.19")
@pytest.mark.parametrize("kind", [SummaryCallback, RichModelSummary])
def test_a_fit_begins_with_the_summary(kind: type[Any], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "160")
        fit(kind(max_depth=2))
    captured = capsys.readouterr()
    shown = captured.out + captured.err
    for expected in ("body.1", "BatchNorm1d", "other params", "Total params", "36", "[5, 4]"):
        assert expected in shown, expected


@pytest.mark.proves("11.19")
@pytest.mark.parametrize("kind", [SummaryCallback, RichModelSummary])
def test_depth_zero_prints_nothing(kind: type[Any], capsys: pytest.CaptureFixture[str]) -> None:
    fit(kind(max_depth=0))
    captured = capsys.readouterr()
    assert "Total params" not in captured.out + captured.err


@pytest.mark.proves("11.19")
@pytest.mark.parametrize("kind", [SummaryCallback, RichModelSummary])
def test_every_level_is_listed_with_minus_one_and_nothing_outside_of_fit(
    kind: type[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")

    class Tested(Net):
        def test_step(self, batch: Any, batch_idx: int) -> None: ...

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=1, accelerator="cpu", callbacks=[kind(max_depth=-1)], **quiet)  # type: ignore[arg-type]  # options of many types
    loader = DataLoader(TensorDataset(torch.ones(4, 4)), batch_size=2)
    trainer.test(Tested(), loader, verbose=False)
    assert "Total params" not in capsys.readouterr().out
    trainer.fit(Tested(), loader)
    assert "body.2" in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_the_example_is_cast_as_a_batch_is(precision: Any, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Trainer(
        precision=precision,
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )

    trainer.fit(Net(torch.zeros(5, 4)), DataLoader(TensorDataset(torch.ones(4, 4)), batch_size=2))

    assert "[5, 4]" in capsys.readouterr().out


def test_how_it_is_printed_can_be_overridden() -> None:
    got: dict[str, Any] = {}

    class Mine(SummaryCallback):
        @staticmethod
        def summarize(summary_data: Any, total_parameters: int, *rest: Any, **options: Any) -> None:
            got.update(columns=[heading for heading, _ in summary_data], total=total_parameters, **options)

    fit(Mine(max_depth=1, header_style="blue"))
    assert got["total"] == 36
    assert got["header_style"] == "blue"
    assert got["columns"] == [" ", "Name", "Type", "Params", "Mode", "FLOPs", "In sizes", "Out sizes"]


def test_missing_rich_names_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(MissingPackage, match=r"pip install 'fulmen\[rich\]'"):
        RichModelSummary()
