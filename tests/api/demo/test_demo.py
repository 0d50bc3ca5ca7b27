"""`run_demo` and its command on the sample model, against Hugging Face's own model."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from api.demo import run_demo
from api.errors import OptionError, RequestError
from api.settings.engine import EngineSettings
from tests import ROOT
from tests.support.checkpoints import reference_model, write_checkpoint
from tests.support.command_line import run
from tests.support.demo_figures import MTP_STATISTICS, TT_METAL_STATISTICS
from tests.support.servers import sample_prompts
from weights.sample import SAMPLE_DIR
from weights.sample.train import Reference

DEADLINE_S = 240.0
TEXTS = [SAMPLE_DIR.parent / "corpus" / name for name in ("haiku.txt", "sea.txt")]
LENGTH = 300
MINI_LENGTHS = [200, 90]


def write_reference(model: Path, output: Path, *options: str) -> Path:
    """Runs `galaxyline reference`, its options spelt as those of tt_transformers' helpers."""
    result = run("reference", "--model", str(model), "--output_file", str(output), *options)
    assert result.exit_code == 0, result.output
    return output


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reference file of Hugging Face's model, on text that the sample model knows."""
    return write_reference(
        SAMPLE_DIR, tmp_path_factory.mktemp("reference") / "reference.refpt", "--total_length", str(LENGTH)
    )


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model in float32, with the sample model's tokenizer."""
    sizes = {"vocab_size": 1024}
    model = write_checkpoint(tmp_path_factory.mktemp("mini"), overrides=sizes, dtype="float32")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).symlink_to(SAMPLE_DIR / name)
    return model


@pytest.fixture(scope="module")
def mini_references(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two references of the random model, on different texts and of different lengths, predicted chunk by chunk."""
    folder = tmp_path_factory.mktemp("references")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("api.demo.reference.CHUNK_TOKENS", 64)
        return [
            write_reference(mini, folder / text.stem, "--text-file", str(text), "--total_length", str(length))
            for text, length in zip(TEXTS, MINI_LENGTHS, strict=True)
        ]


@pytest.fixture
def joined(ray_cluster: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs join a cluster that is there already."""
    for name, value in ray_cluster.items():
        monkeypatch.setenv(name, value)


def test_a_prompt_that_is_too_long_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"Prompt\[1\] has \d+ tokens; with --max-new-tokens 2040"):
        run_demo(["a", "a b c d e f g h i j"], cache_dir=tmp_path, max_new_tokens=2040)
    assert not list(tmp_path.iterdir())


