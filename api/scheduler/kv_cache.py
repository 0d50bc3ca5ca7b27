"""The KV cache as the scheduler sees it: a slot and blocks for each request, and what is in them already.

A block is found by its key, a digest of all tokens up to its end and of what keeps tenants apart. Within an epoch it is
found as soon as the step that fills it was issued, as every stage runs steps in order.
"""

import secrets
from collections.abc import Container

from api.messages.engine import Counts
from api.scheduler.block_pool import BlockPool
from api.scheduler.options import SchedulerOptions
from api.scheduler.sequence import Filled, Run, Sequence, Snapshot
from api.scheduler.slots import Slots
from api.scheduler.step_in_flight import StepInFlight
from stages.step import NO_TOKEN, BlockLoad, StepResult
from weights.sizes import ceil_div

SECRET_BYTES = 16


def new_secret() -> bytes:
    """Returns a secret for keys that nobody can guess."""
    return secrets.token_bytes(SECRET_BYTES)


class KVCache:
    """Gives requests slots and blocks, those with the beginning of their tokens where there are any.

    `runs` are the requests that have a slot, by their ids. The next step has to tell the stages to forget what is
    `forgotten`.
    """

    def __init__(self, options: SchedulerOptions) -> None:
        self._options = options
        self._block_size = options.cache.block_size
        self._finds = options.schedule.enable_prefix_caching
        self._tiers: Container[bytes] | None = None
        self._left: set[bytes] = set()
        self._left_before: set[bytes] = set()
        self._pools = [BlockPool(options.cache.blocks, self._note_taken) for _ in range(options.cache.pools)]
        self._slots = Slots(options)
        self._secret = new_secret()
        self._arriving: set[bytes] = set()
        self.runs: dict[int, Run] = {}
        self._by_slot: dict[int, Run] = {}
        self.forgotten: list[bytes] = []

    def counts(self, *, waiting: int, steps_in_flight: int) -> Counts:
        """The numbers of slots and blocks as they are now, beside those of requests and steps."""
        cache = self._options.cache
        return Counts(
            waiting=waiting,
            running=len(self.runs),
            steps_in_flight=steps_in_flight,
            free_slots=self._slots.free,
            slots=cache.slots,
            free_blocks=sum(pool.free for pool in self._pools),
            blocks=cache.blocks * cache.pools,
        )

    def snapshot(self, *, waiting: list[Sequence], ready: list[int]) -> Snapshot:
        """Runs and blocks as they are now, beside what waits."""
        return Snapshot(
            waiting=waiting,
            running=list(self.runs.values()),
            ready=ready,
            free_blocks=[pool.free_ids for pool in self._pools],
            holders=[pool.holders for pool in self._pools],
        )

    @property
    def microbatches_in_use(self) -> int:
        """Requests go to the emptiest microbatch, so that each has one before any has two."""
        return min(len(self.runs), self._options.steps_in_flight)

    @property
    def decoding(self) -> int:
        """The requests whose prompt is computed, or in steps."""
        return sum(run.issued >= run.prefill_end for run in self.runs.values())

    @property
    def findable(self) -> int:
        """The number of blocks that a request could find."""
        return sum(pool.findable for pool in self._pools)

    def run_in(self, slot: int) -> Run:
        """The run that has the slot."""
        return self._by_slot[slot]

    def know_tiers(self, keys: Container[bytes] | None) -> None:
        """Takes in the keys of what all stages keep beside the device, which is asked for anew now and then.

        Blocks that left the device since the time before last are believed to be there too. None where nothing is kept.
        """
        self._tiers = keys
        self._left_before, self._left = self._left, set()

    def use_secret(self, secret: bytes) -> None:
        """Makes keys anew from another secret: nothing that was kept by the former ones is found again."""
        if secret != self._secret:
            self._secret = secret
            self.forget_all()

    def begin_epoch(self) -> None:
        """Frees all slots and blocks. What full blocks hold is found again once a load step has checked it."""
        self._slots = Slots(self._options)
        self.runs.clear()
        self._by_slot.clear()
        self._arriving.clear()
        for pool in self._pools:
            pool.begin_epoch()

    def forget_all(self) -> None:
        """Ends all keys on the device."""
        for pool in self._pools:
            pool.forget_all()

    def keys(self, sequence: Sequence, tokens: int) -> list[bytes]:
        """The keys of the full blocks among a request's first `tokens` tokens."""
        return sequence.block_keys(self._secret, self._block_size, tokens // self._block_size)

    def waits_for_others(self, sequence: Sequence, filled: list[Filled]) -> bool:
        """Whether a block that the request could begin with is being loaded, or `filled` by the step in the making."""
        if not (self._arriving or filled) or not self._may_find(sequence):
            return False
        wanted = self._wanted(sequence)
        return not (self._arriving.isdisjoint(wanted) and {block.key for block in filled}.isdisjoint(wanted))

    def admit(self, sequence: Sequence) -> Run | None:
        """Gives a request a slot and blocks; None without room for it.

        The first `cached` blocks hold its first tokens; `loads` of them have to be brought first.
        """
        if not self._slots.free:
            return None
        length = len(sequence.tokens)
        # Room for the token after the prompt too: a run that is preempted at once would make no progress. A prompt
        # that is only scored has none, and may fill all the blocks that a request can have.
        needed = ceil_div(min(length + 1, sequence.end), self._block_size)
        wanted = self._wanted(sequence) if self._may_find(sequence) else []
        slot = self._choose_slot(needed, wanted)
        if slot is None:
            return None
        index = self._options.cache.pool_of(slot)
        pool = self._pools[index]
        found = self._find(pool, wanted)
        pool.share([block for block in found if block is not None])
        fresh = iter(pool.take(needed - sum(block is not None for block in found)))
        blocks = [next(fresh) if block is None else block for block in found]
        loads = [
            BlockLoad(pool=index, block=block, key=key)
            for block, here, key in zip(blocks, found, wanted, strict=False)
            if here is None or not pool.is_checked(block)
        ]
        self._arriving.update(load.key for load in loads)
        run = Run(
            sequence=sequence,
            slot=slot,
            microbatch=self._slots.microbatch_of(slot),
            pool=index,
            blocks=[*blocks, *fresh],
            prefill_end=length,
            cached=len(blocks),
            loads=loads,
            issued=len(blocks) * self._block_size,
            secret=self._secret,
            keyed=len(blocks),
        )
        self.runs[sequence.request_id] = self._by_slot[slot] = run
        return run

    def drop_loads(self, run: Run) -> None:
        """Gives up what a run waits for."""
        self._arriving.difference_update(load.key for load in run.loads)

    def give_up_loads(self, runs: list[Run]) -> None:
        """Has the stages forget what runs wait for, and all that is on the device, as the step that loads it failed."""
        self.forget_all()
        self.forgotten += [load.key for run in runs for load in run.loads]

    def _take_in_loads(self, runs: list[Run], result: StepResult) -> None:
        """Takes in which of the blocks that runs wait for have come: the first that is missing ends what is cached."""
        missed = set(result.missed)
        index = 0
        for run in runs:
            came = [index + number not in missed for number in range(len(run.loads))]
            index += len(run.loads)
            self.drop_loads(run)
            if run.active:
                self._take_in(run, came)

    def _take_in(self, run: Run, came: list[bool]) -> None:
        pool = self._pools[run.pool]
        for load, has_come in zip(run.loads, came, strict=True):
            if not has_come:
                self._left.discard(load.key)
                self._left_before.discard(load.key)
                run.cached = min(run.cached, run.blocks.index(load.block))
        for load in run.loads:
            pool.publish(load.block, load.key)
            pool.confirm(load.block, load.key)
            pool.check(load.block)
        # The run computes these itself, and so writes to blocks that nobody else may read.
        pool.forget(run.blocks[run.cached :])
        run.loads = []
        run.keyed = run.cached
        run.issued = run.cached * self._block_size

    def grow(self, run: Run, drafts: int = 0) -> list[int] | None:
        """Adds the blocks that the run's next token and drafts behind it need; returns them, None without room."""
        needed = ceil_div(run.issued + 1 + drafts, self._block_size) - len(run.blocks)
        if needed <= 0:
            return []
        pool = self._pools[run.pool]
        if pool.free < needed:
            return None
        added = pool.take(needed)
        run.blocks += added
        return added

    def shrink(self, run: Run) -> bool:
        """Gives back the blocks behind the run's next token and its drafts; returns whether there were any."""
        kept = ceil_div(run.issued + 1 + len(run.drafting.drafts), self._block_size)
        given_back = run.blocks[kept:]
        del run.blocks[kept:]
        self._pools[run.pool].release(given_back)
        return bool(given_back)

    def filled(self, run: Run) -> list[Filled]:
        """The blocks that are full once the run's first `issued` tokens are in the cache; each is given once."""
        first, last = run.keyed, run.issued // self._block_size
        run.keyed = last
        # What was begun before a reset rests on blocks from before it.
        if first == last or not self._finds or run.secret != self._secret:
            return []
        keys = self.keys(run.sequence, run.issued)
        return [Filled(run.pool, run.blocks[index], keys[index]) for index in range(first, last)]

    def publish(self, filled: list[Filled]) -> None:
        """Lets blocks be found, as the step that fills them is issued."""
        for pool, block, key in filled:
            self._pools[pool].publish(block, key)

    def step_returned(self, step: StepInFlight, result: StepResult) -> None:
        """Lets what a step has filled be found in later epochs too, and takes in what it has loaded."""
        for run, answer in zip(step.sampled, step.answers(result), strict=True):
            # One that is still running ends for this, and forgets then.
            if answer.tokens[-1] == NO_TOKEN and not run.active:
                self.forget_content(run)
        for pool, block, key in step.filled:
            self._pools[pool].confirm(block, key)
        self._take_in_loads(step.loading, result)

    def release(self, run: Run) -> None:
        """Frees a run's slot and blocks."""
        del self.runs[run.request_id]
        del self._by_slot[run.slot]
        self._pools[run.pool].release(run.blocks)
        self._slots.free_slot(run.slot)

    def forget_written(self, run: Run) -> None:
        """Ends the keys of the blocks that a run has filled, which nobody else can have filled for it."""
        pool = self._pools[run.pool]
        keys = self.keys(run.sequence, run.issued) if self._finds else []
        filled = list(zip(run.blocks, keys, strict=False))[run.cached :]
        written = [(block, key) for block, key in filled if pool.find(key) == block]
        pool.forget([block for block, _ in written])
        self.forgotten += [key for _, key in written]

    def forget_content(self, run: Run) -> None:
        """Ends the keys of all that a run has read or written, wherever it is kept: it is of no use to anybody."""
        keys = self.keys(run.sequence, run.issued) if self._finds else []
        for pool in self._pools:
            pool.forget([block for block in map(pool.find, keys) if block is not None])
        self.forgotten += keys

    def take_forgotten(self) -> list[bytes]:
        """The keys that the next step has to tell the stages to forget; they are given once."""
        forgotten, self.forgotten = self.forgotten, []
        return forgotten

    def _note_taken(self, key: bytes) -> None:
        if self._tiers is not None:
            self._left.add(key)

    def _is_in_tiers(self, key: bytes) -> bool:
        if self._tiers is None:
            return False
        return key in self._tiers or key in self._left or key in self._left_before

    def _may_find(self, sequence: Sequence) -> bool:
        """Whether a request may begin with blocks that were filled for another: not where its prompt is scored."""
        return self._finds and sequence.sampling.prompt_logprobs is None

    def _wanted(self, sequence: Sequence) -> list[bytes]:
        """The keys of the blocks that a request could find: one token at least has to be computed."""
        return self.keys(sequence, len(sequence.tokens) - 1)

    def _choose_slot(self, needed: int, wanted: list[bytes]) -> int | None:
        """Chooses the pool that holds most of the beginning, unless it is much fuller than others."""
        matches = [pool.match(wanted) for pool in self._pools]
        fitting = [
            index
            for index, pool in enumerate(self._pools)
            if pool.fits(matches[index], max(needed, len(matches[index])))
        ]
        free = [pool.free for pool in self._pools]
        longest = max((len(matches[index]) for index in fitting), default=0)
        if longest:
            best = [i for i in fitting if len(matches[i]) == longest and not self._slots.is_much_fuller(i)]
            slot = self._slots.take_slot(best, free)
            if slot is not None:
                return slot
        return self._slots.take_slot(fitting, free)

    def _find(self, pool: BlockPool, wanted: list[bytes]) -> list[int | None]:
        """The blocks of the first keys, None for one that a tier has; up to the first that is nowhere.

        What is not certain to come may have to be computed after all, with all that follows: into blocks that nobody
        else holds.
        """
        found: list[int | None] = []
        is_certain = True
        for key in wanted:
            block = pool.find(key)
            if block is None and not self._is_in_tiers(key):
                break
            if block is not None and not is_certain and pool.is_held(block):
                break
            is_certain = is_certain and block is not None and pool.is_checked(block)
            found.append(block)
        return found
