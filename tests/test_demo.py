"""`run_demo` and its command on the sample model, against Hugging Face's own model."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

from api.demo import run_demo
from api.errors import OptionError, RequestError
from api.long_work import LongWork
from api.model_source import resolve_model
from api.reference import ReferenceSettings, write_reference
from api.settings import EngineSettings
from tests.checkpoints import write_checkpoint
from tests.servers import sample_prompts
from weights.sample import SAMPLE_DIR
from weights.sample.margins import Reference

ROOT = Path(__file__).parent.parent
DEADLINE_S = 240.0
TEXT = SAMPLE_DIR.parent / "corpus" / "haiku.txt"
LENGTH = 300


def reference(folder: Path) -> Path:
    """A reference file of Hugging Face's model, on text that the sample model knows."""
    settings = ReferenceSettings(
        source=resolve_model(None, {}),
        text_file=TEXT,
        output_file=folder / "reference.refpt",
        total_length=LENGTH,
    )
    assert write_reference(settings, LongWork(Console(stderr=True))) == LENGTH
    return settings.output_file


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
    prompts = sample_prompts()[:3]
    expected = Reference(SAMPLE_DIR).complete([p.prompt for p in prompts], [16] * 3)
    results = run_demo([p.prompt for p in prompts], model_path=SAMPLE_DIR, cache_dir=tmp_path, max_new_tokens=16)
    assert [generation["tokens"] for generation in results["generations"]] == [c.tokens for c in expected]
    assert set(results) == {"generations", "statistics", "model_params"}
    assert results["model_params"]["stages"] == 1

    async def within_a_loop() -> dict[str, Any]:
        return run_demo(None, random_weights=True, cache_dir=tmp_path, max_new_tokens=5)

    random_results = asyncio.run(within_a_loop())
    [generation] = random_results["generations"]
    assert len(generation["tokens"]) == 5
    assert psutil.Process().children(recursive=True) == []


@pytest.mark.slow
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
@pytest.mark.parametrize(
    ("generator", "stages", "dtype", "least"),
    [("bp", None, "float32", 0.99), ("pp", 2, "bfloat16", 0.97), ("pp", 4, "float32", 0.99)],
)
def test_predictions_are_hugging_faces(
    generator: str, stages: int | None, dtype: str, least: float, tmp_path: Path
) -> None:
    """Two references at once; tokens beyond their ends are not asked for."""
    file = reference(tmp_path)
    settings = EngineSettings(cache_dir=tmp_path / "cache", stages=stages, dtype=dtype)  # type: ignore[arg-type]
    results = run_demo(
        None,
        reference_file=[file, file],
        engine=settings,
        token_accuracy=True,
        max_new_tokens=500,
        generator=generator,
    )
    for generation in results["generations"]:
        assert generation["accuracy_top1"] >= least
        assert generation["accuracy_top5"] == 1.0
        assert len(generation["predicted_tokens"]) == LENGTH - (LENGTH // 2 + 1)


@pytest.mark.slow
def test_a_spoiled_weight_shows(tmp_path: Path) -> None:
    file = reference(tmp_path)
    spoiled = tmp_path / "spoiled"
    spoiled.mkdir()
    for path in SAMPLE_DIR.iterdir():
        (spoiled / path.name).write_bytes(path.read_bytes())
    tensors = load_file(spoiled / "model.safetensors")
    name = "model.layers.2.self_attn.o_proj.weight"
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, spoiled / "model.safetensors", metadata={"format": "pt"})
    settings = EngineSettings(cache_dir=tmp_path / "cache", dtype="float32")
    results = run_demo(
        None, model_path=spoiled, reference_file=file, engine=settings, token_accuracy=True, max_new_tokens=59
    )
    assert results["generations"][0]["accuracy_top1"] < 0.9


def demo(prompts: Path, log: Path, cache: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "api.cli", "demo", "--prompts-file", str(prompts), "--checkpoint-jsonl", str(log)]
    return subprocess.Popen(
        [*command, "--max-new-tokens", "24", "--cache-dir", str(cache), "--max-users-per-row", "8"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "GALAXYLINE_LOG_LEVEL": "error"},
    )


def lines(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


@pytest.mark.slow
def test_a_killed_demo_goes_on_without_repeating_or_losing_a_prompt(tmp_path: Path) -> None:
    texts = [f"{number} boats on the river" for number in range(40)]
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps({"prompts": [{"prompt": text} for text in texts]}))
    log = tmp_path / "log.jsonl"
    process = demo(prompts, log, tmp_path / "cache")
    descendants: list[psutil.Process] = []
    deadline = time.monotonic() + DEADLINE_S
    while len(lines(log)) < 9:
        assert process.poll() is None
        assert time.monotonic() < deadline
        descendants = psutil.Process(process.pid).children(recursive=True)
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=DEADLINE_S)
    _, left = psutil.wait_procs(descendants, timeout=60)
    assert left == []
    before = lines(log)
    assert 9 <= len(before) < len(texts)
    again = demo(prompts, log, tmp_path / "cache")
    output, _ = again.communicate(timeout=DEADLINE_S)
    assert again.returncode == 0
    after = [json.loads(line) for line in lines(log)]
    assert lines(log)[: len(before) - 1] == before[: len(before) - 1]
    assert sorted(result["index"] for result in after) == list(range(1, 41))
    saved = json.loads((tmp_path / "prompts_output.json").read_text())
    assert saved["prompts"] == texts
    by_index = {result["index"]: result["text"] for result in after}
    assert [generation["text"] for generation in saved["generations"]] == [by_index[index] for index in range(1, 41)]
    assert b"prompts_output.json" in output
