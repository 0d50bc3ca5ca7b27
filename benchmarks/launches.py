"""`python -m benchmarks.launches`: programs that R1's decode steps launch on a chip, and what follows for their time.

Predictions, of 8 and of 16 rows of a Galaxy, with a launch of 8.5 us, as a trace may have it, and of 0.25 ms, which is
what tt-metal's demo of the model takes for each of its ops.
"""

import sys

from stages.capacity.chip_memory import chip_stages
from stages.capacity.deployment import Deployment
from stages.capacity.step_time import TRACED_LAUNCH_S, StageTimes, StepTime
from weights.presets import preset_config

CONTEXT = 2048
MEASURED_LAUNCH_S = 0.25e-3
SHAPES = ((1, 8), (2, 4), (8, 1), (1, 16), (4, 4), (16, 1))
"""Stages, and rows of each."""


def main() -> None:
    """Prints a table in Markdown: programs of a layer and of a step of the fullest stage, and its predicted times."""
    sys.stdout.write(
        "| stages x rows | programs of a dense layer | of a mixture | of a step | ms at 8.5 us | ms at 0.25 ms |\n"
        "|---|---|---|---|---|---|\n"
    )
    for stages, rows in SHAPES:
        plan = Deployment(
            stages=stages, rows_per_stage=rows, users_per_row=32, max_model_len=4096, block_size=32, prefill_chunk=256
        )
        sys.stdout.write(_line(plan) + "\n")


def _line(plan: Deployment) -> str:
    users = plan.users_per_row
    every = [_times(plan, stage, launch_s) for launch_s in LAUNCHES for stage in range(plan.stages)]
    fast, slow = every[: plan.stages], every[plan.stages :]
    layer = [fast[0].layer_ops(users, is_moe=is_moe) for is_moe in (False, True)]
    step = max(times.decode_ops(users) for times in fast)
    milliseconds = (max(_step(times, users).total_s for times in kind) * 1e3 for kind in (fast, slow))
    figures = [*map(str, layer), str(step), *(f"{value:.0f}" for value in milliseconds)]
    return f"| {plan.stages} x {plan.rows_per_stage} | {' | '.join(figures)} |"


LAUNCHES = (TRACED_LAUNCH_S, MEASURED_LAUNCH_S)


def _times(plan: Deployment, stage: int, launch_s: float) -> StageTimes:
    config = preset_config("r1")
    spec = chip_stages(config, plan)[stage]
    return StageTimes(config, spec, plan.rows_per_stage, plan.dtypes, launch_s=launch_s)


def _step(times: StageTimes, users: int) -> StepTime:
    return times.decode(users, CONTEXT)


if __name__ == "__main__":
    main()
