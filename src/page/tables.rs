//! The page's numbers.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::run::Run;
use crate::report::{duration, perplexity, size};

/// Keys of an evaluation that are neither a number it found nor its protocol.
const ASIDE: [&str; 11] = [
    "time",
    "event",
    "stage",
    "what",
    "task",
    "tags",
    "tokens",
    "data",
    "ratio_to_float",
    "global_step",
    "track",
];
/// Linears that are listed one by one; a model has thousands.
const LISTED: usize = 400;

/// What became of the run, in one sentence.
pub(super) fn sentence(run: &Run) -> String {
    match (run.state(), before_and_after(run)) {
        ("done", Some((float, after))) => {
            let ratio = after / float;
            let verdict = match ratio {
                ..1.005 => "as good as the float model",
                ..1.1 => "close to the float model",
                ..2.0 => "worse than the float model",
                ..10.0 => "much worse than the float model",
                _ => "far from the float model: it has lost most of what it knew",
            };
            let [float, after] = [float, after].map(perplexity);
            format!("Perplexity {float} in float, {after} now: {ratio:.2} times, {verdict}.")
        }
        ("done", None) => "The run is done; it measured no perplexity of its result.".to_owned(),
        ("failed", _) => "The run failed; the same command goes on from its last state.".to_owned(),
        (state, _) => format!("The run is {state}; this page shows it as far as it is."),
    }
}

/// Perplexities of the float model and of the result.
fn before_and_after(run: &Run) -> Option<(f64, f64)> {
    let done = run.events("done").last()?;
    Some((done["perplexity_float"].as_f64()?, done["perplexity_final"].as_f64()?))
}

/// The numbers that come first: what, and how much.
pub(super) fn headline(run: &Run) -> Vec<[String; 2]> {
    let record = &run.record;
    let done = run.events("done").last().unwrap_or(&Value::Null);
    let mut rows: Vec<[String; 2]> = Vec::new();
    let mut add = |what: &str, value: Option<String>| {
        rows.extend(value.map(|value| [what.to_owned(), value]));
    };
    if let Some((float, after)) = before_and_after(run) {
        add("perplexity", Some(format!("{} → {}", perplexity(float), perplexity(after))));
        add("of the float model", Some(format!("{:.3}\u{a0}×", after / float)));
    }
    let kl = run.events("validation").filter_map(|event| event["kl_forward"].as_f64()).last();
    add("KL to the float model", kl.map(|kl| format!("{kl:.4} nats")));
    add("bits a weight", done["bits_per_weight"].as_f64().map(|bits| format!("{bits:.2}")));
    add("packed size", done["bytes"].as_u64().map(size));
    add("time", record["seconds"].as_f64().map(duration));
    add("price", record["price"]["run"].as_f64().map(|price| format!("{price:.2}")));
    add("peak memory", record["peak_gib"].as_f64().map(gib));
    add("device", record["device"].as_str().map(str::to_owned));
    rows
}

/// Every table of one run that has rows.
pub(super) fn of_run(run: &Run) -> Vec<Value> {
    let mut tables = vec![evaluations(std::slice::from_ref(run)), gates(run)];
    tables.extend([exports(run), stages(run), estimates(run), blocks(run)]);
    tables.extend([widths(run), linears(run)]);
    tables.retain(has_rows);
    tables
}

/// Runs side by side.
pub(super) fn of_runs(runs: &[Run]) -> Vec<Value> {
    let mut order: Vec<String> = Vec::new();
    let mut cells: BTreeMap<(String, usize), String> = BTreeMap::new();
    for (place, run) in runs.iter().enumerate() {
        let state = [["state".to_owned(), run.state().to_owned()]];
        for [what, value] in state.into_iter().chain(headline(run)) {
            if !order.contains(&what) {
                order.push(what.clone());
            }
            cells.insert((what, place), value);
        }
    }
    let rows: Vec<Vec<String>> = order
        .into_iter()
        .map(|what| {
            let of = |place| cells.get(&(what.clone(), place)).cloned().unwrap_or_default();
            let values: Vec<String> = (0..runs.len()).map(of).collect();
            [vec![what.clone()], values].concat()
        })
        .collect();
    let names = runs.iter().map(|run| run.name.clone());
    let heading: Vec<String> = std::iter::once(String::new()).chain(names).collect();
    let mut tables = vec![json!({ "title": "Side by side", "heading": heading, "rows": rows })];
    tables.push(evaluations(runs));
    tables.push(differences(runs));
    tables.retain(has_rows);
    tables
}

