"""`vico serve`: a model behind OpenAI's chat protocol, for trying out and for evaluation harnesses.

HTTP runs on an event loop. The model runs on one thread, which answers one request after the other.
"""

import asyncio
import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import asdict, replace
from importlib.resources import files
from threading import Event
from typing import Any, TypeVar

import torch
from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from vico_pl.data.decode import ImageLimits, decode_content
from vico_pl.errors import RecordError
from vico_pl.inference.generate import Answer, ImageRouting, TextReader, generation_options
from vico_pl.inference.predictor import Predictor
from vico_pl.inference.protocol import ApiError, Question, ServeConfig, StreamOptions, read_question

CHAT = "/v1/chat/completions"
log = logging.getLogger(__name__)
T = TypeVar("T")


class Engine:
    """Answers questions on a thread of its own, in the order they come."""

    def __init__(self, predictor: Predictor, config: ServeConfig) -> None:
        self._predictor = predictor
        self._limits = ImageLimits(max_pixels=config.max_pixels, max_bytes=config.max_bytes)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")

    async def answer(self, question: Question) -> AsyncGenerator[Any]:
        """Yield how the images are routed, pieces of the text and the answer; closing it ends the answer.

        Raises:
            ApiError: an image or the prompt is not accepted.
        """
        loop, is_closed = asyncio.get_running_loop(), Event()
        events: asyncio.Queue[Any] = asyncio.Queue()

        def write(event: Any) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        result = loop.run_in_executor(self._thread, self._generate, question, write, is_closed.is_set)
        result.add_done_callback(events.put_nowait)
        try:
            while (event := await events.get()) is not result:
                yield event
            yield result.result()
        finally:
            is_closed.set()
            result.cancel()  # it may not have begun

    @torch.no_grad()
    def _generate(self, question: Question, write: Any, stop: Callable[[], bool]) -> Answer:
        predictor, asked = self._predictor, question.request
        if question.system is not None:
            chat = replace(predictor.chat, config=replace(predictor.chat.config, system=question.system))
            predictor = replace(predictor, chat=chat)
        try:
            # Not decoded before: however many requests wait, the pixels of one are in memory.
            images = [decode_content(str(i), data, self._limits) for i, data in enumerate(question.images)]
            routed = predictor.prepare(images, name="prompt")
            prompt = predictor.encode_prompt(routed.sample, question.texts)
        except RecordError as error:
            code = "context_length_exceeded" if error.kind == "length" else "invalid_image"
            raise ApiError(400, str(error), param="messages", code=code) from error
        write(routed.images)
        if asked.seed is not None:
            torch.manual_seed(asked.seed)
        reader = TextReader(
            tokenizer=predictor.tokenizer,
            stop_strings=asked.stop or [],
            stop=stop,
            streamer=write if asked.stream else None,
        )
        settings = {**generation_options(asked.sampling), "max_new_tokens": question.num_tokens}
        (answer,) = predictor.answer_batch([routed], [prompt], reader=reader, **settings)
        return answer


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
    if isinstance(error, ClientDisconnect):
        return ApiError(499, "the client has gone")  # nobody reads it
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

    async def check_sender(request: Request) -> None:
        _check_sender(request, config.api_key)

    @app.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse(files("vico_pl.inference").joinpath("page.html").read_text(encoding="utf-8"))

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models", dependencies=[Depends(check_sender)])
    async def models() -> dict[str, Any]:
        model = {"id": config.model_name, "object": "model", "created": started, "owned_by": "vico_pl"}
        return {"object": "list", "data": [model]}

    @app.post(CHAT, dependencies=[Depends(check_sender)])
    async def chat(request: Request) -> Response:
        return await answer_request(request, engine, config)

    return app


def _check_sender(request: Request, api_key: str | None) -> None:
    if request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        raise ApiError(403, "requests from the pages of other sites are not answered")
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if api_key and not hmac.compare_digest(given.encode(), api_key.encode()):
        raise ApiError(401, "no API key, or a wrong one", code="invalid_api_key")


async def answer_request(request: Request, engine: Engine, config: ServeConfig) -> Response:
    """Answer a chat request, whole or as a stream.

    Raises:
        ApiError: it is not accepted.
        TimeoutError: the answer takes too long.
    """
    deadline = asyncio.get_running_loop().time() + config.timeout_s
    async with asyncio.timeout_at(deadline):
        question = await asyncio.to_thread(read_question, await _read_body(request, config.max_bytes), config)
        events = engine.answer(question)
        routing = await _unless_gone(request, anext(events))  # or the error, while a status can be sent
        if not question.request.stream:
            answer = await _unless_gone(request, _last(events))
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": config.model_name}
    if question.request.stream:
        lines = _stream(head, routing, events, deadline=deadline, options=question.request.stream_options)
        return StreamingResponse(lines, media_type="text/event-stream")
    message = {"role": "assistant", "content": answer.text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.finish_reason}
    figures = {"usage": _usage(answer), "routing": [asdict(image) for image in routing]}
    return JSONResponse({**head, "object": "chat.completion", "choices": [choice], **figures})


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
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _last(events: AsyncIterator[Any]) -> Any:
    return [event async for event in events][-1]


async def _stream(
    head: dict[str, Any],
    routing: list[ImageRouting],
    events: AsyncGenerator[Any],
    *,
    deadline: float,
    options: StreamOptions | None,
) -> AsyncIterator[str]:
    """Write an answer as server-sent events."""

    def chunk(delta: dict[str, str], finish_reason: str | None = None, **rest: Any) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return _line({**head, "object": "chat.completion.chunk", "choices": [choice], **rest})

    yield chunk({"role": "assistant", "content": ""}, routing=[asdict(image) for image in routing])
    try:
        async with aclosing(events):
            while True:
                async with asyncio.timeout_at(deadline):
                    event = await anext(events)
                if isinstance(event, Answer):
                    break
                yield chunk({"content": event})
        yield chunk({}, event.finish_reason)
        if options is not None and options.include_usage:
            yield _line({**head, "object": "chat.completion.chunk", "choices": [], "usage": _usage(event)})
    except Exception as error:
        yield _line(api_error(error).body)
    yield "data: [DONE]\n\n"


def _line(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _usage(answer: Answer) -> dict[str, Any]:
    saved = answer.full_vision_tokens - answer.vision_tokens
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.new_tokens,
        "total_tokens": answer.prompt_tokens + answer.new_tokens,
        "vision_tokens": {"spent": answer.vision_tokens, "saved": saved},
    }
