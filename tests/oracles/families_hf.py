"""Does transformers compute what fewbit computes, for every family, dense and packed?

    families_hf.py FEWBIT WORKDIR [NAME...]

The tiny models of `tests/parity` (or of FEWBIT_PARITY, a folder of others) are rounded to 4 bits, one
scale per row, and exported as a dense folder and as compressed-tensors, which holds rows of any
width. transformers loads both; its logits are compared with those that fewbit computes from its own
packed folder, relative to the largest. Needs requirements-heavy.txt.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import warnings

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

from families import PARITY, tokenizer

RECIPE = """seed = 0
output = "run"
device = "cpu"
model.path = "model"
[quant]
bits = 4
symmetric = true
[[stage]]
[stage.calibrate]
method.rtn = {}
[[stage]]
[stage.export]
format.fewbit = {}
format.dequantized = {}
format.compressed_tensors = {}
"""
TOLERANCE = 1e-4
# What compressed-tensors' own code does not load, with the reason.
NOT_PACKED = {
    "gpt2": "transformers has Conv1D here, which compressed-tensors does not replace",
}


def check(fewbit, source, work):
    """(sentence, whether all is well)"""
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(source, work / "model")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    vocab = config.get("text_config", config)["vocab_size"]
    pieces = json.dumps(tokenizer(vocab))
    (work / "model/tokenizer.json").write_text(pieces, encoding="utf-8")
    (work / "recipe.toml").write_text(RECIPE, encoding="utf-8")

    def run(*arguments):
        done = subprocess.run([fewbit, *arguments], cwd=work, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(" ".join(done.stderr.strip().splitlines()[-3:]))

    run("train", "--recipe", "recipe.toml")
    tokens = [at * 31 % (vocab - 4) + 3 for at in range(16)]
    ids = ",".join(map(str, tokens))
    run("logits", "--model", "run/export/fewbit", "--tokens", ids, "--output", "l.safetensors")
    ours = load_file(work / "l.safetensors")["logits"].reshape(len(tokens), -1)
    said, well = [], True
    for name in ("dequantized", "compressed_tensors"):
        if name != "dequantized" and source.name in NOT_PACKED:
            said.append(f"{name} not tried: {NOT_PACKED[source.name]}")
            continue
        folder = work / "run/export" / name
        # Its grouped kernels want widths in multiples of 4.
        more = {"experts_implementation": "eager"} if "moe" in source.name else {}
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, attn_implementation="eager", **more
            )
            with torch.no_grad():
                theirs = model.eval()(torch.tensor([tokens])).logits[0].float().numpy()
        except Exception as error:  # whatever a loader raises is its answer
            said.append(f"{name} not loaded: {str(error).strip().splitlines()[0][:120]}")
            well = False
            continue
        gap = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
        well &= gap < TOLERANCE
        said.append(f"{name} {gap:.1e}")
    return "; ".join(said), well


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    fewbit, work, *names = sys.argv[1:]
    root = pathlib.Path(os.environ.get("FEWBIT_PARITY", PARITY))
    folders = sorted(f for f in root.iterdir() if (f / "config.json").is_file())
    failed = 0
    for folder in folders:
        if names and folder.name not in names:
            continue
        binary, place = str(pathlib.Path(fewbit).resolve()), pathlib.Path(work).resolve() / folder.name
        try:
            said, passed = check(binary, folder, place)
        except RuntimeError as error:
            said, passed = str(error), False
        failed += not passed
        print(f"{'within' if passed else 'FAILS'}  {folder.name}: {said}", flush=True)
    sys.exit(failed > 0)
