"""What the checks share: a reference model, its forward pass in float64, and the verdict."""

import argparse
import json
import pathlib

import numpy as np
from safetensors import safe_open

TOKENS = [1, 72, 104, 111, 35, 87, 300, 117, 290, 12, 5, 200]


def folders(about):
    """The folders of the command line."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("folders", nargs="+", type=pathlib.Path)
    return parser.parse_args().folders


def read_tensors(path):
    """All tensors of a safetensors file, and its string table."""
    with safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


def reference(folder):
    """The trained weights, and what the writer says about them."""
    tensors, table = read_tensors(folder.parent / f"{folder.name}.reference.safetensors")
    # A tied model may hold its one matrix under the head's name.
    tensors.setdefault("model.embed_tokens.weight", tensors.get("lm_head.weight"))
    return tensors, json.loads(table.get("about", "{}"))


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


class Llama:
    """A Llama forward pass over f32 weights, computed in float64."""

    def __init__(self, config, weights):
        self.config = config
        self.weights = {name: value.astype(np.float64) for name, value in weights.items()}

    def norm(self, x, name):
        mean = np.mean(x * x, axis=-1, keepdims=True)
        return x / np.sqrt(mean + self.config["rms_norm_eps"]) * self.weights[name + ".weight"]

    def apply(self, x, name):
        return x @ self.weights[name + ".weight"].T

    def rotate(self, x):
        """Rotary embedding of [tokens, heads, size]; the two halves of a head are one pair."""
        half = x.shape[-1] // 2
        speeds = self.config["rope_theta"] ** (-np.arange(half) / half)
        angle = np.arange(x.shape[0])[:, None, None] * speeds
        a, b = x[..., :half], x[..., half:]
        return np.concatenate(
            [a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)], -1
        )

    def attend(self, x, block):
        heads, shared = (
            self.config[key] for key in ("num_attention_heads", "num_key_value_heads")
        )
        size = self.config.get("head_dim", self.config["hidden_size"] // heads)
        split = lambda part, n: self.apply(x, f"{block}.{part}_proj").reshape(len(x), n, size)
        queries, keys = self.rotate(split("q", heads)), self.rotate(split("k", shared))
        keys = np.repeat(keys, heads // shared, axis=1)
        values = np.repeat(split("v", shared), heads // shared, axis=1)
        scores = np.einsum("ihd,jhd->hij", queries, keys) / np.sqrt(size)
        scores[:, np.triu(np.ones(scores.shape[1:], bool), 1)] = -np.inf
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hij,jhd->ihd", scores / scores.sum(-1, keepdims=True), values)
        return self.apply(mixed.reshape(len(x), -1), f"{block}.o_proj")

    def logits(self, tokens):
        x = self.weights["model.embed_tokens.weight"][tokens]
        for index in range(self.config["num_hidden_layers"]):
            layer = f"model.layers.{index}"
            x = x + self.attend(self.norm(x, f"{layer}.input_layernorm"), f"{layer}.self_attn")
            h = self.norm(x, f"{layer}.post_attention_layernorm")
            gate = self.apply(h, f"{layer}.mlp.gate_proj")
            h = gate / (1 + np.exp(-gate)) * self.apply(h, f"{layer}.mlp.up_proj")
            x = x + self.apply(h, f"{layer}.mlp.down_proj")
        x = self.norm(x, "model.norm")
        if self.config["tie_word_embeddings"]:
            return x @ self.weights["model.embed_tokens.weight"].T
        return self.apply(x, "lm_head")


def differences(found, expected):
    """How many weights differ in any bit (signed zeros are equal), and by how much at most."""
    if found.shape != expected.shape:
        return expected.size, np.inf
    found, expected = found.astype(np.float32), expected.astype(np.float32)
    wrong = int(np.count_nonzero(found != expected))
    return wrong, float(np.abs(found - expected).max())


def relative(found, expected):
    """The largest error of logits, relative to the largest logit."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


class Verdict:
    """Prints a line per folder and keeps the result."""

    def __init__(self):
        self.failed = 0

    def say(self, folder, passed, text):
        self.failed += not passed
        print(f"{'ok  ' if passed else 'FAIL'} {folder.name:28s} {text}", flush=True)

    def exit_code(self):
        return 1 if self.failed else 0
