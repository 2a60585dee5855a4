"""Lets the planned users talk to a service, and takes down what they feel."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Final

from examples.roleplay.errors import Refusal
from examples.roleplay.http_client import Address, Connection, ResponseError
from examples.roleplay.plan import Conversation, Habits, Turn, conversations, trim
from examples.roleplay.summary import ModelSummary, Outcome, Summary

log = logging.getLogger("users")

# Room for the chat template's marks and the service's own instructions.
_MARGIN: Final = 64
# After the first frame a user bears any pace, but no stall as long as this.
_STALL_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class Model:
    """A model as /v1/models shows it. `context` is tokens, which are bytes here."""

    name: str
    context: int


@dataclass(frozen=True, slots=True)
class Character:
    """A persona as /v1/personas shows it."""

    name: str
    greeting: str


def run_users(url: str, habits: Habits, *, seed: int, duration_s: float | None, max_users: int) -> Summary:
    """Let users come for `duration_s` (None: until SIGINT or SIGTERM), then let those who are there finish.

    Returns what they felt. A signal ends everything at once; what was felt so far is returned. Raises Refusal when
    there is no such service at `url`.
    """
    return asyncio.run(Crowd(Address.of_url(url), habits, seed, max_users).run(duration_s))


class Crowd:
    """The users of one run."""

    def __init__(self, address: Address, habits: Habits, seed: int, max_users: int) -> None:
        self._address = address
        self._habits = habits
        self._max_users = max_users
        self._summary = Summary(seed)

    async def run(self, duration_s: float | None) -> Summary:
        """See `run_users`."""
        models, characters = await self._introduce()
        summary = self._summary
        summary.models = {model.name: ModelSummary() for model in models}
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        began = time.perf_counter()
        stopped = asyncio.create_task(stop.wait())
        there: set[asyncio.Task[None]] = set()
        for conversation in conversations(self._habits, summary.seed, len(models), len(characters)):
            if duration_s is not None and conversation.at_s >= duration_s:
                break
            await asyncio.wait([stopped], timeout=max(0.0, began + conversation.at_s - time.perf_counter()))
            if stop.is_set():
                break
            summary.conversations += 1
            if len(there) >= self._max_users:
                summary.turned_away += 1
                continue
            character = characters[conversation.persona] if characters else None
            task = asyncio.create_task(self._converse(conversation, models[conversation.model], character))
            there.add(task)
            task.add_done_callback(there.discard)
        while there and not stop.is_set():
            await asyncio.wait([stopped, *there], return_when=asyncio.FIRST_COMPLETED)
        for task in there:
            task.cancel()
        await asyncio.gather(*there, return_exceptions=True)
        stopped.cancel()
        summary.elapsed_s = time.perf_counter() - began
        return summary

    async def _introduce(self) -> tuple[list[Model], list[Character]]:
        """Ask the service for its models and personas. Personas are optional: other services have none."""
        connection = Connection(self._address)
        try:
            status, cards = await _get(connection, "/v1/models")
            if status != 200 or not cards:
                raise ResponseError(f"/v1/models answers {status} with {len(cards)} models")
            models = [Model(str(card["id"]), int(card.get("max_model_len") or 4096)) for card in cards]
            status, cards = await _get(connection, "/v1/personas")
            characters = [Character(str(card["id"]), str(card["greeting"])) for card in cards] if status == 200 else []
        except (OSError, TimeoutError) as error:
            where = f"{self._address.host}:{self._address.port}"
            raise Refusal(
                f"nothing answers at {where} ({error})", "python -m examples.roleplay serve, or another --url"
            ) from None
        except (ResponseError, KeyError, TypeError, ValueError) as error:
            what = f"what answers is no such service: {error!r}"
            raise Refusal(what, "--url of an OpenAI-compatible service") from None
        finally:
            connection.close()
        return models, characters

    async def _converse(self, plan: Conversation, model: Model, character: Character | None) -> None:
        connection = Connection(self._address)
        felt = self._summary.models[model.name]
        history: list[tuple[str, str]] = []
        if character is not None:
            # The character speaks first. `trim` drops pairs, so the pair needs somebody who was spoken to.
            history += [("user", "Good evening."), ("assistant", character.greeting)]
        try:
            for turn in plan.turns:
                await asyncio.sleep(turn.think_s)
                # A quarter of the context is the persona's, at most.
                room = model.context * 3 // 4 - turn.max_tokens - _MARGIN
                history = trim([*history, ("user", turn.text)], room)
                reply = await self._say(connection, model, character, history, turn, felt)
                if reply is None:
                    return
                history.append(("assistant", reply))
        finally:
            connection.close()

    async def _say(
        self,
        connection: Connection,
        model: Model,
        character: Character | None,
        history: list[tuple[str, str]],
        turn: Turn,
        felt: ModelSummary,
    ) -> str | None:
        """Say one turn. Returns the reply, or None when there is no point in going on."""
        body: dict[str, Any] = {
            "model": model.name,
            "messages": [{"role": role, "content": text} for role, text in history],
            "max_tokens": turn.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if character is not None:
            body["persona"] = character.name
        reading = _Reading(felt, turn)
        try:
            async with asyncio.timeout(turn.patience_s) as patience:
                outcome = await reading.read(connection, json.dumps(body).encode(), patience)
        except TimeoutError:
            outcome = Outcome.LEFT_STREAMING if reading.text else Outcome.LEFT_WAITING
        except (ResponseError, OSError) as error:
            log.warning("a request failed: %s", error)
            outcome = Outcome.FAILED
        felt.outcomes[outcome] += 1
        return "".join(reading.text) if outcome is Outcome.COMPLETE else None


class _Reading:
    """One reply as it is read; `text` has what came so far."""

    def __init__(self, felt: ModelSummary, turn: Turn) -> None:
        self.text: list[str] = []
        self._felt = felt
        self._turn = turn

    async def read(self, connection: Connection, body: bytes, patience: asyncio.Timeout) -> Outcome:
        """Send `body` and read the reply. Moves `patience` on with each frame. Raises ResponseError, OSError."""
        felt, clock = self._felt, asyncio.get_running_loop().time
        began = last = time.perf_counter()
        status, pieces = await connection.request("POST", "/v1/chat/completions", body)
        if status != 200:
            answer = b"".join([piece async for piece in pieces])
            log.warning("a request got status %d: %s", status, answer[:200].decode(errors="replace"))
            return Outcome.REFUSED if status < 500 else Outcome.FAILED
        done = False
        async for event in _events(pieces):
            now = time.perf_counter()
            if event == b"[DONE]":
                done = True
                continue
            frame = _Frame.of(event)
            if frame.usage is not None:
                self._count(frame.usage)
            if not frame.text:
                continue
            (felt.itl if self.text else felt.ttft).add(now - last)
            last = now
            felt.frames += 1
            self.text.append(frame.text)
            patience.reschedule(clock() + _STALL_SECONDS)
            if len(self.text) == self._turn.leaves_after:
                connection.close()
                return Outcome.LEFT_STREAMING
        if not done:
            raise ResponseError("the stream ends without [DONE]")
        felt.duration.add(time.perf_counter() - began)
        return Outcome.COMPLETE

    def _count(self, usage: dict[str, Any]) -> None:
        self._felt.prompt_tokens += usage.get("prompt_tokens") or 0
        self._felt.completion_tokens += usage.get("completion_tokens") or 0
        self._felt.cached_tokens += (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


@dataclass(frozen=True, slots=True)
class _Frame:
    text: str
    usage: dict[str, Any] | None

    @classmethod
    def of(cls, event: bytes) -> _Frame:
        """Return what `event` carries. Raises ResponseError for an error frame and for what is no frame."""
        try:
            value = json.loads(event)
            if value.get("error"):
                raise ResponseError(f"broken off: {value['error'].get('message')}")
            choices = value.get("choices") or [{}]
            return cls((choices[0].get("delta") or {}).get("content") or "", value.get("usage"))
        except (ValueError, AttributeError, TypeError, LookupError, RecursionError) as error:
            raise ResponseError("a frame is not understood") from error


async def _events(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the data of each event of a stream whose events are one `data:` line each, as this service's are."""
    buffer = b""
    async for piece in pieces:
        *events, buffer = (buffer + piece).split(b"\n\n")
        for event in events:
            if event.startswith(b"data: "):
                yield event[len(b"data: ") :]


async def _get(connection: Connection, target: str) -> tuple[int, list[dict[str, Any]]]:
    """Return the status and, where it is 200, the list under `data`."""
    status, pieces = await connection.request("GET", target)
    body = b"".join([piece async for piece in pieces])
    return status, list(json.loads(body)["data"]) if status == 200 else []
