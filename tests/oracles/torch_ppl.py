"""Does PyTorch find the same perplexity, by the default protocol and by that of GPTQ?

    torch_ppl.py FEWBIT MODEL TEXT [--context N] [--windows N]

MODEL is a Hugging Face folder, TEXT a plain text. By `wikitext2` the text's lines are joined as GPTQ's evaluation joins
the rows of the data set, tokenized by the tokenizer with its special tokens, and cut into windows without a tail; a
window's loss is the mean over its predictions. By default BOS, where the config names one, stands before the text.
transformers computes in float32.
"""

import argparse
import json
import pathlib
import subprocess
import sys

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


def perplexity(model, ids, context, limit):
    count = len(ids) // context
    windows = range(count) if limit is None or limit >= count else [i * count // limit for i in range(limit)]
    losses = []
    for window in windows:
        piece = torch.tensor(ids[window * context :][:context])[None]
        with torch.no_grad():
            logits = model(piece).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits.double(), piece[0, 1:]).item() * context)
    return float(torch.tensor(sum(losses) / (len(losses) * context), dtype=torch.float64).exp()), len(losses)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("fewbit")
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("text", type=pathlib.Path)
    parser.add_argument("--context", type=int)
    parser.add_argument("--windows", type=int)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(args.model / "tokenizer.json"))
    context = args.context or min(2048, model.config.max_position_embeddings)
    text = args.text.read_text(encoding="utf-8")
    rows = ["" if not line.strip() else line for line in text.splitlines(keepends=True)]
    bos = model.config.bos_token_id
    streams = {
        "wikitext2": tokenizer.encode("\n\n".join(rows)),
        "default": ([] if bos is None else [bos]) + tokenizer.encode(text, add_special_tokens=False),
    }
    wrong = False
    for protocol, ids in streams.items():
        theirs, windows = perplexity(model, ids, context, args.windows)
        command = [args.fewbit, "eval", "--model", args.model, "--data", args.text, "--context", context, "--json"]
        command += ["--windows", args.windows] if args.windows else []
        command += ["--set", "protocol=wikitext2"] if protocol == "wikitext2" else []
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        found = json.loads(done.stdout)
        ours = found["perplexity"]
        bad = abs(ours / theirs - 1) > 1e-5 or found["windows"] != windows
        wrong |= bad
        print(f"{protocol:<10} {windows:>4} windows of {context}   PyTorch {theirs:.6f}   fewbit {ours:.6f}{'  DIFFERS' if bad else ''}")
    sys.exit(wrong)


if __name__ == "__main__":
    main()
