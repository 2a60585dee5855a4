"""How /metrics is protected: the web configuration file, in the form that Prometheus and its exporters take.

TLS, client certificates, users with bcrypt hashes, headers of answers, a rate limit. What Python's ssl cannot do is
refused with the reason, and nothing takes effect unless everything does. Certificates and keys are read here, while
the process may; who serves is a process that may read no file.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from exporter.document import Value, did_you_mean, document, read_regular, read_text, shown

if TYPE_CHECKING:
    import ssl

OPTION: Final = "--web.config.file"
MAX_USERS: Final = 256
MAX_COST: Final = 16
"""Of a bcrypt hash: one look at a password takes 2**cost rounds, with 16 about three seconds."""

_EMPTY: Final = "write tls_server_config or basic_auth_users, or leave the option out"
_TLS_KEYS: Final = tuple(
    "cert cert_file key key_file client_ca client_ca_file client_auth_type client_allowed_sans min_version max_version "
    "cipher_suites prefer_server_cipher_suites curve_preferences".split()
)
_HEADERS: Final = {
    "Content-Security-Policy": (),
    "Strict-Transport-Security": (),
    "X-Content-Type-Options": ("nosniff",),
    "X-Frame-Options": ("deny", "sameorigin"),
    "X-XSS-Protection": (),
}
"""Headers that may be set, with the values that are allowed; none means any."""
_BCRYPT: Final = re.compile(r"\$2[aby]\$([0-9]{2})\$[./A-Za-z0-9]{21}[.Oeu][./A-Za-z0-9]{31}")
_NO_CERTIFICATE: Final = "NoClientCert"
_VERIFYING: Final = ("VerifyClientCertIfGiven", "RequireAndVerifyClientCert")
_UNVERIFIED: Final = ("RequestClientCert", "RequireAnyClientCert", "RequireClientCert")
_VERSIONS: Final = {"TLS12": "TLSv1_2", "TLS13": "TLSv1_3"}
_OLD_VERSIONS: Final = ("TLS10", "TLS11")
_CURVES: Final = {"CurveP256": "prime256v1", "CurveP384": "secp384r1", "CurveP521": "secp521r1", "X25519": "X25519"}
_CIPHERS: Final = {
    f"TLS_ECDHE_{auth}_WITH_{name}": f"ECDHE-{auth}-{openssl}"
    for auth in ("ECDSA", "RSA")
    for name, openssl in (
        ("AES_128_GCM_SHA256", "AES128-GCM-SHA256"),
        ("AES_256_GCM_SHA384", "AES256-GCM-SHA384"),
        ("CHACHA20_POLY1305_SHA256", "CHACHA20-POLY1305"),
        ("AES_128_CBC_SHA", "AES128-SHA"),
        ("AES_256_CBC_SHA", "AES256-SHA"),
    )
}
"""Cipher suites up to TLS 1.2 by their names in Go, which are the registered ones, with OpenSSL's names."""


@dataclass(frozen=True, slots=True)
class RateLimit:
    """One request each `interval_s` seconds, and `burst` of them at once."""

    interval_s: float
    burst: int


@dataclass(frozen=True, slots=True)
class WebConfig:
    """How answers are protected. `users` are bcrypt hashes by name, both UTF-8; none means that nobody is asked.

    `tls` is ready to use; None means plain HTTP. `headers` replace those that answers have. Two are equal that were
    read from the same text and the same certificates and keys, of which `digest` is made.
    """

    tls: ssl.SSLContext | None = field(default=None, compare=False)
    users: dict[bytes, bytes] = field(default_factory=dict, repr=False, hash=False)
    headers: tuple[tuple[str, str], ...] = ()
    rate_limit: RateLimit | None = None
    digest: bytes = field(default=b"", repr=False)


def load(path: str | os.PathLike[str]) -> WebConfig:
    """Read and check a web configuration file, with the files that it names, relative to its own folder.

    Raises `ConfigError` with `path` and, where there is one, the 1-based `line`.
    """
    name = os.fspath(path)
    text = read_text(name, OPTION)
    files = _Files(Path(name).parent, hashlib.sha256(text.encode()))
    root = document(text, name, _EMPTY)
    keys = root.fields("tls_server_config", "http_server_config", "basic_auth_users", "rate_limit")
    if not keys:
        root.fail("nothing is configured", _EMPTY)
    return WebConfig(
        tls=_tls(keys["tls_server_config"], files) if "tls_server_config" in keys else None,
        users=_users(keys["basic_auth_users"]) if "basic_auth_users" in keys else {},
        headers=_http(keys["http_server_config"]) if "http_server_config" in keys else (),
        rate_limit=_rate_limit(keys["rate_limit"]) if "rate_limit" in keys else None,
        digest=files.read.digest(),
    )


