"""`galaxyline convert`: fills the weight cache before anything is served."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import click
import msgspec
from msgspec import Meta

from actors.options import ClusterOptions
from api.cli.options import log_level, options_of
from api.cli.parameters import LoggedCommand, long_work
from api.errors import OptionError
from api.settings.engine import CacheDir, DtypeOption, Seed, cache_directory, resolve_dtype
from api.settings.environment import note_environment
from api.settings.model import ModelPathOption
from api.settings.option import again, made, take
from api.settings.paths import check_cache_dir
from api.text.model_source import ModelSource, check_model_files, resolve_model
from stages.device import DEVICE_VARIABLE, PROFILES
from stages.options import WeightOptions
from weights.errors import CacheError
from weights.sizes import in_words

if TYPE_CHECKING:
    from api.client.progress import LongWork
    from stages.converted_weights import Conversion


class ConvertSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The options of `convert`, those of `serve` that converted weights depend on."""

    source: ModelSource
    cache_dir: CacheDir = None
    dtype: DtypeOption = "auto"
    weights: WeightOptions = WeightOptions()
    seed: Seed = None
    device: Annotated[
        Literal["embedded", "ttnn"],
        Meta(description="What the weights are for: this host's processor, or the chips of Galaxies."),
    ] = "embedded"
    rows_per_stage: Annotated[int, again(ClusterOptions, "rows_per_stage")] = 1


@click.command("convert", cls=LoggedCommand)
@click.argument("model", required=False)
@options_of(ModelPathOption)
@options_of(ConvertSettings)
@log_level
def convert_command(model: str | None, **given: Any) -> None:
    """Convert the weights of MODEL, a directory or a hub id, into the weight cache, for any split.

    Serving does the same on first use. What the cache has already is left as it is, so a conversion that was cut off
    goes on where it stopped.
    """
    note_environment(os.environ)
    model_path = take(ModelPathOption, given).model_path
    if model_path is not None and model not in {None, model_path}:
        raise OptionError(f"Two models are given, {model!r} and --model-path {model_path!r}: leave one out.")
    source = resolve_model(model or model_path, os.environ)
    convert(made(ConvertSettings, {**given, "source": source}), click.echo, long_work())


def convert(settings: ConvertSettings, say: Callable[[str], None], work: "LongWork") -> None:
    """Converts all parts of a model that the cache does not have; what they take is reported to `say` first.

    Raises CheckpointError where the checkpoint is not sound, CacheError where its parts do not fit the disk or cannot
    be written. What was converted by then stays.
    """
    os.environ[DEVICE_VARIABLE] = settings.device
    check_model_files(settings.source, needs_weights=settings.weights.load_format == "auto")
    directory = cache_directory(settings.cache_dir, os.environ)
    check_cache_dir(directory)
    # Imports torch, which no other command of this process needs.
    from stages.converted_weights import ConvertOptions, open_conversion  # noqa: PLC0415

    profile = PROFILES[settings.device]
    options = ConvertOptions(
        model_path=str(settings.source.path),
        cache_dir=str(directory),
        dtype=resolve_dtype(settings.dtype, settings.source, profile),
        seed=settings.seed or 0,
        weights=settings.weights,
        mesh_shape=profile.mesh_shape(settings.rows_per_stage),
    )
    with open_conversion(options) as conversion:
        say(_plan(conversion, settings.source.name, directory))
        if not conversion.missing:
            return
        if conversion.bytes > conversion.free_bytes:
            raise CacheError(
                f"The disk of {directory} has no room for that: free {in_words(conversion.bytes)} there, or "
                "choose another directory with --cache-dir."
            )
        with work.steps("Converting", len(conversion.missing)) as done:
            conversion.run(lambda part: done(part.name))
    say(f"All {len(conversion.parts)} parts are in {directory}.")


def _plan(conversion: "Conversion", name: str, directory: Path) -> str:
    if not conversion.missing:
        return f"Nothing is to be done: all {len(conversion.parts)} parts of {name} are in {directory} already."
    return (
        f"{name} has {len(conversion.parts)} parts, {len(conversion.missing)} of them to be converted: "
        f"they take about {in_words(conversion.bytes)}, and {in_words(conversion.free_bytes)} are free at "
        f"{directory}."
    )
