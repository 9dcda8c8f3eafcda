"""Malformed requests of many kinds, each of which ends its connection."""

import json
import random
from typing import Any

PATHS = ["/chat", "/chat/batched", "/generate_batch", "/v1/chat/completions"]
BODIES = [
    b"",
    b"{",
    b"[" * 5000,
    b'{"chat_id":"1","chat_id":"2"}',
    b'{"chat_id":NaN}',
    b'"\xff\xfe"',
    b'{"chat_id":"1","user_promt":"a slip"}',
    b'{"chat_id":"1","user_prompt":"Hi","temperature":-1}',
    b'{"chat_id":"1","user_prompt":"Hi","max_new_tokens":"many"}',
    b'{"queries":[]}',
    b'{"queries":{"0":1}}',
    b'{"messages":[{"role":"tool","content":null}],"model":0}',
]


def malformed_request(number: int) -> bytes:
    """The bytes of one request; equal numbers give equal requests."""
    rng = random.Random(number)
    kinds = (_body, _body, _value, _head, _bytes)
    return kinds[number % len(kinds)](rng)


def _body(rng: random.Random) -> bytes:
    return _request(rng.choice(PATHS), rng.choice(BODIES))


def _value(rng: random.Random) -> bytes:
    """Valid JSON that is not a query."""
    leaf: Any = rng.choice([None, True, -1, 1e300, "x" * 1000, [], {}])
    names = ["chat_id", "user_prompt", "queries", "messages", "model"]
    return _request("/chat", json.dumps({rng.choice(names): leaf}).encode())


def _head(rng: random.Random) -> bytes:
    """An invalid method, path or header."""
    method = rng.choice(["GET", "PUT", "TRACE", "get", "P\x00ST"])
    path = rng.choice(["/chat", "/nope", "/%ff", "/../../etc/passwd", "http://x/chat", "chat"])
    header = rng.choice(
        [
            *("Content-Length: -1", "Content-Length: x", "Content-Length: 99999999999"),
            *("Transfer-Encoding: gzip", "Transfer-Encoding: chunked", "Bad Header", ": x"),
            "Content-Type: text/plain",
        ]
    )
    lines = [f"{method} {path} HTTP/1.1", "Host: x", "Connection: close", header]
    return "\r\n".join([*lines, "", "{}", "", ""]).encode()


def _bytes(rng: random.Random) -> bytes:
    """Bytes that are not HTTP, such as the start of a TLS handshake."""
    return rng.choice([b"\x16\x03\x01\x02\x00", b""]) + rng.randbytes(200) + b"\r\n\r\n"


def _request(path: str, body: bytes) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}"]
    head = [*lines, "Connection: close", "Content-Type: application/json", "", ""]
    return "\r\n".join(head).encode() + body
