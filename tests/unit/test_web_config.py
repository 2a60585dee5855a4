"""The web configuration file: what is taken and what it does in a handshake, and what is refused, with its place."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import bcrypt
import msgspec
import pytest

from exporter.config import parse
from exporter.web_config import MAX_USERS, RateLimit, WebConfig, load
from probes.errors import ConfigError
from tests.certificates import Pair, authority, issue, openssl

HASH = bcrypt.hashpw(b"opening night", bcrypt.gensalt(4)).decode()
TLS = "tls_server_config:\n  cert_file: server.crt\n  key_file: server.key\n"


@dataclass(frozen=True)
class Stage:
    folder: Path
    ours: Pair
    theirs: Pair
    client: Pair
    stranger: Pair

    def load(self, text: str) -> WebConfig:
        path = self.folder / "web.yml"
        path.write_text(text)
        return load(path)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    folder = tmp_path_factory.mktemp("web")
    ours, theirs = authority(folder, "ours"), authority(folder, "theirs")
    issue(ours, folder, "server")
    issue(ours, folder, "other")
    issue(ours, folder, "weak", new_key=("-newkey", "rsa:1024"))
    key, locked = str(folder / "server.key"), str(folder / "locked.key")
    openssl("pkcs8", "-topk8", "-in", key, "-out", locked, "-passout", "pass:x")
    (folder / "junk.pem").write_text("-----BEGIN CERTIFICATE-----\nbm8=\n-----END CERTIFICATE-----\n")
    (folder / "not-ascii.pem").write_bytes(b"\xff\xfe" * 40)
    shown = issue(ours, folder, "client", "clientAuth"), issue(theirs, folder, "stranger", "clientAuth")
    return Stage(folder, ours, theirs, *shown)


def client(trusts: Pair, shows: Pair | None = None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(trusts.certificate)
    if shows is not None:
        context.load_cert_chain(shows.certificate, shows.key)
    return context


def shake_hands(server: ssl.SSLContext | None, client: ssl.SSLContext) -> tuple[str, str]:
    """TLS version and cipher suite of a connection over no network. Raises what either side raises."""
    assert server is not None
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    theirs = client.wrap_bio(to_client, to_server, server_hostname="localhost")
    ours = server.wrap_bio(to_server, to_client, server_side=True)
    waiting = [theirs, ours]
    for _ in range(8):
        for side in list(waiting):
            try:
                side.do_handshake()
                waiting.remove(side)
            except ssl.SSLWantReadError:
                pass
    assert not waiting
    # In TLS 1.3 a client learns only with the first data that the server did not like its certificate.
    ours.write(b"act")
    assert theirs.read(3) == b"act"
    version, cipher = ours.version(), ours.cipher()
    assert version is not None and cipher is not None
    return version, cipher[0]


# ---- what is taken ----


def test_everything(stage: Stage) -> None:
    web = stage.load(
        TLS
        + "http_server_config:\n"
        + "  http2: true\n"
        + "  headers: {X-Frame-Options: sameorigin, Strict-Transport-Security: max-age=31536000}\n"
        + f"basic_auth_users: {{prometheus: {HASH}, søren: {HASH.replace('$2b$', '$2y$')}}}\n"
        + "rate_limit: {interval: 500ms, burst: 7}\n"
    )
    assert web.tls is not None
    assert web.users == {b"prometheus": HASH.encode(), "søren".encode(): HASH.replace("$2b$", "$2y$").encode()}
    assert web.headers == (("x-frame-options", "sameorigin"), ("strict-transport-security", "max-age=31536000"))
    assert web.rate_limit == RateLimit(0.5, 7)
    assert HASH not in repr(web)


def test_urls_begin_as_the_agent_is_asked(stage: Stage) -> None:
    config = parse("services: [{name: a, match: {port: 8000}}]\n")
    assert config.scheme == "http"
    users = f"basic_auth_users: {{prometheus: {HASH}}}\n"
    schemes = [msgspec.structs.replace(config, web=stage.load(text)).scheme for text in (users, TLS)]
    assert schemes == ["http", "https"]


def test_users_without_tls(stage: Stage) -> None:
    web = stage.load(f"basic_auth_users: {{prometheus: {HASH}}}\n")
    assert (web.tls, list(web.users), web.headers, web.rate_limit) == (None, [b"prometheus"], (), None)


def test_a_connection_has_the_newest_version(stage: Stage) -> None:
    assert shake_hands(stage.load(TLS).tls, client(stage.ours))[0] == "TLSv1.3"


def test_a_client_that_trusts_another_authority_does_not_connect(stage: Stage) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(stage.load(TLS).tls, client(stage.theirs))


def test_certificate_and_key_may_stand_in_the_file(stage: Stage) -> None:
    def block(path: Path) -> str:
        return "|\n" + "".join(f"    {line}\n" for line in path.read_text().splitlines())

    server = Pair(stage.folder / "server.crt", stage.folder / "server.key")
    text = f"tls_server_config:\n  cert: {block(server.certificate)}  key: {block(server.key)}"
    text += f"  client_ca: {block(stage.ours.certificate)}  client_auth_type: RequireAndVerifyClientCert\n"
    shake_hands(stage.load(text).tls, client(stage.ours, stage.client))


def test_two_that_were_read_from_the_same_are_equal(stage: Stage) -> None:
    certificate = stage.folder / "server.crt"
    before = stage.load(TLS)
    assert stage.load(TLS) == before
    assert stage.load(f"{TLS}  min_version: TLS13\n") != before
    text = certificate.read_bytes()
    certificate.write_bytes(b"# renewed\n" + text)
    assert stage.load(TLS) != before
    certificate.write_bytes(text)
    assert stage.load(TLS) == before


def test_absolute_paths(stage: Stage, tmp_path: Path) -> None:
    path = tmp_path / "web.yml"
    path.write_text(TLS.replace("server.", f"{stage.folder}/server."))
    shake_hands(load(path).tls, client(stage.ours))


@pytest.mark.parametrize(
    ("how", "shows", "in_"),
    [
        (None, None, True),
        (None, "client", True),
        ("NoClientCert", None, True),
        ("NoClientCert", "stranger", True),
        ("VerifyClientCertIfGiven", None, True),
        ("VerifyClientCertIfGiven", "client", True),
        ("VerifyClientCertIfGiven", "stranger", False),
        ("RequireAndVerifyClientCert", None, False),
        ("RequireAndVerifyClientCert", "client", True),
        ("RequireAndVerifyClientCert", "stranger", False),
        ("RequireAndVerifyClientCert", "server", False),  # which is for servers, by the same authority
    ],
)
@pytest.mark.parametrize("version", ["TLS12", "TLS13"])
def test_client_certificates(stage: Stage, how: str | None, shows: str | None, in_: bool, version: str) -> None:
    text = f"{TLS}  min_version: {version}\n  max_version: {version}\n"
    text += f"  client_auth_type: {how}\n" if how is not None else ""
    text += "  client_ca_file: ours.crt\n" if how not in {None, "NoClientCert"} else ""
    web = stage.load(text)
    pair = None if shows is None else Pair(stage.folder / f"{shows}.crt", stage.folder / f"{shows}.key")
    if in_:
        shake_hands(web.tls, client(stage.ours, pair))
        return
    with pytest.raises(ssl.SSLError, match=r"PEER_DID_NOT_RETURN_A_CERTIFICATE|CERTIFICATE_VERIFY_FAILED"):
        shake_hands(web.tls, client(stage.ours, pair))


def test_the_versions_that_were_chosen(stage: Stage) -> None:
    old, new = client(stage.ours), client(stage.ours)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    assert shake_hands(stage.load(f"{TLS}  max_version: TLS12\n").tls, new)[0] == "TLSv1.2"
    with pytest.raises(ssl.SSLError):
        shake_hands(stage.load(f"{TLS}  min_version: TLS13\n").tls, old)


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated:DeprecationWarning")
def test_a_client_of_tls_1_1_does_not_connect(stage: Stage) -> None:
    old = client(stage.ours)
    old.set_ciphers("ALL:@SECLEVEL=0")
    old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(ssl.SSLError, match=r"UNSUPPORTED_PROTOCOL|ALERT_PROTOCOL_VERSION"):
        shake_hands(stage.load(TLS).tls, old)


@pytest.mark.parametrize(
    ("prefer", "suite"), [("true", "ECDHE-ECDSA-CHACHA20-POLY1305"), ("false", "ECDHE-ECDSA-AES128-GCM-SHA256")]
)
def test_whose_order_of_cipher_suites_counts(stage: Stage, prefer: str, suite: str) -> None:
    suites = "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256, TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256"
    text = f"{TLS}  cipher_suites: [{suites}]\n  prefer_server_cipher_suites: {prefer}\n"
    other = client(stage.ours)
    other.maximum_version = ssl.TLSVersion.TLSv1_2
    other.set_ciphers("ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-ECDSA-CHACHA20-POLY1305")
    assert shake_hands(stage.load(text).tls, other) == ("TLSv1.2", suite)


def test_a_cipher_suite_that_was_not_chosen_is_not_spoken(stage: Stage) -> None:
    web = stage.load(f"{TLS}  cipher_suites: [TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA]\n")
    other = client(stage.ours)
    other.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError):
        shake_hands(web.tls, other)
    other.set_ciphers("ECDHE-ECDSA-AES128-SHA")
    assert shake_hands(web.tls, other)[1] == "ECDHE-ECDSA-AES128-SHA"


def test_the_curve_that_was_chosen(stage: Stage) -> None:
    web = stage.load(f"{TLS}  curve_preferences: [CurveP384]\n")
    other = client(stage.ours)
    other.set_ecdh_curve("secp384r1")
    shake_hands(web.tls, other)
    other = client(stage.ours)
    other.set_ecdh_curve("secp521r1")
    with pytest.raises(ssl.SSLError):
        shake_hands(web.tls, other)


# ---- what is refused ----

USER = "basic_auth_users:\n  prometheus: "

BAD = [
    ("", 1, "the configuration is empty"),
    ("{}\n", 1, "nothing is configured"),
    ("- tls_server_config\n", 1, "must be a mapping"),
    ("tls_config: {}\n", 1, "unknown key 'tls_config'.*tls_server_config"),
    ("\n\ntls_server_config: {cert_fil: server.crt}\n", 3, "unknown key 'cert_fil'.*'cert_file'"),
    ("tls_server_config:\n  key_file: server.key\n", 2, "no certificate is given"),
    ("tls_server_config:\n  cert_file: server.crt\n", 2, "no private key is given"),
    ("tls_server_config:\n  cert_file: server.crt\n  key_file: 7\n", 3, "must be text"),
    ("tls_server_config:\n  cert_file: gone.crt\n  key_file: server.key\n", 2, "cannot read .*gone.crt: No such file"),
    ("tls_server_config:\n  cert_file: server.crt\n  key_file: .\n", 3, "cannot read .*: it is not a regular file"),
    (f"{TLS}  key: x\n", 2, "key and key_file are both given"),
    ("tls_server_config:\n  cert_file: junk.pem\n  key_file: server.key\n", 2, "junk.pem holds no certificate"),
    ("tls_server_config:\n  cert_file: server.key\n  key_file: server.key\n", 2, "server.key holds no certificate"),
    ("tls_server_config:\n  cert_file: not-ascii.pem\n  key_file: server.key\n", 2, "holds no certificate"),
    ("tls_server_config:\n  cert_file: server.crt\n  key_file: server.crt\n", 3, "server.crt holds no private key"),
    ("tls_server_config:\n  cert_file: server.crt\n  key: |\n    no key\n", 3, "what stands here holds no private key"),
    ("tls_server_config:\n  cert_file: server.crt\n  key_file: other.key\n", 3, "is not the private key of"),
    ("tls_server_config:\n  cert_file: server.crt\n  key_file: locked.key\n", 3, "private key with a password"),
    ("tls_server_config:\n  cert_file: weak.crt\n  key_file: weak.key\n", 2, "weak.crt is too weak.*ee key too small"),
    (f"{TLS}  min_version: TLS11\n", 4, "TLS11 is not secure"),
    (f"{TLS}  min_version: TLSv1.2\n", 4, "'TLSv1.2' is not known.*'TLS12'|allowed here: TLS12, TLS13"),
    (f"{TLS}  min_version: TLS13\n  max_version: TLS12\n", 2, "min_version TLS13 is above max_version TLS12"),
    (f"{TLS}  cipher_suites:\n  - TLS_RSA_WITH_RC4_128_SHA\n", 5, "'TLS_RSA_WITH_RC4_128_SHA' is not known"),
    (f"{TLS}  cipher_suites: [TLS_AES_128_GCM_SHA256]\n", 4, "suite of TLS 1.3"),
    (
        f"{TLS}  min_version: TLS13\n  cipher_suites: [TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256]\n",
        5,
        "can be chosen up to TLS 1.2 only",
    ),
    (f"{TLS}  cipher_suites: []\n", 4, "the list is empty"),
    (f"{TLS}  prefer_server_cipher_suites: maybe\n", 4, "must be on or off"),
    (f"{TLS}  curve_preferences: [Curve25519]\n", 4, "'Curve25519' is not known"),
    (f"{TLS}  curve_preferences: [X25519, CurveP256]\n", 4, "takes one curve only"),
    (f"{TLS}  client_auth_type: RequestClientCert\n", 4, "without verifying"),
    (f"{TLS}  client_auth_type: RequireAnyClientCert\n", 4, "without verifying"),
    (f"{TLS}  client_auth_type: RequireAndVerifyClientCerts\n", 4, "is not known"),
    (f"{TLS}  client_auth_type: RequireAndVerifyClientCert\n", 2, "needs to know who signs"),
    (f"{TLS}  client_ca_file: ours.crt\n", 4, "clients are not asked for certificates"),
    (f"{TLS}  client_auth_type: NoClientCert\n  client_ca_file: ours.crt\n", 5, "clients are not asked"),
    (
        f"{TLS}  client_auth_type: VerifyClientCertIfGiven\n  client_ca_file: junk.pem\n",
        5,
        "junk.pem holds no certificate",
    ),
    (f"{TLS}  client_allowed_sans: [prometheus]\n", 4, "are not looked at here"),
    ("http_server_config:\n  http3: true\n", 2, "unknown key 'http3'"),
    ("http_server_config:\n  http2: 7\n", 2, "must be on or off"),
    ("http_server_config:\n  headers:\n    Server: stage\n", 3, "unknown key 'Server'"),
    ("http_server_config:\n  headers:\n    X-Frame-Options: allow\n", 3, "'allow' is no value of X-Frame-Options"),
    ('http_server_config:\n  headers:\n    X-XSS-Protection: "1\\r\\nx: y"\n', 3, "without control characters"),
    ("http_server_config:\n  headers:\n    X-XSS-Protection: ø\n", 3, "cannot stand in a header"),
    ("basic_auth_users: {}\n", 1, "there are 0 users"),
    ("basic_auth_users: [a]\n", 1, "must be a mapping of names"),
    ("basic_auth_users:\n  a: b\n  a: c\n", 3, "'a' is given twice"),
    (f"basic_auth_users:\n  a:b: {HASH}\n", 2, "'a:b' cannot be the name of a user"),
    (f'basic_auth_users:\n  "": {HASH}\n', 2, "'' cannot be the name of a user"),
    (f"{USER}opening night\n", 2, "no bcrypt hash"),
    (f"{USER}{HASH[:-1]}\n", 2, "no bcrypt hash"),
    (f"{USER}{HASH.replace('$2b$', '$1$')}\n", 2, "no bcrypt hash"),
    (f"{USER}{HASH[:28]}a{HASH[29:]}\n", 2, "no bcrypt hash"),
    (f"{USER}{HASH.replace('$04$', '$17$')}\n", 2, "a cost of 17"),
    (f"{USER}{HASH.replace('$04$', '$03$')}\n", 2, "a cost of 3"),
    (f"{USER}\n", 2, "must be text, not nothing"),
    ("rate_limit: {interval: 1s}\n", 1, "the key 'burst' is missing"),
    ("rate_limit:\n  interval: 0s\n  burst: 1\n", 2, "must be a time"),
    ("rate_limit:\n  interval: 1s\n  burst: 0\n", 3, "must be a whole number from 1"),
    ("tls_server_config: &a {}\nhttp_server_config: *a\n", 2, "an alias .* is not allowed"),
    ("basic_auth_users: [\n", 2, "not valid YAML"),
]


@pytest.mark.parametrize(("text", "line", "what"), BAD)
def test_bad_files_are_refused_with_their_place(stage: Stage, text: str, line: int, what: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){what}") as caught:
        stage.load(text)
    assert (caught.value.path, caught.value.line) == (str(stage.folder / "web.yml"), line)
    assert caught.value.exit_code == 4


def test_too_many_users(stage: Stage) -> None:
    users = "".join(f"  user{number}: {HASH}\n" for number in range(MAX_USERS + 1))
    with pytest.raises(ConfigError, match="there are 257 users"):
        stage.load(f"basic_auth_users:\n{users}")


@pytest.mark.parametrize(
    "text",
    [
        f"{USER}opening0423\n",
        f"{USER}20260423\n",
        f"{USER}0423.5\n",
        f"{USER}2026-04-23\n",
        f'{USER}"\\x000423"\n',
        "basic_auth_users: prometheus:0423\n",
        "basic_auth_users:\n  prometheus:0423\n",
        "basic_auth_users: [prometheus:0423]\n",
    ],
)
def test_what_stands_in_place_of_a_hash_is_not_shown(stage: Stage, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        stage.load(text)
    assert "0423" not in str(caught.value)


def test_a_missing_file_names_the_option(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration: No such file.*--web\.config\.file"):
        load(tmp_path / "gone.yml")


def test_it_is_no_key_of_the_configuration() -> None:
    with pytest.raises(ConfigError, match="unknown key 'web'"):
        parse("services: [{name: a, match: {port: 8000}}]\nweb: {}\n")
