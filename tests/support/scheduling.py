"""Options of a scheduler, and requests for it."""

from api.messages.engine import AddRequest, Counts
from api.scheduler.options import DEFAULT_PREFILL_WAIT, ScheduleOptions, SchedulerOptions
from stages.options import CacheOptions
from stages.step import SamplingParams

BLOCK = 32
GREEDY = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, seed=0, choice=0)


def scheduler_options(
    *,
    stages: int = 2,
    slots: int = 6,
    pools: int = 1,
    blocks: int = 24,
    max_model_len: int = 128,
    prefill_chunk: int = 64,
    microbatches: int | None = None,
    prefill_wait: float = DEFAULT_PREFILL_WAIT,
    enable_prefix_caching: bool = True,
    num_speculative_tokens: int = 0,
) -> SchedulerOptions:
    cache = CacheOptions(slots=slots, pools=pools, blocks=blocks, block_size=BLOCK, max_model_len=max_model_len)
    return SchedulerOptions(
        stages=stages,
        cache=cache,
        prefill_chunk=prefill_chunk,
        schedule=ScheduleOptions(
            microbatches=microbatches, prefill_wait=prefill_wait, enable_prefix_caching=enable_prefix_caching
        ),
        num_speculative_tokens=num_speculative_tokens,
    )


def request(
    request_id: int,
    prompt: int | list[int],
    max_tokens: int,
    stop_token_ids: list[int] | None = None,
    sampling: SamplingParams = GREEDY,
    cache_salt: str = "",
) -> AddRequest:
    """A request for a prompt, or for one of that many tokens that no other id has."""
    tokens = [(7 * request_id + 3 * i) % 5000 for i in range(prompt)] if isinstance(prompt, int) else prompt
    return AddRequest(
        request_id=request_id,
        tokens=tokens,
        max_tokens=max_tokens,
        stop_token_ids=stop_token_ids or [],
        sampling=sampling,
        cache_salt=cache_salt,
    )


def nothing_in_use(options: SchedulerOptions) -> Counts:
    cache = options.cache
    blocks = cache.blocks * cache.pools
    return Counts(
        waiting=0,
        running=0,
        steps_in_flight=0,
        free_slots=cache.slots,
        slots=cache.slots,
        free_blocks=blocks,
        blocks=blocks,
    )
