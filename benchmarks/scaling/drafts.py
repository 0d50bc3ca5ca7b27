"""Drafts of DeepSeek-R1 on the timed device, beside what `plan` predicts: in the real server, and simulated."""

from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.table import Table

from api.messages.engine import AddRequest, DraftCounts
from api.messages.pipeline_view import DraftView
from api.settings.option import made
from api.settings.planning import PlanSettings, make_plan
from benchmarks.scaling.case import (
    CONTEXT,
    PROMPT_TOKENS,
    R1_MAX_MODEL_LEN,
    SLOTS,
    Case,
    r1_case,
    r1_config,
    r1_options,
)
from benchmarks.scaling.run import Effort, measure
from benchmarks.scaling.simulation import Simulation
from benchmarks.support.report import Target, table_of
from stages.capacity.prediction import Prediction
from stages.options import DRAFT_ACCEPTANCE
from stages.plan import default_microbatches
from stages.step import SamplingParams

STAGES = (8, 16)
SHORT_STAGES = (8,)
OVER_PLAN = 0.95
"""The share of what is predicted that has to be reached."""

SAMPLING = SamplingParams(temperature=0, top_p=1, top_k=0, seed=0, choice=0)


class DraftCase(msgspec.Struct, frozen=True, kw_only=True):
    """A pipeline of one row a stage, and `drafts` of each request and step, right with probability `acceptance`.

    All slots of a microbatch are taken, so many as it has `users`. With 0 `drafts` it is a pipeline without.
    """

    stages: int
    drafts: int = 1
    acceptance: float = DRAFT_ACCEPTANCE
    users: int = SLOTS

    @property
    def requests(self) -> int:
        """The number of requests at once."""
        return self.users * default_microbatches(self.stages)


class DraftRow(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one pipeline with drafts, beside what `plan` says of it.

    A step that verified a draft yielded `tokens_per_draft`. `pays` is what `plan` says of drafts, and `are_on` what the
    scheduler came to. `planned` figures are those with drafts if they pay, `without` those without.
    """

    stages: int
    requests: int
    drafts: int
    acceptance: float
    tokens_per_draft: float
    pays: bool
    are_on: bool
    tokens_per_s: float
    tokens_per_s_per_user: float
    planned_tokens_per_s: float
    planned_tokens_per_s_per_user: float
    without_tokens_per_s: float
    over_plan: float


def planned(case: DraftCase) -> Prediction:
    """What `galaxyline plan r1` predicts for a case."""
    settings = {
        "stages": case.stages,
        "rows_per_stage": 1,
        "users": case.users,
        "max_model_len": R1_MAX_MODEL_LEN,
        "context": CONTEXT,
        "enable_trace": True,
        "num_speculative_tokens": case.drafts,
        "acceptance": case.acceptance if case.drafts else None,
    }
    return make_plan("r1", r1_config(), made(PlanSettings, settings)).prediction


def measured(case: DraftCase, cache_dir: Path, effort: Effort) -> DraftRow:
    """Measures a case in the real server on the timed device. Raises ServerError or StreamError."""
    run = measure(_served(case), "timed", cache_dir, effort)
    before, after = run.before, run.after
    drafts = None if after.view.engine is None else after.view.engine.drafts
    return _row(case, (after.tokens - before.tokens) / (after.at_s - before.at_s), drafts)


def simulated(case: DraftCase, warm_tokens: int, tokens: int) -> DraftRow:
    """Simulates a case: each request makes `warm_tokens`, then `tokens` at least, which are counted.

    They end at the same time, when the first request ends.
    """
    given = {"num_speculative_tokens": case.drafts, "draft_acceptance": case.acceptance} if case.drafts else {}
    simulation = Simulation(r1_options(case.stages, case.users, seed=0, **given), r1_config())
    had = [0] * case.requests
    began_s, counted = 0.0, 0
    for at_s, output in simulation.run([_request(number, warm_tokens + tokens) for number in range(case.requests)]):
        had[output.request_id] += len(output.tokens)
        if began_s:
            counted += len(output.tokens)
        elif min(had) >= warm_tokens:
            began_s = at_s
        if output.finish_reason is not None:
            break
    return _row(case, counted / (at_s - began_s), _view(simulation.scheduler.drafts.counts()))


def targets(rows: Sequence[DraftRow]) -> list[Target]:
    """What is predicted is to be reached, and drafts are on where they pay alone."""
    return [
        Target(
            name=f"tokens/s over plan, {row.stages} stages, {row.drafts} drafts",
            bound=OVER_PLAN,
            figure=row.over_plan,
            is_floor=True,
        )
        for row in rows
    ]


def table(rows: Sequence[DraftRow]) -> Table:
    """The rows as a table; what `plan` says is in brackets."""
    found = table_of("stages", "requests", "drafts", "tokens a step", "on", "t/s/u", "tokens/s", "/ plan", "/ without")
    for row in rows:
        found.add_row(
            str(row.stages),
            str(row.requests),
            f"{row.drafts} ({row.acceptance:g})",
            f"{row.tokens_per_draft:.2f}",
            f"{_said(row.are_on)} ({_said(row.pays)})",
            f"{row.tokens_per_s_per_user:.2f} ({row.planned_tokens_per_s_per_user:.2f})",
            f"{row.tokens_per_s:.4g} ({row.planned_tokens_per_s:.4g})",
            f"{row.over_plan:.3f}",
            f"{row.tokens_per_s / row.without_tokens_per_s:.2f}",
        )
    return found


def _said(is_true: bool) -> str:
    return "yes" if is_true else "no"


def _served(case: DraftCase) -> Case:
    """The case as the server is started for it."""
    given = ["--num-speculative-tokens", str(case.drafts), "--draft-acceptance", str(case.acceptance)]
    drafts = given if case.drafts else []
    plain = r1_case(case.stages)
    return msgspec.structs.replace(plain, users=case.users, options=[*plain.options, *drafts])


def _request(number: int, tokens: int) -> AddRequest:
    prompt = [3 + (number + 7 * place) % 500 for place in range(PROMPT_TOKENS)]
    return AddRequest(request_id=number, tokens=prompt, max_tokens=tokens, stop_token_ids=[], sampling=SAMPLING)


def _view(counts: DraftCounts) -> DraftView:
    return DraftView.of(**msgspec.structs.asdict(counts))


def _row(case: DraftCase, tokens_per_s: float, drafts: DraftView | None) -> DraftRow:
    plan = planned(case)
    return DraftRow(
        stages=case.stages,
        requests=case.requests,
        drafts=case.drafts,
        acceptance=case.acceptance,
        tokens_per_draft=(drafts and drafts.tokens_per_draft) or 1.0,
        pays=plan.drafts is not None and plan.drafts.pays,
        are_on=drafts is not None and drafts.are_on,
        tokens_per_s=tokens_per_s,
        tokens_per_s_per_user=tokens_per_s / case.requests,
        planned_tokens_per_s=plan.served_tokens_per_s,
        planned_tokens_per_s_per_user=plan.served_tokens_per_s / case.requests,
        without_tokens_per_s=plan.tokens_per_s,
        over_plan=tokens_per_s / plan.served_tokens_per_s,
    )
