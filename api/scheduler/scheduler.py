"""The choice of which requests' tokens go into which step: a state machine with no clock, no I/O and no sockets.

Decode and prefill are separate steps and take turns when both are ready, so that a microbatch that is ready to decode
waits for one prefill step at most before each decode step up to its own: never more than there are microbatches.
Microbatches decode in the order of their last decode step; a decode step holds every request of its microbatch that
is ready. Prefill takes requests in the order of arrival; one step may hold chunks of several, of any microbatch, and
the chunks of one prompt follow each other without waiting for results. Every stage runs steps in order, so a block or
slot that is given up may be in the very next step again, and a block that a step fills may be read in the next one.
Requests whose steps make the pipeline fail share steps only as far as the quarantine allows
(api/scheduler/quarantine.py).
"""

import math
from collections import deque
from operator import attrgetter

from actors.errors import ProtocolError
from api.errors import EngineError
from api.messages.engine import AddRequest, Counts, FinishReason, RequestOutput, failed_output
from api.scheduler.kv_cache import KVCache
from api.scheduler.options import SchedulerOptions
from api.scheduler.prefill_budget import PrefillBudget
from api.scheduler.prefill_queue import PrefillQueue
from api.scheduler.quarantine import Quarantine
from api.scheduler.sequence import Filled, Run, Sequence, Snapshot, StepInFlight, Tallies, check_request
from stages.step import GRAMMAR_FAILED, NO_TOKEN, Admission, BlockLoad, Segment, Step, StepResult, TokenLogprobs
from weights.errors import GalaxylineError

