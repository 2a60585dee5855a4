"""An authority of the tests' own, and certificates that it signs, made by openssl."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_EC: Final = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate and its private key, as PEM files."""

    certificate: Path
    key: Path


def authority(folder: Path, name: str) -> Pair:
    """A new authority, which signs itself."""
    return _make(folder, name, "-addext", "basicConstraints=critical,CA:TRUE")


def issue(by: Pair, folder: Path, name: str, usage: str = "serverAuth", new_key: tuple[str, ...] = _EC) -> Pair:
    """A certificate for `name`, `localhost` and 127.0.0.1, signed by an authority; `usage` is its only one."""
    extensions = (f"subjectAltName=DNS:{name},DNS:localhost,IP:127.0.0.1", f"extendedKeyUsage={usage}")
    more = [word for extension in extensions for word in ("-addext", extension)]
    signed = ("-CA", str(by.certificate), "-CAkey", str(by.key), "-addext", "basicConstraints=critical,CA:FALSE")
    return _make(folder, name, *signed, *more, new_key=new_key)


def openssl(*arguments: str) -> str:
    """Run openssl and return what it prints."""
    path = shutil.which("openssl")
    assert path is not None, "openssl is not installed; try: sudo apt-get install --no-install-recommends openssl"
    done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _make(folder: Path, name: str, *more: str, new_key: tuple[str, ...] = _EC) -> Pair:
    pair = Pair(folder / f"{name}.crt", folder / f"{name}.key")
    where = ("-out", str(pair.certificate), "-keyout", str(pair.key))
    # Without a file of its own, openssl's would add extensions that differ from one distribution to the next.
    config = folder / "openssl.cnf"
    config.write_text("[req]\ndistinguished_name = name\n[name]\n")
    openssl(
        "req", "-x509", "-config", str(config), "-noenc", "-days", "3", "-subj", f"/CN={name}", *new_key, *where, *more
    )
    return pair
