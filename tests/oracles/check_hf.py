"""Loads folders with transformers: dense, compressed-tensors, auto-round, gptqmodel (GPTQ, AWQ).

Weights are those of the modules that hold them unpacked; of the others, what a layer makes of the
unit vectors, which is its weights in the layer's own arithmetic.
"""

import argparse
import sys
import warnings

import numpy as np
import torch
import transformers

from llama import TOKENS, Cannot, Truth, differences, judge, read_config, reference

HALF = {"gptq", "awq", "auto-round"}
# The kernels that multiply with weights unpacked as the format says, without tricks.
PLAIN = {"gptq": "gptq_torch", "awq": "torch_awq"}


def excuse(error, section):
    """Why a pinned loader is known to fail like this, if it is."""
    text = str(error)
    schemes = [group["weights"] for group in section.get("config_groups", {}).values()]
    if "mismatched_sizes" in text and any(32 % scheme["num_bits"] for scheme in schemes):
        return "compressed-tensors 0.17.1 pads 3- and 5-bit codes to words, 0.18 does not"
    if "expect qGroupSize" in text:
        return "its 4-bit kernel wants groups of 32 to 256, and is chosen for whole rows too"
    return None


def load(folder, half, plain):
    config = transformers.AutoConfig.from_pretrained(folder)
    if plain:
        section = config.quantization_config
        section["backend"] = PLAIN[section["quant_method"]]
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float16 if half else torch.float32, device_map="cpu"
    ).eval()


def weights(model):
    """(name, weight, kind of layer) of every linear."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if (
            isinstance(module, torch.nn.Linear)
            and weight is not None
            and weight.is_floating_point()
        ):
            yield name, weight, "Linear"
        elif hasattr(module, "qweight"):
            size = getattr(module, "in_features", None) or module.infeatures
            units = torch.eye(size, dtype=module.scales.dtype)
            yield name, module(units).T, type(module).__name__


def compare(model, expected, kind):
    """(linears, changed weights, largest change, kinds of layers) when both are rounded to a kind.

    The change is relative to the largest weight of a linear.
    """
    count = changed = 0
    largest, layers = 0.0, set()
    for name, weight, layer in weights(model):
        found, wanted = weight.detach().float().numpy(), expected[name + ".weight"]
        found, wanted = (value.astype(kind).astype(np.float32) for value in (found, wanted))
        count, changed = count + 1, changed + differences(found, wanted)
        largest = max(largest, float(np.abs(found - wanted).max() / np.abs(wanted).max()))
        layers.add(layer)
    return count, changed, largest, "+".join(sorted(layers))


def read(folder, section, plain):
    expected, truth = reference(folder), Truth(folder)
    half = section.get("quant_method") in HALF
    model = load(folder, half, plain)
    with torch.no_grad():
        logits = model(torch.tensor([truth.tokens])).logits[0].float().numpy()
        ids = model.generate(
            torch.tensor([TOKENS]), max_new_tokens=len(truth.continuation), do_sample=False
        )[0, len(TOKENS) :]
        kind = np.float16 if half else np.float32
        count, changed, largest, layers = compare(model, expected, kind)
    passed, said = truth.judge(logits, ids.tolist(), 1e-2 if half else 2e-5)
    # A kernel that multiplies out scale and zero in f16 is that much away; a code would be more.
    passed &= count > 0 and largest <= (2**-10 if half else 0)
    by = f" by {largest:.1e}" if changed else ""
    text = f"{layers}: {count} linears, {changed} {'f16 ' * half}weights changed{by}; {said}"
    return "fails" if not passed else "within" if changed else "exact", text


def check(folder, options):
    section = read_config(folder).get("quantization_config", {})
    try:
        return read(folder, section, options.plain)
    except RuntimeError as error:
        reason = excuse(error, section)
        if reason:
            raise Cannot(reason) from error
        raise


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--plain", action="store_true", help="gptqmodel's plain kernels")
    sys.exit(judge(__doc__, check, arguments))
