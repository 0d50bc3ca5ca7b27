"""Converting a whole model: once, whatever interrupts it, shared by every plan, and refused where it cannot be."""

import contextlib
import dataclasses
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from api.cli.cache import prune_command
from api.cli.group import main
from stages.backend import ttnn
from stages.converted_weights import ConvertedWeights, ConvertOptions, layer_part, open_conversion
from stages.options import CacheOptions, WeightOptions
from stages.run_config import StateDict, WeightConfig
from stages.tensor_dtypes import WeightDtypes
from tests import ROOT
from tests.support.checkpoints import write_checkpoint
from tests.support.disks import files_of_at_most
from tests.support.stage_driver import Driver, stage_options
from weights.cache.cache import WeightCache
from weights.cache.inventory import cache_entries, remove_entries
from weights.cache.manifest import is_complete
from weights.checkpoint import Checkpoint
from weights.errors import CheckpointError
from weights.model_config import ModelConfig

LAYERS = 8
PARTS = ["embedding", *(f"layer{layer}" for layer in range(LAYERS)), "head"]
KILLS = 5
KILLS_OF_THE_FULL_TEST = 20
DEADLINE_S = 120.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    overrides = {"num_hidden_layers": LAYERS, "hidden_size": 384, "intermediate_size": 1024}
    return write_checkpoint(tmp_path_factory.mktemp("model"), dtype="fp8", shards=3, overrides=overrides)


def options(model: Path, cache: Path) -> ConvertOptions:
    return ConvertOptions(model_path=str(model), cache_dir=str(cache), dtype="bfloat16", seed=0)


def convert(model: Path, cache: Path) -> int:
    """Converts in this process; how many parts had to be."""
    with open_conversion(options(model, cache)) as conversion:
        conversion.run(lambda _: None)
        return len(conversion.missing)


def contents(cache: Path) -> dict[str, bytes]:
    """Every file of a cache but the memory of fingerprints."""
    return {
        str(path.relative_to(cache)): path.read_bytes()
        for path in cache.rglob("*")
        if path.is_file() and ".fingerprints" not in path.parts
    }


