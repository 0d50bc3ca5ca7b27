"""The command line: options, what is said of them, and how it fails."""

import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from structlog.testing import capture_logs

from api import cli, demo_cli
from api.demo.run import Results
from api.demo.setup import DemoSetup
from api.errors import EngineError
from api.mesh_device import parse_mesh_device
from api.serve import ServeSettings
from weights.errors import CheckpointError

VARIABLES = ("DEEPSEEK_V3_HF_MODEL", "HF_MODEL", "HF_HOME", "DEEPSEEK_V3_CACHE", "MESH_DEVICE", "RAY_ADDRESS")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[ServeSettings]:
    """What `serve` was called with, in place of serving."""
    settings: list[ServeSettings] = []

    async def record(given: ServeSettings) -> None:
        settings.append(given)

    monkeypatch.setattr(cli, "serve", record)
    return settings


@pytest.fixture
def demos(monkeypatch: pytest.MonkeyPatch) -> list[DemoSetup]:
    """What `demo` ran with; every prompt is completed with its own upper case."""
    setups: list[DemoSetup] = []

    def record(setup: DemoSetup, on_text: Callable[[str], None] | None) -> Results:
        setups.append(setup)
        if on_text is not None:
            on_text("first ")
            on_text("user")
        generations = [{"tokens": [1], "text": prompt.upper()} for prompt in setup.prompts]
        return {"generations": generations, "statistics": {"decode_t/s": 5.0}, "model_params": setup.model_params}

    monkeypatch.setattr(demo_cli, "run", record)
    return setups


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "configure_logging", lambda: None)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def run(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(cli.main, arguments, env=environment, prog_name="galaxyline")


def refused(*arguments: str, code: int = 2, **environment: str) -> str:
    """The error of a command that must fail, on the last line of stderr."""
    result = run(*arguments, **environment)
    assert result.exit_code == code, result.output
    return result.stderr.strip().splitlines()[-1]


def test_serve_without_options(served: list[ServeSettings]) -> None:
    assert run("serve").exit_code == 0
    [settings] = served
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert settings.source.name == "galaxyline-sample"
    assert settings.engine.stages is None
    assert (settings.max_logprobs, settings.generation_config) == (20, "auto")
    assert settings.engine.cache_dir == Path("generated/deepseek_v3")


@pytest.mark.parametrize("separator", ["-", "_"])
def test_options_are_spelt_with_either_sign(separator: str, served: list[ServeSettings]) -> None:
    spelt = {
        "--max-model-len": "1024",
        "--num-scheduler-steps": "4",
        "--block-size": "64",
        "--override-tt-config": '{"trace_mode": true}',
        "--max-num-seqs": "8",
        "--max-num-batched-tokens": "100",
        "--layers-per-stage": "2,4",
        "--start-timeout": "7.5",
        "--served-model-name": "mine",
        "--load-format": "dummy",
        "--ray-address": "10.0.0.1:6379",
        "--max-logprobs": "-1",
        "--generation-config": "vllm",
    }
    arguments = [part for name, value in spelt.items() for part in ("--" + name[2:].replace("-", separator), value)]
    with capture_logs() as logs:
        result = run("serve", *arguments)
    assert result.exit_code == 0, result.output
    [settings] = served
    engine = settings.engine
    assert (engine.max_model_len, engine.block_size, engine.max_num_seqs, engine.prefill_chunk) == (1024, 64, 8, 100)
    assert (engine.layers_per_stage, engine.start_timeout_s) == ([2, 4], 7.5)
    assert (engine.load_format, engine.ray_address) == ("dummy", "10.0.0.1:6379")
    assert settings.source.name == "mine"
    assert (settings.max_logprobs, settings.generation_config) == (-1, "vllm")
    said = " ".join(log["event"] for log in logs)
    assert "--num-scheduler-steps has no effect" in said
    assert "--override-tt-config has no effect" in said


def test_the_commands_of_the_seed_are_followed(tmp_path: Path, served: list[ServeSettings]) -> None:
    hub_id = "deepseek-ai/DeepSeek-R1-0528"
    with capture_logs() as logs:
        result = run(
            *("serve", "--model", hub_id, "--max_model_len", "1024", "--num_scheduler_steps", "1"),
            *("--block_size", "32", "--override_tt_config", '{"trace_mode": false}'),
            VLLM_RPC_TIMEOUT="1000000",
            VLLM_USE_V1="1",
            MESH_DEVICE="(4,8)",
            DEEPSEEK_V3_HF_MODEL=str(tmp_path),
            DEEPSEEK_V3_CACHE=str(tmp_path / "cache"),
            HF_TOKEN="secret",
        )
    assert result.exit_code == 0, result.output
    [settings] = served
    assert (settings.source.path, settings.source.name) == (tmp_path, hub_id)
    assert settings.engine.cache_dir == tmp_path / "cache"
    [environment] = [log for log in logs if "environment variables" in log["event"]]
    assert {"HF_TOKEN", "VLLM_RPC_TIMEOUT", "VLLM_USE_V1"} <= set(environment["variables"])
    assert "secret" not in str(logs)
    assert any(log.get("rows") == 4 and log.get("columns") == 8 for log in logs)


def test_the_model_may_come_first_or_as_an_option(tmp_path: Path, served: list[ServeSettings]) -> None:
    assert run("serve", str(tmp_path)).exit_code == 0
    assert run("serve", "--model", str(tmp_path)).exit_code == 0
    assert served[0] == served[1]
    assert "leave one out" in refused("serve", str(tmp_path), "--model", "galaxyline-sample")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/nowhere/r1"], "Error: Model path does not exist: '/nowhere/r1'."),
        (["--port", "70000"], "'--port'"),
        (["--stages", "0"], "'--stages'"),
        (["--override-tt-config", "[1]"], "'[1]' is no JSON object."),
        (["--override-tt-config", "{"], "is not valid JSON"),
        (["--layers-per-stage", "2,x"], "'2,x' is no list of layer counts: write it like 2,4."),
        (["--layers-per-stage", "0,6"], "is no list of layer counts"),
        (["--device", "ttnn"], "'ttnn' is not supported yet"),
        (["--dtype", "int4"], "'--dtype'"),
        (["--no-such-option"], "--no-such-option"),
        (["--step-timeout", "0"], "'--step-timeout'"),
    ],
)
def test_a_bad_option_is_one_sentence_and_exit_code_2(
    arguments: list[str], message: str, served: list[ServeSettings]
) -> None:
    assert message in refused("serve", *arguments)
    assert served == []