BY_ARRIVAL = attrgetter("arrival")

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
        self._budget = PrefillBudget(options)
        self.cache = KVCache(options)
        self._in_flight: deque[StepInFlight] = deque()
        self.reset(epoch)

    def reset(self, epoch: int) -> None:
        """Begins an epoch on an empty pipeline: every request waits, with its tokens so far, in the order of arrival.

        Results of former epochs will be dropped. Blocks whose steps had come back are found again.
        """
        microbatches = self._options.steps_in_flight
        self._epoch = epoch
        self._queue = PrefillQueue(self.cache, self._quarantine, self._block_size, self._sequences.values())
        self._decodable: list[list[Run]] = [[] for _ in range(microbatches)]
        self._decoding = [False] * microbatches
        # Not all stages may have had the steps that told them.
        self.cache.forgotten[:0] = [key for step in self._in_flight for key in step.forgotten]
        self._in_flight.clear()
        self._ended: list[int] = []
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
        request_ids = [run.request_id for run in failed.members if run.active]
        culprit = self._quarantine.record_failure(request_ids, failed.mode)
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
        cache = self._options.cache
        return Counts(
            waiting=len(self._queue.waiting),
            running=len(self.cache.runs),
            steps_in_flight=len(self._in_flight),
            free_slots=self.cache.free_slots,
            slots=cache.slots,
            free_blocks=self.cache.free_blocks,
            blocks=cache.blocks * cache.pools,
        )

    def snapshot(self) -> Snapshot:
        """The requests and blocks as they are now."""
        return Snapshot(
            waiting=list(self._queue.waiting),
            running=list(self.cache.runs.values()),
            ready=[
                microbatch
                for microbatch, runs in enumerate(self._decodable)
                if any(run.active for run in runs) and not self._decoding[microbatch]
            ],
            free_blocks=self.cache.free_ids,
            holders=self.cache.holders,
        )

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
        self._in_flight.popleft()
        if awaited.microbatch is not None:
            self._decoding[awaited.microbatch] = False
        self._budget.record_step(awaited.mode, awaited.token_count, result.timings)
        self.cache.step_returned(awaited, result)
        self._queue.have_loaded(awaited.loading)
        scores = {
            run: run.sequence.unscored(start, entries)
            for (run, start), entries in zip(awaited.scored, result.prompt_logprobs, strict=True)
            if run.active
        }
        logprobs = result.logprobs or [None] * len(result.tokens)
        outputs = [
            self._advance(awaited, run, token, logprob, scores.pop(run, []))
            for run, token, logprob in zip(awaited.sampled, result.tokens, logprobs, strict=True)
            if run.active
        ]
        return outputs + [self._scored(result.step_id, run, entries) for run, entries in scores.items() if entries]

    def _awaited(self, result: StepResult) -> StepInFlight:
        awaited = self._in_flight[0] if self._in_flight else None
        if awaited is None or (awaited.step_id, len(awaited.sampled)) != (result.step_id, len(result.tokens)):
            raise ProtocolError(
                f"The last stage sent {len(result.tokens)} tokens for step {result.step_id}; awaited was "
                + (f"step {awaited.step_id} with {len(awaited.sampled)}." if awaited else "none.")
            )
        if len(result.logprobs) not in {0, len(result.tokens)} or len(result.prompt_logprobs) != len(awaited.scored):
            raise ProtocolError(
                f"The last stage sent log-probabilities of {len(result.logprobs)} tokens and "
                f"{len(result.prompt_logprobs)} prompts for step {result.step_id}, which has {len(result.tokens)} and "
                f"{len(awaited.scored)}."
            )
        return awaited

    def _advance(
        self, step: StepInFlight, run: Run, token: int, logprob: TokenLogprobs | None, scores: list[TokenLogprobs]
    ) -> RequestOutput:
        sequence = run.sequence
        self._quarantine.release(sequence.request_id, step.mode)
        # The token after a prompt that is only scored is dropped: it may be one beyond the model's length.
        only_scores = sequence.is_whole
        if _has_nan(scores) or (token == NO_TOKEN and not only_scores):
            return self._end_for_nan(step.step_id, run)
        if token == GRAMMAR_FAILED and not only_scores:
            return self._end_for_grammar(run)
        reason: FinishReason | None = "length" if only_scores else sequence.append(token)
        if reason is None:
            self._decodable[run.microbatch].append(run)
        else:
            self._end(sequence)
            self._leave(run)
        return RequestOutput(
            request_id=sequence.request_id,
            tokens=[] if only_scores else [token],
            finish_reason=reason,
            error=None,
            logprobs=[] if only_scores or logprob is None else [logprob],
            prompt_logprobs=scores,
            cached_tokens=sequence.cached_tokens,
        )

    def _scored(self, step_id: int, run: Run, entries: list[TokenLogprobs]) -> RequestOutput:
        """The output of a chunk that scores a prompt and samples nothing."""
        if _has_nan(entries):
            return self._end_for_nan(step_id, run)
        return RequestOutput(
            request_id=run.request_id, tokens=[], finish_reason=None, error=None, prompt_logprobs=entries
        )

    def _end_for_nan(self, step_id: int, run: Run) -> RequestOutput:
        """Ends a request whose token, or log-probability, is not a number: nothing that follows would be right."""
        self.tallies.non_finite_logits += 1
        self.cache.forget_content(run)
        return self._end_with(
            run, f"Stage {self._options.stages - 1} got logits that are not numbers at step {step_id}."
        )

    def _end_for_grammar(self, run: Run) -> RequestOutput:
        self.tallies.grammar_failures += 1
        return self._end_with(run, GRAMMAR_SENTENCE)

    def _end_with(self, run: Run, sentence: str) -> RequestOutput:
        self._end(run.sequence)
        self._leave(run)
        return failed_output(run.request_id, EngineError.for_clients(sentence))

    def _decode_step(self) -> Step | None:
        ready = [m for m, runs in enumerate(self._decodable) if runs and not self._decoding[m]]
        for microbatch in sorted(ready, key=self._last_decode.__getitem__):
            runs, self._decodable[microbatch] = self._quarantine.split(self._decodable[microbatch])
            # In the order of arrival, so that a run that is preempted for another one is not in the step yet.
            runs.sort(key=BY_ARRIVAL)
            segments: list[Segment] = []
            decoded: list[Run] = []
            filled: list[Filled] = []
            for run in runs:
                if run.active and (new_blocks := self._blocks_to_decode(run)) is not None:
                    segments.append(self._segment(run, 1, new_blocks, filled))
                    decoded.append(run)
            if segments:
                self._decoding[microbatch] = True
                self._last_decode[microbatch] = self._step_id
                in_flight = StepInFlight(self._step_id, "decode", microbatch, len(segments), decoded, decoded)
                in_flight.filled = filled
                return self._issue(in_flight, segments)
        return None

    def _blocks_to_decode(self, run: Run) -> list[int] | None:
        """The blocks to add for the run's next token, at most one; None if the run itself was preempted."""
        while (added := self.cache.grow(run)) is None:
            latest = max((other for other in self.cache.runs.values() if other.pool == run.pool), key=BY_ARRIVAL)
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
        most = budget = self._prefill_tokens_max()
        while run := self._queue.next_run(budget, step):
            count = self._chunk(run.prefill_end - run.issued, budget)
            if not count:
                break
            step.members.append(run)
            count = self._chunk(run.prefill_end - run.issued, budget)
            if run.sequence.sampling.prompt_logprobs is not None:
                step.scored.append((run, run.issued))
            new_blocks: list[int] = []
            if not run.has_begun:
                admissions.append(self._begin(run))
                new_blocks = run.blocks[run.cached :]
            segments.append(self._segment(run, count, new_blocks, step.filled))
            budget -= count
            if run.issued == run.prefill_end:
                step.sampled.append(run)
                self._queue.prompt_done()
        if not segments:
            return None
        step.token_count = most - budget
        return self._issue(step, segments, admissions)

    def _begin(self, run: Run) -> Admission:
        """The admission of a run to the stages, once what is cached of it is certain."""
        run.has_begun = True
        sequence, tallies = run.sequence, self.tallies
        sequence.stays += 1
        if sequence.stays == 1:
            sequence.cached_tokens = run.issued
            tallies.prefix_queries += run.prefill_end if self._options.schedule.enable_prefix_caching else 0
            tallies.prefix_hits += run.issued
        else:
            tallies.recomputed_tokens += run.prefill_end - run.issued
        return run.admission()

    def _prefill_tokens_max(self) -> int:
        """The most tokens that the next prefill step may hold: a whole chunk where no request waits to decode."""
        if any(self._decodable) or any(self._decoding):
            return self._budget.tokens
        return self._options.prefill_chunk

    def _chunk(self, remaining: int, budget: int) -> int:
        """The number of tokens in the next chunk: only the last chunk of a prompt may end within a block."""
        return remaining if remaining <= budget else budget - budget % self._block_size

    def _segment(self, run: Run, count: int, new_blocks: list[int], filled: list[Filled]) -> Segment:
        start = run.issued
        run.issued += count
        fills = self.cache.filled(run, start)
        filled += fills
        tokens = run.sequence.tokens
        return Segment(
            slot=run.slot,
            start=start,
            tokens=tokens[start : run.issued],
            new_blocks=new_blocks,
            sample=run.issued == len(tokens),
            keys=[block.key for block in fills],
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
        )
        self.cache.publish(in_flight.filled)
        self._ended = []
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
