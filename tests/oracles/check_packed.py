"""Decodes packed folders in numpy, after the formats' descriptions: the trained weights bit for bit."""

import re
import sys

import numpy as np
from safetensors.numpy import load_file

from llama import differences, judge, read_config, reference


def stream(words, bits, count):
    """The first `count` codes of each row of 32-bit words, lowest bits first."""
    data = np.ascontiguousarray(words).view(np.uint8)
    flat = np.unpackbits(data, axis=-1, bitorder="little")[:, : count * bits]
    place = 1 << np.arange(bits, dtype=np.int64)
    return (flat.reshape(len(words), count, bits) * place).sum(-1)


def spread(values, inputs):
    """Per-group values [out, groups] as one per weight."""
    return np.repeat(values, inputs // values.shape[1], axis=1)


def on_grid(codes, scale, zero):
    inputs = codes.shape[1]
    scale = scale.astype(np.float32)
    return spread(scale, inputs) * (codes - spread(zero, inputs)).astype(np.float32)


def mlx(tensors, name, config):
    own = config.get(name, config)
    words, kind = tensors[name + ".weight"], tensors[name + ".scales"].dtype
    inputs = words.shape[1] * 32 // own["bits"]
    codes = stream(words, own["bits"], inputs).astype(kind)
    scale, bias = (spread(tensors[f"{name}.{part}"], inputs) for part in ("scales", "biases"))
    return ((scale * codes).astype(kind) + bias).astype(kind)


def gptq(tensors, name, config):
    own = config.get("extra_config", {}).get(name, config)
    for pattern, entry in config.get("dynamic", {}).items():
        if pattern.startswith("+:") and re.match(pattern[2:], name):
            own = entry
    bits = own["bits"]
    words, scales = tensors[name + ".qweight"], tensors[name + ".scales"]
    inputs, out = words.shape[0] * 32 // bits, words.shape[1]
    codes = stream(words.T, bits, inputs)
    first = "gptq" in (
        config.get("checkpoint_format"),
        config.get("packing_format", "").split("auto_")[-1],
    )
    zero = stream(tensors[name + ".qzeros"], bits, out) + int(first)
    size = own["group_size"] if own["group_size"] != -1 else inputs
    groups = tensors.get(name + ".g_idx", np.arange(inputs) // size)
    return scales.astype(np.float32)[groups].T * (codes - zero[groups].T).astype(np.float32)


def awq(tensors, name, config):
    def columns(words):
        nibbles = words.view(np.uint32)[..., None] >> (4 * np.arange(8, dtype=np.uint32)) & 15
        codes = np.empty(nibbles.shape, np.int64)
        codes[..., [0, 2, 4, 6, 1, 3, 5, 7]] = nibbles
        return codes.reshape(len(words), -1).T

    weight, zeros = columns(tensors[name + ".qweight"]), columns(tensors[name + ".qzeros"])
    return on_grid(weight, tensors[name + ".scales"].T, zeros)


def compressed(tensors, name, config):
    groups = config["config_groups"].values()
    scheme = next(g["weights"] for g in groups if {name, "Linear"} & set(g["targets"]))
    bits, (out, inputs) = scheme["num_bits"], tensors[name + ".weight_shape"]
    codes = stream(tensors[name + ".weight_packed"], bits, inputs)
    scale = tensors[name + ".weight_scale"]
    zero = np.full(scale.shape, 1 << bits - 1)
    if not scheme["symmetric"]:
        zero = stream(tensors[name + ".weight_zero_point"].T, bits, out).T
    return on_grid(codes, scale, zero)


def planes(tensors, name, config, bits):
    (out, inputs), group = (config["linears"][name][key] for key in ("shape", "group_size"))
    words, nested = tensors[name + ".qweight"], config["layout"] == "plane_major"
    by_plane = words if nested else words.transpose(1, 0, 2)
    suffix = f"_{bits}" if nested else ""
    alpha, offset = tensors[f"{name}.alpha{suffix}"], tensors[f"{name}.offset{suffix}"]
    index = np.arange(inputs)
    total = np.float32(0)
    for plane in range(bits):
        bit = by_plane[plane][index // 32] >> (index % 32)[:, None].astype(np.uint32) & 1
        term = np.where(bit == 1, alpha[:, plane][index // group], -alpha[:, plane][index // group])
        total = term + total if plane else term
    return (total + offset[index // group]).T


READERS = {"gptq": gptq, "auto-round": gptq, "awq": awq, "compressed-tensors": compressed}


def weights(tensors, config):
    """(name, weight) of every packed linear."""
    section = config.get("quantization_config", {})
    method = section.get("quant_method", "mlx")
    if method == "bcq":
        for name in section["linears"]:
            yield name, planes(tensors, name, section, max(section["precisions"]))
        return
    read = READERS.get(method, mlx)
    marks = (".scales", ".weight_scale")
    names = [key[: -len(mark)] for key in tensors for mark in marks if key.endswith(mark)]
    for name in sorted(set(names)):
        yield name, read(tensors, name, section)


def check(folder, _):
    expected = reference(folder)
    tensors = load_file(folder / "model.safetensors")
    count = changed = 0
    for name, weight in weights(tensors, read_config(folder)):
        count, changed = count + 1, changed + differences(weight, expected[name + ".weight"])
    passed = count > 0 and changed == 0
    return "exact" if passed else "fails", f"{count} linears, {changed} weights changed"


if __name__ == "__main__":
    sys.exit(judge(__doc__, check))
