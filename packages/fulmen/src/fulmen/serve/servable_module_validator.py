"""ServableModuleValidator: serve the module before it is trained, rather than find out afterwards that one cannot."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from itertools import chain
from typing import TYPE_CHECKING, Any

from fulmen.callbacks.callback import Callback
from fulmen.serve._server import ServedModule
from fulmen.serve.servable_module import ServableModule
from fulmen_fabric.abilities import supports
from fulmen_fabric.rank_zero import rank_zero_info, rank_zero_warn
from fulmen_protocols import (
    MisconfigurationException,
    MisconfigurationTypeError,
    MissingPackage,
    SupportsShardedState,
)

if TYPE_CHECKING:
    from fulmen.module import LightningModule
    from fulmen.serve._server import Response
    from fulmen.trainer import Trainer

__all__ = ["ServableModuleValidator"]


class ServableModuleValidator(Callback):
    """Tries at the start of training whether the module, a ``ServableModule``, can be served.

    Rank 0 starts a FastAPI server in a process of its own, with a copy of the module on the CPU, sends it
    ``configure_payload()`` and compares the answer with ``configure_response()``. Needs fastapi and uvicorn.

    Args:
        optimization: must be None: the module is served as it is.
        server: must be ``"fastapi"``.
        host: where the server listens.
        port: where the server listens; nobody else may.
        timeout: seconds for the server to come up, and for its answer.
        exit_on_failure: whether a module that cannot be served ends the run; otherwise it is a warning.

    Attributes:
        resp: the answer, with ``status_code``, ``text`` and ``json()``; None where none came.

    Raises:
        MisconfigurationException: an argument is wrong.
        MissingPackage: fastapi or uvicorn is not installed.
    """

    def __init__(
        self,
        optimization: str | None = None,
        server: str = "fastapi",
        host: str = "127.0.0.1",
        port: int = 8080,
        timeout: int = 20,
        exit_on_failure: bool = True,
    ) -> None:
        wrong: list[str] = []
        if optimization is not None:
            wrong.append(f"optimization={optimization!r}: a module is served as it is; leave it at None.")
        if server != "fastapi":
            wrong.append(f"server={server!r}: only 'fastapi' is implemented.")
        if not 0 < port < 65536:
            wrong.append(f"port={port!r} must be between 1 and 65535.")
        if timeout <= 0:
            wrong.append(f"timeout={timeout!r} must be a positive number of seconds.")
        if wrong:
            raise MisconfigurationException("ServableModuleValidator: " + " ".join(wrong))
        missing = [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]
        if missing:
            raise MissingPackage(f"ServableModuleValidator needs {' and '.join(missing)}: pip install 'fulmen[serve]'")
        self.optimization = optimization
        self.server = server
        self.host = host
        self.port = port
        self.timeout = timeout
        self.exit_on_failure = exit_on_failure
        self.resp: Response | None = None
        self._successful: bool | None = None

    @property
    def successful(self) -> bool | None:
        """Whether the module answered, and as ``configure_response`` says; None before it was tried."""
        return self._successful

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be served.

        Raises:
            MisconfigurationException: the module is no ``ServableModule``, or the strategy shards its weights.
        """
        if stage != "fit":
            return
        if not isinstance(pl_module, ServableModule):
            raise MisconfigurationTypeError(
                f"ServableModuleValidator was given a {type(pl_module).__name__}, which is no ServableModule. Derive "
                "it from both: class Model(LightningModule, ServableModule)."
            )
        strategy = trainer.assembly.strategy
        if supports(strategy, SupportsShardedState):
            raise MisconfigurationException(
                f"ServableModuleValidator cannot serve under {type(strategy).__name__}, where no process has the whole "
                "module. Validate it on one device, or with strategy='ddp'."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Serve the module and ask it once, on rank 0.

        Raises:
            MisconfigurationException: it cannot be served, and ``exit_on_failure`` is set.
        """
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, ServableModule)
        problem = self._try(pl_module)
        self._successful = problem is None
        if problem is None:
            rank_zero_info(f"{type(pl_module).__name__} can be served.")
            return
        message = f"{type(pl_module).__name__} cannot be served: {problem}"
        if self.exit_on_failure:
            raise MisconfigurationException(message)
        rank_zero_warn(message)

    def _try(self, module: ServableModule) -> str | None:
        """What is wrong; None where the module answered as it should."""
        self.resp = None
        payload, expected = module.configure_payload(), module.configure_response()
        if "body" not in payload:
            return f"configure_payload returned {payload!r}, which has no 'body'. Return {{'body': {{name: value}}}}."
        where = f"host={self.host!r}, port={self.port!r}"
        try:
            with ServedModule(_on_cpu(module), host=self.host, port=self.port, timeout_s=self.timeout) as served:
                self.resp = response = served.post(payload)
        except TimeoutError as error:
            return f"{error} ({where}, timeout={self.timeout!r}). Give it more time."
        except OSError as error:
            return f"{error} ({where}). Give another port if somebody else uses this one."
        if response.status_code != 200:
            return (
                f"it answered with status {response.status_code}, {response.text[:200]!r}. The server's traceback is "
                "printed above."
            )
        if response.json() != expected:
            return f"it answered {response.json()!r}, and configure_response says {expected!r}. Correct one of them."
        return None

    def state_dict(self) -> dict[str, Any]:
        """What was tried, and what came of it."""
        return {"successful": self.successful, "optimization": self.optimization, "server": self.server}


def _on_cpu(module: ServableModule) -> ServableModule:
    """The module; a copy of it where it is on a device, which a forked process cannot use."""
    if all(tensor.device.type == "cpu" for tensor in chain(module.parameters(), module.buffers())):
        return module
    return copy.deepcopy(module).cpu()
