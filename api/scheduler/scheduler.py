"""Which request's tokens go into which step: a state machine without clock, I/O or knowledge of the pipeline.

Decode and prefill are separate steps and take turns when both are ready, so that a microbatch that is ready to decode
waits for one prefill step at most before each decode step up to its own: never more than there are microbatches.
Requests that failing steps have in common are kept apart (see api/scheduler/suspects.py).
Microbatches decode in the order of their last decode step; a decode step holds every request of its microbatch that
is ready. Prefill takes requests in the order of arrival; one step may hold chunks of several, of any microbatch, and
the chunks of one prompt follow each other without waiting for results. Every stage runs steps in order, so a block or
slot that is given up may be in the very next step again.
"""

from collections import deque
from dataclasses import dataclass
from operator import attrgetter

from actors.errors import ProtocolError
from api.errors import RequestError
from api.messages.engine import AddRequest, Counts, RequestOutput
from api.scheduler.options import SchedulerOptions
from api.scheduler.prefill_pace import PrefillPace
from api.scheduler.sequence import Run, Sequence
from api.scheduler.slots import BlockPool, Slots
from api.scheduler.suspects import Suspects, acquit, group_of
from stages.options import CacheOptions
from stages.step import Admission, Mode, Segment, Step, StepResult, TokenLogprobs

BY_ARRIVAL = attrgetter("arrival")


@dataclass(slots=True)
class StepInFlight:
    """A step whose result is awaited.

    `members` are all runs in it and `runs` those it samples for; `scored` are those whose prompt it scores, each with
    its segment's start. `microbatch` is None for a prefill step.
    """

    step_id: int
    microbatch: int | None
    token_count: int
    members: list[Run]
    runs: list[Run]
    scored: list[tuple[Run, int]]


def check_request(request: AddRequest, cache: CacheOptions) -> None:
    """Raises RequestError, with the numbers, for a request that can never run.

    What passes fits a pool: CacheOptions demands that each can hold a request of `max_model_len` tokens.
    """
    if not request.tokens:
        raise RequestError("The prompt holds no token: give at least one.", "prompt")
    if request.max_tokens < 1:
        raise RequestError(f"max_tokens is {request.max_tokens}: ask for at least one token.", "max_tokens")
    length = len(request.tokens) + request.max_tokens
    if length > cache.max_model_len:
        raise RequestError(
            f"The prompt's {len(request.tokens)} tokens and max_tokens {request.max_tokens} make {length}, over the "
            f"model's length of {cache.max_model_len}: shorten the prompt or lower max_tokens.",
            "max_tokens",
        )


