"""The HTTP side of the service: its routes, and which engine a request goes to."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from typing import Final, Protocol

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from examples.roleplay.engines import Generation, Options
from examples.roleplay.errors import ApiError
from examples.roleplay.metrics import CONTENT_TYPE, ServiceMetrics
from examples.roleplay.model import ModelShape
from examples.roleplay.openai import (
    DEFAULT_MAX_TOKENS,
    MAX_BODY,
    ChatRequest,
    Common,
    CompletionRequest,
    error_body,
    parse,
)
from examples.roleplay.personas import Persona, PersonaStore
from examples.roleplay.replies import Asked, Reply
from examples.roleplay.tokens import TokenArray, encode_chat, encode_text

_JSON: Final = "application/json"
_ABOUT: Final = """The role-play service of Footlight. Its words are noise, its work is real.

POST /v1/chat/completions   with "persona" from /v1/personas, streamed or not
POST /v1/completions
GET  /v1/models  /v1/personas  /metrics  /health
"""


class EngineLike(Protocol):
    """What the API needs of an engine. `ready` is whether it would take a request now."""

    shape: ModelShape

    @property
    def ready(self) -> bool:
        """Whether a request would be taken now."""

    def generate(self, prompt: TokenArray, options: Options) -> Generation:
        """Queue a request. Raises ApiError when it cannot be taken."""


class Api:
    """The endpoints over `engines` by model name."""

    def __init__(self, engines: Mapping[str, EngineLike], personas: PersonaStore, metrics: ServiceMetrics) -> None:
        self.closing = False
        self._engines = engines
        self._personas = personas
        self._metrics = metrics
        self._started = int(time.time())

    def app(self) -> Starlette:
        """Return the ASGI application."""
        return Starlette(
            routes=[
                Route("/", _about),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/completions", self._complete, methods=["POST"]),
                Route("/v1/models", self._models),
                Route("/v1/personas", self._list_personas),
                Route("/metrics", self._show_metrics),
                Route("/health", self._health),
            ],
            exception_handlers={ApiError: _refuse, HTTPException: _refuse_route, ClientDisconnect: _nobody_there},
        )

    async def _chat(self, request: Request) -> Response:
        received = time.perf_counter()
        asked = parse(ChatRequest, await _body(request))
        engine = self._engine(asked.model)
        turns = asked.turns()
        if asked.persona is not None:
            turns.insert(0, ("system", self._persona(asked.persona).instructions))
        limit = asked.max_completion_tokens or asked.max_tokens
        return self._reply(engine, asked, encode_chat(turns), limit, received, chat=True)

    async def _complete(self, request: Request) -> Response:
        received = time.perf_counter()
        asked = parse(CompletionRequest, await _body(request))
        engine = self._engine(asked.model)
        return self._reply(engine, asked, encode_text(asked.text), asked.max_tokens, received, chat=False)

    def _reply(
        self, engine: EngineLike, asked: Common, prompt: TokenArray, limit: int | None, received: float, *, chat: bool
    ) -> Response:
        context = engine.shape.context
        room = context - len(prompt)
        if room < (limit or 1):
            raise ApiError(
                400,
                f"The context of `{asked.model}` is {context} tokens. The prompt has {len(prompt)} "
                f"and {limit or 1} were asked for. Shorten either.",
                code="context_length_exceeded",
                param="messages" if chat else "prompt",
            )
        if self.closing:
            raise ApiError(503, "The service is shutting down.")
        options = Options(
            max_tokens=limit or min(room, DEFAULT_MAX_TOKENS),
            temperature=1.0 if asked.temperature is None else asked.temperature,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            seed=secrets.randbits(63) if asked.seed is None else asked.seed,
            may_end=not asked.ignore_eos,
        )
        generation = engine.generate(prompt, options)
        self._metrics.received(asked.model, options.max_tokens)
        facts = Asked(asked.model, received, len(prompt), asked.stops, chat, asked.stream, asked.include_usage)
        return Reply(facts, generation, self._metrics)

    async def _models(self, _: Request) -> Response:
        cards = [
            {
                "id": name,
                "object": "model",
                "created": self._started,
                "owned_by": "footlight",
                "max_model_len": engine.shape.context,
            }
            for name, engine in self._engines.items()
        ]
        return _json({"object": "list", "data": cards})

    async def _list_personas(self, _: Request) -> Response:
        cards = [
            {"id": name, "name": persona.name, "summary": persona.summary, "greeting": persona.greeting}
            for name, persona in self._personas.all().items()
        ]
        return _json({"object": "list", "data": cards})

    async def _show_metrics(self, _: Request) -> Response:
        return Response(self._metrics.render(), headers={"content-type": CONTENT_TYPE})

    async def _health(self, _: Request) -> Response:
        absent = [name for name, engine in self._engines.items() if not engine.ready]
        if absent:
            return PlainTextResponse(f"not running: {', '.join(absent)}\n", status_code=503)
        return PlainTextResponse("ok\n")

    def _engine(self, model: str) -> EngineLike:
        engine = self._engines.get(model)
        if engine is None:
            raise ApiError(
                404,
                f"The model `{model[:64]}` does not exist. There are: {', '.join(self._engines)}.",
                code="model_not_found",
                param="model",
            )
        return engine

    def _persona(self, name: str) -> Persona:
        persona = self._personas.all().get(name)
        if persona is None:
            raise ApiError(
                404,
                f"The persona `{name[:64]}` does not exist. There are: {', '.join(self._personas.all())}.",
                code="persona_not_found",
                param="persona",
            )
        return persona


async def _about(_: Request) -> Response:
    return PlainTextResponse(_ABOUT)


async def _body(request: Request) -> bytes:
    """Return the request's body. Raises ApiError 413 as soon as it is more than `MAX_BODY` bytes."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise ApiError(413, f"The body is larger than {MAX_BODY} bytes.")
    return bytes(body)


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type=_JSON)


async def _refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return Response(error_body(error), status_code=error.status, media_type=_JSON)


async def _refuse_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:256]}: {error.detail}"
    body = error_body(ApiError(error.status_code, message))
    return Response(body, status_code=error.status_code, media_type=_JSON, headers=error.headers)


async def _nobody_there(_: Request, __: Exception) -> Response:
    """Answer a client that left while it was sending: the server wants an answer, nobody reads it."""
    return Response(status_code=400)
