"""`python -m benchmarks.checkpoint NAME DIR`: checkpoints of random weights in Hugging Face's format."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec
import torch
import torch.nn.functional as F  # noqa: N812 - torch's usual name
from safetensors.torch import save_file

from weights.checkpoint import SCALE_SUFFIX, RandomCheckpoint, scale_shape
from weights.model_config import FP8_BLOCK, ModelConfig
from weights.sample import SAMPLE_DIR
from weights.sample.architecture import CONFIG, GENERATION_CONFIG

FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
SEED = 0

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")

LINEAR = "_proj"
"""A part of the names of all matrices that DeepSeek-R1 stores as FP8."""

QUANTISATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
}
"""The `quantization_config` of DeepSeek-R1."""


class Size(msgspec.Struct, frozen=True, kw_only=True):
    """The sizes of a model, named as in config.json; the rest is as in the sample model.

    With `is_fp8`, the layers that DeepSeek-R1 stores as FP8 are FP8 too, with a scale for each block.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    first_k_dense_replace: int = 1
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_group: int = 4
    topk_group: int = 2
    is_fp8: bool = False


MINI576 = Size(
    vocab_size=32000,
    hidden_size=1024,
    intermediate_size=2816,
    moe_intermediate_size=512,
    num_hidden_layers=12,
    num_attention_heads=16,
    q_lora_rank=384,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    n_routed_experts=32,
    num_experts_per_tok=4,
)
"""A model with DeepSeek-V3's head sizes, and as many values as two cores read in a twentieth of a second."""

TINY = Size(
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=512,
    moe_intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=8,
    q_lora_rank=96,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=32,
    v_head_dim=32,
    n_routed_experts=16,
    num_experts_per_tok=4,
)
"""A model for the short form, which is loaded in no time."""

SIZES = {
    "mini576": MINI576,
    # About 500 MB.
    "mini576-fp8": msgspec.structs.replace(MINI576, num_hidden_layers=7, is_fp8=True),
    "tiny": TINY,
    "tiny-fp8": msgspec.structs.replace(TINY, is_fp8=True),
}


def write_checkpoint(name: str, directory: Path) -> Path:
    """Writes the model `name` of SIZES with the sample model's tokenizer unless it exists; returns `directory`.

    Weights are bfloat16 (biases of routers float32), or FP8 if the size has `is_fp8`, and follow from SEED alone.
    """
    config = config_keys(SIZES[name])
    marker = directory / "config.json"
    if marker.is_file() and json.loads(marker.read_bytes()) == config:
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    weights = RandomCheckpoint(ModelConfig.from_dict(config, source=name), SEED)
    tensors = dict(_stored_tensors(weights, SIZES[name].is_fp8))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    for file in TOKENIZER_FILES:
        shutil.copyfile(SAMPLE_DIR / file, directory / file)
    (directory / "generation_config.json").write_text(json.dumps(GENERATION_CONFIG), encoding="utf-8")
    # This is written last, so that a directory with it is complete.
    marker.write_text(json.dumps(config, indent=2), encoding="utf-8")
    return directory


def config_keys(size: Size) -> dict[str, object]:
    """The contents of config.json. Random weights draft nothing, so a multi-token-prediction layer is left out."""
    sizes = msgspec.structs.asdict(size)
    quantisation = {"quantization_config": QUANTISATION} if sizes.pop("is_fp8") else {}
    changes = {"num_key_value_heads": size.num_attention_heads, "num_nextn_predict_layers": 0}
    return {**CONFIG, **sizes, **changes, **quantisation}


def _stored_tensors(weights: RandomCheckpoint, is_fp8: bool) -> Iterator[tuple[str, torch.Tensor]]:
    for name in weights.names():
        tensor = weights.tensor(name)
        if is_fp8 and LINEAR in name:
            tensor, scales = quantise(tensor)
            yield name + SCALE_SUFFIX, scales
        yield name, tensor


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Converts a matrix [rows, columns] to float8_e4m3fn, as DeepSeek's FP8 checkpoints store it.

    Returns it with the float32 scales by which its blocks are multiplied when they are read. The largest value of a
    block becomes FP8's largest; no block may be all zeros."""
    rows, columns = weight.shape
    down, across = scale_shape((rows, columns))
    padded = F.pad(weight.float(), (0, across * FP8_BLOCK - columns, 0, down * FP8_BLOCK - rows))
    blocks = padded.view(down, FP8_BLOCK, across, FP8_BLOCK)
    scales = blocks.abs().amax(dim=(1, 3)) / FP8_MAX
    values = (blocks / scales[:, None, :, None]).view(padded.shape)[:rows, :columns]
    return values.to(torch.float8_e4m3fn).contiguous(), scales


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("name", type=click.Choice(sorted(SIZES)))
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
def main(name: str, directory: Path) -> None:
    """Write the model NAME of random weights to DIRECTORY."""
    click.echo(write_checkpoint(name, directory))


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.checkpoint")
