"""Look up the packages of a constraints file in a database of known vulnerabilities.

    python -m tools.audit build/tools/bin/pip-audit constraints.txt

Asks PyPI's JSON API, or OSV if that does not answer. pip-audit by itself reports success for
packages that it could not look up, and ends with a traceback if it has no network.

Exit status: 0 no known vulnerability, 1 vulnerabilities, 2 not every package could be looked up.
"""

import json
import subprocess
import sys
from typing import Any

SERVICES = {"pypi": "https://pypi.org/pypi/NAME/VERSION/json", "osv": "https://api.osv.dev"}
EXIT_FOUND, EXIT_NOT_AUDITED = 1, 2


def audit(pip_audit: str, constraints: str) -> tuple[int, str]:
    """Audit all packages with the first service that knows every one of them.

    Args:
        pip_audit: path of the program.
        constraints: path of a file with exact versions.

    Returns:
        The exit status, and what to say.
    """
    reasons = []
    for service, address in SERVICES.items():
        packages = _look_up(pip_audit, constraints, service)
        if isinstance(packages, str):
            reasons.append(f"{address}: {packages}")
            continue
        skipped = [package["name"] for package in packages if "skip_reason" in package]
        if not skipped:
            return _verdict(packages, constraints)
        names = ", ".join(skipped[:3]) + (", ..." if len(skipped) > 3 else "")
        reasons.append(f"{address}: {len(skipped)} of {len(packages)} packages not found ({names})")
    lines = "".join(f"\n  {reason}" for reason in reasons)
    message = f"{constraints} was not audited: no service could look up every package{lines}"
    return EXIT_NOT_AUDITED, f"{message}\nRun make audit again where one of them can be reached."


def _look_up(pip_audit: str, constraints: str, service: str) -> list[dict[str, Any]] | str:
    """Packages with their "vulns" or "skip_reason", or why the service did not answer."""
    command = [pip_audit, "--requirement", constraints, "--no-deps", "--disable-pip"]
    command += ["--format", "json", "--progress-spinner", "off", "--vulnerability-service", service]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        packages: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        errors = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        reason = errors[-1]
        return "cannot be reached" if "Connection" in reason or "Timeout" in reason else reason
    return packages


def _verdict(packages: list[dict[str, Any]], constraints: str) -> tuple[int, str]:
    found = [
        f"{package['name']} {package['version']}: {vulnerability['id']}"
        f", fixed in {', '.join(vulnerability['fix_versions']) or 'no version yet'}"
        for package in packages
        for vulnerability in package["vulns"]
    ]
    if found:
        return EXIT_FOUND, "\n".join([f"Known vulnerabilities in {constraints}:", *found])
    return 0, f"{constraints}: {len(packages)} packages, no known vulnerability"


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: python -m tools.audit PIP_AUDIT CONSTRAINTS")
    status, message = audit(*sys.argv[1:])
    (sys.stderr if status else sys.stdout).write(f"{message}\n")
    sys.exit(status)


if __name__ == "__main__":
    main()
