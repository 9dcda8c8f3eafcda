"""One HTTP connection: strict parsing, timeouts, and errors that the application reports.

Waitress' channel and its parser, with what a public server needs in addition.
"""

import re
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser, ParsingError, crack_first_line, split_uri
from waitress.task import WSGITask
from waitress.utilities import BadRequest, RequestEntityTooLarge
from waitress.utilities import Error as WaitressError

from smolcli.server.auth import missing_key
from smolcli.server.errors import (
    INTERNAL_ERROR,
    REJECTION,
    HttpError,
    body_too_large,
    code_of,
)
from smolcli.server.service import SEND_HEADERS
from smolcli.types import ErrorCode

IDLE_TIMEOUT_S = 120.0  # between two requests of a connection
RECEIVE_TIMEOUT_S = 60.0  # from the first byte of a request to its last, plus its transfer time
SEND_TIMEOUT_S = 300.0  # for the client to read a complete response, plus its transfer time
TRANSFER_RATE = 1 << 16  # bytes per second that a client must send and read
LINGER_TIMEOUT_S = 60.0  # for the client to send the rest of a rejected request
MAX_CHUNK_LINE = 4096  # bytes of a chunk's size and extensions
MAX_TRAILER = 65_536  # bytes
TLS_HANDSHAKE = b"\x16\x03"  # how a client of https:// begins; no line end may ever follow
TOO_LARGE = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
HEADERS_TOO_LARGE = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE

UPLOAD_PATHS = ("/v1/files", "/files")