def _http(value: Value) -> tuple[tuple[str, str], ...]:
    keys = value.fields("http2", "headers")
    if "http2" in keys:
        keys["http2"].switch()  # without effect: HTTP/1.1 is spoken, which every client of HTTP/2 speaks, too
    if "headers" not in keys:
        return ()
    headers = []
    for name, item in keys["headers"].fields(*_HEADERS).items():
        text = item.text()
        if not text.isascii():
            item.fail(f"{shown(text)} cannot stand in a header", "use ASCII characters")
        if _HEADERS[name] and text not in _HEADERS[name]:
            item.fail(f"{shown(text)} is no value of {name}", f"write {' or '.join(_HEADERS[name])}")
        headers.append((name.lower(), text))
    return tuple(headers)


def _rate_limit(value: Value) -> RateLimit:
    keys = value.fields("interval", "burst", required=("interval", "burst"))
    return RateLimit(keys["interval"].duration(1e-6, 3600), keys["burst"].whole(1, 1_000_000))


def _users(value: Value) -> dict[bytes, bytes]:
    # Nothing that stands in place of a hash is shown: it may be the password itself.
    if value.node.id != "mapping":
        value.fail("must be a mapping of names to bcrypt hashes", "write `NAME: HASH` lines, indented with spaces")
    users = {}
    entries = value.keys()
    if not 1 <= len(entries) <= MAX_USERS:
        value.fail(f"there are {len(entries)} users", f"list 1 to {MAX_USERS}, or remove the key: then nobody is asked")
    for name, item in entries.items():
        if not name or not name.isprintable() or ":" in name:
            item.fail(f"{shown(name)} cannot be the name of a user", "use printable characters, and no colon")
        text = item.literal()
        found = _BCRYPT.fullmatch(text)
        if found is None:
            item.fail("this is no bcrypt hash", "write what `htpasswd -nBC 10 NAME` prints after the colon")
        if not 4 <= int(found[1]) <= MAX_COST:
            item.fail(f"a cost of {int(found[1])} is not from 4 to {MAX_COST}", "htpasswd -nBC 10 NAME")
        users[name.encode()] = text.encode("ascii")
    return users


# ---- TLS ----


@dataclass(frozen=True, slots=True)
class _Files:
    """Where relative paths begin, and the hash of everything that was read."""

    folder: Path
    read: hashlib._Hash


def _tls(value: Value, files: _Files) -> ssl.SSLContext:
    import ssl  # noqa: PLC0415 - 4 MiB that an agent without TLS need not hold

    keys = value.fields(*_TLS_KEYS)
    certificate = _pem(value, keys, "cert", files)
    key = _pem(value, keys, "key", files)
    if certificate is None:
        value.fail("no certificate is given", "add `cert_file:`")
    if key is None:
        value.fail("no private key is given", "add `key_file:`")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    _choose_versions(context, value, keys)
    _choose_ciphers(context, keys)
    _choose_curve(context, keys)
    _load_pair(context, certificate, key)
    _ask_clients(context, value, keys, files)
    return context


@dataclass(frozen=True, slots=True)
class _Pem:
    """The text of a PEM file or of one that stands in the configuration itself, and the value that gave it."""

    text: bytes = field(repr=False)
    value: Value
    name: str

    def fail(self, what: str, next_step: str) -> NoReturn:
        """Raise `ConfigError` with the place of the value."""
        self.value.fail(f"{self.name} {what}", next_step)


def _pem(at: Value, keys: dict[str, Value], key: str, files: _Files) -> _Pem | None:
    """What the key `NAME` or `NAME_file` gives; None where there is neither."""
    inline, file = keys.get(key), keys.get(f"{key}_file")
    if inline is not None and file is not None:
        at.fail(f"{key} and {key}_file are both given", "keep one of the two")
    if inline is not None:
        return _Pem(inline.literal().encode(), inline, "what stands here")
    if file is None:
        return None
    path = files.folder / file.text()
    try:
        text = read_regular(os.fspath(path))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        file.fail(f"cannot read {path}: {reason}", "name a PEM file, absolute or relative to this one")
    files.read.update(hashlib.sha256(text).digest())
    return _Pem(text, file, str(path))


def _load_pair(context: ssl.SSLContext, certificate: _Pem, key: _Pem) -> None:
    import ssl  # noqa: PLC0415 - as above

    _load_authorities(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), certificate)
    if b"ENCRYPTED" in key.text:
        key.fail("is a private key with a password", "openssl pkey -in KEY -out PLAIN_KEY, readable for root only")
    try:
        # ssl reads certificates from files only. Nobody is asked for a password: there is no terminal in a service.
        with _path_to(certificate.text) as certificates, _path_to(key.text) as keys:
            context.load_cert_chain(certificates, keys, password="")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            key.fail(f"is not the private key of {certificate.name}", "name the key that the certificate was made for")
        if str(error.reason).endswith(("TOO_SMALL", "TOO_WEAK")):
            certificate.fail(f"is too weak for OpenSSL: {_reason(error)}", "make a new one, with 2048 bits or more")
        key.fail(f"holds no private key: {_reason(error)}", "name a PEM file with BEGIN PRIVATE KEY")


