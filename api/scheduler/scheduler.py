"""The choice of which requests' tokens go into which step: a state machine with no clock, no I/O and no sockets.

Decode and prefill are separate steps and take turns when both are ready, so that a microbatch that is ready to decode
waits for one prefill step at most before each decode step up to its own: never more than there are microbatches.
Microbatches decode in the order of their last decode step; a decode step holds every request of its microbatch that
is ready, each with its next token and the drafts of those after it. Prefill takes requests in the order of arrival; one
step may hold chunks of several, of any microbatch, and the chunks of one prompt follow each other without waiting for
results. Every stage runs steps in order, so a block or slot that is given up may be in the very next step again, and a
block that a step fills may be read in the next one.
"""

import itertools
import math
from collections import deque
from operator import attrgetter

import msgspec

from actors.errors import ProtocolError
from api.errors import EngineError
from api.messages.engine import AddRequest, Counts, RequestOutput, failed_output
from api.scheduler.decode_queue import DecodeQueue
from api.scheduler.drafts import DraftPolicy
from api.scheduler.kv_cache import KVCache
from api.scheduler.options import SchedulerOptions
from api.scheduler.prefill_budget import PrefillBudget
from api.scheduler.prefill_queue import PrefillQueue
from api.scheduler.quarantine import Quarantine
from api.scheduler.sequence import Run, Sequence, Snapshot, Tallies, check_request
from api.scheduler.step_in_flight import Answer, StepInFlight
from stages.step import (
    GRAMMAR_FAILED,
    NO_TOKEN,
    Admission,
    BlockLoad,
    Segment,
    ShrunkSlot,
    Step,
    StepResult,
    TokenLogprobs,
)
from weights.errors import GalaxylineError

GRAMMAR_SENTENCE = "The grammar could not be followed any further; the record of the last stage has the reason."


