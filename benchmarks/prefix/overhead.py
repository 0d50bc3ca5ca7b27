"""What keys and copies cost where nothing is found: one stage and its scheduler in this process, with them and without.

Two servers differ by several percent in themselves, more than what is looked for; here all but the keys is the same.
"""

import tempfile
import time
from pathlib import Path

from actors.run_directory import MEMORY
from api.messages.engine import AddRequest
from api.scheduler.options import ScheduleOptions, SchedulerOptions
from api.scheduler.scheduler import Scheduler
from benchmarks.prefix.asking import made_up
from benchmarks.prefix.sharing import Load, PrefixRow
from benchmarks.support.spread import Spread, ratios
from stages.options import CacheOptions, StageOptions, TierOptions
from stages.pending import drawn
from stages.plan import plan_stages
from stages.stage import Stage
from stages.step import SamplingParams, StepResult
from weights.model_config import ModelConfig
from weights.sample import SAMPLE_DIR

ANSWER_TOKENS = 48
TURNS = 5
"""Turns for each round of the other cases."""

CASE = "nothing in common, in one process"

CACHE = CacheOptions(slots=32, pools=1, blocks=2048, block_size=32, max_model_len=2048)
GREEDY = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, seed=0, choice=0)


def measure_overhead(load: Load) -> PrefixRow:
    """Computes requests that have nothing in common, in turn with keys and copies in memory and without."""
    with tempfile.TemporaryDirectory(prefix="galaxyline-bench-", dir=MEMORY) as memory:
        options = StageOptions(
            model_path=str(SAMPLE_DIR),
            cache_dir=str(Path(memory) / "weights"),
            dtype="float32",
            seed=0,
            cache=CACHE,
            tiers=TierOptions(host_directory=memory, host_bytes=1 << 30),
        )
        [spec] = plan_stages(ModelConfig.from_file(SAMPLE_DIR / "config.json"), 1)
        stage = Stage.load(spec, options, lambda *_: None)
        cached, computed = [], []
        try:
            _tokens_per_s(stage, load, 1, has_keys=False)
            for turn in range(1, TURNS * load.rounds + 1):
                cached.append(_tokens_per_s(stage, load, 2 * turn, has_keys=True))
                computed.append(_tokens_per_s(stage, load, 2 * turn + 1, has_keys=False))
        finally:
            stage.close()
    return PrefixRow(
        case=CASE,
        unit="tokens/s",
        cached=Spread.of(cached),
        computed=Spread.of(computed),
        times=ratios(cached, computed),
    )


def _tokens_per_s(stage: Stage, load: Load, epoch: int, *, has_keys: bool) -> float:
    """Tokens a second, of prompts and answers, of requests that nobody has sent before."""
    schedule = ScheduleOptions(enable_prefix_caching=has_keys)
    scheduler = Scheduler(SchedulerOptions(stages=1, cache=CACHE, prefill_chunk=256, schedule=schedule), epoch)
    prompts = [made_up(f"{epoch} {user}", load.system_tokens // 3) for user in range(load.users)]
    for request_id, prompt in enumerate(prompts):
        scheduler.add_request(
            AddRequest(
                request_id=request_id, tokens=prompt, max_tokens=ANSWER_TOKENS, stop_token_ids=[], sampling=GREEDY
            )
        )
    began = time.monotonic()
    while step := scheduler.next_step():
        result = drawn(stage.step(step, memoryview(b"")))
        if isinstance(result, StepResult):
            scheduler.on_result(result)
    return sum(len(prompt) + ANSWER_TOKENS for prompt in prompts) / (time.monotonic() - began)
