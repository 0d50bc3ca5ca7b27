"""Files of tensors: shards beside each other in safetensors format, mapped into memory when they are loaded.

https://huggingface.co/docs/safetensors describes the format. Shards that are the same object are stored once; a shard
whose last two dimensions are transposed in memory is written transposed, and transposed again on loading.
"""

import json
from enum import Enum
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from stages.backend.embedded.dtype import ROW_MAJOR_LAYOUT, DataType, Layout, held_in
from stages.backend.embedded.memory import MemoryConfig
from stages.backend.embedded.mesh import Mesh, MeshDevice, TensorToMesh
from stages.backend.embedded.tensor import Tensor, dense, from_torch
from stages.errors import DeviceError

SUFFIX = ".tensorbin"
ALIGNMENT = 64
"""Data starts at a multiple of this, a cache line."""

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}


class DumpTensorMode(Enum):
    """Which of several processes writes a tensor's file; a process of the embedded device is always alone."""

    DISTRIBUTED_GATHER = 0
    LOCAL = 1


def dump_tensor(
    file_name: str | Path, tensor: Tensor, mode: DumpTensorMode = DumpTensorMode.DISTRIBUTED_GATHER
) -> None:
    """Writes a tensor with its dtype, layout and mesh shape; `mode` has no effect.

    Raises DeviceError unless the name ends in .tensorbin.
    """
    path = _checked(file_name)
    stored: dict[int, int] = {}
    order = [stored.setdefault(id(shard), len(stored)) for shard in tensor.shards]
    shards = [dense(tensor.shards[order.index(number)]) for number in range(len(stored))]
    turned = not shards[0].is_contiguous()
    if turned:
        shards = [shard.transpose(-2, -1).contiguous() for shard in shards]
    metadata = {
        "dtype": tensor.dtype.name,
        "layout": tensor.layout.name,
        "mesh_shape": json.dumps(tuple(tensor.mesh.shape)),
        "shards": json.dumps(order),
        "turned": json.dumps(turned),
    }
    _write(path, shards, metadata)


def _write(path: Path, arrays: list[torch.Tensor], metadata: dict[str, str]) -> None:
    header: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for number, array in enumerate(arrays):
        end = offset + array.numel() * array.element_size()
        header[str(number)] = {"dtype": _NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for array in arrays:
            # numpy's tofile reports no error when the disk is full for the last bytes.
            file.write(array.view(-1).view(torch.uint8).numpy().data)


def load_tensor(file_name: str | Path, *, device: MeshDevice | None = None) -> Tensor:
    """Maps a tensor of `dump_tensor` into memory, on the mesh that it was sharded for, or on the host.

    Pages are read when they are used. Raises DeviceError if the file cannot be read, was sharded for another mesh, or
    was written while floats were held in another dtype."""
    path = _checked(file_name)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            arrays = [file.get_tensor(str(number)) for number in range(len(file.keys()))]
    except (OSError, SafetensorError) as error:
        raise DeviceError(f"Cannot read {path}: {error}.") from error
    dtype, layout = DataType[metadata["dtype"]], Layout[metadata["layout"]]
    shape = json.loads(metadata["mesh_shape"])
    if device is not None and tuple(device.shape) != tuple(shape):
        raise DeviceError(f"{path} was cut for a mesh of {tuple(shape)}, not of {tuple(device.shape)}.")
    if arrays[0].dtype != held_in(dtype):
        raise DeviceError(f"{path} holds {arrays[0].dtype}, but this process holds {dtype.name} in {held_in(dtype)}.")
    if json.loads(metadata["turned"]):
        arrays = [array.transpose(-2, -1) for array in arrays]
    return Tensor([arrays[number] for number in json.loads(metadata["shards"])], dtype, layout, device or Mesh(shape))


def as_tensor(
    tensor: torch.Tensor,
    dtype: DataType | None = None,
    *,
    layout: Layout | None = ROW_MAJOR_LAYOUT,
    device: MeshDevice | None = None,
    memory_config: MemoryConfig | None = None,
    cache_file_name: str | Path | None = None,
    mesh_mapper: TensorToMesh | None = None,
) -> Tensor:
    """Loads `cache_file_name` + dtype and layout if that file exists, else writes it from `tensor`, see `from_torch`.

    Raises DeviceError if a device is given without a memory config.
    """
    if device is not None and memory_config is None:
        raise DeviceError("as_tensor needs a memory_config if it is given a device.")
    if cache_file_name is None:
        return from_torch(tensor, dtype, layout=layout, device=device, mesh_mapper=mesh_mapper)
    names = (dtype.name if dtype else "None", layout.name if layout else "None")
    path = Path(f"{cache_file_name}_dtype_{names[0]}_layout_{names[1]}{SUFFIX}")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        made = from_torch(tensor, dtype, layout=layout, device=device, mesh_mapper=mesh_mapper)
        dump_tensor(path, made)
    return load_tensor(path, device=device)


def _checked(file_name: str | Path) -> Path:
    path = Path(file_name)
    if path.suffix != SUFFIX:
        raise DeviceError(f"{path} must end in {SUFFIX}.")
    return path
