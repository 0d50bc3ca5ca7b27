"""The configuration of a model of DeepSeek-V3's family: the keys of its config.json that change the computation."""

import json
import math
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import msgspec

from weights.errors import CheckpointError
from weights.sample import SAMPLE_DIR, SAMPLE_NAME

CONFIG_FILE_BYTES_MAX = 1 << 20

FP8_BLOCK = 128
"""Edge of the blocks of FP8 values that share a scale: `weight_block_size` in DeepSeek's quantization_config."""

MODEL_TYPES = {"deepseek_v3": "DeepseekV3ForCausalLM", "kimi_k2": "DeepseekV3ForCausalLM"}
"""The architecture, by transformers' name, of each `model_type` that can be served."""

POSITIVE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("moe_intermediate_size", "n_shared_experts", "n_routed_experts", "num_experts_per_tok", "n_group", "topk_group"),
    *("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    *("max_position_embeddings", "rms_norm_eps", "rope_theta", "routed_scaling_factor"),
)
"""Sizes and constants of a config.json that must be above zero."""


@runtime_checkable
class HuggingFaceConfig(Protocol):
    """The part of a transformers configuration object that we use."""

    def to_dict(self) -> dict[str, Any]:
        """Returns all keys, as in config.json."""


class Yarn(msgspec.Struct, frozen=True, kw_only=True):
    """YaRN's parameters (arXiv:2309.00071), under the names of DeepSeek's config.json."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0


class ConfigChanges(msgspec.Struct, frozen=True, kw_only=True):
    """The layers of a model that a run uses: the first `num_hidden_layers`, of which `first_k_dense_replace` are dense.

    None leaves the number of config.json. Another number of dense layers works with random weights only.
    """

    num_hidden_layers: int | None = None
    first_k_dense_replace: int | None = None


UNCHANGED = ConfigChanges()


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Sizes and constants of one model of DeepSeek-V3's family, under the names of its config.json.

    `yarn` is None where the rope is not scaled. `num_nextn_predict_layers` counts the multi-token-prediction layers
    behind the others, of which the first is used. What is the default is left out of encodings where that keeps cache
    keys as they are. Everything is checked on construction by `from_dict`.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    n_shared_experts: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    routed_scaling_factor: float
    norm_topk_prob: bool
    first_k_dense_replace: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope_theta: float
    yarn: Yarn | None
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    architecture: str = "DeepseekV3ForCausalLM"
    num_nextn_predict_layers: int = 0

    @property
    def qk_head_dim(self) -> int:
        """Values that a head compares: the part without and the part with rotary positions."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def kv_dim(self) -> int:
        """Values the latent KV cache keeps for each token and layer."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """qk_head_dim^-0.5, times mscale squared under YaRN (modeling_deepseek.py, DeepseekV3Attention)."""
        scale: float = self.qk_head_dim**-0.5
        if self.yarn is not None and self.yarn.mscale_all_dim:
            scale *= yarn_mscale(self.yarn.factor, self.yarn.mscale_all_dim) ** 2
        return scale

    def is_moe(self, layer: int) -> bool:
        """Whether the layer's feed-forward part is a mixture of experts."""
        return layer >= self.first_k_dense_replace

    @property
    def without_drafts(self) -> "ModelConfig":
        """The configuration without multi-token-prediction layers, which no weight of the model depends on."""
        return msgspec.structs.replace(self, num_nextn_predict_layers=0)

    def changed(self, changes: "ConfigChanges") -> "ModelConfig":
        """Returns the configuration with other layers. Raises CheckpointError where the model has fewer.

        A model of fewer layers has no multi-token-prediction layer: that reads the hidden states of the last of all.
        """
        layers = self.num_hidden_layers if changes.num_hidden_layers is None else changes.num_hidden_layers
        dense = self.first_k_dense_replace if changes.first_k_dense_replace is None else changes.first_k_dense_replace
        if not 1 <= layers <= self.num_hidden_layers:
            raise CheckpointError(f"The model has {self.num_hidden_layers} layers: {layers} of them cannot be taken.")
        drafting = self.num_nextn_predict_layers if layers == self.num_hidden_layers else 0
        return msgspec.structs.replace(
            self, num_hidden_layers=layers, first_k_dense_replace=dense, num_nextn_predict_layers=drafting
        )

    @classmethod
    def from_hf(cls, hf_config: "HuggingFaceConfig | ModelConfig") -> "ModelConfig":
        """Takes a transformers DeepseekV3Config, or a ModelConfig as it is.

        Raises CheckpointError as `from_dict` does.
        """
        if isinstance(hf_config, ModelConfig):
            return hf_config
        return cls.from_dict(hf_config.to_dict(), source="the given configuration")

    @classmethod
    def from_file(cls, path: Path) -> "ModelConfig":
        """Reads a config.json.

        Raises CheckpointError where it cannot be read, is not a JSON object, or the model cannot be served.
        """
        try:
            if path.stat().st_size > CONFIG_FILE_BYTES_MAX:
                raise CheckpointError(f"{path} is larger than {CONFIG_FILE_BYTES_MAX} bytes: it is not a model config.")
            keys = json.loads(path.read_bytes())
        except OSError as error:
            raise CheckpointError(f"Cannot read {path}: {error.strerror}.") from error
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is not valid JSON: {error}.") from error
        if not isinstance(keys, dict):
            raise CheckpointError(f"{path} does not contain a JSON object.")
        return cls.from_dict(keys, source=str(path))

    @classmethod
    def from_dict(cls, keys: dict[str, Any], *, source: str) -> "ModelConfig":
        """Takes config.json's keys, in DeepSeek's layout or in that of transformers 5.

        `source` names the file in errors. Raises CheckpointError where the model type is unknown, a key is
        missing or of the wrong type, or the sizes contradict each other.
        """
        architecture = _architecture(keys, source)
        _refuse_other_models(keys, source)
        values = {field: keys[field] for field in cls.__struct_fields__ if field in keys}
        values.update(_rope(keys, source))
        values["architecture"] = architecture
        values["eos_token_ids"] = _token_ids(keys.get("eos_token_id"))
        values["num_nextn_predict_layers"] = keys.get("num_nextn_predict_layers") or 0
        values.setdefault("bos_token_id", None)
        values.setdefault("tie_word_embeddings", False)
        values.setdefault("norm_topk_prob", True)
        try:
            config = msgspec.convert(values, cls)
        except msgspec.ValidationError as error:
            raise CheckpointError(f"{source}: {error}.") from error
        _refuse_contradictions(config, source)
        return config


