"""`galaxyline convert`: fills the weight cache before anything is served."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from api.client.progress import LongWork
from api.settings.chips import chip_dtype
from api.settings.engine import resolve_dtype
from api.text.model_source import ModelSource, check_model_files
from stages.device import DEVICE_VARIABLE, Device
from stages.options import Dtype, LoadFormat
from stages.tensor_dtypes import WeightDtypes
from stages.wormhole import GALAXY_COLUMNS
from weights.errors import CacheError
from weights.sizes import in_words

if TYPE_CHECKING:
    from stages.converted_weights import Conversion


class ConvertSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The options of `convert`; `seed` is that of dummy weights. On chips a stage has 8 columns of `rows_per_stage`."""

    source: ModelSource
    cache_dir: Path
    dtype: Dtype | Literal["auto"]
    load_format: LoadFormat
    seed: int
    device: Device
    rows_per_stage: int = 1
    weight_dtypes: WeightDtypes = WeightDtypes()


def convert(settings: ConvertSettings, say: Callable[[str], None], work: LongWork) -> None:
    """Converts all parts of a model that the cache does not have, and says what they take before it begins.

    Raises CheckpointError where the model will not do, CacheError where its parts do not fit the disk or cannot be
    written. What was converted by then stays.
    """
    os.environ[DEVICE_VARIABLE] = settings.device
    check_model_files(settings.source, needs_weights=settings.load_format == "auto")
    # Imports torch, which no other command of this process needs.
    from stages.converted_weights import ConvertOptions, open_conversion  # noqa: PLC0415

    options = ConvertOptions(
        model_path=str(settings.source.path),
        cache_dir=str(settings.cache_dir.expanduser().absolute()),
        dtype=_dtype(settings),
        load_format=settings.load_format,
        seed=settings.seed,
        weight_dtypes=settings.weight_dtypes,
        mesh_shape=(settings.rows_per_stage, GALAXY_COLUMNS) if settings.device == "ttnn" else (1, 1),
    )
    with open_conversion(options) as conversion:
        say(_plan(conversion, settings))
        if conversion.bytes > conversion.free_bytes:
            raise CacheError(
                f"The disk of {settings.cache_dir} has no room for that: free {in_words(conversion.bytes)} there, or "
                "choose another directory with --cache-dir."
            )
        with work.steps("Converting", len(conversion.missing)) as done:
            conversion.run(lambda part: done(part.name))
    say(f"All {len(conversion.parts)} parts are in {settings.cache_dir}.")


def _dtype(settings: ConvertSettings) -> Dtype:
    if settings.device == "ttnn":
        return chip_dtype(settings.dtype)
    return resolve_dtype(settings.dtype, settings.source)


def _plan(conversion: "Conversion", settings: ConvertSettings) -> str:
    if not conversion.missing:
        return f"{settings.source.name} has {len(conversion.parts)} parts, and none has to be converted."
    return (
        f"{settings.source.name} has {len(conversion.parts)} parts, {len(conversion.missing)} of them to be converted: "
        f"they take about {in_words(conversion.bytes)}, and {in_words(conversion.free_bytes)} are free at "
        f"{settings.cache_dir}."
    )
