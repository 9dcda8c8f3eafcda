"""One connection, as Waitress has it but for what its own refusals look like and how it waits."""

import json
import socket
import time
from http import HTTPStatus
from typing import Any

from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser
from waitress.task import ErrorTask

from smolcli.server.errors import HttpError, code_of, error_body

IDLE_S = 120.0  # between two requests
RECEIVE_S = 60.0  # from the first byte of a request to its last
SEND_S = 300.0  # for an answer that is complete to be taken


class JsonErrorTask(ErrorTask):
    """Waitress' own refusals, of what is not HTTP, in our shape."""

    def execute(self) -> None:
        fault = self.request.error  # type: ignore[attr-defined]  # the stubs have it wrong
        error = HttpError(fault.code, str(fault.body), code_of(fault.code))
        body = (json.dumps(error_body(error, is_openai=False)) + "\n").encode()
        self.status = f"{fault.code} {HTTPStatus(fault.code).phrase}"
        self.response_headers = [("Content-Type", "application/json")]
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class Parser(HTTPRequestParser):
    """Has a path even where there was none, for Waitress logs it."""

    path = ""


class Channel(HTTPChannel):
    """A connection that cannot be held for ever by a client that is slow, or says nothing."""

    parser_class = Parser
    error_task_class = JsonErrorTask
    _begun_at = 0.0  # when the present request's first byte came

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._free_at = time.monotonic()  # when no request was being served for the last time

    def received(self, data: bytes) -> bool:
        if self.request is None:
            self._begun_at = time.monotonic()
        return super().received(data)

    def service(self) -> None:
        self._free_at = time.monotonic()
        super().service()

    def check_client_disconnected(self) -> bool:  # type: ignore[override]  # the stubs have it wrong
        """Whether the client is gone, seen also where a next request of it waits already.

        Waitress reads nothing on then, and would not notice.
        """
        return not self.connected or (len(self.requests) > 1 and self._has_hung_up())

    def _has_hung_up(self) -> bool:
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
        """Whether a request is being served, or its answer is not sent to its end."""
        return bool(self.requests or self.total_outbufs_len)

    def drop_if_slow(self, now: float) -> None:
        """Close it where the client has kept it waiting for too long; empty lines do not count."""
        if self.requests:  # which have a deadline of their own
            self._free_at = now
        elif self._is_overdue(now):
            self.will_close = True

    def _is_overdue(self, now: float) -> bool:
        if self.total_outbufs_len:
            return now - self._free_at > SEND_S
        if self.request is None:
            return now - self._free_at > IDLE_S
        return now - max(self._begun_at, self._free_at) > RECEIVE_S
