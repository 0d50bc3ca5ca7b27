"""The messages that front end and engine exchange, as msgspec structs, and the errors that an engine's state means."""

from collections.abc import Sequence
from typing import Literal

import msgspec

from actors.stage.health import StageProgress
from api.errors import EXIT_CODE, EngineError, NotReadyError
from api.messages.histogram import Histogram
from api.messages.pipeline_view import StageView
from stages.step import Mode, SamplingParams, TokenLogprobs
from weights.errors import GalaxylineError

FinishReason = Literal["stop", "length", "abort", "error"]

EnginePhase = Literal["loading", "ready", "recovering", "failed"]

KINDS = {kind.__name__: kind for kind in EXIT_CODE}
"""The classes of errors by their names, as `EngineState.error_kind` has them."""

NOT_READY: dict[EnginePhase, str] = {
    "loading": "The model is still loading",
    "recovering": "No token can be made until a stage is replaced",
    "failed": "The engine failed",
}
"""Why a request is refused, by the engine's phase."""


class EngineMessage(msgspec.Struct, frozen=True, array_like=True, tag=True, kw_only=True):
    """Base of the messages between front end and engine: positional on the wire, checked on decoding."""


class AddRequest(EngineMessage, frozen=True, kw_only=True):
    """A sequence to complete. A token of `stop_token_ids` ends it with "stop", and is the last of its output.

    Under teacher forcing the sequence continues with the tokens `forced` as long as there are any, whatever was sampled
    in their place; the output has what was sampled.

    With a `max_tokens` of 0 the prompt is scored, as `sampling.prompt_logprobs` asks for, and nothing is generated.

    `request_id` counts upward for the life of the front end; a client's request with an `n` of 4 is four of these.
    What is cached is shared with requests of the same `cache_salt` only.
    """

    request_id: int
    tokens: list[int]
    max_tokens: int
    stop_token_ids: list[int]
    sampling: SamplingParams
    forced: list[int] = []
    cache_salt: str = ""

    @property
    def only_scores(self) -> bool:
        """Whether the request wants log-probabilities of its prompt and no token."""
        return self.max_tokens == 0 and self.sampling.prompt_logprobs is not None


class AbortRequest(EngineMessage, frozen=True, kw_only=True):
    """An order to end a request, as its client is gone or has what it wanted: no later step may contain it.

    Ids that are unknown, or have ended, are ignored.
    """

    request_id: int


class ResetPrefixCache(EngineMessage, frozen=True, kw_only=True):
    """An order to let no later request begin with what is cached now; it is answered with `PrefixCacheReset`."""


class PrefixCacheReset(EngineMessage, frozen=True, kw_only=True):
    """The answer to `ResetPrefixCache`: nothing of before is found any more.

    With a `problem`, a sentence for the log, what a directory keeps may be found again after the next start.
    """

    problem: str = ""


class GetCounts(EngineMessage, frozen=True, kw_only=True):
    """A query that is answered with `Counts`."""


class GetMetrics(EngineMessage, frozen=True, kw_only=True):
    """A query that is answered with `EngineMetrics`."""


class GetPipelineReport(EngineMessage, frozen=True, kw_only=True):
    """A query that is answered with a `PipelineReport`."""


class RequestOutput(EngineMessage, frozen=True, kw_only=True):
    """New tokens of one request; the last output, and only the last, has a `finish_reason`.

    With "error", `error` is the error's text and `public` its public sentence, if it has one (see `GalaxylineError`).
    `logprobs` has an entry for each token where the request asked
    for them, else none. `prompt_logprobs` are the next entries of the prompt's tokens, from its second one on: they
    come chunk by chunk, before the first token or with it, and each once. `cached_tokens` of the prompt were not
    computed; the first output has them.
    """

    request_id: int
    tokens: list[int]
    finish_reason: FinishReason | None
    error: str | None
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: list[TokenLogprobs] = []
    public: str | None = None
    cached_tokens: int = 0


class Outputs(EngineMessage, frozen=True, kw_only=True):
    """The outputs of one step, for all its requests."""

    outputs: list[RequestOutput]


