"""`python -m benchmarks.checkpoint NAME DIR`: models of random weights to measure with, as Hugging Face stores them."""

import json
import shutil
from pathlib import Path

import click
import msgspec
from safetensors.torch import save_file

from weights.model_config import ModelConfig
from weights.random import RandomCheckpoint
from weights.sample import SAMPLE_DIR
from weights.sample.architecture import CONFIG, GENERATION_CONFIG

SEED = 0
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


class Size(msgspec.Struct, frozen=True, kw_only=True):
    """What a model has under the names of config.json; the rest is as in the sample model."""

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


SIZES = {
    # DeepSeek-V3's head sizes, and as many values as two cores read in a twentieth of a second.
    "mini576": Size(
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
    ),
    # For the short form: loaded in no time.
    "tiny": Size(
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
    ),
}


def write_checkpoint(name: str, directory: Path) -> Path:
    """Writes the model `name` of SIZES, with the sample model's tokenizer, unless it is there; returns `directory`.

    Weights are bfloat16 (biases of routers float32) and follow from SEED alone.
    """
    config = config_keys(SIZES[name])
    marker = directory / "config.json"
    if marker.is_file() and json.loads(marker.read_bytes()) == config:
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    weights = RandomCheckpoint(ModelConfig.from_dict(config, source=name), SEED)
    tensors = {tensor: weights.tensor(tensor) for tensor in weights.names()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    for file in TOKENIZER_FILES:
        shutil.copyfile(SAMPLE_DIR / file, directory / file)
    (directory / "generation_config.json").write_text(json.dumps(GENERATION_CONFIG), encoding="utf-8")
    # Last, so that a directory with it is whole.
    marker.write_text(json.dumps(config, indent=2), encoding="utf-8")
    return directory


def config_keys(size: Size) -> dict[str, object]:
    """The keys of config.json."""
    sizes = msgspec.structs.asdict(size)
    return {**CONFIG, **sizes, "num_key_value_heads": size.num_attention_heads}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("name", type=click.Choice(sorted(SIZES)))
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
def main(name: str, directory: Path) -> None:
    """Write the model NAME of random weights to DIRECTORY."""
    click.echo(write_checkpoint(name, directory))


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.checkpoint")
