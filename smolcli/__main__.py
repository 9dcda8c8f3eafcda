"""`python -m smolcli` is the `smol` command."""

from smolcli.cli import app

app(prog_name="smol")
