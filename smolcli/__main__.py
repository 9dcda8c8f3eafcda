"""`smol`, also as `python -m smolcli`: the command, including the time that its imports take."""

import sys


def main() -> None:
    """Run the command. Ctrl-C ends it without a traceback from the first import on."""
    try:
        from smolcli.cli.main import app

        app(prog_name="smol")
    except KeyboardInterrupt:
        from smolcli.cli.exit_codes import ExitCode

        sys.stderr.write("smol: interrupted\n")
        sys.exit(ExitCode.INTERRUPTED)


if __name__ == "__main__":
    main()
