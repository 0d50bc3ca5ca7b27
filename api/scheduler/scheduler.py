"""The choice of which requests' tokens go into which step: a state machine with no clock, no I/O and no sockets.

Decode and prefill are separate steps and take turns when both are ready, so that a microbatch that is ready to decode
waits for one prefill step at most before each decode step up to its own: never more than there are microbatches.
Microbatches decode in the order of their last decode step; a decode step holds every request of its microbatch that
is ready. Prefill takes requests in the order of arrival; one step may hold chunks of several, of any microbatch, and
the chunks of one prompt follow each other without waiting for results. Every stage runs steps in order, so a block or
slot that is given up may be in the very next step again. Requests whose steps make the pipeline fail share steps only
as far as the quarantine allows (api/scheduler/quarantine.py).
"""

import math
from collections import deque
from operator import attrgetter

from actors.errors import ProtocolError
from api.errors import EngineError
from api.messages.engine import AddRequest, Counts, FinishReason, RequestOutput, failed_output
from api.scheduler.options import SchedulerOptions
from api.scheduler.prefill_budget import PrefillBudget
from api.scheduler.quarantine import Quarantine
from api.scheduler.sequence import Run, Sequence, Snapshot, StepInFlight, Tallies, check_request
from api.scheduler.slots import BlockPool, Slots
from stages.step import GRAMMAR_FAILED, NO_TOKEN, Admission, Mode, Segment, Step, StepResult, TokenLogprobs
from weights.errors import GalaxylineError
from weights.sizes import ceil_div

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
        self.reset(epoch)

    def reset(self, epoch: int) -> None:
        """Begins an epoch on an empty pipeline: every request waits, with its tokens so far, in the order of arrival.

        Results of former epochs will be dropped.
        """
        microbatches = self._options.steps_in_flight
        cache = self._options.cache
        self._epoch = epoch
        self._waiting = deque(self._sequences.values())
        self._runs: dict[int, Run] = {}
        self._by_slot: dict[int, Run] = {}
        self._prefilling: Run | None = None
        self._decodable: list[list[Run]] = [[] for _ in range(microbatches)]
        self._decoding = [False] * microbatches
        self._in_flight: deque[StepInFlight] = deque()
        self._ended: list[int] = []
        self._pools = [BlockPool(cache.blocks) for _ in range(cache.pools)]
        self._slots = Slots(self._options)

    def add_request(self, request: AddRequest) -> None:
        """Queues a request. Raises RequestError for one that can never run, ValueError for an id that is in use."""
        check_request(request, self._options.cache)
        if request.request_id in self._sequences:
            raise ValueError(f"Request {request.request_id} is here already.")
        sequence = Sequence.of(request, self._arrivals)
        self._arrivals += 1
        self._sequences[request.request_id] = sequence
        self._waiting.append(sequence)

    def abort(self, request_id: int) -> None:
        """Ends a request without output; no later step contains it. An id that is unknown or has ended is fine."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return
        self._end(sequence)
        run = self._runs.get(request_id)
        if run is None:
            self._waiting.remove(sequence)
        else:
            self._leave(run)

    def on_failure(self, step_id: int | None, error: GalaxylineError) -> list[RequestOutput]:
        """Takes note of the step in flight that made the pipeline fail; call it before `reset`.

        A request that was alone in such a step twice, and made no progress in between, ends with `error`.
        """
        failed = next((step for step in self._in_flight if step.step_id == step_id), None)
        if failed is None:
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
            waiting=len(self._waiting),
            running=len(self._runs),
            steps_in_flight=len(self._in_flight),
            free_slots=self._slots.free,
            slots=cache.slots,
            free_blocks=sum(pool.free for pool in self._pools),
            blocks=cache.blocks * cache.pools,
        )

    def snapshot(self) -> Snapshot:
        """The requests and blocks as they are now."""
        return Snapshot(
            waiting=list(self._waiting),
            running=list(self._runs.values()),
            ready=[
                microbatch
                for microbatch, runs in enumerate(self._decodable)
                if any(run.active for run in runs) and not self._decoding[microbatch]
            ],
            free_blocks=[pool.free_ids for pool in self._pools],
        )

    def requests_in(self, step: Step) -> list[int]:
        """The ids of the requests in the step that `next_step` gave last, in the order of its segments."""
        return [self._by_slot[segment.slot].sequence.request_id for segment in step.segments]

    def next_step(self) -> Step | None:
        """Returns the next step; steps are submitted in this order. None until a result or a request comes in."""
        if len(self._in_flight) >= self._options.steps_in_flight:
            return None
        if self._prefill_next:
            return self._prefill_step() or self._decode_step()
        return self._decode_step() or self._prefill_step()

    def on_result(self, result: StepResult) -> list[RequestOutput]:
        """Takes in the result of the oldest step in flight. Raises ProtocolError when it is another step's result."""
        if result.epoch != self._epoch:
            return []
        awaited = self._awaited(result)
        self._in_flight.popleft()
        if awaited.microbatch is not None:
            self._decoding[awaited.microbatch] = False
        self._budget.record_step(awaited.mode, awaited.token_count, result.timings)
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
            for run in runs:
                if run.active and (new_blocks := self._blocks_to_decode(run)) is not None:
                    segments.append(self._segment(run, 1, new_blocks))
                    decoded.append(run)
            if segments:
                self._decoding[microbatch] = True
                step = self._issue(
                    "decode", segments, [], StepInFlight(self._step_id, microbatch, len(segments), decoded, decoded, [])
                )
                self._last_decode[microbatch] = step.step_id
                return step
        return None

    def _blocks_to_decode(self, run: Run) -> list[int] | None:
        """The blocks to add for the run's next token, at most one; None if the run itself was preempted."""
        if run.issued < len(run.blocks) * self._block_size:
            return []
        pool = self._pools[run.pool]
        while not pool.free:
            latest = max((other for other in self._runs.values() if other.pool == run.pool), key=BY_ARRIVAL)
            self._preempt(latest)
            if latest is run:
                return None
        new_blocks = pool.take_blocks(1)
        run.blocks += new_blocks
        return new_blocks

    def _prefill_step(self) -> Step | None:
        segments: list[Segment] = []
        admissions: list[Admission] = []
        members: list[Run] = []
        sampled: list[Run] = []
        scored: list[tuple[Run, int]] = []
        most = budget = self._prefill_tokens_max()
        while run := self._next_to_prefill(budget, admissions, members):
            members.append(run)
            count = self._chunk(run.prefill_end - run.issued, budget)
            if run.sequence.sampling.prompt_logprobs is not None:
                scored.append((run, run.issued))
            segments.append(self._segment(run, count, [] if run.issued else run.blocks.copy()))
            budget -= count
            if run.issued == run.prefill_end:
                sampled.append(run)
                self._prefilling = None
        if not segments:
            return None
        in_flight = StepInFlight(self._step_id, None, most - budget, members, sampled, scored)
        return self._issue("prefill", segments, admissions, in_flight)

    def _prefill_tokens_max(self) -> int:
        """The most tokens that the next prefill step may hold: a whole chunk where no request waits to decode."""
        if any(self._decodable) or any(self._decoding):
            return self._budget.tokens
        return self._options.prefill_chunk

    def _next_to_prefill(self, budget: int, admissions: list[Admission], members: list[Run]) -> Run | None:
        """The run whose chunk comes next: the one that has begun, or else the first that waits, if there is room.

        None also where that one may not share a step with `members`.
        """
        run = self._prefilling
        if run is not None:
            return run if self._chunk(run.prefill_end - run.issued, budget) else None
        if not self._waiting or not self._chunk(len(self._waiting[0].tokens), budget):
            return None
        group_of = self._quarantine.group_of
        if members and group_of(members[0].request_id) != group_of(self._waiting[0].request_id):
            return None
        run = self._prefilling = self._admit(self._waiting[0])
        if run is not None:
            self._waiting.popleft()
            admissions.append(run.admission())
        return run

    def _chunk(self, remaining: int, budget: int) -> int:
        """The number of tokens in the next chunk: only the last chunk of a prompt may end within a block."""
        return remaining if remaining <= budget else budget - budget % self._block_size

    def _admit(self, sequence: Sequence) -> Run | None:
        length = len(sequence.tokens)
        # Room for the token after the prompt too: a run that is preempted at once would make no progress. A prompt
        # that is only scored has none, and may fill all the blocks that a request can have.
        needed = ceil_div(min(length + 1, sequence.end), self._block_size)
        slot = self._slots.take_slot(needed, self._pools)
        if slot is None:
            return None
        pool = self._options.cache.pool_of(slot)
        run = Run(
            sequence=sequence,
            slot=slot,
            microbatch=self._slots.microbatch_of(slot),
            pool=pool,
            blocks=self._pools[pool].take_blocks(needed),
            prefill_end=length,
        )
        self._runs[sequence.request_id] = run
        self._by_slot[slot] = run
        return run

    def _segment(self, run: Run, count: int, new_blocks: list[int]) -> Segment:
        start = run.issued
        run.issued += count
        tokens = run.sequence.tokens
        return Segment(
            slot=run.slot,
            start=start,
            tokens=tokens[start : run.issued],
            new_blocks=new_blocks,
            sample=run.issued == len(tokens),
        )

    def _issue(self, mode: Mode, segments: list[Segment], admissions: list[Admission], in_flight: StepInFlight) -> Step:
        step = Step(
            epoch=self._epoch,
            step_id=self._step_id,
            mode=mode,
            segments=segments,
            admissions=admissions,
            ended=self._ended,
        )
        self._ended = []
        self._step_id += 1
        self._prefill_next = mode == "decode"
        self._in_flight.append(in_flight)
        return step

    def _preempt(self, run: Run) -> None:
        """Frees the run's slot and blocks; its sequence waits again, before all that arrived later."""
        self._leave(run)
        self.tallies.preemptions += 1
        position = 0
        while position < len(self._waiting) and self._waiting[position].arrival < run.arrival:
            position += 1
        self._waiting.insert(position, run.sequence)

    def _end(self, sequence: Sequence) -> None:
        del self._sequences[sequence.request_id]
        self._quarantine.forget(sequence.request_id)

    def _leave(self, run: Run) -> None:
        run.active = False
        del self._runs[run.request_id]
        self._pools[run.pool].free_blocks(run.blocks)
        del self._by_slot[run.slot]
        self._slots.free_slot(run.slot)
        self._ended.append(run.slot)
        if self._prefilling is run:
            self._prefilling = None


def _has_nan(entries: list[TokenLogprobs]) -> bool:
    return any(math.isnan(entry.logprob) for entry in entries)
