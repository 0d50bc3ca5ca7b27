"""The command line: options, what is said of them, and how it fails."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from api.errors import EngineError
from api.settings.engine import EngineSettings
from api.settings.environment import VAIN_OPTIONS, parse_mesh_device
from api.settings.server import ServeSettings
from stages.tensor_dtypes import WeightDtypes
from tests.support.command_line import refused, run
from weights.errors import CheckpointError


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[ServeSettings]:
    """What `serve` was called with, in place of serving."""
    settings: list[ServeSettings] = []

    async def record(given: ServeSettings) -> None:
        settings.append(given)

    monkeypatch.setattr("api.server.serve.serve", record)
    return settings


def test_serve_without_options(served: list[ServeSettings]) -> None:
    assert run("serve").exit_code == 0
    [settings] = served
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert settings.source.name == "galaxyline-sample"
    assert settings.engine.split.stages is None
    assert (settings.max_logprobs, settings.generation_config) == (20, "auto")
    assert settings.engine.cluster.spare
    assert settings.engine.cache_dir is None


def test_spares_can_be_left_out(served: list[ServeSettings]) -> None:
    assert run("serve", "--no-spare").exit_code == 0
    assert not served[0].engine.cluster.spare


@pytest.mark.parametrize("separator", ["-", "_"])
def test_options_are_spelt_with_either_sign(separator: str, served: list[ServeSettings]) -> None:
    spelt = {
        "--max-model-len": "1024",
        "--num-scheduler-steps": "4",
        "--block-size": "64",
        "--override-tt-config": '{"trace_mode": true, "worker_l1_size": 1344544}',
        "--max-num-seqs": "8",
        "--max-num-batched-tokens": "100",
        "--layers-per-stage": "2,4",
        "--start-timeout": "7.5",
        "--placement-timeout": "2",
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
    lengths, cluster = engine.lengths, engine.cluster
    assert (lengths.max_model_len, lengths.block_size, engine.capacity.max_num_seqs) == (1024, 64, 8)
    assert (engine.prefill_chunk, engine.split.layers_per_stage) == (100, [2, 4])
    assert (cluster.start_timeout_s, cluster.placement_timeout_s) == (7.5, 2.0)
    assert (engine.weights.load_format, cluster.ray_address) == ("dummy", "10.0.0.1:6379")
    assert settings.source.name == "mine"
    assert (settings.max_logprobs, settings.generation_config) == (-1, "vllm")
    said = " ".join(log["event"] for log in logs)
    assert "these keys of --override-tt-config have no effect" in said
    assert engine.execution.enable_trace


def test_the_commands_of_the_seed_are_followed(tmp_path: Path, served: list[ServeSettings]) -> None:
    hub_id = "deepseek-ai/DeepSeek-R1-0528"
    in_vain = {
        "TT_METAL_HOME": "/opt/tt-metal",
        "VLLM_DIR": "/opt/vllm",
        "PYTHON_ENV_DIR": "/opt/tt-metal/build/python_env_vllm",
        "VLLM_TARGET_DEVICE": "tt",
        "ARCH_NAME": "wormhole_b0",
        "HF_TOKEN": "secret",
        "VLLM_RPC_TIMEOUT": "1000000",
        "VLLM_USE_V1": "1",
    }
    with capture_logs() as logs:
        result = run(
            *("serve", "--model", hub_id, "--max_model_len", "1024", "--num_scheduler_steps", "1"),
            *("--block_size", "32", "--override_tt_config", '{"trace_mode": false}'),
            **in_vain,
            MESH_DEVICE="(4,8)",
            HF_HOME=str(tmp_path / "hf"),
            HF_MODEL=hub_id,
            DEEPSEEK_V3_HF_MODEL=str(tmp_path),
            DEEPSEEK_V3_CACHE=str(tmp_path / "cache"),
        )
    assert result.exit_code == 0, result.output
    [settings] = served
    assert (settings.source.path, settings.source.name) == (tmp_path, hub_id)
    assert settings.engine.cache_dir == tmp_path / "cache"
    assert (settings.engine.lengths.max_model_len, settings.engine.lengths.block_size) == (1024, 32)
    assert not settings.engine.execution.enable_trace
    [environment] = [log for log in logs if "environment variables" in log["event"]]
    assert set(environment["variables"]) >= in_vain.keys()
    assert "secret" not in str(logs)
    assert any(log.get("rows") == 4 and log.get("columns") == 8 for log in logs)


def test_dtypes_of_chips_are_options(tmp_path: Path, served: list[ServeSettings]) -> None:
    assert run("serve", str(tmp_path)).exit_code == 0
    arguments = ("--router-dtype", "bfloat16", "--kv-cache-dtype", "bfloat16", "--gate-up-dtype", "bfloat8_b")
    assert run("serve", str(tmp_path), *arguments).exit_code == 0
    assert [settings.engine.weights.weight_dtypes for settings in served] == [
        WeightDtypes(),
        WeightDtypes(router="bfloat16", kv_cache="bfloat16", gate_up="bfloat8_b"),
    ]
    assert "'--router-dtype'" in refused("serve", str(tmp_path), "--router-dtype", "bfloat4_b")


@pytest.mark.parametrize("dtype", ["bfloat8_b", "bfloat8-b", "BFLOAT8-B", "BFloat8_b"])
def test_a_choice_may_be_spelt_with_either_sign_and_in_capitals(dtype: str, served: list[ServeSettings]) -> None:
    assert run("serve", "--head-dtype", dtype, "--device", "Timed", "--model", "R1").exit_code == 0
    engine = served[0].engine
    assert (engine.weights.weight_dtypes.head, engine.cluster.device) == ("bfloat8_b", "timed")
    assert EngineSettings.of(head_dtype=dtype).weights.weight_dtypes.head == "bfloat8_b"


@pytest.mark.parametrize("command", ["serve", "demo", "convert", "plan"])
def test_choices_are_shown_in_one_spelling(command: str) -> None:
    shown = run(command, "--help").stdout
    assert "[bfloat16|bfloat8_b|bfloat4_b]" in "".join(shown.split())
    assert "bfloat8-b" not in shown
    assert refused(command, "--head-dtype", "int8").endswith("is not one of 'bfloat16', 'bfloat8_b', 'bfloat4_b'.")


def test_vllms_options_without_effect_are_taken_and_said_in_one_line(served: list[ServeSettings]) -> None:
    arguments = []
    for option in VAIN_OPTIONS:
        arguments += [option.flags[-1], *([] if option.is_switch else ["1"])]
    arguments += ["--no-enable-prefix-caching", "--gpu_memory_utilization", "0.95"]
    with capture_logs() as logs:
        result = run("serve", *arguments)
    assert (result.exit_code, len(served)) == (0, 1), result.output
    [told] = [log for log in logs if log["event"] == "these options have no effect here"]
    assert told["options"] == {option.flags[0]: option.why for option in VAIN_OPTIONS}


@pytest.mark.parametrize("flag", ["-pp", "--pipeline-parallel-size", "--pipeline_parallel_size", "--stages"])
def test_a_pipelines_parallel_size_is_its_stages(flag: str, served: list[ServeSettings]) -> None:
    assert run("serve", flag, "3").exit_code == 0
    assert served[0].engine.split.stages == 3


def test_a_file_of_options_is_followed_and_the_command_line_goes_before_it(
    tmp_path: Path, served: list[ServeSettings]
) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(
        "max_model_len: 1024\nlayers-per-stage: [2, 4]\nspare: false\nport: 8001\napi-key: [a, b]\nseed:\n"
        "override-tt-config: {trace_mode: true}\nenforce-eager: true\nenable-prefix-caching: false\n"
    )
    with capture_logs() as logs:
        result = run("serve", "--port", "8002", "--config", str(file), "--api_key=c", DEEPSEEK_V3_CACHE=str(tmp_path))
    assert result.exit_code == 0, result.output
    [settings] = served
    engine = settings.engine
    assert (settings.port, engine.lengths.max_model_len, engine.split.layers_per_stage) == (8002, 1024, [2, 4])
    assert (engine.cluster.spare, engine.execution.enable_trace, engine.seed) == (False, True, None)
    assert settings.front.api_keys is not None
    assert (settings.front.api_keys.accepts(b"c"), settings.front.api_keys.accepts(b"a")) == (True, False)
    assert {"--enforce-eager"} == {name for log in logs for name in log.get("options", ())}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prot: 1", "'prot' is not an option of `serve`. Did you mean port?"),
        ("config: x", "'config' is not an option of `serve`."),
        ("- port", "does not map names of options to values, like `port: 8001`."),
        ("port: [", "is not YAML: while parsing a flow node."),
        ("spare: 3", "--config: spare is true or false, and not 3."),
        ("port: high", "Invalid value for '--port': 'high' is not a valid integer range."),
        (None, "cannot be read: No such file or directory."),
    ],
)
def test_a_file_of_options_that_cannot_be_followed_is_one_sentence(
    content: str | None, message: str, tmp_path: Path, served: list[ServeSettings]
) -> None:
    file = tmp_path / "serve.yaml"
    if content is not None:
        file.write_text(content)
    assert message in refused("serve", "--config", str(file))
    assert served == []


def test_the_level_of_the_log_is_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    levels: list[str | None] = []

    async def record(_: ServeSettings) -> None:
        # The engine and the stages get the same environment.
        levels.append(os.environ.get("GALAXYLINE_LOG_LEVEL"))

    monkeypatch.setattr("api.server.serve.serve", record)
    assert run("serve", "--log-level", "DEBUG", GALAXYLINE_LOG_LEVEL="error").exit_code == 0
    assert run("serve").exit_code == 0
    assert levels == ["debug", None]
    assert "'loud' is not one of 'debug', 'info', 'warning', 'error'." in refused("serve", "--log-level", "loud")


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
        (["--override-tt-config", "[1]"], "'[1]' is not a JSON object."),
        (["--override-tt-config", "{"], "is not valid JSON"),
        (["--layers-per-stage", "2,x"], "'2,x' is not a list of layer counts: write it like 2,4."),
        (["--layers-per-stage", "0,6"], "is not a list of layer counts"),
        (["--device", "tpu"], "'--device'"),
        (["--dtype", "int4"], "'--dtype'"),
        (["--no-such-option"], "--no-such-option"),
        (["--step-timeout", "0"], "'--step-timeout'"),
        (["--max-restarts", "-1"], "'--max-restarts'"),
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

    monkeypatch.setattr("api.server.serve.serve", fail)
    assert refused("serve", code=code) == f"Error: {error}"


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
