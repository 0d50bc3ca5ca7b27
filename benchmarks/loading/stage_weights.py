"""Loading of one stage's weights in a process of its own."""

import time
from pathlib import Path

import msgspec
import torch

from benchmarks.support.peer import Pipe, answer, running_peer
from stages.backend import set_float_dtype, ttnn
from stages.converted_weights import ConvertedWeights
from stages.model_slice import ModelSlice
from stages.options import StageOptions
from stages.plan import plan_stages
from stages.run_config import TORCH_DTYPES
from weights.cache.cache import WeightCache
from weights.checkpoint import open_weights

LOAD_SECONDS = 900.0


class Load(msgspec.Struct, frozen=True):
    """One start: the seconds until all weights were on the mesh, and the bytes that came from the disk meanwhile.

    Bytes from the system's page cache are not counted.
    """

    seconds: float
    disk_bytes: int


def load_once(options: StageOptions) -> Load:
    """Loads the whole model as a single stage. Raises PeerError if that takes longer than LOAD_SECONDS."""
    with running_peer(_load, None, options) as peer:
        load = answer(peer, LOAD_SECONDS)
    if not isinstance(load, Load):
        raise TypeError(f"{load!r} is not a Load")
    return load


@torch.inference_mode()
def _load(pipe: Pipe, options: StageOptions) -> None:
    """Loads weights as Stage.load does; the mesh is open before the clock starts."""
    set_float_dtype(TORCH_DTYPES[options.dtype])
    mesh_device = ttnn.open_mesh_device(ttnn.MeshShape(1, 1))
    read, began = _bytes_from_disk(), time.perf_counter()
    source = open_weights(Path(options.model_path), load_format=options.weights.load_format, seed=options.seed)
    weights = ConvertedWeights(source, WeightCache(Path(options.cache_dir)), options.dtype, mesh_device)
    [spec] = plan_stages(source.config, 1)
    ModelSlice.load(spec, weights, options.cache, lambda _done, _of: None)
    pipe.send(Load(time.perf_counter() - began, _bytes_from_disk() - read))
    ttnn.close_mesh_device(mesh_device)


def _bytes_from_disk() -> int:
    """The bytes that the system has read from disks for this process so far (proc_pid_io(5), read_bytes)."""
    entries = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return int(next(entry.removeprefix("read_bytes:") for entry in entries if entry.startswith("read_bytes:")))
