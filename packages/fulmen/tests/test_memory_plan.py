"""A memory plan against arithmetic, against formulas, and against what a real step saves."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import fulmen
from fulmen.memory_plan import MemoryPlan
from fulmen_protocols import BackendUnavailable, MisconfigurationException

FLOAT = 4


class MLP(fulmen.LightningModule):
    def __init__(self, inputs: int = 32, hidden: int = 64, outputs: int = 16, optimizer: str = "AdamW") -> None:
        super().__init__()
        self.optimizer = optimizer
        self.net = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]  # torch says Any of it

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.mse_loss(self(x), y)

    def configure_optimizers(self) -> Any:
        momentum = {"momentum": 0.9} if self.optimizer == "SGD" else {}
        return getattr(torch.optim, self.optimizer)(self.parameters(), lr=0.1, **momentum)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + F.dropout(self.out(attended), self.dropout)
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]  # torch says Any of it


class LanguageModel(fulmen.LightningModule):
    def __init__(self, width: int = 64, layers: int = 3, heads: int = 4, vocabulary: int = 100) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        logits = self.head(self.blocks(self.tokens(batch[:, :-1])))
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


def trainer(**arguments: Any) -> fulmen.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "max_steps": 1, "accelerator": "cpu", "devices": 1}
    return fulmen.Trainer(**{**quiet, **arguments})


def saved_bytes(module: fulmen.LightningModule, batch: Any) -> int:
    """What a real step keeps for backward beside parameters and batch, each storage once, and the loss."""
    known = {tensor.untyped_storage().data_ptr() for tensor in module.parameters()}
    known |= {tensor.untyped_storage().data_ptr() for tensor in ([batch] if isinstance(batch, Tensor) else batch)}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = module.training_step(batch, 0)
    return sum(kept.values()) + loss.nbytes  # kept are alive: the graph of the loss holds them


# ---------------------------------------------------------------------- parameters, gradients, optimizer


@pytest.mark.parametrize(("optimizer", "states"), [("AdamW", 2), ("SGD", 1), ("Adagrad", 1)])
def test_parameters_gradients_and_optimizer_state_are_what_arithmetic_says(optimizer: str, states: int) -> None:
    count = 32 * 64 + 64 + 64 * 16 + 16
    plan = trainer().plan(lambda: MLP(optimizer=optimizer), batch="float32[8,32],float32[8,16]")
    assert plan.parameter_count == plan.trainable_count == count
    assert plan.parameters == plan.gradients == FLOAT * count
    steps = 0 if optimizer == "SGD" else 4 * FLOAT  # one number for each of the four parameters
    assert plan.optimizer == states * FLOAT * count + steps
    assert plan.checkpoint == plan.checkpoint_per_rank == FLOAT * count + plan.optimizer


def test_frozen_parameters_have_neither_gradient_nor_state() -> None:
    module = MLP()
    module.net[0].requires_grad_(False)
    plan = trainer().plan(module, batch="float32[8,32],float32[8,16]")
    trained = 64 * 16 + 16
    assert plan.trainable_count == trained
    assert plan.gradients == FLOAT * trained
    assert plan.optimizer == 2 * FLOAT * trained + 2 * FLOAT


def test_true_precision_halves_what_is_stored() -> None:
    whole = trainer().plan(MLP, batch="float32[8,32],float32[8,16]")
    half = trainer(precision="bf16-true").plan(MLP, batch="float32[8,32],float32[8,16]")
    assert (half.parameters, half.gradients) == (whole.parameters // 2, whole.gradients // 2)
    assert {group.dtype for group in half.groups} == {"bfloat16"}


def test_a_shared_parameter_counts_once() -> None:
    class Tied(LanguageModel):
        def __init__(self) -> None:
            super().__init__()
            self.head.weight = self.tokens.weight

    tied, apart = trainer().plan(Tied, batch="int64[2,9]"), trainer().plan(LanguageModel, batch="int64[2,9]")
    assert apart.parameters - tied.parameters == FLOAT * 100 * 64
    assert trainer(precision="bf16-true").plan(Tied(), batch="int64[2,9]").parameters == tied.parameters // 2


# ---------------------------------------------------------------------- activations


def test_activations_of_an_mlp_follow_its_formula() -> None:
    batch, hidden, outputs = 1024, 64, 16
    plan = trainer().plan(MLP, batch=f"float32[{batch},32],float32[{batch},{outputs}]", device="cpu")
    # ReLU saves its result, which the second layer saves too; the loss saves the prediction.
    assert plan.activations == FLOAT * (batch * hidden + batch * outputs + 1)


@pytest.mark.parametrize("model", [MLP, LanguageModel])
def test_activations_are_the_bytes_that_a_real_step_saves(model: type[fulmen.LightningModule]) -> None:
    batch: Any = (torch.randn(128, 32), torch.randn(128, 16)) if model is MLP else torch.randint(0, 100, (4, 33))
    plan = trainer().plan(model, batch=batch, device="cpu")
    assert plan.activations == saved_bytes(model(), batch)


def test_activations_of_a_transformer_grow_linearly_in_length_and_layers() -> None:
    def activations(layers: int, length: int, device: str) -> int:
        made = trainer().plan(lambda: LanguageModel(layers=layers), batch=f"int64[4,{length + 1}]", device=device)
        return made.activations

    for device in ("cpu", "cuda"):
        first, second, third = (activations(layers, 128, device) for layers in (1, 2, 3))
        assert third - second == second - first
        # Of one layer and token: 17 vectors of the width (input of either norm, q, k, v, attention's result, the
        # projections' and the MLP's inputs), 2 x 2 numbers of the norms, and one per head of the softmax.
        longer = activations(2, 256, device) - activations(1, 256, device)
        assert longer == pytest.approx(2 * (second - first), rel=0.02)  # no length x length matrix of scores


def test_cuda_keeps_a_byte_for_each_element_of_a_dropout_mask_and_a_cpu_four() -> None:
    class Dropping(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.net(x), 0.5)

    batch = "float32[1024,32],float32[1024,16]"
    mask = 1024 * 16
    cpu = trainer().plan(Dropping, batch=batch, device="cpu").activations
    cuda = trainer().plan(Dropping, batch=batch, device="cuda").activations
    assert cpu - cuda == pytest.approx((FLOAT - 1) * mask, abs=1024)


def test_cuda_saves_of_a_root_mean_square_norm_its_input_and_a_number_a_row() -> None:
    class Normed(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return F.rms_norm(self.net(x), (16,), self.weight, 1e-5)

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(16))

    batch, rows = "float32[1024,32],float32[1024,16]", 1024
    plain = trainer().plan(MLP, batch=batch, device="cuda").activations
    normed = trainer().plan(Normed, batch=batch, device="cuda").activations
    # The norm's input, and its result where the loss had saved that input.
    assert normed - plain == pytest.approx(FLOAT * (rows * 16 + rows), abs=1024)


def test_autocast_on_cuda_takes_the_softmax_of_the_loss_in_float32() -> None:
    class Head(fulmen.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 4096, bias=False)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.head(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    plan = trainer(precision="bf16-mixed").plan(Head, batch="float32[512,8],int64[512]")
    logits = 512 * 4096
    # Saved: the logarithm of the softmax in float32, the input in bfloat16.
    assert plan.activations == pytest.approx(FLOAT * logits + 2 * 512 * 8, abs=2048)


def test_the_peak_is_reached_when_backward_begins_or_while_the_optimizer_steps() -> None:
    large = trainer().plan(MLP, batch="float32[65536,32],float32[65536,16]")
    assert large.peak_during == "backward"
    assert large.peak >= large.parameters + large.optimizer + large.activations
    small = trainer().plan(lambda: MLP(hidden=4096), batch="float32[1,32],float32[1,16]")
    assert small.peak_during == "optimizer step"
    # Adam on CUDA updates all parameters at once, with one copy of them on the way.
    assert small.peak == pytest.approx(
        small.parameters + small.gradients + small.optimizer + small.parameters, rel=0.01
    )
    for plan in (large, small):
        assert sum(plan.at_peak.values()) == plan.peak


def test_half_precision_with_a_scaler_and_manual_optimization_can_be_planned() -> None:
    class Manual(MLP):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            optimizer: Any = self.optimizers()
            loss = F.mse_loss(self(batch[0]), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    batch = "float32[64,32],float32[64,16]"
    automatic, manual = trainer().plan(MLP, batch=batch), trainer().plan(Manual, batch=batch)
    assert (manual.parameters, manual.gradients, manual.optimizer) == (
        automatic.parameters,
        automatic.gradients,
        automatic.optimizer,
    )
    assert manual.activations == automatic.activations
    half = trainer(precision="16-mixed", gradient_clip_val=1.0).plan(MLP, batch=batch)
    assert half.gradients == automatic.gradients


# ---------------------------------------------------------------------- ranks


def test_ddp_on_1024_ranks_adds_its_buckets_and_nothing_else() -> None:
    batch = "float32[8,32],float32[8,16]"
    one = trainer().plan(MLP, batch=batch)
    many = trainer(strategy="ddp", devices=1024).plan(MLP, batch=batch)
    assert many.world_size == 1024
    assert many.communication == pytest.approx(many.gradients, abs=512)
    assert (many.parameters, many.gradients, many.optimizer) == (one.parameters, one.gradients, one.optimizer)
    assert {group.placement for group in many.groups} == {"whole"}
    assert not dist.is_initialized()
    strategy = fulmen.strategies.DDPStrategy(gradient_as_bucket_view=True)
    assert trainer(strategy=strategy, devices=4).plan(MLP, batch=batch).communication == 0


def test_a_model_larger_than_this_machine_is_planned_from_its_class_or_its_instance() -> None:
    plan = trainer().plan(lambda: MLP(inputs=2**17, hidden=2**17), batch=f"float32[2,{2**17}],float32[2,16]")
    assert plan.parameters > 64 * 2**30  # 64 GiB
    module = MLP()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer().plan(module, batch="float32[8,32],float32[8,16]")
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_a_trainer_fits_after_it_has_planned() -> None:
    data = torch.utils.data.TensorDataset(torch.randn(8, 32), torch.randn(8, 16))
    runs, module = trainer(enable_progress_bar=False, enable_model_summary=False), MLP()
    before = module.net[0].weight.clone()
    runs.plan(module, batch="float32[8,32],float32[8,16]")
    runs.fit(module, torch.utils.data.DataLoader(data, batch_size=4))
    assert not torch.equal(before, module.net[0].weight)


# ---------------------------------------------------------------------- batches


def test_the_batch_comes_from_the_loader_the_example_or_the_text() -> None:
    class Fed(MLP):
        def train_dataloader(self) -> Any:
            data = torch.utils.data.TensorDataset(torch.randn(32, 32), torch.randn(32, 16))
            return torch.utils.data.DataLoader(data, batch_size=4)

    class Shown(MLP):
        example_input_array = torch.zeros(4, 32)

    class Named(MLP):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step((batch["x"], batch["y"]), batch_idx)
            self.log("loss", loss, prog_bar=True)
            return loss

    class Data(fulmen.LightningDataModule):
        def train_dataloader(self) -> Any:
            return [(torch.zeros(4, 32), torch.zeros(4, 16))]

    text = trainer().plan(MLP, batch="f32[4,32],f32[4,16]")
    assert trainer().plan(Fed).activations == text.activations
    assert trainer().plan(MLP, datamodule=Data()).activations == text.activations
    assert trainer().plan(Named, batch="x=float32[4,32], y=float32[4,16]").activations == text.activations
    shown = trainer().plan(Shown)
    assert "example_input_array" in shown.notes[0]
    assert shown.parameters == text.parameters
    assert trainer().plan(Fed, batch_size=64).batch == "float32[64, 32], float32[64, 16]"


# ---------------------------------------------------------------------- bad input


def refused(expected: str, **arguments: Any) -> None:
    module = arguments.pop("module", MLP)
    with pytest.raises(MisconfigurationException, match=expected):
        trainer(**arguments.pop("trainer", {})).plan(module, **arguments)


def test_bad_input_is_refused_with_what_to_do() -> None:
    refused(r"batch=None, and MLP has neither .* Give the batch of one rank, for example batch='int64")
    refused(r"device='tpu': a plan is for 'cuda' or for 'cpu'", device="tpu")
    refused(
        r"batch='flaot32\[3\]' cannot be read: torch has no dtype 'flaot32'\. Did you mean 'float32'",
        batch="flaot32[3]",
    )
    refused(r"batch='float32\[3' cannot be read: .* Write it like one of", batch="float32[3")
    refused(r"batch='x=float32\[3\],int64\[3\]' cannot be read: either every", batch="x=float32[3],int64[3]")
    refused(r"batch_size=0: give at least 1", batch="float32[8,32],float32[8,16]", batch_size=0)
    refused(r"batch_size=4 was given, but the batch .* has no tensor", batch=[3], batch_size=4)
    refused(r"plan\(\) got 3 as its model: give a LightningModule", module=3, batch="float32[3]")
    refused(r"made .* which is no LightningModule", module=lambda: nn.Linear(1, 1), batch="float32[3]")


def test_a_step_that_reads_values_is_refused_with_the_reason() -> None:
    class Reads(MLP):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * 2 if loss.item() > 3 else loss

    refused(
        r"training step of Reads reads a tensor's value .*Keep `\.item\(\)`", module=Reads, batch="f32[8,32],f32[8,16]"
    )


def test_a_real_process_group_is_left_alone(tmp_path: Any) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        refused(
            r"a plan for 2 ranks needs a process of its own", trainer={"strategy": "ddp", "devices": 2}, batch="f32[1]"
        )
        assert dist.get_world_size() == 1
    finally:
        dist.destroy_process_group()


def test_a_torch_without_the_private_parts_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.testing._internal.distributed.fake_pg", None)
    with pytest.raises(BackendUnavailable, match=r"needs torch\.testing\._internal\.distributed\.fake_pg, which torch"):
        trainer(strategy="ddp", devices=2).plan(MLP, batch="f32[8,32],f32[8,16]")


def test_a_plan_prints_its_tables_and_gives_plain_numbers() -> None:
    plan = trainer().plan(MLP, batch="float32[8,32],float32[8,16]")
    text = str(plan)
    for expected in (
        "MLP: 3,152 parameters",
        "1 rank of cuda",
        "optimizer state",
        "net.0.weight",
        "64x32",
        "checkpoint:",
    ):
        assert expected in text
    assert isinstance(plan, MemoryPlan)
    assert plan.to_dict()["parameters"] == plan.parameters