def entries(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if not path.name.startswith("."))


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that one conversion filled without a break."""
    cache = tmp_path_factory.mktemp("whole")
    assert convert(model, cache) == LAYERS + 2
    return cache


def test_the_size_said_is_the_size_taken(model: Path, tmp_path: Path) -> None:
    with open_conversion(options(model, tmp_path)) as conversion:
        expected = conversion.bytes
        conversion.run(lambda _: None)
    taken = sum(len(content) for content in contents(tmp_path).values())
    assert expected == pytest.approx(taken, rel=0.02)


def load(model: Path, cache: Path, stages: int) -> None:
    kv_cache = CacheOptions(slots=1, pools=1, blocks=2, block_size=32, max_model_len=64)
    Driver.load(stage_options(model, cache, dtype="bfloat16", cache=kv_cache), stages).close()


def test_every_plan_of_stages_loads_the_same_entries(model: Path, whole: Path) -> None:
    before = contents(whole)
    for stages in (1, 4, 8):
        load(model, whole, stages)
    assert contents(whole) == before


# What an entry stands for


def missing(model: Path, cache: Path, **changes: Any) -> list[str]:
    """The parts that would have to be converted."""
    with open_conversion(msgspec.structs.replace(options(model, cache), **changes)) as conversion:
        return [part.name for part in conversion.missing]


@pytest.mark.parametrize(
    "changes", [{"dtype": "float32"}, {"mesh_shape": (1, 2)}, {"weights": WeightOptions(load_format="dummy")}], ids=str
)
def test_what_was_converted_for_others_is_not_found(model: Path, whole: Path, changes: Mapping[str, Any]) -> None:
    assert missing(model, whole) == []
    # Of random weights there is also the layer that this checkpoint counts but lacks.
    assert missing(model, whole, **changes) == [*PARTS, *(["mtp8"] if "weights" in changes else [])]


def test_a_layer_that_drafts_is_a_part_of_its_own(tmp_path: Path) -> None:
    """The cache of a checkpoint without the layer serves the same one with it, whose other parts are equal."""
    tiny = {"num_hidden_layers": 2, "hidden_size": 128, "vocab_size": 320}
    with_layer = write_checkpoint(tmp_path / "with", overrides=tiny, mtp_layer=True)
    without = shutil.copytree(with_layer, tmp_path / "without")
    tensors = load_file(with_layer / "model.safetensors")
    save_file({name: each for name, each in tensors.items() if ".layers.2." not in name}, without / "model.safetensors")

    cache = tmp_path / "cache"
    assert convert(without, cache) == 4
    assert missing(with_layer, cache) == ["mtp2"]
    keys = json.loads((without / "config.json").read_text())
    (without / "config.json").write_text(json.dumps({**keys, "num_nextn_predict_layers": 0}))
    assert missing(without, cache) == []
    assert convert(with_layer, cache) == 1
    assert len([name for name in entries(cache) if name.startswith("mtp2-embedded-bfloat16-")]) == 1
    assert [entry.key.part for entry in cache_entries(cache) if entry.key is not None][-1] == "mtp2"


@pytest.mark.parametrize(("fact", "value"), [("TRANSFORM_VERSION", 3), ("DEVICE", "ttnn")])
def test_what_was_converted_by_others_is_not_found(
    fact: str, value: object, model: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"stages.converted_weights.{fact}", value)
    assert missing(model, whole) == PARTS


def flip_a_stored_bit(model: Path, tensor: str) -> None:
    """Changes one bit of a tensor in its file, in place."""
    for path in model.glob("*.safetensors"):
        content = path.read_bytes()
        begin = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:begin])
        if tensor in header:
            place = begin + header[tensor]["data_offsets"][0]
            with path.open("r+b") as file:
                file.seek(place)
                file.write(bytes([content[place] ^ 1]))


def test_of_a_changed_checkpoint_the_changed_layer_is_converted_again(model: Path, whole: Path, tmp_path: Path) -> None:
    changed, cache = shutil.copytree(model, tmp_path / "model"), shutil.copytree(whole, tmp_path / "cache")
    assert missing(changed, cache) == []
    flip_a_stored_bit(changed, "model.layers.3.self_attn.o_proj.weight")
    assert missing(changed, cache) == ["layer3"]
    load(changed, cache, 2)
    assert missing(changed, cache) == missing(model, cache) == []
    convert(changed, tmp_path / "fresh")
    [new] = set(entries(tmp_path / "fresh")) - set(entries(whole))
    assert contents(cache / new) == contents(tmp_path / "fresh" / new)
    config = (changed / "config.json").read_text()
    (changed / "config.json").write_text(config.replace('"routed_scaling_factor": 2.5', '"routed_scaling_factor": 1.5'))
    assert missing(changed, cache) == PARTS


@pytest.mark.parametrize(("layer", "is_refused"), [(1, True), (2, False)])
def test_a_layer_that_changes_while_it_is_converted_is_not_kept(
    layer: int, is_refused: bool, model: Path, tmp_path: Path
) -> None:
    source = Checkpoint.open(shutil.copytree(model, tmp_path / "model"))
    mesh_device = ttnn.open_mesh_device(ttnn.MeshShape(1, 1))
    weights = ConvertedWeights(source, WeightCache(tmp_path / "cache"), "bfloat16", mesh_device)
    part = layer_part(source.config, 1)

    def convert_slowly(
        config: ModelConfig, state_dict: StateDict, path: Path, mesh_device: ttnn.MeshDevice, dtypes: WeightDtypes
    ) -> WeightConfig:
        files = part.convert(config, state_dict, path, mesh_device, dtypes)
        flip_a_stored_bit(tmp_path / "model", f"model.layers.{layer}.self_attn.o_proj.weight")
        return files

    slow = dataclasses.replace(part, convert=convert_slowly)
    if is_refused:
        with pytest.raises(CheckpointError, match="The checkpoint changed while layer1 was converted from it"):
            weights.load(slow)
        assert entries(tmp_path / "cache") == []
    else:
        weights.load(slow)
        assert len(entries(tmp_path / "cache")) == 1
    ttnn.close_mesh_device(mesh_device)


def test_a_damaged_entry_is_not_loaded(model: Path, whole: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(whole, tmp_path / "cache")
    flip_a_bit(cache / entries(cache)[4])
    assert contents(cache) != contents(whole)
    load(model, cache, 2)
    assert contents(cache) == contents(whole)


# Whatever interrupts it


def files_in(cache: Path) -> int:
    """Files and directories below a cache that another process may be changing: os.walk passes over what is gone."""
    return sum(len(directories) + len(files) for _, directories, files in os.walk(cache))


class Conversion:
    """`galaxyline convert` as a process of its own, which does not outlive its block."""

    def __init__(self, model: Path, cache: Path) -> None:
        command = [sys.executable, "-m", "api.cli", "convert", str(model), "--cache-dir", str(cache)]
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def __enter__(self) -> "Conversion":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate(timeout=DEADLINE_S)

    def wait(self) -> None:
        _, log = self._process.communicate(timeout=DEADLINE_S)
        assert self._process.returncode == 0, log.decode()

    def kill_at(self, cache: Path, files: int) -> bool:
        """SIGKILL as soon as the cache has so many files; whether that was before the conversion ended."""
        deadline = time.monotonic() + DEADLINE_S
        while self._process.poll() is None and files_in(cache) < files:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        self._process.send_signal(signal.SIGKILL)
        self._process.communicate(timeout=DEADLINE_S)
        return self._process.returncode == -signal.SIGKILL


def check_resumption(model: Path, cache: Path, whole: Path, kills: int) -> None:
    """Kills conversions at random moments from their first write on, each going on where the last one stopped."""
    moments = random.Random(7)
    killed = 0
    for _ in range(kills):
        files = files_in(cache) + moments.randrange(1, 25)
        with Conversion(model, cache) as conversion:
            killed += conversion.kill_at(cache, files)
        complete = entries(cache)
        # Whatever is there under its name is whole.
        assert all(contents(whole / name) == contents(cache / name) for name in complete)
        if len(complete) == LAYERS + 2:
            for name in moments.sample(complete, 6):
                (cache / name).rename(cache / f".{name}")
    assert killed >= kills // 2
    with Conversion(model, cache) as conversion:
        conversion.wait()
    for name in entries(whole):
        assert contents(cache / name) == contents(whole / name)
    assert not list(cache.glob(".building-*"))


@pytest.mark.slow
def test_a_conversion_that_is_killed_goes_on_where_it_stopped(model: Path, whole: Path, tmp_path: Path) -> None:
    check_resumption(model, tmp_path, whole, KILLS)


@pytest.mark.slow
@pytest.mark.skipif("GALAXYLINE_FULL" not in os.environ, reason="the full form of the test above: GALAXYLINE_FULL=1")
def test_a_conversion_that_is_killed_twenty_times(model: Path, whole: Path, tmp_path: Path) -> None:
    check_resumption(model, tmp_path, whole, KILLS_OF_THE_FULL_TEST)


@pytest.mark.slow
def test_two_conversions_at_once_make_one_cache(model: Path, whole: Path, tmp_path: Path) -> None:
    with Conversion(model, tmp_path) as first, Conversion(model, tmp_path) as second:
        first.wait()
        second.wait()
    assert contents(tmp_path) == contents(whole)


# The commands


def run(*arguments: str, **environment: str) -> Result:
    # Not in the cache of whoever runs the tests.
    return CliRunner().invoke(main, list(arguments), env={"COLUMNS": None, **environment})


def test_convert_says_what_it_takes_before_it_begins(model: Path, tmp_path: Path) -> None:
    result = run("convert", str(model), "--cache-dir", str(tmp_path))
    assert result.exit_code == 0, result.output
    before, after = result.stdout.splitlines()
    assert f"has {LAYERS + 2} parts, {LAYERS + 2} of them to be converted: they take about" in before
    assert f"are free at {tmp_path}." in before
    assert after == f"All {LAYERS + 2} parts are in {tmp_path}."
    again = run("convert", str(model), "--cache-dir", str(tmp_path))
    done = f"Nothing is to be done: all {LAYERS + 2} parts of {model.name} are in {tmp_path} already.\n"
    assert (again.stdout, "converting" in again.stderr) == (done, False)


def test_what_does_not_fit_the_disk_is_not_begun(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WeightCache, "free_bytes", lambda _: 1000)
    result = run("convert", str(model), "--cache-dir", str(tmp_path / "cache"))
    assert result.exit_code == 1
    assert "has no room for that: free" in result.stderr
    assert "Traceback" not in result.output
    # Fingerprints of files that are old enough are remembered there.
    assert [path.name for path in tmp_path.glob("cache/[!.]*")] == []


def test_a_disk_that_fills_up_is_one_sentence_and_what_is_done_stays(model: Path, whole: Path, tmp_path: Path) -> None:
    with files_of_at_most(500_000):
        result = run("convert", str(model), "--cache-dir", str(tmp_path))
    assert result.exit_code == 1
    assert "Error: Cannot fill the weight cache at" in result.stderr.splitlines()[-1]
    assert result.stderr.endswith("; free space there, or choose another cache directory: File too large.\n")
    assert "Traceback" not in result.output
    [embedding] = entries(tmp_path)
    inode = (tmp_path / embedding).stat().st_ino
    assert not list(tmp_path.glob(".building-*"))
    again = run("convert", str(model), "--cache-dir", str(tmp_path))
    assert f"has {LAYERS + 2} parts, {LAYERS + 1} of them to be converted" in again.stdout
    assert contents(tmp_path) == contents(whole)
    assert (tmp_path / embedding).stat().st_ino == inode


def test_a_model_that_is_none_is_one_sentence(tmp_path: Path) -> None:
    result = run("convert", str(tmp_path / "absent"))
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "Model path does not exist" in result.stderr


def test_the_name_of_a_plan_is_told_from_a_model_with_weights() -> None:
    result = run("convert", "R1")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "r1 is a name for `galaxyline plan` and for --device timed, which need no weights" in result.stderr


@pytest.fixture
def filled(tmp_path: Path, whole: Path) -> Path:
    """A cache of three entries, and a directory that is none."""
    for name in entries(whole)[:3]:
        (tmp_path / name).mkdir(parents=True)
        for relative, content in contents(whole / name).items():
            (tmp_path / name / relative).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / relative).write_bytes(content)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    return tmp_path


def test_list_names_every_entry(filled: Path) -> None:
    result = run("cache", "list", "--cache-dir", str(filled))
    assert result.exit_code == 0
    assert result.stdout.count("complete") == 3
    assert "embedding" in result.stdout
    assert "no cache entry" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("4 entries, ")


def test_an_empty_cache_is_listed_verified_and_pruned(tmp_path: Path) -> None:
    none = tmp_path / "none"
    for command in ("list", "verify", "prune"):
        told = run("cache", command, "--cache-dir", str(none))
        assert (told.exit_code, told.stdout) == (
            0,
            f"No weight cache is at {none}: it is made with the first model that is converted or served.\n",
        )
    assert not none.exists()
    assert run("cache", "list", "--cache-dir", str(tmp_path)).stdout == f"Nothing is in {tmp_path}.\n"
    assert run("cache", "verify", "--cache-dir", str(tmp_path)).stdout == f"Nothing is to be checked in {tmp_path}.\n"
    assert run("cache", "prune", "--cache-dir", str(tmp_path)).stdout == f"Nothing is to be removed from {tmp_path}.\n"


def test_what_another_process_removes_meanwhile_is_left_out(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = entries(filled)

    def remove_the_last(path: Path) -> bool:
        shutil.rmtree(filled / names[-1], ignore_errors=True)
        return is_complete(path)

    before = cache_entries(filled)
    monkeypatch.setattr("weights.cache.inventory.is_complete", remove_the_last)
    assert [entry.path.name for entry in cache_entries(filled)] == names[:-1]
    remove_entries(filled, before)
    assert entries(filled) == []


def flip_a_bit(entry: Path) -> Path:
    largest = max((path for path in entry.rglob("*.tensorbin")), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[-7] ^= 4
    largest.write_bytes(content)
    return largest


def test_verify_names_what_is_damaged(filled: Path) -> None:
    assert run("cache", "verify", "--cache-dir", str(filled)).exit_code == 0
    damaged = flip_a_bit(filled / entries(filled)[1])
    result = run("cache", "verify", "--cache-dir", str(filled))
    assert result.exit_code == 1
    assert f"{entries(filled)[1]} is damaged: " in result.stdout
    assert damaged.name in result.stdout
    assert "2 of 3 entries" in result.stdout


def test_prune_removes_what_cannot_be_used_and_nothing_else(filled: Path) -> None:
    names = entries(filled)
    flip_a_bit(filled / names[0])
    (filled / names[1]).rename(filled / names[1].replace("-v2-", "-v1-"))
    dry = run("cache", "prune", "--dry-run", "--cache-dir", str(filled))
    assert dry.stdout.count("would remove") == 2
    assert len(entries(filled)) == 4
    result = run("cache", "prune", "--cache-dir", str(filled))
    assert result.stdout.count("removing") == 2
    assert entries(filled) == sorted([names[2], "notes"])


def test_prune_by_age_and_prune_all(filled: Path) -> None:
    names = entries(filled)
    os.utime(filled / names[0] / "manifest.json", (1e9, 1e9))
    old = run("cache", "prune", "--older-than", "30", "--cache-dir", str(filled))
    assert old.stdout.splitlines()[-1].startswith("1 entry, ")
    assert entries(filled) == names[1:]
    assert run("cache", "prune", "--all", "--yes", "--cache-dir", str(filled)).exit_code == 0
    assert entries(filled) == ["notes"]


def test_prune_all_asks_and_without_a_terminal_refuses(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = entries(filled)
    refusal = run("cache", "prune", "--all", "--cache-dir", str(filled))
    assert (refusal.exit_code, entries(filled)) == (2, before)
    assert refusal.stderr.endswith(f", from {filled}: add --yes where no terminal can ask.\n")
    assert run("cache", "prune", "--all", "--dry-run", "--cache-dir", str(filled)).exit_code == 0
    monkeypatch.setattr("api.cli.cache.sys.stdin", Terminal())
    prune = prune_command.callback
    assert prune is not None
    for answer, left in ((False, before), (True, ["notes"])):
        monkeypatch.setattr("click.confirm", functools.partial(confirm, answer))
        with contextlib.suppress(click.Abort):
            prune(filled, None, True, False, False)
        assert entries(filled) == left


class Terminal:
    """A standard input at which somebody sits."""

    def isatty(self) -> bool:
        return True


def confirm(answer: bool, question: str, **_: object) -> None:
    """What click.confirm does where somebody answers."""
    assert question.startswith("Remove 3 entries, ")
    if not answer:
        raise click.Abort


def test_what_verify_finds_is_what_list_shows_and_convert_mends(model: Path, whole: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(whole, tmp_path / "cache")
    flip_a_bit(cache / entries(cache)[1])
    assert missing(model, cache) == []
    assert states(cache).count("damaged") == 0
    assert run("cache", "verify", "--cache-dir", str(cache)).exit_code == 1
    assert states(cache).count("damaged") == 1
    assert "damaged" in run("cache", "list", "--cache-dir", str(cache)).stdout
    assert len(missing(model, cache)) == 1
    convert(model, cache)
    assert run("cache", "verify", "--cache-dir", str(cache)).exit_code == 0
    assert states(cache) == ["complete"] * (LAYERS + 2)
    assert contents(cache) == contents(whole)


def states(cache: Path) -> list[str]:
    """The states that `cache list --json` gives."""
    return [entry["state"] for entry in listed(cache)]


def listed(cache: Path) -> list[dict[str, Any]]:
    result = run("cache", "list", "--json", "--cache-dir", str(cache))
    assert result.exit_code == 0, result.output
    content: list[dict[str, Any]] = json.loads(result.stdout)["entries"]
    return content


def test_list_names_the_model_of_an_entry_where_it_is_known(model: Path, whole: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(whole, tmp_path / "cache")
    assert {entry["model"] for entry in listed(cache)} == {model.name}
    # An entry of before models were named.
    manifest = cache / entries(cache)[0] / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["model"]
    manifest.write_text(json.dumps(content))
    assert missing(model, cache) == []
    assert [entry["model"] for entry in listed(cache)] == ["", *[model.name] * (LAYERS + 1)]
    assert "complete" in run("cache", "list", "--cache-dir", str(cache), COLUMNS="60").stdout


@pytest.mark.parametrize("columns", [40, 60, 80])
def test_list_cuts_nothing_where_the_console_is_narrow(columns: int, filled: Path) -> None:
    narrow = run("cache", "list", "--cache-dir", str(filled), COLUMNS=str(columns)).stdout
    assert "…" not in narrow
    for entry in listed(filled):
        assert all(part in narrow for part in (entry["fingerprint"][:12], entry["last_used"], entry["state"]))


def test_a_cache_that_cannot_be_written_is_told_before_anything_is_read(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = run("convert", str(model), "--cache-dir", str(tmp_path / "file" / "cache"))
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        f"Error: --cache-dir '{tmp_path}/file/cache' cannot be written: Not a directory. Choose another directory."
    ]
