"""A module is served by a real server process before it is trained."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import fulmen
from fulmen.serve import ServableModule, ServableModuleValidator
from fulmen_protocols import MisconfigurationException
from fulmen_strategies import SingleDeviceStrategy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


pytestmark = pytest.mark.processes


class Model(fulmen.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.9))
        nn.init.ones_(self.net[0].weight)  # type: ignore[arg-type]  # a layer in a Sequential
        nn.init.zeros_(self.net[0].bias)  # type: ignore[arg-type]  # a layer in a Sequential

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return DataLoader(torch.randn(4, 3), batch_size=2)  # type: ignore[arg-type]  # torch takes any sequence; its annotation names only Dataset


class Served(Model, ServableModule):
    def configure_payload(self) -> dict[str, Any]:
        return {"body": {"x": [[1.0, 2.0, 3.0]], "times": 2}}

    def configure_serialization(self) -> tuple[dict[str, Callable[..., Any]], dict[str, Callable[..., Any]]]:
        return {"x": torch.tensor}, {"predictions": lambda value: value.tolist()}

    def serve_step(self, x: Any, times: int) -> dict[str, Any]:  # type: ignore[override]  # with other arguments, on purpose
        return {
            "predictions": self.net(x) * times,
            "trains": self.training,
            "grad": torch.is_grad_enabled(),
            "in_process": os.getpid(),
        }

    def configure_response(self) -> dict[str, Any]:
        return {"predictions": [[12.0, 12.0]], "trains": False, "grad": False, "in_process": os.getpid()}


class Good(Served):
    def serve_step(self, x: Any, times: int) -> dict[str, Any]:  # type: ignore[override]  # with other arguments, on purpose
        answer = super().serve_step(x, times)
        return {**answer, "in_process": answer["in_process"] != STARTED_IN}

    def configure_response(self) -> dict[str, Any]:
        return {**super().configure_response(), "in_process": True}


STARTED_IN = os.getpid()


@pytest.fixture
def port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def trainer(*callbacks: Any) -> fulmen.Trainer:
    return fulmen.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )


def nobody_listens(port: int) -> bool:
    with closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.proves("7.5", "7.6", "11.21")
def test_a_good_module_is_asked_over_http_in_a_process_of_its_own(port: int) -> None:
    validator, model = ServableModuleValidator(port=port), Good()
    assert (validator.resp, validator.successful) == (None, None)
    fit = trainer(validator)
    fit.fit(model)

    assert validator.successful is True
    assert validator.resp is not None
    assert validator.resp.status_code == 200
    assert validator.resp.ok
    # Dropout is off and nothing is differentiated there: the payload's numbers times ones, twice.
    expected = {"predictions": [[12.0, 12.0]], "trains": False, "grad": False, "in_process": True}
    assert validator.resp.json() == expected
    assert validator.state_dict() == {"successful": True, "optimization": None, "server": "fastapi"}
    assert nobody_listens(port)
    assert fit.global_step == 2  # training went on
    assert model.training
    assert model.trainer is fit


@pytest.mark.slow
@pytest.mark.proves("7.6")
def test_a_wrong_answer_ends_the_run_or_is_a_warning(port: int) -> None:
    with pytest.raises(MisconfigurationException, match=r"Served cannot be served: it answered .*configure_response"):
        trainer(ServableModuleValidator(port=port)).fit(Served())

    validator = ServableModuleValidator(port=port, exit_on_failure=False)
    fit = trainer(validator)
    with pytest.warns(UserWarning, match="Served cannot be served"):
        fit.fit(Served())
    assert validator.successful is False
    assert validator.resp is not None
    assert validator.resp.json()["in_process"] != os.getpid()
    assert fit.global_step == 2


@pytest.mark.proves("7.6")
def test_an_error_while_serving_is_told_and_its_traceback_printed(port: int, capfd: Any) -> None:
    class Raises(Good):
        def serve_step(self, x: Any, times: int) -> dict[str, Any]:  # type: ignore[override]  # with other arguments, on purpose
            raise KeyError("the culprit")

    validator = ServableModuleValidator(port=port)
    with pytest.raises(
        MisconfigurationException, match=r"Raises cannot be served: it answered with status 500.*KeyError: .*culprit"
    ):
        trainer(validator).fit(Raises())

    assert validator.successful is False
    assert validator.resp is not None
    assert not validator.resp.ok
    assert "the culprit" in capfd.readouterr().err
    assert nobody_listens(port)


@pytest.mark.slow
@pytest.mark.proves("7.6")
def test_a_step_that_returns_no_dict_is_no_answer(port: int, capfd: Any) -> None:
    class ReturnsTensor(Good):
        def serve_step(self, x: Any, times: int) -> Any:  # type: ignore[override]  # with other arguments, on purpose
            return x

    with pytest.raises(MisconfigurationException, match="status 500"):
        trainer(ServableModuleValidator(port=port)).fit(ReturnsTensor())
    assert "serve_step returned a Tensor; return a dict" in capfd.readouterr().err


@pytest.mark.proves("7.6")
def test_a_payload_without_a_body_is_refused(port: int) -> None:
    class NoBody(Good):
        def configure_payload(self) -> dict[str, Any]:
            return {"x": 1}

    with pytest.raises(MisconfigurationException, match=r"configure_payload returned \{'x': 1\}, which has no 'body'"):
        trainer(ServableModuleValidator(port=port)).fit(NoBody())


@pytest.mark.proves("7.6")
def test_a_server_that_does_not_come_up_in_time_is_ended(port: int) -> None:
    class Slow(Good):
        def configure_serialization(self) -> Any:
            threading.Event().wait(60)

    with pytest.raises(MisconfigurationException, match=r"did not answer within 1 seconds.*timeout=1\)"):
        trainer(ServableModuleValidator(port=port, timeout=1)).fit(Slow())
    assert nobody_listens(port)


@pytest.mark.proves("7.6")
def test_an_answer_that_does_not_come_in_time_is_a_failure(port: int) -> None:
    class Hangs(Good):
        def serve_step(self, x: Any, times: int) -> dict[str, Any]:  # type: ignore[override]  # with other arguments, on purpose
            threading.Event().wait(60)
            return {}

    validator = ServableModuleValidator(port=port, timeout=8, exit_on_failure=False)
    with pytest.warns(UserWarning, match=r"(timed out|did not answer).*timeout=8"):
        trainer(validator).fit(Hangs())
    assert (validator.successful, validator.resp) == (False, None)


@pytest.mark.slow
@pytest.mark.proves("7.6")
def test_a_server_that_ends_by_itself_is_told_at_once(port: int, capfd: Any) -> None:
    class Breaks(Good):
        def configure_serialization(self) -> Any:
            raise KeyError("the culprit")

    with pytest.raises(MisconfigurationException, match="ended with exit code 1 before it answered"):
        trainer(ServableModuleValidator(port=port)).fit(Breaks())
    assert "the culprit" in capfd.readouterr().err


@pytest.fixture
def occupied(port: int) -> Iterator[int]:
    class AnswersEverything(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

    server = HTTPServer(("127.0.0.1", port), AnswersEverything)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield port
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.proves("7.6")
def test_another_server_on_the_port_is_not_taken_for_ours(occupied: int) -> None:
    with pytest.raises(MisconfigurationException, match=rf"Address already in use.*port={occupied}\).*another port"):
        trainer(ServableModuleValidator(port=occupied)).fit(Good())


@pytest.mark.proves("7.5")
def test_a_servable_module_must_define_all_four_methods() -> None:
    class Half(Model, ServableModule):
        def configure_payload(self) -> dict[str, Any]:
            return {}

        def serve_step(self) -> dict[str, Any]:  # type: ignore[override]  # with other arguments, on purpose
            return {}

    with pytest.raises(TypeError, match=r"configure_response.*configure_serialization"):
        Half()  # type: ignore[abstract]  # on purpose


@pytest.mark.proves("7.6")
def test_a_module_that_is_not_servable_is_refused_before_anything_starts() -> None:
    with pytest.raises(TypeError, match=r"given a Model, which is no ServableModule.*class Model\(LightningModule"):
        trainer(ServableModuleValidator()).fit(Model())


class Sharding(SingleDeviceStrategy):
    """A strategy that says of itself that it shards, as FSDP's and DeepSpeed's do."""

    state_kind = "sharded"

    def module_state(self, module: nn.Module, *, full: bool) -> dict[str, Any]:
        raise AssertionError("nothing must start")

    def optimizer_state(self, module: nn.Module, optimizer: Any, *, full: bool) -> dict[str, Any]:
        raise AssertionError("nothing must start")

    def load_module_state(self, module: nn.Module, state: Any, *, strict: bool = True) -> Any:
        raise AssertionError("nothing must start")

    def load_optimizer_state(self, module: nn.Module, optimizer: Any, state: Any) -> None:
        raise AssertionError("nothing must start")


@pytest.mark.proves("7.6")
def test_a_strategy_that_shards_is_refused_before_anything_starts() -> None:
    fit = fulmen.Trainer(
        accelerator="cpu", strategy=Sharding(), max_epochs=1, barebones=True, callbacks=[ServableModuleValidator()]
    )
    with pytest.raises(MisconfigurationException, match=r"cannot serve under Sharding.*strategy='ddp'"):
        fit.fit(Good())


@pytest.mark.proves("7.6")
@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"optimization": "onnx"}, ["optimization='onnx'", "leave it at None"]),
        ({"server": "torchserve"}, ["server='torchserve'", "only 'fastapi'"]),
        ({"port": 0}, ["port=0 must be between 1 and 65535"]),
        ({"timeout": -1}, ["timeout=-1", "positive"]),
        ({"optimization": "trace", "server": "sagemaker"}, ["optimization='trace'", "server='sagemaker'"]),
    ],
)
def test_wrong_arguments_are_named_with_what_to_do(arguments: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(MisconfigurationException) as raised:
        ServableModuleValidator(**arguments)
    for part in parts:
        assert part in str(raised.value)


@pytest.mark.proves("7.6")
def test_without_fastapi_the_error_names_the_install() -> None:
    code = (
        "import sys, importlib.util\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'fastapi' else find(name, *a)\n"
        "from fulmen.serve import ServableModuleValidator\n"
        "try:\n"
        "    ServableModuleValidator()\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert "needs fastapi: pip install 'fulmen[serve]'" in done.stdout


@pytest.mark.proves("7.6")
@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_module_on_a_gpu_is_served_from_the_cpu(port: int) -> None:
    pytest.importorskip("uvicorn")
    validator = ServableModuleValidator(port=port)
    fulmen.Trainer(accelerator="cuda", devices=1, max_epochs=1, barebones=True, callbacks=[validator]).fit(Good())
    assert validator.successful
