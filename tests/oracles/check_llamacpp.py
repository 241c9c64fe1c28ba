"""Does llama.cpp read a folder's GGUF file as fewbit means it: same pieces, same next words?

    check_llamacpp.py FOLDER... [--prompt TEXT] [--texts FILE.json]

Compared are

* the ids of the prompt, and of every text of a JSON list, with those of Hugging Face's tokenizers;
* log-probabilities of the likeliest pieces after short windows of tokens, with those of a forward
  pass in numpy that rounds activations to 8 bits in front of packed weights, as llama.cpp does.
  Both agree to five digits, unless a value lies so close to the middle of two codes that one side
  rounds it up and the other down; the median over the windows is strict about everything else;
* the choice at every step of the exact pass's greedy continuation, and log-probabilities there:
  they may be away by twice what the rounding pass is, the cost of 8 bits (and by 0.01);
* llama.cpp's own greedy text, which may part from numpy's at a near-tie only. That is a choice
  between pieces whose log-probabilities are so close that both may be away by that much.
"""

import argparse
import itertools
import json
import pathlib
import sys
import urllib.error
import urllib.request

import gguf
import numpy as np
import xllamacpp
from tokenizers import Tokenizer

from check_gguf import gguf_name, teach_q2_0
from llama import Llama, greedy, judge, log_softmax, read_config, reference


def rounded(x, kind):
    """What llama.cpp multiplies with weights of a type: 8 bits per block of activations."""
    if kind == "F32":
        return x
    if kind in ("F16", "BF16"):
        return x.astype(np.float16)
    wide = kind.endswith("_K") or kind.startswith("TQ")
    blocks = x.astype(np.float32).reshape(len(x), -1, 256 if wide else 32)
    scale = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
    codes = np.rint(blocks / np.where(scale == 0, 1, scale))
    return (codes * (scale if wide else scale.astype(np.float16))).reshape(x.shape)


class Rounding(Llama):
    """The forward pass with activations rounded as llama.cpp does for the types of a file."""

    def __init__(self, config, weights, file):
        super().__init__(config, weights)
        teach_q2_0()
        self.kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(file).tensors}

    def apply(self, x, name):
        stored = gguf_name(f"{name}.weight")
        kind = self.kinds.get(stored) or self.kinds["token_embd.weight"]
        return super().apply(rounded(x, kind).astype(np.float64), name)


WINDOW = 3


class Server:
    def __init__(self, path, context):
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = context
        params.n_parallel = 1
        params.n_gpu_layers = 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        # Keys and values in 32 bits, so that nothing but activations is rounded.
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.verbosity = 0
        params.warmup = False
        params.fit_params = False
        self.server = xllamacpp.Server(params)

    def ids(self, text):
        """Ids of a text, special ones at its ends included; `None` when llama.cpp gives up."""
        body = json.dumps({"content": text, "add_special": True, "parse_special": True})
        request = urllib.request.Request(
            self.server.listening_address + "/tokenize",
            body.encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request) as answer:
                return json.load(answer)["tokens"]
        except urllib.error.HTTPError:
            return None

    def continued(self, prompt, count, top):
        """A greedy continuation of ids: its text, and per piece the likeliest ones by id."""
        answer = self.server.handle_completions(
            {
                "prompt": prompt,
                "n_predict": count,
                "temperature": 0.0,
                "logprobs": top,
                "cache_prompt": False,
            }
        )
        if isinstance(answer, (str, bytes)):
            answer = json.loads(answer)
        if "choices" not in answer:
            raise RuntimeError(f"llama.cpp answers {json.dumps(answer)[:300]}")
        choice = answer["choices"][0]
        pieces = (choice.get("logprobs") or {}).get("content") or []
        return choice["text"], [
            (piece["id"], {p["id"]: p["logprob"] for p in piece["top_logprobs"]})
            for piece in pieces
        ]


