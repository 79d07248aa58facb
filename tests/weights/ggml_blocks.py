"""Blocks of ggml's quantised types, decoded value by value as ggml-quants.c words it.

Slow, and independent of the package `gguf`: what the tests hold its dequantiser against.
"""

import struct

import numpy as np


def half(data: bytes, at: int) -> float:
    return struct.unpack_from("<e", data, at)[0]


def q4_0(b: bytes) -> list[float]:
    d, q = half(b, 0), b[2:18]
    return [d * ((x & 15) - 8) for x in q] + [d * ((x >> 4) - 8) for x in q]


def q4_1(b: bytes) -> list[float]:
    d, m, q = half(b, 0), half(b, 2), b[4:20]
    return [d * (x & 15) + m for x in q] + [d * (x >> 4) + m for x in q]


def fifth_bits(b: bytes, at: int) -> list[int]:
    bits = int.from_bytes(b[at : at + 4], "little")
    return [(bits >> i & 1) << 4 for i in range(32)]


def q5_0(b: bytes) -> list[float]:
    d, high, q = half(b, 0), fifth_bits(b, 2), b[6:22]
    low = [x & 15 for x in q] + [x >> 4 for x in q]
    return [d * ((x | h) - 16) for x, h in zip(low, high, strict=True)]


def q5_1(b: bytes) -> list[float]:
    d, m, high, q = half(b, 0), half(b, 2), fifth_bits(b, 4), b[8:24]
    low = [x & 15 for x in q] + [x >> 4 for x in q]
    return [d * (x | h) + m for x, h in zip(low, high, strict=True)]


def q8_0(b: bytes) -> list[float]:
    return [half(b, 0) * x for x in struct.unpack_from("<32b", b, 2)]


def scale_and_min(s: bytes, j: int) -> tuple[int, int]:
    """Six-bit scale and minimum of sub-block j, out of the 12 bytes that hold eight of each."""
    if j < 4:
        return s[j] & 63, s[j + 4] & 63
    return (s[j + 4] & 15) | (s[j - 4] >> 6) << 4, (s[j + 4] >> 4) | (s[j] >> 6) << 4


def q4_k(b: bytes) -> list[float]:
    d, d_min, s, q = half(b, 0), half(b, 2), b[4:16], b[16:144]
    values = []
    for j in range(8):
        scale, low = scale_and_min(s, j)
        part = q[32 * (j // 2) : 32 * (j // 2) + 32]
        values += [d * scale * (x >> 4 if j % 2 else x & 15) - d_min * low for x in part]
    return values


def q5_k(b: bytes) -> list[float]:
    d, d_min, s, high, q = half(b, 0), half(b, 2), b[4:16], b[16:48], b[48:176]
    values = []
    for j in range(8):
        scale, low = scale_and_min(s, j)
        for i, x in enumerate(q[32 * (j // 2) : 32 * (j // 2) + 32]):
            number = (x >> 4 if j % 2 else x & 15) + (high[i] >> j & 1) * 16
            values.append(d * scale * number - d_min * low)
    return values


def q6_k(b: bytes) -> list[float]:
    d, values = half(b, 208), [0.0] * 256
    scales = struct.unpack_from("<16b", b, 192)
    for part in range(2):
        low, high = b[64 * part : 64 * part + 64], b[128 + 32 * part : 160 + 32 * part]
        for i in range(32):
            for k in range(4):
                x = low[i + 32 * (k % 2)]
                number = (x >> 4 if k >= 2 else x & 15) | (high[i] >> 2 * k & 3) << 4
                scale = scales[8 * part + i // 16 + 2 * k]
                values[128 * part + 32 * k + i] = d * scale * (number - 32)
    return values


# ggml's number of the type, values and bytes a block, where its half floats are, and the decoder
TYPES = {
    "Q4_0": (2, 32, 18, (0,), q4_0),
    "Q4_1": (3, 32, 20, (0, 2), q4_1),
    "Q5_0": (6, 32, 22, (0,), q5_0),
    "Q5_1": (7, 32, 24, (0, 2), q5_1),
    "Q8_0": (8, 32, 34, (0,), q8_0),
    "Q4_K": (12, 256, 144, (0, 2), q4_k),
    "Q5_K": (13, 256, 176, (0, 2), q5_k),
    "Q6_K": (14, 256, 210, (208,), q6_k),
}


def random_block(name: str, random: np.random.Generator) -> bytes:
    """Arbitrary bits with half floats of an ordinary size."""
    _, _, size, halves, _ = TYPES[name]
    block = bytearray(random.bytes(size))
    for at in halves:
        struct.pack_into("<e", block, at, random.uniform(-2, 2))
    return bytes(block)
