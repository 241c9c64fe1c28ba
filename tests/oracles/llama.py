"""What the checks share: a Llama in float64 and what it says of an export, and the verdict.

An exported folder is compared with the `dequantized` export of the same run, which lies beside it
under that name (or as `NAME.dequantized`, when the export NAME has one of its own).
"""

import argparse
import hashlib
import json
import math
import pathlib
import traceback

import numpy as np
from safetensors.numpy import load_file

TOKENS = [1, 72, 104, 111, 35, 87, 300, 117, 290, 12, 5, 200]
STEPS = 24
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Llama:
    """A Llama forward pass over f32 weights, computed in float64."""

    def __init__(self, config, weights):
        self.config = config
        self.weights = {name: value.astype(np.float64) for name, value in weights.items()}
        self.heads = config["num_attention_heads"]
        self.kv_heads = config.get("num_key_value_heads") or self.heads
        self.size = config.get("head_dim") or config["hidden_size"] // self.heads

    def norm(self, x, name):
        mean = np.square(x).mean(-1, keepdims=True)
        return x / np.sqrt(mean + self.config["rms_norm_eps"]) * self.weights[name + ".weight"]

    def apply(self, x, name):
        y = x @ self.weights[name + ".weight"].T
        return y + self.weights.get(name + ".bias", 0)

    def speeds(self):
        """Angles per position of the rotary embedding, with Llama 3.1's or linear stretching."""
        rope = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        theta = rope.get("rope_theta") or self.config.get("rope_theta") or 10000.0
        plain = theta ** -(np.arange(0, self.size, 2) / self.size)
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

    def rotate(self, x):
        """Rotary embedding of [tokens, heads, size]; the two halves of a head are one pair."""
        angle = np.arange(len(x))[:, None, None] * self.speeds()
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate(
            [a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)], -1
        )

    def attend(self, x, block):
        def split(part, n):
            return self.apply(x, f"{block}.{part}_proj").reshape(len(x), n, self.size)

        queries, keys = self.rotate(split("q", self.heads)), self.rotate(split("k", self.kv_heads))
        keys = np.repeat(keys, self.heads // self.kv_heads, axis=1)
        values = np.repeat(split("v", self.kv_heads), self.heads // self.kv_heads, axis=1)
        scores = np.einsum("ihd,jhd->hij", queries, keys) / np.sqrt(self.size)
        scores[:, np.triu(np.ones(scores.shape[1:], bool), 1)] = -np.inf
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hij,jhd->ihd", scores / scores.sum(-1, keepdims=True), values)
        return self.apply(mixed.reshape(len(x), -1), f"{block}.o_proj")

    def logits(self, tokens):
        """Logits after each of the tokens."""
        x = self.weights[EMBEDDING][tokens]
        for index in range(self.config["num_hidden_layers"]):
            layer = f"model.layers.{index}"
            x = x + self.attend(self.norm(x, f"{layer}.input_layernorm"), f"{layer}.self_attn")
            h = self.norm(x, f"{layer}.post_attention_layernorm")
            gate = self.apply(h, f"{layer}.mlp.gate_proj")
            h = gate / (1 + np.exp(-gate)) * self.apply(h, f"{layer}.mlp.up_proj")
            x = x + self.apply(h, f"{layer}.mlp.down_proj")
        return self.apply(self.norm(x, "model.norm"), "lm_head")


def log_softmax(logits):
    shifted = logits - logits.max()
    return shifted - math.log(np.exp(shifted).sum())


def read_config(folder):
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def dequantized(folder):
    """The dense folder that an export is compared with."""
    own = folder.parent / f"{folder.name}.dequantized"
    return own if own.exists() else folder.parent / "dequantized"


def reference(folder):
    """The trained weights of an export, tied ones under both names."""
    weights = load_file(dequantized(folder) / "model.safetensors")
    weights.setdefault(EMBEDDING, weights.get(HEAD))
    weights.setdefault(HEAD, weights[EMBEDDING])
    return weights


class Truth:
    """TOKENS and the float64 model's greedy continuation, with its logits at every place.

    Kept beside the dense folder, since several loaders ask for the same one.
    """

    def __init__(self, folder):
        dense = dequantized(folder)
        cache = dense.with_suffix(".truth.npz")
        digest = hashlib.sha256((dense / "model.safetensors").read_bytes()).hexdigest()
        kept = np.load(cache) if cache.exists() else {"digest": None}
        if kept["digest"] != digest:
            tokens, logits = greedy(Llama(read_config(dense), reference(folder)), TOKENS, STEPS)
            np.savez(cache, digest=digest, tokens=tokens, logits=logits)
            kept = np.load(cache)
        self.tokens, self.logits = kept["tokens"].tolist(), kept["logits"]
        self.continuation = self.tokens[len(TOKENS) :]
        self.largest = np.abs(self.logits).max()

    def error(self, logits):
        """The largest error of logits, relative to the largest logit."""
        return float(np.abs(logits - self.logits).max() / self.largest)

    def wrong(self, chosen, first, tolerance):
        """Is one of the tokens chosen after place `first` and later another than the likeliest?

        `tolerance` is the error allowed to a logit, relative to the largest: two logits that are
        no further apart than twice that may change places. After such a near-tie texts part, and
        the rest is not compared. Gives a sentence, and whether anything is wrong.
        """
        for step, token in enumerate(chosen):
            row = self.logits[first + step]
            margin = float(row.max() - row[token]) / self.largest
            if margin > 2 * tolerance:
                return f"token {step} differs by {margin:.1e}", True
            if margin > 0:
                return f"{step} tokens, near-tie of {margin:.1e}", False
        return f"{len(chosen)} tokens", False

    def judge(self, logits, continuation, tolerance):
        """(passed, sentence) on logits at every place of `tokens`, and on greedy ids."""
        error = self.error(logits)
        places = len(TOKENS) - 1
        best = [self.wrong([int(row.argmax())], at, tolerance) for at, row in enumerate(logits)]
        said, wrong = self.wrong(continuation, places, tolerance)
        wrong |= not continuation or any(bad for _, bad in best)
        return error <= tolerance and not wrong, f"logits {error:.1e}, greedy {said}"


def greedy(model, prompt, steps):
    """Tokens with their likeliest continuation, and the logits at every place."""
    tokens = list(prompt)
    logits = model.logits(tokens)
    while len(tokens) < len(prompt) + steps and tokens[-1] != model.config.get("eos_token_id"):
        tokens.append(int(logits[-1].argmax()))
        logits = model.logits(tokens)
    return tokens, logits


def differences(found, expected):
    """How many weights differ in any bit (signed zeros are equal)."""
    if found.shape != expected.shape:
        return expected.size
    return int(np.count_nonzero(found != expected))


class Cannot(Exception):
    """The loader cannot read what it claims to, or has no place for it; says why."""


def judge(about, check, parser=None):
    """Runs `check(folder, options)`, giving (status, sentence), on the folders of the command line.

    Statuses: "exact" (every weight equal, the rest within tolerance), "within" (no weights to see),
    "cannot" (raised as `Cannot`) and "fails". Gives the exit code.
    """
    parser = parser or argparse.ArgumentParser()
    parser.description = about.splitlines()[0]
    parser.add_argument("folders", nargs="+", type=pathlib.Path)
    parser.add_argument("--report", type=pathlib.Path, help="lines of JSON are added to this file")
    options = parser.parse_args()
    failed = 0
    for folder in options.folders:
        try:
            status, text = check(folder, options)
        except Cannot as reason:
            status, text = "cannot", str(reason)
        except Exception as error:  # a loader may fail in any way, and the next folder counts too
            traceback.print_exc()
            status, text = "fails", f"{type(error).__name__}: {str(error)[:300]}"
        failed += status == "fails"
        print(f"{status:6s} {folder}  {text}", flush=True)
        if options.report:
            line = {"folder": str(folder), "status": status, "text": text}
            with options.report.open("a", encoding="utf-8") as report:
                print(json.dumps(line), file=report)
    return 1 if failed else 0
