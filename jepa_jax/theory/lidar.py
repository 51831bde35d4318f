"""LiDAR: how many directions tell one image from another, measured against how its views scatter.

Legend: N images, V views of each, D width.
"""

from __future__ import annotations

import numpy as np
import scipy  # its parts are loaded when they are used


def lidar(z_NxVxD: np.ndarray, delta: float = 1e-4) -> float:
  """Returns LiDAR (Thilak et al., arXiv 2312.04000), an effective rank in [1, min(N - 1, D)].

  exp of the entropy of the eigenvalues of W^(-1/2) B W^(-1/2), divided by their sum: B the covariance of the images'
  means, W the mean covariance of an image's views + delta I. 0 where all images have one mean. In float64 on the host.

  Raises:
    ValueError: z is not (N, V, D) with at least 2 images and 2 views.
  """
  z_NxVxD = np.asarray(z_NxVxD, np.float64)
  if z_NxVxD.ndim != 3 or min(z_NxVxD.shape[:2]) < 2:
    raise ValueError(f"z must be (N images, V views, D) with N and V of at least 2, got shape {z_NxVxD.shape}")
  num, views, width = z_NxVxD.shape
  mean_NxD = z_NxVxD.mean(1)
  between_DxD = np.cov(mean_NxD.T).reshape(width, width)
  apart_RxD = (z_NxVxD - mean_NxD[:, None]).reshape(-1, width)
  within_DxD = apart_RxD.T @ apart_RxD / (num * (views - 1)) + delta * np.eye(width)
  values_D = np.maximum(scipy.linalg.eigh(between_DxD, within_DxD, eigvals_only=True), 0)
  total = values_D.sum()
  return float(np.exp(scipy.special.entr(values_D / total).sum())) if total > 0 else 0.0