fn has_rows(table: &Value) -> bool {
    table["rows"].as_array().is_some_and(|rows| !rows.is_empty())
}

fn table(title: &str, heading: &[&str], rows: &[Vec<String>]) -> Value {
    json!({ "title": title, "heading": heading, "rows": rows })
}

/// What tasks found; with the run's name where there are several.
fn evaluations(runs: &[Run]) -> Value {
    let mut rows = Vec::new();
    for run in runs {
        for event in run.events("evaluation") {
            let names = event["tags"].as_object().into_iter().flat_map(|tags| tags.keys());
            let names: Vec<&str> = names.map(String::as_str).collect();
            let found = |name: &&str| Some(format!("{name} {}", number(event[*name].as_f64()?)));
            let found: Vec<String> = names.iter().filter_map(found).collect();
            let protocol: Vec<String> = event
                .as_object()
                .into_iter()
                .flatten()
                .filter(|(key, value)| {
                    !ASIDE.contains(&key.as_str())
                        && !names.contains(&key.as_str())
                        && !value.is_null()
                })
                .map(|(key, value)| format!("{key} {}", plain(value)))
                .collect();
            let ratio = event["ratio_to_float"].as_f64().map(|ratio| format!("{ratio:.3}\u{a0}×"));
            let row = vec![
                plain(&event["what"]),
                plain(&event["task"]),
                found.join(", "),
                ratio.unwrap_or_default(),
                plain(&event["tokens"]),
                protocol.join(", "),
            ];
            let run = (runs.len() > 1).then(|| run.name.clone());
            let row: Vec<String> = run.into_iter().chain(row).collect();
            if !rows.contains(&row) {
                rows.push(row);
            }
        }
    }
    let mut heading = vec!["model", "task", "found", "of float", "tokens", "protocol"];
    if runs.len() > 1 {
        heading.insert(0, "run");
    }
    table("Evaluation", &heading, &rows)
}

/// What the quality gate measured.
fn gates(run: &Run) -> Value {
    let of = |value: &Value| value.as_f64().map(perplexity).unwrap_or_default();
    let row = |event: &Value| {
        vec![
            run.stage(event),
            of(&event["perplexity"]),
            of(&event["start"]),
            of(&event["rtn"]),
            plain(&event["tokens"]),
            if event["passed"] == true { "passed" } else { "worse" }.to_owned(),
        ]
    };
    let heading = ["behind", "perplexity", "at its start", "plain rounding", "tokens", ""];
    table("Quality gate", &heading, &run.events("gate").map(row).collect::<Vec<_>>())
}

/// What was written, and whether it is what was trained.
fn exports(run: &Run) -> Value {
    let row = |event: &Value| {
        vec![
            plain(&event["format"]),
            event["bytes"].as_u64().map(size).unwrap_or_default(),
            event["bits_per_weight"].as_f64().map(|bits| format!("{bits:.2}")).unwrap_or_default(),
            event["bits_per_parameter"].as_f64().map(|b| format!("{b:.2}")).unwrap_or_default(),
            plain(&event["parity"]),
        ]
    };
    let heading = ["format", "size", "bits a weight", "bits a parameter, all in", "parity"];
    table("Exports", &heading, &run.events("exported").map(row).collect::<Vec<_>>())
}

/// Time and memory of each stage, as the preflight expected them and as they were.
fn stages(run: &Run) -> Value {
    let stages = run.record["stages"].as_array().into_iter().flatten();
    let row = |(index, stage): (usize, &Value)| {
        let needs = &stage["needs"];
        vec![
            (index + 1).to_string(),
            plain(&stage["name"]),
            plain(&stage["status"]),
            needs["seconds"].as_f64().map(duration).unwrap_or_default(),
            stage["seconds"].as_f64().map(duration).unwrap_or_default(),
            needs["host_bytes"].as_u64().map(size).unwrap_or_default(),
            stage["peak_gib"].as_f64().map(gib).unwrap_or_default(),
        ]
    };
    let heading =
        ["", "stage", "state", "time expected", "taken", "memory expected", "peak so far"];
    table("Stages", &heading, &stages.enumerate().map(row).collect::<Vec<_>>())
}

