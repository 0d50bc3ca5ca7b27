"""`python -m benchmarks.clients`: real clients against a server of the sample model.

Each is installed in an environment of its own below a temporary directory, makes completions, and is judged by its own
result. It is the newest release that the package index has, so that this shows what new releases of clients expect.
"""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import click
import msgspec
from rich.console import Console

from benchmarks.support.ports import free_port
from benchmarks.support.report import WIDTH, table_of
from benchmarks.support.server_process import running_server
from weights.sample import SAMPLE_DIR

MODEL = "galaxyline-sample"
INSTALL_S, RUN_S = 1800.0, 600.0
LINES_SHOWN = 30
"""How much of a failed client's output is shown."""


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """The server's address, and a folder for a client's environment and files."""

    url: str
    folder: Path

    @property
    def python(self) -> str:
        """The interpreter of the environment."""
        return str(self.folder / "env" / "bin" / "python")

    def program(self, name: str) -> str:
        """A program of the environment."""
        return str(self.folder / "env" / "bin" / name)


Judge = Callable[[Place, str], bool]
"""Whether a client that exited with 0 has done its work, by its files and its output."""


class ClientProgram(msgspec.Struct, frozen=True, kw_only=True):
    """A client: its packages, the first of which gives its version, and the command to run once they are installed.

    `needs` is what the packages need to run as clients, where they ask for much else, such as GPUs' libraries: they are
    installed without that then. One that `is_offline` is told not to ask Hugging Face's hub for what it has on disk.
    """

    name: str
    packages: list[str]
    command: Callable[[Place], list[str]]
    passed: Judge
    needs: list[str] = []
    is_node: bool = False
    is_offline: bool = True


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a client; `log` is the end of its output where it failed."""

    name: str
    version: str
    passed: bool
    log: str = ""


OPENAI_PYTHON = """
import openai
client = openai.OpenAI(base_url="@URL@/v1", api_key="-")
asked = {"model": "@MODEL@", "prompt": "San Francisco is a", "max_tokens": 16, "temperature": 0}
whole = client.completions.create(**asked, logprobs=2)
parts = client.completions.create(**asked, stream=True)
assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
assert [model.id for model in client.models.list()] == ["@MODEL@"]
print("passed")
"""

OPENAI_NODE = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: "@URL@/v1", apiKey: "-" });
const body = { model: "@MODEL@", prompt: "San Francisco is a", max_tokens: 16, temperature: 0 };
const whole = await client.completions.create(body);
let text = "";
for await (const part of await client.completions.create({ ...body, stream: true })) text += part.choices[0].text;
if (text !== whole.choices[0].text) throw new Error(`${text} is not ${whole.choices[0].text}`);
console.log("passed");
"""

AI_SDK = """
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";
const model = createOpenAICompatible({ name: "galaxyline", baseURL: "@URL@/v1" }).completionModel("@MODEL@");
const asked = { model, prompt: "San Francisco is a", maxOutputTokens: 16, temperature: 0 };
const whole = await generateText(asked);
let text = "";
for await (const part of streamText(asked).textStream) text += part;
if (!text || text !== whole.text) throw new Error(`${text} is not ${whole.text}`);
console.log("passed");
"""

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


def _script(text: str, name: str) -> Callable[[Place], list[str]]:
    def command(place: Place) -> list[str]:
        path = place.folder / name
        path.write_text(text.replace("@URL@", place.url).replace("@MODEL@", MODEL), encoding="utf-8")
        return ["node", name] if name.endswith(".mjs") else [place.python, name]

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


def _vllm(place: Place) -> list[str]:
    load = ["--dataset-name", "random", "--random-input-len", "32", "--random-output-len", "8", "--num-prompts", "8"]
    model = ["--model", MODEL, "--tokenizer", str(SAMPLE_DIR), "--base-url", place.url]
    saved = ["--save-result", "--result-dir", str(place.folder), "--result-filename", "vllm.json"]
    backend = ["--backend", "openai", "--endpoint", "/v1/completions"]
    return [place.program("vllm"), "bench", "serve", *backend, *model, *load, *saved]


def _vllm_passed(place: Place, _: str) -> bool:
    return bool(json.loads((place.folder / "vllm.json").read_bytes())["completed"] == 8)


def _guidellm(place: Place) -> list[str]:
    backend = f"kind=openai_http,target={place.url},request_format=/v1/completions"
    load = ["--profile", "kind=concurrent,streams=2", "--constraint", "kind=max_requests,count=6"]
    data = ["--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=8"]
    tokenizer = ["--tokenizer", f"kind=huggingface_auto,model={SAMPLE_DIR}"]
    return [place.program("guidellm"), "run", "--backend", backend, *tokenizer, *load, *data]


def _aiperf(place: Place) -> list[str]:
    model = ["--model", MODEL, "--url", place.url, "--tokenizer", str(SAMPLE_DIR)]
    load = [
        "--request-count",
        "6",
        "--concurrency",
        "2",
        "--osl",
        "8",
        "--isl",
        "32",
        "--extra-inputs",
        "ignore_eos:true",
    ]
    kind = ["--endpoint-type", "completions", "--streaming"]
    artifacts = ["--artifact-dir", str(place.folder / "artifacts"), "--ui", "none"]
    return [place.program("aiperf"), "profile", *model, *kind, *load, *artifacts]


def _says_passed(_: Place, output: str) -> bool:
    return output.rstrip().endswith("passed")


def _exited(_: Place, __: str) -> bool:
    return True


