"""DeepSpeed's own engine on two gloo ranks, and on one, against plain PyTorch: all cases in one run of the ranks.

`python -m tools.deepspeed_session` installs the library and runs this; without it the tests are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fulmen_checkpoint import TorchCheckpointIO
from fulmen_checkpoint.commands import main as checkpoint_command

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    # DeepSpeed calls what torch is about to remove.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]

SCRIPT = Path(__file__).with_name("deepspeed_ranks_script.py")
SAMPLES, BATCH, WINDOW, CLIP = 40, 8, 2, 0.1
STAGES = ["deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"]
SHARDED = STAGES[1:]


@cache
def folder() -> Path:
    return Path(os.environ.get("FULMEN_DEEPSPEED_FOUND") or mkdtemp(prefix="deepspeed-"))


@cache
def found(ranks: int = 2) -> dict[str, Any]:
    file = folder() / f"{ranks}.json"
    if not file.exists():
        if ranks == 1:
            found(2)  # whose checkpoints are loaded
        cases = ["stages,resized"] if ranks == 1 else []
        command = [sys.executable, str(SCRIPT), str(folder()), str(ranks), *cases]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False, env=env)
        assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return json.loads(file.read_text())  # type: ignore[no-any-return]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 2))
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.scale


def by_hand(
    *, epochs: int = 1, window: int = 1, clip: float | None = None, schedule: bool = True, sgd: bool = False
) -> dict[str, Any]:
    """The same training in plain PyTorch, in one process; a window at the end of an epoch may be shorter."""
    net = Net()
    make = torch.Generator().manual_seed(1)
    x, y = torch.randn(SAMPLES, 6, generator=make), torch.randn(SAMPLES, 2, generator=make)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
    if sgd:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    losses: list[float] = []
    batches = SAMPLES // BATCH
    for index in range(epochs * batches):
        at = index % batches
        # Rank r of n reads every n-th sample: together they have the batch.
        loss = F.mse_loss(net(x[at * BATCH : (at + 1) * BATCH]), y[at * BATCH : (at + 1) * BATCH])
        losses.append(loss.item())
        (loss / window).backward()
        if (at + 1) % window == 0 or at + 1 == batches:
            if clip is not None:
                nn.utils.clip_grad_norm_(net.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
            if schedule:
                scheduler.step()
    with torch.no_grad():
        after = F.mse_loss(net(x), y).item()
    return {"losses": losses, "weights": net.state_dict(), "after": after}


def assert_weights(got: dict[str, list[float]], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(torch.tensor(got[name]), value.reshape(-1), rtol=tolerance, atol=tolerance)


@pytest.mark.proves("4.2", "4.3", "4.29")
@pytest.mark.parametrize("name", [*STAGES, "stage_0"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_stage_trains_as_plain_pytorch_with_accumulation_and_clipping(name: str, ranks: int) -> None:
    expected, got = by_hand(window=WINDOW, clip=CLIP), found(ranks)[name]

    assert got["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    assert_weights(got["weights"], expected["weights"])
    assert got["steps"] == 3, "five batches in windows of two: the last is short, and steps all the same"


@pytest.mark.proves("4.29")
def test_the_trainer_steps_the_scheduler_of_the_module_after_each_update_of_the_engine() -> None:
    for name in STAGES:
        assert found()[name]["rates"] == pytest.approx([0.05, 0.05, 0.05, 0.025, 0.025])


@pytest.mark.parametrize("name", STAGES)
def test_what_was_trained_is_evaluated_during_and_after_the_fit(name: str) -> None:
    result = found()[name]

    assert result["validated"] == pytest.approx(result["tested"], rel=1e-6)
    assert result["validated"] == pytest.approx(by_hand(window=WINDOW, clip=CLIP)["after"], rel=1e-4)


@pytest.mark.proves("3.15", "4.28")
def test_bfloat16_follows_full_precision_and_weights_keep_the_precision_s_dtype() -> None:
    expected = by_hand()

    for name in ("bf16-mixed 2", "bf16-mixed 3", "plugin", "bf16-true"):
        assert found()[name]["losses"] == pytest.approx(expected["losses"], rel=0.05), name
    assert found()["plugin"] == found()["bf16-mixed 2"]
    rounded = torch.tensor(found()["bf16-true"]["weights"]["scale"])
    assert torch.equal(rounded, rounded.to(torch.bfloat16).to(rounded.dtype))
    whole = torch.tensor(found()["bf16-mixed 2"]["weights"]["net.0.weight"])
    assert not torch.equal(whole, whole.to(torch.bfloat16).to(whole.dtype)), "the engine's float32 weights"


@pytest.mark.proves("4.30")
@pytest.mark.parametrize("name", SHARDED)
def test_a_resumed_run_ends_with_the_same_bits(name: str) -> None:
    resumed, unbroken = found()[f"resumed {name}"], found()[f"unbroken {name}"]

    assert resumed["losses"] == unbroken["losses"][5:]
    assert resumed["weights"] == unbroken["weights"]
    assert resumed["steps"] == unbroken["steps"] == 6


@pytest.mark.proves("4.30")
@pytest.mark.parametrize("name", SHARDED)
def test_what_two_ranks_saved_resumes_on_one(name: str) -> None:
    resized, unbroken = found(1)[f"resized {name}"], found()[f"unbroken {name}"]

    assert resized["losses"] == pytest.approx(unbroken["losses"][5:], rel=1e-4)
    for entry, values in unbroken["weights"].items():
        assert resized["weights"][entry] == pytest.approx(values, rel=1e-4, abs=1e-5), entry


@pytest.mark.proves("4.30")
@pytest.mark.parametrize("name", SHARDED)
def test_the_folder_has_deepspeed_s_layout_and_consolidates_to_the_gathered_weights(name: str, tmp_path: Path) -> None:
    from fulmen_deepspeed import convert_zero_checkpoint_to_fp32_state_dict

    assert {"checkpoint", "latest", "zero_to_fp32.py"} <= set(found()[f"names {name}"])
    path, out, other = folder() / f"{name}.whole", tmp_path / "one.ckpt", tmp_path / "other.pt"

    assert checkpoint_command(["consolidate", str(path), "-o", str(out)]) == 0
    convert_zero_checkpoint_to_fp32_state_dict(path, other)

    assert checkpoint_command(["verify", str(path)]) == 0
    by_command = TorchCheckpointIO().load_checkpoint(out)
    by_function = torch.load(other, weights_only=True)
    for checkpoint in (by_command, by_function):
        state: dict[str, Tensor] = checkpoint["state_dict"]  # type: ignore[assignment]
        assert state.keys() == found()[f"saved {name}"].keys()
        for entry, values in found()[f"saved {name}"].items():
            assert state[entry].double().reshape(-1).tolist() == values, entry
        assert checkpoint["global_step"] == 3
        assert "optimizer_states" not in checkpoint


@pytest.mark.proves("4.28", "4.30")
@pytest.mark.parametrize("name", SHARDED)
def test_one_file_with_all_weights_is_loaded_where_that_is_said(name: str) -> None:
    assert found()[f"single {name}"] == pytest.approx(found()[f"folder {name}"], rel=1e-6)


@pytest.mark.proves("4.2", "4.3", "4.28")
@pytest.mark.parametrize("name", [f"deepspeed_stage_{stage}_offload" for stage in (1, 2, 3)])
def test_offloading_to_host_memory_trains_as_plain_pytorch(name: str) -> None:
    expected, got = by_hand(schedule=False), found()[name]

    assert got["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    assert_weights(got["weights"], expected["weights"])


@pytest.mark.proves("4.28")
def test_a_model_that_is_spread_as_it_is_made_trains_as_one_made_before() -> None:
    assert found()["made late"]["losses"] == pytest.approx(found()["deepspeed_stage_3"]["losses"], rel=1e-4)


@pytest.mark.proves("4.29")
def test_the_engine_is_told_the_size_of_the_loader_s_batches() -> None:
    assert found()["deepspeed_stage_2"]["batch"] == BATCH // 2


@pytest.mark.proves("4.28", "4.29")
def test_the_configuration_may_define_the_optimizer_and_the_scheduler() -> None:
    result, alone = found()["configured"], found()["configured alone"]

    assert alone["losses"] == pytest.approx(by_hand()["losses"], rel=1e-4), "the module's own, as without a config"
    assert result["losses"][0] == pytest.approx(alone["losses"][0])
    assert result["steps"] == 5
    warmup = [0.05 * step / 4 for step in range(5)]
    assert result["rates"][-1] == pytest.approx(0.05)
    assert result["rates"] == sorted(result["rates"])
    assert all(any(abs(rate - one) < 1e-6 for one in warmup) for rate in result["rates"])


@pytest.mark.parametrize("name", SHARDED)
def test_manual_optimization_steps_the_engine(name: str) -> None:
    assert found()[f"manual {name}"]["losses"] == pytest.approx(by_hand(schedule=False)["losses"], rel=1e-4)
    assert_weights(found()[f"manual {name}"]["weights"], by_hand(schedule=False)["weights"])


@pytest.mark.proves("4.29")
def test_hooks_that_the_engine_goes_past_are_named() -> None:
    told = " ".join(found()["overridden"])

    assert "overrides backward, which is not called" in told
    assert "overrides configure_gradient_clipping" in told
    assert found()["clipping hook called"]


@pytest.mark.proves("3.15", "4.29", "4.30")
@pytest.mark.parametrize(
    ("what", "parts"),
    [
        ("value", ["gradient_clip_algorithm='value'", "gradient_clip_val=1.0", "'norm'"]),
        ("accumulation", ["gradient_accumulation_steps=2", "accumulate_grad_batches"]),
        ("fp16", ["float16", "'cpu'", "bf16-mixed"]),
        ("nothing", ["training_step returned None for batch 0", "0.0 * output.sum()"]),
        ("part", ["folder inside a checkpoint", "Give"]),
        ("stage", ["ZeRO stage 1 or 2", "this run has stage 3", "consolidate"]),
        ("storage", ["storage_options", "Leave them out"]),
    ],
)
def test_what_cannot_work_is_refused_with_a_way_out(what: str, parts: list[str]) -> None:
    message = found()[f"refused {what}"]

    assert message is not None
    for part in parts:
        assert part in message


@pytest.mark.proves("8.9")
def test_a_fabric_trains_two_engines_and_needs_to_be_told_which() -> None:
    result = found()
    plain = by_hand(sgd=True, schedule=False)["losses"]

    assert [row[1] for row in result["fabric"]] == pytest.approx(plain, rel=1e-4)
    assert result["fabric"][0][0] == pytest.approx(plain[0])
    assert result["fabric rate"] == pytest.approx(0.1 * 0.5**5), "the engine has stepped the scheduler"
    assert "model=model" in result["fabric model"]
    assert "max_norm=1.0" in result["fabric clip"]
    assert "2 modules" in result["fabric both"]


@pytest.mark.proves("4.30")
def test_a_fabric_saves_one_module_with_other_objects_and_loads_them_again() -> None:
    assert found()["fabric loaded"] == [5, {"lr_scheduler": {"last": 3}}]
    assert found()["fabric equal"]
    assert found()["fabric unwrapped"] == "Net"
