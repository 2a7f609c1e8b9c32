"""Paddle's byte layouts: golden files, and the formulas of the layout for every shape."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.checkpoint import paddle_layout
from engine.errors import CheckpointError

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
TILES = st.integers(1, 4)


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("bits", [8, 4])
def test_golden_bytes_decode_to_the_weights_and_encode_back(size: str, bits: int) -> None:
    data = np.load(GOLDEN / f"weight_only_{size}.npz")
    stored = torch.from_numpy(data[f"int{bits}_quant_weight"])
    scale = torch.from_numpy(data[f"int{bits}_weight_scale"]).float()
    weight = torch.from_numpy(data["weight_fp16"]).float()
    decode = getattr(paddle_layout, f"decode_int{bits}")
    encode = getattr(paddle_layout, f"encode_int{bits}")
    values = decode(stored)
    assert values.shape == weight.shape
    # Paddle rounds in fp16, so a value may be off the nearest by a trifle more than half a step.
    assert ((values * scale - weight).abs() <= 0.51 * scale).all()
    assert torch.equal(encode(values), stored)


def int8_index(k: int, n: int, rows: int) -> int:
    """Where (k, n) lies in the flat buffer, by the published formula."""
    m = k % 16
    p = 2 * m if m < 8 else 2 * (m - 8) + 1
    kk = p + 16 * (k // 16)
    return kk % 64 + (kk // 64) * 128 + 64 * (n % 2) + 2 * rows * (n // 2)


def int4_index(k: int, n: int, rows: int) -> tuple[int, int]:
    """(byte, nibble) of (k, n), by the published formula."""
    k2 = k // 2
    r = k2 % 16
    kk = (r % 4) * 4 + r // 4 + 16 * (k2 // 16)
    b0 = kk % 32 + (kk // 32) * 128 + 32 * (n % 4) + 2 * rows * (n // 4)
    t = 2 * (b0 % 4) + k % 2
    o = t // 2 if t % 2 == 0 else 4 + t // 2
    return 4 * (b0 // 4) + o // 2, o % 2


@settings(deadline=None, max_examples=15)
@given(k_tiles=TILES, n_tiles=TILES, seed=st.integers(0, 1000))
def test_int8_layout_is_the_formula(k_tiles: int, n_tiles: int, seed: int) -> None:
    rows, columns = 64 * k_tiles, 2 * n_tiles
    stored = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (columns, rows), dtype=np.uint8))
    values = paddle_layout.decode_int8(stored)
    flat = stored.flatten().tolist()
    expected = [[flat[int8_index(k, n, rows)] - 128 for n in range(columns)] for k in range(rows)]
    assert values.tolist() == expected
    assert torch.equal(paddle_layout.encode_int8(values), stored.view(torch.int8))


@settings(deadline=None, max_examples=15)
@given(k_tiles=TILES, n_tiles=TILES, seed=st.integers(0, 1000))
def test_int4_layout_is_the_formula(k_tiles: int, n_tiles: int, seed: int) -> None:
    rows, columns = 64 * k_tiles, 4 * n_tiles
    stored = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (columns // 2, rows), dtype=np.uint8))
    values = paddle_layout.decode_int4(stored)
    flat = stored.flatten().tolist()

    def expected(k: int, n: int) -> int:
        byte, nibble = int4_index(k, n, rows)
        return (flat[byte] >> (4 * nibble) & 15) - 8

    assert values.tolist() == [[expected(k, n) for n in range(columns)] for k in range(rows)]
    assert torch.equal(paddle_layout.encode_int4(values), stored.view(torch.int8))


@pytest.mark.parametrize(("shape", "bits"), [((4, 96), 8), ((3, 64), 8), ((1, 64), 4), ((2, 32), 4)])
def test_a_shape_without_a_layout_is_refused(shape: tuple[int, int], bits: int) -> None:
    with pytest.raises(CheckpointError, match="must be a multiple of 64"):
        getattr(paddle_layout, f"decode_int{bits}")(torch.zeros(shape, dtype=torch.int8))
