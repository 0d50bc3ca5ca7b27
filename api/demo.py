"""`galaxyline demo`: completes prompts through the same pipeline as the server, without one."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import aclosing

import msgspec
from rich.console import Console

from api.engine_client import EngineClient
from api.errors import RequestError
from api.messages import AddRequest
from api.model_source import ModelSource, check_model_files
from api.served_model import ServedModel
from api.settings import ENGINE_MARGIN_S, EngineSettings
from api.signals import on_stop_signal
from api.start_progress import StartProgress
from api.token_source import TokenSource
from stages.step import SamplingParams
from weights.model_config import ModelConfig

GREEDY = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, seed=0, choice=0)


class DemoSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The options of `demo`; `max_new_tokens` bounds every completion."""

    engine: EngineSettings
    source: ModelSource
    max_new_tokens: int


class Generation(msgspec.Struct, frozen=True, kw_only=True):
    """The completion of one prompt: its token ids and their text."""

    tokens: list[int]
    text: str


async def run_demo(
    settings: DemoSettings, prompts: Sequence[str], on_first_user: Callable[[str], None] | None = None
) -> list[Generation]:
    """Completes `prompts` greedily, all at once. `on_first_user` gets the text of the first one as it comes.

    Raises GalaxylineError where the pipeline cannot start or fails, RequestError where a prompt is too long, and
    asyncio.CancelledError on SIGINT and SIGTERM, once the pipeline has ended.
    """
    check_model_files(settings.source, needs_weights=settings.engine.load_format == "auto")
    config = ModelConfig.from_file(settings.source.path / "config.json")
    options = settings.engine.engine_options(settings.source, config)
    model = ServedModel.load(settings.source, config, options.pipeline.stage.cache.max_model_len)
    encoded = _encode(prompts, model, settings.max_new_tokens)
    progress = StartProgress(Console(stderr=True))

    async def run() -> list[Generation]:
        async with EngineClient.start(options, progress.update) as engine:
            with progress.showing():
                await engine.wait_ready(settings.engine.start_timeout_s + ENGINE_MARGIN_S)
            return await generate(engine, model, encoded, settings.max_new_tokens, on_first_user)

    running = asyncio.create_task(run())
    with on_stop_signal(lambda _: running.cancel()):
        return await running


async def generate(
    engine: TokenSource,
    model: ServedModel,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    on_first_user: Callable[[str], None] | None = None,
) -> list[Generation]:
    """Completes tokenised prompts greedily, all at once, in the order given. Raises EngineError if the engine fails."""
    requests = [
        AddRequest(
            request_id=engine.next_request_id(),
            tokens=tokens,
            max_tokens=max_new_tokens,
            stop_token_ids=model.eos_token_ids,
            sampling=GREEDY,
        )
        for tokens in prompts
    ]
    tasks = [
        asyncio.create_task(_complete(engine, model, request, on_first_user if place == 0 else None))
        for place, request in enumerate(requests)
    ]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _complete(
    engine: TokenSource, model: ServedModel, request: AddRequest, on_text: Callable[[str], None] | None
) -> Generation:
    decoder = model.tokenizer.decoder()
    tokens: list[int] = []
    text: list[str] = []
    async with aclosing(engine.generate(request)) as outputs:
        async for output in outputs:
            for token in output.tokens if output.finish_reason != "stop" else output.tokens[:-1]:
                tokens.append(token)
                piece = decoder.add(token) or ""
                text.append(piece)
                if on_text is not None and piece:
                    on_text(piece)
    text.append(decoder.flush())
    if on_text is not None:
        on_text(text[-1])
    return Generation(tokens=tokens, text="".join(text))


def _encode(prompts: Sequence[str], model: ServedModel, max_new_tokens: int) -> list[list[int]]:
    encoded = [model.tokenizer.encode(prompt) for prompt in prompts]
    for place, tokens in enumerate(encoded):
        if len(tokens) + max_new_tokens > model.max_model_len:
            raise RequestError(
                f"Prompt[{place}] has {len(tokens)} tokens; with --max-new-tokens {max_new_tokens} that is more than "
                f"the {model.max_model_len} tokens the model can hold: shorten one of them."
            )
    return encoded
