"""The server that a module is tried in: a process of its own, with ``/ping`` and ``/serve``."""

from __future__ import annotations

import json
import socket
import sys
import traceback
from contextlib import closing
from http.client import HTTPConnection, HTTPException
from multiprocessing import get_all_start_methods, get_context
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, cast

import torch

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    from fulmen.serve.servable_module import ServableModule

__all__ = ["Response", "ServedModule"]


class Response:
    """An answer over HTTP.

    Attributes:
        status_code: 200 where all went well.
        content: the body, as bytes.
    """

    def __init__(self, status_code: int, content: bytes) -> None:
        self.status_code = status_code
        self.content = content

    @property
    def ok(self) -> bool:
        """Whether all went well."""
        return self.status_code < 400

    @property
    def text(self) -> str:
        """The body as text."""
        return self.content.decode("utf-8", "replace")

    def json(self) -> Any:
        """The body, read as JSON.

        Raises:
            ValueError: it is none.
        """
        return json.loads(self.content)

    def __repr__(self) -> str:
        return f"Response({self.status_code}, {self.text[:200]!r})"


class ServedModule:
    """A module served by a process of its own, which ends with the ``with`` block.

    The process has a copy of the module: it is forked, with one thread like a loader's worker. Where processes cannot
    be forked it is started anew, and the module is pickled.

    Args:
        module: on the CPU.
        host: where to listen.
        port: where to listen.
        timeout_s: for the server to come up, and for each answer.

    Raises:
        OSError: somebody else listens there, or the server ended before it answered.
        TimeoutError: it did not come up in time.
    """

    def __init__(self, module: ServableModule, *, host: str, port: int, timeout_s: float) -> None:
        self._host, self._port, self._timeout_s = host, port, timeout_s
        context: Any = get_context("fork" if "fork" in get_all_start_methods() else "spawn")
        self._process: BaseProcess = context.Process(target=_serve, args=(module, host, port), daemon=True)

    def __enter__(self) -> ServedModule:
        with closing(socket.socket(socket.AF_INET6 if ":" in self._host else socket.AF_INET)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((self._host, self._port))
        self._process.start()
        try:
            self._wait()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def post(self, payload: object) -> Response:
        """Send ``payload`` to ``/serve``.

        Raises:
            OSError: no answer came, or none in time.
        """
        try:
            return self._ask("POST", "/serve", json.dumps(payload), self._timeout_s)
        except HTTPException as error:
            raise ConnectionError(f"the server broke off its answer: {error!r}") from error

    def _wait(self) -> None:
        deadline = monotonic() + self._timeout_s
        while True:
            if self._process.exitcode is not None:
                raise ConnectionError(f"the server ended with exit code {self._process.exitcode} before it answered")
            left = deadline - monotonic()
            if left <= 0:
                raise TimeoutError(f"the server did not answer within {self._timeout_s} seconds")
            try:
                if self._ask("GET", "/ping", None, left).status_code == 200:
                    return
            except (OSError, HTTPException):
                pass  # it is not there yet; a time-out ends the loop above
            sleep(0.05)

    def _ask(self, method: str, path: str, body: str | None, timeout_s: float) -> Response:
        # Not through the proxies of the environment: the server is our own.
        with closing(HTTPConnection(self._host, self._port, timeout=timeout_s)) as connection:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return Response(answer.status, answer.read())

    def _end(self) -> None:
        self._process.kill()
        self._process.join()
        self._process.close()


def _serve(module: ServableModule, host: str, port: int) -> None:
    """What the process runs: it ends when it is killed."""
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, PlainTextResponse

    torch.set_num_threads(1)  # OpenMP's threads did not come along
    module.eval()  # a copy: the process's own
    deserializers, serializers = module.configure_serialization()

    async def ping() -> bool:
        return True

    def answer_to(payload: Any) -> dict[str, Any]:
        body: dict[str, Any] = dict(payload["body"])
        body.update({name: read(body[name]) for name, read in deserializers.items()})
        with torch.no_grad():
            output = cast("object", module.serve_step(**body))
        if not isinstance(output, dict):
            raise TypeError(f"{type(module).__name__}.serve_step returned a {type(output).__name__}; return a dict.")
        answer = dict(cast("dict[str, Any]", output))
        answer.update({name: write(answer[name]) for name, write in serializers.items()})
        return answer

    async def serve(request: Any) -> Any:
        try:
            return JSONResponse(answer_to(await request.json()))
        except Exception as error:  # noqa: BLE001  # whatever it is, the user has to see it
            # Printed before the answer is sent: after it this process may be killed at any time.
            traceback.print_exc()
            sys.stderr.flush()
            return PlainTextResponse(f"{type(error).__name__}: {error}", status_code=500)

    serve.__annotations__ = {"request": Request}  # FastAPI reads it; the name is known in this function only
    app = FastAPI()
    app.add_api_route("/ping", ping, methods=["GET"], response_model=None)
    app.add_api_route("/serve", serve, methods=["POST"], response_model=None)
    uvicorn.run(app, host=host, port=port, log_level="error")
