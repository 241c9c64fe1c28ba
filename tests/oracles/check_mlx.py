"""Loads folders with mlx-lm: the weights MLX unpacks, and the logits of a prompt."""

import sys

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_model

from llama import TOKENS, Llama, Verdict, differences, folders, read_config, reference, relative


def unpacked(model):
    """Every packed layer's weight, by name, in the arithmetic of MLX."""
    for name, module in model.named_modules():
        if hasattr(module, "scales"):
            weight = mx.dequantize(
                module.weight, module.scales, module.biases, module.group_size, module.bits
            )
            yield name, np.array(weight.astype(mx.float32)), module.scales.dtype


def main():
    verdict = Verdict()
    for folder in folders(__doc__):
        expected, about = reference(folder)
        model, _ = load_model(folder)
        count = changed = 0
        largest, half = 0.0, False
        for name, weight, kind in unpacked(model):
            wrong, by = differences(weight, expected[name + ".weight"])
            count, changed, largest = count + 1, changed + wrong, max(largest, by)
            half |= kind == mx.float16
        said = about.get("rounding", {"changed": 0, "largest": 0.0})
        exact = changed == said["changed"] and np.float32(largest) == np.float32(said["largest"])
        logits = np.array(model(mx.array([TOKENS])).astype(mx.float32))[0]
        error = relative(logits, Llama(read_config(folder), expected).logits(TOKENS))
        passed = count > 0 and exact and error < (2e-2 if half else 2e-5)
        verdict.say(
            folder,
            passed,
            f"{count} layers, {changed} weights changed, by {largest:.1e}; logits {error:.1e}",
        )
    return verdict.exit_code()


if __name__ == "__main__":
    sys.exit(main())