class EngineState(EngineMessage, frozen=True, kw_only=True):
    """The engine's phase, and why it is in it; sent on every change.

    While it is "recovering" from the loss of a stage it takes requests, and they wait. `detail` is a sentence on
    what is being done, what was lost, or why the engine failed, and `public` what clients may see of it (see
    `GalaxylineError`). While a stage starts, `progress` has how far it is, and both sentences follow from it.
    `error_kind` is the name of the error's class when the engine failed, for the table of exit codes; empty before.
    """

    phase: EnginePhase
    detail: str = ""
    error_kind: str = ""
    public: str = ""
    progress: StageProgress | None = None

    @property
    def sentence(self) -> str:
        """What is known, in full; empty where nothing is."""
        return self.detail if self.progress is None else progress_sentence(self.progress)

    @property
    def public_sentence(self) -> str:
        """What clients may see of the sentence; empty where that is nothing."""
        return self.public if self.progress is None else progress_sentence(self.progress)


class Counts(EngineMessage, frozen=True, kw_only=True):
    """The numbers of requests, steps, slots and blocks in the engine, and of the asyncio `tasks` of its loop.

    After all requests ended, `waiting`, `running` and `steps_in_flight` are 0, all slots and blocks are free, and there
    are as many tasks as before the first one.
    """

    waiting: int
    running: int
    steps_in_flight: int
    free_slots: int
    slots: int
    free_blocks: int
    blocks: int
    tasks: int = 0


class PrefixCounts(EngineMessage, frozen=True, kw_only=True):
    """What the prefix cache holds now, in blocks, and what it has given since the engine began, in tokens.

    So many `blocks` can be found on the devices. Of `queries` tokens in requests that got their first slot `hits` were
    found there or in the tiers. `recomputed_tokens` were computed again after a preemption or the loss of a stage.
    """

    blocks: int = 0
    queries: int = 0
    hits: int = 0
    recomputed_tokens: int = 0


class DraftCounts(EngineMessage, frozen=True, kw_only=True):
    """What drafts have come to since the engine began, by vLLM's names.

    A draft has up to `num_speculative_tokens` tokens, 0 where none are asked for. So many `drafts` were verified, each
    of one request in one step, with `draft_tokens` in all, of which `accepted_tokens` were right;
    `accepted_per_position` has those of each place in a draft. Drafts are made for requests that begin now, and for
    batches as they are now, where `are_on`.
    """

    num_speculative_tokens: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_per_position: list[int] = []
    are_on: bool = False


class StageMetrics(EngineMessage, frozen=True, kw_only=True):
    """The measurements of one stage since the engine began, in seconds; see `StageMeter` and docs/metrics.md.

    `sampling_seconds` are those from the end of steps to their tokens, where these are drawn beside the next step.
    `cpu_seconds` and `sampling_cpu_seconds` are processor time of the threads that compute and that draw tokens.
    It keeps `host_tier_bytes` and `disk_tier_bytes` of the KV cache beside its device now.
    """

    stage: int
    host: str
    busy_seconds: float
    busy_share: float
    bubble_seconds: float
    steps: dict[Mode, Histogram]
    hops: Histogram
    queues: Histogram
    sampling_seconds: float = 0.0
    cpu_seconds: float = 0.0
    sampling_cpu_seconds: float = 0.0
    host_tier_bytes: int = 0
    disk_tier_bytes: int = 0


class EngineMetrics(EngineMessage, frozen=True, kw_only=True):
    """The measurements of the engine since it began, in seconds. `stages` is empty before a first pipeline is ready.

    The time from one result to the next belongs to the step that came back: `prefill_seconds` and `decode_seconds` are
    together the time in which the pipeline was not empty. `queue_times` are those of requests until they got a slot,
    `steps` the times of steps from their submission to their result, and `result_hops` the last stretch of these,
    from the last stage to the engine. `recoveries` are the times from each loss of a stage until steps could go on.
    `prefill_times` are those of requests from their slot to their first token, `decode_times` from there to the last
    and `inference_times` from slot to last, however a request ended; `step_tokens` counts the tokens of steps.
    `non_finite_logits` counts the requests that ended because their logits were not numbers, `grammar_failures` those
    whose grammar could not be followed, and `sampling_fallbacks` the tokens that took logits of the whole vocabulary on
    the host.
    """

    counts: Counts
    preemptions: int
    prefill_seconds: float
    decode_seconds: float
    queue_times: Histogram
    steps: dict[Mode, Histogram]
    result_hops: Histogram
    recoveries: Histogram
    prefill_times: Histogram
    decode_times: Histogram
    inference_times: Histogram
    step_tokens: Histogram
    stages: list[StageMetrics]
    non_finite_logits: int = 0
    grammar_failures: int = 0
    sampling_fallbacks: int = 0
    prefix: PrefixCounts = PrefixCounts()
    drafts: DraftCounts = DraftCounts()


