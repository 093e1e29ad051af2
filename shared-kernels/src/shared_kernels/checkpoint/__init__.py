"""Folders of safetensors, read lazily and written tensor by tensor."""

from shared_kernels.checkpoint.folder import (
    WEIGHTS_NAME,
    TensorFolder,
    TensorInfo,
    copy_side_files,
    replacing_folder,
    write_index,
    write_safetensors,
)

__all__ = [
    "WEIGHTS_NAME",
    "TensorFolder",
    "TensorInfo",
    "copy_side_files",
    "replacing_folder",
    "write_index",
    "write_safetensors",
]