def test_accuracy_needs_a_tokenizer(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model")
    with pytest.raises(
        OptionError, match=r"--token-accuracy requires a tokenizer\. Ensure model path has tokenizer files"
    ):
        run_demo(None, model_path=model, cache_dir=tmp_path, token_accuracy=True, reference_file="r.refpt")


@pytest.mark.slow
def test_the_seeds_calls_return_what_they_promise_and_leave_nothing(tmp_path: Path) -> None:
    """Twice in one process, and the second time within a running loop, as in a notebook."""
    before = psutil.Process().children()
    prompts = sample_prompts()[:3]
    expected = Reference(SAMPLE_DIR).complete([p.prompt for p in prompts], [16] * 3)
    results = run_demo([p.prompt for p in prompts], model_path=SAMPLE_DIR, cache_dir=tmp_path, max_new_tokens=16)
    assert [generation["tokens"] for generation in results["generations"]] == [c.tokens for c in expected]
    assert set(results) == {"generations", "statistics", "model_params"}
    assert results["model_params"]["stages"] == 1
    told = results["statistics"]
    worked = told["inference_prefill"] + told["inference_decode"]
    assert 0 < worked <= told["Full demo runtime"] - told["preparing_prefill_config"]
    assert told["trace_execution_t/s/u @128th token"] is None

    async def within_a_loop() -> dict[str, Any]:
        return run_demo(None, random_weights=True, cache_dir=tmp_path, max_new_tokens=5)

    random_results = asyncio.run(within_a_loop())
    [generation] = random_results["generations"]
    assert len(generation["tokens"]) == 5
    assert psutil.Process().children() == before


@pytest.mark.slow
@pytest.mark.usefixtures("joined")
@pytest.mark.parametrize("single_layer", ["mlp", "moe"])
def test_random_weights_need_neither_tokenizer_nor_safetensors(single_layer: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    write_checkpoint(model)
    (model / "model.safetensors").unlink()
    results = run_demo(
        None,
        model_path=model,
        cache_dir=tmp_path / "cache",
        random_weights=True,
        single_layer=single_layer,
        max_new_tokens=4,
    )
    assert results["model_params"]["layers"] == 1
    assert results["model_params"]["dense_layers"] == (1 if single_layer == "mlp" else 0)
    [generation] = results["generations"]
    assert generation["text"].split() == [str(token) for token in generation["tokens"]]


@pytest.mark.slow
@pytest.mark.usefixtures("joined")
def test_completions_are_the_same_with_drafts(tmp_path: Path) -> None:
    """Greedy ones, and drawn ones, which drafts could change by what they draw."""
    prompts = [prompt.prompt for prompt in sample_prompts()[:4]]
    settings = EngineSettings.of(cache_dir=tmp_path, stages=2)
    for temperature in (0.0, 1.0):
        off, on = [
            run_demo(
                prompts,
                engine=settings,
                generator="pp",
                max_new_tokens=24,
                sampling_temperature=temperature,
                enable_mtp=enable_mtp,
            )
            for enable_mtp in (False, True)
        ]
        assert on["generations"] == off["generations"]
        assert set(on["statistics"]) - set(off["statistics"]) == MTP_STATISTICS


@pytest.mark.slow
@pytest.mark.usefixtures("joined")
@pytest.mark.parametrize(
    ("generator", "stages", "dtype", "least"),
    [("bp", None, "float32", 0.99), ("pp", 2, "bfloat16", 0.97), ("pp", 4, "float32", 0.99)],
)
def test_predictions_are_hugging_faces(
    generator: str,
    stages: int | None,
    dtype: str,
    least: float,
    tmp_path: Path,
    reference: Path,
) -> None:
    """Two references at once; tokens beyond their ends are not asked for."""
    settings = EngineSettings.of(cache_dir=tmp_path / "cache", stages=stages, dtype=dtype)
    results = run_demo(
        None,
        reference_file=[reference, reference],
        engine=settings,
        token_accuracy=True,
        max_new_tokens=500,
        generator=generator,
    )
    for generation in results["generations"]:
        assert generation["accuracy_top1"] >= least
        assert generation["accuracy_top5"] == 1.0
        assert len(generation["predicted_tokens"]) == LENGTH - (LENGTH // 2 + 1)


@torch.inference_mode()
def test_references_hold_the_best_tokens_of_hugging_faces_model(mini: Path, mini_references: list[Path]) -> None:
    model = reference_model(mini)
    for file, length in zip(mini_references, MINI_LENGTHS, strict=True):
        content = torch.load(file, weights_only=True)
        tokens, top5 = content["reference_tokens"], content["top5_tokens"]
        assert (tokens.shape, top5.shape) == ((1, length), (length, 5))
        assert tokens.dtype == top5.dtype == torch.long
        assert torch.equal(top5[1:], model(tokens[:, :-1]).logits[0].topk(5).indices)


@pytest.mark.slow
@pytest.mark.usefixtures("joined")
@pytest.mark.parametrize(("generator", "stages"), [("bp", None), ("pp", 2)])
def test_predictions_of_a_random_model_are_hugging_faces(
    generator: str, stages: int | None, mini: Path, mini_references: list[Path], tmp_path: Path
) -> None:
    results = run_demo(
        None,
        model_path=mini,
        reference_file=mini_references,
        engine=EngineSettings.of(cache_dir=tmp_path / "cache", stages=stages, dtype="float32", max_model_len=256),
        token_accuracy=True,
        max_new_tokens=500,
        generator=generator,
    )
    for generation, length in zip(results["generations"], MINI_LENGTHS, strict=True):
        assert generation["accuracy_top1"] >= 0.99
        assert generation["accuracy_top5"] == 1.0
        assert len(generation["predicted_tokens"]) == length - (length // 2 + 1)


@pytest.mark.slow
@pytest.mark.usefixtures("joined")
def test_a_spoiled_weight_shows(tmp_path: Path, reference: Path) -> None:
    spoiled = tmp_path / "spoiled"
    spoiled.mkdir()
    for path in SAMPLE_DIR.iterdir():
        (spoiled / path.name).write_bytes(path.read_bytes())
    tensors = load_file(spoiled / "model.safetensors")
    name = "lm_head.weight"
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, spoiled / "model.safetensors", metadata={"format": "pt"})
    settings = EngineSettings.of(cache_dir=tmp_path / "cache", dtype="float32")
    results = run_demo(
        None, model_path=spoiled, reference_file=reference, engine=settings, token_accuracy=True, max_new_tokens=59
    )
    assert results["generations"][0]["accuracy_top1"] < 0.9


STATISTICS = {
    *TT_METAL_STATISTICS,
    "time_to_first_token_p50",
    "time_to_first_token_p99",
    "inter_token_latency_p50",
    "inter_token_latency_p99",
    "stage_busy_share",
}


MODEL_PARAMS = {
    "layers": 6,
    "dense_layers": 2,
    "weights": "checkpoint",
    "device": "embedded",
    "generator": "bp",
    "stages": 1,
    "chat_template": False,
    "num_speculative_tokens": 0,
    "sampling": {"temperature": 0.0, "top_k": 0, "top_p": 1.0},
}


class DemoRun:
    """`galaxyline demo` over `count` prompts in a file of the seed's layout; it may be killed and run again."""

    def __init__(self, directory: Path, count: int, new_tokens: int) -> None:
        self.texts = [f"{number} boats on the river" for number in range(count)]
        self.new_tokens = new_tokens
        self.log = directory / "log.jsonl"
        self.output = directory / "prompts_output.json"
        self._cache = directory / "cache"
        self._prompts = directory / "prompts.json"
        self._prompts.write_text(json.dumps([{"prompt": text} for text in self.texts]))

    def start(self, *options: str, environment: Mapping[str, str] = {}) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "api.cli", "demo", "--prompts-file", str(self._prompts), *options]
        return subprocess.Popen(
            [*command, "--max-new-tokens", str(self.new_tokens), "--cache-dir", str(self._cache)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "GALAXYLINE_LOG_LEVEL": "error", **environment},
        )

    def finish(self, environment: Mapping[str, str], *options: str) -> dict[str, Any]:
        """Runs to the end; returns the file that it wrote."""
        process = self.start(*options, environment=environment)
        output, _ = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 0
        assert f"Results saved to '{self.output}'" in output.decode()
        saved: dict[str, Any] = json.loads(self.output.read_text(encoding="utf-8"))
        return saved

    def kill_at(self, count: int, *options: str) -> None:
        """SIGKILL as soon as so many results are logged; returns when all that the run had started is gone."""
        process = self.start(*options)
        deadline = time.monotonic() + DEADLINE_S
        while len(self.lines()) < count:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        descendants = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=DEADLINE_S)
        _, left = psutil.wait_procs(descendants, timeout=60)
        assert left == []

    def lines(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


def check_continuation(run: DemoRun, kill_at: int, environment: Mapping[str, str], *options: str) -> dict[str, Any]:
    """Kills a run in the middle and runs it again: nothing is repeated or lost, and the file of results is whole.

    The run that is killed has a Ray cluster of its own, which ends with it; the other joins one.
    """
    count = len(run.texts)
    run.kill_at(kill_at, "--checkpoint-jsonl", str(run.log), *options)
    before = run.lines()
    assert kill_at <= len(before) < count
    saved = run.finish(environment, "--checkpoint-jsonl", str(run.log), *options)
    # The line that the kill may have cut off is dropped.
    assert run.lines()[: len(before) - 1] == before[: len(before) - 1]
    logged = sorted((json.loads(line) for line in run.lines()), key=lambda result: result["index"])
    assert [result["index"] for result in logged] == list(range(1, count + 1))
    assert set(saved) == {"prompts", "generations", "statistics", "model_params"}
    assert saved["prompts"] == run.texts
    assert saved["generations"] == [
        {"index": place, "prompt": text, "text": result["text"]}
        for place, (text, result) in enumerate(zip(run.texts, logged, strict=True), start=1)
    ]
    assert set(saved["statistics"]) == STATISTICS
    params = saved["model_params"]
    assert set(params) == {*MODEL_PARAMS, "model", "dtype", "microbatches", "users", "max_model_len", "max_new_tokens"}
    assert {key: params[key] for key in MODEL_PARAMS} == MODEL_PARAMS
    assert params["max_new_tokens"] == run.new_tokens
    return saved


@pytest.mark.slow
def test_a_killed_demo_goes_on_without_repeating_or_losing_a_prompt(
    tmp_path: Path, ray_cluster: Mapping[str, str]
) -> None:
    check_continuation(DemoRun(tmp_path, 40, 24), 9, ray_cluster, "--max-users-per-row", "8")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif("GALAXYLINE_FULL" not in os.environ, reason="the full form of the test above: GALAXYLINE_FULL=1")
def test_256_prompts_that_are_killed_in_the_middle_are_completed_as_without(
    tmp_path: Path, ray_cluster: Mapping[str, str]
) -> None:
    run = DemoRun(tmp_path, 256, 128)
    saved = check_continuation(run, 100, ray_cluster, "--no-stop-at-eos")
    assert {len(json.loads(line)["tokens"]) for line in run.lines()} == {128}
    whole = run.finish(ray_cluster, "--no-stop-at-eos")
    assert saved["generations"] == whole["generations"]
    assert saved["model_params"] == whole["model_params"]