/// What the preflight expected of the whole run beside what was.
fn estimates(run: &Run) -> Value {
    let (record, needs) = (&run.record, &run.record["needs"]);
    let mut rows = Vec::new();
    let mut add = |what: &str, expected: Option<String>, measured: Option<String>| {
        if let (Some(expected), Some(measured)) = (expected, measured) {
            rows.push(vec![what.to_owned(), expected, measured]);
        }
    };
    let time = |value: &Value| value.as_f64().map(duration);
    add("time", time(&needs["seconds"]), time(&record["seconds"]));
    let bytes = |value: &Value| value.as_u64().map(size);
    add("main memory", bytes(&needs["host_bytes"]), record["peak_gib"].as_f64().map(gib));
    add("disk", bytes(&needs["disk_bytes"]), bytes(&record["disk_bytes"]));
    let price = |value: &Value| value["run"].as_f64().map(|price| format!("{price:.2}"));
    add("price", price(&needs["price"]), price(&record["price"]));
    table("Expected and measured", &["", "expected", "measured"], &rows)
}

/// Memory in the unit of the estimates.
fn gib(peak: f64) -> String {
    size((peak * f64::from(1u32 << 30)) as u64)
}

/// Errors of blocks before and after.
fn blocks(run: &Run) -> Value {
    let row = |event: &Value| {
        let [before, after] = ["mse_before", "mse_after"].map(|key| event[key].as_f64());
        let part =
            before.zip(after).map(|(before, after)| format!("{:.1} %", 100.0 * after / before));
        vec![
            run.stage(event),
            (event["index"].as_u64().unwrap_or(0) + 1).to_string(),
            before.map(number).unwrap_or_default(),
            after.map(number).unwrap_or_default(),
            part.unwrap_or_default(),
            event["seconds"].as_f64().map(duration).unwrap_or_default(),
        ]
    };
    let heading = ["stage", "block", "error before", "after", "left", "time"];
    table("Blocks", &heading, &run.events("block").map(row).collect::<Vec<_>>())
}

/// Weights by width and grouping, of the first export.
fn widths(run: &Run) -> Value {
    let mut kinds: BTreeMap<(u64, u64, String), (u64, u64)> = BTreeMap::new();
    for (_, linear) in manifest_linears(run) {
        let (bits, group) = (linear["bits"].as_u64(), linear["group_len"].as_u64());
        let shape = linear["shape"].as_array().into_iter().flatten().filter_map(Value::as_u64);
        let key = (bits.unwrap_or(0), group.unwrap_or(0), plain(&linear["method"]));
        let kind = kinds.entry(key).or_default();
        *kind = (kind.0 + 1, kind.1 + shape.product::<u64>());
    }
    let rows = kinds.into_iter().map(|((bits, group, method), (linears, weights))| {
        vec![
            bits.to_string(),
            group.to_string(),
            method,
            linears.to_string(),
            weights.to_string(),
            size(weights * bits / 8),
        ]
    });
    let heading = ["bits", "weights in a group", "method", "linears", "weights", "of codes"];
    table("Where the weights are", &heading, &rows.collect::<Vec<_>>())
}

/// Each linear of the first export.
fn linears(run: &Run) -> Value {
    let errors = &run.record["results"]["weight_errors"];
    let row = |(name, linear): (&str, &Value)| {
        let error = errors[name].as_f64().map(|error| format!("{:.2} %", 100.0 * error));
        let shape: Vec<String> =
            linear["shape"].as_array().into_iter().flatten().map(plain).collect();
        vec![
            name.to_owned(),
            plain(&linear["bits"]),
            plain(&linear["group_len"]),
            shape.join(" × "),
            plain(&linear["method"]),
            error.unwrap_or_default(),
        ]
    };
    let rows: Vec<_> = manifest_linears(run).take(LISTED).map(row).collect();
    let heading =
        ["linear", "bits", "weights in a group", "shape", "method", "off the float weights"];
    let mut table = table("Linears", &heading, &rows);
    table["folded"] = true.into();
    table
}

