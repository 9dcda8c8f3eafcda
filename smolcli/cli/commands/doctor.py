"""`smol doctor`: whether `smol run` would work."""

import json
import textwrap

import typer

from smolcli.cli.commands import FAILED
from smolcli.cli.options import grouped
from smolcli.cli.options.engine import EngineOptions
from smolcli.cli.options.files import AsJson

EXAMPLES = (
    "[bold]smol doctor[/bold] says what is well, and what to do where it is not.\n\n"
    "[bold]smol doctor --device cuda[/bold] looks at what a run with that option would need."
)
COLORS = {"ok": typer.colors.GREEN, "note": typer.colors.YELLOW, "bad": typer.colors.RED}


@grouped
def doctor(*, ctx: typer.Context, as_json: AsJson = False, engine: EngineOptions) -> None:
    """See whether smol run would work here: exit code 0 if so, else 1."""
    from smolcli.cli.doctor import Finding, examine

    findings: list[Finding] = []
    for finding in examine(engine.settings(), ctx.find_root().meta.get("config")):
        findings.append(finding)
        if not as_json:
            _print(finding.status, finding.name, finding.detail, finding.remedy)
    is_well = not any(finding.is_fatal for finding in findings)
    if as_json:
        checks = [
            {"name": f.name, "status": f.status, "detail": f.detail, "remedy": f.remedy}
            for f in findings
        ]
        typer.echo(json.dumps({"ok": is_well, "checks": checks}, ensure_ascii=False, indent=2))
    raise typer.Exit(0 if is_well else FAILED)


def _print(status: str, name: str, detail: str, remedy: str | None) -> None:
    typer.secho(f"{status:5}", fg=COLORS[status], nl=False)
    typer.echo(f"{name:9} {detail}")
    if remedy:
        typer.echo(textwrap.indent(f"-> {remedy}", " " * 15))
