"""Small Llamas with random weights, as Hugging Face folders.

    random_models.py SOURCE TARGET

SOURCE is a folder of a Llama whose configuration, vocabulary and tokenizer files are taken; in
TARGET one folder per model is made. Rows differ in size and values have heavy tails, as trained
weights do; norms are such that logits spread over a few nats.
"""

import json
import pathlib
import shutil
import sys

import numpy as np
from safetensors.numpy import save_file

# Heads share keys and values; in the second, heads together are wider than the model.
MODELS = {
    "random-256-tied": {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "tie_word_embeddings": True,
    },
    "random-512-untied": {
        "hidden_size": 512,
        "intermediate_size": 1280,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 96,
        "tie_word_embeddings": False,
    },
}


def matrix(random, out, inputs, size):
    """Heavy-tailed values of about a size, in rows of different sizes."""
    rows = np.exp(random.normal(0, 0.3, (out, 1)))
    return (size * rows * random.standard_t(6, (out, inputs))).astype(np.float32)


def norm(random, width, gain=1.0):
    return (gain * np.exp(random.normal(0, 0.2, width))).astype(np.float32)


def weights(config, seed):
    random = np.random.default_rng(seed)
    width, inner = config["hidden_size"], config["intermediate_size"]
    queries, shared = (
        config[key] * config["head_dim"] for key in ("num_attention_heads", "num_key_value_heads")
    )
    tensors = {"model.norm.weight": norm(random, width, 3.0)}
    tensors["model.embed_tokens.weight"] = matrix(random, config["vocab_size"], width, 0.04)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(random, config["vocab_size"], width, 0.03)
    shapes = {
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (shared, width),
        "self_attn.v_proj": (shared, width),
        "self_attn.o_proj": (width, queries),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    for block in range(config["num_hidden_layers"]):
        at = f"model.layers.{block}."
        for name, (out, inputs) in shapes.items():
            tensors[f"{at}{name}.weight"] = matrix(random, out, inputs, 0.7 / inputs**0.5)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}{name}.weight"] = norm(random, width)
    return tensors


def make(source, target, changes, seed):
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if "token" in file.name or file.name == "generation_config.json":
            shutil.copy(file, target / file.name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8")) | changes
    config["num_hidden_layers"] = 2
    (target / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_file(weights(config, seed), target / "model.safetensors", metadata={"format": "pt"})


def make_all(source, target):
    """The folders of all models, by name."""
    for seed, (name, changes) in enumerate(MODELS.items()):
        make(source, target / name, changes, seed)
    return {name: target / name for name in MODELS}


if __name__ == "__main__":
    make_all(*map(pathlib.Path, sys.argv[1:3]))
