#!/usr/bin/env python3
"""Tokens per second in generation, fewbit beside llama.cpp and PyTorch.

    generation.py FEWBIT [--model NAME=DIR ...] [--int8 NAME=DIR ...] [--gguf NAME=FILE ...] [--torch DIR]
                  [--batch N] [--rounds N] [--llama-python PYTHON]

Programs run in turn, `--rounds` times, on two threads, greedy, behind one token; each figure is the
best of its rounds, because neighbours only ever add. fewbit's is `fewbit bench --part generate`,
with f32 activations under `--model` and with `--compute int8` under `--int8`.
llama.cpp's (xllamacpp from PyPI, in the interpreter `--llama-python`) is the one it reports for 128
tokens, its own repacking of weights on, keys and values in f32. PyTorch's is transformers' generate
in f32, 48 tokens less 16, for the dense model. Weights of a GGUF file and of a folder that
`fewbit export` made of one run are the same.
"""

import argparse
import json
import os
import subprocess
import sys
import time

THREADS = 2

LLAMA = """
import json, sys, urllib.request
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx = 512
params.n_parallel = 1
params.n_gpu_layers = 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(sys.argv[2])
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.verbosity = 0
params.fit_params = False
server = xllamacpp.Server(params)
body = {"prompt": [1], "n_predict": 128, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
best = 0
for _ in range(3):
    request = urllib.request.Request(
        server.listening_address + "/completion",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"})
    best = max(best, json.load(urllib.request.urlopen(request))["timings"]["predicted_per_second"])
print(best)
"""


def fewbit(args, model, compute):
    command = [args.fewbit, "bench", "--part", "generate", "--model", model, "--json"]
    command += ["--batch", str(args.batch), "--compute", compute]
    environment = os.environ | {"RAYON_NUM_THREADS": str(THREADS)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(done.stderr)
    (part,) = json.loads(done.stdout)["parts"]
    return part["amount"] / part["seconds"]["fastest"]


def llama(args, path):
    command = [args.llama_python, "-c", LLAMA, path, str(THREADS)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return float(done.stdout.split()[-1])


def torch(path):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(THREADS)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    def measure():
        def seconds(tokens):
            begun = time.perf_counter()
            settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
            model.generate(torch.tensor([[1]]), pad_token_id=0, **settings)
            return time.perf_counter() - begun

        seconds(2)
        return 32 / (seconds(48) - seconds(16))

    return measure


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("fewbit")
    parser.add_argument("--model", action="append", default=[])
    parser.add_argument("--int8", action="append", default=[])
    parser.add_argument("--gguf", action="append", default=[])
    parser.add_argument("--torch")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--llama-python", default=sys.executable)
    args = parser.parse_args()
    programs = {}
    for compute, models in [("f32", args.model), ("int8", args.int8)]:
        for model in models:
            name, path = model.split("=", 1)
            program = lambda path=path, compute=compute: fewbit(args, path, compute)
            programs[f"fewbit {compute}, {name}"] = program
    for file in args.gguf:
        name, path = file.split("=", 1)
        programs[f"llama.cpp, {name}"] = lambda path=path: llama(args, path)
    if args.torch:
        programs["PyTorch, f32"] = torch(args.torch)
    print(f"load average {os.getloadavg()[0]:.1f}, {THREADS} threads, {args.batch} at once in fewbit")
    best = dict.fromkeys(programs, 0.0)
    for _ in range(args.rounds):
        for name, program in programs.items():
            best[name] = max(best[name], program())
    print("\n| program | tokens/s |\n|---|---:|")
    for name, rate in best.items():
        print(f"| {name} | {rate:.1f} |")


if __name__ == "__main__":
    main()
