"""The options that `serve` and `demo` have in common, and the types they are read with."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import click
import msgspec
import structlog

from actors.options import Transport
from api.cli.weight_dtype_options import take_weight_dtypes, weight_dtype_options
from api.engine.recovery import DEFAULT_MAX_RESTARTS
from api.errors import OptionError
from api.scheduler.options import DEFAULT_PREFILL_WAIT
from api.settings.engine import DEFAULT_CACHE_DIR, EngineSettings
from api.settings.environment import CACHE_VARIABLE, note_environment
from api.settings.parameters import COUNT, SECONDS, JsonObject, LayerSplit, Milliseconds, with_options
from api.text.model_source import resolve_model, resolve_timed_model
from stages.device import Device

PLAIN_COLUMNS = 120
"""Of a table that goes to no terminal."""

TRACE_MODE = "trace_mode"

log = structlog.get_logger()


def _without_chip_settings(_: click.Context, __: click.Parameter, value: dict[str, object] | None) -> dict[str, object]:
    """The keys that mean something here; the log names the others."""
    given = value or {}
    if others := sorted(given.keys() - {TRACE_MODE}):
        log.info("these keys of --override-tt-config have no effect", keys=others)
    return {TRACE_MODE: given.get(TRACE_MODE) is True}


def _note_scheduler_steps(_: click.Context, __: click.Parameter, value: int | None) -> None:
    if value is not None:
        log.info("--num-scheduler-steps has no effect: each token is scheduled when its step returns", steps=value)


dtype_option = click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="auto: float32 for the sample model, else bfloat16.",
)
load_format_option = click.option(
    "--load-format",
    type=click.Choice(["auto", "dummy"]),
    default="auto",
    show_default=True,
    help="dummy: random weights; only config.json and the tokenizer are read.",
)
device_option = click.option(
    "--device",
    type=click.Choice(get_args(Device)),
    default="embedded",
    show_default=True,
    help="What computes: this host's processor; the chips of Galaxies (needs galaxyline[galaxy] on their hosts); or "
    "nothing, in the time that chips are predicted to take, or that --stage-time gives.",
)
weights_device_option = click.option(
    "--device",
    type=click.Choice(["embedded", "ttnn"]),
    default="embedded",
    show_default=True,
    help="What the weights are for: this host's processor, or the chips of Galaxies.",
)
rows_per_stage_option = click.option(
    "--rows-per-stage", type=COUNT, default=1, show_default=True, help="Galaxy rows of 8 chips that a stage owns."
)
cache_dir_option = click.option(
    "--cache-dir",
    type=click.Path(file_okay=False, path_type=Path),
    envvar=CACHE_VARIABLE,
    show_envvar=True,
    default=DEFAULT_CACHE_DIR,
    show_default=True,
    help="Where converted weights are kept.",
)
seed_option = click.option(
    "--seed", type=int, help="Of dummy weights, and of the requests that bring none.  [default: random]"
)

_ENGINE_OPTIONS = [
    click.option(
        "--stages",
        "--pipeline-parallel-size",
        type=COUNT,
        help="Pipeline stages; the layers are shared out so that they are equally fast.",
    ),
    click.option("--layers-per-stage", type=LayerSplit(), help="An explicit split, like 2,4, in place of --stages."),
    click.option(
        "--microbatches", type=COUNT, help="Steps in flight at once.  [default: one more than stages, or 1 for 1]"
    ),
    click.option(
        "--max-model-len", "--max-seq-len", type=COUNT, help="Tokens of prompt and completion.  [default: the model's]"
    ),
    click.option("--block-size", type=COUNT, default=32, show_default=True, help="Tokens of a KV cache block."),
    click.option("--max-num-seqs", type=COUNT, help="Requests that run at once.  [default: 32 per microbatch]"),
    click.option(
        "--max-num-batched-tokens",
        "--prefill-chunk",
        "prefill_chunk",
        type=COUNT,
        help="Prompt tokens of one step at most, rounded up to whole blocks.  [default: 256]",
    ),
    click.option(
        "--prefill-wait",
        type=click.FloatRange(min=0, min_open=True),
        default=DEFAULT_PREFILL_WAIT,
        show_default=True,
        help="Decode steps that a step of prompt tokens may take as long as where others wait for it; it holds as many "
        "tokens as measurements allow, and a block at least.",
    ),
    click.option(
        "--num-blocks", type=COUNT, help="KV cache blocks.  [default: enough for --max-num-seqs, bounded by memory]"
    ),
    dtype_option,
    load_format_option,
    device_option,
    rows_per_stage_option,
    click.option(
        "--stage-time",
        type=Milliseconds(),
        help="Of each step on the timed device, for all stages or, like 10,12, for each.  [default: what is predicted]",
    ),
    click.option(
        "--prompt-token-time",
        type=click.FloatRange(min=0),
        help="Milliseconds that a step on the timed device takes longer for each prompt token, with --stage-time.",
    ),
    click.option(
        "--transport",
        type=click.Choice(get_args(Transport)),
        help="How hidden states pass: mesh, from chip to chip, or host, which needs no links between stages' chips.  "
        "[default: mesh between stages on chips]",
    ),
    cache_dir_option,
    seed_option,
    click.option("--enable-trace", is_flag=True, help="Capture the decode step of each stage once, and replay it."),
    click.option("--ray-address", help="A running Ray cluster.  [default: $RAY_ADDRESS, else one of our own]"),
    click.option(
        "--start-timeout",
        "start_timeout_s",
        type=SECONDS,
        default=600.0,
        show_default=True,
        help="Seconds until all stages are ready.",
    ),
    click.option(
        "--placement-timeout",
        "placement_timeout_s",
        type=SECONDS,
        default=30.0,
        show_default=True,
        help="Seconds that Galaxy rows which others use are waited for.",
    ),
    click.option(
        "--step-timeout",
        "step_timeout_s",
        type=SECONDS,
        default=60.0,
        show_default=True,
        help="Seconds that one step may take.",
    ),
    click.option(
        "--max-restarts",
        type=click.IntRange(min=0),
        default=DEFAULT_MAX_RESTARTS,
        show_default=True,
        help="Failures in a row, with no token made in between, from which the pipeline is brought back.",
    ),
    click.option(
        "--timeline",
        type=click.Path(dir_okay=False, path_type=Path),
        help="A file for a trace of all steps, one track a stage; Perfetto (ui.perfetto.dev) opens it.",
    ),
    click.option(
        "--override-tt-config",
        type=JsonObject(),
        callback=_without_chip_settings,
        help="Settings of chips; '{\"trace_mode\": true}' is --enable-trace; no other applies to this device.",
    ),
]


_SERVE_MODEL_OPTIONS = [
    click.argument("model_argument", metavar="[MODEL]", required=False),
    click.option("--model", help="Directory or hub id.  [default: $DEEPSEEK_V3_HF_MODEL, $HF_MODEL, then the sample]"),
    click.option("--tokenizer", help="Directory or hub id of the tokenizer.  [default: the model's]"),
    click.option("--served-model-name", help="What requests call the model.  [default: the hub id or directory name]"),
]

num_scheduler_steps = click.option(
    "--num-scheduler-steps",
    type=COUNT,
    callback=_note_scheduler_steps,
    expose_value=False,
    help="An option of vLLM's TT server; without effect here.",
)


def engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the engine's options to a command, which gets them as `engine`, an EngineSettings."""

    @functools.wraps(command)
    def with_settings(**options: Any) -> None:
        options["weight_dtypes"] = take_weight_dtypes(options)
        given = {name: options.pop(name) for name in EngineSettings.__struct_fields__ if name in options}
        given["enable_trace"] |= options.pop("override_tt_config")[TRACE_MODE]
        note_environment(os.environ)
        command(engine=EngineSettings(**given), **options)

    return with_options(with_settings, [*_ENGINE_OPTIONS, *weight_dtype_options])


def model_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds vLLM's ways to name a model to a command, which gets it as `source`, a ModelSource."""

    @functools.wraps(command)
    def with_source(
        model_argument: str | None,
        model: str | None,
        tokenizer: str | None,
        served_model_name: str | None,
        **options: Any,
    ) -> None:
        if model is not None and model_argument not in {None, model}:
            raise OptionError(f"Two models are given, {model_argument!r} and --model {model!r}: leave one out.")
        resolve = resolve_timed_model if options.get("device") == "timed" else resolve_model
        source = resolve(model or model_argument, os.environ)
        if tokenizer is not None:
            source = msgspec.structs.replace(source, tokenizer=resolve_model(tokenizer, {}).path)
        command(source=msgspec.structs.replace(source, name=served_model_name or source.name), **options)

    return with_options(with_source, _SERVE_MODEL_OPTIONS)
