"""Raw little-endian bytes to tensors."""

import torch

from .errors import InvalidModelFile
from .safetensors_header import TensorInfo

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}


def tensor_from_bytes(info: TensorInfo, data: bytes) -> torch.Tensor:
    """The tensor that `info` describes, over a copy of `data`. Raises InvalidModelFile for dtypes torch has not."""
    if info.dtype not in DTYPES:
        raise InvalidModelFile(
            f"tensor {info.name!r} is {info.dtype}, which torch cannot hold; convert the model"
        )
    assert len(data) == info.size_bytes
    if not data:
        return torch.empty(info.shape, dtype=DTYPES[info.dtype])
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(DTYPES[info.dtype]).reshape(info.shape)
