"""What assemble finds by name or object, and what it refuses."""

from __future__ import annotations

import importlib.util
import os
import pickle
import socket
import sys

import pytest
import torch

from fulmen_fabric import Fabric, PossibleUserWarning, assemble
from fulmen_fabric.abilities import supports
from fulmen_protocols import (
    MisconfigurationException,
    MisconfigurationTypeError,
    SupportsCollectives,
    SupportsLaunch,
)


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


class Acme:
    """An accelerator of a vendor: no base class of ours."""

    def __init__(self, usable=True, count=4):
        self._usable, self._count = usable, count

    def name(self):
        return "acme"

    def is_available(self):
        return self._usable

    def auto_device_count(self):
        return self._count

    def parse_devices(self, devices):
        if isinstance(devices, list):
            return devices
        if int(devices) < 1:
            raise ValueError("acme has no zero devices")
        return list(range(int(devices)))

    def get_parallel_devices(self, devices):
        return [torch.device("cpu")] * len(devices)

    def setup_device(self, device):
        pass

    def teardown(self):
        pass


class OneProcess:
    """A strategy of a vendor without any ability."""

    root_device = torch.device("cpu")

    def setup_environment(self, topology):
        pass

    def module_context(self, *, empty):
        raise NotImplementedError

    def place(self, module):
        return module

    def prepare_optimizers(self, module, optimizers):
        return optimizers

    def teardown(self):
        pass


class TakesThePlan(OneProcess):
    plan = None

    def apply_precision_plan(self, plan):
        if plan["compute"] == torch.float64:
            raise ValueError("no doubles here")
        self.plan = plan


class Numbers:
    """A precision of a vendor."""

    precision = "acme-8bit"

    def plan(self):
        dtype = torch.float32
        return {"parameter": dtype, "compute": dtype, "reduction": dtype, "output": dtype, "scaler": "none"}

    def convert_module(self, module):
        return module

    def init_context(self):
        raise NotImplementedError