class PipelineReport(EngineMessage, frozen=True, kw_only=True):
    """The state of the engine and its stages at this moment. `epoch` is None before the pipeline is ready."""

    epoch: int | None
    microbatches: int
    counts: Counts
    preemptions: int
    stages: list[StageView]
    prefix: PrefixCounts = PrefixCounts()
    drafts: DraftCounts = DraftCounts()
    sampling_fallbacks: int = 0


ToEngine = AddRequest | AbortRequest | ResetPrefixCache | GetCounts | GetMetrics | GetPipelineReport

FromEngine = Outputs | EngineState | PrefixCacheReset | Counts | EngineMetrics | PipelineReport


def progress_sentence(progress: StageProgress) -> str:
    """How far a stage has come in starting, as it is shown."""
    sentence = f"Stage {progress.stage} on {progress.host}: {progress.phase}"
    if progress.phase == "loading":
        sentence += f", {progress.layers_done} of {progress.layers} layers"
    return sentence


def loading_state(sentence: str) -> EngineState:
    """The state of an engine that starts; clients may see the sentence."""
    return EngineState(phase="loading", detail=sentence, public=sentence)


def recovering_state(error: GalaxylineError) -> EngineState:
    """The state of an engine that replaces what it lost with this error."""
    return EngineState(phase="recovering", detail=str(error), public=error.public or "")


def failed_state(error: GalaxylineError) -> EngineState:
    """The state of an engine that failed with this error, as the nearest class that has an exit code."""
    kind = next(kind for kind in type(error).__mro__ if kind in EXIT_CODE)
    return EngineState(phase="failed", detail=str(error), error_kind=kind.__name__, public=error.public or "")


def failed_output(request_id: int, error: GalaxylineError) -> RequestOutput:
    """The last output of a request that ends with this error."""
    return RequestOutput(request_id=request_id, tokens=[], finish_reason="error", error=str(error), public=error.public)


def error_of(state: EngineState) -> GalaxylineError:
    """The error that a failed engine failed with."""
    error = KINDS.get(state.error_kind, EngineError)(state.sentence)
    error.public = state.public_sentence or None
    return error


def takes_requests(state: EngineState) -> bool:
    """Whether a request is accepted: while a stage is replaced it waits."""
    return state.phase in {"ready", "recovering"}


def not_ready(state: EngineState) -> NotReadyError:
    """The error for a request that comes while an engine loads or recovers, or after it failed."""
    what = NOT_READY[state.phase]
    return NotReadyError(_explained(what, state.sentence), public=_explained(what, state.public_sentence))


def _explained(what: str, why: str) -> str:
    return f"{what}: {why}" if why else f"{what}."


def named_state(state: EngineState, replica: int) -> EngineState:
    """The state of one of several engines, with sentences that begin with its number."""
    public = state.public_sentence and f"Replica {replica}: {state.public_sentence}"
    return msgspec.structs.replace(state, detail=f"Replica {replica}: {state.sentence}", public=public, progress=None)


def common_state(states: Sequence[EngineState]) -> EngineState:
    """The state of several engines together: that of the best of them, so "failed" only where all of them failed.

    Its sentences name those that are not ready. A single engine's state stays as it is.
    """
    if len(states) == 1:
        return states[0]
    named = [named_state(state, replica) for replica, state in enumerate(states) if state.phase != "ready"]
    detail = " ".join(state.detail for state in named)
    public = " ".join(state.public for state in named if state.public)
    if len(named) < len(states):
        return EngineState(phase="ready", detail=detail, public=public)
    unready = max(states, key=lambda state: ("failed", "loading", "recovering").index(state.phase))
    return msgspec.structs.replace(unready, detail=detail, public=public, progress=None)