class Scheduler:
    """Requests in, steps out; results in, outputs out. A request is waiting, or it runs in a slot.

    `preemptions` counts how often a request had to give way since the start.
    """

    def __init__(self, options: SchedulerOptions, epoch: int) -> None:
        self._options = options
        self._block_size = options.cache.block_size
        self._sequences: dict[int, Sequence] = {}
        self._arrivals = 0
        self._step_id = 0
        self._last_decode = [0] * options.steps_in_flight
        self._prefill_next = True
        self._suspects = Suspects()
        self.preemptions = 0
        self._pace = PrefillPace(options)
        self.reset(epoch)

    def reset(self, epoch: int) -> None:
        """Starts over on an empty pipeline: every request waits, with its tokens so far, in the order of arrival.

        Results of former epochs are dropped.
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

    def add(self, request: AddRequest) -> None:
        """Queues a request. Raises RequestError for one that can never run, ValueError for an id that is in use."""
        check_request(request, self._options.cache)
        if request.request_id in self._sequences:
            raise ValueError(f"Request {request.request_id} is here already.")
        sequence = Sequence.of(request, self._arrivals)
        self._arrivals += 1
        self._sequences[request.request_id] = sequence
        self._waiting.append(sequence)

    def abort(self, request_id: int) -> None:
        """Ends a request without output; no later step contains it. Unknown ids, and those that ended, are fine."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return
        run = self._runs.get(request_id)
        if run is None:
            self._waiting.remove(sequence)
        else:
            self._leave(run)

    def blame(self, step_id: int | None, error: str) -> list[RequestOutput]:
        """Notes that a step in flight made the pipeline fail; to be told before `reset`.

        A request that was alone in such a step twice, and did not get on in between, ends with the sentence `error`.
        """
        failed = next((step for step in self._in_flight if step.step_id == step_id), None)
        sequences = [] if failed is None else [run.sequence for run in failed.members if run.active]
        if failed is None or not self._suspects.blame(sequences, "prefill" if failed.microbatch is None else "decode"):
            return []
        request_id = sequences[0].request_id
        del self._sequences[request_id]
        return [RequestOutput(request_id=request_id, tokens=[], finish_reason="error", error=error)]

    def fail(self, error: str) -> list[RequestOutput]:
        """Ends every request with this sentence, and forgets every step."""
        failed = [
            RequestOutput(request_id=request_id, tokens=[], finish_reason="error", error=error)
            for request_id in self._sequences
        ]
        self._sequences.clear()
        self.reset(self._epoch)
        return failed

    def counts(self) -> Counts:
        """The books as they stand."""
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

    def requests_in(self, step: Step) -> list[int]:
        """The ids of the requests whose tokens a step holds, in the order of its segments. Ask at once."""
        return [self._by_slot[segment.slot].sequence.request_id for segment in step.segments]

    def next_step(self) -> Step | None:
        """The next step to submit, in this order; None until a result or a request comes in."""
        if len(self._in_flight) >= self._options.steps_in_flight:
            return None
        if self._prefill_next:
            return self._prefill_step() or self._decode_step()
        return self._decode_step() or self._prefill_step()

    def on_result(self, result: StepResult) -> list[RequestOutput]:
        """Takes the tokens of the oldest step in flight. Raises ProtocolError when the result is not that step's."""
        if result.epoch != self._epoch:
            return []
        awaited = self._awaited(result)
        self._in_flight.popleft()
        if awaited.microbatch is not None:
            self._decoding[awaited.microbatch] = False
        self._pace.note(awaited.microbatch is None, awaited.token_count, result.timings)
        scores = {
            run: run.sequence.unscored(start, entries)
            for (run, start), entries in zip(awaited.scored, result.prompt_logprobs, strict=True)
            if run.active
        }
        logprobs = result.logprobs or [None] * len(result.tokens)
        mode: Mode = "prefill" if awaited.microbatch is None else "decode"
        outputs = [
            self._advance(run, mode, token, logprob, scores.pop(run, []))
            for run, token, logprob in zip(awaited.runs, result.tokens, logprobs, strict=True)
            if run.active
        ]
        return outputs + [_scored(run, entries) for run, entries in scores.items() if entries]

    def _awaited(self, result: StepResult) -> StepInFlight:
        awaited = self._in_flight[0] if self._in_flight else None
        if awaited is None or (awaited.step_id, len(awaited.runs)) != (result.step_id, len(result.tokens)):
            raise ProtocolError(
                f"The last stage sent {len(result.tokens)} tokens for step {result.step_id}; awaited was "
                + (f"step {awaited.step_id} with {len(awaited.runs)}." if awaited else "no step.")
            )
        if len(result.logprobs) not in {0, len(result.tokens)} or len(result.prompt_logprobs) != len(awaited.scored):
            raise ProtocolError(
                f"The last stage sent log-probabilities of {len(result.logprobs)} tokens and "
                f"{len(result.prompt_logprobs)} prompts for step {result.step_id}, which has {len(result.tokens)} and "
                f"{len(awaited.scored)}."
            )
        return awaited

    def _advance(
        self, run: Run, mode: Mode, token: int, logprob: TokenLogprobs | None, prompt_logprobs: list[TokenLogprobs]
    ) -> RequestOutput:
        sequence = run.sequence
        acquit(sequence, mode)
        reason = sequence.append(token)
        if reason is None:
            self._decodable[run.microbatch].append(run)
        else:
            del self._sequences[sequence.request_id]
            self._leave(run)
        return RequestOutput(
            request_id=sequence.request_id,
            tokens=[token],
            finish_reason=reason,
            error=None,
            logprobs=[] if logprob is None else [logprob],
            prompt_logprobs=prompt_logprobs,
        )

    def _decode_step(self) -> Step | None:
        ready = [m for m, runs in enumerate(self._decodable) if runs and not self._decoding[m]]
        for microbatch in sorted(ready, key=self._last_decode.__getitem__):
            group = group_of(self._decodable[microbatch][0].sequence)
            runs = [run for run in self._decodable[microbatch] if group_of(run.sequence) == group]
            self._decodable[microbatch] = [
                run for run in self._decodable[microbatch] if group_of(run.sequence) != group
            ]
            # In the order of arrival, so that a run that gives way to another one is not in the step yet.
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
        """What to append to the page table before the next token; None if the run itself had to give way."""
        if run.issued < len(run.blocks) * self._block_size:
            return []
        pool = self._pools[run.pool]
        while not pool.free:
            latest = max((other for other in self._runs.values() if other.pool == run.pool), key=BY_ARRIVAL)
            self._preempt(latest)
            if latest is run:
                return None
        new_blocks = pool.take(1)
        run.blocks += new_blocks
        return new_blocks

    def _prefill_step(self) -> Step | None:
        segments: list[Segment] = []
        admissions: list[Admission] = []
        members: list[Run] = []
        sampled: list[Run] = []
        scored: list[tuple[Run, int]] = []
        most = budget = self._prefill_budget()
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

    def _prefill_budget(self) -> int:
        """Tokens that the next prefill step may hold: as many as may be where it holds up nobody."""
        if any(self._decodable) or any(self._decoding):
            return self._pace.tokens
        return self._options.prefill_chunk

    def _next_to_prefill(self, budget: int, admissions: list[Admission], members: list[Run]) -> Run | None:
        """The run whose chunk comes next: the one that has begun, or else the first that waits, if it finds room.

        None too where it may not share a step with the `members` that are there.
        """
        run = self._prefilling
        if run is not None:
            return run if self._chunk(run.prefill_end - run.issued, budget) else None
        if not self._waiting or not self._chunk(len(self._waiting[0].tokens), budget):
            return None
        if members and group_of(members[0].sequence) != group_of(self._waiting[0]):
            return None
        run = self._prefilling = self._admit(self._waiting[0])
        if run is not None:
            self._waiting.popleft()
            admissions.append(run.admission())
        return run

    def _chunk(self, remaining: int, budget: int) -> int:
        """Tokens of the next chunk: only the last chunk of a prompt may end within a block."""
        return remaining if remaining <= budget else budget - budget % self._block_size

    def _admit(self, sequence: Sequence) -> Run | None:
        length = len(sequence.tokens)
        # Room for the token after the prompt too: a run that had to give way at once would not get on.
        needed = length // self._block_size + 1
        slot = self._slots.take(needed, self._pools)
        if slot is None:
            return None
        pool = self._options.cache.pool_of(slot)
        run = Run(
            sequence=sequence,
            slot=slot,
            microbatch=self._slots.microbatch_of(slot),
            pool=pool,
            blocks=self._pools[pool].take(needed),
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
        """Gives up the run's slot and blocks; its sequence waits again, before all that arrived later."""
        self._leave(run)
        self.preemptions += 1
        place = 0
        while place < len(self._waiting) and self._waiting[place].arrival < run.arrival:
            place += 1
        self._waiting.insert(place, run.sequence)

    def _leave(self, run: Run) -> None:
        run.active = False
        del self._runs[run.sequence.request_id]
        self._pools[run.pool].give_back(run.blocks)
        del self._by_slot[run.slot]
        self._slots.give_back(run.slot)
        self._ended.append(run.slot)
        if self._prefilling is run:
            self._prefilling = None


def _scored(run: Run, entries: list[TokenLogprobs]) -> RequestOutput:
    """The output of a chunk that scores a prompt and samples nothing."""
    return RequestOutput(
        request_id=run.sequence.request_id, tokens=[], finish_reason=None, error=None, prompt_logprobs=entries
    )
