#!/usr/bin/env python3
"""What ways to hold keys and values cost and take.

    kv_cache.py speed OLD NEW MODEL TEXT            tokens a second of two binaries, behind short and long prompts
    kv_cache.py perplexity FEWBIT MODEL TEXT        perplexity and memory of each way (docs/generation.md)
    kv_cache.py retrieval FEWBIT MODEL              lines that are asked for after they were compressed

Everything is greedy, on two threads. `speed` alternates the binaries, times the tokens as they come,
and takes of all the fastest quarter's slowest: other programs on the machine only ever add. `retrieval` says lines like "The code of Oslo is 4821." to the model in one
turn of `fewbit chat` and begins some of them again in later turns, by a chat template that adds nothing, so that what
is asked for was compressed before it was asked for; every mode gets the same lines and questions.
"""

import argparse
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

MODES = [("full", [])]
for name, more in [("mikv", ["--kv-ratio", "0.25"]), ("uniform", [])]:
    for bits in ["4", "3", "2"]:
        MODES.append((f"{name} {bits}", ["--kv-bits", bits, *more]))
MODES.append(("evict", ["--kv-ratio", "0.25"]))

NAMES = """Oslo Paris Berlin Madrid Rome Vienna Athens Dublin Lisbon Warsaw Prague Cairo Lima Quito Havana Tokyo Seoul
Delhi Hanoi Manila Sydney Perth Boston Chicago Dallas Denver Miami Seattle Toronto Montreal London Geneva Munich Hamburg
Naples Milan Venice Dubai Nairobi Lagos Alice Robert James Maria David Laura Peter Helen George Susan Michael Emma Daniel
Anna Thomas Julia Martin Clara Oliver Sophie Henry Alexander Victoria Charles Edward William Elizabeth Margaret Frank Simon
apple orange lemon cherry banana potato carrot onion pepper garlic horse tiger lion eagle rabbit monkey elephant dolphin
piano guitar violin trumpet drum hammer ladder mirror window carpet blanket candle bottle basket""".split()


def run(command, text=None):
    environment = os.environ | {"RAYON_NUM_THREADS": "2"}
    done = subprocess.run([str(part) for part in command], input=text, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def flags(name, more):
    return ["--kv-cache", name.split()[0], *more]


def speed(args):
    words = pathlib.Path(args.text).read_text(encoding="utf-8").split()

    def waits(binary, count):
        """Seconds between what comes, a token at a time but for some that make no text alone."""
        command = [binary, "generate", "--model", args.model, "--prompt", " ".join(words[:count])]
        command += ["--max-new-tokens", str(args.tokens)]
        environment = os.environ | {"RAYON_NUM_THREADS": "2"}
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as running:
            times = []
            while os.read(running.stdout.fileno(), 1 << 16):
                times.append(time.perf_counter())
        return [after - before for before, after in zip(times, times[1:-1])]

    print(f"load average {os.getloadavg()[0]:.1f}\n")
    print("| words before | tokens | old, tokens/s | new, tokens/s | new / old |\n|---:|---:|---:|---:|---:|")
    for count in args.words:
        found = {args.old: [], args.new: []}
        for _ in range(args.rounds):
            for which, all_waits in found.items():
                all_waits += waits(which, count)
        old, new = (1 / sorted(one)[len(one) // 4] for one in found.values())
        print(f"| {count} | {len(found[args.new])} | {old:.1f} | {new:.1f} | {new / old:.2f} |", flush=True)


def perplexity(args):
    print("| keys and values | perplexity | bits a number | expected | MiB | seconds |\n|---|---:|---:|---:|---:|---:|")
    for name, more in MODES:
        command = [args.fewbit, "eval", "--model", args.model, "--data", args.text, "--json"]
        command += ["--context", args.context, "--windows", args.windows, "--set", f"piece={args.piece}"]
        begun = time.perf_counter()
        found = json.loads(run([*command, *flags(name, more)]))
        expected = found.get("kv_bits_expected")
        expected = f"{expected:.2f}" if expected else "-"
        print(
            f"| {name} | {found['perplexity']:.3f} | {found['kv_bits']:.2f} | {expected} "
            f"| {found['kv_bytes'] / 2**20:.2f} | {time.perf_counter() - begun:.0f} |",
            flush=True,
        )
    print(f"\n{found['tokens']} tokens, windows of {found['context']}, the first {found['prefill']} in one pass")


def retrieval(args):
    draws = random.Random(args.seed)
    names = draws.sample(NAMES, args.lines)
    codes = {name: f"{draws.randrange(1000, 10000)}" for name in names}
    told = "".join(f"The code of {name} is {code}.;" for name, code in codes.items())
    asked = draws.sample(names, args.questions)
    with tempfile.TemporaryDirectory() as folder:
        for file in pathlib.Path(args.model).resolve().iterdir():
            if file.name not in ("chat_template.jinja", "tokenizer_config.json"):
                (pathlib.Path(folder) / file.name).symlink_to(file)
        template = "{% for m in messages %}{{ m.content | replace(';', '\\n') }}{% endfor %}"
        (pathlib.Path(folder) / "chat_template.jinja").write_text(template, encoding="utf-8")
        (pathlib.Path(folder) / "tokenizer_config.json").write_text("{}", encoding="utf-8")
        print("| keys and values | right |\n|---|---:|")
        for mode, more in MODES:
            command = [args.fewbit, "chat", "--model", folder, "--temperature", "0", "--max-new-tokens", "8"]
            turns = [told, *(f";The code of {name} is" for name in asked)]
            answers = run([*command, "--stop", "\n", *flags(mode, more)], "\n".join(turns) + "\n").splitlines()
            right = sum(codes[name] in answer for name, answer in zip(asked, answers[-len(asked) :]))
            print(f"| {mode} | {right} of {len(asked)} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("speed")
    one.set_defaults(run=speed)
    for name in ["old", "new", "model", "text"]:
        one.add_argument(name)
    one.add_argument("--words", type=int, nargs="+", default=[48, 1200])
    one.add_argument("--tokens", type=int, default=65)
    one.add_argument("--rounds", type=int, default=3)
    one = commands.add_parser("perplexity")
    one.set_defaults(run=perplexity)
    for name in ["fewbit", "model", "text"]:
        one.add_argument(name)
    one.add_argument("--context", default="2048")
    one.add_argument("--windows", default="2")
    one.add_argument("--piece", default="8")
    one = commands.add_parser("retrieval")
    one.set_defaults(run=retrieval)
    for name in ["fewbit", "model"]:
        one.add_argument(name)
    one.add_argument("--lines", type=int, default=100)
    one.add_argument("--questions", type=int, default=20)
    one.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
