"""Values in Redis: one self-describing, checked byte string each; whatever else is found there is refused.

The header says what the value is (magic, version, kind), whom it belongs to (the root digest, which covers model,
layout and tenant; and the key that it was stored under, so that a value under another key is refused too) and how it is
packed. A digest over all of it follows: a checksum, and with a secret a keyed one, which nobody without it can make.
"""

from __future__ import annotations

import hashlib
import math
import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lenvm.scoring import BlockLayout

__all__ = ["PAYLOADS", "Codec", "CodecError", "SessionRecord"]

PAYLOADS = ("exact", "int8")
_MAGIC, _VERSION = b"LVM", 1
_BLOCK, _SESSION = 1, 2
_HEAD = struct.Struct("<3sBBB32s32sQ")  # magic, version, kind, packing, root, key, payload bytes
_DIGEST = 32
_LONGEST = 1 << 30


class CodecError(ValueError):
    """Bytes that are not what they should be: damaged, cut, of another model, of another key, or forged."""


@dataclass(frozen=True)
class SessionRecord:
    """What another replica needs to go on from a handle: the prefix's tokens, and the numbers at its end.

    ``tokens``: packed uint32 ids; ``logit``: value logit z; ``bin_logprobs [n]``, None without a distribution.
    """

    tokens: bytes
    logit: float
    bin_logprobs: NDArray[np.float64] | None

    @property
    def token_ids(self) -> list[int]:
        """The ids of the prefix."""
        return np.frombuffer(self.tokens, dtype="<u4").tolist()  # type: ignore[no-any-return]