class Files:
    """A checkpoint IO of a vendor."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        pass

    def load_checkpoint(self, path, map_location=None, weights_only=None):
        return {}

    def remove_checkpoint(self, path):
        pass

    def teardown(self):
        pass


class Cluster:
    """An environment whose scheduler has started the processes."""

    main_address, main_port = "127.0.0.1", 29500

    def __init__(self, processes=2, external=True, complaint=""):
        self._processes, self.creates_processes_externally, self._complaint = processes, external, complaint

    @staticmethod
    def detect():
        return True

    def world_size(self):
        return self._processes

    def global_rank(self):
        return 1

    def local_rank(self):
        return 1

    def node_rank(self):
        return 0

    def validate_settings(self, num_devices, num_nodes):
        if self._complaint:
            raise ValueError(self._complaint)


def refusal(**arguments):
    with pytest.raises(MisconfigurationException) as caught:
        assemble(**arguments)
    return str(caught.value)


@pytest.mark.proves("4.1")
def test_everything_auto_on_a_cpu_is_one_process_in_32_true_and_says_what_it_chose():
    found = assemble(accelerator="cpu")
    assert (found.accelerator_name, found.strategy_name, found.precision_name) == ("cpu", "single_device", "32-true")
    assert found.devices == (torch.device("cpu"),)
    assert found.world_size == 1
    assert found.launcher is None
    assert any("devices='auto' chose 1" in line for line in found.chosen)
    assert any("strategy='auto' chose 'single_device'" in line for line in found.chosen)
    assert len(found.chosen) == 2  # the accelerator and the precision were not left open


@pytest.mark.proves("2.1", "2.2")
def test_auto_takes_the_best_usable_accelerator_and_names_the_others():
    found = assemble()
    best = "mps" if torch.backends.mps.is_available() else "cuda" if torch.cuda.is_available() else "cpu"
    assert found.accelerator_name == best
    assert any(f"accelerator='auto' chose {best!r}" in line for line in found.chosen)


@pytest.mark.proves("4.1")
def test_several_devices_choose_ddp_and_its_launcher():
    found = assemble(accelerator="cpu", devices=2)
    assert found.strategy_name == "ddp"
    assert supports(found.strategy, SupportsLaunch)
    assert found.launcher is not None
    assert found.world_size == 2
    assert found.device_ids == (0, 1)


def test_sources_name_the_distribution_and_version_or_the_class():
    found = assemble(accelerator="cpu", plugins=Numbers())
    assert found.sources["strategy"].startswith("single_device from fulmen-strategies ")
    assert found.sources["precision"] == "an instance of Numbers"


@pytest.mark.proves("3.1")
@pytest.mark.parametrize(
    ("asked", "name"), [(None, "32-true"), (32, "32-true"), ("32", "32-true"), (64, "64-true"), ("bf16-mixed",) * 2]
)
def test_precision_has_one_canonical_name(asked, name):
    assert assemble(accelerator="cpu", precision=asked).precision_name == name


@pytest.mark.proves("3.1")
@pytest.mark.parametrize(("asked", "name"), [(16, "16-mixed"), ("16", "16-mixed"), ("bf16", "bf16-mixed")])
def test_an_alias_that_could_mean_true_or_mixed_warns_and_means_mixed(asked, name):
    with pytest.warns(UserWarning, match=f"is read as '{name}'"):
        assert assemble(accelerator="cpu", precision=asked).precision_name == name


def test_a_precision_factory_that_takes_a_device_gets_its_type():
    precision = assemble(accelerator=Acme(), devices=1, precision="bf16-mixed").precision
    with precision.forward_context():
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.proves("2.1", "4.6", "9.2")
def test_a_vendors_objects_are_taken_by_what_they_can_do():
    accelerator, strategy, numbers, files = Acme(), OneProcess(), Numbers(), Files()
    found = assemble(accelerator=accelerator, strategy=strategy, devices=1, plugins=[files, numbers])
    assert found.accelerator is accelerator
    assert found.strategy is strategy
    assert found.precision is numbers
    assert found.checkpoint_io is files
    assert (found.accelerator_name, found.strategy_name, found.precision_name) == ("acme", "OneProcess", "acme-8bit")


def test_an_assembly_can_be_sent_to_a_spawned_process():
    found = assemble(accelerator="cpu", devices=2)
    assert pickle.loads(pickle.dumps(found)).sources == found.sources


def test_auto_devices_ask_the_accelerator():
    assert assemble(accelerator=Acme(count=4), plugins=Cluster(4)).world_size == 4
    assert len(assemble(accelerator=Acme(count=3)).devices) == 3


def test_auto_devices_are_as_many_as_a_cluster_has_started():
    found = assemble(accelerator="cpu", plugins=Cluster(processes=4), num_nodes=2)
    assert len(found.devices) == 2
    assert found.launcher is None
    assert any("has started 4 processes" in line for line in found.chosen)


def test_a_cluster_that_started_another_number_of_processes_is_a_conflict():
    text = refusal(accelerator="cpu", devices=3, plugins=Cluster(processes=2))
    assert "devices=3" in text
    assert "2 were started" in text


def test_what_the_cluster_says_about_the_settings_is_passed_on():
    assert "no such queue" in refusal(accelerator="cpu", devices=2, plugins=Cluster(complaint="no such queue"))


def test_one_device_in_a_cluster_of_several_processes_is_taken_as_asked_with_a_warning():
    with pytest.warns(PossibleUserWarning, match="a run of its own"):
        assert assemble(accelerator="cpu", devices=1, plugins=Cluster(2)).world_size == 1


@pytest.mark.proves("2.3", "3.1", "3.2", "4.6")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"accelerator": "cdua"}, "Did you mean 'cuda'?"),
        ({"accelerator": "cpu", "strategy": "ddpp"}, "Did you mean 'ddp'?"),
        ({"accelerator": "cpu", "precision": "bf16-mix"}, "Did you mean 'bf16-mixed'?"),
        ({"accelerator": "cpu", "devices": 0}, "devices=0"),
        ({"accelerator": "cpu", "devices": "0"}, "devices='0'"),
        ({"accelerator": Acme(), "devices": []}, "names no device"),
        ({"accelerator": "cpu", "devices": None}, "devices=None"),
        ({"accelerator": "cpu", "devices": True}, "devices=True"),
        ({"accelerator": "cpu", "num_nodes": 0}, "num_nodes=0"),
        ({"accelerator": "cpu", "num_nodes": True}, "num_nodes=True"),
        ({"accelerator": None}, "accelerator=None"),
        ({"accelerator": Acme(usable=False)}, "no device of that kind"),
        ({"accelerator": Acme}, "got the class Acme"),
        ({"accelerator": object()}, "Accelerator: it lacks"),
        ({"accelerator": "cpu", "strategy": object()}, "Strategy: it lacks"),
        ({"accelerator": "cpu", "strategy": "single_device", "devices": 2}, "'single_device' runs in one process"),
        ({"accelerator": Acme(), "strategy": OneProcess(), "devices": 1, "num_nodes": 2}, "1 device(s) on 2 nodes"),
        ({"accelerator": "cpu", "precision": "32-true", "plugins": Numbers()}, "both set the precision"),
        ({"accelerator": "cpu", "precision": 7}, "no precision is named '7'"),
        ({"accelerator": "cpu", "precision": 1.5}, "neither a name"),
        ({"accelerator": "cpu", "plugins": [Numbers(), Numbers()]}, "2 of them are a precision (Numbers, Numbers)"),
        ({"accelerator": "cpu", "plugins": "bf16-mixed"}, "goes to precision="),
        ({"accelerator": "cpu", "plugins": Numbers}, "got the class Numbers"),
        ({"accelerator": "cpu", "plugins": object()}, "none of Precision, CheckpointIO, ClusterEnvironment"),
        ({"accelerator": "cpu", "strategy": TakesThePlan(), "precision": 64}, "no doubles here"),
    ],
)
def test_each_conflict_says_what_was_asked(arguments, says):
    assert says in refusal(**arguments)


def test_a_plugin_that_is_nearly_a_checkpoint_io_hears_what_it_lacks():
    class Nearly(Files):
        teardown = None

    text = refusal(accelerator="cpu", plugins=Nearly())
    assert "closest to CheckpointIO, but lacks teardown" in text


def test_all_conflicts_are_reported_together_and_nothing_was_started(monkeypatch):
    text = refusal(
        accelerator="cpu", devices=0, num_nodes=-1, strategy="fdsp", precision="17-bit", plugins=[object(), "x"]
    )
    for part in ("devices=0", "num_nodes=-1", "'fdsp'", "'17-bit'", "object is none of", "'x' is a string"):
        assert part in text
    assert "6 conflicts" in text
    assert not torch.distributed.is_initialized()


def test_a_wrong_type_alone_is_also_a_type_error():
    with pytest.raises(MisconfigurationTypeError):
        assemble(accelerator="cpu", devices=None)
    with pytest.raises(TypeError):
        assemble(accelerator="cpu", precision=[16])


@pytest.mark.proves("3.3")
def test_the_precision_plan_reaches_a_strategy_that_applies_it():
    strategy = TakesThePlan()
    assemble(accelerator="cpu", strategy=strategy, precision="bf16-mixed")
    assert strategy.plan["compute"] == torch.bfloat16


@pytest.mark.proves("2.4")
def test_mps_with_a_parallel_strategy_is_a_conflict():
    class Apple(Acme):
        def get_parallel_devices(self, devices):
            return [torch.device("mps")] * len(devices)

    assert "cannot run on 'mps'" in refusal(accelerator=Apple(), strategy="ddp", devices=1)


@pytest.mark.proves("2.9", "4.5")
def test_an_interactive_session_gets_one_device_and_no_launcher_that_reruns_the_script(monkeypatch):
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    found = assemble(accelerator=Acme(count=4))
    assert found.world_size == 1
    assert any("chose 1 of 4" in line for line in found.chosen)
    assert "interactive session" in refusal(accelerator="cpu", devices=2, strategy="ddp")


def test_names_of_strategies_may_be_written_in_capitals():
    assert assemble(accelerator="cpu", strategy="DDP", devices=2).strategy_name == "ddp"


@pytest.mark.proves("2.1", "2.2")
def test_gpu_means_mps_or_cuda():
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        assert assemble(accelerator="gpu", devices=1).accelerator_name in {"mps", "cuda"}
    else:
        text = refusal(accelerator="gpu")
        assert "none of mps, cuda can be used" in text
        assert "Usable here: cpu" in text


def test_abilities_are_found_without_running_properties():
    class Early:
        @property
        def collectives(self):
            raise RuntimeError("too early")

    assert supports(Early(), SupportsCollectives)
    assert not supports(object(), SupportsCollectives)


@pytest.mark.proves("4.40")
def test_torchrun_is_recognised_by_itself(monkeypatch):
    for name, value in {
        "TORCHELASTIC_RUN_ID": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29511",
        "WORLD_SIZE": "2",
        "RANK": "1",
        "LOCAL_RANK": "1",
        "GROUP_RANK": "0",
        "LOCAL_WORLD_SIZE": "2",
    }.items():
        monkeypatch.setenv(name, value)
    found = assemble(accelerator="cpu")
    assert found.sources["cluster environment"].startswith("torchrun ")
    assert (found.world_size, found.launcher, found.strategy_name) == (2, None, "ddp")


@pytest.mark.proves("4.33")
def test_dp_on_the_cpu_is_ddp_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="strategy='dp' splits batches over GPUs, of which a run on the CPU has none"):
        found = assemble(accelerator="cpu", strategy="dp", devices=2)

    assert found.strategy_name == "ddp"
    assert found.world_size == 2


class SeveralDevices(OneProcess):
    """Drives all devices of its machine, as DataParallel does."""

    def take_devices(self, devices):
        self.devices = devices


@pytest.mark.proves("4.33")
def test_a_strategy_that_drives_several_devices_gets_them_in_one_process() -> None:
    strategy = SeveralDevices()

    found = assemble(accelerator=Acme(), strategy=strategy, devices=3)

    assert len(strategy.devices) == 3
    assert (found.world_size, len(found.devices), found.launcher) == (1, 1, None)


@pytest.mark.proves("4.33")
def test_without_ranks_a_fabric_leaves_samplers_and_values_alone() -> None:
    fabric = Fabric(accelerator=Acme(), strategy=SeveralDevices(), devices=3)
    loader = torch.utils.data.DataLoader(range(6), batch_size=3)

    prepared = fabric.setup_dataloaders(loader, move_to_device=False)

    assert [batch.tolist() for batch in prepared] == [[0, 1, 2], [3, 4, 5]]
    assert type(prepared.sampler) is torch.utils.data.SequentialSampler
    value = torch.tensor([1.0, 3.0])
    for done in (fabric.all_reduce(value, reduce_op="sum"), fabric.broadcast(value), fabric.all_gather(value)):
        assert torch.equal(done, value)
    assert (fabric.world_size, fabric.global_rank) == (1, 0)


@pytest.mark.proves("4.38")
def test_starters_are_looked_for_in_their_order_and_kubeflow_not_at_all(monkeypatch, tmp_path):
    ranks = tmp_path / "ranks"
    ranks.write_text("launcher\n" + "node-0\n" * 2 + f"{socket.gethostname()}\n" * 2)
    variables = {
        "TorchElasticEnvironment": {
            "TORCHELASTIC_RUN_ID": "x", "MASTER_ADDR": "n0", "MASTER_PORT": "29501", "WORLD_SIZE": "4", "RANK": "3",
            "LOCAL_RANK": "1", "GROUP_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2",
        },
        "SLURMEnvironment": {
            "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
            "SLURM_NODELIST": "n[07-08]", "SLURM_JOB_ID": "4711", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "2",
        },
        "LSFEnvironment": {
            "LSB_JOBID": "1234567", "LSB_DJOB_RANKFILE": str(ranks), "JSM_NAMESPACE_SIZE": "4",
            "JSM_NAMESPACE_RANK": "3", "JSM_NAMESPACE_LOCAL_RANK": "1",
        },
        "MPI": {"OMPI_COMM_WORLD_SIZE": "4"},
    }  # fmt: skip
    for name in [name for name in os.environ if name.startswith(("SLURM_", "PMI", "LSB_", "JSM_", "MASTER_"))]:
        monkeypatch.delenv(name)
    for of_one in variables.values():
        for name, value in of_one.items():
            monkeypatch.setenv(name, value)

    for kind in ("TorchElasticEnvironment", "SLURMEnvironment", "LSFEnvironment"):
        found = assemble(accelerator="cpu", devices=2, num_nodes=2)  # a word about MPI would be an error
        assert type(found.environment).__name__ == kind
        for name in variables[kind]:
            monkeypatch.delenv(name)
    if importlib.util.find_spec("mpi4py") is None:  # with it, MPI itself is asked how many processes it has started
        with pytest.warns(UserWarning, match="MPI has started 4 processes, but mpi4py is not installed"):
            found = assemble(accelerator="cpu", devices=1)
        assert type(found.environment).__name__ == "LightningEnvironment"
    monkeypatch.delenv("OMPI_COMM_WORLD_SIZE")
    for name, value in {"MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456", "WORLD_SIZE": "1", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert type(assemble(accelerator="cpu", devices=1).environment).__name__ == "LightningEnvironment"
