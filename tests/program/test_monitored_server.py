"""The metrics, the view of stages and the timeline of a real server report the same steps."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import httpx
import msgspec
import psutil
import pytest

from api.engine.timeline import STAGE_PID
from api.messages.pipeline_view import PipelineView
from tests.support.scrape import Scrape
from tests.support.servers import Prompt, complete, serving
from tests.support.timelines import check_nesting, check_order, read, steps_by_track

STAGES = 3
REQUESTS = 24
TOKENS = 16
CLOCKS_DIFFER_US = 1000.0
"""More than the clocks of two processes on one host differ by, and less than a step takes to come back."""


@pytest.mark.slow
async def test_metrics_stages_and_timeline_agree(tmp_path: Path, ray_cluster: Mapping[str, str]) -> None:
    timeline = tmp_path / "timeline.json"
    options = ("--stages", str(STAGES), "--timeline", str(timeline))
    with serving(tmp_path, *options, environment=ray_cluster) as server:
        async with httpx.AsyncClient(timeout=120) as client:
            prompts = [Prompt(f"{number} boats on the sea", TOKENS, False) for number in range(REQUESTS)]
            await asyncio.gather(*(complete(client, server, prompt, ignore_eos=True) for prompt in prompts))
            scrape = Scrape((await client.get(f"{server.url}/metrics")).text)
            view = msgspec.json.decode((await client.get(f"{server.url}/pipeline")).content, type=PipelineView)
        command = [sys.executable, "-m", "api.cli", "status", "--url", server.url, "--json"]
        shown = await asyncio.to_thread(subprocess.check_output, command, timeout=60)
        assert view.engine is not None
        for stage in view.stages:
            assert stage.pid is not None
            assert stage.resident_bytes == pytest.approx(psutil.Process(stage.pid).memory_info().rss, rel=0.2)
    events = read(timeline.read_text())
    check_nesting(events)
    check_order(events, STAGES, CLOCKS_DIFFER_US)
    model = {"model_name": "galaxyline-sample", "engine": "0"}
    assert scrape.of("vllm:generation_tokens_total", **model) == REQUESTS * TOKENS
    assert scrape.of("vllm:request_success_total", finished_reason="length", **model) == REQUESTS
    assert scrape.of("vllm:time_to_first_token_seconds_count", **model) == REQUESTS
    assert scrape.of("vllm:request_inference_time_seconds_count", **model) == REQUESTS
    assert scrape.of("http_requests_total", method="POST", handler="/v1/completions", status="200") == REQUESTS
    [cache] = scrape.families["vllm:cache_config_info"].samples
    assert (cache.value, cache.labels["enable_prefix_caching"]) == (1, "True")
    assert (view.phase, view.engine.requests_running, view.engine.kv_cache_blocks_used) == ("ready", 0, 0)
    assert json.loads(shown)["stages"][0]["pid"] == view.stages[0].pid
    in_flight = []
    for stage in view.stages:
        place = {"engine": "0", "stage": str(stage.stage), "host": str(stage.host)}
        steps = sum(scrape.of("galaxyline:stage_step_seconds_count", mode=m, **place) for m in ("prefill", "decode"))
        track = steps_by_track(events)[STAGE_PID + stage.stage, STAGE_PID + stage.stage]
        assert steps == stage.steps_done == len(track)
        busy = scrape.of("galaxyline:stage_busy_seconds_total", **place)
        assert busy == pytest.approx(sum(event["dur"] for event in track) * 1e-6)
        assert 0 < scrape.of("galaxyline:stage_busy_share", **place) < 1
        in_flight.append(busy + scrape.of("galaxyline:stage_bubble_seconds_total", **place))
        assert (stage.state, stage.rows, stage.restarts) == ("ready", [stage.stage], 0)
        assert stage.layers_done == stage.end_layer - stage.first_layer
    assert in_flight == pytest.approx([in_flight[0]] * STAGES)
