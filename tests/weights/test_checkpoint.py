"""Reading checkpoints: values against safetensors' own loader, memory, fingerprints, and every refusal."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.checkpoints import ScaleFormat, StoredDtype, reference_model, stored_tensors, write_checkpoint
from weights.checkpoint import Checkpoint, RandomCheckpoint, open_weights
from weights.errors import CheckpointError

LAYER = "model.layers.1."
DRAFT = "model.layers.3."
"""The multi-token-prediction layer of the default model."""
COPIES = {DRAFT + "embed_tokens.weight", DRAFT + "shared_head.head.weight"}
"""What a checkpoint has of the model's embedding and head in that layer."""
FP8_TENSOR = LAYER + "self_attn.o_proj.weight"
SCALES = FP8_TENSOR + "_scale_inv"


@pytest.fixture(scope="module", params=[("bfloat16", 1), ("float32", 2), ("fp8", 3)], ids=lambda param: param[0])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    dtype, shards = request.param
    return write_checkpoint(tmp_path_factory.mktemp(dtype), dtype=dtype, shards=shards, mtp_layer=True)


@pytest.fixture
def fp8(tmp_path: Path) -> Path:
    """An FP8 checkpoint in one file, for spoiling."""
    return write_checkpoint(tmp_path / "model", dtype="fp8")


def change(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Rewrites model.safetensors after an edit of its tensors."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path / "model.safetensors").items()}
    edit(tensors)
    save_file(tensors, path / "model.safetensors")


def test_every_tensor_equals_what_safetensors_own_loader_reads(model: Path) -> None:
    checkpoint = Checkpoint.open(model)
    expected = {name: values for name, values in stored_tensors(model).items() if name not in COPIES}
    assert checkpoint.names() == sorted(expected)
    for name, values in expected.items():
        assert torch.equal(checkpoint.tensor(name).to(torch.float32), values), name


def test_the_names_are_those_that_transformers_needs(model: Path) -> None:
    needed = {name for name in reference_model(model).state_dict() if ".experts." not in name}
    found = {name for name in Checkpoint.open(model).names() if ".experts." not in name}
    assert {name for name in found if not name.startswith(DRAFT)} == needed


@pytest.mark.parametrize(("dtype", "expected"), [("fp8", torch.float32), ("bfloat16", torch.bfloat16)])
def test_fp8_becomes_float32_and_other_dtypes_stay(tmp_path: Path, dtype: StoredDtype, expected: torch.dtype) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, dtype=dtype))
    assert checkpoint.tensor(FP8_TENSOR).dtype == expected
    assert checkpoint.tensor("model.norm.weight").dtype == torch.bfloat16
    assert checkpoint.tensor(LAYER + "mlp.gate.e_score_correction_bias").dtype == torch.float32


def test_a_stage_opens_only_the_shards_it_owns(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, shards=4)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    own = {file for name, file in index.items() if name.startswith("model.layers.0.")}
    others = set(index.values()) - own
    assert others
    for file in others:
        (tmp_path / file).write_bytes(b"damaged")
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.validate("model.layers.0.")
    checkpoint.fingerprint("model.layers.0.")
    assert len(checkpoint.view("model.layers.0.")) == len(list(checkpoint.view("model.layers.0.").values()))
    with pytest.raises(CheckpointError, match="is truncated or damaged"):
        checkpoint.validate("model.")


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, overrides={"tie_word_embeddings": True})
    checkpoint = Checkpoint.open(tmp_path)
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    assert "lm_head.weight" in checkpoint.names()
    assert torch.equal(checkpoint.tensor("lm_head.weight"), embedding)
    checkpoint.validate("lm_head.")
    assert checkpoint.fingerprint("lm_head.") != checkpoint.fingerprint("model.embed_tokens.")


def test_an_untied_head_must_be_stored(fp8: Path) -> None:
    change(fp8, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"model\.safetensors lists no tensor 'lm_head\.weight'"):
        Checkpoint.open(fp8).tensor("lm_head.weight")


