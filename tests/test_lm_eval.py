"""lm-eval against a server of the sample model: its scores are those of Hugging Face's model."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.servers import Server, sample_prompts, serving
from weights.sample import SAMPLE_DIR
from weights.sample.margins import Reference

DEADLINE_S = 240
MAX_TOKENS = 24
PROMPTS = [prompt.prompt for prompt in sample_prompts()[:6]]
CONTINUATIONS = [" city", " of the sea", ".", " the 🙂 naïve", " and the hills were", "s"]

SCORING = """
task: scoring
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{context}}"
doc_to_target: "{{continuation}}"
target_delimiter: ""
metric_list: [{metric: acc}]
"""

GENERATION = f"""
task: generation
dataset_path: json
dataset_kwargs: {{data_files: {{test: DATA}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{greedy}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: {MAX_TOKENS}, do_sample: false, temperature: 0}}
metric_list: [{{metric: exact_match}}]
"""

BACKENDS = {
    "of the checkpoint": f"tokenizer={SAMPLE_DIR},tokenizer_backend=huggingface",
    "of the server": "tokenizer_backend=remote",
}


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(SAMPLE_DIR)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server")) as ready:
        yield ready


def evaluate(folder: Path, server: Server, task: str, documents: list[dict[str, str]], backend: str) -> dict[str, Any]:
    """Runs lm-eval on a task of these documents; what it logged of each, and its results as "results"."""
    data = folder / "documents.json"
    data.write_text(json.dumps(documents), encoding="utf-8")
    (folder / "task.yaml").write_text(task.replace("DATA", str(data)), encoding="utf-8")
    answers = f"base_url={server.completions},model=galaxyline-sample,num_concurrent=1,max_retries=1,max_length=2048"
    options = {
        "--model": "local-completions",
        "--model_args": f"{answers},{BACKENDS[backend]}",
        "--include_path": str(folder),
        "--tasks": task.split()[1],
        "--output_path": str(folder / "out"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "run", "--log_samples", *(part for pair in options.items() for part in pair)],
        env={**os.environ, "HF_HOME": str(folder), "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:] + server.log.read_text(encoding="utf-8")[-2000:]
    [samples] = (folder / "out").rglob("samples_*.jsonl")
    [results] = (folder / "out").rglob("results_*.json")
    logged = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    return {
        "samples": sorted(logged, key=lambda sample: int(sample["doc_id"])),
        "results": json.loads(results.read_text(encoding="utf-8"))["results"][task.split()[1]],
    }


def greedy(reference: Reference, prompt: str, max_tokens: int) -> str:
    """The text that follows; lm-eval sends prompts without BOS."""
    tokens = reference.tokenizer.encode(prompt, add_special_tokens=False)
    model: Any = reference.model  # transformers' own annotation of `generate` does not admit the model itself
    whole = model.generate(torch.tensor([tokens]), max_new_tokens=max_tokens, do_sample=False)
    return str(reference.tokenizer.decode(whole[0, len(tokens) :], skip_special_tokens=True))


def log_likelihood(reference: Reference, context: str, continuation: str) -> tuple[float, bool]:
    """The sum of log-softmax over the continuation's tokens, and whether each of them is the best."""
    tokens = reference.tokenizer.encode(context + continuation, add_special_tokens=False)
    begin = len(reference.tokenizer.encode(context, add_special_tokens=False))
    with torch.inference_mode():
        logprobs = reference.model(torch.tensor([tokens])).logits[0].double().log_softmax(dim=-1)
    scored = [(logprobs[place - 1], tokens[place]) for place in range(begin, len(tokens))]
    total = sum(float(row[token]) for row, token in scored)
    return total, all(int(row.argmax()) == token for row, token in scored)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_generation_gives_hugging_faces_greedy_text(
    backend: str, tmp_path: Path, server: Server, reference: Reference
) -> None:
    documents = [
        {"context": prompt, "greedy": greedy(reference, prompt, MAX_TOKENS).split(".")[0]} for prompt in PROMPTS
    ]
    found = evaluate(tmp_path, server, GENERATION, documents, backend)
    assert [sample["resps"][0][0] for sample in found["samples"]] == [document["greedy"] for document in documents]
    assert found["results"]["exact_match,none"] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_are_hugging_faces_log_likelihoods(
    backend: str, tmp_path: Path, server: Server, reference: Reference
) -> None:
    pairs = [*zip(PROMPTS, CONTINUATIONS, strict=True), *((prompt, greedy(reference, prompt, 8)) for prompt in PROMPTS)]
    documents = [{"context": context, "continuation": continuation} for context, continuation in pairs]
    found = evaluate(tmp_path, server, SCORING, documents, backend)
    for sample, pair in zip(found["samples"], pairs, strict=True):
        total, is_greedy = log_likelihood(reference, *pair)
        logged_total, logged_greedy = sample["resps"][0][0]
        assert float(logged_total) == pytest.approx(total, abs=1e-3)
        assert str(logged_greedy) == str(is_greedy)
    assert 0 < found["results"]["acc,none"] < 1
