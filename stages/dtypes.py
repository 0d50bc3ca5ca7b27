"""The dtypes that a stage can hold floats in, as torch knows them."""

import torch

from stages.options import Dtype

TORCH_DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
