"""Checksums of TFRecord files: CRC-32C, masked as TensorFlow masks it.

A CRC is linear over GF(2): the CRC of some bytes is the XOR of what each of them contributes by its
value and its distance from the end. A table of contributions makes that one lookup for many bytes
at once.
"""

import functools
import struct

import numpy as np

_POLYNOMIAL = 0x82F63B78  # Castagnoli's, bits reversed
_CHUNK = 2048  # bytes per lookup; the table takes 1 kB for each
_ONES = 0xFFFFFFFF


def crc32c(data: bytes) -> int:
  """Returns the CRC-32C of some bytes, as an unsigned 32-bit number."""
  crc = _ONES
  whole = np.frombuffer(data, np.uint8)
  for start in range(0, len(whole), _CHUNK):
    crc = _add(crc, whole[start : start + _CHUNK])
  return crc ^ _ONES


def masked(data: bytes) -> int:
  """Returns the CRC-32C as TFRecord files hold it: rotated by 15 bits, plus a constant."""
  crc = crc32c(data)
  return ((crc >> 15 | crc << 17) + 0xA282EAD8) & _ONES


def matches(data: bytes, checksum: bytes) -> bool:
  """Whether four bytes of a TFRecord file, little-endian, are the masked checksum of others."""
  return masked(data) == struct.unpack("<I", checksum)[0]


def _add(crc: int, data: np.ndarray) -> int:
  """Returns the state of a CRC after uint8 `[n]` more, n at most `_CHUNK`."""
  table, n = _table(), len(data)
  # The state is as four bytes that stand, XORed, on the first four of the data.
  state = [crc >> 8 * i & 0xFF for i in range(4)]
  indices = _OFFSETS[_CHUNK - n :] + data
  total = int(np.bitwise_xor.reduce(table[indices]))
  for i, byte in enumerate(state[:n]):
    total ^= int(table[(n - 1 - i) * 256 + byte])
  return total ^ (crc >> 8 * n if n < 4 else 0)


# Where in the table the contributions of each byte of a chunk begin, by its distance from the end.
_OFFSETS = np.arange(_CHUNK - 1, -1, -1, dtype=np.int64) * 256


@functools.cache
def _table() -> np.ndarray:
  """Contributions, uint32 `[_CHUNK * 256]`: of value v at distance d from the end at 256 d + v."""
  first = np.arange(256, dtype=np.uint32)
  for _ in range(8):
    first = np.where(first & 1, first >> 1 ^ np.uint32(_POLYNOMIAL), first >> 1)
  rows = [first]
  for _ in range(_CHUNK - 1):
    rows.append(rows[-1] >> 8 ^ first[rows[-1] & 0xFF])
  return np.concatenate(rows)
