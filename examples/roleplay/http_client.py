"""A small HTTP/1.1 client over asyncio that says when each piece of a response came."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from examples.roleplay.errors import Refusal

_MAX_CHUNK: Final = 1 << 24
_CONNECT_SECONDS: Final = 10.0


class ResponseError(Exception):
    """The server closed early, or sent what is no HTTP."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where the service is."""

    host: str
    port: int

    @classmethod
    def of_url(cls, url: str) -> Address:
        """Return the address in `url`. Raises Refusal for anything but http://HOST[:PORT]."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        if host is None or parts.scheme != "http" or parts.path not in ("", "/") or parts.query:
            raise Refusal(f"{url!r} is no URL of a service", "--url http://127.0.0.1:8000")
        return cls(host, 80 if port is None else port)


class Connection:
    """One connection, kept alive between requests, one request at a time. `close` in the midst of one aborts it."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def request(self, method: str, target: str, body: bytes = b"") -> tuple[int, AsyncIterator[bytes]]:
        """Return the status, and the body's pieces as they come: each chunk of a chunked one.

        Read the pieces to their end before the next request. Raises ResponseError and OSError. A kept connection
        that the server has closed meanwhile is opened anew, once.
        """
        kept = self._writer is not None
        try:
            status, headers = await self._exchange(method, target, body)
        except (ResponseError, ConnectionError):
            self.close()
            if not kept:
                raise
            status, headers = await self._exchange(method, target, body)
        return status, self._pieces(headers)

    def close(self) -> None:
        """Close at once. May be called at any time, and twice."""
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()
        self._reader = self._writer = None

    async def _exchange(self, method: str, target: str, body: bytes) -> tuple[int, dict[bytes, bytes]]:
        if self._writer is None:
            opening = asyncio.open_connection(self._address.host, self._address.port)
            self._reader, self._writer = await asyncio.wait_for(opening, _CONNECT_SECONDS)
        reader, writer = self._open()
        host = f"{self._address.host}:{self._address.port}"
        head = f"{method} {target} HTTP/1.1\r\nhost: {host}\r\ncontent-length: {len(body)}\r\n"
        if body:
            head += "content-type: application/json\r\n"
        writer.write(head.encode() + b"\r\n" + body)
        try:
            lines = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
            status = int(lines[0].split(b" ")[1])
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError, IndexError) as error:
            raise ResponseError("no HTTP response") from error
        headers = {}
        for line in lines[1:]:
            name, colon, value = line.partition(b":")
            if colon:
                headers[name.strip().lower()] = value.strip()
        return status, headers

    async def _pieces(self, headers: dict[bytes, bytes]) -> AsyncIterator[bytes]:
        reader, _ = self._open()
        try:
            if headers.get(b"transfer-encoding", b"").lower() == b"chunked":
                while size := int(await reader.readuntil(b"\r\n"), 16):
                    if not 0 < size <= _MAX_CHUNK:
                        raise ValueError(f"a chunk of {size} bytes")
                    yield (await reader.readexactly(size + 2))[:-2]
                await reader.readuntil(b"\r\n")
            else:
                yield await reader.readexactly(int(headers.get(b"content-length", b"0")))
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError) as error:
            self.close()
            raise ResponseError("the response is cut off") from error
        if headers.get(b"connection", b"").lower() == b"close":
            self.close()

    def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._reader is None or self._writer is None:
            raise ResponseError("the connection was closed")
        return self._reader, self._writer
