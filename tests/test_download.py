# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
import contextlib
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from m3fm import download as module
from m3fm.download import download

SIGNATURE = "X-Signature=SECRET"
BODY = bytes(range(256)) * 40


class _Answers(BaseHTTPRequestHandler):
    def do_GET(self):  # noqa: N802
        path = self.path.partition("?")[0]
        if path == "/moved":
            return self._redirect(f"/file?{SIGNATURE}")
        if path == "/elsewhere":
            return self._redirect("ftp://example.org/file")
        if path == "/loop":
            return self._redirect("/loop")
        if path == "/missing":
            return self.send_error(404, SIGNATURE)
        self.send_response(200)
        if path != "/endless":
            self.send_header("Content-Length", str(len(BODY) + (path == "/short")))
        self.end_headers()
        if path == "/slow":
            for byte in BODY[:20]:
                self.wfile.write(bytes([byte]))
                time.sleep(0.1)
            return None
        for _ in range(100 if path == "/endless" else 1):
            self.wfile.write(BODY)
        return None

    def _redirect(self, target: str) -> None:
        self.send_response(302)
        self.send_header("Location", target)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments):
        pass

    def handle(self):
        with contextlib.suppress(ConnectionError):  # the client left, as it should
            super().handle()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serve over plain HTTP on this machine, and let the code take it for https."""
    monkeypatch.setattr(module, "_SCHEME", "http")
    monkeypatch.setattr(module, "_HANDLERS", (urllib.request.HTTPHandler,))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    http = ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    thread.join()
    http.server_close()


def test_download_gives_the_bytes_also_after_a_redirect(server):
    assert download(f"{server}/file") == BODY
    assert download(f"{server}/moved?{SIGNATURE}") == BODY


@pytest.mark.parametrize(
    ("path", "limits", "reason"),
    [
        ("/missing", {}, "answered 404"),
        ("/elsewhere", {}, "redirects to an address that is not fetched"),
        ("/loop", {}, "answered 302"),
        ("/file", {"max_bytes": 100}, f"{len(BODY)} bytes, expected at most 100"),
        ("/endless", {"max_bytes": 2 * len(BODY)}, f"more than {2 * len(BODY)} bytes"),
        ("/short", {}, f"broke off after {len(BODY)} of {len(BODY) + 1}"),
        ("/slow", {"timeout": 0.3}, "not complete after 0.3 seconds"),
    ],
)
def test_failures_name_the_address_without_its_query(server, path, limits, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        download(f"{server}{path}?{SIGNATURE}", **limits)
    assert str(caught.value).startswith(f"{server}{path}: ")
    assert "SECRET" not in str(caught.value) and caught.value.__cause__ is None


def test_nobody_there(server):
    with pytest.raises(ValueError, match="no connection"):
        download("http://127.0.0.1:9/file")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        (f"http://example.org/a.png?{SIGNATURE}", "http://example.org/a.png: expected an https address: whoever"),
        ("file:///etc/passwd", "expected an https address"),
        ("ftp://example.org/a", "expected an https address"),
        ("a.png", "expected an https address"),
        ("https:///a.png", "names no host"),
        ("https://user:SECRET@example.org/a", "passwords in addresses are not sent"),
        ("https://[::1/a", "not a valid address"),
        (b"https://example.org", "got bytes, expected a string"),
    ],
)
def test_other_addresses_are_refused_before_anything_is_sent(url, reason, monkeypatch):
    monkeypatch.setattr(module, "_opener", lambda: pytest.fail("a connection was opened"))
    with pytest.raises(ValueError, match=reason) as caught:
        download(url)
    assert "SECRET" not in str(caught.value)
