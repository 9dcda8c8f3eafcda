"""The exceptions that smol raises.

SmolError
├── QueryError              one query is invalid: becomes its error record, never ends a run
│   └── PromptTooLong
├── UsageError              the command or an option is invalid (exit code 2)
│   └── ResumeError         the existing output belongs to another run
│       └── SettingsChanged it was made with other settings
└── RunError                the command failed (exit code 1)
    ├── InputError          the input cannot be read
    ├── ModelError          the model cannot be used
    │   ├── ModelNotFound
    │   └── HubUnreachable
    └── BackendError        the backend is gone
"""

import errno
import os
import re
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from smolcli.types import ErrorCode, PromptLimit

if TYPE_CHECKING:
    import ssl


class SmolError(Exception):
    """Base class; the message is a sentence that a user can act on.

    As text, it hides user names and passwords in the URLs that it quotes.
    """

    def __str__(self) -> str:
        return without_credentials(super().__str__())


class QueryError(SmolError):
    """One query cannot be answered.

    Args:
        message: human-readable.
        code: the kind of error.
        field: the field that is wrong, if any.
    """

    def __init__(
        self, message: str, code: ErrorCode = ErrorCode.INVALID_VALUE, field: str | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.field = field

    __str__ = Exception.__str__  # it quotes the query, such as the id "job:1@eu"


class PromptTooLong(QueryError):
    """The prompt does not fit, or leaves no room for a single token of the answer.

    Args:
        num_tokens: length of the prompt.
        limit: the longest prompt allowed.
        is_exact: whether the prompt is no longer than that.
        is_kv_cache: whether the limit is the size of the KV cache, not the model's.
    """

    def __init__(
        self,
        num_tokens: int,
        limit: PromptLimit,
        *,
        is_exact: bool = True,
        is_kv_cache: bool = False,
    ) -> None:
        length = f"{num_tokens}" if is_exact else f"at least {num_tokens}"
        room = f"{limit.num_tokens + limit.num_reserved} tokens"
        if limit.num_reserved:
            room += f", of which the answer needs at least {limit.num_reserved}"
        super().__init__(
            f"the prompt is too long: it has {length} tokens, but "
            + (
                f"the KV cache has room for {room}; raise --kv-cache-mb"
                if is_kv_cache
                else f"this model's maximum context length is {room}"
            ),
            ErrorCode.PROMPT_TOO_LONG,
        )


class UsageError(SmolError):
    """The command, or one of its options, is invalid."""


class ResumeError(UsageError):
    """The existing output was written by another run; resuming it would mix the two."""


class SettingsChanged(ResumeError):
    """The existing output was made with another model or other settings.

    Args:
        message: human-readable.
        changes: what changed.
    """

    def __init__(self, message: str, changes: str) -> None:
        super().__init__(message)
        self.changes = changes


class RunError(SmolError):
    """The command failed; output written so far is kept."""


class InputError(RunError):
    """The input cannot be read to its end."""


class ModelError(RunError):
    """The model cannot be used."""


class ModelNotFound(ModelError):
    """No model has this name or path."""


class HubUnreachable(ModelError):
    """The Hugging Face Hub did not answer."""


class BackendError(RunError):
    """The model, or every server, has failed."""


_CREDENTIALS = re.compile(
    r"(?<![^\s'\"])(?:"
    r"([^\s'\"]*?:/{1,2})(?:[^\s/:]*:(?!\d+/)\S*|[^\s/]*)@"  # not a port; one slash: as a path
    r"|(?![a-zA-Z]:\\)[^\s'\"/:]+:[^\s/]\S*@)"  # without a scheme, but no drive of Windows
)


def without_credentials(text: str) -> str:
    """Text to show, with `***` in place of user names and passwords in URLs.

    In a malformed URL, a password may contain a slash, and the scheme may be missing, so everything
    up to the last @ is hidden. A path may contain an @, as in hf://datasets/me/x@revision.
    """
    return _CREDENTIALS.sub(r"\1***@", text)


def error_reason(exc: BaseException) -> str:
    """A short description of a foreign exception, for use in an error message."""
    text = getattr(exc, "strerror", None) or str(exc) or type(exc).__name__
    return re.sub(r"^\[Errno -?\d+\] ", "", text)  # HTTP clients quote an OSError


def connection_reason(exc: BaseException, *variables: str) -> str:
    """Why an HTTP client failed, and which environment variables to check.

    A client reads the proxies and certificates in the environment when it is created, and fails
    with errors that do not name them.

    Args:
        exc: what the client raised.
        variables: further environment variables that it reads.
    """
    import ssl  # late: few commands need it

    names = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", *variables)
    if isinstance(exc, ssl.SSLError | FileNotFoundError) and exc.filename is None:
        names = ("SSL_CERT_FILE", "SSL_CERT_DIR")
    given = [name for name in (*map(str.lower, names), *names) if os.environ.get(name)]
    reason = _system_reason(exc) or error_reason(exc).partition("\n")[0].rstrip(".")
    if isinstance(exc, ImportError):
        reason = "a SOCKS proxy needs the package socksio"
    return f"{reason}; check {', '.join(given)} in the environment" if given else reason


# Such as those of ::1 where IPv6 is disabled.
_NO_ROUTE = (errno.EADDRNOTAVAIL, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EAFNOSUPPORT)


def _system_reason(exc: BaseException) -> str | None:
    """What the operating system reported, if a client's error hides that."""
    import socket
    import ssl

    cause = exc.__cause__ or exc.__context__
    if isinstance(cause, BaseExceptionGroup):  # one for each address of the host
        reachable = (e for e in cause.exceptions if getattr(e, "errno", None) not in _NO_ROUTE)
        cause = next(reachable, cause.exceptions[0])
    if isinstance(cause, TimeoutError):
        return os.strerror(errno.ETIMEDOUT)
    if isinstance(cause, socket.gaierror):
        return cause.strerror
    if isinstance(cause, ssl.SSLError) and (reason := _tls_reason(cause)):
        return reason
    if isinstance(cause, OSError) and cause.errno and not isinstance(cause, ssl.SSLError):
        # asyncio puts a sentence of its own into strerror; Windows knows no text for its numbers
        return error_reason(cause) if sys.platform == "win32" else os.strerror(cause.errno)
    return None if cause is None else _system_reason(cause)


# OpenSSL's errors for a certificate whose issuer it does not know: self-signed, or not installed.
_UNKNOWN_ISSUER = (18, 19, 20, 21)


def _tls_reason(exc: "ssl.SSLError") -> str | None:
    """Why TLS failed, None if OpenSSL's own words have to do."""
    import ssl

    if isinstance(exc, ssl.SSLCertVerificationError):
        is_unknown = exc.verify_code in _UNKNOWN_ISSUER
        hint = "; set SSL_CERT_FILE to a file with the certificate of its issuer"
        reason = f"its certificate is not accepted: {exc.verify_message.rstrip('.')}"
        return reason + hint if is_unknown else reason
    if exc.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"):
        return "it does not speak TLS; use http:// instead of https://"
    return None


_WRITE_HINTS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space, then run again"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "choose another place for it"),
}


