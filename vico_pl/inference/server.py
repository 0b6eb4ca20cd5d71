"""`vico serve`: a model behind OpenAI's chat protocol, for trying out and for evaluation harnesses.

HTTP runs on an event loop. The model runs on one thread, which answers one request after the other.
"""

import asyncio
import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import asdict, replace
from functools import partial
from importlib.resources import files
from threading import Event
from typing import Any, TypeVar

import torch
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from vico_pl.data.decode import decode_content
from vico_pl.errors import RecordError
from vico_pl.inference.predictor import Answer, Predictor
from vico_pl.inference.protocol import ApiError, Question, ServeConfig, bad_image, read_question

CHAT = "/v1/chat/completions"
log = logging.getLogger("uvicorn.error")
T = TypeVar("T")


class Engine:
    """Answers questions on a thread of its own, in the order they come."""

    def __init__(self, predictor: Predictor, config: ServeConfig) -> None:
        self._predictor, self._limits = predictor, config.image_limits
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")

    async def answer(self, question: Question) -> AsyncIterator[str | Answer]:
        """Yield pieces of the text if it is streamed, then the answer; closing it ends the answer.

        Raises:
            ApiError: an image or the prompt is not accepted.
        """
        loop, is_closed = asyncio.get_running_loop(), Event()
        events: asyncio.Queue[Any] = asyncio.Queue()
        write = partial(loop.call_soon_threadsafe, events.put_nowait)
        result = loop.run_in_executor(self._thread, self._generate, question, write, is_closed)
        result.add_done_callback(events.put_nowait)
        try:
            while (event := await events.get()) is not result:
                yield event
            yield result.result()
        finally:
            is_closed.set()
            result.cancel()  # it may not have begun

    def _generate(self, question: Question, write: Any, is_closed: Event) -> Answer:
        try:
            # Here and not before: however many requests wait, one has its pixels in memory.
            images = [decode_content("image", content, self._limits) for content in question.images]
        except RecordError as error:
            raise bad_image(str(error)) from error
        predictor = self._predictor
        if question.system is not None:
            chat = replace(predictor.chat, config=replace(predictor.chat.config, system=question.system))
            predictor = replace(predictor, chat=chat)
        if question.seed is not None:
            torch.manual_seed(question.seed)
        options = {**question.settings, "streamer": write if question.stream else None}
        try:
            return predictor.generate([images], [question.texts], stop=is_closed.is_set, **options)[0]
        except RecordError as error:
            raise ApiError(400, str(error), param="messages", code="context_length_exceeded") from error


class Gate:
    """Admits a limited number of chat requests and turns every error into OpenAI's JSON."""

    def __init__(self, app: ASGIApp, max_waiting: int) -> None:
        self._app, self._max_waiting, self._num_open = app, max_waiting, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        counts = scope.get("path") == CHAT
        self._num_open += counts
        try:
            if counts and self._num_open > self._max_waiting:
                raise ApiError(503, f"{self._max_waiting} requests are under way; try again later")
            await self._app(scope, receive, send)
        except Exception as error:
            await api_error(error).response()(scope, receive, send)
        finally:
            self._num_open -= counts


def api_error(error: Exception) -> ApiError:
    """Return what a client gets for an error; one that is our fault goes to the log."""
    if isinstance(error, HTTPException):  # no such path or method
        return ApiError(error.status_code, str(error.detail))
    if isinstance(error, TimeoutError):
        return ApiError(504, "the answer took longer than --timeout of the server")
    if isinstance(error, ApiError):
        return error
    name = uuid.uuid4().hex[:12]
    log.error("request %s failed", name, exc_info=error)
    return ApiError(500, f"internal error {name}; the log of the server has the reason")


def build_app(predictor: Predictor, config: ServeConfig) -> FastAPI:
    """Return the application: the chat protocol, and a page to try the model."""
    engine, started = Engine(predictor, config), int(time.time())
    app = FastAPI(openapi_url=None)  # and no page of FastAPI's, which loads scripts from elsewhere
    app.add_middleware(Gate, max_waiting=config.max_waiting)

    @app.exception_handler(HTTPException)
    async def refuse(_: Request, error: HTTPException) -> Response:
        return api_error(error).response()

    async def check_key(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if config.api_key and not hmac.compare_digest(given.encode(), config.api_key.encode()):
            raise ApiError(401, "no API key, or a wrong one", code="invalid_api_key")

    @app.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse(files("vico_pl.inference").joinpath("page.html").read_text(encoding="utf-8"))

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models", dependencies=[Depends(check_key)])
    async def models() -> dict[str, Any]:
        model = {"id": config.model_name, "object": "model", "created": started, "owned_by": "vico_pl"}
        return {"object": "list", "data": [model]}

    @app.post(CHAT, dependencies=[Depends(check_key)])
    async def chat(request: Request) -> Response:
        deadline = asyncio.get_running_loop().time() + config.timeout_s
        async with asyncio.timeout_at(deadline):
            body = await _read_body(request, config.max_bytes)
            question = await asyncio.to_thread(read_question, body, config)
            events = engine.answer(question)
            first = await _unless_gone(request, anext(events))
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": config.model_name}
        if question.stream:
            lines = _stream(head, first, events, deadline=deadline, include_usage=question.include_usage)
            return StreamingResponse(lines, media_type="text/event-stream")
        message = {"role": "assistant", "content": first.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": first.finish_reason}
        return JSONResponse({**head, "object": "chat.completion", "choices": [choice], **_figures(first)})

    return app


async def _read_body(request: Request, max_bytes: int) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > max_bytes:
            raise ApiError(413, f"the request has more than {max_bytes} bytes (--max-body-mb of the server)")
    return bytes(body)


async def _unless_gone(request: Request, result: Coroutine[Any, Any, T]) -> T:
    """Wait for a result, but no longer than the client does."""
    task, gone = asyncio.ensure_future(result), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client has gone")  # nobody reads it
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _stream(
    head: dict[str, Any], first: Any, events: Any, *, deadline: float, include_usage: bool
) -> AsyncIterator[str]:
    """Write an answer as server-sent events."""

    def line(delta: dict[str, str], finish_reason: str | None = None, **rest: Any) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return _event({**head, "object": "chat.completion.chunk", "choices": [choice], **rest})

    yield line({"role": "assistant", "content": ""})
    try:
        async with aclosing(events):
            event = first
            while isinstance(event, str):
                yield line({"content": event})
                async with asyncio.timeout_at(deadline):
                    event = await anext(events)
        figures = _figures(event)
        yield line({}, event.finish_reason, routing=figures["routing"])
        if include_usage:
            yield _event({**head, "object": "chat.completion.chunk", "choices": [], "usage": figures["usage"]})
    except Exception as error:
        yield _event(api_error(error).body)
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _figures(answer: Answer) -> dict[str, Any]:
    """Return the fields `usage` and `routing` of an answer."""
    usage = {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.new_tokens,
        "total_tokens": answer.prompt_tokens + answer.new_tokens,
        "vision_tokens": {
            "spent": answer.vision_tokens,
            "saved": answer.full_vision_tokens - answer.vision_tokens,
        },
    }
    return {"usage": usage, "routing": [asdict(image) for image in answer.images]}
