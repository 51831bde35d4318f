"""Position embeddings of patch grids.

Legend: N patches in raster order (row by row), D width, K width of a head; B values before and A after, of one axis.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

PositionFilter = Literal["cubic", "torch", "antialiased"]
ROTARY_BASE = 100.0  # DINOv3's


def sincos_position_embedding(
  grid_hw: tuple[int, int], width: int, native_hw: tuple[int, int] | None = None
) -> np.ndarray:
  """Fixed 2-D sin-cos embedding, (N, D) float32, the halves in I-JEPA's order [x | y].

  Each half of D' = D/2 numbers is [sin(p w), cos(p w)] with w_i = 10000^(-i / (D'/2)), p the column (x) or the row (y).
  Another grid than native_hw is recomputed, not interpolated: its positions (half-pixel centres) are spread over the
  native grid, so an image at another resolution covers the same coordinates. At native size p = 0, 1, 2, ...

  Raises:
    ValueError: width is not divisible by 4.
  """
  if width % 4:
    raise ValueError(f"a 2-D sin-cos embedding needs a width divisible by 4, got {width}")
  native_hw = native_hw or grid_hw
  rows, cols = ((np.arange(g) + 0.5) * native / g - 0.5 for g, native in zip(grid_hw, native_hw))
  y_N, x_N = (p.reshape(-1) for p in np.meshgrid(rows, cols, indexing="ij"))
  return np.concatenate([_sincos(x_N, width // 2), _sincos(y_N, width // 2)], axis=1).astype(np.float32)


def _sincos(position_N: np.ndarray, width: int) -> np.ndarray:
  omega = 10000.0 ** (-np.arange(width // 2) / (width / 2))
  angle_NxK = position_N[:, None] * omega
  return np.concatenate([np.sin(angle_NxK), np.cos(angle_NxK)], axis=1)


def resize_position_embedding(
  pos_1xNxD: jax.Array, native_hw: tuple[int, int], grid_hw: tuple[int, int], filter: PositionFilter = "cubic"
) -> jax.Array:
  """A learned embedding on another grid, (1, h*w, D): bicubic by the filter of its family; itself at native size.

  "cubic" is Keys' with a = -1/2, not antialiased; "torch" PyTorch's bicubic (a = -3/4, not antialiased: DINO, DINOv2,
  Hugging Face's ViTs); "antialiased" PyTorch's antialiased one (a = -1/2: timm, DINOv2 with registers).
  """
  if grid_hw == native_hw:
    return pos_1xNxD
  width = pos_1xNxD.shape[-1]
  grid = pos_1xNxD.reshape(*native_hw, width).astype(jnp.float32)
  rows, columns = (jnp.asarray(_resize_matrix(n, m, filter)) for n, m in zip(native_hw, grid_hw, strict=True))
  resized = jnp.einsum("hH,wW,HWd->hwd", rows, columns, grid, precision=jax.lax.Precision.HIGHEST)
  return resized.reshape(1, grid_hw[0] * grid_hw[1], width)


def _resize_matrix(before: int, after: int, filter: PositionFilter) -> np.ndarray:
  """Returns the weights (after, before), float32, of a cubic filter with half-pixel centres."""
  a = -0.75 if filter == "torch" else -0.5
  scale = before / after
  stretch = max(scale, 1.0) if filter == "antialiased" else 1.0
  centre_A = (np.arange(after) + 0.5) * scale - 0.5
  if (
    filter == "torch"
  ):  # beyond the edge it repeats the last value; the others have nothing there, and weigh the rest more
    taps_AxT = np.floor(centre_A)[:, None].astype(int) + np.arange(-1, 3)
    weights_AxB = np.zeros((after, before))
    places = np.broadcast_to(np.arange(after)[:, None], taps_AxT.shape), np.clip(taps_AxT, 0, before - 1)
    np.add.at(weights_AxB, places, _cubic(taps_AxT - centre_A[:, None], a))
    return weights_AxB.astype(np.float32)
  weights_AxB = _cubic((np.arange(before) - centre_A[:, None]) / stretch, a)
  return (weights_AxB / weights_AxB.sum(1, keepdims=True)).astype(np.float32)


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
  """Keys' cubic convolution kernel (1981)."""
  x = np.abs(x)
  near = (a + 2) * x**3 - (a + 3) * x**2 + 1
  far = a * (x**3 - 5 * x**2 + 8 * x - 4)
  return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def axial_rotation(
  grid_hw: tuple[int, int], head_width: int, base: float = ROTARY_BASE
) -> tuple[np.ndarray, np.ndarray]:
  """Returns (cosines, sines), float32 (N, K), of DINOv3's rotary positions for a grid, K = head_width.

  Row and column lie in (-1, 1), half-pixel centres, so a grid of any size covers the same range; each turns K/4 pairs
  of numbers, pair i once per base^(4i/K). Pairs are (k, k + K/2).

  Raises:
    ValueError: head_width is not divisible by 4.
  """
  if head_width % 4:
    raise ValueError(f"axial rotary positions need heads whose width is divisible by 4, got {head_width}")
  frequencies_F = base ** -(np.arange(0, 1, 4 / head_width))
  rows, columns = ((2 * np.arange(g) + 1) / g - 1 for g in grid_hw)
  at_Nx2 = np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(-1, 2)
  angles_NxK = np.tile((2 * np.pi * at_Nx2[:, :, None] * frequencies_F).reshape(len(at_Nx2), -1), 2)
  return np.cos(angles_NxK).astype(np.float32), np.sin(angles_NxK).astype(np.float32)


def rotate(x_BxNxHxK: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Returns queries or keys turned by (cosines, sines), each (N, K) or (B, N, K): in float32, then in their dtype."""
  cos, sin = (t[..., None, :] for t in rotation)
  x = x_BxNxHxK.astype(jnp.float32)
  first, second = jnp.split(x, 2, axis=-1)
  return (x * cos + jnp.concatenate([-second, first], axis=-1) * sin).astype(x_BxNxHxK.dtype)
