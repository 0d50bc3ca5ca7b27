"""`run_demo`: completes prompts, or follows references, through the same pipeline as the server, without one."""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import uvloop
from rich.console import Console

from actors.log import keep_logs_off_stdout
from api.client.engine_client import EngineClient
from api.client.progress import LongWork, StartProgress
from api.demo.generation import Generation, Statistics, generate, statistics
from api.demo.jobs import Batch
from api.demo.options import DemoOptions
from api.demo.setup import DemoSetup
from api.engine.signals import StopSignals, on_stop_signal
from api.settings.engine import ENGINE_MARGIN_S, EngineSettings
from api.settings.option import made

Results: TypeAlias = "dict[str, Any]"
"""`generations`, a list of dicts; `statistics`; `model_params`: what the tt-metal demo's run_demo returns."""

OnText = Callable[[str], None]

ENGINE_FLAGS = {"enable_trace": "enable_trace", "max_seq_len": "max_model_len"}
"""Flags of the tt-metal demo that are the engine's here, and the names of the engine's options."""


def run_demo(
    prompts: str | Sequence[str] | None = None,
    *,
    model_path: str | Path | None = None,
    cache_dir: str | Path | None = None,
    reference_file: str | Path | Sequence[str | Path] | None = None,
    early_print_first_user: bool = False,
    enable_mtp: bool | None = None,
    engine: EngineSettings | None = None,
    **options: Any,
) -> Results:
    """Completes `prompts` and returns generations, statistics and model_params, as the tt-metal demo's run_demo does.

    `model_path` is a directory or a hub id, by default what the environment names, else the sample model. `enable_mtp`
    is the option `mtp` as the tt-metal demo has it here. `options` are those of DemoOptions, such as `max_new_tokens`,
    `generator`, `random_weights` or `token_accuracy`, and those of ENGINE_FLAGS; `engine` has all others. May be called
    from any thread, and where a loop is running; nothing is left when it returns. Raises GalaxylineError where it
    cannot be done as asked, or the pipeline fails.
    """
    keep_logs_off_stdout()
    directory = cache_dir or (engine.cache_dir if engine else None)
    asked = {name: options.pop(flag) for flag, name in ENGINE_FLAGS.items() if flag in options}
    settings = (engine or EngineSettings()).but(**asked, cache_dir=directory)
    files = [reference_file] if isinstance(reference_file, str | Path) else reference_file or []
    texts = [prompts] if isinstance(prompts, str) else prompts or []
    if enable_mtp is not None:
        options["mtp"] = "on" if enable_mtp else "off"
    demo = made(DemoOptions, {"prompts": list(texts), "reference_files": list(files), **options})
    setup = DemoSetup.of(demo, settings, None if model_path is None else str(model_path))
    return run(setup, _print_text if early_print_first_user else None)


def run(setup: DemoSetup, on_text: OnText | None = None) -> Results:
    """Runs a demo; `on_text` gets the first prompt's text as it comes.

    Raises GalaxylineError as `run_demo` does, and StoppedError on SIGINT and SIGTERM, once the pipeline has ended.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return uvloop.run(_until_stopped(setup, on_text))
    # In a notebook, for example, the loop that runs is not ours.
    with ThreadPoolExecutor(1, "demo") as thread:
        return thread.submit(lambda: uvloop.run(_until_stopped(setup, on_text))).result()


async def _until_stopped(setup: DemoSetup, on_text: OnText | None) -> Results:
    signals = StopSignals()
    running = asyncio.create_task(_run(setup, on_text))

    def stop(number: int) -> None:
        signals.note(number)
        running.cancel()

    with on_stop_signal(stop):
        try:
            return await running
        except asyncio.CancelledError:
            if signals.asked.is_set():
                raise signals.error from None
            raise


async def _run(setup: DemoSetup, on_text: OnText | None) -> Results:
    with setup.results_log() as results_log:
        first, *others = [Batch.of(setup, results_log) for _ in range(setup.options.repeat_batches)]
        figures: Statistics = {}
        if first.left:
            figures = await _complete(setup, [first, *others], on_text)
        last = others[-1] if others else first
    return {"generations": last.results, "statistics": figures, "model_params": setup.model_params}


async def _complete(setup: DemoSetup, batches: Sequence[Batch], on_text: OnText | None) -> Statistics:
    """Completes what is left of one batch after the other."""
    began = time.monotonic()
    progress = StartProgress(Console(stderr=True))
    work = LongWork(Console(stderr=True))
    generations: list[Generation] = []
    async with EngineClient.start(setup.engine, progress.update) as engine:
        with progress.showing():
            await engine.wait_ready(setup.start_timeout_s + ENGINE_MARGIN_S)
        ready = time.monotonic()
        with work.steps("Completing", sum(len(batch.left) for batch in batches)) as done:
            for batch in batches:
                generations += await generate(engine, batch.generation_jobs(engine, on_text, done))
        measured = await engine.metrics()
    return statistics(generations, measured, seconds_to_ready=ready - began, runtime=time.monotonic() - began)


def _print_text(text: str) -> None:
    print(text, end="", flush=True)  # noqa: T201 - what early_print_first_user asks for
