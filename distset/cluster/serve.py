"""A server of streams on Ray Serve: chunks of sets come over HTTP in any order, predictions are there at any time.

======================================= ==================================================================
``POST /sets/{id}/chunks/{number}``     an Arrow body (`distset.data.arrow_chunks`); answers what the set has
``GET /sets/{id}``                      what the model says of all chunks so far, such as class probabilities
``DELETE /sets/{id}``                   forget the set
``GET /``                               the model: its classes and the elements it takes
======================================= ==================================================================

An id is quoted as ever in a URL, ``/`` as ``%2F``. A chunk that was answered 200 is on disk (`distset.stream_store`), so
replicas may die and be restarted, and there may be several of them on one shared folder. Chunks are known by their numbers:
a client that got no answer sends its chunk again. Errors of the client are answered 4xx with ``{"error": reason}``.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import threading
from typing import Any
from urllib.parse import unquote

import torch
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from torch import Tensor

from distset.data.arrow_chunks import read_chunk, read_words
from distset.runs import RunFolder
from distset.served import load_served
from distset.stream_store import StreamStore

__all__ = ["SetServer", "serve_sets"]

CHUNK = re.compile(r"/sets/(?P<set>[^/]+)/chunks/(?P<number>\d{1,15})")
SET = re.compile(r"/sets/(?P<set>[^/]+)")
LARGEST = 256 * 2**20
"""Bytes of a body."""

log = logging.getLogger(__name__)


class SetServer:
    """One replica.

    Args:
        run: the run folder of a model that `distset.served.load_served` takes.
        folder: of the states, shared by all replicas.
        idle_seconds: a set that got nothing for so long is forgotten; None for never.
    """

    def __init__(self, run: str, folder: str, idle_seconds: float | None = None) -> None:
        torch.set_num_threads(1)
        self.served = load_served(RunFolder(run))
        self.store = StreamStore(folder, self.served.task.model.encoder, self.served.elements.shape)
        self._closed = threading.Event()
        if idle_seconds is not None:
            threading.Thread(target=self._expire, args=(idle_seconds,), daemon=True).start()

    def close(self) -> None:
        """End the expiry of idle sets."""
        self._closed.set()

    async def __call__(self, request: Request) -> Response:
        path = request.scope["raw_path"].decode().rstrip("/") or "/"  # as it was quoted: an id may have slashes
        try:
            if (found := CHUNK.fullmatch(path)) and request.method == "POST":
                return await self._take(request, _id(found["set"]), int(found["number"]))
            if (found := SET.fullmatch(path)) and request.method == "GET":
                return await asyncio.to_thread(self._predict, _id(found["set"]))
            if (found := SET.fullmatch(path)) and request.method == "DELETE":
                gone = await asyncio.to_thread(self.store.drop, _id(found["set"]))
                return JSONResponse({"deleted": gone}, 200 if gone else 404)
            if path == "/" and request.method == "GET":
                return JSONResponse(self.served.about())
        except ValueError as error:
            return _refuse(400, str(error))
        if CHUNK.fullmatch(path) or SET.fullmatch(path) or path == "/":
            return _refuse(405, f"{request.method} {path}: is not offered; POST a chunk, GET or DELETE a set")
        return _refuse(404, f"{path}: wanted /sets/ID or /sets/ID/chunks/NUMBER")

    async def _take(self, request: Request, set_id: str, number: int) -> Response:
        body = await _body(request)
        if body is None:
            return _refuse(413, f"body: is larger than {LARGEST:,} bytes; send smaller chunks")
        taken = await asyncio.to_thread(lambda: self.store.take(set_id, number, self._elements(body)))
        return JSONResponse(taken._asdict())

    def _elements(self, body: bytes) -> Tensor:
        """Vectors and words as they are; images come flat."""
        shape, words = self.served.elements
        if words is not None:
            return read_words(body, words)
        rows = read_chunk(body)
        if rows.shape[1] != math.prod(shape):
            raise ValueError(
                f"body: has elements of {rows.shape[1]} values, the model takes {math.prod(shape)} "
                f"(shape {shape}); is this the encoder that its features came from?"
            )
        return rows.reshape(-1, *shape)

    def _predict(self, set_id: str) -> Response:
        try:
            encoding, taken = self.store.value(set_id)
        except KeyError:
            return _refuse(404, f"set {set_id!r}: nothing has come for it, or it was idle too long")
        with torch.no_grad():
            answer = self.served.task.answer(encoding)
        try:
            return JSONResponse({**answer, "chunks": taken.chunks, "elements": taken.elements})
        except ValueError as error:  # JSON has no NaN and no infinities
            raise ValueError(
                f"set {set_id!r}: is too large for the model's precision; delete it, and scale its elements"
            ) from error

    def _expire(self, idle_seconds: float) -> None:
        while not self._closed.wait(min(60.0, max(0.1, idle_seconds / 4))):
            try:
                self.store.expire(idle_seconds)
            except OSError:
                log.exception("idle sets could not be forgotten; it is tried again")


def serve_sets(
    run: str, folder: str, *, idle_seconds: float | None = None, replicas: int = 1, cpus: float = 1.0,
    host: str = "127.0.0.1", port: int = 8000,
) -> str:  # fmt: skip
    """Start the server on the connected Ray; returns its address.

    Args:
        run, folder, idle_seconds: as in `SetServer`; folders that all nodes see.
        replicas: processes that answer.
        cpus: cores of each.
        host, port: where to listen; loopback unless told otherwise. Whoever reaches it may write and read sets.
    """
    serve.start(http_options={"host": host, "port": port}, logging_config={"log_level": "WARNING"})
    deployment: Any = serve.deployment(
        SetServer,
        num_replicas=replicas,
        ray_actor_options={"num_cpus": cpus},
        max_ongoing_requests=64,
        health_check_period_s=2,
        health_check_timeout_s=30,
    )
    serve.run(deployment.bind(run, folder, idle_seconds), name="distset", route_prefix="/")
    return f"http://{host}:{port}"


async def _body(request: Request) -> bytes | None:
    """The body; None where it is too large, which is counted as it comes: a client need not say beforehand, nor be right."""
    parts, size = [], 0
    async for part in request.stream():
        parts.append(part)
        size += len(part)
        if size > LARGEST:
            return None
    return b"".join(parts)


def _id(quoted: str) -> str:
    return unquote(quoted, errors="strict")


def _refuse(status: int, reason: str) -> Response:
    return Response(json.dumps({"error": reason}), status, media_type="application/json")