_LINE_END = re.compile(rb"[\r\n]")
_HOST = re.compile(rb"[\w.~!$&'()*+,;=%:\[\]-]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Uploads:
    """What clients may upload. Waitress buffers a body before the application sees any of it.

    Args:
        adjustments: Waitress' settings for an upload.
        accepts: whether the value of an Authorization header is valid.
    """

    adjustments: Any
    accepts: Callable[[str], bool]


class Unauthorized(WaitressError):
    """A large upload without a valid API key."""

    code = HTTPStatus.UNAUTHORIZED
    reason = "Unauthorized"


class Parser(HTTPRequestParser):
    """Parses a request, and rejects ambiguous framing and hosts that Waitress would accept.

    Only an upload with a valid API key may be larger than other bodies.
    """

    # The application reports requests whose first line is malformed under these names.
    command = "?"  # type: ignore[assignment]  # wrong in the stubs
    path = request_uri = query = ""
    url_scheme = "http"
    _is_unauthorized = False

    def received(self, data: bytes) -> int:
        num_consumed = super().received(data)
        if fault := self._framing_fault():
            self.error, self.completed = fault, True
        if self.error is not None and self.error.code == TOO_LARGE and self._is_unauthorized:
            self.error = Unauthorized("")
        if self.error is not None and self.error.code == HEADERS_TOO_LARGE:
            self._read_target(self.header_plus + data)
        if self.error is not None or self.completed:
            self.expect_continue = False  # Waitress would still ask for a body, and wait for it
        return num_consumed

    def _framing_fault(self) -> WaitressError | None:
        """Why the request is rejected although Waitress would accept what it received so far."""
        if not self.completed:
            if self.header_plus.startswith(TLS_HANDSHAKE):
                return BadRequest("the server speaks HTTP, not HTTPS")
            if _has_bare_line_end(self._unfinished_lines()):
                self._read_target(self.header_plus)
                return BadRequest("lines must end in CR LF")  # as RFC 9112 allows
            if self.chunked and self._is_chunk_too_large():
                return RequestEntityTooLarge("")
        if self.error is None and self.chunked and self._has_long_framing():
            return BadRequest("the chunk sizes or trailers are too long")
        return None

    def _unfinished_lines(self) -> bytes:
        """What was received of headers, of a line between chunks or of trailers.

        Waitress waits for their end, which is a CR LF.
        """
        if not self.headers_finished:
            return self.header_plus.lstrip()
        body: Any = self.body_rcv
        return body.control_line + body.trailer if self.chunked else b""

    def parse_header(self, header_plus: bytes) -> None:
        self._read_target(header_plus)
        try:
            super().parse_header(header_plus)
        except ValueError as exc:  # from urlsplit, or from int with thousands of digits
            raise ParsingError("the URL or Content-Length is invalid") from exc
        if self.version not in ("1.0", "1.1"):
            raise ParsingError("the HTTP version must be 1.0 or 1.1")
        fields = [line.partition(b":") for line in header_plus.split(b"\r\n")[1:]]
        values: dict[bytes, list[bytes]] = {}
        for name, _, value in fields:
            values.setdefault(name.lower(), []).append(value.strip(b" \t"))
        self._check_host(values.get(b"host", []))
        self._allow_upload()
        if codings := values.get(b"transfer-encoding"):
            if b"content-length" in values:
                raise ParsingError("Transfer-Encoding and Content-Length must not be combined")
            if not self.chunked or len(b",".join(codings).split(b",")) > 1:
                raise ParsingError("Transfer-Encoding must be chunked, once, in HTTP/1.1")

    def _allow_upload(self) -> None:
        uploads: Uploads | None = getattr(self.adj, "uploads", None)
        is_upload = self.command == "POST" and self.path.rstrip("/") in UPLOAD_PATHS
        if is_upload and uploads is not None:
            self._is_unauthorized = not uploads.accepts(self.headers.get("AUTHORIZATION", ""))
            if not self._is_unauthorized:
                self.adj = uploads.adjustments

    def _is_chunk_too_large(self) -> bool:
        """Whether the chunk that is being received will exceed the limit of the body."""
        body: Any = self.body_rcv
        return bool(len(body) + body.chunk_remainder >= self.adj.max_request_body_size)

    def _has_long_framing(self) -> bool:
        """Whether an unfinished line between chunks, or the trailers, exceed their limits.

        Waitress searches all of it again whenever more arrives.
        """
        body: Any = self.body_rcv
        return len(body.control_line) > MAX_CHUNK_LINE or len(body.trailer) > MAX_TRAILER

    def _check_host(self, hosts: list[bytes]) -> None:
        if len(hosts) > 1 or (self.version == "1.1" and not hosts):
            raise ParsingError("a request must have exactly one Host header")
        if hosts and not _HOST.fullmatch(hosts[0]):
            raise ParsingError("the Host header is invalid")

    def _read_target(self, header: bytes) -> None:
        """Read method and path before anything that can fail, so that errors can report them."""
        with suppress(ParsingError, ValueError):
            first_line: Any = _LINE_END.split(header.lstrip(), 1)[0].rstrip()
            command, uri, _ = crack_first_line(first_line)
            if uri:
                self.command, self.path = command.decode("latin-1"), split_uri(uri)[2]  # type: ignore[assignment]  # wrong in the stubs


def _has_bare_line_end(data: bytes) -> bool:
    """Whether a CR or an LF stands alone; a CR at the very end may be half of a CR LF."""
    num_pairs = data.count(b"\r\n")
    num_returns = data.count(b"\r") - data.endswith(b"\r")
    return max(num_returns, data.count(b"\n")) > num_pairs


class Task(WSGITask):
    """Runs the application for one request."""

    channel: "Channel"
    request: Any  # wrong in the stubs

    def execute(self) -> None:
        try:
            super().execute()
        except Exception:
            raise
        except BaseException as exc:
            # For example a Rust panic. Waitress would leave the connection open without a response.
            raise RuntimeError(f"{type(exc).__name__} while sending a response") from exc

    def write(self, data: bytes) -> None:
        """Send data, and before its first piece the headers, both at once."""
        is_sent = self.has_body and self.content_length != 0
        if data and is_sent and not self.wrote_header:
            self.channel.unsent = self.build_response_header()
            self.wrote_header = True
        super().write(data)

    def get_environment(self) -> dict[str, Any]:
        environ: dict[str, Any] = super().get_environment()
        environ[SEND_HEADERS] = lambda: self.write(b"")
        return environ

    def set_close_on_finish(self) -> None:
        """Keep the connection open after a chunked response, unlike Waitress."""
        if self.wrote_header or not self.chunked_response or self.request.command == "HEAD":
            super().set_close_on_finish()


class RejectionTask(Task):
    """Lets the application report an error that Waitress found, like any other error."""

    def get_environment(self) -> dict[str, Any]:
        environ = super().get_environment()
        environ[REJECTION] = _rejection(self.request.error, self.request.adj)
        self.set_close_on_finish()
        return environ


def _rejection(error: Any, limits: Any) -> HttpError:
    """Translate an error of Waitress; `limits` are its adjustments."""
    if error.code == HTTPStatus.INTERNAL_SERVER_ERROR:  # the application itself failed
        return HttpError(error.code, INTERNAL_ERROR, ErrorCode.INTERNAL)
    if error.code == HTTPStatus.UNAUTHORIZED:
        return missing_key()
    messages = {
        TOO_LARGE: body_too_large(limits.max_request_body_size - 1),
        HEADERS_TOO_LARGE: "the request headers are larger than the limit "
        f"of {limits.max_request_header_size:,} bytes",
        HTTPStatus.NOT_IMPLEMENTED: "this Transfer-Encoding is not supported; use chunked",
    }
    message = messages.get(error.code, f"malformed HTTP request: {error.body}")
    return HttpError(error.code, message, code_of(error.code))


class Channel(HTTPChannel):
    """A connection that is closed if its client is idle or slow for too long."""

    parser_class = Parser
    task_class = Task
    error_task_class = RejectionTask  # type: ignore[assignment]  # wrong in the stubs
    _receiving_since = 0.0  # when the first byte of the current request arrived
    _num_sent = 0  # bytes since the last request was served
    _is_rejected = False  # whether to close the connection, because a request was malformed
    _lingering_since: float | None = None  # when its response was sent, if it was
    unsent = b""  # headers to send together with the next data

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._serving_until = time.monotonic()  # the last time a request was being served

    def received(self, data: bytes) -> bool:
        if self.request is None:
            self._receiving_since = time.monotonic()
        return super().received(data)

    def service(self) -> None:
        self._serving_until = time.monotonic()
        self._num_sent = 0
        self._is_rejected = bool(self.requests[0].error)
        super().service()

    def handle_write(self) -> None:
        """Send what is buffered; after a rejection, linger before closing the connection.

        A client that is still sending its body would otherwise receive a reset, and might never
        see the response.
        """
        if not (self._is_rejected and self.close_when_flushed):
            super().handle_write()
            return
        self._flush_exception(self._flush_some)  # type: ignore[attr-defined]  # not in the stubs
        if not self.total_outbufs_len and not self.will_close:
            self.close_when_flushed = False
            self._lingering_since = time.monotonic()
            assert self.socket is not None
            try:
                self.socket.shutdown(socket.SHUT_WR)
            except OSError:
                self.will_close = True

    def write_soon(self, data: Any) -> int:
        if self.unsent:
            data, self.unsent = self.unsent + data, b""
        num_bytes: int = super().write_soon(data)
        return num_bytes

    def send(self, data: bytes, do_close: bool = True) -> int:
        num_sent: int = super().send(data, do_close)
        self._num_sent += num_sent
        return num_sent

    def readable(self) -> bool:
        return self._lingering_since is not None or bool(super().readable())

    def handle_read(self) -> None:
        if self._lingering_since is None:
            super().handle_read()
            return
        try:
            self.recv(self.adj.recv_bytes)  # discards the data; closes at the end of the stream
        except OSError:
            self.will_close = True

    def check_client_disconnected(self) -> bool:  # type: ignore[override]  # wrong in the stubs
        """Whether the client has disconnected.

        Waitress stops reading once the client has pipelined another request, and would not
        notice; so this looks at the socket itself.
        """
        return not self.connected or (len(self.requests) > 1 and self._is_socket_closed())

    def _is_socket_closed(self) -> bool:
        if self.socket is None:
            return True
        try:
            return not self.socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    @property
    def is_busy(self) -> bool:
        """Whether a request is being served or its response is not fully sent."""
        return bool(self.requests or self.total_outbufs_len)

    def close_if_overdue(self, now: float) -> None:
        """Close the connection if the client has exceeded a timeout.

        Empty lines between requests do not count as activity.

        Args:
            now: the current time of `time.monotonic`, in seconds.
        """
        if self.requests:  # these have a timeout of their own
            self._serving_until = now
        elif self._is_overdue(now):
            self.will_close = True

    def _is_overdue(self, now: float) -> bool:
        if self._lingering_since is not None:
            return now - self._lingering_since > LINGER_TIMEOUT_S
        if self.total_outbufs_len:
            return now - self._serving_until > SEND_TIMEOUT_S + self._num_sent / TRANSFER_RATE
        if self.request is None:
            return now - self._serving_until > IDLE_TIMEOUT_S
        transfer_s = self.request.body_bytes_received / TRANSFER_RATE
        since = max(self._receiving_since, self._serving_until)
        return now - since > RECEIVE_TIMEOUT_S + transfer_s