fn manifest_linears(run: &Run) -> impl Iterator<Item = (&str, &Value)> {
    let manifest = run.manifests.first().map(|(_, manifest)| manifest);
    let linears = manifest.and_then(|manifest| manifest["linears"].as_object());
    linears.into_iter().flatten().map(|(name, linear)| (name.as_str(), linear))
}

/// Lines of the recipes that are not in all of them.
fn differences(runs: &[Run]) -> Value {
    let keys = runs.iter().map(|run| flat(&run.recipe)).collect::<Vec<_>>();
    let mut names: Vec<&String> = keys.iter().flat_map(BTreeMap::keys).collect();
    names.sort();
    names.dedup();
    let rows: Vec<Vec<String>> = names
        .into_iter()
        .filter(|name| name.as_str() != "output")
        .map(|name| (name, keys.iter().map(|keys| keys.get(name)).collect::<Vec<_>>()))
        .filter(|(_, values)| values.iter().any(|value| *value != values[0]))
        .map(|(name, values)| {
            let values = values.into_iter().map(|value| value.cloned().unwrap_or("—".to_owned()));
            std::iter::once(name.clone()).chain(values).collect()
        })
        .collect();
    let names = runs.iter().map(|run| run.name.as_str());
    let heading: Vec<&str> = std::iter::once("key").chain(names).collect();
    table("Where the recipes differ", &heading, &rows)
}

/// A recipe's keys by their path.
fn flat(recipe: &str) -> BTreeMap<String, String> {
    fn walk(path: String, value: &toml::Value, found: &mut BTreeMap<String, String>) {
        match value {
            toml::Value::Table(table) => {
                for (key, value) in table {
                    let dot = if path.is_empty() { "" } else { "." };
                    walk(format!("{path}{dot}{key}"), value, found);
                }
            }
            toml::Value::Array(items) if items.iter().any(toml::Value::is_table) => {
                for (index, value) in items.iter().enumerate() {
                    walk(format!("{path}.{index}"), value, found);
                }
            }
            value => {
                found.insert(path, value.to_string());
            }
        }
    }
    let mut found = BTreeMap::new();
    if let Ok(table) = recipe.parse::<toml::Table>() {
        walk(String::new(), &toml::Value::Table(table), &mut found);
    }
    found
}

/// What went into the run.
pub(super) fn provenance(run: &Run) -> Vec<[String; 2]> {
    let (record, fingerprint) = (&run.record, &run.record["fingerprint"]);
    let mut rows = vec![["fewbit".to_owned(), plain(&record["fewbit"])]];
    rows.push(["model, SHA-256".to_owned(), plain(&fingerprint["model"])]);
    for (role, hash) in fingerprint["data"].as_object().into_iter().flatten() {
        rows.push([format!("data.{role}, SHA-256"), plain(hash)]);
    }
    rows.push(["first stages taken over from".to_owned(), plain(&record["reused_from"])]);
    rows.retain(|[_, value]| !value.is_empty());
    rows
}

/// A JSON value as people write it.
fn plain(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        Value::Number(value) if value.is_f64() => number(value.as_f64().unwrap_or(f64::NAN)),
        other => other.to_string(),
    }
}

/// Four significant digits.
fn number(value: f64) -> String {
    let size = value.abs();
    if size >= 1e5 || size > 0.0 && size < 1e-3 {
        return format!("{value:.3e}");
    }
    let decimals = if size > 0.0 { (3.0 - size.log10().floor()).clamp(0.0, 6.0) } else { 0.0 };
    format!("{value:.0$}", decimals as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_four_digits() {
        for (value, text) in [
            (42.684_2, "42.68"),
            (0.123_456, "0.1235"),
            (3.8e6, "3.800e6"),
            (0.0, "0"),
            (2e-5, "2.000e-5"),
        ] {
            assert_eq!(number(value), text);
        }
    }

    #[test]
    fn a_recipe_is_a_list_of_keys() {
        let keys = flat(
            "seed = 1\n[[stage]]\n[stage.distill]\nsteps = 2\nmethod.seq = { start = \"max\" }\n",
        );
        let keys: Vec<String> =
            keys.into_iter().map(|(key, value)| format!("{key}={value}")).collect();
        assert_eq!(
            keys,
            ["seed=1", "stage.0.distill.method.seq.start=\"max\"", "stage.0.distill.steps=2"]
        );
    }
}
