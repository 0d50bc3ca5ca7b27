"""lm-eval gives a server of the sample model the scores of Hugging Face's model."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.servers import Server, sample_prompts, serving
from weights.sample import SAMPLE_DIR
from weights.sample.train import Reference

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

TASKS = {"scoring": SCORING, "generation": GENERATION}

BACKENDS = {
    "of the checkpoint": f"tokenizer={SAMPLE_DIR},tokenizer_backend=huggingface",
    "of the server": "tokenizer_backend=remote",
}


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(SAMPLE_DIR)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, ray_cluster: Mapping[str, str]) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server"), environment=ray_cluster) as ready:
        yield ready


@dataclass(frozen=True)
class Found:
    """What lm-eval logged of each document of a task, and the task's results."""

    samples: list[dict[str, Any]]
    results: dict[str, float]


@pytest.fixture(scope="module")
def sentences(reference: Reference) -> list[str]:
    """What the generation task, which stops at a full stop, has to give for each prompt."""
    return [greedy(reference, prompt, MAX_TOKENS).split(".")[0] for prompt in PROMPTS]


@pytest.fixture(scope="module")
def scored_pairs(reference: Reference) -> list[tuple[str, str]]:
    """Contexts and continuations: some that the model would not choose, and those that it does."""
    chosen = [(prompt, greedy(reference, prompt, 8)) for prompt in PROMPTS]
    return [*zip(PROMPTS, CONTINUATIONS, strict=True), *chosen]


@pytest.fixture(scope="module", params=BACKENDS)
def found(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    server: Server,
    sentences: list[str],
    scored_pairs: list[tuple[str, str]],
) -> dict[str, Found]:
    """Both tasks through one lm-eval, with the tokenizer on either side."""
    documents = {
        "scoring": [{"context": context, "continuation": continuation} for context, continuation in scored_pairs],
        "generation": [
            {"context": prompt, "greedy": sentence} for prompt, sentence in zip(PROMPTS, sentences, strict=True)
        ],
    }
    return evaluate(tmp_path_factory.mktemp("evaluation"), server, documents, request.param)


def evaluate(
    folder: Path, server: Server, documents: Mapping[str, list[dict[str, str]]], backend: str
) -> dict[str, Found]:
    """Runs lm-eval on tasks of these documents."""
    for name, task in TASKS.items():
        data = folder / f"{name}.json"
        data.write_text(json.dumps(documents[name]), encoding="utf-8")
        (folder / f"{name}.yaml").write_text(task.replace("DATA", str(data)), encoding="utf-8")
    answers = f"base_url={server.completions},model=galaxyline-sample,num_concurrent=1,max_retries=1,max_length=2048"
    options = {
        "--model": "local-completions",
        "--model_args": f"{answers},{BACKENDS[backend]}",
        "--include_path": str(folder),
        "--tasks": ",".join(TASKS),
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
    [results] = (folder / "out").rglob("results_*.json")
    return {
        name: Found(samples_of(folder / "out", name), json.loads(results.read_text(encoding="utf-8"))["results"][name])
        for name in TASKS
    }


def samples_of(folder: Path, task: str) -> list[dict[str, Any]]:
    """What lm-eval logged of each document, in their order."""
    [samples] = folder.rglob(f"samples_{task}_*.jsonl")
    logged = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    return sorted(logged, key=lambda sample: int(sample["doc_id"]))


def greedy(reference: Reference, prompt: str, max_tokens: int) -> str:
    """Returns the text that follows the prompt, without BOS, as lm-eval sends it."""
    tokens = reference.tokenizer.encode(prompt, add_special_tokens=False)
    model: Any = reference.model  # transformers' own annotation of `generate` does not admit the model itself
    whole = model.generate(torch.tensor([tokens]), max_new_tokens=max_tokens, do_sample=False)
    return str(reference.tokenizer.decode(whole[0, len(tokens) :], skip_special_tokens=True))


def log_likelihood(reference: Reference, context: str, continuation: str) -> tuple[float, bool]:
    """Returns the sum of log-softmax over the continuation's tokens, and whether each of them is the best."""
    tokens = reference.tokenizer.encode(context + continuation, add_special_tokens=False)
    begin = len(reference.tokenizer.encode(context, add_special_tokens=False))
    with torch.inference_mode():
        logprobs = reference.model(torch.tensor([tokens])).logits[0].double().log_softmax(dim=-1)
    scored = [(logprobs[place - 1], tokens[place]) for place in range(begin, len(tokens))]
    total = sum(float(row[token]) for row, token in scored)
    return total, all(int(row.argmax()) == token for row, token in scored)


@pytest.mark.slow
def test_generation_gives_hugging_faces_greedy_text(found: dict[str, Found], sentences: list[str]) -> None:
    generation = found["generation"]
    assert [sample["resps"][0][0] for sample in generation.samples] == sentences
    assert generation.results["exact_match,none"] == 1.0


@pytest.mark.slow
def test_scores_are_hugging_faces_log_likelihoods(
    found: dict[str, Found], scored_pairs: list[tuple[str, str]], reference: Reference
) -> None:
    scoring = found["scoring"]
    for sample, pair in zip(scoring.samples, scored_pairs, strict=True):
        total, is_greedy = log_likelihood(reference, *pair)
        logged_total, logged_greedy = sample["resps"][0][0]
        assert float(logged_total) == pytest.approx(total, abs=1e-3)
        assert str(logged_greedy) == str(is_greedy)
    assert 0 < scoring.results["acc,none"] < 1