class Codec:
    """Packs and checks values of one layout. Thread-safe.

    Args:
        layout: of the blocks.
        num_bins: of the length distribution, 0 for none.
        secret: key of the digests; empty: a plain checksum.
        payload: "exact", or "int8": keys and values rounded to 8 bits with one scale a token and head, a quarter of
            float32's bytes, at a small error of the values.
    """

    def __init__(self, layout: BlockLayout, *, num_bins: int, secret: bytes = b"", payload: str = "exact") -> None:
        if payload not in PAYLOADS:
            raise ValueError(f"payload must be one of {', '.join(PAYLOADS)}, not {payload!r}")
        self.layout, self.num_bins, self.secret, self.payload = layout, num_bins, secret, payload

    @property
    def block_bytes(self) -> int:
        """Bytes of a packed block."""
        raw = self.layout.nbytes
        if self.payload == "int8":
            numbers = math.prod(self.layout.shape)
            raw = numbers + 4 * (numbers // self.layout.shape[-1])
        return _HEAD.size + raw + _DIGEST

    def pack_block(self, root: bytes, key: bytes, block: NDArray[np.uint8]) -> memoryview:
        """A block's bytes (as a scorer dumps them) as a value of ``key``.

        Megabytes: they are copied once, without the interpreter's lock, which the engine's thread needs meanwhile.
        """
        if block.nbytes != self.layout.nbytes:
            raise ValueError(f"a block has {self.layout.nbytes} bytes, not {block.nbytes}")
        payload = self._to_int8(block) if self.payload == "int8" else block
        return self._seal(_BLOCK, PAYLOADS.index(self.payload), root, key, payload)

    def unpack_block(self, root: bytes, key: bytes, value: bytes) -> NDArray[np.uint8]:
        """The block's bytes, as a scorer loads them. Raises CodecError."""
        packing, payload = self._open(_BLOCK, root, key, value)
        if packing == PAYLOADS.index("int8"):
            return self._from_int8(payload)
        if len(payload) != self.layout.nbytes:
            raise CodecError("a block of another size")
        return np.frombuffer(payload, dtype=np.uint8)

    def pack_session(self, root: bytes, key: bytes, record: SessionRecord) -> bytes:
        """A session record as a value of ``key``."""
        bins = np.empty(0) if record.bin_logprobs is None else record.bin_logprobs
        numbers = np.concatenate([[record.logit], bins]).astype("<f8").tobytes()
        payload = np.frombuffer(numbers + record.tokens, dtype=np.uint8)
        return bytes(self._seal(_SESSION, 0, root, key, payload))

    def unpack_session(self, root: bytes, key: bytes, value: bytes) -> SessionRecord:
        """The session record. Raises CodecError."""
        _, view = self._open(_SESSION, root, key, value)
        payload = bytes(view)
        size = 8 * (1 + self.num_bins)
        tokens = payload[size:]
        if len(payload) <= size or len(tokens) % 4:
            raise CodecError("a session record of another size")
        numbers = np.frombuffer(payload[:size], dtype="<f8").astype(np.float64)
        if not np.isfinite(numbers[0]) or np.isnan(numbers).any():
            raise CodecError("a session record with numbers that are none")
        return SessionRecord(tokens, float(numbers[0]), numbers[1:] if self.num_bins else None)

    # -- the envelope --------------------------------------------------------------------------------------------------

    def _seal(self, kind: int, packing: int, root: bytes, key: bytes, payload: NDArray[np.uint8]) -> memoryview:
        value = np.empty(_HEAD.size + payload.nbytes + _DIGEST, dtype=np.uint8)
        view = value.data
        _HEAD.pack_into(view, 0, _MAGIC, _VERSION, kind, packing, root, _fixed(key), payload.nbytes)
        value[_HEAD.size : -_DIGEST] = payload
        view[-_DIGEST:] = self._digest(view[: _HEAD.size], view[_HEAD.size : -_DIGEST])
        return view

    def _open(self, kind: int, root: bytes, key: bytes, value: bytes) -> tuple[int, memoryview]:
        if len(value) < _HEAD.size + _DIGEST or len(value) > _LONGEST:
            raise CodecError("too short or too long for a value of ours")
        magic, version, its_kind, packing, its_root, its_key, size = _HEAD.unpack_from(value)
        if magic != _MAGIC or version != _VERSION or its_kind != kind or packing >= len(PAYLOADS):
            raise CodecError("no value of ours, or of another version")
        if its_root != root or its_key != _fixed(key):
            raise CodecError("a value of another model, tenant or key")
        if size != len(value) - _HEAD.size - _DIGEST:
            raise CodecError("a value that was cut")
        view = memoryview(value)
        head, payload = view[: _HEAD.size], view[_HEAD.size : -_DIGEST]
        # Constant time: with a secret this is a signature.
        if not _same(self._digest(head, payload), value[-_DIGEST:]):
            raise CodecError("a value that was changed")
        return packing, payload

    def _digest(self, head: memoryview, payload: memoryview) -> bytes:
        digest = hashlib.blake2b(head, digest_size=_DIGEST, key=self.secret, person=b"lenvm-value")
        digest.update(payload)
        made: bytes = digest.digest()
        return made

    # -- int8 ----------------------------------------------------------------------------------------------------------

    def _to_int8(self, block: NDArray[np.uint8]) -> NDArray[np.uint8]:
        numbers = _to_float(block, self.layout.dtype).reshape(self.layout.shape)
        scale = np.abs(numbers).max(-1, keepdims=True) / 127
        scaled = np.rint(numbers / np.where(scale == 0, 1, scale)).astype(np.int8)
        parts = scale.astype("<f4"), scaled
        return np.concatenate([part.reshape(-1).view(np.uint8) for part in parts])

    def _from_int8(self, payload: memoryview) -> NDArray[np.uint8]:
        shape = self.layout.shape
        scales = math.prod(shape[:-1])
        if len(payload) != 4 * scales + math.prod(shape):
            raise CodecError("a block of another size")
        scale = np.frombuffer(payload, dtype="<f4", count=scales).reshape(*shape[:-1], 1)
        scaled = np.frombuffer(payload, dtype=np.int8, offset=4 * scales).reshape(shape)
        return _from_float((scaled * scale).astype(np.float32), self.layout.dtype)


def _fixed(key: bytes) -> bytes:
    return key if len(key) == 32 else hashlib.sha256(key).digest()


def _same(ours: bytes, theirs: bytes) -> bool:
    import hmac

    return hmac.compare_digest(ours, theirs)


def _to_float(block: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    if dtype == "bfloat16":
        return (block.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return block.view(dtype).astype(np.float32)


def _from_float(numbers: NDArray[np.float32], dtype: str) -> NDArray[np.uint8]:
    flat = np.ascontiguousarray(numbers).reshape(-1)
    if dtype == "bfloat16":
        bits = flat.view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest, ties to even
        return rounded.astype("<u2").view(np.uint8)
    return flat.astype(dtype).view(np.uint8)
