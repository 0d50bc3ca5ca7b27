"""The dtypes of floats: those that a stage can hold them in, as torch knows them, and those of chips, as ttnn does."""

import torch

from stages.backend import ttnn
from stages.options import Dtype
from stages.tensor_dtypes import TensorDtype

TORCH_DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}

FLOATS: dict[TensorDtype, ttnn.DataType] = {
    "float32": ttnn.float32,
    "bfloat16": ttnn.bfloat16,
    "bfloat8_b": ttnn.bfloat8_b,
    "bfloat4_b": ttnn.bfloat4_b,
}
