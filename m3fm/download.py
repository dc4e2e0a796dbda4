# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Fetch one image from an address, when asked to: nothing else in the package opens a connection for an image."""

import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

MAX_BYTES = 1 << 30
TIMEOUT_SECONDS = 60.0
MAX_REDIRECTS = 5

_SCHEME = "https"
_HANDLERS = (urllib.request.HTTPSHandler,)
_CHUNK = 1 << 20


class DownloadError(ValueError):
    """Say why an address gave no file; the text never holds the query of the address."""


def download(url: str, max_bytes: int = MAX_BYTES, timeout: float = TIMEOUT_SECONDS) -> bytes:
    """Fetch a file over https, for `read_image` or a pipeline.

    Proxies are taken from the environment, certificates from the system. Errors name the host and path, never the
    query, which may be a signature.

    Args:
        url: An https address, without user name and password.
        max_bytes: Largest size that is accepted.
        timeout: Seconds for the whole download.

    Returns:
        The bytes of the file, as the server sent them.

    Raises:
        DownloadError: If the address is not https or redirects to one that is not, the server refuses or fails, or the
            file is larger or slower than allowed.
    """
    name = _checked(url)
    end = time.monotonic() + timeout
    opener = _opener()
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "m3fm", "Accept-Encoding": "identity"})
        with opener.open(request, timeout=timeout) as response:
            return _read(response, name, max_bytes, end, timeout)
    except urllib.error.HTTPError as error:
        error.close()
        raise DownloadError(f"{name}: the server answered {error.code}, expected the file") from None
    except TimeoutError:
        raise DownloadError(f"{name}: no answer within {timeout:g} seconds") from None
    except urllib.error.URLError as error:
        slow = isinstance(error.reason, TimeoutError)
        reason = f"no answer within {timeout:g} seconds" if slow else f"no connection ({_kind(error.reason)})"
        raise DownloadError(f"{name}: {reason}") from None
    except OSError as error:
        raise DownloadError(f"{name}: the connection failed ({_kind(error)})") from None
    except DownloadError:
        raise
    except Exception as error:  # http.client's own kinds, whose texts quote what the server sent
        raise DownloadError(f"{name}: the server's answer is no HTTP ({_kind(error)})") from None


def _checked(url: Any) -> str:
    """Return what errors call the address, if it is one that is fetched."""
    if not isinstance(url, str):
        raise DownloadError(f"url: got {type(url).__name__}, expected a string")
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise DownloadError("url: not a valid address") from None
    host = f"[{host}]" if host and ":" in host else host
    name = f"{parts.scheme or '?'}://{host or '?'}{f':{port}' if port else ''}{parts.path}"
    if parts.scheme.lower() != _SCHEME:
        why = ": whoever listens could read or exchange the image" if parts.scheme.lower() == "http" else ""
        raise DownloadError(f"{name}: expected an {_SCHEME} address{why}")
    if not host:
        raise DownloadError(f"{name}: the address names no host")
    if parts.username is not None or parts.password is not None:
        raise DownloadError(f"{name}: user names and passwords in addresses are not sent")
    return name


class _CheckedRedirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects to addresses that would be fetched themselves, and no others."""

    max_redirections = MAX_REDIRECTS

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        try:
            _checked(newurl)
        except DownloadError:
            fp.close()
            name = _checked(req.full_url)
            raise DownloadError(f"{name}: redirects to an address that is not fetched, expected {_SCHEME}") from None
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    """Build an opener that knows https, proxies and redirects, and neither files nor FTP."""
    opener = urllib.request.OpenerDirector()
    handlers = (
        urllib.request.ProxyHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
        _CheckedRedirects,
        *_HANDLERS,
    )
    for handler in handlers:
        opener.add_handler(handler())
    return opener


def _read(response: Any, name: str, max_bytes: int, end: float, timeout: float) -> bytes:
    declared = response.headers.get("Content-Length") or ""
    if declared.isdigit() and int(declared) > max_bytes:
        raise DownloadError(f"{name}: {declared} bytes, expected at most {max_bytes}")
    data = bytearray()
    while chunk := response.read1(_CHUNK):
        data += chunk
        if len(data) > max_bytes:
            raise DownloadError(f"{name}: more than {max_bytes} bytes")
        if time.monotonic() > end:
            raise DownloadError(f"{name}: not complete after {timeout:g} seconds")
    if declared.isdigit() and len(data) < int(declared):
        raise DownloadError(f"{name}: broke off after {len(data)} of {declared} bytes")
    return bytes(data)


def _kind(error: Any) -> str:
    return type(error).__name__


__all__ = ["MAX_BYTES", "TIMEOUT_SECONDS", "DownloadError", "download"]
