"""Does llama.cpp compute what fewbit computes, for every family that is written as GGUF?

    families.py FEWBIT WORKDIR [NAME...]

The tiny models of `tests/parity` (or of FEWBIT_PARITY, a folder of others) get a tokenizer of bytes
and are exported with every weight dense, so that llama.cpp rounds nothing. Compared are

* the logits of the file alone with those of its folder, bit for bit;
* log-probabilities of the likeliest pieces after several beginnings of a text, llama.cpp's with
  fewbit's. Where a GELU is computed from a table in half precision they are away by 4e-3.

Settings that llama.cpp cannot express are changed first (`CHANGES`).
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
from safetensors.numpy import load_file

from llama import log_softmax

PARITY = pathlib.Path(__file__).parent.parent / "parity"
CHANGES = {
    "gemma2": lambda config: {"query_pre_attn_scalar": config["head_dim"]},
    "gemma3_text": lambda config: {"query_pre_attn_scalar": config["head_dim"]},
    "mistral": lambda config: {"sliding_window": None},
    "smollm3": lambda config: {"no_rope_layers": [1] * config["num_hidden_layers"]},
}
TABLED = ("gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "phi")
# Families that llama.cpp does not have, and variants that it does not compute.
REFUSED = {
    *("exaone4", "gemma3", "gpt_neo", "gptj", "hyperclovax", "hyperclovax_plain", "llama_dynamic"),
    *("llama_yarn", "olmo3", "opt", "opt_proj", "phi3_window", "phi_qk", "qwen2_window"),
    *("qwen3_moe", "qwen3_sharded"),
}
STEPS = (4, 5, 6, 7, 9, 11, 13, 16, 18, 20, 22, 24)
RECIPE = """seed = 0
output = "run"
device = "cpu"
model.path = "model"
data.validation.path = "text.jsonl"
[quant]
bits = 8
[[quant.override]]
match = "*"
keep = true
[[stage]]
[stage.calibrate]
method.rtn = {}
[[stage]]
[stage.export]
format.gguf = {}
"""


def tokenizer(vocab):
    """Bytes under their stand-in letters, as many as the model has pieces, and pairs of letters."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = [chr(byte) for byte in plain] + [chr(256 + at) for at in range(len(others))]
    pieces = letters[:vocab]
    pairs = [a + b for a in "etaoinshrdlucmfw" for b in "etaoinshrdlucmfw"][: vocab - len(pieces)]
    merges = [list(pair) for pair in pairs]
    pieces += pairs
    kind = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": kind,
        "post_processor": None,
        "decoder": kind,
        "model": {
            "type": "BPE",
            "vocab": {piece: at for at, piece in enumerate(pieces)},
            "merges": merges,
        },
    }


def check(fewbit, source, work):
    """(sentence, whether all is well)"""
    from check_llamacpp import Server  # here: families_hf.py needs no llama.cpp

    work.mkdir(parents=True, exist_ok=True)
    for old in ("model", "run"):
        shutil.rmtree(work / old, ignore_errors=True)
    shutil.copytree(source, work / "model")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config |= CHANGES.get(source.name, lambda _: {})(config)
    (work / "model/config.json").write_text(json.dumps(config), encoding="utf-8")
    pieces = json.dumps(tokenizer(config["vocab_size"]))
    (work / "model/tokenizer.json").write_text(pieces, encoding="utf-8")
    line = json.dumps({"text": "abcdefghijklmnopqrstuvwxyzabcdefghij"}) + "\n"
    (work / "text.jsonl").write_text(line * 4, encoding="utf-8")
    (work / "recipe.toml").write_text(RECIPE, encoding="utf-8")

    def run(*arguments):
        done = subprocess.run([fewbit, *arguments], cwd=work, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(" ".join(done.stderr.strip().splitlines()[-3:]))

    run("train", "--recipe", "recipe.toml")
    file = work / "alone.gguf"
    shutil.copy(work / "run/export/gguf/model.gguf", file)
    tokens = [at * 31 % 90 for at in range(max(STEPS))]
    logits = []
    for model in ("model", "alone.gguf"):
        ids = ",".join(map(str, tokens))
        run("logits", "--model", model, "--tokens", ids, "--output", "logits.safetensors")
        logits.append(load_file(work / "logits.safetensors")["logits"])
    apart = float(np.abs(logits[0] - logits[1]).max())
    rows = [log_softmax(row) for row in logits[0].astype(np.float64).reshape(len(tokens), -1)]
    context = config.get("max_position_embeddings") or config["n_positions"]
    server, worst, seen, equal = Server(file, context), 0.0, 0, 0
    for count in STEPS:
        for chosen, likely in server.continued(tokens[:count], 1, 8)[1]:
            row = rows[count - 1]
            worst = max([worst, *(abs(p - row[i]) for i, p in likely.items())])
            seen, equal = seen + 1, equal + (chosen == row.argmax())
    alone = "bit-equal" if apart == 0 else f"{apart:.1e} away"
    said = f"alone {alone}; llama.cpp within {worst:.1e} nats, {equal} of {seen} choices equal"
    # Weights in half precision have the other side rounded to it.
    rounds = config["model_type"] in TABLED or source.name.endswith("bf16")
    return said, seen and worst < (1e-2 if rounds else 5e-5)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    fewbit, work, *names = sys.argv[1:]
    root = pathlib.Path(os.environ.get("FEWBIT_PARITY", PARITY))
    folders = sorted(f for f in root.iterdir() if (f / "config.json").is_file())
    failed = 0
    for folder in folders:
        if folder.name not in (names or sorted({f.name for f in folders} - REFUSED)):
            continue
        binary, place = str(pathlib.Path(fewbit).resolve()), pathlib.Path(work) / folder.name
        try:
            said, passed = check(binary, folder, place)
        except RuntimeError as error:
            said, passed = str(error), False
        failed += not passed
        print(f"{'within' if passed else 'FAILS'}  {folder.name}: {said}", flush=True)
    sys.exit(failed > 0)