def test_a_scope_is_a_mapping_of_relative_names(model: Path) -> None:
    checkpoint = Checkpoint.open(model)
    scope = checkpoint.view(LAYER + "mlp.experts.3.")
    assert list(scope) == ["down_proj.weight", "gate_proj.weight", "up_proj.weight"]
    assert len(scope) == 3
    assert "up_proj.weight" in scope
    assert "bias" not in scope
    assert object() not in scope
    assert torch.equal(scope["up_proj.weight"], checkpoint.tensor(LAYER + "mlp.experts.3.up_proj.weight"))
    with pytest.raises(CheckpointError, match="bias"):
        scope["bias"]


def test_a_scope_lists_only_what_is_present(fp8: Path) -> None:
    change(fp8, lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight"))
    assert list(Checkpoint.open(fp8).view("model.layers.0.mlp.")) == ["down_proj.weight", "gate_proj.weight"]


def test_open_weights_chooses_by_load_format(fp8: Path) -> None:
    assert isinstance(open_weights(fp8, load_format="auto", seed=0), Checkpoint)
    (fp8 / "model.safetensors").unlink()
    assert isinstance(open_weights(fp8, load_format="dummy", seed=0), RandomCheckpoint)


@pytest.mark.parametrize("scale_format", ["ue8m0", "e8m0"])
def test_scales_that_are_powers_of_two_are_read_in_either_dtype(scale_format: ScaleFormat, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model", dtype="fp8", scale_format=scale_format, mtp_layer=True)
    checkpoint, expected = Checkpoint.open(path), stored_tensors(path)
    checkpoint.validate("")
    assert all(torch.equal(checkpoint.tensor(name).float(), expected[name]) for name in checkpoint.names())
    assert fingerprint(path)


# Fingerprints


def fingerprint(path: Path) -> str:
    return Checkpoint.open(path).fingerprint(LAYER)


def test_a_fingerprint_does_not_depend_on_place_or_sharding(tmp_path: Path) -> None:
    one = write_checkpoint(tmp_path / "one", dtype="fp8")
    three = write_checkpoint(tmp_path / "three", dtype="fp8", shards=3, mtp_layer=False)
    assert fingerprint(one) == fingerprint(three)
    checkpoint = Checkpoint.open(one)
    assert checkpoint.fingerprint("model.layers.0.", LAYER) == checkpoint.fingerprint(LAYER, "model.layers.0.", LAYER)


def flip_last_bit(tensor: torch.Tensor) -> None:
    tensor.view(torch.uint8).view(-1)[-1] ^= 1


@pytest.mark.parametrize("name", [FP8_TENSOR, SCALES, LAYER + "input_layernorm.weight"])
def test_one_changed_bit_changes_the_fingerprint(fp8: Path, name: str) -> None:
    before = fingerprint(fp8)
    change(fp8, lambda tensors: flip_last_bit(tensors[name]))
    assert fingerprint(fp8) != before


def test_two_tensors_swapped_change_the_fingerprint(fp8: Path) -> None:
    def swap(tensors: dict[str, torch.Tensor]) -> None:
        gate, up = (f"{LAYER}mlp.experts.0.{part}_proj.weight" for part in ("gate", "up"))
        tensors[gate], tensors[up] = tensors[up], tensors[gate]

    before = fingerprint(fp8)
    change(fp8, swap)
    assert fingerprint(fp8) != before


def test_the_config_is_part_of_the_fingerprint(fp8: Path) -> None:
    before = fingerprint(fp8)
    keys = json.loads((fp8 / "config.json").read_text())
    (fp8 / "config.json").write_text(json.dumps({**keys, "routed_scaling_factor": 1.0}))
    assert fingerprint(fp8) != before


def test_other_layers_are_no_part_of_the_fingerprint(fp8: Path) -> None:
    before = fingerprint(fp8)
    change(fp8, lambda tensors: flip_last_bit(tensors["model.layers.0.input_layernorm.weight"]))
    assert fingerprint(fp8) == before


def test_a_prefix_that_begins_no_tensor_is_refused(fp8: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tensor of the model begins with 'model\.layers\.7\.'"):
        Checkpoint.open(fp8).fingerprint("model.layers.7.")


# Refusals


def test_paths_that_hold_no_checkpoint_are_refused(tmp_path: Path) -> None:
    missing, file, empty = tmp_path / "missing", tmp_path / "file", tmp_path / "empty"
    file.touch()
    empty.mkdir()
    sentences = {
        missing: f"Model path does not exist: '{missing}'.",
        file: f"Model path is not a directory: '{file}'.",
        empty: f"config.json not found in the model directory. Checked: '{empty}'.",
        tmp_path / ("n" * 300): f"Cannot read the model path '{tmp_path / ('n' * 300)}': File name too long.",
    }
    for path, sentence in sentences.items():
        with pytest.raises(CheckpointError) as refusal:
            Checkpoint.open(path)
        assert str(refusal.value) == sentence


def test_a_directory_without_weights_is_refused(fp8: Path) -> None:
    (fp8 / "model.safetensors").rename(fp8 / "part-1.safetensors")
    with pytest.raises(CheckpointError) as unlisted:
        Checkpoint.open(fp8)
    assert str(unlisted.value) == f"{fp8} holds neither model.safetensors nor model.safetensors.index.json."
    (fp8 / "part-1.safetensors").unlink()
    with pytest.raises(CheckpointError) as refusal:
        Checkpoint.open(fp8)
    assert str(refusal.value) == f"No .safetensors files found in the model directory. Checked: '{fp8}'."


def test_another_model_is_refused(fp8: Path) -> None:
    (fp8 / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match=r"config\.json: model_type is 'llama'"):
        Checkpoint.open(fp8)


@pytest.mark.parametrize("name", [LAYER + "mlp.gate.weight", SCALES])
def test_a_missing_tensor_is_named(fp8: Path, name: str) -> None:
    change(fp8, lambda tensors: tensors.pop(name))
    checkpoint = Checkpoint.open(fp8)
    checkpoint.validate("model.layers.0.", "lm_head.")
    reads: list[Callable[[], object]] = [
        lambda: checkpoint.tensor(name.removesuffix("_scale_inv")),
        lambda: checkpoint.validate(LAYER),
        lambda: checkpoint.fingerprint(LAYER),
    ]
    for read in reads:
        with pytest.raises(CheckpointError) as refusal:
            read()
        assert str(refusal.value) == f"{fp8 / 'model.safetensors'} lists no tensor '{name}'."


@pytest.mark.parametrize(
    ("name", "tensor", "sentence"),
    [
        (FP8_TENSOR, torch.zeros(256, 255), "has shape [256, 255]; config.json asks for [256, 256]"),
        (LAYER + "mlp.gate.weight", torch.zeros(16 * 256), "has shape [4096]; config.json asks for [16, 256]"),
        (SCALES, torch.ones(2, 1), "has shape [2, 1]; config.json asks for [2, 2]"),
        (SCALES, torch.ones(2, 2, dtype=torch.bfloat16), "has dtype BF16; scales must be float32 (F32)"),
        (SCALES, torch.full((2, 2), torch.inf), "holds scales that are not finite"),
        (
            SCALES,
            torch.full((2, 2), 0xFF, dtype=torch.uint8).view(torch.float8_e8m0fnu),
            "holds scales that are not finite",
        ),
        (LAYER + "mlp.gate.weight", torch.zeros(16, 256, dtype=torch.int8), "has dtype I8; float32, bfloat16"),
        (LAYER + "mlp.gate.weight", torch.zeros(16, 256).to(torch.float8_e5m2), "has dtype F8_E5M2; float32, bfloat16"),
        (LAYER + "input_layernorm.weight", torch.ones(256).to(torch.float8_e4m3fn), "has dtype F8_E4M3; float32"),
    ],
)
def test_a_wrong_tensor_is_named(fp8: Path, name: str, tensor: torch.Tensor, sentence: str) -> None:
    change(fp8, lambda tensors: tensors.update({name: tensor}))
    checkpoint = Checkpoint.open(fp8)
    with pytest.raises(CheckpointError) as refusal:
        checkpoint.tensor(name.removesuffix("_scale_inv"))
    assert str(refusal.value).startswith(f"{fp8 / 'model.safetensors'}: '{name}' {sentence}")
    if "finite" not in sentence:
        with pytest.raises(CheckpointError) as refusal:
            checkpoint.validate(LAYER)
        assert f"'{name}' {sentence}" in str(refusal.value)


def header_changed(before: bytes, after: bytes) -> Callable[[bytes], bytes]:
    return lambda content: content.replace(before, after, 1)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[: len(content) // 2],
        lambda content: content[:5],
        lambda content: b"",
        lambda content: content + b"more",
        lambda content: (200_000_000).to_bytes(8, "little") + content[8:],
        header_changed(b'"F8_E4M3"', b'"F8_E4M4"'),
        header_changed(b'"data_offsets":[', b'"data_offsets":{'),
        header_changed(b'"shape":[', b'"shape":[9'),
    ],
    ids=["last byte", "half", "head", "empty", "longer", "huge header", "dtype", "JSON", "shape"],
)
def test_a_damaged_file_is_named(fp8: Path, damage: Callable[[bytes], bytes]) -> None:
    file = fp8 / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError) as refusal:
        Checkpoint.open(fp8)
    assert str(refusal.value).startswith(f"{file} is truncated or damaged: ")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", dtype="fp8", shards=2)


def test_an_absent_shard_is_named(sharded: Path) -> None:
    shard = sharded / "model-00002-of-00002.safetensors"
    shard.unlink()
    checkpoint = Checkpoint.open(sharded)
    with pytest.raises(CheckpointError) as refusal:
        checkpoint.tensor("lm_head.weight")
    assert str(refusal.value) == f"{shard} does not exist, though model.safetensors.index.json names it."


def test_a_shard_that_is_a_directory_is_named(sharded: Path) -> None:
    shard = sharded / "model-00002-of-00002.safetensors"
    shard.unlink()
    shard.mkdir()
    with pytest.raises(CheckpointError) as refusal:
        Checkpoint.open(sharded).tensor("lm_head.weight")
    assert str(refusal.value).startswith(f"Cannot read {shard}: ")


def rewrite_index(path: Path, **files: str) -> Path:
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"].update(files)
    index.write_text(json.dumps(content))
    return index


def test_an_index_that_points_to_the_wrong_shard_is_contradicted(sharded: Path) -> None:
    rewrite_index(sharded, **{"lm_head.weight": "model-00001-of-00002.safetensors"})
    with pytest.raises(CheckpointError) as refusal:
        Checkpoint.open(sharded).tensor("lm_head.weight")
    shard = sharded / "model-00001-of-00002.safetensors"
    assert str(refusal.value) == (
        f"{shard} does not hold 'lm_head.weight', though model.safetensors.index.json says so."
    )


@pytest.mark.parametrize(
    "shard", ["../secret.safetensors", "/etc/passwd", "sub/model.safetensors", "", "..", "\0.safetensors"]
)
def test_an_index_cannot_point_out_of_its_directory(sharded: Path, shard: str) -> None:
    index = rewrite_index(sharded, **{"lm_head.weight": shard})
    with pytest.raises(CheckpointError) as refusal:
        Checkpoint.open(sharded)
    assert str(refusal.value) == f"{index} names the shard {shard!r}, which is not a .safetensors file beside it."


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": {"a": 1}}', "[" * 100_000, "\xff"])
def test_a_bad_index_is_named(sharded: Path, text: str) -> None:
    index = sharded / "model.safetensors.index.json"
    index.write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError) as refusal:
        Checkpoint.open(sharded)
    assert str(refusal.value).startswith(f"{index} is not an index of shards: ")


def test_an_index_of_absurd_size_is_not_read(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    with index.open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match="is larger than 67108864 bytes: it is not an index of shards"):
        Checkpoint.open(sharded)


# Memory


MEMORY = """
import sys, torch
from pathlib import Path
from weights.checkpoint import Checkpoint

def anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))

torch.set_num_threads(1)
checkpoint = Checkpoint.open(Path(sys.argv[1]))
checkpoint.tensor("model.norm.weight").view(torch.int16).max()
before = anonymous()
tensors = dict(checkpoint.view("model."))
for tensor in tensors.values():
    tensor.view(torch.int16).max()
held = anonymous() - before
checkpoint.fingerprint("")
print(sum(tensor.numel() * 2 for tensor in tensors.values()) / 2**20, held, anonymous() - before)
"""


def test_reading_and_hashing_leave_tensors_in_mapped_memory(tmp_path: Path) -> None:
    overrides = {"vocab_size": 200_000, "tie_word_embeddings": True, "num_nextn_predict_layers": 0}
    write_checkpoint(tmp_path, overrides=overrides)
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    megabytes, held, hashed = map(float, run.stdout.split())
    assert megabytes > 90
    assert held < 8
    assert hashed < 8
