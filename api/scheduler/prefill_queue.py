"""The requests whose prompt is still to be computed: those that wait, and those that have a slot already."""

from collections import deque
from collections.abc import Iterable

from api.scheduler.kv_cache import KVCache
from api.scheduler.quarantine import Quarantine
from api.scheduler.sequence import Run, Sequence
from api.scheduler.step_in_flight import StepInFlight

LOADS_MAX = 512
"""Blocks from which on a step loads for no further request: at R1's size 150 MB for a stage of 16 layers."""


class PrefillQueue:
    """Admits requests in the order of arrival. One prompt at a time is in the making.

    A request that finds blocks which have to be loaded first gets its slot at once, and its turn when they have come.
    """

    def __init__(self, cache: KVCache, quarantine: Quarantine, block_size: int, sequences: Iterable[Sequence]) -> None:
        """`sequences` wait from the beginning, in the order of arrival."""
        self._cache = cache
        self._block_size = block_size
        self._quarantine = quarantine
        self.waiting = deque(sequences)
        self._to_load: list[Run] = []
        self._loaded: deque[Run] = deque()
        self._current: Run | None = None

    @property
    def count(self) -> int:
        """The requests whose prompt is still to be computed, but for those whose blocks are on their way."""
        return len(self.waiting) + len(self._loaded) + (self._current is not None)

    def token_count(self) -> int:
        """The prompt tokens of these requests, among them what will be found in the cache."""
        current = 0 if self._current is None else self._current.prefill_end - self._current.issued
        loaded = sum(run.prefill_end - run.issued for run in self._loaded)
        return current + loaded + sum(len(sequence.tokens) for sequence in self.waiting)

    def put_back(self, sequence: Sequence) -> None:
        """Lets a request wait again, before all that arrived later."""
        position = 0
        while position < len(self.waiting) and self.waiting[position].arrival < sequence.arrival:
            position += 1
        self.waiting.insert(position, sequence)

    def next_run(self, budget: int, step: StepInFlight) -> Run | None:
        """The run whose prompt goes on in a step with room for `budget` tokens more.

        None where there is none, where it may not share the step, or waits for blocks that are on their way.
        """
        if self._current is None and budget:
            while self._loaded and not self._loaded[0].active:
                self._loaded.popleft()
            self._current = self._next_loaded(step) if self._loaded else self._next_waiting(budget, step)
        return self._current

    def prompt_done(self) -> None:
        """Ends the turn of the run that `next_run` gave last."""
        self._current = None

    def next_loading(self) -> list[Run]:
        """The runs whose blocks are to be loaded next, in one step; each is given once."""
        loading: list[Run] = []
        count = 0
        while self._to_load and count < LOADS_MAX:
            run = self._to_load.pop(0)
            if run.active:
                loading.append(run)
                count += len(run.loads)
            else:
                self._cache.drop_loads(run)
        return loading

    def have_loaded(self, runs: Iterable[Run]) -> None:
        """Takes back runs whose blocks have come, or are missing."""
        self._loaded.extend(run for run in runs if run.active)

    def leave(self, run: Run) -> None:
        """Forgets a run that gives up its slot."""
        if self._current is run:
            self._current = None

    def _next_loaded(self, step: StepInFlight) -> Run | None:
        return self._loaded.popleft() if self._may_share(step, self._loaded[0].sequence) else None

    def _next_waiting(self, budget: int, step: StepInFlight) -> Run | None:
        """Admits those that wait, up to the first that has nothing to load."""
        while self.waiting:
            sequence = self.waiting[0]
            if budget < min(self._block_size, len(sequence.tokens)):
                return None
            if not self._may_share(step, sequence) or self._cache.waits_for_others(sequence, step.filled):
                return None
            run = self._cache.admit(sequence)
            if run is None:
                return None
            self.waiting.popleft()
            if not run.loads:
                return run
            self._to_load.append(run)
        return None

    def _may_share(self, step: StepInFlight, sequence: Sequence) -> bool:
        """Whether a request may be in a step with those that are in it already."""
        group_of = self._quarantine.group_of
        return not step.members or group_of(step.members[0].request_id) == group_of(sequence.request_id)
