"""What a plan knows of packed weights that are kept in the cache folder: on the CPU they are a map of a file."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lyra_emergence.compiler import find_compiler
from lyra_emergence.footprint import packed_layer_bytes
from lyra_emergence.packed_files import find_packed_files, packed_folder, read_packed

if TYPE_CHECKING:
    from lyra_emergence.checkpoint import CheckpointIndex
    from lyra_emergence.config import ModelConfig
    from lyra_emergence.footprint import BlockFootprint, Footprint

__all__ = ["keeps_packed", "with_kept_weights"]

_CODE_TABLE = 64
"""Bytes that bitsandbytes has beside a packed matrix, and the kernels do not."""


def keeps_packed(config: ModelConfig, index: CheckpointIndex) -> bool:
    """Return whether weights that are packed for the CPU may be kept, and used again.

    Code that comes with a checkpoint may do anything to its weights.
    """
    foreign = config.trust_remote_code and "auto_map" in index.config
    return config.cpu_kernels and config.packed_cache_bytes > 0 and not foreign


def with_kept_weights(footprint: Footprint, config: ModelConfig, index: CheckpointIndex) -> Footprint:
    """Return `footprint` with the packed weights that are kept in the cache folder."""
    quantization = footprint.quantization
    if quantization is None or not keeps_packed(config, index) or not packed_folder().exists():
        return footprint
    files = find_packed_files(index, quantization)
    if files is None or not files.folder.exists() or find_compiler() is None:
        return footprint
    layers = {layer.name: layer for layer in index.layers}

    def with_kept(block: BlockFootprint) -> BlockFootprint:
        if block.name not in layers:
            return block
        held = read_packed(files.path(block.name)) or ()
        nbytes = sum(tensor.nbytes for tensor in held)
        # Two tensors for each matrix.
        most = packed_layer_bytes(index, layers[block.name], quantization)
        return replace(block, kept=nbytes, packs=nbytes + len(held) // 2 * _CODE_TABLE < most)

    return replace(footprint, blocks=tuple(map(with_kept, footprint.blocks)))
