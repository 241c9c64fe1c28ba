#!/usr/bin/env python3
"""What `fewbit check --probe` expects of a run beside what the run then takes: peak memory, disk, time.

    python benches/preflight.py FEWBIT [--model NAME=PATH ...] [--text FILE] [--validation FILE] [--recipe NAME ...]
        [--dir DIR] [--json]

FEWBIT is a binary. Each recipe is one of the shipped ones, shortened by --set so that a run takes seconds to minutes;
each run is a process of its own, one after the other, in a folder that is gone afterwards. Models are the two built-in
ones and those named. TEXT and VALIDATION replace the built-in texts for models that are named. The peak is the
process's whole life as the system counts it; the disk is the most that the run's folder and files without a name hold,
looked at twenty times a second; the time is the run's without what comes before its first stage.
"""

import argparse
import json
import os
import stat
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BUILT_IN = {"0.66M": "embedded:tinystories-656k", "stories260k": os.path.join(ROOT, "datasets", "stories260k")}

# What makes each recipe short, by the number of its stages that train.
RECIPES = {
    "rtn_w4g128": [],
    "gptq_w4g128": ["data.calibration.samples=16"],
    "awq_w4g128": ["data.calibration.samples=8"],
    "flexround_w4": ["data.calibration.samples=32", "stage.0.reconstruct.steps=20", "stage.0.reconstruct.batch=2"],
    "lrq_w4": ["data.calibration.samples=32", "stage.0.reconstruct.steps=20", "stage.0.reconstruct.batch=2"],
    "lsq_w4": ["stage.0.distill.steps=12", "stage.0.distill.batch=2"],
}
# Of a model that is named: groups that divide its widths, and a gate that only warns.
NAMED = ["quant.group_size=64"]


def on_disk(folder, process):
    """Bytes in a folder, and in files of a process that have no name any more."""
    total, seen = 0, set()
    files = [os.path.join(path, name) for path, _, names in os.walk(folder) for name in names]
    handles = f"/proc/{process.pid}/fd"
    try:
        files += [os.path.join(handles, name) for name in os.listdir(handles)]
    except OSError:
        pass
    for file in files:
        try:
            found = os.stat(file)
        except OSError:
            continue
        nameless = file.startswith(handles)
        if nameless and (found.st_nlink > 0 or not stat.S_ISREG(found.st_mode)) or found.st_ino in seen:
            continue
        seen.add(found.st_ino)
        total += 512 * found.st_blocks if nameless else found.st_size
    return total


def watched(args, command, folder):
    """Runs a training; the most that it has on the disk."""
    with open(os.path.join(folder, "log"), "w+") as log:
        process = subprocess.Popen([args.fewbit, *command], cwd=folder, stdout=log, stderr=log)
        most = 0
        while process.poll() is None:
            most = max(most, on_disk(os.path.join(folder, "run"), process))
            time.sleep(0.05)
        most = max(most, on_disk(os.path.join(folder, "run"), process))
        if process.returncode != 0:
            log.seek(0)
            raise RuntimeError(log.read().strip())
    return most


def run(args, command, folder):
    process = subprocess.run([args.fewbit, *command], cwd=folder, capture_output=True, text=True)
    if process.returncode != 0:
        raise RuntimeError(process.stderr.strip() or process.stdout.strip())
    return process.stdout


def measure(args, recipe, name, model):
    sets = list(RECIPES[recipe]) + [f"model.path={json.dumps(model)}"]
    text = run(args, ["recipes", "show", recipe + ".toml"], args.dir)
    if name not in BUILT_IN:
        # One scale for each row stays what it is.
        sets += NAMED if "group_size = 128" in text else []
        for table, path in [("calibration", args.text), ("train", args.text), ("validation", args.validation)]:
            if path and f"[data.{table}]" in text:
                sets.append(f"data.{table}.path={json.dumps(path)}")
    elif name == "stories260k":
        sets += ["quant.group_size=channel"] if "group_size = 128" in text else []
    for kind in ["reconstruct", "distill"]:
        if f"[stage.{kind}]" in text:
            sets.append(f"stage.0.{kind}.allow_worse=true")
    if "[stage.export]" in text:
        last = text.count("[[stage]]") - 1
        sets.append(f"stage.{last}.export.allow_worse=true")
    sets += args.set
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        options = ["--recipe", recipe + ".toml", "--output", "run", "--device", "cpu"]
        options += [word for key in sets for word in ("--set", key)]
        if args.probe:
            options.append("--probe")
        check = json.loads(run(args, ["check", *options, "--json"], folder))["needs"]
        disk = watched(args, ["train", *options], folder)
        with open(os.path.join(folder, "run", "run.json")) as file:
            record = json.load(file)
    return {
        "recipe": recipe,
        "model": name,
        "expected": {"gib": check["host_bytes"] / 2**30, "disk": check["disk_bytes"], "seconds": check["seconds"]},
        "actual": {"gib": record["peak_gib"], "disk": disk, "seconds": record["seconds"]},
        "stages": [
            {
                "name": stage["name"],
                "expected_gib": stage["needs"]["host_bytes"] / 2**30,
                "peak_so_far_gib": stage["peak_gib"],
                "expected_seconds": stage["needs"]["seconds"],
                "seconds": stage["seconds"],
            }
            for stage in record["stages"]
        ],
    }


def row(found):
    expected, actual = found["expected"], found["actual"]
    cells = [found["recipe"], found["model"]]
    for key, scale, digits in [("gib", 1, 2), ("disk", 1e-6, 1), ("seconds", 1, 1)]:
        of, got = expected[key] * scale, actual[key] * scale
        cells.append(f"{of:.{digits}f} / {got:.{digits}f} ({100 * (of / max(got, 1e-9) - 1):+.0f} %)")
    return "| " + " | ".join(cells) + " |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fewbit")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--text")
    parser.add_argument("--validation")
    parser.add_argument("--recipe", action="append", choices=list(RECIPES))
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--only-named", action="store_true", help="leave the built-in models out")
    parser.add_argument("--no-probe", dest="probe", action="store_false")
    parser.add_argument("--dir", help="where runs are put for their time")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    args.fewbit = os.path.abspath(args.fewbit)
    for name in ["text", "validation"]:
        if getattr(args, name):
            setattr(args, name, os.path.abspath(getattr(args, name)))
    models = {} if args.only_named else dict(BUILT_IN)
    for pair in args.model:
        name, path = pair.split("=", 1)
        models[name] = os.path.abspath(path)
    rows = []
    if not args.json:
        print("| recipe | model | peak GiB, expected / actual | disk MB | seconds |", flush=True)
        print("|---|---|---|---|---|", flush=True)
    for name, path in models.items():
        for recipe in args.recipe or RECIPES:
            try:
                rows.append(measure(args, recipe, name, path))
            except RuntimeError as error:
                print(f"{recipe}, {name}: {error}", file=sys.stderr, flush=True)
                continue
            if not args.json:
                print(row(rows[-1]), flush=True)
    if args.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