class Scheduler:
    """Turns requests into steps, and the results of steps into outputs. A request waits, or it runs in a slot."""

    def __init__(self, options: SchedulerOptions, epoch: int) -> None:
        self._options = options
        self._block_size = options.cache.block_size
        self._sequences: dict[int, Sequence] = {}
        self._arrivals = 0
        self._step_id = 0
        self._last_decode = [0] * options.steps_in_flight
        self._prefill_next = True
        self._quarantine = Quarantine()
        self.tallies = Tallies()
        self.drafts = DraftPolicy(options.num_speculative_tokens, always=options.schedule.always_draft)
        self._budget = PrefillBudget(options)
        self.cache = KVCache(options)
        self._in_flight: deque[StepInFlight] = deque()
        self.reset(epoch)

    def reset(self, epoch: int) -> None:
        """Begins an epoch on an empty pipeline: every request waits, with its tokens so far, in the order of arrival.

        Results of former epochs will be dropped. Blocks whose steps had come back are found again.
        """
        self._epoch = epoch
        self._queue = PrefillQueue(self.cache, self._quarantine, self._block_size, self._sequences.values())
        self._decoding = DecodeQueue(self._quarantine, self._last_decode)
        # Not all stages may have had the steps that told them.
        self.cache.forgotten[:0] = [key for step in self._in_flight for key in step.forgotten]
        self._in_flight.clear()
        self._ended: list[int] = []
        self._shrunk: list[ShrunkSlot] = []
        self.drafts.begin_epoch()
        self.cache.begin_epoch()

    def add_request(self, request: AddRequest) -> None:
        """Queues a request. Raises RequestError for one that can never run, ValueError for an id that is in use."""
        check_request(request, self._options.cache)
        if request.request_id in self._sequences:
            raise ValueError(f"Request {request.request_id} is here already.")
        sequence = Sequence.of(request, self._arrivals)
        self._arrivals += 1
        self._sequences[request.request_id] = sequence
        self._queue.waiting.append(sequence)

    def abort(self, request_id: int) -> None:
        """Ends a request without output; no later step contains it. An id that is unknown or has ended is fine."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return
        self._end(sequence)
        run = self.cache.runs.get(request_id)
        if run is None:
            self._queue.waiting.remove(sequence)
            return
        if run.issued < run.prefill_end:
            self.cache.forget_written(run)
        self._leave(run)

    def on_failure(self, step_id: int | None, error: GalaxylineError) -> list[RequestOutput]:
        """Takes note of the step in flight that made the pipeline fail; call it before `reset`.

        A request that was alone in such a step twice, and made no progress in between, ends with `error`.
        """
        failed = next((step for step in self._in_flight if step.step_id == step_id), None)
        if failed is None:
            return []
        if failed.mode == "load":
            # Whatever it is that cannot be loaded, it is not worth another failure.
            self.cache.give_up_loads(failed.loading)
            return []
        culprit = self._quarantine.record_failure([run.request_id for run in failed.members if run.active], failed.mode)
        if culprit is None:
            return []
        self._end(self._sequences[culprit])
        return [failed_output(culprit, error)]

    def fail(self, error: GalaxylineError) -> list[RequestOutput]:
        """Ends every request with `error`, and forgets every step."""
        failed = [failed_output(request_id, error) for request_id in self._sequences]
        self._sequences.clear()
        self._quarantine = Quarantine()
        self.reset(self._epoch)
        return failed

    def counts(self) -> Counts:
        """The numbers of requests, steps, slots and blocks as they are now."""
        return self.cache.counts(waiting=len(self._queue.waiting), steps_in_flight=len(self._in_flight))

    def snapshot(self) -> Snapshot:
        """The requests and blocks as they are now."""
        return self.cache.snapshot(waiting=list(self._queue.waiting), ready=self._decoding.ready)

    def requests_in(self, step: Step) -> list[int]:
        """The ids of the requests in the step that `next_step` gave last, in the order of its segments."""
        return [self.cache.run_in(segment.slot).sequence.request_id for segment in step.segments]

    def next_step(self) -> Step | None:
        """Returns the next step; steps are submitted in this order. None until a result or a request comes in."""
        if len(self._in_flight) >= self._options.steps_in_flight:
            return None
        if step := self._load_step():
            return step
        if self._prefill_next:
            return self._prefill_step() or self._load_step() or self._decode_step()
        return self._decode_step() or self._prefill_step() or self._load_step()

    def on_result(self, result: StepResult) -> list[RequestOutput]:
        """Takes in the result of the oldest step in flight. Raises ProtocolError when it is another step's result."""
        if result.epoch != self._epoch:
            return []
        awaited = self._awaited(result)
        if awaited.microbatch is not None:
            self._decoding.step_returned(awaited.microbatch)
            self.drafts.step_returned(awaited, result, self.cache.microbatches_in_use)
        self._budget.record_step(awaited.mode, awaited.token_count, awaited.pairs, result.timings)
        self.cache.step_returned(awaited, result)
        self._queue.have_loaded(awaited.loading)
        scores = {
            run: run.sequence.unscored(start, entries)
            for (run, start), entries in zip(awaited.scored, result.prompt_logprobs, strict=True)
            if run.active
        }
        outputs = [
            output
            for run, answer in zip(awaited.sampled, awaited.answers(result), strict=True)
            if run.active
            for output in self._advance(awaited, run, answer, scores.pop(run, []))
        ]
        return outputs + [self._scored(result.step_id, run, entries) for run, entries in scores.items() if entries]

    def _awaited(self, result: StepResult) -> StepInFlight:
        if not self._in_flight:
            raise ProtocolError(f"The last stage sent a result of step {result.step_id}; awaited was none.")
        self._in_flight[0].check(result)
        return self._in_flight.popleft()

    def _advance(
        self, step: StepInFlight, run: Run, answer: Answer, scores: list[TokenLogprobs]
    ) -> list[RequestOutput]:
        """The outputs of one run: its tokens, and behind them the error that it ends with, if any."""
        sequence = run.sequence
        self._quarantine.release(sequence.request_id, step.mode)
        # The token after a prompt that is only scored is dropped: it may be one beyond the model's length.
        only_scores = sequence.is_whole
        if _has_nan(scores):
            return [self._end_without(NO_TOKEN, step.step_id, run)]
        tokens = [] if only_scores else list(itertools.takewhile(lambda token: token >= 0, answer.tokens))
        reason, count = ("length", 0) if only_scores else sequence.extend(tokens)
        output = RequestOutput(
            request_id=sequence.request_id,
            tokens=tokens[:count],
            finish_reason=reason,
            error=None,
            logprobs=[entry for entry in answer.logprobs[:count] if entry is not None],
            prompt_logprobs=scores,
            cached_tokens=sequence.cached_tokens,
        )
        if reason is not None:
            self._end(sequence)
            self._leave(run)
            return [output]
        outputs = [output] if tokens or scores else []
        if len(tokens) < len(answer.tokens):
            return [*outputs, self._end_without(answer.tokens[-1], step.step_id, run)]
        self._go_on(run, answer)
        return outputs

    def _go_on(self, run: Run, answer: Answer) -> None:
        """Lets a run wait for its next tokens, behind those that it has got."""
        if run.drafting.is_possible:
            run.issued += len(answer.tokens) - 1
            self.drafts.take(run, answer.drafts)
            if self.cache.shrink(run):
                self._shrunk.append(ShrunkSlot(slot=run.slot, blocks=len(run.blocks)))
        self._decoding.put(run)

    def _scored(self, step_id: int, run: Run, entries: list[TokenLogprobs]) -> RequestOutput:
        """The output of a chunk that scores a prompt and samples nothing."""
        if _has_nan(entries):
            return self._end_without(NO_TOKEN, step_id, run)
        return RequestOutput(
            request_id=run.request_id, tokens=[], finish_reason=None, error=None, prompt_logprobs=entries
        )

    def _end_without(self, token: int, step_id: int, run: Run) -> RequestOutput:
        """Ends a request for which no token could be drawn, or that has a log-probability which is not a number."""
        if token == GRAMMAR_FAILED:
            self.tallies.grammar_failures += 1
            sentence = GRAMMAR_SENTENCE
        else:
            # Nothing that follows would be right.
            self.tallies.non_finite_logits += 1
            self.cache.forget_content(run)
            sentence = f"Stage {self._options.stages - 1} got logits that are not numbers at step {step_id}."
        self._end(run.sequence)
        self._leave(run)
        return failed_output(run.request_id, EngineError.for_clients(sentence))

    def _decode_step(self) -> Step | None:
        for microbatch, runs in self._decoding.take():
            # In the order of arrival, so that a run that is preempted for another one is not in the step yet.
            blocks = [(run, added) for run in runs if run.active and (added := self._blocks_to_decode(run)) is not None]
            if blocks:
                step = StepInFlight(self._step_id, "decode", microbatch, members=[run for run, _ in blocks])
                self._decoding.step_issued(microbatch, step.step_id)
                return self._issue(step, self._decode_segments(step, blocks))
        return None

    def _decode_segments(self, step: StepInFlight, blocks: list[tuple[Run, list[int]]]) -> list[Segment]:
        """The segments of runs that have got blocks for their next tokens; for drafts they take what is left."""
        step.sampled = step.members
        step.asks = self.drafts.in_step(step.members)
        ratio = self.drafts.ratio(len(step.members), self.cache.microbatches_in_use) if step.asks else None
        segments: list[Segment] = []
        for run, new_blocks in blocks:
            drafts = run.drafting.drafts if step.asks else []
            more = self.cache.grow(run, len(drafts))
            if more is None:
                drafts = []
            wanted = self.drafts.wanted(run, len(drafts), ratio) if step.asks else 0
            segment = self._segment(step, run, 1, new_blocks + (more or []), wanted)
            segments.append(msgspec.structs.replace(segment, tokens=segment.tokens + drafts) if drafts else segment)
            step.drafts.append(len(drafts))
            step.token_count += 1 + len(drafts)
        # The draft layer runs only where it is wanted.
        step.asks = any(segment.drafts for segment in segments)
        return segments

    def _blocks_to_decode(self, run: Run) -> list[int] | None:
        """The blocks to add for the run's next token, at most one; None if the run itself was preempted."""
        while (added := self.cache.grow(run)) is None:
            latest = max(
                (other for other in self.cache.runs.values() if other.pool == run.pool), key=attrgetter("arrival")
            )
            self._preempt(latest)
            if latest is run:
                return None
        return added

    def _load_step(self) -> Step | None:
        """The step that brings back what admitted requests begin with; None where there is none to bring."""
        loading = self._queue.next_loading()
        if not loading:
            return None
        loads = [load for run in loading for load in run.loads]
        return self._issue(StepInFlight(self._step_id, "load", loading=loading), [], loads=loads)

    def _prefill_step(self) -> Step | None:
        segments: list[Segment] = []
        admissions: list[Admission] = []
        step = StepInFlight(self._step_id, "prefill")
        run = self._queue.next_run(self._block_size, step)
        if run is None:
            return None
        budget = self._budget.begin_step(self.cache.decoding, self._queue.count, self._queue.token_count)
        while run is not None:
            count = budget.take(run.issued, run.prefill_end - run.issued)
            if not count:
                break
            step.members.append(run)
            if run.sequence.sampling.prompt_logprobs is not None:
                step.scored.append((run, run.issued))
            new_blocks: list[int] = []
            if not run.has_begun:
                admissions.append(self._begin(run))
                new_blocks = run.blocks[run.cached :]
            wanted = self.drafts.in_prompt(run, count)
            segments.append(self._segment(step, run, count, new_blocks, wanted))
            if run.issued < run.prefill_end:
                break
            step.sampled.append(run)
            self._queue.prompt_done()
            run = self._queue.next_run(budget.tokens, step)
        step.token_count, step.pairs = budget.taken, budget.pairs
        return self._issue(step, segments, admissions)

    def _begin(self, run: Run) -> Admission:
        """The admission of a run to the stages, once what is cached of it is certain."""
        run.has_begun = True
        sequence, tallies = run.sequence, self.tallies
        self.drafts.begin(run, max(len(self.cache.runs) // self._options.steps_in_flight, 1))
        sequence.stays += 1
        if sequence.stays == 1:
            sequence.cached_tokens = run.issued
            tallies.prefix_queries += run.prefill_end if self._options.schedule.enable_prefix_caching else 0
            tallies.prefix_hits += run.issued
        else:
            tallies.recomputed_tokens += run.prefill_end - run.issued
        return run.admission()

    def _segment(self, step: StepInFlight, run: Run, count: int, new_blocks: list[int], wanted: int) -> Segment:
        start = run.issued
        run.issued += count
        fills = self.cache.filled(run)
        step.filled += fills
        tokens = run.sequence.tokens
        return Segment(
            slot=run.slot,
            start=start,
            tokens=tokens[start : run.issued],
            new_blocks=new_blocks,
            sample=run.issued == len(tokens),
            keys=[block.key for block in fills],
            drafts=wanted,
            next_token=tokens[run.issued] if run.issued < len(tokens) else NO_TOKEN,
        )

    def _issue(
        self,
        in_flight: StepInFlight,
        segments: list[Segment],
        admissions: list[Admission] | None = None,
        loads: list[BlockLoad] | None = None,
    ) -> Step:
        in_flight.forgotten = self.cache.take_forgotten()
        step = Step(
            epoch=self._epoch,
            step_id=self._step_id,
            mode=in_flight.mode,
            segments=segments,
            admissions=admissions or [],
            ended=self._ended,
            loads=loads or [],
            forgotten=in_flight.forgotten,
            shrunk=self._shrunk,
        )
        self.cache.publish(in_flight.filled)
        self._ended = []
        self._shrunk = []
        self._step_id += 1
        self._prefill_next = in_flight.mode == "decode"
        self._in_flight.append(in_flight)
        return step

    def _preempt(self, run: Run) -> None:
        """Frees the run's slot and blocks; its sequence waits again, before all that arrived later."""
        self._leave(run)
        self.tallies.preemptions += 1
        self._queue.put_back(run.sequence)

    def _end(self, sequence: Sequence) -> None:
        del self._sequences[sequence.request_id]
        self._quarantine.forget(sequence.request_id)

    def _leave(self, run: Run) -> None:
        run.active = False
        self.cache.release(run)
        self._queue.leave(run)
        if run.has_begun:
            self._ended.append(run.slot)


def _has_nan(entries: list[TokenLogprobs]) -> bool:
    return any(math.isnan(entry.logprob) for entry in entries)
