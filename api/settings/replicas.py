"""The options of every replica's engine: the same, but for what it may not share with the others."""

from pathlib import Path

import msgspec

from actors.cluster.environment import cluster_address
from api.engine.options import EngineOptions
from api.errors import OptionError
from api.settings.engine import EngineSettings
from api.settings.paths import prepare_file
from api.text.model_source import ModelSource
from weights.model_config import ModelConfig


def replica_options(
    settings: EngineSettings, source: ModelSource, config: ModelConfig, replicas: int
) -> list[EngineOptions]:
    """The options of so many engines.

    A given cluster has to have room for all of them; without one, each has a cluster of its own on this host, whose
    memory they share.

    Raises what `EngineSettings.engine_options` raises, and OptionError where replicas would share chips.
    """
    if replicas == 1:
        return [settings.engine_options(source, config)]
    is_own = cluster_address(settings.cluster.ray_address) is None
    if is_own and settings.cluster.profile.has_chips:
        raise OptionError(
            f"--replicas {replicas} on chips need a Ray cluster that says which rows its hosts have: start one, and "
            "name it with --ray-address."
        )
    common = msgspec.structs.replace(settings, timeline=None).engine_options(
        source, config, sharers=replicas if is_own else 1
    )
    pipeline = msgspec.structs.replace(common.pipeline, pipelines=1 if is_own else replicas)
    return [
        msgspec.structs.replace(common, pipeline=pipeline, timeline=_timeline(settings.timeline, replica))
        for replica in range(replicas)
    ]


def replica_file(path: Path, replica: int) -> Path:
    """The file of one of several replicas: steps.0.json for steps.json."""
    return path.with_name(f"{path.stem}.{replica}{path.suffix}")


def _timeline(path: Path | None, replica: int) -> str | None:
    if path is None:
        return None
    own = replica_file(path, replica).absolute()
    prepare_file(own, "--timeline")
    return str(own)
