"""The timed device behind the real server: texts, stages, and refusals before anything starts."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import httpx
import pytest

from tests.support.command_line import refused
from tests.support.servers import Server, serving

TIMED = ("--device", "timed")
PROMPT = "San Francisco is a"
CLIENTS = 6
DEADLINE_S = 240.0


def ask(server: Server, tokens: int, **fields: object) -> str:
    body = {"prompt": PROMPT, "max_tokens": tokens, "temperature": 0, **fields}
    response = httpx.post(server.completions, json=body, timeout=60)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


@pytest.mark.slow
def test_the_text_is_the_same_on_any_number_of_stages(tmp_path: Path, ray_cluster: Mapping[str, str]) -> None:
    texts = []
    for stages in (1, 2, 4):
        folder = tmp_path / str(stages)
        folder.mkdir()
        options = [*TIMED, "--stage-time", "1", "--stages", str(stages)]
        with serving(folder, *options, environment=ray_cluster) as server:
            # The temperature changes nothing, as the device makes no logits.
            texts.append((ask(server, 40), ask(server, 40, temperature=1.0, seed=5)))
    assert len(set(texts)) == 1
    assert texts[0][0] == texts[0][1]
    assert len(texts[0][0]) > 40


@pytest.mark.slow
def test_the_text_is_the_same_with_drafts_of_which_some_are_wrong(
    tmp_path: Path, ray_cluster: Mapping[str, str]
) -> None:
    found = []
    for name, drafts in (("without", ()), ("with", ("--num-speculative-tokens", "2", "--draft-acceptance", "0.6"))):
        folder = tmp_path / name
        folder.mkdir()
        with serving(folder, *TIMED, "--stage-time", "1", *drafts, environment=ray_cluster) as server:
            texts = [ask(server, 60), ask(server, 60, logprobs=1)]
            steps = httpx.get(f"{server.url}/pipeline", timeout=10).json()
            found.append((texts, steps["stages"][-1]["steps_done"], steps["engine"]["drafts"]))
    (plain, steps_without, none), (drafted, steps_with, drafts) = found
    assert plain == drafted
    assert none is None
    # Every step makes one token and those drafts that are right.
    assert 2 * 60 - steps_with == drafts["accepted_tokens"] > 0
    assert steps_without == 2 * 60
    assert drafts["accepted_tokens"] < drafts["draft_tokens"]


@pytest.mark.slow
def test_r1_on_eight_rows_is_served_without_a_checkpoint_and_without_torch(
    tmp_path: Path, ray_cluster: Mapping[str, str]
) -> None:
    options = [*TIMED, "--model", "r1", "--stages", "8", "--max-model-len", "4096", "--enable-trace"]
    with serving(tmp_path, *options, environment=ray_cluster) as server:
        assert httpx.get(f"{server.url}/v1/models", timeout=10).json()["data"][0]["id"] == "r1"
        answer = httpx.post(server.completions, json={"prompt": [PROMPT] * CLIENTS, "max_tokens": 5}, timeout=60)
        stages = httpx.get(f"{server.url}/pipeline", timeout=10).json()["stages"]
        mapped = [Path(f"/proc/{stage['pid']}/maps").read_text(encoding="utf-8") for stage in stages]
    assert answer.json()["usage"]["completion_tokens"] == 5 * CLIENTS
    assert sorted(row for stage in stages for row in stage["rows"]) == list(range(8))
    assert len({stage["pid"] for stage in stages}) == 8
    assert len({stage["steps_done"] for stage in stages}) == 1
    assert stages[0]["steps_done"] >= 5
    assert all(0 < stage["busy_share"] <= 1 for stage in stages)
    assert not [maps for maps in mapped if "libtorch" in maps]


@pytest.mark.slow
def test_the_demo_runs_on_the_timed_device(tmp_path: Path, ray_cluster: Mapping[str, str]) -> None:
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([{"prompt": PROMPT}]), encoding="utf-8")
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "api.cli", "demo", *TIMED, "--model-path", "r1", "--generator", "pp"]
    command += ["--stages", "2", "--stage-time", "1,2", "--prompts-file", str(prompts), "--output-path", str(out)]
    command += ["--max-new-tokens", "7", "--cache-dir", str(tmp_path / "cache")]
    environment = {**os.environ, **ray_cluster}
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=DEADLINE_S, env=environment)
    assert done.returncode == 0, done.stderr
    # Every token has at least one whole character.
    assert len(json.loads(out.read_text(encoding="utf-8"))["generations"][0]["text"]) >= 7


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--stage-time", "10"), "--stage-time is for --device timed: the embedded device takes its own time."),
        ((*TIMED, "--prompt-token-time", "1"), "--prompt-token-time goes with --stage-time"),
        ((*TIMED, "--stages", "3", "--stage-time", "1,2"), "--stage-time gives 2 times for 3 stages"),
        ((*TIMED, "--stage-time", "1,-2"), "'1,-2' is not a list of times: write it like 10 or 10,12.5."),
        ((*TIMED, "--stage-time", "inf"), "'inf' is not a list of times"),
        (("--draft-acceptance", "0.5"), "--draft-acceptance is for --device timed"),
        ((*TIMED, "--draft-acceptance", "0.5"), "--draft-acceptance goes with --num-speculative-tokens"),
        ((*TIMED, "--draft-acceptance", "2"), "2.0 is not in the range 0<=x<=1."),
        ((*TIMED, "--stage-time", "1", "--transport", "mesh"), "joins chips, and the timed device has none"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: tuple[str, ...], error: str) -> None:
    assert error in refused("serve", *options)


def test_predicted_times_are_for_models_that_fit_the_rows_alone() -> None:
    r1 = ("serve", *TIMED, "--model", "r1", "--max-model-len", "4096")
    assert "needs 16.2 GiB of the 12.0 GiB of DRAM on each chip" in refused(*r1, "--stages", "4")


def test_weights_are_not_converted_for_a_device_that_has_none() -> None:
    assert "'timed'" in refused("convert", *TIMED)


def test_a_model_that_is_not_published_is_refused_as_everywhere() -> None:
    assert "org/unknown" in refused("serve", *TIMED, "--model", "org/unknown")
