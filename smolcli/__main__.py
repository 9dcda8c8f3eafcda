"""`python -m smolcli` is the `smol` command."""

from smolcli.cli.main import app

app(prog_name="smol")
