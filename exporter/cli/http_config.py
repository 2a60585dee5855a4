"""How an agent is asked that protects itself: the HTTP client file, in the form that promtool takes."""

from __future__ import annotations

import base64
import os
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from exporter.document import Value, document, read_regular, read_text

OPTION: Final = "--http.config.file"
_EMPTY: Final = "write basic_auth or tls_config, or leave the option out"


@dataclass(frozen=True, slots=True)
class Access:
    """What a request needs: the `authorization` header, where there is one, and how servers are verified."""

    authorization: str | None = field(default=None, repr=False)
    tls: ssl.SSLContext | None = None


def load(path: str | os.PathLike[str]) -> Access:
    """Read and check a file, with those that it names, relative to its own folder. Raises `ConfigError`."""
    name = os.fspath(path)
    root = document(read_text(name, OPTION), name, _EMPTY)
    keys = root.fields("basic_auth", "tls_config")
    if not keys:
        root.fail("nothing is configured", _EMPTY)
    folder = Path(name).parent
    return Access(
        _authorization(keys["basic_auth"], folder) if "basic_auth" in keys else None,
        _tls(keys["tls_config"], folder) if "tls_config" in keys else None,
    )


def _authorization(value: Value, folder: Path) -> str:
    keys = value.fields("username", "password", "password_file", required=("username",))
    if ("password" in keys) == ("password_file" in keys):
        value.fail("give one of `password` and `password_file`", "add `password_file:`")
    user = keys["username"].text()
    if ":" in user:
        keys["username"].fail("a name with a colon cannot be sent", "write the name alone")
    if "password" in keys:
        password = keys["password"].literal().encode()
    else:
        _, password = _read(keys["password_file"], folder)
        password = password.strip()  # as Prometheus does: an editor leaves a line's end
    return "Basic " + base64.b64encode(user.encode() + b":" + password).decode("ascii")


def _tls(value: Value, folder: Path) -> ssl.SSLContext:
    keys = value.fields("ca_file", "cert_file", "key_file")
    context = ssl.create_default_context()
    if "ca_file" in keys:
        path, text = _read(keys["ca_file"], folder)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            context.load_verify_locations(cadata=text.decode("ascii"))
        except (ssl.SSLError, ValueError):
            keys["ca_file"].fail(f"{path} holds no certificate", "name a PEM file with BEGIN CERTIFICATE")
    if ("cert_file" in keys) != ("key_file" in keys):
        value.fail("cert_file and key_file belong together", "give both, or none")
    if "cert_file" in keys:
        certificate, _ = _read(keys["cert_file"], folder)
        key, text = _read(keys["key_file"], folder)
        if b"ENCRYPTED" in text:
            keys["key_file"].fail(f"{key} is a private key with a password", "openssl pkey -in KEY -out PLAIN_KEY")
        try:
            context.load_cert_chain(certificate, key, password="")
        except ssl.SSLError as error:
            keys["cert_file"].fail(
                f"{certificate} and {key} are no certificate and its key: {error.reason or error}",
                "name two PEM files that belong together",
            )
    return context


def _read(value: Value, folder: Path) -> tuple[Path, bytes]:
    path = folder / value.text()
    try:
        return path, read_regular(os.fspath(path))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        value.fail(f"cannot read {path}: {reason}", "name a file, absolute or relative to this one")
