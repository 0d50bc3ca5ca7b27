"""The command line of the demo: what its flags ask for, what it prints and writes, and how it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from api.demo.options import DemoOptions
from api.demo.run import Results
from api.demo.setup import DemoSetup
from tests.support.command_line import refused, run
from weights.sample import SAMPLE_DIR


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

    monkeypatch.setattr("api.demo.run.run", record)
    return setups


def sample_without(folder: Path, *absent: str) -> Path:
    """A directory with the sample model's files but those that match."""
    folder.mkdir()
    for path in SAMPLE_DIR.iterdir():
        if not any(path.match(pattern) for pattern in absent):
            (folder / path.name).symlink_to(path)
    return folder


def prompts_file(path: Path, count: int) -> Path:
    path.write_text(json.dumps({"prompts": [{"prompt": f"prompt {number}"} for number in range(count)]}))
    return path


# What flags ask for


def test_the_quick_start_of_the_seed(demos: list[DemoSetup], tmp_path: Path) -> None:
    prompt = "Write a haiku about autumnal days by the sea"
    paths = ("--model-path", str(SAMPLE_DIR), "--cache-dir", str(tmp_path / "cache"))
    assert run("demo", *paths, "--early_print_first_user", prompt).exit_code == 0
    [setup] = demos
    stage = setup.engine.pipeline.stage
    assert (setup.prompts, stage.model_path, stage.cache_dir) == ([prompt], str(SAMPLE_DIR), str(tmp_path / "cache"))


def test_the_seeds_run_over_a_file(demos: list[DemoSetup], tmp_path: Path) -> None:
    file, output = prompts_file(tmp_path / "test_prompts.json", 300), tmp_path / "deepseek_tt_out.json"
    result = run(
        *("demo", "--prompts-file", str(file), "--num-prompts", "256"),
        *("--output-path", str(output), "--max-new-tokens", "128"),
    )
    assert result.exit_code == 0, result.output
    [setup] = demos
    assert setup.options.max_new_tokens == 128
    written = json.loads(output.read_text(encoding="utf-8"))
    assert set(written) == {"prompts", "generations", "statistics", "model_params"}
    assert written["prompts"] == setup.prompts == [f"prompt {number}" for number in range(256)]
    assert written["generations"][255] == {"index": 256, "prompt": "prompt 255", "text": "PROMPT 255"}
    assert written["statistics"] == {"decode_t/s": 5.0}


def test_the_seeds_check_of_accuracy(demos: list[DemoSetup], tmp_path: Path) -> None:
    reference = tmp_path / "DeepSeek-V3.refpt"
    result = run(
        *("demo", "--model-path", str(SAMPLE_DIR), "--token-accuracy", "--reference-file", str(reference)),
        *("--tf-prompt-len", "1024", "--max-new-tokens", "256"),
    )
    assert result.exit_code == 0, result.output
    [setup] = demos
    expected = DemoOptions(token_accuracy=True, reference_files=[reference], tf_prompt_len=1024, max_new_tokens=256)
    assert setup.options == expected


def test_prompts_of_a_file_go_before_those_of_the_command_line(demos: list[DemoSetup], tmp_path: Path) -> None:
    result = run("demo", "not this", "--prompts-file", str(prompts_file(tmp_path / "texts.json", 2)))
    assert demos[0].prompts == ["prompt 0", "prompt 1"]
    assert result.stdout == f"Results saved to '{tmp_path / 'texts_output.json'}'\n"
    assert (tmp_path / "texts_output.json").is_file()


def test_flags_that_came_later_to_the_tt_metal_demo(demos: list[DemoSetup]) -> None:
    result = run(
        *("demo", "a", "--sampling-temperature", "0.5", "--sampling-top-k", "4", "--sampling-top-p", "0.9"),
        *("--no-stop-at-eos", "--repeat-batches", "3", "--max-users-per-row", "16", "--override-num-layers", "4"),
        *("--max-seq-len", "128"),
    )
    assert result.exit_code == 0, result.output
    [setup] = demos
    assert setup.options == DemoOptions(
        prompts=["a"],
        sampling_temperature=0.5,
        sampling_top_k=4,
        sampling_top_p=0.9,
        stop_at_eos=False,
        repeat_batches=3,
        max_users_per_row=16,
        override_num_layers=4,
    )
    assert setup.max_model_len == 128
    assert setup.engine.pipeline.stage.cache.slots == 16
    assert setup.model_params["layers"] == 4


