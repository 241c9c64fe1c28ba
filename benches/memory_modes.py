#!/usr/bin/env python3
"""What each `memory` of a distillation costs: peak resident memory and seconds a step, and whether the numbers
are the same.

    python benches/memory_modes.py FEWBIT MODEL TEXT [--steps 6] [--batch 2] [--length 256] [--modes tape,device,host,disk]
        [--optimizer '{ moments = "int8" }'] [--keys 'teacher = "cached"'] [--objective 'jsd = {}'] [--flat] [--json]

FEWBIT is a binary, MODEL a Hugging Face folder or an embedded model, TEXT what it is trained on. Each mode is a process
of its own, one after the other; the first step is left out of the times, and the median is taken. The peak is the
process's whole life: reading, training, folding the codes. With --flat the resident memory is looked at all the time
(Linux), and its median in the second quarter of the steps stands beside that of the last: a long training that leaks
grows (500 steps of a small model, say).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time

RECIPE = """seed = 0
output = "run"
device = "cpu"
model.path = {model}
data.train = {{ path = {text}, length = {length} }}
quant = {{ bits = 2, symmetric = false }}
[[stage]]
[stage.distill]
method.seq = {{}}
objective.{objective}
steps = {steps}
batch = {batch}
log_every = 1
rate_unit = "grid"
learning_rate = 0.003
optimizer = {optimizer}
allow_worse = true
validate = {{ every = 0, retries = 0 }}
memory = "{mode}"
{keys}
"""


def resident(pid, found, ended):
    """Adds (time, bytes) to `found` until `ended` is set."""
    while not ended.wait(0.05):
        try:
            with open(f"/proc/{pid}/statm") as file:
                found.append((time.time(), int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")))
        except (OSError, IndexError):
            return


def quarters(found, steps):
    """Medians of the resident GiB in the second and in the last quarter of the steps."""
    times = [event["time"] for event in steps]
    parts = []
    for first, last in [(len(times) // 4, len(times) // 2), (3 * len(times) // 4, len(times) - 1)]:
        inside = [size for at, size in found if times[first] <= at <= times[last]]
        parts.append(statistics.median(inside) / 2**30 if inside else float("nan"))
    return parts


def measure(args, mode):
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        recipe = RECIPE.format(
            model=json.dumps(args.model), text=json.dumps(args.text), length=args.length, steps=args.steps,
            batch=args.batch, optimizer=args.optimizer, mode=mode, keys=args.keys, objective=args.objective,
        )
        with open(os.path.join(folder, "recipe.toml"), "w") as file:
            file.write(recipe)
        command = [args.fewbit, "train", "--recipe", "recipe.toml"]
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        found, ended = [], threading.Event()
        watch = threading.Thread(target=resident, args=(process.pid, found, ended))
        if args.flat:
            watch.start()
        errors = process.stderr.read().decode()
        ended.set()
        _, status, usage = os.wait4(process.pid, 0)
        if os.waitstatus_to_exitcode(status) != 0:
            sys.exit(f"{mode}: {errors}")
        with open(os.path.join(folder, "run", "metrics.jsonl")) as file:
            events = [json.loads(line) for line in file]
        steps = [event for event in events if event["event"] == "step"]
        with open(os.path.join(folder, "run", "run.json")) as file:
            needs = json.load(file)["needs"]
        tokens = args.batch * args.length
        speeds = [event["values"]["perf/tokens_per_second"] for event in steps[1:]]
        return {
            "memory": mode,
            "peak_gib": usage.ru_maxrss / 2**20,
            "estimated_gib": needs["host_bytes"] / 2**30,
            "seconds_a_step": tokens / statistics.median(speeds),
            "resident_gib": quarters(found, steps) if args.flat else None,
            "losses": [event["values"]["train/loss"] for event in steps],
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fewbit")
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--modes", default="tape,device,host,disk")
    parser.add_argument("--optimizer", default="{}")
    parser.add_argument("--objective", default="jsd = {}")
    parser.add_argument("--keys", default="", help="more keys of the stage, separated by line ends")
    parser.add_argument("--flat", action="store_true", help="resident memory early and late, too")
    parser.add_argument("--dir", help="where runs are put for their time; the file of `disk` too")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    for name in ["fewbit", "model", "text"]:
        path = getattr(args, name)
        if os.path.exists(path):
            setattr(args, name, os.path.abspath(path))
    rows = [measure(args, mode) for mode in args.modes.split(",")]
    if args.json:
        print(json.dumps(rows))
        return
    more = [" second quarter | last quarter |", "---|---|"] if args.flat else ["", ""]
    print("| memory | peak | estimated | seconds a step | losses as the first |" + more[0])
    print("|---|---|---|---|---|" + more[1])
    for row in rows:
        same = "yes" if row["losses"] == rows[0]["losses"] else "NO"
        print(
            f"| `{row['memory']}` | {row['peak_gib']:.2f} GiB | {row['estimated_gib']:.2f} GiB "
            f"| {row['seconds_a_step']:.2f} | {same} |"
            + "".join(f" {gib:.3f} GiB |" for gib in row["resident_gib"] or [])
        )


if __name__ == "__main__":
    main()
