"""FLOPs of one instruction of an NVIDIA program: products, convolutions and fused attention, also as library calls."""

from __future__ import annotations

import math
import re

_DIMS = re.compile(r"\b[a-z]+\d+\w*\[([\d,]*)\]")
_CONTRACTED = re.compile(r'lhs_contracting_dim(?:ension)?s"?[=:]\s*[{\[]([\d,\s"]*)[}\]]')
_LABELS = re.compile(r"dim_labels=\w+_(\w+)->\w+")
_FMHA = {"__cudnn$fmhaSoftmax": 2, "__cudnn$fmhaSoftmaxBackward": 5}  # products: q k^T and p v; five in the gradient


def flops(opcode: str, line: str, operands: list[str]) -> int:
  """Returns 2 FLOPs per multiply-add of one instruction, given the lines that define its operands; 0 for any other."""
  target = re.search(r'custom_call_target="([^"]*)"', line)
  name = target[1] if target else opcode
  if name == "dot" or name.startswith("__cublas"):
    return _product(line, operands)
  if name == "convolution" or name.startswith("__cudnn$conv"):
    return _convolution(name, line, operands)
  if name in _FMHA:
    q_BxNxHxK, k_BxMxHxK = _dims(operands[0]), _dims(operands[1])
    return 2 * _FMHA[name] * math.prod(q_BxNxHxK) * k_BxMxHxK[1]
  return 0


def _dims(line: str) -> list[int]:
  """The first array that a line defines."""
  match = _DIMS.search(line.partition(" = ")[2])
  return [int(d) for d in match[1].split(",") if d] if match else []


def _product(line: str, operands: list[str]) -> int:
  contracted = _CONTRACTED.search(line)
  if not contracted:
    return 0
  left = _dims(operands[0])
  return 2 * math.prod(_dims(line)) * math.prod(left[int(d)] for d in re.findall(r"\d+", contracted[1]))


def _convolution(name: str, line: str, operands: list[str]) -> int:
  labels = _LABELS.search(line)
  if not labels or len(operands) < 2:
    return 0
  out, kernel = line, operands[1]
  if "BackwardInput" in name:
    out = operands[0]
  elif "BackwardFilter" in name:
    out, kernel = operands[1], line
  kernel_dims = _dims(kernel)
  return 2 * math.prod(_dims(out)) * math.prod(kernel_dims) // kernel_dims[labels[1].index("o")]