def test_the_environment_names_the_model_and_the_cache(
    demos: list[DemoSetup], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = sample_without(tmp_path / "r1")
    variables = {"DEEPSEEK_V3_HF_MODEL": str(model), "DEEPSEEK_V3_CACHE": str(tmp_path / "cache")}
    assert run("demo", "a", **variables).exit_code == 0
    assert run("demo", "a", "--model-path", str(SAMPLE_DIR), "--cache-dir", str(tmp_path), **variables).exit_code == 0
    assert run("demo", "a", XDG_CACHE_HOME=str(tmp_path / "xdg")).exit_code == 0
    stages = [setup.engine.pipeline.stage for setup in demos]
    assert [stage.model_path for stage in stages] == [str(model), str(SAMPLE_DIR), str(SAMPLE_DIR)]
    default = str(tmp_path / "xdg" / "galaxyline" / "weights")
    assert [stage.cache_dir for stage in stages] == [str(tmp_path / "cache"), str(tmp_path), default]


def test_the_generator_is_one_stage_or_a_pipeline(demos: list[DemoSetup]) -> None:
    assert run("demo", "a").exit_code == 0
    assert run("demo", "a", "--generator", "pp").exit_code == 0
    assert run("demo", "a", "--generator", "pp", "--stages", "3", "--enable-trace").exit_code == 0
    assert [len(setup.engine.pipeline.specs) for setup in demos] == [1, 2, 3]
    assert [setup.engine.pipeline.stage.execution.enable_trace for setup in demos] == [False, False, True]
    assert "add --generator pp" in refused("demo", "a", "--stages", "3")


def test_random_weights_need_no_prompt_and_are_one_dense_layer(demos: list[DemoSetup], tmp_path: Path) -> None:
    model = sample_without(tmp_path / "bare", "*.safetensors", "tokenizer*", "generation_config.json")
    for layers in ((), ("--single-layer", "mlp"), ("--single-layer", "moe"), ("--override-num-layers", "6")):
        assert run("demo", "--random-weights", "--model-path", str(model), *layers).exit_code == 0
    sizes = [(setup.model_params["layers"], setup.model_params["dense_layers"]) for setup in demos]
    assert sizes == [
        (1, 1),
        (1, 1),
        (1, 0),
        (6, json.loads((model / "config.json").read_text())["first_k_dense_replace"]),
    ]
    assert [setup.model for setup in demos] == [None] * 4


# What is printed


def test_every_prompt_is_printed_with_its_generation(demos: list[DemoSetup]) -> None:
    result = run("demo", "one_two", "three", "--max-new-tokens", "5")
    assert result.exit_code == 0, result.output
    assert result.stdout == (
        "\n===== Generated =====\n\n"
        "Prompt[0]: one_two\nGeneration[0]: ONE_TWO\n\nPrompt[1]: three\nGeneration[1]: THREE\n\n"
    )
    units = "Statistics, in seconds; t/s: tokens per second; t/s/u: tokens per second for each user."
    assert result.stderr.endswith(f"{units}\ndecode_t/s: 5\n")
    assert demos[0].options.max_new_tokens == 5


def test_the_first_prompt_is_streamed_if_asked(demos: list[DemoSetup]) -> None:
    for flag in ("--early_print_first_user", "--early-print-first-user"):
        assert run("demo", flag, "a").stdout.startswith("first user\n\n===== Generated =====\n")
    assert run("demo", "a").stdout.startswith("\n===== Generated =====\n")
    assert demos[0].options.max_new_tokens == 32


@pytest.mark.parametrize(
    ("flags", "generation", "printed"),
    [
        (["--random-weights"], {"tokens": [3, 5], "text": "3 5 "}, "[random-weights mode] token IDs: [3, 5]"),
        (
            ["--token-accuracy", "--reference-file", "r"],
            {"tokens": [1], "text": "a", "accuracy_top1": 0.755, "accuracy_top5": 1.0},
            "Reference[0]: top-1 accuracy 75.50%, top-5 accuracy 100.00%",
        ),
        (
            ["--token-accuracy", "--reference-file", "r"],
            {"tokens": [1], "text": "a", "accuracy_top1": 0.5},
            "Reference[0]: top-1 accuracy 50.00%",
        ),
    ],
)
def test_token_ids_and_accuracies_are_printed(
    flags: list[str], generation: dict[str, Any], printed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = {"generations": [generation], "statistics": {}, "model_params": {}}
    monkeypatch.setattr("api.demo.run.run", lambda *_: results)
    assert run("demo", *flags).stdout.strip().splitlines() == ["===== Generated =====", "", printed]


# What is refused


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("", "A prompt is required unless --random-weights is used."),
        ("a --model-path {0}/none", "Model path does not exist: '{0}/none'."),
        ("a --model-path {0}/file", "Model path is not a directory: '{0}/file'."),
        ("a --model-path {0}/no-config", "config.json not found in the model directory. Checked: '{0}/no-config'."),
        (
            "a --model-path {0}/no-tokenizer",
            "Tokenizer files not found in the model directory. Expected one of: tokenizer.json, "
            "tiktoken.model. Checked: '{0}/no-tok",
        ),
        (
            "a --model-path {0}/no-weights",
            "No .safetensors files found in the model directory. Checked: '{0}/no-weights'",
        ),
        (
            "--token-accuracy --random-weights",
            "--token-accuracy requires full-model mode (disable --random-weights)",
        ),
        (
            "--token-accuracy --reference-file r --model-path {0}/no-tokenizer",
            "--token-accuracy requires a tokenizer. Ensure model path has tokenizer files.",
        ),
        ("--token-accuracy", "--token-accuracy requires --reference-file pointing to a .pt/.refpt file"),
        ("--prompts-file {0}/none.json", "Prompts file does not exist: '{0}/none.json'"),
        ("--prompts-file {0}/file", "No valid prompts found in '{0}/file'"),
    ],
)
def test_mistakes_are_told_in_the_words_of_the_tt_metal_demo(arguments: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("[]")
    sample_without(tmp_path / "no-config", "config.json")
    sample_without(tmp_path / "no-tokenizer", "tokenizer*")
    sample_without(tmp_path / "no-weights", "*.safetensors")
    error = refused("demo", *arguments.format(tmp_path).split())
    assert error.startswith(f"Error: {text.format(tmp_path)}")
