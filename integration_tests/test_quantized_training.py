"""Trainer and Fabric with float8, quantized and stochastically rounded weights, on the CPU."""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fulmen
from fulmen.plugins import BitsandbytesPrecision, Float8Precision

if TYPE_CHECKING:
    from pathlib import Path

has_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao")
has_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


class Regression(fulmen.LightningModule):
    """Two wide layers and a small one."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32))
        self.head = nn.Linear(32, 1)
        self.losses: list[float] = []

    def training_step(self, batch: Any) -> torch.Tensor:
        x, y = batch
        loss = nn.functional.mse_loss(self.head(self.body(x)).float(), y.float())
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any) -> None:
        x, y = batch
        self.log("val_loss", nn.functional.mse_loss(self.head(self.body(x)).float(), y.float()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam((p for p in self.parameters() if p.requires_grad), lr=3e-3)


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 32, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :4].sum(dim=1, keepdim=True)), batch_size=16)


def trainer(folder: Path, **options: Any) -> fulmen.Trainer:
    return fulmen.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **{"enable_checkpointing": False, "max_epochs": 10, **options},
    )


def fitted(folder: Path, ckpt: Path | None = None, **options: Any) -> tuple[fulmen.Trainer, Regression]:
    torch.manual_seed(1)
    model, one = Regression(), trainer(folder, **options)
    one.fit(model, loader(), ckpt_path=ckpt)
    return one, model


@has_torchao
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_float8_trains_like_bfloat16_and_its_checkpoints_are_anybodys(tmp_path: Path, weights: torch.dtype) -> None:
    plugin = Float8Precision(weights, device="cpu", emulate=True, min_features=32)
    _, plain = fitted(tmp_path, precision="bf16-mixed")

    run, model = fitted(tmp_path, plugins=plugin)

    assert plugin.converted == ("body.0", "body.2")
    assert model.losses[-1] < model.losses[0] / 5
    assert sum(model.losses) == pytest.approx(sum(plain.losses), rel=0.15)
    run.save_checkpoint(tmp_path / "one.ckpt")
    read = Regression.load_from_checkpoint(tmp_path / "one.ckpt")
    for name, weight in read.state_dict().items():
        assert torch.equal(weight.to(weights), model.state_dict()[name])


@has_torchao
def test_a_float8_run_goes_on_bit_for_bit_and_may_be_fitted_again(tmp_path: Path) -> None:
    def plugin() -> Float8Precision:
        return Float8Precision(device="cpu", emulate=True, min_features=32)

    first, model = fitted(tmp_path, plugins=plugin(), max_epochs=5)
    first.save_checkpoint(tmp_path / "half.ckpt")
    first.fit_loop.max_epochs = 10
    first.fit(model, loader())  # the module has been converted before
    assert sum(model.losses[-4:]) < sum(model.losses[16:20])

    _, resumed = fitted(tmp_path, tmp_path / "half.ckpt", plugins=plugin(), max_epochs=10)
    _, whole = fitted(tmp_path, plugins=plugin(), max_epochs=10)

    for name, weight in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], weight)


@pytest.mark.skipif(find_spec("torchao") is None, reason="without torchao its absence is the error")
@pytest.mark.parametrize("name", ["fp8-mixed", "fp8-bf16"])
def test_float8_by_name_is_refused_on_a_cpu_before_anything_starts(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}.*compute capability 8\.9"):
        trainer(tmp_path, precision=name)


@pytest.mark.proves("3.12")
@pytest.mark.skipif(find_spec("transformer_engine") is not None, reason="Transformer Engine is installed")
@pytest.mark.parametrize("name", ["transformer-engine", "transformer-engine-float16"])
def test_transformer_engine_by_name_says_what_is_missing(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}.*pip install 'transformer-engine"):
        trainer(tmp_path, precision=name)


@pytest.mark.proves("3.13")
@has_bitsandbytes
@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "int8-training"])
def test_a_quantized_model_trains_and_goes_on_from_its_checkpoint_bit_for_bit(tmp_path: Path, mode: Any) -> None:
    def plugin() -> BitsandbytesPrecision:
        return BitsandbytesPrecision(mode, dtype=torch.float32, ignore_modules={"head"}, device="cpu")

    first, model = fitted(tmp_path, plugins=plugin(), max_epochs=5)
    first.save_checkpoint(tmp_path / "half.ckpt")

    _, resumed = fitted(tmp_path, tmp_path / "half.ckpt", plugins=plugin())
    _, whole = fitted(tmp_path, plugins=plugin())

    assert sum(whole.losses[-4:]) < sum(whole.losses[:4])  # one epoch has four batches
    assert [*model.losses, *resumed.losses] == whole.losses
    for name, weight in whole.state_dict().items():
        assert not isinstance(weight, torch.Tensor) or torch.equal(resumed.state_dict()[name], weight)


@pytest.mark.proves("3.13")
@has_bitsandbytes
@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "int8-training"])
def test_a_run_validates_with_quantized_weights(tmp_path: Path, mode: Any) -> None:
    torch.manual_seed(1)
    model, run = Regression(), trainer(tmp_path, plugins=BitsandbytesPrecision(mode, torch.float32, {"head"}))

    run.fit(model, loader(), loader())

    validated = run.callback_metrics["val_loss"].item()
    assert validated == pytest.approx(sum(model.losses[-4:]) / 4, rel=0.2)
    assert validated < sum(model.losses[:4]) / 4


@pytest.mark.proves("3.13")
@has_bitsandbytes
def test_a_fabric_user_makes_the_model_quantized(tmp_path: Path) -> None:
    precision = BitsandbytesPrecision("nf4", dtype=torch.float32, device="cpu")
    fabric = fulmen.Fabric(accelerator="cpu", devices=1, plugins=precision)
    with fabric.init_module():
        model = nn.Sequential(nn.Linear(32, 64), nn.LayerNorm(64))
    assert model[0].weight.dtype is torch.uint8

    placed = fabric.setup(model)

    out = placed(torch.randn(2, 32))
    fabric.backward(out.sum())
    assert model[1].weight.grad is not None
    assert model[0].weight.grad is None


def test_stochastic_rounding_by_name_goes_on_bit_for_bit(tmp_path: Path) -> None:
    name = "bf16-true-stochastic"
    first, model = fitted(tmp_path, precision=name, max_epochs=5)
    first.save_checkpoint(tmp_path / "half.ckpt")

    _, resumed = fitted(tmp_path, tmp_path / "half.ckpt", precision=name)
    _, whole = fitted(tmp_path, precision=name)

    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert first.optimizers[0].state[model.head.weight]["exp_avg"].dtype is torch.float32
    for got, want in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("precision", "said"),
    [
        ("32-true", r"32-true \(float32 throughout\)"),
        ("bf16-true", r"bf16-true \(bfloat16 throughout\)"),
        (
            "16-mixed",
            r"16-mixed \(parameters float32, optimizer state float32, products float16, gradients summed in float32, "
            r"losses scaled\)",
        ),
        (
            "bf16-true-stochastic",
            r"\(parameters bfloat16, optimizer state float32, products bfloat16, gradients summed in bfloat16\)",
        ),
    ],
)
def test_the_first_line_says_what_is_kept_and_computed_in_which_dtype(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, precision: str, said: str
) -> None:
    with caplog.at_level("INFO"):
        trainer(tmp_path, precision=precision)

    assert re.search(said, caplog.text)


@has_torchao
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_float8_composes_with_fsdp(tmp_path: Path, weights: torch.dtype) -> None:
    """One rank: what matters is that the layers compute in float8 while FSDP keeps and casts their shards."""

    def run(strategy: str) -> tuple[Regression, Float8Precision]:
        plugin = Float8Precision(weights, device="cpu", emulate=True, min_features=32)
        return fitted(tmp_path / strategy, plugins=plugin, strategy=strategy, devices=1, max_epochs=5)[1], plugin

    sharded, plugin = run("fsdp")
    single, _ = run("single_device")

    assert plugin.converted == ("body.0", "body.2")
    assert sharded.losses[-1] < sharded.losses[0]
    assert sharded.losses == pytest.approx(single.losses, rel=0.1)


@has_bitsandbytes
def test_packed_weights_are_not_sharded(tmp_path: Path) -> None:
    plugin = BitsandbytesPrecision("nf4", dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match=r"mode='nf4'.*neither sharded nor cast.*strategy='ddp'"):
        fitted(tmp_path, plugins=plugin, strategy="fsdp", devices=1)
