"""How fast is a perplexity, beside PyTorch and llama.cpp on the same tokens?

    eval_speed.py FEWBIT MODEL TEXT [--gguf FILE --llama-python PYTHON] [--windows 6] [--rounds 3]

Programs run in turn, each `rounds` times, on two threads, f32, windows of 2048 tokens of one text; figures are the
best of the rounds: tokens a second, and tokens a second of processor time, which other programs on the machine
disturb less. fewbit's is the difference of two whole runs with different numbers
of windows, so that reading the model does not count; PyTorch's is the forward pass of transformers with the
cross-entropy of every token; llama.cpp's is its own figure of prompt processing, f32 weights and cache, which
computes logits of the last token alone. Needs torch and transformers, and in PYTHON xllamacpp.
"""

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import time

LENGTH = 2048
THREADS = 2


def fewbit_seconds(args, windows):
    command = [args.fewbit, "eval", "--model", args.model, "--data", args.text, "--context", str(LENGTH)]
    begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [str(part) for part in [*command, "--windows", windows, "--json"]],
        capture_output=True,
        text=True,
        env={**os.environ, "RAYON_NUM_THREADS": str(THREADS)},
    )
    if done.returncode:
        sys.exit(done.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    worked = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return [time.perf_counter() - begun, worked], json.loads(done.stdout)


def fewbit(args):
    few, _ = fewbit_seconds(args, 2)
    many, found = fewbit_seconds(args, 2 + args.windows)
    rates = [args.windows * LENGTH / (many - few) for many, few in zip(many, few)]
    return rates, found["nll_per_token"]


class Torch:
    def __init__(self, args):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(THREADS)
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        text = pathlib.Path(args.text).read_text(encoding="utf-8")
        ids = tokenizer.encode(text, add_special_tokens=False)
        bos = self.model.config.bos_token_id
        ids = ([bos] if bos is not None else []) + ids
        count = len(ids) // LENGTH
        wanted = 2 + args.windows
        starts = [i * count // wanted for i in range(wanted)] if wanted < count else range(count)
        self.windows = [ids[LENGTH * start :][:LENGTH] for start in starts][: wanted]

    def measure(self, args):
        torch, total, tokens = self.torch, 0.0, 0
        windows = torch.tensor(self.windows)
        begun = [time.perf_counter(), time.process_time()]
        with torch.no_grad():
            for window in windows:
                logits = self.model(window[None]).logits[0, :-1]
                total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
                tokens += LENGTH
        ended = [time.perf_counter(), time.process_time()]
        rates = [tokens / (ended - begun) for ended, begun in zip(ended, begun)]
        return rates, total / (tokens - len(windows))


LLAMA = """
import json, sys, time, urllib.request
import xllamacpp
path, windows, threads, length = sys.argv[1], json.load(sys.stdin), int(sys.argv[2]), int(sys.argv[3])
params = xllamacpp.CommonParams()
params.model.path = path
params.n_ctx = length + 16
params.n_batch = params.n_ubatch = 512
params.n_parallel = 1
params.n_gpu_layers = 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.verbosity = 0
params.fit_params = False
server = xllamacpp.Server(params)
count = milliseconds = 0
begun = time.process_time()
for window in windows:
    body = json.dumps({"prompt": window, "n_predict": 1, "cache_prompt": False}).encode()
    request = urllib.request.Request(
        server.listening_address + "/completion", body, {"Content-Type": "application/json"})
    timings = json.load(urllib.request.urlopen(request))["timings"]
    count += timings["prompt_n"]
    milliseconds += timings["prompt_ms"]
print(count / milliseconds * 1000, count / (time.process_time() - begun))
"""


def llama(args, windows):
    done = subprocess.run(
        [args.llama_python, "-c", LLAMA, args.gguf, str(THREADS), str(LENGTH)],
        input=json.dumps([window[: LENGTH - 1] for window in windows[: args.windows]]),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return [float(rate) for rate in done.stdout.split()[-2:]], None


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("fewbit")
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--gguf")
    parser.add_argument("--llama-python", default=sys.executable)
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch = Torch(args)
    programs = {"fewbit": lambda: fewbit(args), "PyTorch": lambda: torch.measure(args)}
    if args.gguf:
        programs["llama.cpp"] = lambda: llama(args, torch.windows)
    print(f"load average {os.getloadavg()[0]:.1f}")
    found = {name: [] for name in programs}
    for _ in range(args.rounds):
        for name, program in programs.items():
            found[name].append(program())
    best = {name: [max(rates[i] for rates, _ in runs) for i in range(2)] for name, runs in found.items()}
    print(f"{'':<10} {'tokens/s':>9} {'fewbit x':>9}   {'tokens/s of processor time':>26} {'fewbit x':>9}   nll")
    for name, [wall, worked] in best.items():
        nll = found[name][0][1]
        told = f"{nll:.5f}" if nll else "-"
        ratios = [ours / theirs for ours, theirs in zip(best["fewbit"], best[name])]
        print(f"{name:<10} {wall:>9.0f} {ratios[0]:>9.2f}   {worked:>26.0f} {ratios[1]:>9.2f}   {told}")


if __name__ == "__main__":
    main()
