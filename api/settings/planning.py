"""Plans: whether a model fits the chips of some Galaxy rows, and how fast it is predicted to be there."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from actors.options import ClusterOptions
from api.errors import OptionError
from api.scheduler.options import ScheduleOptions
from api.settings.engine import EngineSettings, LengthOptions
from api.settings.model import SplitOptions
from api.settings.option import again
from api.settings.paths import write_file
from api.settings.tiers import KVOptions, size_of
from api.text.model_source import check_model_files, resolve_config
from stages.capacity.chip_memory import StageMemory
from stages.capacity.deployment import Deployment
from stages.capacity.fit import Shape, check_fits, choose
from stages.capacity.kv_tiers import TierPrediction, TierSizes, predict_tiers
from stages.capacity.prediction import DraftPrediction, Prediction, PredictionOptions, predict
from stages.capacity.step_time import ExpertKernel
from stages.options import DRAFT_ACCEPTANCE, TRACE_REGION_BYTES, DraftOptions
from stages.tensor_dtypes import WeightDtypes
from stages.wormhole import PREFILL_CHUNK, USERS_PER_ROW
from weights.model_config import ModelConfig
from weights.sizes import counted

DEFAULT_MAX_MODEL_LEN = 4096
DEFAULT_PROMPT_TOKENS = 1024
DEFAULT_HOST_MEMORY = "32G"
"""What `serve` takes by default of a host with 640 GB."""

PREDICTED = "predicted, not measured"


class PlanSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The options of `plan`, None where the plan decides. Counts are positive; lengths are in tokens.

    `users` are those of a row in one microbatch. `trace_region` is in bytes on each chip. `context` is what is cached
    for each user while it decodes, `prompt` the length of the prompt whose first token is waited for. An `acceptance`
    alone asks for one draft of each request and step.
    """

    rows: (
        Annotated[
            int,
            Meta(ge=1, description="Galaxy rows in all.", extra={"default": "the fewest whole Galaxies that fit"}),
        ]
        | None
    ) = None
    split: SplitOptions = SplitOptions()
    rows_per_stage: (
        Annotated[int, again(ClusterOptions, "rows_per_stage", "Rows of each stage.", default="the fastest")] | None
    ) = None
    users: Annotated[
        int,
        Meta(
            ge=1,
            description="Users of a row in one microbatch, a multiple of 8.",
            extra={"flags": ("--users", "--max-users-per-row")},
        ),
    ] = USERS_PER_ROW
    microbatches: Annotated[int, again(ScheduleOptions, "microbatches")] | None = None
    lengths: LengthOptions = LengthOptions()
    prefill_chunk: Annotated[int, again(EngineSettings, "prefill_chunk", "Prompt tokens of one step at most.")] = (
        PREFILL_CHUNK
    )
    trace_region: Annotated[int, Meta(ge=0, description="Bytes of each chip that are set aside for traces.")] = (
        TRACE_REGION_BYTES
    )
    context: (
        Annotated[
            int,
            Meta(
                ge=1,
                description="Tokens cached for each user that decodes.",
                extra={"default": "half the longest"},
            ),
        ]
        | None
    ) = None
    prompt: (
        Annotated[
            int,
            Meta(
                ge=1,
                description="Tokens of a prompt.",
                extra={"default": f"{DEFAULT_PROMPT_TOKENS}, or the longest"},
            ),
        ]
        | None
    ) = None
    enable_trace: Annotated[
        bool, again(EngineSettings, "enable_trace", "Predict decode steps that are replayed from traces.")
    ] = False
    expert_kernel: Annotated[
        ExpertKernel,
        Meta(
            description="all: a chip runs all its experts on every token, as the modules do; chosen: only those that "
            "were chosen."
        ),
    ] = "all"
    num_speculative_tokens: (
        Annotated[int, again(DraftOptions, "num_speculative_tokens", default="0, or 1 with --acceptance")] | None
    ) = None
    acceptance: (
        Annotated[
            float,
            Meta(
                ge=0,
                le=1,
                description="The probability that a draft is right, where those before it are.",
                extra={"default": f"{DRAFT_ACCEPTANCE:g} with drafts"},
            ),
        ]
        | None
    ) = None
    dtypes: WeightDtypes = WeightDtypes()
    kv_host_memory: Annotated[
        str, again(KVOptions, "kv_host_memory", "Memory of each Galaxy's host for copies of the KV cache.")
    ] = DEFAULT_HOST_MEMORY
    kv_disk: Annotated[str, again(KVOptions, "kv_disk", "Disk of each Galaxy's host for more of them.")] = "0"

    @property
    def drafts(self) -> int:
        """The drafts of a request in each step. Raises OptionError where none are asked for, but an acceptance is."""
        if self.acceptance is None:
            return self.num_speculative_tokens or 0
        if self.num_speculative_tokens == 0:
            raise OptionError(
                "--acceptance says how often drafts are right: leave it out, or give --num-speculative-tokens 1."
            )
        return self.num_speculative_tokens or 1


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """A deployment that fits, what it takes of each chip, and how fast it is predicted to be."""

    model: str
    deployment: Deployment
    options: PredictionOptions
    assumptions: list[str]
    memory: list[StageMemory]
    prediction: Prediction
    tiers: TierPrediction