VLLM_NEEDS = [
    # Where pip's configuration names a build of torch for the processor alone, that one.
    f"torch=={importlib.metadata.version('torch').partition('+')[0]}",
    *("aiohttp", "blake3", "cachetools", "cbor2", "cloudpickle", "compressed-tensors", "datasets", "depyf", "einops"),
    *("fastapi[standard]", "filelock", "ijson", "jsonschema", "llguidance", "msgspec", "openai", "orjson"),
    *("oss-harmony", "opentelemetry-sdk", "pandas", "partial-json-parser", "pillow", "prometheus_client", "protobuf"),
    *("psutil", "py-cpuinfo", "pybase64", "pydantic", "python-json-logger", "pyyaml", "pyzmq", "regex", "requests"),
    *("sentencepiece", "setproctitle", "tiktoken", "tqdm", "transformers", "watchfiles", "xgrammar"),
]
"""What `vllm bench serve` imports of what vllm asks for."""

PROGRAMS = [
    ClientProgram(name="openai", packages=["openai"], command=_script(OPENAI_PYTHON, "client.py"), passed=_says_passed),
    ClientProgram(
        name="openai-node",
        packages=["openai"],
        command=_script(OPENAI_NODE, "client.mjs"),
        passed=_says_passed,
        is_node=True,
    ),
    ClientProgram(
        name="ai-sdk",
        packages=["ai", "@ai-sdk/openai-compatible"],
        command=_script(AI_SDK, "client.mjs"),
        passed=_says_passed,
        is_node=True,
    ),
    ClientProgram(name="lm-eval", packages=["lm_eval[api]"], command=_humaneval, passed=_lm_eval_passed),
    ClientProgram(name="guidellm", packages=["guidellm"], command=_guidellm, passed=_exited),
    ClientProgram(name="aiperf", packages=["aiperf"], command=_aiperf, passed=_exited, is_offline=False),
    ClientProgram(name="vllm", packages=["vllm"], command=_vllm, passed=_vllm_passed, needs=VLLM_NEEDS),
]


def try_client(program: ClientProgram, place: Place) -> Outcome:
    """Installs a client and runs it."""
    if program.is_node and shutil.which("npm") is None:
        return Outcome(name=program.name, version="", passed=False, log="This machine lacks npm.")
    place.folder.mkdir()
    version = ""
    try:
        _install(program, place)
        version = _version(program, place)
        output = _run(program.command(place), place, RUN_S, program.is_offline)
        passed = program.passed(place, output)
    except (subprocess.SubprocessError, OSError) as error:
        output, passed = str(getattr(error, "output", None) or error), False
    log = "" if passed else "\n".join(output.splitlines()[-LINES_SHOWN:])
    return Outcome(name=program.name, version=version, passed=passed, log=log)


def _install(program: ClientProgram, place: Place) -> None:
    if program.is_node:
        (place.folder / "package.json").write_text('{"private": true}', encoding="utf-8")
        _run(["npm", "install", "--no-fund", "--no-audit", *program.packages], place, INSTALL_S)
        return
    _run([sys.executable, "-m", "venv", str(place.folder / "env")], place, INSTALL_S)
    if program.needs:
        # By pip, whose configuration may name other builds than the index has.
        pip = [place.python, "-m", "pip", "install", "--quiet"]
        _run([*pip, *program.needs], place, INSTALL_S)
        _run([*pip, "--no-deps", *program.packages], place, INSTALL_S)
        return
    # In a fraction of pip's time, where it is there.
    fast = [sys.executable, "-m", "uv", "pip", "install", "--python", place.python]
    has_uv = importlib.util.find_spec("uv") is not None
    _run(
        [*(fast if has_uv else [place.python, "-m", "pip", "install"]), "--quiet", *program.packages], place, INSTALL_S
    )


def _version(program: ClientProgram, place: Place) -> str:
    package = program.packages[0].partition("[")[0]
    if program.is_node:
        described = place.folder / "node_modules" / package / "package.json"
        return str(json.loads(described.read_bytes())["version"])
    code = f"import importlib.metadata; print(importlib.metadata.version({package!r}))"
    return _run([place.python, "-c", code], place, RUN_S).strip()


def _run(command: list[str], place: Place, timeout_s: float, is_offline: bool = False) -> str:
    """Runs a command in a client's folder and returns its output. Raises SubprocessError where it fails."""
    hub = {"HF_HUB_OFFLINE": "1"} if is_offline else {}
    environment = {**os.environ, **hub, "NO_COLOR": "1", "HOME": str(place.folder)}
    done = subprocess.run(
        command,
        cwd=place.folder,
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
    )
    return done.stdout


@click.command("clients", context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--only", multiple=True, type=click.Choice([program.name for program in PROGRAMS]), help="Try this one; repeatable."
)
def main(only: tuple[str, ...]) -> None:
    """Try clients against a server of the sample model on loopback; exits with 1 where one fails."""
    port = free_port()
    command = [sys.executable, "-m", "api.cli", "serve", "--port", str(port), "--stages", "1", "--no-spare"]
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="clients-") as name, running_server(command, port, 1) as server:
        for program in PROGRAMS:
            if not only or program.name in only:
                place = Place(url=server.url, folder=Path(name) / program.name)
                outcomes.append(try_client(program, place))
    table = table_of("client", "version", "passed")
    console = Console(width=None if Console().is_terminal else WIDTH)
    for outcome in outcomes:
        table.add_row(outcome.name, outcome.version, "yes" if outcome.passed else "no")
        if outcome.log:
            console.print(f"{outcome.name}:\n{outcome.log}\n", markup=False, highlight=False)
    console.print(table)
    if not all(outcome.passed for outcome in outcomes):
        click.get_current_context().exit(1)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.clients")
