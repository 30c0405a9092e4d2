"""The engine's configuration, and what is refused before there is an engine: none of it needs DeepSpeed itself."""

from __future__ import annotations

import inspect
import json
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fulmen_deepspeed import DeepSpeedPrecision, DeepSpeedStrategy
from fulmen_deepspeed import _library as library
from fulmen_deepspeed import _optimizers as optimizers
from fulmen_deepspeed import _verify as verify
from fulmen_deepspeed import config as configs
from fulmen_protocols import BackendUnavailable, MisconfigurationException, MissingPackage

if TYPE_CHECKING:
    from pathlib import Path

    from fulmen_protocols import PrecisionPlan


def options(**changes: Any) -> dict[str, Any]:
    defaults = {name: one.default for name, one in inspect.signature(DeepSpeedStrategy).parameters.items()}
    return {**defaults, **changes}


def plan(name: str) -> PrecisionPlan:
    return DeepSpeedPrecision(name).plan()


# ---------------------------------------------------------------------- from arguments


@pytest.mark.proves("4.28")
def test_the_arguments_become_the_sections_that_deepspeed_documents() -> None:
    made = configs.default_config(options())

    assert made == {
        "activation_checkpointing": {
            "partition_activations": False, "cpu_checkpointing": False, "contiguous_memory_optimization": False,
            "synchronize_checkpoint_boundary": False,
        },
        "aio": {
            "block_size": 1048576, "queue_depth": 8, "single_submit": False, "overlap_events": True, "thread_count": 1,
        },
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": 2, "contiguous_gradients": True, "overlap_comm": True, "allgather_partitions": True,
            "reduce_scatter": True, "allgather_bucket_size": 200_000_000, "reduce_bucket_size": 200_000_000,
            "sub_group_size": 1_000_000_000_000,
        },
    }  # fmt: skip


@pytest.mark.proves("4.28")
def test_offloading_to_nvme_names_the_drive_and_its_buffers() -> None:
    made = configs.default_config(
        options(
            stage=3, offload_optimizer=True, offload_parameters=True, offload_optimizer_device="nvme",
            offload_params_device="nvme", nvme_path="/fast", pin_memory=True,
        )
    )  # fmt: skip

    assert made["zero_optimization"]["offload_optimizer"] == {
        "device": "nvme", "nvme_path": "/fast", "buffer_count": 4, "pin_memory": True,
    }  # fmt: skip
    assert made["zero_optimization"]["offload_param"] == {
        "device": "nvme", "nvme_path": "/fast", "buffer_count": 5, "buffer_size": 100_000_000,
        "max_in_cpu": 1_000_000_000, "pin_memory": True,
    }  # fmt: skip


def test_without_zero_there_is_no_section_of_it() -> None:
    assert "zero_optimization" not in configs.default_config(options(zero_optimization=False))
    assert configs.stage_of(configs.default_config(options(zero_optimization=False))) == 0
    assert configs.stage_of(configs.default_config(options(stage=3))) == 3


@pytest.mark.proves("4.28")
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"stage": 4}, "stage=4. There are 0, 1, 2, 3"),
        ({"offload_params_device": "disk"}, "offload_params_device='disk'. Give 'cpu' or 'nvme'"),
        ({"offload_optimizer_device": "gpu"}, "offload_optimizer_device='gpu'. Give 'cpu' or 'nvme'"),
        ({"remote_device": "moon"}, "remote_device='moon'. Give 'cpu' or 'nvme'"),
        ({"offload_parameters": True}, "offload_parameters=True with stage=2.* give stage=3"),
        ({"offload_optimizer": True, "stage": 0}, "offload_optimizer=True with .*stage=0.* Give a stage of 1 to 3"),
    ],
)
def test_arguments_without_a_meaning_are_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(MisconfigurationException, match=told):
        configs.check_options(options(**changes))


# ---------------------------------------------------------------------- the user's own


@pytest.mark.proves("4.28")
def test_a_configuration_comes_as_a_dict_a_path_or_by_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"zero_optimization": {"stage": 1}}
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(own))

    taken, _ = configs.load_config(own)
    assert taken == own
    assert taken is not None
    taken["zero_optimization"]["stage"] = 3
    assert own == {"zero_optimization": {"stage": 1}}, "the user's dict is left alone"
    assert configs.load_config(file)[0] == own
    assert configs.load_config(str(file))[0] == own
    monkeypatch.setenv("PL_DEEPSPEED_CONFIG_PATH", str(file))
    assert configs.load_config(None)[0] == own
    monkeypatch.delenv("PL_DEEPSPEED_CONFIG_PATH")
    assert configs.load_config(None) == (None, "")


