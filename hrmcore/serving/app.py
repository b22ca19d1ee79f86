"""The ASGI application: routes, keys, limits, and answers whole or as server-sent events.

Nothing in a request names a file: the page's files are read once, when the server starts.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import re
import sys
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from hrmcore.engine.async_engine import AsyncAnswer, AsyncEngine, EngineClosed, QueueFull
from hrmcore.engine.chat_template import Conversation
from hrmcore.engine.streams import TokenLogprob
from hrmcore.serving.lens import Looks, parse_lens
from hrmcore.serving.metrics import Metrics
from hrmcore.serving.protocol import OPTIONS, Asked, Refused, Writer, parse, usage
from hrmcore.serving.waits import deadline, unless_gone

MOST_BODY = 1 << 20  # bytes
_DRAINED = 16 << 20  # bytes of a body that is too large are read, so that the client gets to read why
BODY_SECONDS = 30.0
_NAMED = {*OPTIONS, "messages", "tools", "answer"}  # what the engine's complaints begin with

PAGE = Path(__file__).parent / "page"
_PAGE_FILES = {"/": "index.html"} | {f"/{name}": name for name in ("page.css", "page.js", "lens.js", "picture.js")}
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}

Handler = Callable[[Request], Awaitable[Response]]


@dataclass
class Service:
    """What the routes share. `keys` are the accepted API keys, none for all callers; `timeout` in seconds."""

    served: AsyncEngine
    model: str
    keys: Sequence[str] = ()
    samples: Sequence[Mapping[str, str]] = ()
    timeout: float | None = None
    metrics: Metrics = field(default_factory=Metrics)
    closing: bool = False
    handling: int = 0  # requests on their way

    def __post_init__(self) -> None:
        self.started = int(time.time())
        self.looks = Looks(self.served)
        self._digests = [hashlib.sha256(key.encode()).digest() for key in self.keys]

    def check_key(self, request: Request) -> None:
        """Raise Refused unless the request brings one of the keys; takes the same time for every wrong one."""
        if not self._digests:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(key.strip().encode("latin-1")).digest()
        found = sum([hmac.compare_digest(digest, known) for known in self._digests])
        if scheme.lower() != "bearer" or not found:
            message = "a valid API key is needed: Authorization: Bearer KEY"
            raise Refused(401, message, None, "invalid_api_key", {"WWW-Authenticate": "Bearer"})

    def begin(self, asked: Asked) -> list[AsyncAnswer]:
        """All answers that a request asks for, in the order of its choices. Raises Refused; then none is begun."""
        answers: list[AsyncAnswer] = []
        try:
            prompts: list[str | Conversation] = [*asked.prompts]
            if asked.messages is not None:
                prompts = [self.served.engine.conversation(asked.messages, asked.tools)]
            for prompt in prompts:
                for choice in range(asked.n):
                    options = asked.choice_options(choice)
                    answers.append(self.served.stream(prompt, timeout=self.timeout, logprobs=asked.logprobs, **options))
        except (ValueError, QueueFull, EngineClosed) as error:
            close_all(answers)
            raise refusal(error, ValueError) from None
        return answers

    def count(self, asked: Asked, answers: Sequence[AsyncAnswer], seconds: float) -> dict[str, int]:
        """Count what is answered; returns its usage."""
        used = usage(sum(a.prompt_tokens for a in answers[:: asked.n]), sum(a.token_count for a in answers))
        self.metrics.prompt_tokens += used["prompt_tokens"]
        self.metrics.completion_tokens += used["completion_tokens"]
        self.metrics.answer.add(seconds)
        return used


def make_app(service: Service) -> Starlette:
    """The application. Its shutdown closes the engine."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await service.served.close()

    routes = [
        _route(service, "/v1/models", models, "GET"),
        _route(service, "/v1/models/{name:path}", model, "GET"),
        _route(service, "/v1/chat/completions", chat_completions, "POST"),
        _route(service, "/v1/completions", completions, "POST"),
        _route(service, "/v1/lens", lens, "POST"),
        _route(service, "/metrics", metrics, "GET"),
        _route(service, "/health", health, "GET", keyed=False),
        _route(service, "/page.json", about, "GET", keyed=False),
        *(Route(path, _file(PAGE / name), methods=["GET"]) for path, name in _PAGE_FILES.items()),
    ]

    async def no_route(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        service.metrics.requests["other", error.status_code] += 1
        return respond_error(Refused(error.status_code, error.detail.lower(), headers=error.headers))

    return Starlette(routes=routes, exception_handlers={HTTPException: no_route}, lifespan=lifespan)


def _route(
    service: Service,
    path: str,
    handler: Callable[[Service, Request], Awaitable[Response]],
    method: str,
    keyed: bool = True,
) -> Route:
    async def endpoint(request: Request) -> Response:
        try:
            if keyed:
                service.check_key(request)
            response = await handler(service, request)
        except ClientDisconnect:
            response = Response(status_code=499)  # nobody reads it; the number is nginx's
        except Refused as error:
            response = respond_error(error)
        except Exception as error:
            response = respond_error(refusal(error))
        service.metrics.requests[path, response.status_code] += 1
        return response

    return Route(path, _Counted(service, endpoint), methods=[method])


class _Counted:
    """An endpoint as an ASGI application that counts the requests on their way, until the last byte is sent."""

    def __init__(self, service: Service, endpoint: Handler) -> None:
        self._service = service
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._service.handling += 1
        try:
            request = Request(scope, receive, send)
            response = await self._endpoint(request)
            await response(scope, receive, send)
        finally:
            self._service.handling -= 1


def _file(path: Path) -> Handler:
    content, kind = path.read_bytes(), _TYPES[path.suffix]

    async def endpoint(_: Request) -> Response:
        return Response(content, media_type=kind, headers=_PAGE_HEADERS)

    return endpoint


async def models(service: Service, request: Request) -> Response:
    """GET /v1/models."""
    return respond({"object": "list", "data": [_described(service)]})


async def model(service: Service, request: Request) -> Response:
    """GET /v1/models/NAME."""
    if request.path_params["name"] != service.model:
        raise Refused(404, f"there is no such model; this server has {service.model!r}", "model", "model_not_found")
    return respond(_described(service))


def _described(service: Service) -> dict[str, Any]:
    context = service.served.engine.config.context
    return {
        "id": service.model,
        "object": "model",
        "created": service.started,
        "owned_by": "hrmcore",
        "max_model_len": context,
    }


async def health(service: Service, request: Request) -> Response:
    """GET /health: 200 while requests are taken, else 503."""
    return respond({"status": "shutting down"}, 503) if service.closing else respond({"status": "ok"})


async def metrics(service: Service, request: Request) -> Response:
    """GET /metrics, for Prometheus."""
    gauges = {
        "hrmcore_answers_open": ("Answers that wait or are on their way.", service.served.open_answers),
        "hrmcore_answers_waiting": ("Answers that wait to begin.", service.served.waiting),
        "hrmcore_sequences_open": ("Answers that hold a part of the KV cache.", service.served.engine.open_requests),
    }
    reused = service.served.engine.reused_prefills
    counted = {"hrmcore_prefills_reused_total": ("Answers that began with the prefill of an equal prompt.", reused)}
    return Response(service.metrics.text(gauges, counted), media_type="text/plain; version=0.0.4")


async def about(service: Service, request: Request) -> Response:
    """GET /page.json: what the page needs to know."""
    tokenizer = service.served.engine.tokenizer
    conditions = list(tokenizer.condition_ids) if tokenizer else []
    return respond(
        {
            "model": service.model,
            "parameters": service.served.engine.parameters,
            "context": service.served.engine.config.context,
            "conditions": conditions,
            "samples": list(service.samples),
            "keyed": bool(service.keys),
        }
    )


async def chat_completions(service: Service, request: Request) -> Response:
    """POST /v1/chat/completions."""
    return await _complete(service, request, chat=True)


async def completions(service: Service, request: Request) -> Response:
    """POST /v1/completions."""
    return await _complete(service, request, chat=False)


async def lens(service: Service, request: Request) -> Response:
    """POST /v1/lens: how one token of an answer formed."""
    asked = parse_lens(await read_body(request), service.model)
    try:
        ids, prompt = asked.ids(service.served.engine)
    except ValueError as error:
        raise refusal(error, ValueError) from None
    seen = await unless_gone(request, service.looks.look(asked, ids, prompt, service.timeout))
    return respond({"model": service.model, **seen})


async def _complete(service: Service, request: Request, chat: bool) -> Response:
    started = time.monotonic()
    asked = parse(await read_body(request), chat, service.model)
    answers = service.begin(asked)
    writer = Writer(asked, service.model)
    if asked.stream:
        return _Events(_events(service, asked, answers, writer, started), answers)
    try:
        texts = await unless_gone(request, _all(answers, service, started))
    finally:
        close_all(answers)
    used = service.count(asked, answers, time.monotonic() - started)
    said = [(text, a.ids, a.finish, a.logprobs) for text, a in zip(texts, answers, strict=True)]
    return respond(writer.whole(said, used))


async def read_body(request: Request) -> bytes:
    """The body of a request in JSON. Raises Refused when it is not, is too large, or does not come."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a form, which any web page may send, gets no answer
        raise Refused(415, "the Content-Type must be application/json")
    body, size = [], 0
    try:
        async with deadline(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size <= MOST_BODY:
                    body.append(part)
                elif size > _DRAINED:
                    break
    except TimeoutError:
        raise Refused(408, f"the body did not come within {BODY_SECONDS:.0f} seconds") from None
    if size > MOST_BODY:
        raise Refused(413, f"the body is larger than {MOST_BODY} bytes")
    return b"".join(body)


async def _join(service: Service, answer: AsyncAnswer, started: float) -> str:
    pieces: list[str] = []
    async for piece in answer:
        if not pieces:
            service.metrics.first_token.add(time.monotonic() - started)
        pieces.append(piece)
    return "".join(pieces)


async def _all(answers: Sequence[AsyncAnswer], service: Service, started: float) -> list[str]:
    return await asyncio.gather(*(_join(service, answer, started) for answer in answers))


class _Events(StreamingResponse):
    """Server-sent events; the answers are closed however the response ends."""

    def __init__(self, events: AsyncIterator[bytes], answers: Sequence[AsyncAnswer]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            close_all(self._answers)


async def _events(
    service: Service, asked: Asked, answers: Sequence[AsyncAnswer], writer: Writer, started: float
) -> AsyncIterator[bytes]:
    fresh = set(range(len(answers)))
    told = [0] * len(answers)  # token ids that the chunks brought

    def untold(index: int) -> list[int]:
        ids = answers[index].ids[told[index] :]
        told[index] += len(ids)
        return ids

    try:
        for index in range(len(answers)):
            if chunk := writer.begin(index):
                yield _event(chunk)
        async for index, piece, scored in _merged(answers):
            if piece is None:
                yield _event(writer.end(index, untold(index), answers[index].finish, scored))
                continue
            if index in fresh:
                fresh.discard(index)
                service.metrics.first_token.add(time.monotonic() - started)
            yield _event(writer.piece(index, piece, untold(index), scored))
            await asyncio.sleep(0)  # the loop may learn that the client has gone, however many pieces are there
    except Exception as error:
        yield _event(refusal(error).body)
        return
    used = service.count(asked, answers, time.monotonic() - started)
    if asked.include_usage:
        yield _event(writer.used(used))
    yield b"data: [DONE]\n\n"


async def _merged(
    answers: Sequence[AsyncAnswer],
) -> AsyncIterator[tuple[int, str | None, list[TokenLogprob]]]:
    """(index, piece, log probabilities of its tokens) as pieces come; a piece is None at the end of each answer."""
    pieces: asyncio.Queue[tuple[int, str | Exception | None, list[TokenLogprob]]] = asyncio.Queue()

    async def pump(index: int) -> None:
        answer, sent = answers[index], 0
        try:
            async for piece in answer:
                scored = answer.logprobs_from(sent)
                sent += len(scored)
                pieces.put_nowait((index, piece, scored))
            pieces.put_nowait((index, None, answer.logprobs_from(sent)))
        except Exception as error:
            pieces.put_nowait((index, error, []))

    tasks = [asyncio.ensure_future(pump(index)) for index in range(len(answers))]
    try:
        running = len(answers)
        while running:
            index, piece, scored = await pieces.get()
            if isinstance(piece, Exception):
                raise piece
            running -= piece is None
            yield index, piece, scored
    finally:
        for task in tasks:
            task.cancel()


def _event(content: Mapping[str, Any]) -> bytes:
    return b"data: " + _json(content) + b"\n\n"


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def respond(content: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A response in JSON."""
    return Response(_json(content), status, headers, "application/json")


def respond_error(error: Refused) -> Response:
    """An error in OpenAI's shape."""
    return respond(error.body, error.status, error.headers)


def refusal(error: Exception, caller: type[Exception] | tuple[()] = ()) -> Refused:
    """What a client is told of an error; `caller` are the errors that are its own mistakes."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, QueueFull):
        return Refused(429, str(error), None, "queue_full", {"Retry-After": "1"})
    if isinstance(error, EngineClosed):
        return Refused(503, str(error), None, "shutting_down", {"Retry-After": "5"})
    if isinstance(error, TimeoutError):
        return Refused(504, str(error), None, "timeout")
    if isinstance(error, MemoryError):
        return Refused(503, "the server has no memory for this request now", None, "out_of_memory")
    if isinstance(error, caller):
        message = str(error)
        code = "context_length_exceeded" if "room in the context" in message else None
        named = re.match(r"\w*", message)
        assert named is not None
        return Refused(400, message[:1000], named[0] if named[0] in _NAMED else None, code)
    traceback.print_exception(error, file=sys.stderr)
    return Refused(500, "the server failed on this request; its log says why")


def close_all(answers: Sequence[AsyncAnswer]) -> None:
    """Cancel what is not complete."""
    for answer in answers:
        answer.close()
