"""What each client is asked to do: the SDKs' scripts, and the load generators' and evaluations' commands."""

import importlib.metadata
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from benchmarks.clients.client import MODEL, Client, Part, Place
from weights.sample import SAMPLE_DIR

SCRIPTS = Path(__file__).parent / "scripts"
TASK_FILE = "task.json"
"""What scripts ask, with the server's address and the model's name."""

HUMANEVAL = """
task: humaneval_settings
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs:
  until: ["\\nclass", "\\ndef", "\\n#", "\\nif", "\\nprint"]
  max_gen_toks: 32
  do_sample: false
metric_list: [{metric: exact_match}]
"""
"""The settings of lm-eval's own task humaneval, with documents of our own: its data set is not on a package index."""

LOAD = 6
"""The number of requests of a load generator."""


def _scripted(client: Client, script: str, *names: str) -> list[Part]:
    """Parts that a script of `scripts/` knows by their names."""
    return [Part(client=client, name=name, command=_script(script, name), passed=_says_passed) for name in names]


def _script(script: str, part: str) -> Callable[[Place], list[str]]:
    def command(place: Place) -> list[str]:
        task = json.loads((SCRIPTS / TASK_FILE).read_bytes())
        (place.folder / TASK_FILE).write_text(json.dumps({**task, "url": place.url, "model": MODEL}), encoding="utf-8")
        # Node looks for packages above the script, not above the folder that it runs in.
        shutil.copy(SCRIPTS / script, place.folder)
        return ["node" if script.endswith(".mjs") else place.python, script, part]

    return command


def _humaneval(place: Place) -> list[str]:
    documents = [{"prompt": f"def f{number}(x):\n", "answer": "-"} for number in range(4)]
    data = place.folder / "data.json"
    data.write_text("\n".join(map(json.dumps, documents)), encoding="utf-8")
    (place.folder / "task.yaml").write_text(HUMANEVAL.replace("DATA", str(data)), encoding="utf-8")
    arguments = f"model={MODEL},base_url={place.url}/v1/completions,tokenizer_backend=remote,max_length=256"
    where = ["--include_path", str(place.folder), "--output_path", str(place.folder / "results")]
    model = ["--model", "local-completions", "--model_args", arguments]
    return [place.program("lm-eval"), "run", *model, "--tasks", "humaneval_settings", *where, "--log_samples"]


def _lm_eval_passed(place: Place, _: str) -> bool:
    samples = [*(place.folder / "results").rglob("samples_humaneval_settings_*.jsonl")]
    return len(samples) == 1 and len(samples[0].read_text(encoding="utf-8").splitlines()) == 4


def _vllm(*backend: str) -> Callable[[Place], list[str]]:
    def command(place: Place) -> list[str]:
        load = ["--dataset-name", "random", "--random-input-len", "32", "--random-output-len", "8"]
        model = ["--model", MODEL, "--tokenizer", str(SAMPLE_DIR), "--base-url", place.url]
        saved = ["--save-result", "--result-dir", str(place.folder), "--result-filename", "vllm.json"]
        return [place.program("vllm"), "bench", "serve", *backend, *model, *load, "--num-prompts", str(LOAD), *saved]

    return command


def _vllm_passed(place: Place, _: str) -> bool:
    result = json.loads((place.folder / "vllm.json").read_bytes())
    return bool(result["completed"] == LOAD and result["total_output_tokens"] > 0)


def _guidellm(form: str) -> Callable[[Place], list[str]]:
    def command(place: Place) -> list[str]:
        backend = f"kind=openai_http,target={place.url}{form}"
        load = ["--profile", "kind=concurrent,streams=2", "--constraint", f"kind=max_requests,count={LOAD}"]
        data = ["--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=8"]
        tokenizer = ["--tokenizer", f"kind=huggingface_auto,model={SAMPLE_DIR}"]
        return [place.program("guidellm"), "run", "--backend", backend, *tokenizer, *load, *data]

    return command


def _guidellm_passed(place: Place, _: str) -> bool:
    (benchmark,) = json.loads((place.folder / "benchmarks.json").read_bytes())["benchmarks"]
    return bool(benchmark["metrics"]["request_totals"]["successful"] == LOAD)


def _aiperf(*kind: str) -> Callable[[Place], list[str]]:
    def command(place: Place) -> list[str]:
        model = ["--model", MODEL, "--url", place.url, "--tokenizer", str(SAMPLE_DIR)]
        load = ["--request-count", str(LOAD), "--concurrency", "2", "--osl", "8", "--isl", "32"]
        artifacts = ["--artifact-dir", str(place.folder / "artifacts"), "--ui", "none"]
        return [place.program("aiperf"), "profile", *model, *kind, *load, *artifacts]

    return command