def cannot_write(path: object, exc: OSError) -> RunError:
    """The error for a file that cannot be written, with what to do about it if that is known.

    Args:
        path: the file.
        exc: why it cannot be written.
    """
    hint = _WRITE_HINTS.get(exc.errno or 0)
    return RunError(f"cannot write {path}: {error_reason(exc)}{f'; {hint}' if hint else ''}")


def cannot_read(path: object, exc: OSError) -> InputError:
    """The error for an input that cannot be opened, with the file that was probably meant.

    Args:
        path: the file.
        exc: why it cannot be opened.
    """
    near = _closest_file(str(path)) if isinstance(exc, FileNotFoundError) else None
    hint = f"; did you mean {near}?" if near else ""
    return InputError(f"cannot read {path}: {error_reason(exc)}{hint}")


def _closest_file(path: str) -> str | None:
    folder, name = os.path.split(path)
    try:
        near = closest(name, os.listdir(folder or "."), cutoff=0.75)
    except OSError:
        return None
    return os.path.join(folder, near) if near else None


def counted(number: int, noun: str) -> str:
    """A number and its noun, such as "1 line" and "2,000 lines", for use in a message."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


_MAX_COMPARED = 1000  # characters of a name; difflib indexes each of them


def closest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that an unknown one was probably meant to be, for use in an error message.

    Args:
        name: the unknown name.
        known: names to choose from.
        cutoff: the least similarity, from 0 to 1.
    """
    import difflib

    name = name[:_MAX_COMPARED]
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)
