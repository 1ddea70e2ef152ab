"""What the game master and a technique say to each other: frames of JSON and safetensors over one socket.

Nothing here can run code on the other side: no pickle, and every frame is checked against a size before it is read.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load, save

from glasshouse.errors import GlasshouseError

Array = npt.NDArray[Any]
LARGEST_TEXT = 256 << 20
LARGEST_ARRAYS = 2 << 30
_LENGTHS = struct.Struct("<QQ")


class WireBroken(GlasshouseError):
    """The other side closed the socket, took too long, or sent what is not a frame."""


def send(channel: socket.socket, header: Mapping[str, Any], arrays: Mapping[str, Array] | None = None) -> None:
    """Send one frame. Raises `ValueError` for a number in `header` that is not finite."""
    text = json.dumps(header, ensure_ascii=False, allow_nan=False).encode("utf-8", "surrogatepass")
    body = save({name: np.ascontiguousarray(array) for name, array in arrays.items()}) if arrays else b""
    try:
        channel.sendall(_LENGTHS.pack(len(text), len(body)) + text)
        if body:
            channel.sendall(body)
    except OSError as error:
        raise WireBroken(f"The other side of the audit is gone: {error}.") from error


def receive(channel: socket.socket) -> tuple[dict[str, Any], dict[str, Array]]:
    """Receive one frame: the JSON object and the named arrays. Raises `WireBroken`."""
    text_size, array_size = _LENGTHS.unpack(_read(channel, _LENGTHS.size))
    if text_size > LARGEST_TEXT or array_size > LARGEST_ARRAYS:
        raise WireBroken(f"A frame of {text_size} + {array_size} bytes is larger than allowed.")
    try:
        header = json.loads(_read(channel, text_size).decode("utf-8", "surrogatepass"), parse_constant=_refuse_constant)
        arrays = load(_read(channel, array_size)) if array_size else {}
    except WireBroken:
        raise
    except Exception as error:
        raise WireBroken(f"A frame could not be read: {type(error).__name__}.") from error
    if not isinstance(header, dict):
        raise WireBroken("A frame's header is not an object.")
    return header, arrays


def _refuse_constant(name: str) -> float:
    raise WireBroken(f"A frame holds {name}, which is no number.")


def _read(channel: socket.socket, size: int) -> bytes:
    buffer = bytearray(size)
    view, done = memoryview(buffer), 0
    while done < size:
        try:
            count = channel.recv_into(view[done:])
        except TimeoutError as error:
            raise WireBroken("The other side of the audit took too long.") from error
        except OSError as error:
            raise WireBroken(f"The other side of the audit is gone: {error}.") from error
        if not count:
            raise WireBroken("The other side of the audit closed its end.")
        done += count
    return bytes(buffer)