def yarn_mscale(factor: float, mscale: float) -> float:
    """0.1 * mscale * ln(factor) + 1 (YaRN, arXiv:2309.00071, equation 22, as DeepSeek scales it)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _architecture(keys: dict[str, Any], source: str) -> str:
    model_type = keys.get("model_type")
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        served = " and ".join(map(repr, MODEL_TYPES))
        raise CheckpointError(f"{source}: model_type is {model_type!r}; only {served} checkpoints can be served.")
    return MODEL_TYPES[model_type]


def _refuse_other_models(keys: dict[str, Any], source: str) -> None:
    fixed = {
        "hidden_act": "silu",
        "attention_bias": False,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "rope_interleave": True,
    }
    for key, value in fixed.items():
        if keys.get(key, value) != value:
            raise CheckpointError(f"{source}: {key} is {keys[key]!r}; DeepSeek-V3 has {value!r}.")
    _refuse_other_quantisation(keys.get("quantization_config"), source)
    if keys.get("q_lora_rank", 0) is None:
        raise CheckpointError(f"{source}: q_lora_rank is null; only models with compressed queries can be served.")
    heads = keys.get("num_attention_heads")
    if keys.get("num_key_value_heads", heads) != heads:
        raise CheckpointError(f"{source}: num_key_value_heads must equal num_attention_heads ({heads}).")


def _refuse_other_quantisation(quantisation: Any, source: str) -> None:
    if quantisation is None:
        return
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation
    if method != "fp8":
        raise CheckpointError(f"{source}: quantised with {method!r}; block FP8 ('fp8') and plain weights can be read.")
    block, served = quantisation.get("weight_block_size"), [FP8_BLOCK, FP8_BLOCK]
    if not isinstance(block, (list, tuple)) or list(block) != served:
        raise CheckpointError(f"{source}: weight_block_size is {block!r}; FP8 scales must be per {served}.")


def _rope(keys: dict[str, Any], source: str) -> dict[str, Any]:
    """Returns rope_theta and yarn, from `rope_scaling` (DeepSeek's layout) or `rope_parameters` (transformers 5)."""
    rope = keys.get("rope_parameters") or keys.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"{source}: rope_scaling is not a JSON object.")
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = rope.get("rope_theta", keys.get("rope_theta", 10000.0))
    if kind == "default":
        return {"rope_theta": theta, "yarn": None}
    if kind != "yarn":
        raise CheckpointError(f"{source}: rope type {kind!r} is unknown; 'yarn' and 'default' are served.")
    try:
        return {"rope_theta": theta, "yarn": msgspec.convert(rope, Yarn)}
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{source}: rope_scaling: {error}.") from error