@pytest.mark.proves("4.28")
@pytest.mark.parametrize(
    ("text", "told"), [(None, "there is no such file"), ("{", "holds no JSON"), ("[1]", "holds a list")]
)
def test_a_configuration_that_cannot_be_read_is_named(tmp_path: Path, text: str | None, told: str) -> None:
    file = tmp_path / "ds.json"
    if text is not None:
        file.write_text(text)

    with pytest.raises(MisconfigurationException, match=told) as raised:
        configs.load_config(file)
    assert str(file) in str(raised.value)


def test_arguments_that_a_configuration_would_replace_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"stage=3.*config=.*Write it into the configuration"):
        verify.no_arguments_beside(DeepSpeedStrategy, options(stage=3), "config=")
    with pytest.raises(MisconfigurationException, match=r"PL_DEEPSPEED_CONFIG_PATH"):
        verify.no_arguments_beside(DeepSpeedStrategy, options(stage=3), "PL_DEEPSPEED_CONFIG_PATH='/a.json'")
    verify.no_arguments_beside(DeepSpeedStrategy, options(load_full_weights=True), "config=")


# ---------------------------------------------------------------------- precision


@pytest.mark.proves("3.15", "4.28")
def test_a_16_bit_precision_switches_the_engine_s_own_on() -> None:
    scale = configs.LossScale(8.0, 4, 10, 3, 2)

    assert configs.with_precision({}, plan("32-true"), scale, "cpu") == {}
    for name in ("bf16-mixed", "bf16-true"):
        assert configs.with_precision({}, plan(name), scale, "cpu") == {"bf16": {"enabled": True}}
    for name in ("16-mixed", "16-true"):
        assert configs.with_precision({}, plan(name), scale, "cuda") == {
            "fp16": {
                "enabled": True, "loss_scale": 8.0, "initial_scale_power": 4, "loss_scale_window": 10, "hysteresis": 3,
                "min_loss_scale": 2,
            }
        }  # fmt: skip
    own = {"fp16": {"enabled": True, "loss_scale": 1.0}}
    assert configs.with_precision(own, plan("16-mixed"), scale, "cuda") == own, "the user's own settings stay"


@pytest.mark.proves("3.15")
@pytest.mark.parametrize(
    ("config", "precision", "told"),
    [
        ({"bf16": {"enabled": True}}, "32-true", "'bf16' on.*float32.*precision='bf16-mixed'"),
        ({"fp16": {"enabled": True}}, "bf16-mixed", "'fp16' on.*bfloat16.*precision='16-mixed'"),
        ({"bf16": {"enabled": False}}, "bf16-mixed", "'bf16' off.*bfloat16.*precision='32-true'"),
        ({}, "16-mixed", "float16.*on 'cpu'.*precision='bf16-mixed', or accelerator='gpu'"),
    ],
)
def test_a_configuration_that_contradicts_the_precision_is_refused(
    config: dict[str, Any], precision: str, told: str
) -> None:
    with pytest.raises(MisconfigurationException, match=told):
        configs.with_precision(config, plan(precision), configs.LossScale(), "cpu")


def test_a_dtype_that_the_engine_does_not_compute_in_is_refused() -> None:
    double: PrecisionPlan = {
        "parameter": torch.float64, "compute": torch.float64, "reduction": torch.float64, "output": torch.float64,
        "scaler": "none",
    }  # fmt: skip

    with pytest.raises(MisconfigurationException, match=r"torch.float64.*precision='32-true', 'bf16-mixed'"):
        configs.with_precision({}, double, configs.LossScale(), "cuda")


