"""Predicted speed of a whole pipeline, from the times of its stages' steps."""

import msgspec

from stages.capacity.chip_memory import chip_stages
from stages.capacity.deployment import Deployment
from stages.capacity.step_time import ACTIVATION_BYTES, ExpertKernel, StageTimes, StepTime, hop_s
from stages.wormhole import GALAXY_COLUMNS
from weights.model_config import ModelConfig
from weights.sizes import ceil_div


class PredictionOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The load to predict: `context` cached tokens for each user that decodes, and prompts of `prompt_tokens`."""

    context: int
    prompt_tokens: int
    traced: bool = False
    expert_kernel: ExpertKernel = "all"


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """Predicted times of each stage's decode and prefill steps, and what follows for users.

    `hop_s` is the time from a stage to the next, `cycle_s` the time between two tokens of a user while all microbatches
    are in flight, and `ttft_s` the time to the first token of a prompt that nothing else delays.
    """

    decode: list[StepTime]
    prefill: list[StepTime]
    hop_s: float
    cycle_s: float
    users: int
    ttft_s: float

    @property
    def tokens_per_s_per_user(self) -> float:
        """Tokens per second per user (t/s/u)."""
        return 1 / self.cycle_s

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of all users in flight."""
        return self.users / self.cycle_s


def predict(config: ModelConfig, deployment: Deployment, options: PredictionOptions) -> Prediction:
    """Predicts the speed of a deployment. Raises PlanError as `chip_stages` does."""
    stages = [
        StageTimes(
            config,
            spec,
            deployment.rows_per_stage,
            deployment.dtypes,
            traced=options.traced,
            expert_kernel=options.expert_kernel,
        )
        for spec in chip_stages(config, deployment)
    ]
    decode = [stage.decode(deployment.users_per_row, options.context) for stage in stages]
    chunk = min(deployment.prefill_chunk, options.prompt_tokens)
    prefill = [stage.prefill(chunk, max(0, options.prompt_tokens - chunk)) for stage in stages]
    decode_hop = _hop_s(config, deployment, deployment.users_per_row)
    return Prediction(
        decode=decode,
        prefill=prefill,
        hop_s=decode_hop,
        cycle_s=_cycle_s([time.total_s for time in decode], decode_hop, deployment.steps_in_flight),
        users=deployment.users,
        ttft_s=_ttft_s([time.total_s for time in prefill], _hop_s(config, deployment, chunk), options, chunk),
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