def known_config(model: str | None, environment: Mapping[str, str]) -> tuple[str, ModelConfig]:
    """The name and configuration of a model: those of its directory, else of a published model that comes with us.

    Raises OptionError as `resolve_config` does, and CheckpointError where config.json is not of a model that can run.
    """
    source = resolve_config(model, environment)
    check_model_files(source, needs_weights=False)
    return source.name, ModelConfig.from_file(source.path / "config.json")


def make_plan(name: str, config: ModelConfig, settings: PlanSettings) -> Plan:
    """Plans a model on chips.

    Raises OptionError or PlanError where the options contradict each other or the model, or where it does not fit.
    """
    max_model_len = settings.lengths.max_model_len or min(DEFAULT_MAX_MODEL_LEN, config.max_position_embeddings)
    options = PredictionOptions(
        context=settings.context or max_model_len // 2,
        prompt_tokens=settings.prompt or min(DEFAULT_PROMPT_TOKENS, max_model_len),
        traced=settings.enable_trace,
        expert_kernel=settings.expert_kernel,
        acceptance=_acceptance(settings),
    )
    for flag, tokens in (("--context", options.context), ("--prompt", options.prompt_tokens)):
        if tokens > max_model_len:
            raise OptionError(f"{flag} {tokens} is more than the {max_model_len} tokens of --max-model-len.")
    sizes = TierSizes(
        host_bytes=size_of("--kv-host-memory", settings.kv_host_memory),
        disk_bytes=size_of("--kv-disk", settings.kv_disk),
    )
    choice = choose(config, _shape(settings), _base(settings, max_model_len), options)
    deployment = choice.deployment
    prediction = predict(config, deployment, options)
    return Plan(
        model=name,
        deployment=deployment,
        options=options,
        assumptions=[*choice.assumptions, *_assumptions(settings, deployment, options)],
        memory=check_fits(config, deployment),
        prediction=prediction,
        tiers=predict_tiers(config, deployment, options, prediction, sizes),
    )


def write_plan(path: Path, plan: Plan) -> None:
    """Writes a plan as JSON, with what follows from it. Raises OptionError where it cannot be written."""
    prediction = plan.prediction
    content = {
        "model": plan.model,
        "deployment": msgspec.to_builtins(plan.deployment)
        | {
            "microbatches": plan.deployment.steps_in_flight,
            "rows": plan.deployment.rows,
            "users": plan.deployment.users,
        }
        | {"layers_per_stage": [memory.end_layer - memory.first_layer for memory in plan.memory]},
        "assumptions": plan.assumptions,
        "memory": [msgspec.to_builtins(memory) | {"total": memory.total} for memory in plan.memory],
        "prediction": {
            "kind": PREDICTED,
            "options": msgspec.to_builtins(plan.options),
            **_speeds(prediction),
            "drafts": None if prediction.drafts is None else _speeds(prediction.drafts),
        },
        "kv_tiers": {"kind": PREDICTED, **msgspec.to_builtins(plan.tiers)},
    }
    write_file(path, "--json", json.dumps(content, indent=2) + "\n")


def _speeds(prediction: Prediction | DraftPrediction) -> dict[str, Any]:
    """A prediction as it is written, with what follows from it."""
    written: dict[str, Any] = msgspec.to_builtins(prediction)
    return written | {
        "tokens_per_s_per_user": prediction.tokens_per_s_per_user,
        "tokens_per_s": prediction.tokens_per_s,
    }


def _acceptance(settings: PlanSettings) -> float | None:
    if not settings.drafts:
        return None
    return DRAFT_ACCEPTANCE if settings.acceptance is None else settings.acceptance


def _shape(settings: PlanSettings) -> Shape:
    return Shape(rows=settings.rows, stages=settings.split.count, rows_per_stage=settings.rows_per_stage)


def _base(settings: PlanSettings, max_model_len: int) -> Deployment:
    """The deployment but for its shape."""
    layers = settings.split.layers_per_stage
    return Deployment(
        stages=1,
        rows_per_stage=1,
        users_per_row=settings.users,
        max_model_len=max_model_len,
        block_size=settings.lengths.block_size,
        prefill_chunk=settings.prefill_chunk,
        microbatches=settings.microbatches,
        layers_per_stage=None if layers is None else tuple(layers),
        trace_region_bytes=settings.trace_region,
        dtypes=settings.dtypes,
        num_speculative_tokens=settings.drafts,
    )


def _assumptions(settings: PlanSettings, deployment: Deployment, options: PredictionOptions) -> list[str]:
    assumed = []
    if settings.microbatches is None:
        assumed.append(
            f"{counted(deployment.steps_in_flight, 'microbatch')}: what keeps all stages busy (--microbatches)"
        )
    if settings.lengths.max_model_len is None:
        assumed.append(f"{deployment.max_model_len} tokens of prompt and completion (--max-model-len)")
    if settings.context is None:
        assumed.append(f"{options.context} tokens cached for each user that decodes (--context)")
    if settings.prompt is None:
        assumed.append(f"prompts of {options.prompt_tokens} tokens (--prompt)")
    if deployment.num_speculative_tokens and settings.num_speculative_tokens is None:
        assumed.append("1 draft of each request and step (--num-speculative-tokens)")
    if options.acceptance is not None and settings.acceptance is None:
        assumed.append(f"drafts that are right with a probability of {options.acceptance:g} (--acceptance)")
    return assumed
