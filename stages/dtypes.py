"""The dtypes of floats, by the names of our options: torch's, for a stage, and ttnn's, for chips."""

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
