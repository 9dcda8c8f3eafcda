"""Files for deployment: ports, paths, options, environment variables and metrics exist in smol."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from prometheus_client.parser import text_string_to_metric_families

from smolcli.backends.base import Counters
from smolcli.cli.main import app
from smolcli.server.metrics import Metrics
from smolcli.settings import ServerSettings
from tools.audit import audit
from tools.slim_requirements import name_of, slim_requirements

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").rglob("*.yaml"))
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
PATCH = "mount.yaml"  # of the Deployment in base
PROBED = {"/health", "/ready"}


def documents() -> Iterator[tuple[str, Any]]:
    for path in MANIFESTS:
        for document in yaml.safe_load_all(path.read_text("utf-8")):
            yield path.name, document


def objects(node: Any) -> Iterator[dict[str, Any]]:
    """All JSON objects in a document."""
    if isinstance(node, dict):
        yield node
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else []
    for child in children:
        yield from objects(child)


def containers() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, document in documents():
        for found in objects(document):
            if "image" in found and "name" in found:
                yield name, found


def pod_specs() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, document in documents():
        for found in objects(document):
            if "containers" in found and name != PATCH:
                yield name, found


@pytest.fixture(scope="module")
def commands() -> dict[str, Any]:
    return dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def check_command_line(args: list[str], commands: dict[str, Any]) -> None:
    """Check that a command and its options exist."""
    flags = {
        flag for param in commands[args[0]].params for flag in (*param.opts, *param.secondary_opts)
    }
    assert {arg for arg in args if arg.startswith("-")} <= flags


def test_commands_and_options_exist(commands: dict[str, Any]) -> None:
    lines = [found["args"] for _, found in containers() if "args" in found]
    lines += [d["spec"]["entrypoint"].split()[1:] for _, d in documents() if d["kind"] == "RayJob"]
    assert len(lines) == 4
    for args in lines:
        check_command_line(args, commands)
    assert f"CMD {json.dumps(['serve'])}" in DOCKERFILE


def test_environment_variables_exist(commands: dict[str, Any]) -> None:
    known = {"SMOL_HOME"} | {
        variable
        for command in commands.values()
        for param in command.params
        for variable in ([param.envvar] if isinstance(param.envvar, str) else param.envvar or [])
    }
    texts = [DOCKERFILE, (DEPLOY / "compose.yaml").read_text("utf-8")]
    for text in [*texts, *(path.read_text("utf-8") for path in MANIFESTS)]:
        assert set(re.findall(r"\bSMOL_\w+", text)) <= known
    for _, spec in pod_specs():  # Kubernetes would set SMOL_PORT for a Service named smol
        assert spec["enableServiceLinks"] is False


def test_ports_are_the_default_port() -> None:
    port = ServerSettings().port
    assert f"SMOL_PORT={port}" in DOCKERFILE
    assert f"EXPOSE {port}" in DOCKERFILE
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))
    assert compose["services"]["smol"]["ports"][0].endswith(f":{port}")
    named = {p["name"]: p["containerPort"] for _, c in containers() for p in c.get("ports", ())}
    assert named == {"http": port}


def test_probes_are_routes_of_the_server() -> None:
    paths = {
        found["httpGet"]["path"]
        for _, document in documents()
        for found in objects(document)
        if isinstance(found.get("httpGet"), dict) and found["httpGet"]["port"] == "http"
    }
    assert paths == PROBED
    assert "/health" in DOCKERFILE


def test_pods_and_containers_have_time_to_drain() -> None:
    (spec,) = [spec for name, spec in pod_specs() if name == "deployment.yaml"]
    (container,) = spec["containers"]
    args = container["args"]
    drain_s = float(args[args.index("--drain-timeout") + 1])
    sleep_s = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert spec["terminationGracePeriodSeconds"] > drain_s + sleep_s
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))
    grace_s = float(compose["services"]["smol"]["stop_grace_period"].removesuffix("s"))
    assert grace_s > ServerSettings().drain_timeout_s


def test_pods_of_smol_are_restricted() -> None:
    """Non-root, on a read-only file system, and with the user that the image has."""
    (user,) = set(re.findall(r"USER (\d+):", DOCKERFILE))
    for name, spec in pod_specs():
        if name == "ray-job.yaml":  # Ray writes to its home directory
            continue
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["runAsUser"] == int(user)
    for name, container in containers():
        if name != "ray-job.yaml" and "args" in container:
            assert container["securityContext"]["readOnlyRootFilesystem"]
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


@pytest.fixture(scope="module")
def metrics() -> set[str]:
    """The names of all samples that the server can export."""
    exported = Metrics(lambda: None, Counters)
    exported.count_error("timeout")
    families = text_string_to_metric_families(exported.text().decode())
    return {
        f"{family.name}{suffix}"
        for family in families
        for suffix in {
            "counter": ("_total",),
            "histogram": ("_bucket", "_sum", "_count"),
        }.get(family.type, ("",))
    }


def test_autoscaler_uses_an_exported_metric(metrics: set[str]) -> None:
    (scaler,) = [d for _, d in documents() if d["kind"] == "HorizontalPodAutoscaler"]
    (metric,) = scaler["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] in metrics


def test_dashboard_queries_exported_metrics(metrics: set[str]) -> None:
    text = (DEPLOY / "grafana" / "smol.json").read_text("utf-8")
    dashboard = json.loads(text)
    queried = set(re.findall(r"\bsmol_\w+", text))
    assert queried <= metrics
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(target["expr"] for panel in panels for target in panel["targets"])


def test_site_has_all_pages() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:")[2]
    listed = re.findall(r"(?<=[ :])[\w-]+\.md", navigation)
    assert sorted(listed) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def test_image_requirements_leave_out_what_only_gpus_need() -> None:
    names = [name_of(line) for line in slim_requirements(ROOT / "pyproject.toml", ["ray"])]
    assert not {"torch", "transformers"} & set(names)
    assert {"numpy", "flask", "ray", "backports.zstd"} <= set(names)
    with pytest.raises(KeyError):
        slim_requirements(ROOT / "pyproject.toml", ["gpu"])


def test_manifests_match_the_schemas_of_kubernetes() -> None:
    """With the package kubernetes-validate, which `make deploy-check` installs."""
    validate = pytest.importorskip("kubernetes_validate")
    for name, document in documents():
        if document["kind"] not in ("Kustomization", "RayJob") and name != PATCH:
            validate.validate(document, validate.latest_version(), strict=True)


@pytest.mark.parametrize(
    ("found", "status", "words"),
    [
        ({"name": "a", "version": "1", "vulns": []}, 0, "1 packages, no known vulnerability"),
        ({"name": "a", "skip_reason": "Dependency not found"}, 2, "1 of 1 packages not found (a)"),
        (None, 2, "https://api.osv.dev: cannot be reached"),
        (
            {"name": "a", "version": "1", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2"]}]},
            1,
            "a 1: PYSEC-1, fixed in 2",
        ),
    ],
)
def test_an_audit_passes_only_if_every_package_was_looked_up(
    found: dict[str, Any] | None, status: int, words: str, tmp_path: Path
) -> None:
    """pip-audit exits with 0 and "No known vulnerabilities found" if it found no package at all."""
    program = tmp_path / "pip-audit"
    answer = f"echo '{json.dumps({'dependencies': [found]})}'"
    program.write_text(f"#!/bin/sh\n{answer if found else 'echo ConnectionError: x >&2; exit 1'}\n")
    program.chmod(0o755)
    code, message = audit(str(program), "constraints.txt")
    assert (code, words in message) == (status, True), message
