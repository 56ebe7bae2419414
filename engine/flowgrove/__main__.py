"""`python -m flowgrove`: the `flowgrove` command where the package is on the path and not installed."""

from flowgrove.cli import app

app(prog_name="flowgrove")
