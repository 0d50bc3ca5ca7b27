"""The options that name a model and share its layers out to stages."""

from collections.abc import Mapping
from typing import Annotated

import msgspec
from msgspec import Meta

from api.errors import OptionError
from api.settings.option import again
from api.text.model_source import ModelSource, resolve_config, resolve_model
from stages.device import PROFILES, Device


class ModelOptions(msgspec.Struct, frozen=True, kw_only=True):
    """vLLM's ways to name a model, beside an argument of the command."""

    model: Annotated[
        str | None,
        Meta(
            description="Directory or hub id.",
            extra={"default": "$DEEPSEEK_V3_HF_MODEL, $HF_MODEL, then the sample"},
        ),
    ] = None
    tokenizer: Annotated[
        str | None,
        Meta(description="Directory or hub id of the tokenizer.", extra={"default": "the model's"}),
    ] = None
    served_model_name: Annotated[
        list[str],
        Meta(
            description="What requests call the model; several names, the main one first, in one value with spaces or "
            "by giving the option again.",
            extra={"default": "the hub id or directory name"},
        ),
    ] = []

    def name(self, argument: str | None) -> str | None:
        """The model that is named, by an argument or by --model. Raises OptionError where they name two."""
        if self.model is not None and argument not in {None, self.model}:
            raise OptionError(f"Two models are given, {argument!r} and --model {self.model!r}: leave one out.")
        return self.model or argument

    def source(self, argument: str | None, device: Device, environment: Mapping[str, str]) -> ModelSource:
        """Where the model is. Raises OptionError where it is not found, or two are named."""
        source = source_for(device, self.name(argument), environment)
        if self.tokenizer is not None:
            source = msgspec.structs.replace(source, tokenizer=resolve_model(self.tokenizer, {}).path)
        names = list(dict.fromkeys(name for given in self.served_model_name for name in given.split()))
        return msgspec.structs.replace(source, name=names[0], aliases=names[1:]) if names else source


class ModelPathOption(msgspec.Struct, frozen=True, kw_only=True):
    """The tt-metal demo's way to name a model."""

    model_path: Annotated[str | None, again(ModelOptions, "model")] = None


def source_for(device: Device, model: str | None, environment: Mapping[str, str]) -> ModelSource:
    """Where a model is; on a device that reads no weights it may be a published one that comes with the program.

    Raises OptionError where it is not found.
    """
    resolve = resolve_model if PROFILES[device].computes else resolve_config
    return resolve(model, environment)


class SplitOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How the model's layers are split into stages; None where the program decides."""

    stages: (
        Annotated[
            int,
            Meta(
                ge=1,
                description="Pipeline stages; the layers are shared out so that they are equally fast.",
                extra={"flags": ("--stages", "--pipeline-parallel-size", "-pp")},
            ),
        ]
        | None
    ) = None
    layers_per_stage: Annotated[
        list[int] | None, Meta(description="An explicit split, like 2,4, in place of --stages.")
    ] = None

    @property
    def count(self) -> int | None:
        """The number of stages; None where neither option gives it. Raises OptionError where they contradict each
        other."""
        if self.layers_per_stage is None:
            return self.stages
        if self.stages not in {None, len(self.layers_per_stage)}:
            raise OptionError(
                f"--layers-per-stage names {len(self.layers_per_stage)} stages and --stages {self.stages}: leave one "
                "of them out."
            )
        return len(self.layers_per_stage)
