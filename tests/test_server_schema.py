"""/openapi.json is valid and accurate: schemathesis finds no undocumented response."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from server_tools import TIMEOUT_S, FaultyBackend, RunningServer, serving, tiny_engine

from smolcli.settings import QueryDefaults
from smolcli.types import Sampling

KEY = {"Authorization": "Bearer key"}
ROUTES = [
    ("POST", "/chat"),
    ("POST", "/chat/batched"),
    ("POST", "/generate_batch"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{id}"),
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
]


@pytest.fixture
def server(tiny_folder: Path) -> Iterator[RunningServer]:
    short = QueryDefaults(Sampling(max_new_tokens=4))
    engine = tiny_engine(tiny_folder)
    with serving(FaultyBackend().open, engine, api_keys=("key",), defaults=short) as running:
        yield running


def test_every_route_is_documented(server: RunningServer) -> None:
    document = server.client.get("/openapi.json", headers=KEY).json()
    documented = {(m.upper(), path) for path, item in document["paths"].items() for m in item}
    assert documented - {("PARAMETERS", "/v1/models/{id}")} == set(ROUTES)


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [(*route, GenerationMode.POSITIVE) for route in ROUTES]
    + [(*route, GenerationMode.NEGATIVE) for route in ROUTES if route[0] == "POST"],
)
def test_every_response_matches_the_document(
    server: RunningServer, method: str, path: str, mode: GenerationMode
) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json", headers=KEY)
    schema.validate()
    operation = schema[path][method]

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: schemathesis.Case) -> None:
        case.call_and_validate(
            headers=KEY, timeout=TIMEOUT_S, excluded_checks=[positive_data_acceptance]
        )

    check()
