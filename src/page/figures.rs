//! The page's charts.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::chart::{COLOURS, Chart, Line, Scale, bars};
use super::run::Run;

/// Every chart of one run that there is something to draw in.
pub(super) fn of_run(run: &Run) -> Vec<Value> {
    let mut figures = Vec::new();
    for (stage, title) in trained_stages(run) {
        let line = |tag: &str, name: &str| steps(run, stage, tag, name);
        let parts = [
            ("loss", vec![line("train/loss", "loss")], Scale::Either),
            ("learning rate", vec![line("train/learning_rate", "learning rate")], Scale::Linear),
            ("gradient norm", vec![line("train/grad_norm", "gradient norm")], Scale::Either),
        ];
        for (what, lines, scale) in parts {
            push(&mut figures, &format!("{title}: {what}"), "step", scale, lines);
        }
        let validated = |key: &str, name: &str| validations(run, stage, key, name);
        let perplexity = vec![validated("perplexity", "perplexity")];
        push(
            &mut figures,
            &format!("{title}: perplexity on validation"),
            "step",
            Scale::Either,
            perplexity,
        );
        let closeness = vec![validated("kl_forward", "KL to the float model")];
        push(
            &mut figures,
            &format!("{title}: closeness to the float model"),
            "step",
            Scale::Either,
            closeness,
        );
    }
    for (stage, title) in stages_of(run, "block") {
        let of = |key: &str, name: &str| {
            let points = run.events("block").filter(|event| event["stage"] == stage);
            let points = points.filter_map(|event| pair(&event["index"], &event[key]));
            // Blocks are counted from 1 where people read.
            let points = points.map(|(index, error)| (index + 1.0, error)).collect();
            Line { name: name.to_owned(), points, marked: true }
        };
        let lines = vec![of("mse_before", "before"), of("mse_after", "after")];
        push(
            &mut figures,
            &format!("{title}: error of each block's output"),
            "block",
            Scale::Powers,
            lines,
        );
    }
    let title = "How far the weights of each linear are from the float model's, in percent";
    push(&mut figures, title, "block", Scale::Linear, weight_errors(run));
    figures.extend(codes(run));
    figures.extend(scale_changes(run));
    figures
}

/// A line for each kind of linear, over the blocks.
fn weight_errors(run: &Run) -> Vec<Line> {
    let mut lines: BTreeMap<&str, Vec<(f64, f64)>> = BTreeMap::new();
    for (name, error) in run.record["results"]["weight_errors"].as_object().into_iter().flatten() {
        let block = name.split('.').find_map(|part| part.parse::<u32>().ok());
        let kind = name.rsplit('.').next().unwrap_or_default();
        if let (Some(block), Some(error)) = (block, error.as_f64()) {
            lines.entry(kind).or_default().push((f64::from(block) + 1.0, 100.0 * error));
        }
    }
    let line = |(name, mut points): (&str, Vec<(f64, f64)>)| {
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        Line { name: name.to_owned(), points, marked: true }
    };
    lines.into_iter().map(line).collect()
}

/// Losses and validations of several runs over each other.
pub(super) fn of_runs(runs: &[Run]) -> Vec<Value> {
    let mut titles: Vec<(u64, String)> = runs.iter().flat_map(trained_stages).collect();
    titles.sort();
    titles.dedup();
    let mut figures = Vec::new();
    for (stage, title) in titles {
        let same = || {
            let same = |run: &&Run| {
                trained_stages(run).iter().any(|(other, name)| *other == stage && *name == title)
            };
            runs.iter().filter(same)
        };
        let lines = same().map(|run| steps(run, stage, "train/loss", &run.name)).collect();
        push(&mut figures, &format!("{title}: loss"), "step", Scale::Either, lines);
        let lines = same().map(|run| validations(run, stage, "perplexity", &run.name)).collect();
        push(
            &mut figures,
            &format!("{title}: perplexity on validation"),
            "step",
            Scale::Either,
            lines,
        );
    }
    figures
}

/// A chart, its title and its legend, if there is anything to see.
fn push(
    figures: &mut Vec<Value>,
    title: &str,
    across: &'static str,
    scale: Scale,
    lines: Vec<Line>,
) {
    let names: Vec<Value> = lines
        .iter()
        .zip(COLOURS.iter().cycle())
        .map(|(line, colour)| json!({ "name": line.name, "colour": colour }))
        .collect();
    // A page without one of its charts is better than none.
    if let Ok(Some(svg)) = (Chart { across, scale, lines }).svg() {
        let legend = if names.len() > 1 { names } else { Vec::new() };
        figures.push(json!({ "title": title, "svg": svg, "legend": legend }));
    }
}