def _aiperf_passed(place: Place, _: str) -> bool:
    result = json.loads((place.folder / "artifacts" / "profile_export_aiperf.json").read_bytes())
    return bool(result["request_count"]["avg"] == LOAD and not result["error_summary"])


def _says_passed(_: Place, output: str) -> bool:
    return output.rstrip().endswith("passed")


OPENAI = Client(name="openai", packages=["openai"])
OPENAI_NODE = Client(name="openai-node", packages=["openai", "zod"], is_node=True)
ANTHROPIC = Client(name="anthropic", packages=["anthropic"])
LANGCHAIN = Client(name="langchain", packages=["langchain-openai"])
LITELLM = Client(name="litellm", packages=["litellm"])
AI_SDK = Client(name="ai-sdk", packages=["ai", "@ai-sdk/openai-compatible", "@ai-sdk/openai", "zod"], is_node=True)
INSPECT = Client(name="inspect-ai", packages=["inspect-ai", "openai"])
LM_EVAL = Client(name="lm-eval", packages=["lm_eval[api]"])
GUIDELLM = Client(name="guidellm", packages=["guidellm"])
AIPERF = Client(name="aiperf", packages=["aiperf"])
VLLM = Client(
    name="vllm",
    packages=["vllm"],
    # What `vllm bench serve` imports of what vllm asks for.
    needs=[
        # Where pip's configuration names a build of torch for the processor alone, that one.
        f"torch=={importlib.metadata.version('torch').partition('+')[0]}",
        *("aiohttp", "blake3", "cachetools", "cbor2", "cloudpickle", "compressed-tensors", "datasets", "depyf"),
        *("einops", "fastapi[standard]", "filelock", "ijson", "jsonschema", "llguidance", "msgspec", "openai"),
        *("orjson", "oss-harmony", "opentelemetry-sdk", "pandas", "partial-json-parser", "pillow"),
        *("prometheus_client", "protobuf", "psutil", "py-cpuinfo", "pybase64", "pydantic", "python-json-logger"),
        *("pyyaml", "pyzmq", "regex", "requests", "sentencepiece", "setproctitle", "tiktoken", "tqdm"),
        *("transformers", "watchfiles", "xgrammar"),
    ],
)
CLIENTS = [OPENAI, OPENAI_NODE, ANTHROPIC, LANGCHAIN, LITELLM, AI_SDK, INSPECT, LM_EVAL, GUIDELLM, AIPERF, VLLM]
"""In the order in which they are tried."""


def _guidellm_part(name: str, form: str) -> Part:
    return Part(client=GUIDELLM, name=name, command=_guidellm(form), passed=_guidellm_passed)


def _aiperf_part(name: str, *kind: str) -> Part:
    return Part(client=AIPERF, name=name, command=_aiperf(*kind), passed=_aiperf_passed, is_offline=False)


def _vllm_part(name: str, *backend: str) -> Part:
    return Part(client=VLLM, name=name, command=_vllm(*backend), passed=_vllm_passed)


PARTS = [
    *_scripted(OPENAI, "openai_sdk.py", "completions", "chat", "thought", "tools", "strict_tools", "structured"),
    *_scripted(OPENAI, "openai_sdk.py", "responses", "responses_tools", "responses_structured"),
    *_scripted(OPENAI_NODE, "openai_sdk.mjs", "completions", "chat", "thought", "tools", "run_tools", "structured"),
    *_scripted(OPENAI_NODE, "openai_sdk.mjs", "responses"),
    *_scripted(ANTHROPIC, "anthropic_sdk.py", "messages", "thought", "tools", "count_tokens"),
    *_scripted(LANGCHAIN, "langchain_chat.py", "chat", "tools", "structured"),
    *_scripted(LITELLM, "litellm_chat.py", "chat", "thought", "tools", "structured"),
    *_scripted(AI_SDK, "ai_sdk.mjs", "completions", "chat", "thought", "tools", "structured"),
    *_scripted(AI_SDK, "ai_sdk.mjs", "responses", "responses_tools"),
    *_scripted(INSPECT, "inspect_tasks.py", "chat", "tools"),
    Part(client=LM_EVAL, name="completions", command=_humaneval, passed=_lm_eval_passed),
    _guidellm_part("completions", ",request_format=/v1/completions"),
    _guidellm_part("chat", ""),
    _aiperf_part("completions", "--endpoint-type", "completions", "--streaming", "--extra-inputs", "ignore_eos:true"),
    _aiperf_part("chat"),
    _aiperf_part("streamed_chat", "--streaming"),
    _vllm_part("completions", "--backend", "openai", "--endpoint", "/v1/completions"),
    _vllm_part("chat", "--backend", "openai-chat", "--endpoint", "/v1/chat/completions"),
]
