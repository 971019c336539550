"""CRC-32C: the values of its standard, and those of TensorBoard's own."""

import random
import struct

from tensorboard.compat.tensorflow_stub import pywrap_tensorflow
import pytest

from famjax.data import crc32c


def test_the_values_of_rfc_3720():
  numbers = bytes(range(32))
  known = {
      b"": 0, b"123456789": 0xE3069283, bytes(32): 0x8A9136AA, b"\xff" * 32: 0x62A8AB43,
      numbers: 0x46DD794E, numbers[::-1]: 0x113FDB5C,
  }  # fmt: skip
  assert {data: crc32c.crc32c(data) for data in known} == known


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 100, 2047, 2048, 2049, 2051, 2052, 5000])
def test_masked_checksums_are_those_of_tensorflow(size):
  data = random.Random(size).randbytes(size)
  right = pywrap_tensorflow.masked_crc32c(data)
  assert crc32c.masked(data) == right
  assert crc32c.matches(data, struct.pack("<I", right))
  assert not crc32c.matches(data, struct.pack("<I", right ^ 1))
