"""`smol doctor`: check whether smol works on this machine."""

import json
import textwrap

import typer

from smolcli.cli.exit_codes import ExitCode
from smolcli.cli.options import AsJson, with_option_groups
from smolcli.cli.options.engine import EngineOptions

EXAMPLES = (
    "[bold]smol doctor[/bold] lists what works, and how to fix what does not.\n\n"
    "[bold]smol doctor --device cuda[/bold] checks what a run with that option needs."
)
COLORS = {"ok": typer.colors.GREEN, "note": typer.colors.YELLOW, "bad": typer.colors.RED}


@with_option_groups
def doctor(*, ctx: typer.Context, as_json: AsJson = False, engine: EngineOptions) -> None:
    """Check whether smol works on this machine. The exit code is 1 if it does not."""
    from smolcli.cli.doctor import Finding, examine

    findings: list[Finding] = []
    for finding in examine(engine.settings(), ctx.find_root().meta.get("config")):
        findings.append(finding)
        if not as_json:
            _print(finding.status, finding.name, finding.detail, finding.remedy)
    is_ok = not any(finding.is_fatal for finding in findings)
    if as_json:
        checks = [
            {"name": f.name, "status": f.status, "detail": f.detail, "remedy": f.remedy}
            for f in findings
        ]
        typer.echo(json.dumps({"ok": is_ok, "checks": checks}, ensure_ascii=False, indent=2))
    raise typer.Exit(ExitCode.OK if is_ok else ExitCode.FAILED)


def _print(status: str, name: str, detail: str, remedy: str | None) -> None:
    typer.secho(f"{status:5}", fg=COLORS[status], nl=False)
    typer.echo(f"{name:9} {detail}")
    if remedy:
        typer.echo(textwrap.indent(f"-> {remedy}", " " * 15))
