"""`galaxyline reference`: writes a reference file for the demo's teacher forcing."""

import os
from pathlib import Path

import click

from api.cli.options import log_level, options_of
from api.cli.parameters import LoggedCommand, long_work
from api.settings.model import ModelOptions
from api.text.model_source import resolve_model

FILE = click.Path(dir_okay=False, path_type=Path)


@click.command("reference", cls=LoggedCommand)
@options_of(ModelOptions, only={"model"})
@click.option("--text-file", type=FILE, help="UTF-8 text that the model should predict.  [default: a built-in one]")
@click.option("--output-file", type=FILE, required=True, help="The .refpt file to write.")
@click.option("--total-length", type=click.IntRange(min=5), default=2048, show_default=True, help="Tokens of the text.")
@log_level
def reference_command(model: str | None, text_file: Path | None, output_file: Path, total_length: int) -> None:
    """Write a reference file for `demo --token-accuracy` with Hugging Face's model, in float32."""
    # Imports of a second, which --help does without.
    from api.demo.reference import ReferenceSettings, write_reference  # noqa: PLC0415

    settings = ReferenceSettings(
        source=resolve_model(model, os.environ),
        text_file=text_file,
        output_file=output_file,
        total_length=total_length,
    )
    count = write_reference(settings, long_work())
    click.echo(f"{count} tokens in '{output_file}': galaxyline demo --token-accuracy --reference-file '{output_file}'")
