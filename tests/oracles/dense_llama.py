"""A dense Hugging Face Llama folder in numpy: configuration, tensors, forward pass in float64."""

import json
import math
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file


class DenseLlama:
    def __init__(self, folder):
        self.folder = Path(folder)
        self.config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        c = self.config
        self.heads = c["num_attention_heads"]
        self.kv_heads = c.get("num_key_value_heads") or self.heads
        self.head_dim = c.get("head_dim") or c["hidden_size"] // self.heads
        self.tensors = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            self.tensors.update(load_file(file))
        embedding, head = "model.embed_tokens.weight", "lm_head.weight"
        if embedding not in self.tensors:
            self.tensors[embedding] = self.tensors[head]
        if head not in self.tensors:
            self.tensors[head] = self.tensors[embedding]
        self.wide = {name: value.astype(np.float64) for name, value in self.tensors.items()}

    def frequencies(self):
        """Angles per position of the rotary embedding, with Llama 3.1's or linear stretching."""
        c = self.config
        rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
        theta = rope.get("rope_theta") or c.get("rope_theta") or 10000.0
        plain = theta ** -(np.arange(0, self.head_dim, 2) / self.head_dim)
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind == "default":
            return plain
        if kind == "linear":
            return plain / rope["factor"]
        if kind != "llama3":
            raise SystemExit(f"rope type {kind} is not known here")
        turns = rope["original_max_position_embeddings"] * plain / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = np.clip((turns - low) / (high - low), 0, 1)
        return plain * kept + plain / rope["factor"] * (1 - kept)

    def logits(self, ids):
        """Logits after the last of `ids`."""
        w, count = self.wide, len(ids)
        angles = np.arange(count)[:, None] * self.frequencies()
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]

        def linear(x, name):
            y = x @ w[name + ".weight"].T
            return y + w[name + ".bias"] if name + ".bias" in w else y

        def norm(x, name):
            mean = np.square(x).mean(-1, keepdims=True) + self.config["rms_norm_eps"]
            return x / np.sqrt(mean) * w[name + ".weight"]

        def heads(x, name, number):
            return linear(x, name).reshape(count, number, self.head_dim)

        def turn(x):
            first, second = np.split(x, 2, axis=-1)
            return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

        future = np.triu(np.full((count, count), -np.inf), 1)
        x = w["model.embed_tokens.weight"][ids]
        for block in range(self.config["num_hidden_layers"]):
            at = f"model.layers.{block}."
            h = norm(x, at + "input_layernorm")
            q = turn(heads(h, at + "self_attn.q_proj", self.heads))
            k = turn(heads(h, at + "self_attn.k_proj", self.kv_heads))
            v = heads(h, at + "self_attn.v_proj", self.kv_heads)
            k, v = (np.repeat(t, self.heads // self.kv_heads, axis=1) for t in (k, v))
            scores = np.einsum("qhd,khd->hqk", q, k) / math.sqrt(self.head_dim) + future
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            scores /= scores.sum(-1, keepdims=True)
            mixed = np.einsum("hqk,khd->qhd", scores, v).reshape(count, -1)
            x = x + linear(mixed, at + "self_attn.o_proj")
            h = norm(x, at + "post_attention_layernorm")
            gate = linear(h, at + "mlp.gate_proj")
            h = gate / (1 + np.exp(-gate)) * linear(h, at + "mlp.up_proj")
            x = x + linear(h, at + "mlp.down_proj")
        return norm(x[-1], "model.norm") @ w["lm_head.weight"].T


def log_softmax(logits):
    shifted = logits - logits.max()
    return shifted - math.log(np.exp(shifted).sum())
