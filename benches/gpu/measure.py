#!/usr/bin/env python3
"""Everything that is measured on a GPU, by one command, into one table.

    benches/gpu/measure.py --fewbit target/release/fewbit --device cuda --out OUT
        [--tests "cargo test --release --features cuda --test ops device"]
        [--python PYTHON] [--torch cuda] [--tiny]

In this order, each in a process of its own, what fails standing in the table with its reason:

1. the numeric tests of the kernels on that device (`--tests`; a command);
2. `fewbit doctor`: right numbers, ceilings of products and memory;
3. steps of fewbit (`fewbit bench`): FlexRound of an 8B-shaped block on 2 x 2048 tokens in f32; distillation of
   the 1B shape and of the 8B shape to 2 bits, in bf16;
4. the same steps in PyTorch, eager and compiled (`steps.py` beside this file), where `--torch` names a device,
   and torch's ceiling of products.

`OUT/results.json` has everything, `OUT/results.md` the table: seconds a step, tokens a second, the device's peak
memory (what each program's allocator took), and the share of the bf16 ceiling, which is the higher one of the
two programs' own square products. `--tiny` takes small shapes, to see that it all works without a GPU: on a
software Vulkan, with torch on the processor. PYTHON has what benches/peers/requirements.txt lists.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

# Name, shape, part of `fewbit bench`, texts, tokens of one, type of the products.
STEPS = [
    ("8B block, FlexRound", "llama-3.1-8b", "block", 2, 2048, "f32"),
    ("1B model, UPQ", "llama-3.2-1b", "distill", 2, 2048, "bf16"),
    ("8B model, UPQ", "llama-3.1-8b", "distill", 1, 2048, "bf16"),
]
TINY = [
    ("tiny block, FlexRound", "tiny", "block", 2, 64, "f32"),
    ("tiny model, UPQ", "tiny", "distill", 2, 64, "f32"),
]
TINY_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}


def main():
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    results = {"device": args.device, "tiny": args.tiny, "started": time.strftime("%FT%TZ", time.gmtime())}
    steps = TINY if args.tiny else STEPS
    with tempfile.TemporaryDirectory() as folder:
        if args.tests:
            say(f"tests: {args.tests}")
            results["tests"] = run(shlex.split(args.tests), cwd=ROOT, parse=last_result)
        say("doctor")
        results["doctor"] = run([args.fewbit, "doctor", "--device", args.device, "--json"])
        if args.torch:
            side = 256 if args.tiny else 8192
            say("ceiling of torch")
            results["torch_ceiling"] = torch(args, "ceiling", "--side", side)
        results["steps"] = [measure(args, step, Path(folder)) for step in steps]
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    text = table(results)
    (args.out / "results.md").write_text(text)
    print(text)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--fewbit", required=True, type=lambda path: str(Path(path).resolve()))
    parser.add_argument("--device", required=True, help="of fewbit: cuda, vulkan, ...")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--tests", help="the command that runs the kernels' tests")
    parser.add_argument("--python", default=sys.executable, help="one that has torch")
    parser.add_argument("--torch", help="device of torch: cuda, cpu; absent: fewbit alone")
    parser.add_argument("--repeat", type=int, default=10, help="steps behind the first")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try this script")
    return parser.parse_args()


def measure(args, step, folder):
    """One step in fewbit and in PyTorch."""
    name, like, part, batch, length, dtype = step
    config = folder / f"{like}.json"
    if like == "tiny":
        config.write_text(json.dumps(TINY_CONFIG))
        like = str(config)
    shape = ["--batch", batch, "--length", length]
    say(f"fewbit, {name}")
    command = [args.fewbit, "bench", "--like", like, "--part", part, "--device", args.device]
    command += [*shape, "--compute", dtype, "--repeat", args.repeat, "--json"]
    found = {"name": name, "tokens": batch * length, "dtype": dtype, "fewbit": run(command)}
    if not args.torch:
        return found
    if not config.exists():
        written = folder / "shape"
        # The shape as a config.json; a model of it is not written.
        config.write_text(json.dumps(shape_of(args, like, written)))
    for mode in ("eager", "compiled"):
        say(f"torch, {mode}, {name}")
        found[mode] = torch(args, part, "--config", config, "--mode", mode, *shape, "--dtype", dtype,
                            "--repeat", args.repeat)
    return found


def shape_of(args, like, folder):
    """The config.json of a published shape that fewbit knows."""
    known = {
        "llama-3.1-8b": (4096, 14336, 32, 32, 8, 128, 128256, False),
        "llama-3.2-1b": (2048, 8192, 16, 32, 8, 64, 128256, True),
    }[like]
    names = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings"]
    return {**TINY_CONFIG, **dict(zip(names, known, strict=True)), "rope_theta": 500000.0}


def torch(args, *rest):
    command = [args.python, HERE / "steps.py", rest[0], "--device", args.torch, *rest[1:]]
    return run(command)


def run(command, cwd=None, parse=json.loads):
    """What a command prints, or how it failed; the table says so and the others go on."""
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True)
    try:
        return parse(done.stdout)
    except (ValueError, IndexError):
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-4:]
        return {"failed": f"exit {done.returncode}: " + " | ".join(last)}


def last_result(text):
    lines = [line for line in text.splitlines() if line.startswith("test result:")]
    return {"result": lines[-1].removeprefix("test result: ")}


def say(text):
    print(f"== {text}", file=sys.stderr, flush=True)


def ceiling_of(results):
    """Operations a second of bf16 products, of f32 ones where there are none; of whichever program has more."""
    all_types = {"f32": [], "bf16": []}
    for device in results["doctor"].get("devices", []):
        for kind in device.get("types") or []:
            speed = kind.get("speed") or {}
            flops = [speed.get("small_flops"), speed.get("large_flops")]
            all_types[kind["compute"]] += [f for f in flops if f]
    for kind, flops in (results.get("torch_ceiling", {}).get("flops") or {}).items():
        all_types[kind].append(flops)
    kind = "bf16" if all_types["bf16"] else "f32"
    return kind, max(all_types[kind], default=None)


def table(results):
    kind, ceiling = ceiling_of(results)
    lines = [f"# Steps on {results['device']}", ""]
    if "tests" in results:
        tests = results["tests"]
        lines += [f"Numeric tests: {tests.get('result') or tests.get('failed')}", ""]
    doctor = results["doctor"]
    for device in doctor.get("devices", []):
        passed = [f"{t['compute']} {'passed' if t['passed'] else t.get('problem', 'WRONG')}"
                  for t in device.get("types") or []]
        lines += [f"`{device['name']}`: {device.get('card')}; {', '.join(passed)}", ""]
    if "failed" in doctor:
        lines += [f"doctor: {doctor['failed']}", ""]
    if ceiling:
        lines += [f"Ceiling: {ceiling / 1e12:.3g} TFLOP/s of {kind} products.", ""]
    lines += ["| step | program | seconds | tokens/s | device peak | of the ceiling |",
              "|---|---|---|---|---|---|"]
    for step in results["steps"]:
        lines += [row(step, program, ceiling) for program in ("fewbit", "eager", "compiled")
                  if program in step]
    return "\n".join(lines) + "\n"


def row(step, program, ceiling):
    found = step[program]
    name = program if program == "fewbit" else f"torch {program}"
    head = f"| {step['name']}, {step['dtype']} | {name} |"
    if "failed" in found:
        return f"{head} {found['failed'].replace('|', '/')} | | | |"
    if program == "fewbit":
        part = found["parts"][0] if found.get("parts") else None
        if part is None:
            refused = found.get("refused") or [{}]
            return f"{head} refused: {json.dumps(refused[0]).replace('|', '/')} | | | |"
        seconds, peak = part["seconds"]["median"], part.get("device_bytes")
        # What PyTorch's step takes is the same arithmetic: so are its operations.
        step["operations"] = (part.get("flops") or 0) * seconds
    else:
        seconds, peak = found["seconds"], found.get("device_bytes")
    peak = f"{peak / 2**30:.1f} GiB" if peak else "-"
    operations = step.get("operations")
    share = f"{operations / seconds / ceiling:.0%}" if operations and ceiling else "-"
    return f"{head} {seconds:.4f} | {step['tokens'] / seconds:,.0f} | {peak} | {share} |"


if __name__ == "__main__":
    main()