/// The stages with events of a kind, and what they are called.
fn stages_of(run: &Run, kind: &str) -> Vec<(u64, String)> {
    let stages: BTreeMap<u64, String> = run
        .events(kind)
        .filter_map(|event| Some((event["stage"].as_u64()?, run.stage(event))))
        .collect();
    stages.into_iter().collect()
}

/// The stages with log points or validations.
fn trained_stages(run: &Run) -> Vec<(u64, String)> {
    let mut stages = stages_of(run, "step");
    stages.extend(stages_of(run, "validation"));
    stages.sort();
    stages.dedup();
    stages
}

fn steps(run: &Run, stage: u64, tag: &str, name: &str) -> Line {
    let points = run.events("step").filter(|event| event["stage"] == stage);
    let points = points.filter_map(|event| pair(&event["step"], &event["values"][tag])).collect();
    Line { name: name.to_owned(), points, marked: false }
}

fn validations(run: &Run, stage: u64, key: &str, name: &str) -> Line {
    let points = run.events("validation").filter(|event| event["stage"] == stage);
    let points = points.filter_map(|event| pair(&event["step"], &event[key])).collect();
    Line { name: name.to_owned(), points, marked: true }
}

fn pair(x: &Value, y: &Value) -> Option<(f64, f64)> {
    Some((x.as_f64()?, y.as_f64()?))
}

/// How often each code stands in the first export, for each width of codes.
fn codes(run: &Run) -> Vec<Value> {
    let Some((_, manifest)) = run.manifests.first() else { return Vec::new() };
    let mut widths: BTreeMap<u64, Vec<f64>> = BTreeMap::new();
    for linear in manifest["linears"].as_object().into_iter().flat_map(|linears| linears.values()) {
        let counts = linear["histogram"].as_array().map_or(&[][..], Vec::as_slice);
        let Some(bits) = linear["bits"].as_u64() else { continue };
        let sums = widths.entry(bits).or_insert_with(|| vec![0.0; counts.len()]);
        for (sum, count) in sums.iter_mut().zip(counts) {
            *sum += count.as_f64().unwrap_or(0.0);
        }
    }
    let figure = |(bits, counts): (u64, Vec<f64>)| {
        let edges: Vec<f64> = (0..=counts.len()).map(|edge| edge as f64 - 0.5).collect();
        let svg = bars(&edges, &counts, "code").ok().flatten()?;
        Some(json!({ "title": format!("codes of {bits} bits"), "svg": svg, "legend": [] }))
    };
    widths.into_iter().filter_map(figure).collect()
}

/// How far scales moved, over all blocks of a stage.
fn scale_changes(run: &Run) -> Vec<Value> {
    const BUCKETS: usize = 40;
    let numbers = |value: &Value| -> Vec<f64> {
        value.as_array().into_iter().flatten().filter_map(Value::as_f64).collect()
    };
    // The middle of each bucket and what is in it.
    let mut stages: BTreeMap<String, Vec<(f64, f64)>> = BTreeMap::new();
    for event in run.events("histogram") {
        if event["tag"].as_str().is_some_and(|tag| tag.starts_with("scale_change/")) {
            let (edges, counts) = (numbers(&event["edges"]), numbers(&event["counts"]));
            let middles = edges.windows(2).map(|edges| f64::midpoint(edges[0], edges[1]));
            stages.entry(run.stage(event)).or_default().extend(middles.zip(counts));
        }
    }
    let figure = |(stage, buckets): (String, Vec<(f64, f64)>)| {
        let held = || buckets.iter().filter(|(_, count)| *count > 0.0).map(|(middle, _)| *middle);
        let low = held().fold(f64::INFINITY, f64::min);
        let high = held().fold(f64::NEG_INFINITY, f64::max);
        let width = ((high - low) / BUCKETS as f64).max(1e-9);
        let edges: Vec<f64> = (0..=BUCKETS).map(|edge| low + width * edge as f64).collect();
        let mut counts = vec![0.0; BUCKETS];
        for (middle, count) in &buckets {
            if let Some(sum) = counts.get_mut((((middle - low) / width) as usize).min(BUCKETS - 1))
            {
                *sum += count;
            }
        }
        let svg = bars(&edges, &counts, "ln(scale / its start)").ok().flatten()?;
        let title = format!("{stage}: how far scales moved");
        Some(json!({ "title": title, "svg": svg, "legend": [] }))
    };
    stages.into_iter().filter_map(figure).collect()
}
