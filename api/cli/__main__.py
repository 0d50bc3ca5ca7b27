"""`python -m api.cli`: the command line without an installed script, as Ray jobs start it."""

from api.cli import main

main(prog_name="galaxyline")
