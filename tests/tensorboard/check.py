"""Loads a run's events with TensorBoard itself and fails unless everything that is promised is there.

    pip install tensorboard
    python check.py RUN_DIR [--no-distill]

RUN_DIR is a run's folder or its `tensorboard` folder. `--no-distill` is for recipes without a
distillation stage. Exit code 0 if every tag has at least one entry, no curve has a step twice, and
TensorBoard's own pages HParams and Custom Scalars read what is for them; else 1.
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path

from tensorboard.backend.event_processing import plugin_event_multiplexer
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.context import RequestContext
from tensorboard.plugins import base_plugin
from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.get_experiment import Handler as GetExperiment
from tensorboard.plugins.hparams.list_session_groups import Handler as ListSessionGroups

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
    r"grad_norm/block_\d{2,}",
    r"update_norm/block_\d{2,}",
    r"perf/tokens_per_second",
    r"perf/data_wait_fraction",
    r"perf/seconds_left",
    r"memory/peak_gib",
    r"result/perplexity",
    r"result/times_float",
]

# Scalars of a run that distills.
DISTILL = [
    r"distill/jsd",
    r"distill/kl_forward",
    r"distill/kl_reverse",
    r"distill/top1_agreement",
    r"codes/flipped",
    r"codes/changed",
    r"scales/changed",
]

# What the file of the run as a whole has by itself: `tensorboard/` read alone is enough for these.
WHOLE = [tag for tag in SCALARS if r"\d" not in tag and tag != "perf/seconds_left"]

HISTOGRAMS = [r"codes(/.+)?", r"scale_change(/.+)?"]

TEXTS = [r"recipe(/.+)?"]

# Settings that every run has a value of.
SETTINGS = ["model", "plan", "bits", "group_size", "method", "objective", "steps", "batch",
            "learning_rate", "seed"]


def folder_of(run):
    """The folder with the event files of the run as a whole."""
    folder = run / "tensorboard" if (run / "tensorboard").is_dir() else run
    if not any(folder.glob("events.out.tfevents.*")):
        sys.exit(f"no event files in {folder}")
    return folder


def load(folder):
    """All events of each folder with event files, none sampled away, by its name below `folder`."""
    loaded = {}
    for below in sorted({path.parent for path in folder.rglob("events.out.tfevents.*")}):
        accumulator = EventAccumulator(
            str(below), size_guidance={"scalars": 0, "histograms": 0, "tensors": 0}
        )
        loaded[below.relative_to(folder).as_posix()] = accumulator.Reload()
    return loaded


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


def match(kind, patterns, loaded, tags_of, show):
    """Prints what each pattern found, and where; returns the patterns that found nothing."""
    missing = []
    for pattern in patterns:
        found = [
            (name, tag)
            for name, accumulator in loaded.items()
            for tag in sorted(tags_of(accumulator))
            if re.fullmatch(pattern, tag)
        ]
        if not found:
            missing.append(pattern)
            print(f"MISSING  {kind:<9}  {pattern}")
        for name, tag in found:
            print(f"ok       {kind:<9}  {name:<24} {tag:<28}  {show(loaded[name], tag)}")
    return missing


def twice(loaded):
    """Curves that have a step more than once."""
    found = []
    for name, accumulator in loaded.items():
        for tag in accumulator.Tags()["scalars"]:
            steps = [point.step for point in accumulator.Scalars(tag)]
            if len(set(steps)) != len(steps):
                found.append(f"{name} {tag} has a step twice")
    return found


def pages(folder):
    """What TensorBoard's HParams and Custom Scalars make of the folder; returns what is wrong."""
    multiplexer = plugin_event_multiplexer.EventMultiplexer()
    # As `--logdir` of the folder that holds the runs: a run has a name.
    multiplexer.AddRunsFromDirectory(str(folder), name="run")
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(folder))
    request = RequestContext()
    tensorboard = base_plugin.TBContext(data_provider=provider, multiplexer=multiplexer)
    wrong = []

    hparams = Context(tensorboard)
    contents = hparams.hparams_metadata(request, "")
    asked = api_pb2.GetExperimentRequest()
    experiment = GetExperiment(request, hparams, "", asked).run()
    names = [info.name for info in experiment.hparam_infos]
    columns = api_pb2.ListSessionGroupsRequest(
        start_index=0,
        slice_size=10,
        allowed_statuses=list(range(4)),
        col_params=[api_pb2.ColParams(hparam=name) for name in names]
        + [api_pb2.ColParams(metric=info.name) for info in experiment.metric_infos],
    )
    groups = ListSessionGroups(request, hparams, "", columns).run().session_groups
    if len(groups) != 1 or not contents:
        return [f"HParams has {len(groups)} runs"]
    settings = {name: groups[0].hparams[name] for name in names if name in groups[0].hparams}
    for name, value in settings.items():
        kind = value.WhichOneof("kind")
        print(f"ok       setting    {name:<24} {getattr(value, kind)}")
    wrong += [f"HParams has no {name}" for name in SETTINGS if name not in settings]
    results = {value.name.tag: value.value for value in groups[0].metric_values}
    for tag, value in results.items():
        print(f"ok       result     {tag:<24} {value:.6g}")
    wanted = ["result/perplexity", "result/times_float"]
    wrong += [f"HParams has no {tag}" for tag in wanted if tag not in results]
    if groups[0].sessions[0].status != api_pb2.STATUS_SUCCESS:
        wrong.append("HParams does not show the run as complete")

    layout = CustomScalarsPlugin(tensorboard).layout_impl(request, "")
    layout = json.loads(layout) if isinstance(layout, str) else layout
    tags = {tag for tags in provider.list_scalars(request, experiment_id="", plugin_name="scalars")
            .values() for tag in tags}
    for category in layout.get("category", []):
        for chart in category["chart"]:
            lines = [tag for tag in sorted(tags)
                     if any(re.match(pattern, tag) for pattern in chart["multiline"]["tag"])]
            print(f"ok       chart      {category['title']}: {chart['title']}: {len(lines)} tags")
            if not lines and category["title"] == "Overview":
                print(f"         without a line: {chart['multiline']['tag']}")
    if not layout.get("category"):
        wrong.append("Custom Scalars has no page")
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN_DIR")
    parser.add_argument("--no-distill", action="store_true", help="do not ask for distill/*")
    arguments = parser.parse_args()
    folder = folder_of(arguments.run)
    loaded = load(folder)

    def scalar(events, tag):
        points = events.Scalars(tag)
        odd = sum(not math.isfinite(point.value) for point in points)
        last = f"{len(points)} points, last {points[-1].value:.6g} at step {points[-1].step}"
        return f"{last}, {odd} not finite" if odd else last

    def histogram(events, tag):
        values = events.Histograms(tag)
        last = values[-1].histogram_value
        return f"{len(values)} histograms, last of {last.num:.0f} in {len(last.bucket)} buckets"

    def text(events, tag):
        return f"{len(text_of(events, tag)[0])} characters"

    scalars = SCALARS if arguments.no_distill else SCALARS + DISTILL
    wrong = match("scalar", scalars, loaded, lambda events: events.Tags()["scalars"], scalar)
    whole = {name: events for name, events in loaded.items() if name == "."}
    wrong += match("whole run", WHOLE, whole, lambda events: events.Tags()["scalars"], scalar)
    wrong += match(
        "histogram", HISTOGRAMS, loaded, lambda events: events.Tags()["histograms"], histogram
    )
    wrong += match("text", TEXTS, loaded, text_tags, text)
    wrong += twice(loaded)
    wrong += pages(folder)
    if wrong:
        sys.exit(f"{len(wrong)} are missing or wrong: {', '.join(wrong)}")
    print("everything is there")


if __name__ == "__main__":
    main()