def _token_ids(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _refuse_contradictions(config: ModelConfig, source: str) -> None:
    positive = {name: getattr(config, name) for name in POSITIVE}
    if config.yarn is not None:
        factors = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
        positive |= {f"rope_scaling.{name}": getattr(config.yarn, name) for name in factors}
    for name, value in positive.items():
        if not 0 < value < math.inf:
            raise CheckpointError(f"{source}: {name} is {value}; it must be positive.")
    for name in ("first_k_dense_replace", "num_nextn_predict_layers"):
        if getattr(config, name) < 0:
            raise CheckpointError(f"{source}: {name} is negative.")
    if config.qk_rope_head_dim % 2:
        raise CheckpointError(f"{source}: qk_rope_head_dim is {config.qk_rope_head_dim}; rotary positions need pairs.")
    for token in config.eos_token_ids:
        if not 0 <= token < config.vocab_size:
            raise CheckpointError(f"{source}: eos_token_id {token} is not in the vocabulary of {config.vocab_size}.")
    _refuse_impossible_routing(config, source)


def _refuse_impossible_routing(config: ModelConfig, source: str) -> None:
    if config.n_routed_experts % config.n_group:
        raise CheckpointError(f"{source}: {config.n_routed_experts} experts cannot form {config.n_group} equal groups.")
    group = config.n_routed_experts // config.n_group
    if group < 2:
        raise CheckpointError(f"{source}: groups of {group} expert; a group's score sums its best two.")
    if config.topk_group > config.n_group:
        raise CheckpointError(f"{source}: topk_group {config.topk_group} of only {config.n_group} groups.")
    if config.num_experts_per_tok > config.topk_group * group:
        raise CheckpointError(
            f"{source}: {config.num_experts_per_tok} experts a token, but the {config.topk_group} groups chosen "
            f"hold {config.topk_group * group}."
        )


def directory_name(directory: Path) -> str:
    """What the model in a directory is called: its hub id in the hub's cache, else the directory's own name."""
    if directory.parent.name == "snapshots" and directory.parent.parent.name.startswith("models--"):
        return directory.parent.parent.name.removeprefix("models--").replace("--", "/")
    return SAMPLE_NAME if directory == SAMPLE_DIR else directory.name


def read_bounded(path: Path, bytes_max: int) -> bytes | None:
    """Reads a file; None where there is none. Raises CheckpointError where it is larger, or cannot be read."""
    try:
        with path.open("rb") as file:
            content = file.read(bytes_max + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror}.") from error
    if len(content) > bytes_max:
        raise CheckpointError(f"{path} is larger than {bytes_max} bytes: it is not a file of this kind.")
    return content
