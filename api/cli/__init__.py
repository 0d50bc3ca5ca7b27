"""The command line `galaxyline`: a group of commands, each in a file of its name."""

import click

from actors.log import configure_logging
from api.cli.cache import cache_group
from api.cli.convert import convert_command
from api.cli.demo import demo_command
from api.cli.plan import plan_command
from api.cli.reference import reference_command
from api.cli.serve import serve_command
from api.cli.status import status_command
from api.errors import exit_code
from weights.errors import GalaxylineError
from weights.release import VERSION


class CommandGroup(click.Group):
    """Shows our errors as a sentence on stderr, without a traceback, and exits with the code of their class."""

    def invoke(self, ctx: click.Context) -> object:
        """Runs the command."""
        try:
            return super().invoke(ctx)
        except GalaxylineError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(exit_code(error))


@click.group(
    cls=CommandGroup,
    context_settings={
        "token_normalize_func": lambda name: name.replace("_", "-"),
        "help_option_names": ["-h", "--help"],
        "max_content_width": 120,
    },
)
@click.version_option(VERSION, prog_name="galaxyline")
def main() -> None:
    """DeepSeek-V3/R1 over a pipeline of stages. Options may be spelt with - or _."""
    configure_logging()


for command in (
    serve_command,
    status_command,
    demo_command,
    reference_command,
    convert_command,
    cache_group,
    plan_command,
):
    main.add_command(command)