@contextlib.contextmanager
def _path_to(content: bytes) -> Iterator[str]:
    """The path of a file in memory, which is there within the context."""
    fd = os.memfd_create("pem", os.MFD_CLOEXEC)
    try:
        os.write(fd, content)
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def _load_authorities(context: ssl.SSLContext, pem: _Pem) -> None:
    import ssl  # noqa: PLC0415 - as above

    try:
        context.load_verify_locations(cadata=pem.text.decode("ascii"))
    except (ssl.SSLError, ValueError) as error:
        pem.fail(f"holds no certificate: {_reason(error)}", "name a PEM file with BEGIN CERTIFICATE")


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", None)
    return str(reason).lower().replace("_", " ") if reason else str(error).partition(" (_ssl")[0]


def _choose_versions(context: ssl.SSLContext, value: Value, keys: dict[str, Value]) -> None:
    import ssl  # noqa: PLC0415 - as above

    def version(name: str, default: str) -> str:
        if name not in keys:
            return default
        text = keys[name].text()
        if text in _OLD_VERSIONS:
            keys[name].fail(f"{text} is not secure and not spoken here", "write TLS12 or TLS13")
        return _one_of(keys[name], text, tuple(_VERSIONS))

    low, high = version("min_version", "TLS12"), version("max_version", "TLS13")
    if low > high:
        value.fail(f"min_version {low} is above max_version {high}", "swap the two")
    context.minimum_version = ssl.TLSVersion[_VERSIONS[low]]
    context.maximum_version = ssl.TLSVersion[_VERSIONS[high]]


def _choose_ciphers(context: ssl.SSLContext, keys: dict[str, Value]) -> None:
    import ssl  # noqa: PLC0415 - as above

    if "prefer_server_cipher_suites" in keys and not keys["prefer_server_cipher_suites"].switch():
        context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
    if "cipher_suites" not in keys:
        return
    suites = keys["cipher_suites"]
    if context.minimum_version == ssl.TLSVersion.TLSv1_3:
        suites.fail("cipher suites can be chosen up to TLS 1.2 only", "remove the key, or write min_version: TLS12")
    names = suites.one_or_more(_cipher)
    try:
        context.set_ciphers(":".join(names))
    except ssl.SSLError as error:
        suites.fail(f"OpenSSL has none of these: {_reason(error)}", "remove the key")
    missing = sorted(set(names) - {cipher["name"] for cipher in context.get_ciphers()})
    if missing:
        suites.fail(f"OpenSSL here has no {', '.join(missing)}", "remove what is missing")


def _cipher(item: Value) -> str:
    text = item.text()
    if text.startswith("TLS_") and "_WITH_" not in text:
        item.fail(f"{shown(text)} is a suite of TLS 1.3, which all are on and cannot be chosen", "remove it")
    return _CIPHERS[_one_of(item, text, tuple(_CIPHERS))]


def _choose_curve(context: ssl.SSLContext, keys: dict[str, Value]) -> None:
    if "curve_preferences" not in keys:
        return
    value = keys["curve_preferences"]
    names = value.one_or_more(lambda item: _one_of(item, item.text(), tuple(_CURVES)))
    if len(names) > 1:
        value.fail("Python's ssl takes one curve only", "keep one, or remove the key: then OpenSSL's are used")
    context.set_ecdh_curve(_CURVES[names[0]])


def _ask_clients(context: ssl.SSLContext, value: Value, keys: dict[str, Value], files: _Files) -> None:
    import ssl  # noqa: PLC0415 - as above

    if "client_allowed_sans" in keys:
        keys["client_allowed_sans"].fail(
            "names in clients' certificates are not looked at here",
            "let a CA of its own sign them, and name only that one as client_ca_file",
        )
    how = _NO_CERTIFICATE
    if "client_auth_type" in keys:
        at = keys["client_auth_type"]
        how = at.text()
        if how in _UNVERIFIED:
            at.fail(
                f"{how} takes certificates without verifying them, which Python's ssl cannot",
                f"write {_VERIFYING[1]} and client_ca_file, or {_NO_CERTIFICATE}",
            )
        _one_of(at, how, (_NO_CERTIFICATE, *_VERIFYING))
    authorities = _pem(value, keys, "client_ca", files)
    if how == _NO_CERTIFICATE:
        if authorities is not None:
            authorities.value.fail("clients are not asked for certificates", f"add `client_auth_type: {_VERIFYING[1]}`")
        return
    if authorities is None:
        # Go would take any certificate that a public authority signed.
        value.fail(f"{how} needs to know who signs the clients' certificates", "add `client_ca_file:`")
    _load_authorities(context, authorities)
    context.verify_mode = ssl.CERT_OPTIONAL if how == _VERIFYING[0] else ssl.CERT_REQUIRED


def _one_of(value: Value, text: str, allowed: tuple[str, ...]) -> str:
    if text not in allowed:
        value.fail(f"{shown(text)} is not known", f"{did_you_mean(text, allowed)}allowed here: {', '.join(allowed)}")
    return text
