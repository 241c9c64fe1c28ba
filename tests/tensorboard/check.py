"""Loads a run's events with TensorBoard itself and fails unless every promised tag is there.

    pip install tensorboard
    python check.py RUN_DIR [--no-distill]

RUN_DIR is a run's folder or its `tensorboard` folder. `--no-distill` is for recipes without a
distillation stage. Exit code 0 if every tag has at least one entry, 1 if one is missing.
"""

import argparse
import math
import re
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# Scalars of every run that trains. An entry is a regular expression for the whole tag.
SCALARS = [
    r"train/loss",
    r"train/learning_rate",
    r"train/grad_norm",
    r"eval/loss",
    r"eval/perplexity",
    r"block/mse_before",
    r"block/mse_after",
    r"block/\d{2,}/loss",
    r"perf/tokens_per_second",
    r"perf/data_wait_fraction",
    r"memory/peak_gib",
]

# Scalars of a run that distills.
DISTILL = [
    r"distill/jsd",
    r"distill/kl_forward",
    r"distill/kl_reverse",
    r"distill/top1_agreement",
]

HISTOGRAMS = [r"codes(/.+)?", r"scale_change(/.+)?"]

TEXTS = [r"recipe(/.+)?"]


def load(run):
    """All events of the run, none sampled away."""
    folder = run / "tensorboard" if (run / "tensorboard").is_dir() else run
    if not any(folder.glob("events.out.tfevents.*")):
        sys.exit(f"no event files in {folder}")
    accumulator = EventAccumulator(
        str(folder), size_guidance={"scalars": 0, "histograms": 0, "tensors": 0}
    )
    accumulator.Reload()
    return accumulator


def text_of(accumulator, tag):
    """The strings under a text tag."""
    values = accumulator.Tensors(tag)
    return [s.decode() for value in values for s in value.tensor_proto.string_val]


def text_tags(accumulator):
    """Tags that TensorBoard's text page shows."""
    plugin = accumulator.summary_metadata
    return [
        tag
        for tag in accumulator.Tags()["tensors"]
        if plugin[tag].plugin_data.plugin_name == "text" and any(text_of(accumulator, tag))
    ]


def match(kind, patterns, tags, show):
    """Prints what each pattern found; returns the patterns that found nothing."""
    missing = []
    for pattern in patterns:
        found = sorted(tag for tag in tags if re.fullmatch(pattern, tag))
        if not found:
            missing.append(pattern)
            print(f"MISSING  {kind:<9}  {pattern}")
        for tag in found:
            print(f"ok       {kind:<9}  {tag:<40}  {show(tag)}")
    return missing


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN_DIR")
    parser.add_argument("--no-distill", action="store_true", help="do not ask for distill/*")
    arguments = parser.parse_args()
    events = load(arguments.run)

    def scalar(tag):
        points = events.Scalars(tag)
        odd = sum(not math.isfinite(point.value) for point in points)
        last = f"{len(points)} points, last {points[-1].value:.6g} at step {points[-1].step}"
        return f"{last}, {odd} not finite" if odd else last

    def histogram(tag):
        values = events.Histograms(tag)
        last = values[-1].histogram_value
        return f"{len(values)} histograms, last of {last.num:.0f} in {len(last.bucket)} buckets"

    tags = events.Tags()
    scalars = SCALARS if arguments.no_distill else SCALARS + DISTILL
    missing = match("scalar", scalars, tags["scalars"], scalar)
    missing += match("histogram", HISTOGRAMS, tags["histograms"], histogram)
    missing += match(
        "text", TEXTS, text_tags(events), lambda tag: f"{len(text_of(events, tag)[0])} characters"
    )
    if missing:
        sys.exit(f"{len(missing)} tags are missing: {', '.join(missing)}")
    print("every tag is there")


if __name__ == "__main__":
    main()
