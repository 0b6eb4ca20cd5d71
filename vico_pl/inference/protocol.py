"""OpenAI's chat protocol: the JSON of a request -> a checked `Question`; answers and errors -> JSON."""

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from vico_pl.data.decode import IMAGE_TOKEN

DEFAULT_TOKENS = 256  # new tokens, if the request names no limit
LEAST_TEMPERATURE = 1e-5  # greedy below, where logits would overflow
MAX_SYSTEM = 100_000  # characters of a system message


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """What the model is called, what may be read, and what one request may ask for."""

    model_name: str
    api_key: str | None = None  # None: everybody may ask
    image_dir: Path | None = None  # None: images come as data URLs only
    max_bytes: int = 32_000_000  # of a request
    max_images: int = 16  # of a request
    max_pixels: int = 50_000_000  # of an image
    max_tokens: int = 4096  # new tokens of an answer
    max_waiting: int = 64  # requests under way, the one that is answered included
    timeout_s: float = 120  # from the head of a request to the end of its answer


class ApiError(Exception):
    """What a client gets instead of an answer: a status and a sentence."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        """Return it as OpenAI's JSON."""
        headers = {503: {"Retry-After": "2"}, 401: {"WWW-Authenticate": "Bearer"}}
        return JSONResponse(self.body, self.status, headers.get(self.status))


class _Fields(BaseModel):
    """Fields that are not named are ignored."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Text(_Fields):
    type: Literal["text"]
    text: str


class _Url(_Fields):
    url: str


class _Image(_Fields):
    type: Literal["image_url"]
    image_url: _Url


class _Message(_Fields):
    role: Literal["system", "developer", "user", "assistant"]
    content: list[Annotated[_Text | _Image, Field(discriminator="type")]]

    @field_validator("content", mode="before")
    @classmethod
    def _from_text(cls, given: Any) -> Any:
        return [{"type": "text", "text": given}] if isinstance(given, str) else given


class StreamOptions(_Fields):
    """What a stream has besides the text."""

    include_usage: bool = False


class _Request(_Fields):
    model: str
    messages: list[_Message] = Field(min_length=1, max_length=1000)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: list[Annotated[str, Field(min_length=1, max_length=1000)]] | None = Field(None, max_length=4)
    n: Literal[1] | None = None
    seed: int | None = Field(None, ge=0, lt=2**63)

    @field_validator("stop", mode="before")
    @classmethod
    def _from_text(cls, given: Any) -> Any:
        return [given] if isinstance(given, str) else given

    @property
    def sampling(self) -> dict[str, float]:
        """Options of generation; none: greedy."""
        temperature = self.temperature or 0.0
        options = {"temperature": temperature, "top_p": self.top_p or 1.0, "top_k": 0}
        return options if temperature > LEAST_TEMPERATURE else {}


class Question(NamedTuple):
    """A request with valid fields; its images are not decoded yet."""

    request: _Request
    texts: list[str]  # questions and answers in turn up to the question to answer, with a mark per image
    images: list[bytes]
    system: str | None  # None: the model's own
    num_tokens: int  # new ones at most


def read_question(body: bytes, config: ServeConfig) -> Question:
    """Check the body of a request.

    Raises:
        ApiError: it is no JSON, a field is not valid, or it is for another model.
    """
    try:
        given = _Request.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "body"
        raise ApiError(400, f"{place}: {first['msg']}", param=place) from error
    if given.model != config.model_name:
        reason = f"no model '{given.model[:200]}'; this server has '{config.model_name}'"
        raise ApiError(404, reason, param="model", code="model_not_found")
    num_tokens = given.max_completion_tokens or given.max_tokens or min(DEFAULT_TOKENS, config.max_tokens)
    if num_tokens > config.max_tokens:
        reason = f"max_tokens is {num_tokens}; expected at most {config.max_tokens}"
        raise ApiError(400, reason, param="max_tokens")
    images: list[bytes] = []
    texts = [_read_message(message, images, config) for message in given.messages]
    roles = ["system" if message.role == "developer" else message.role for message in given.messages]
    num_system = roles.count("system")
    turns = ["user", *["assistant", "user"] * ((len(roles) - num_system) // 2)]
    if roles != ["system"] * num_system + turns:
        order = "system messages first, then user and assistant in turn, user first and last"
        raise ApiError(400, f"messages: expected {order}", param="messages")
    system = "\n".join(texts[:num_system]) if num_system else None
    if len(system or "") > MAX_SYSTEM:
        raise ApiError(400, f"messages: the system message has more than {MAX_SYSTEM} characters")
    given.messages.clear()  # their images are large
    return Question(given, texts[num_system:], images, system, num_tokens)


def _read_message(message: _Message, images: list[bytes], config: ServeConfig) -> str:
    """Return the text with a mark for each image, and add the images to the list."""
    lines = []
    for part in message.content:
        if isinstance(part, _Text):
            if IMAGE_TOKEN in part.text:
                reason = f"messages: a text has {IMAGE_TOKEN}; expected images as parts of type image_url"
                raise ApiError(400, reason, param="messages")
            lines.append(part.text)
            continue
        if message.role != "user" or len(images) == config.max_images:
            expected = f"images in messages of the user, at most {config.max_images}"
            raise ApiError(400, f"messages: expected {expected}", param="messages")
        images.append(_read_image(part.image_url.url, config, room=config.max_bytes - sum(map(len, images))))
        lines.append(IMAGE_TOKEN)
    return "\n".join(lines)


def _bad_image(reason: str) -> ApiError:
    return ApiError(400, f"image_url: {reason}", param="messages", code="invalid_image")


def _read_image(url: str, config: ServeConfig, *, room: int) -> bytes:
    """Return the content of an image, at most `room` bytes if it is a file."""
    header, _, content = url.partition(",")
    if header.startswith("data:") and header.endswith(";base64"):
        try:
            return base64.b64decode(content, validate=True)
        except ValueError as error:
            raise _bad_image(f"no base64 ({error})") from error
    if url.startswith(("http:", "https:")):
        raise _bad_image("http and https URLs are not fetched; send the image as a data: URL")
    if config.image_dir is None or header.startswith("data:"):
        raise _bad_image("expected data:image/...;base64,... or, with --image-dir, a path in that folder")
    folder = config.image_dir.resolve()
    try:
        path = (folder / url.removeprefix("file://").replace("\0", "")).resolve()  # follows links
        if path.is_relative_to(folder) and path.is_file() and path.stat().st_size <= room:
            return path.read_bytes()
    except OSError as error:  # too long a name, no permission
        raise _bad_image(f"the file cannot be read ({error.strerror})") from error
    raise _bad_image(f"no such file of at most {room} bytes in the folder of --image-dir")
