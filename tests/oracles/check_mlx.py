"""Loads folders with mlx-lm: the weights MLX unpacks, logits, and a greedy continuation."""

import sys

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

from llama import TOKENS, Truth, differences, judge, reference


def unpacked(model):
    """Every packed layer's weight, by name, in the arithmetic of MLX."""
    for name, module in model.named_modules():
        if hasattr(module, "scales"):
            weight = mx.dequantize(
                module.weight, module.scales, module.biases, module.group_size, module.bits
            )
            yield name, np.array(weight.astype(mx.float32)), module.scales.dtype


def check(folder, _):
    expected, truth = reference(folder), Truth(folder)
    model, _ = load_model(folder)
    count = changed = 0
    half = False
    for name, weight, kind in unpacked(model):
        count, changed = count + 1, changed + differences(weight, expected[name + ".weight"])
        half |= kind == mx.float16
    logits = np.array(model(mx.array([truth.tokens])).astype(mx.float32))[0]
    steps = generate_step(mx.array(TOKENS), model, max_tokens=len(truth.continuation))
    passed, said = truth.judge(logits, [int(token) for token, _ in steps], 2e-2 if half else 2e-5)
    passed &= count > 0 and changed == 0
    return "exact" if passed else "fails", f"{count} layers, {changed} weights changed; {said}"


if __name__ == "__main__":
    sys.exit(judge(__doc__, check))