@pytest.mark.parametrize("mesh", ["4x8", "(4,)", "(0,8)", "(4,8", "4,8", "(-4,8)", "(9999,9999)", "N150"])
def test_a_mesh_that_is_none_is_refused(mesh: str) -> None:
    error = refused("serve", MESH_DEVICE=mesh)
    assert error == f'Error: MESH_DEVICE is {mesh!r}: write it as rows and columns, like "(4,8)".'


def test_a_mesh_is_rows_and_columns() -> None:
    assert parse_mesh_device("(4,8)") == parse_mesh_device(" ( 4 , 8 ) ") == (4, 8)


@pytest.mark.parametrize(
    ("error", "code"), [(CheckpointError("No such tensor."), 2), (EngineError("Stage 1 died."), 1)]
)
def test_an_engine_that_does_not_start_ends_with_its_sentence(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(_: ServeSettings) -> None:
        raise error

    monkeypatch.setattr(cli, "serve", fail)
    assert refused("serve", code=code) == f"Error: {error}"


def test_the_demo_prints_every_prompt_with_its_generation(demos: list[DemoSetup]) -> None:
    result = run("demo", "one_two", "three", "--max-new-tokens", "5")
    assert result.exit_code == 0, result.output
    assert result.stdout == (
        "\n===== Generated =====\n\n"
        "Prompt[0]: one_two\nGeneration[0]: ONE_TWO\n\nPrompt[1]: three\nGeneration[1]: THREE\n\n"
    )
    assert result.stderr.endswith("decode_t/s: 5\n")
    [setup] = demos
    assert (setup.options.max_new_tokens, len(setup.engine.pipeline.specs)) == (5, 1)


def test_the_demo_streams_the_first_prompt_if_asked(demos: list[DemoSetup]) -> None:
    for flag in ("--early_print_first_user", "--early-print-first-user"):
        assert run("demo", flag, "a").stdout.startswith("first user\n\n===== Generated =====\n")
    assert demos[0].options.max_new_tokens == 32


def test_the_demos_generator_is_one_stage_or_a_pipeline(demos: list[DemoSetup]) -> None:
    assert run("demo", "a", "--generator", "pp").exit_code == 0
    assert run("demo", "a", "--generator", "pp", "--stages", "3").exit_code == 0
    assert [len(setup.engine.pipeline.specs) for setup in demos] == [2, 3]
    assert "add --generator pp" in refused("demo", "a", "--stages", "3")


def test_the_demo_takes_tt_metals_name_for_the_models_length(demos: list[DemoSetup]) -> None:
    assert run("demo", "a", "--max-seq-len", "128").exit_code == 0
    assert demos[0].max_model_len == 128


def test_the_demo_needs_a_prompt_and_a_model() -> None:
    assert "A prompt is required" in refused("demo")
    assert refused("demo", "a", "--model-path", "/nowhere") == "Error: Model path does not exist: '/nowhere'."


def test_the_version_is_the_packages() -> None:
    assert run("--version").stdout.startswith("galaxyline, version 0.")


def program(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "api.cli", *arguments], capture_output=True, text=True, check=False, timeout=60
    )


def test_a_port_in_use_is_one_sentence(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = program("serve", "--port", str(port), "--cache-dir", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr == f"Error: Port {port} on 127.0.0.1 is in use: choose another one with --port.\n"
    assert done.stdout == ""


def test_an_address_that_is_not_ours_is_one_sentence(tmp_path: Path) -> None:
    done = program("serve", "--host", "192.0.2.1", "--cache-dir", str(tmp_path))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "Cannot listen on 192.0.2.1 port 8000" in done.stderr
