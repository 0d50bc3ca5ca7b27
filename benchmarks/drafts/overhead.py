"""What drafts cost where they do not pay: one stage in this process, by a scheduler that drafts and one that does not.

Two servers differ by several percent in themselves, more than what is looked for; here all but the drafts is the same.
Processor time is measured, also of the steps by which drafts are judged: what other programs take of the processor is
more than what is looked for, too.
"""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import torch
from tokenizers import Tokenizer

from actors.run_directory import MEMORY
from api.messages.engine import AddRequest
from api.scheduler.options import ScheduleOptions, SchedulerOptions
from api.scheduler.scheduler import Scheduler
from benchmarks.drafts.case import DRAFTS, DraftsRow, Load, Turn, prompts, row_of
from stages.options import CacheOptions, DraftOptions, LoadFormat, StageOptions, TierOptions, WeightOptions
from stages.pending import drawn
from stages.plan import plan_stages
from stages.stage import Stage
from stages.step import SamplingParams, StageTiming, Step, StepResult
from weights.model_config import ModelConfig
from weights.sample import SAMPLE_DIR

CASES: dict[str, LoadFormat] = {"random weights, in one process": "dummy", "sample, in one process": "auto"}

WARM_TURNS = 3
"""Turns before those that count, in which drafts are found not to pay."""

CACHE = CacheOptions(slots=32, pools=1, blocks=512, block_size=32, max_model_len=512)
PREFILL_CHUNK = 256
GREEDY = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, seed=0, choice=0)


class Contender:
    """A scheduler that goes on from turn to turn on a stage, so that what it has found out about drafts stays."""

    def __init__(self, stage: Stage, drafts: int) -> None:
        self._stage = stage
        # Otherwise a turn's prompts would be found, and those of the first one not.
        schedule = ScheduleOptions(enable_prefix_caching=False)
        options = SchedulerOptions(
            stages=1, cache=CACHE, prefill_chunk=PREFILL_CHUNK, schedule=schedule, num_speculative_tokens=drafts
        )
        self.scheduler = Scheduler(options, 0)

    def turn(self, epoch: int, asked: list[list[int]], tokens: int) -> Turn:
        """Computes all requests at once, in an epoch of its own, as another scheduler used the same slots before."""
        self.scheduler.reset(epoch)
        for request_id, prompt in enumerate(asked):
            self.scheduler.add_request(
                AddRequest(request_id=request_id, tokens=prompt, max_tokens=tokens, stop_token_ids=[], sampling=GREEDY)
            )
        answers: list[list[int]] = [[] for _ in asked]
        # Nothing here waits but for the processor, of which other programs may take any share.
        began = time.process_time()
        while step := self.scheduler.next_step():
            for output in self.scheduler.on_result(self._result(step)):
                answers[output.request_id] += output.tokens
        return Turn(answers=answers, seconds=time.process_time() - began)

    def _result(self, step: Step) -> StepResult:
        """The step's result with its times, by which the scheduler judges drafts."""
        began_ns = time.process_time_ns()
        result = drawn(self._stage.step(step, memoryview(b"")))
        if not isinstance(result, StepResult):
            raise TypeError(f"The only stage passed step {step.step_id} on.")
        timing = StageTiming(received_ns=began_ns, began_ns=began_ns, ended_ns=time.process_time_ns())
        return msgspec.structs.replace(result, timings=[timing])


def measure_overhead(load: Load) -> list[DraftsRow]:
    """Measures all cases, one after the other. Raises UnequalAnswersError."""
    # Threads wait for each other in every op: one that has lost its core to others makes a step many times as long.
    torch.set_num_threads(1)
    return [_measured(case, load_format, load) for case, load_format in CASES.items()]


def _measured(case: str, load_format: LoadFormat, load: Load) -> DraftsRow:
    tokenizer = Tokenizer.from_file(str(SAMPLE_DIR / "tokenizer.json"))
    asked = [tokenizer.encode(prompt).ids for prompt in prompts()[: load.process_users]]
    with _stage(load_format) as stage:
        drafting, plain = Contender(stage, DRAFTS), Contender(stage, 0)
        both = (drafting, plain)
        for turn in range(WARM_TURNS):
            for place, contender in enumerate(both):
                contender.turn(2 * turn + place + 1, asked, load.tokens)
        before = drafting.scheduler.drafts.counts()
        turns = []
        for turn in range(WARM_TURNS, WARM_TURNS + load.process_turns):
            # The other one first in every other turn: a machine that becomes slower is to cost both the same.
            order = both if turn % 2 else both[::-1]
            found = [contender.turn(2 * turn + place + 1, asked, load.tokens) for place, contender in enumerate(order)]
            turns.append((found[order.index(drafting)], found[order.index(plain)]))
        tallies = (before, drafting.scheduler.drafts.counts())
    return row_of(case, 1, load.process_users, turns, tallies)


@contextmanager
def _stage(load_format: LoadFormat) -> Iterator[Stage]:
    with tempfile.TemporaryDirectory(prefix="galaxyline-bench-", dir=MEMORY) as memory:
        options = StageOptions(
            model_path=str(SAMPLE_DIR),
            cache_dir=str(Path(memory) / "weights"),
            dtype="float32",
            seed=0,
            cache=CACHE,
            weights=WeightOptions(load_format=load_format),
            tiers=TierOptions(host_bytes=0),
            drafts=DraftOptions(num_speculative_tokens=DRAFTS),
        )
        [spec] = plan_stages(ModelConfig.from_file(SAMPLE_DIR / "config.json"), 1)
        stage = Stage.load(spec, options, lambda *_: None)
        try:
            yield stage
        finally:
            stage.close()
