"""The losses of the neighbours beside those of lightly, which nobody here wrote: values and gradients."""

from __future__ import annotations

import importlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jepa_jax import losses

torch = pytest.importorskip("torch")
pytest.importorskip("lightly")

A = np.random.RandomState(0).randn(12, 16).astype(np.float32)
B = (0.8 * A + 0.6 * np.random.RandomState(1).randn(12, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def theirs():
  """lightly.loss; it imports names of torchvision that none of these losses uses, and that are not always there."""
  with pytest.MonkeyPatch.context() as patch:
    if importlib.util.find_spec("torchvision") is None:
      for name in ("torchvision", "torchvision.ops", "torchvision.models", "torchvision.models.vision_transformer"):
        patch.setitem(sys.modules, name, _Empty(name))
        parent, _, child = name.rpartition(".")
        if parent:
          setattr(sys.modules[parent], child, sys.modules[name])
    yield importlib.import_module("lightly.loss")


class _Empty(types.ModuleType):
  """A module that has a class of every name."""

  __path__: list[str] = []

  def __getattr__(self, name: str):
    if name.startswith("__"):
      raise AttributeError(name)
    return type(name, (), {})


PAIRS = {
  "nt_xent": (lambda loss: loss.NTXentLoss(temperature=0.2), lambda z: losses.nt_xent(z, 0.2)),
  "barlow": (lambda loss: loss.BarlowTwinsLoss(lambda_param=5e-3), lambda z: losses.barlow_twins(z, 5e-3)),
  "vicreg": (lambda loss: loss.VICRegLoss(25.0, 25.0, 1.0), lambda z: losses.vicreg(z)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_values_and_gradients_of_two_views_are_theirs(theirs, name):
  make, ours = PAIRS[name]
  a, b = (torch.tensor(x, requires_grad=True) for x in (A, B))
  expected = make(theirs)(a, b)
  expected.backward()
  found, gradient = jax.value_and_grad(lambda z: ours(z)[0])(jnp.stack([A, B], 1))
  assert float(found) == pytest.approx(expected.item(), rel=1e-5)
  for view, x in enumerate((a, b)):
    scale = float(x.grad.abs().max())
    np.testing.assert_allclose(gradient[:, view], x.grad.numpy(), atol=2e-5 * scale)


def test_byol_is_their_negative_cosine_of_both_sides(theirs):
  loss = theirs.NegativeCosineSimilarity()
  p, q = (torch.tensor(x, requires_grad=True) for x in (A, B))
  targets = torch.tensor(B[::-1].copy()), torch.tensor(A[::-1].copy())
  expected = (loss(p, targets[1]) + loss(q, targets[0])) / 2
  expected.backward()
  target = jnp.stack([targets[0].numpy(), targets[1].numpy()], 1)
  found, gradient = jax.value_and_grad(lambda z: losses.byol(z, target)[0])(jnp.stack([A, B], 1))
  assert float(found) == pytest.approx(2 + 2 * expected.item(), rel=1e-5)
  np.testing.assert_allclose(gradient[:, 0], 2 * p.grad.numpy(), atol=1e-6)
  np.testing.assert_allclose(gradient[:, 1], 2 * q.grad.numpy(), atol=1e-6)


def test_dino_with_small_views_is_theirs_and_so_is_the_centre_after_it(theirs):
  loss = theirs.DINOLoss(output_dim=16, warmup_teacher_temp=0.04, teacher_temp=0.04, warmup_teacher_temp_epochs=1)
  student = [torch.tensor(x, requires_grad=True) for x in np.random.RandomState(3).randn(4, 8, 16).astype(np.float32)]
  teacher = [torch.tensor(x) for x in np.random.RandomState(4).randn(2, 8, 16).astype(np.float32)]
  centre = jnp.zeros(16)
  for _ in range(2):  # the second time with a centre that has moved
    for x in student:
      x.grad = None
    expected = loss(teacher, student, epoch=5)
    expected.backward()
    run = lambda s, centre=centre: losses.dino(s, _stacked(teacher), centre, 0.1, 0.04)[0]
    found, gradient = jax.value_and_grad(run)(_stacked(student))
    assert float(found) == pytest.approx(expected.item(), rel=1e-5)
    for view, x in enumerate(student):
      np.testing.assert_allclose(gradient[:, view], x.grad.numpy(), atol=1e-5)
    centre = losses.dino_centre(centre, _stacked(teacher))
    np.testing.assert_allclose(centre, np.ravel(_centre(loss)), rtol=1e-4, atol=1e-6)


def _stacked(views):
  return jnp.stack([x.detach().numpy() for x in views], 1)


def _centre(loss):
  return next(buffer for name, buffer in loss.named_buffers() if "center" in name).detach().numpy()
