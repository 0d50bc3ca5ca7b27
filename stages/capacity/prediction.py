"""The predicted speed of a deployment, with drafts and without. Nothing here was measured on a Galaxy."""

from collections.abc import Sequence

import msgspec

from stages.capacity.chip_memory import chip_stages
from stages.capacity.deployment import Deployment
from stages.capacity.step_time import ACTIVATION_BYTES, ExpertKernel, StageTimes, StepTime, hop_s
from stages.plan import StageSpec
from stages.wormhole import GALAXY_COLUMNS
from weights.model_config import ModelConfig
from weights.sizes import ceil_div


class PredictionOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The load to predict: `context` cached tokens for each user that decodes, and prompts of `prompt_tokens`.

    A draft is right with probability `acceptance` where those before it are; where that is None, what drafts come to is
    not predicted.
    """

    context: int
    prompt_tokens: int
    traced: bool = False
    expert_kernel: ExpertKernel = "all"
    acceptance: float | None = None


class DraftPrediction(msgspec.Struct, frozen=True, kw_only=True):
    """Predicted times of each stage's decode steps with drafts, and what follows for users.

    All `users` get `tokens_per_step` tokens in each `cycle_s`, on average. Drafts pay where that is more than a token
    in the time of a cycle without: the rule by which a server does without them.
    """

    decode: list[StepTime]
    cycle_s: float
    users: int
    tokens_per_step: float
    pays: bool

    @property
    def tokens_per_s_per_user(self) -> float:
        """Tokens per second per user (t/s/u)."""
        return self.tokens_per_step / self.cycle_s

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of all users in flight."""
        return self.users * self.tokens_per_s_per_user


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """Predicted times of each stage's decode and prefill steps, and what follows for users.

    `hop_s` is the time from a stage to the next, `cycle_s` the time between two tokens of a user while all microbatches
    are in flight, and `ttft_s` the time to the first token of a prompt that nothing else delays. Decode steps are those
    without drafts; `drafts` are the same stages with them, where the deployment makes any. Prefill steps have them.
    """

    decode: list[StepTime]
    prefill: list[StepTime]
    hop_s: float
    cycle_s: float
    users: int
    ttft_s: float
    drafts: DraftPrediction | None = None

    @property
    def tokens_per_s_per_user(self) -> float:
        """Tokens per second per user (t/s/u)."""
        return 1 / self.cycle_s

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of all users in flight."""
        return self.users / self.cycle_s

    @property
    def served_tokens_per_s(self) -> float:
        """Tokens per second of all users in flight, with drafts where they pay."""
        return self.drafts.tokens_per_s if self.drafts is not None and self.drafts.pays else self.tokens_per_s


def predict(config: ModelConfig, deployment: Deployment, options: PredictionOptions) -> Prediction:
    """Predicts the speed of a deployment. Raises PlanError as `chip_stages` does."""
    stages = stage_times(config, chip_stages(config, deployment), deployment, options)
    decode = [stage.decode(deployment.users_per_row, options.context) for stage in stages]
    chunk = min(deployment.prefill_chunk, options.prompt_tokens)
    drafts, start = deployment.num_speculative_tokens, max(0, options.prompt_tokens - chunk)
    prefill = [stage.prefill(chunk, start, drafts=drafts) for stage in stages]
    decode_hop = _hop_s(config, deployment, deployment.users_per_row)
    cycle_s = _cycle_s([time.total_s for time in decode], decode_hop, deployment.steps_in_flight)
    return Prediction(
        decode=decode,
        prefill=prefill,
        hop_s=decode_hop,
        cycle_s=cycle_s,
        users=deployment.users,
        ttft_s=_ttft_s([time.total_s for time in prefill], _hop_s(config, deployment, chunk), options, chunk),
        drafts=_predict_drafts(config, deployment, options, stages, cycle_s),
    )


def stage_times(
    config: ModelConfig, specs: Sequence[StageSpec], deployment: Deployment, options: PredictionOptions
) -> list[StageTimes]:
    """What predicts the steps of each stage of a deployment."""
    return [
        StageTimes(
            config,
            spec,
            deployment.rows_per_stage,
            deployment.dtypes,
            traced=options.traced,
            expert_kernel=options.expert_kernel,
        )
        for spec in specs
    ]


def tokens_per_step(acceptance: float, drafts: int) -> float:
    """The tokens that a step with so many drafts yields on average: those before the first wrong one, and one more."""
    return sum(acceptance**right for right in range(drafts + 1))


def _predict_drafts(
    config: ModelConfig,
    deployment: Deployment,
    options: PredictionOptions,
    stages: list[StageTimes],
    without_s: float,
) -> DraftPrediction | None:
    """What drafts come to beside cycles of `without_s` seconds; None where there are none."""
    drafts = deployment.num_speculative_tokens
    if not drafts or options.acceptance is None:
        return None
    decode = [stage.decode(deployment.users_per_row, options.context, drafts=drafts) for stage in stages]
    hop = _hop_s(config, deployment, deployment.lanes_per_row)
    cycle_s = _cycle_s([time.total_s for time in decode], hop, deployment.steps_in_flight)
    tokens = tokens_per_step(options.acceptance, drafts)
    return DraftPrediction(
        decode=decode,
        cycle_s=cycle_s,
        users=deployment.users,
        tokens_per_step=tokens,
        pays=tokens / cycle_s > 1 / without_s,
    )


def _hop_s(config: ModelConfig, deployment: Deployment, tokens: int) -> float:
    if deployment.stages == 1:
        return 0.0
    return hop_s(deployment.rows_per_stage, tokens * config.hidden_size / GALAXY_COLUMNS * ACTIVATION_BYTES)


def _cycle_s(stages: list[float], hop: float, microbatches: int) -> float:
    """Seconds between two tokens of a user: the slowest stage runs every microbatch, and each passes all stages."""
    return max(microbatches * max(stages), sum(stages) + hop * (len(stages) - 1))


def _ttft_s(stages: list[float], hop: float, options: PredictionOptions, chunk: int) -> float:
    """Seconds to the first token: the last chunk, as slow as all others, follows them through the slowest stage."""
    chunks = ceil_div(options.prompt_tokens, chunk)
    return sum(stages) + hop * (len(stages) - 1) + (chunks - 1) * max(stages)