@pytest.mark.proves("3.15")
def test_the_precision_casts_inputs_and_refuses_other_names() -> None:
    batch = {"x": torch.ones(2), "y": torch.ones(2, dtype=torch.int64)}

    cast: Any = DeepSpeedPrecision("bf16-mixed").convert_input(batch)

    assert (cast["x"].dtype, cast["y"].dtype) == (torch.bfloat16, torch.int64)
    for name, weights in (("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16), ("16-true", torch.float16)):
        assert DeepSpeedPrecision(name).convert_module(torch.nn.Linear(1, 1)).weight.dtype is weights
    with pytest.raises(ValueError, match=r"precision='64-true'.*Allowed: '32-true'"):
        DeepSpeedPrecision("64-true")


# ---------------------------------------------------------------------- what the run decides


@pytest.mark.proves("4.29")
def test_the_run_fills_accumulation_clipping_and_the_batch_size() -> None:
    run = configs.FromRun(accumulation=4, clipping=0.5, batch_size=8)

    made = configs.for_engine({"zero_optimization": {"stage": 1}}, run, logs_throughput=True)

    assert made == {
        "zero_optimization": {"stage": 1}, "gradient_accumulation_steps": 4, "gradient_clipping": 0.5,
        "train_micro_batch_size_per_gpu": 8,
    }  # fmt: skip
    own = {"train_micro_batch_size_per_gpu": 3, "gradient_clipping": 2.0}
    assert configs.for_engine(own, run, logs_throughput=True) == {**own, "gradient_accumulation_steps": 4}
    assert "train_micro_batch_size_per_gpu" not in configs.for_engine(
        {"train_batch_size": 64}, run, logs_throughput=True
    )


def test_deepspeed_s_timer_waits_for_the_device_only_where_somebody_listens() -> None:
    off = configs.for_engine({}, configs.FromRun(), logs_throughput=False)

    assert off["timers"] == {"throughput": {"enabled": False}}
    assert off["train_micro_batch_size_per_gpu"] == 1
    assert off["gradient_clipping"] == 0.0, "DeepSpeed's own default would clip to 1"


@pytest.mark.proves("4.29")
def test_a_configuration_that_accumulates_or_clips_otherwise_than_the_trainer_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"gradient_accumulation_steps=2.*accumulate_grad_batches"):
        configs.check_accumulation({"gradient_accumulation_steps": 2})
    with pytest.raises(
        MisconfigurationException, match=r"gradient_clip_val=1.0.*gradient_clipping=0.5.*one of the two"
    ):
        configs.check_clipping({"gradient_clipping": 0.5}, 1.0, "norm")
    with pytest.raises(MisconfigurationException, match=r"gradient_clip_algorithm='value'.*Use .*'norm'"):
        configs.check_clipping({}, 1.0, "value")
    configs.check_clipping({"gradient_clipping": 1}, 1.0, "norm")
    configs.check_clipping({"gradient_clipping": 1}, None, "norm")


@pytest.mark.proves("4.29")
def test_devices_that_deepspeed_would_take_for_others_are_refused() -> None:
    verify.devices([torch.device("cuda", 0), torch.device("cuda", 1)])
    verify.devices([torch.device("cpu")] * 3)
    with pytest.raises(MisconfigurationException, match=r"devices=\[1, 3\].*CUDA_VISIBLE_DEVICES=1,3.*devices=2"):
        verify.devices([torch.device("cuda", 1), torch.device("cuda", 3)])
    with pytest.raises(MisconfigurationException, match=r"'mps'.*accelerator='cuda' or 'cpu'"):
        verify.devices([torch.device("mps")])


@pytest.mark.proves("4.29")
def test_optimizers_that_the_engine_cannot_step_are_refused() -> None:
    net = torch.nn.Linear(2, 2)
    adam = torch.optim.Adam(net.parameters())

    optimizers.check([adam], net, {})
    with pytest.raises(MisconfigurationException, match=r"given 2 optimizers.*into one optimizer"):
        optimizers.check([adam, adam], net, {})
    with pytest.raises(MisconfigurationException, match=r"defines an optimizer \(AdamW\), and a Adam was given"):
        optimizers.check([adam], net, {"optimizer": {"type": "AdamW"}})
    with pytest.raises(MisconfigurationException, match=r"LBFGS.*Use another optimizer"):
        optimizers.check([torch.optim.LBFGS(net.parameters())], net, {})
    with pytest.raises(MisconfigurationException, match=r"no parameter of Linear"):
        optimizers.check([torch.optim.Adam(torch.nn.Linear(1, 1).parameters())], net, {})
    offloads = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    with pytest.raises(MisconfigurationException, match=r"a Adam was given. Use deepspeed.ops.adam.DeepSpeedCPUAdam"):
        optimizers.check([adam], net, offloads)
    optimizers.check([adam], net, {**offloads, "zero_force_ds_cpu_optimizer": False})


# ---------------------------------------------------------------------- the library


@pytest.mark.proves("4.29")
def test_a_missing_or_old_library_is_told_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match=r"not installed. Run: pip install 'fulmen\[deepspeed\]'"):
        DeepSpeedStrategy()
    monkeypatch.setattr(library, "find_spec", lambda name: object())
    monkeypatch.setattr(library, "version", lambda name: "0.15.4")
    with pytest.raises(MissingPackage, match=r"deepspeed >= 0.16.*Version 0.15.4.*--upgrade"):
        DeepSpeedStrategy()


@pytest.mark.skipif(find_spec("deepspeed") is not None, reason="DeepSpeed is installed")
def test_without_the_library_a_strategy_cannot_be_made() -> None:
    with pytest.raises(MissingPackage, match="pip install"):
        DeepSpeedStrategy()


def test_a_machine_that_cannot_reach_nvme_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    class Builder:
        def is_compatible(self, verbose: bool) -> bool:
            return False

    class Builders:
        AsyncIOBuilder = Builder

    monkeypatch.setattr(verify, "submodule", lambda name: Builders)
    wants = {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}

    with pytest.raises(BackendUnavailable, match=r"offload_optimizer.*'nvme'.*libaio-dev.*offload to 'cpu'"):
        verify.nvme(wants)
    verify.nvme({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}})
