"""The modules of DeepSeek-V3's family, as generic code runs them."""

from stages.models.deepseek_v3.decoder_block import DenseBlock, MoEBlock
from stages.models.deepseek_v3.embedding import Embedding
from stages.models.deepseek_v3.lm_head import LMHead
from stages.models.deepseek_v3.rope import rope_tables
from stages.models.module import AnyDecoderModule, Modules
from weights.model_config import ModelConfig


def decoder_block(config: ModelConfig, layer: int) -> AnyDecoderModule:
    """Returns the kind of block that a layer is."""
    return MoEBlock if config.is_moe(layer) else DenseBlock


MODULES = Modules(embedding=Embedding, decoder=decoder_block, head=LMHead, rope_tables=rope_tables)
