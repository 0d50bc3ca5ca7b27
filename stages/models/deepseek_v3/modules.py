"""The modules that generic code gets of the family."""

from stages.models.deepseek_v3.decoder_block import decoder_block
from stages.models.deepseek_v3.embedding import Embedding
from stages.models.deepseek_v3.lm_head import LMHead
from stages.models.deepseek_v3.mtp import MTP
from stages.models.deepseek_v3.rope import rope_tables
from stages.models.module import Modules

MODULES = Modules(embedding=Embedding, decoder=decoder_block, head=LMHead, draft=MTP, rope_tables=rope_tables)