def check_ids(server, tokenizer, texts):
    """(sentence, how many texts are cut otherwise)"""
    different = failed = pieces = 0
    for text in texts:
        expected, got = tokenizer.encode(text).ids, server.ids(text)
        pieces += len(expected)
        failed += got is None
        if got is not None and got != expected:
            different += 1
            at = next((i for i, (a, b) in enumerate(zip(got, expected)) if a != b), -1)
            shown = got[max(at, 0) :][:6], expected[max(at, 0) :][:6]
            print(f"  difference in {text[:40]!r} at {at}: {shown[0]} for {shown[1]}")
    said = f"{pieces} ids of {len(texts)} texts, {different} texts differ, {failed} fail"
    return said, different + failed


def apart(likely, row):
    """How far the log-probabilities of the likeliest pieces are from numpy's."""
    # Far below the likeliest, rounding is large and nobody looks.
    return max((abs(p - row[i]) for i, p in likely.items() if p > -8), default=0.0)


def check_windows(server, model, tokens, tolerance):
    """(sentence, whether most windows agree with a pass that rounds alike)"""
    found = []
    for at in range(WINDOW, len(tokens) + 1):
        window = tokens[at - WINDOW : at]
        row = log_softmax(model.logits(window)[-1])
        # A piece that is a part of a character, or a special one, comes without probabilities.
        found += [apart(likely, row) for _, likely in server.continued(window, 1, 8)[1]]
    middle = float(np.median(found)) if found else np.inf
    said = f"{len(found)} windows, median {middle:.1e}, worst {max(found, default=np.inf):.1e} nats"
    return said, middle <= tolerance


def check_steps(server, exact, rounding, tokens, start):
    """Follows numpy's greedy choice; (sentence, near-ties, whether all is well)."""
    rows, rounded_rows = (
        [log_softmax(row) for row in model.logits(tokens)] for model in (exact, rounding)
    )
    cost = max(apart(dict(enumerate(other)), row) for other, row in zip(rounded_rows, rows))
    allowed = 2 * cost + 0.01
    worst, seen, ties, wrong = 0.0, 0, 0, 0
    for at in range(start - 1, len(tokens) - 1):
        for chosen, likely in server.continued(tokens[: at + 1], 1, 8)[1]:
            seen += 1
            worst = max(worst, apart(likely, rows[at]))
            margin = rows[at].max() - rows[at][chosen]
            ties += 0 < margin <= 2 * allowed
            wrong += margin > 2 * allowed
    said = (
        f"{seen} steps within {worst:.1e} nats of exact (8 bits cost {cost:.1e}), "
        f"{ties} near-ties, {wrong} wrong"
    )
    return said, ties, seen and not wrong and worst <= allowed


def check_text(server, tokenizer, tokens, start):
    """(sentence, whether the text is numpy's)"""
    text, _ = server.continued(tokens[:start], len(tokens) - start, 1)
    ours = tokenizer.decode(tokens[start:]).split()
    words = text.split()
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(words, ours)))
    equal = words == ours
    return "text equal" if equal else f"text parts: {words[same:][:3]} for {ours[same:][:3]}", equal


def check(folder, options):
    config, weights = read_config(folder), reference(folder)
    file, model = folder / "model.gguf", Llama(config, weights)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    server = Server(file, config.get("max_position_embeddings", 512))
    texts = [options.prompt]
    if options.texts:
        texts += json.loads(options.texts.read_text(encoding="utf-8"))
    prompt = tokenizer.encode(options.prompt).ids
    tokens, _ = greedy(model, prompt, options.steps)
    cut, different = check_ids(server, tokenizer, texts)
    rounding = Rounding(config, weights, file)
    windows, alike = check_windows(server, rounding, tokens, options.tolerance)
    steps, ties, close = check_steps(server, model, rounding, tokens, len(prompt))
    text, equal = check_text(server, tokenizer, tokens, len(prompt))
    passed = not different and alike and close and (equal or ties)
    return "within" if passed else "fails", f"{cut}; {windows}; {steps}; {text}"


if __name__ == "__main__":
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--prompt", default="Once upon a time, there was a")
    arguments.add_argument("--texts", type=pathlib.Path, help="JSON list of texts to tokenize")
    arguments.add_argument("--steps", type=int, default=32)
    arguments.add_argument("--tolerance", type=float, default=1e-4, help="nats, median of windows")
    sys.exit(judge(__doc__, check, arguments))
