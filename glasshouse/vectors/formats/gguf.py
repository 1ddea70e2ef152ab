"""GGUF, as far as control vectors need it: metadata and one-dimensional float tensors, read (versions 2 and 3) and written (version 3).

Little-endian: magic, version, counts; key, type, value; name, shape, type, offset; then the data, aligned. No model weights, no
quantised types. Every length is checked against the file, so a damaged one is a `BadValue`, never a large allocation.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from glasshouse.errors import BadValue

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
UINT32, STRING, ARRAY = 4, 8, 9
FLOATS = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}


def write_gguf(metadata: Mapping[str, str | int], tensors: Mapping[str, Tensor]) -> bytes:
    """The bytes of a file: texts and whole numbers as metadata, `[n]` tensors in float32."""
    head = MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(metadata))
    for key, value in metadata.items():
        head += packed(key)
        head += struct.pack("<I", STRING) + packed(value) if isinstance(value, str) else struct.pack("<II", UINT32, value)
    offset, blocks = 0, []
    for name, tensor in tensors.items():
        head += packed(name) + struct.pack("<IQIQ", 1, tensor.numel(), 0, offset)
        data = tensor.to(torch.float32).contiguous().numpy().astype("<f4").tobytes()
        blocks.append(padded(data))
        offset += len(blocks[-1])
    return padded(head) + b"".join(blocks)


def packed(text: str) -> bytes:
    """A string with its length."""
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def padded(data: bytes) -> bytes:
    """The bytes, filled up to the alignment."""
    return data + b"\0" * (-len(data) % ALIGNMENT)


def read_gguf(data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and float tensors (their shape as written, in float32). Raises `BadValue`."""
    reader = Reader(data)
    if reader.take(4) != MAGIC:
        raise BadValue("it does not begin with GGUF.")
    version = reader.number("<I")
    if version not in (2, 3):
        raise BadValue(f"its GGUF version is {version}; versions 2 and 3 are read.")
    n_tensors, n_keys = reader.number("<Q"), reader.number("<Q")
    metadata = {}
    for _ in range(n_keys):
        key = reader.text()
        metadata[key] = reader.value(reader.number("<I"))
    listed = [reader.tensor() for _ in range(n_tensors)]
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if isinstance(alignment, bool) or not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
        raise BadValue(f"its general.alignment is {alignment!r}.")
    start = math.ceil(reader.at / alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in listed:
        if name in tensors:
            raise BadValue(f"it has two tensors named {name!r}.")
        tensors[name] = floats(data, name, shape, kind, start + offset)
    return metadata, tensors


def floats(data: bytes, name: str, shape: list[int], kind: int, start: int) -> Tensor:
    """One tensor's numbers. Raises `BadValue` for a quantised type, and for data past the end."""
    if kind not in FLOATS:
        raise BadValue(f"the tensor {name!r} is stored in GGUF type {kind}; control vectors are float32 or float16.")
    count = math.prod(shape)
    end = start + count * FLOATS[kind].itemsize
    if end > len(data) or count == 0:
        raise BadValue(f"the tensor {name!r} should end at byte {end}, and the file has {len(data)}: it was cut short.")
    return torch.frombuffer(bytearray(data[start:end]), dtype=FLOATS[kind]).to(torch.float32).reshape(shape)


class Reader:
    """A place in the bytes of a file."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        """The next bytes. Raises `BadValue` past the end."""
        if count > len(self.data) - self.at:
            raise BadValue(f"it ends after {len(self.data)} bytes, in the middle of its header: it was cut short.")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str) -> Any:
        """The next number."""
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        """The next string. Raises `BadValue` when it is not UTF-8."""
        try:
            return self.take(self.number("<Q")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadValue("a text in its header is not UTF-8.") from error

    def value(self, kind: int, deep: int = 0) -> Any:
        """The next value of metadata. Raises `BadValue` for a type that does not exist."""
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.text()
        if kind == ARRAY and deep < 4:
            inner, count = self.number("<I"), self.number("<Q")
            if count > len(self.data) - self.at:
                raise BadValue(f"a list in its header has {count} items, and the file has {len(self.data)} bytes.")
            return [self.value(inner, deep + 1) for _ in range(count)]
        raise BadValue(f"its header has a value of type {kind}, which GGUF does not have.")

    def tensor(self) -> tuple[str, list[int], int, int]:
        """The next tensor's name, shape, type and offset. Raises `BadValue` for more than four axes."""
        name, axes = self.text(), self.number("<I")
        if axes > 4:
            raise BadValue(f"the tensor {name!r} has {axes} axes.")
        shape = [self.number("<Q") for _ in range(axes)]
        return name, shape, self.number("<I"), self.number("<Q")
