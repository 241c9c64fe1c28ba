//! A run as a page.
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too

mod common;

use common::{Place, TRAIN};
use serde_json::Value;

const STAGES: &str = r#"
[[stage]]
[stage.reconstruct]
method.flexround = {}
steps = 3
batch = 2
learning_rate = 1e-3
allow_worse = true
[[stage]]
[stage.distill]
method.seq = {}
objective.kl_forward = {}
bits = 2
steps = 4
batch = 2
log_every = 1
validate.every = 2
rate_unit = "grid"
learning_rate = 0.002
allow_worse = true
[[stage]]
[stage.evaluate]
task.ppl = { context = 64 }
baselines = ["float"]
[[stage]]
[stage.export]
format.fewbit = {}
allow_worse = true
"#;

#[test]
fn a_run_ends_with_its_page() {
    let place = Place::with_small_run(STAGES);
    place.ok(&TRAIN);
    let page = place.read("run/report.html");
    // All that a reader needs is in the one file.
    for word in ["<script", "src=", "href=", "@import", "url("] {
        assert!(!page.contains(word), "{word}");
    }
    assert_eq!(page.matches("http").count(), page.matches("http://www.w3.org/2000/svg").count());
    let record: Value = serde_json::from_str(&place.read("run/run.json")).unwrap();
    let measured = record["results"]["measured"].as_array().unwrap();
    for measured in measured {
        let nll = measured["result"]["nll_per_token"].as_f64().unwrap();
        assert!(page.contains(&format!("nll_per_token {nll:.3}")), "{nll}");
    }
    let hash = record["fingerprint"]["model"].as_str().unwrap();
    for said in [hash, "codes of 2 bits", "distill: loss", "error of each block", "[stage.distill]"]
    {
        assert!(page.contains(said), "{said}");
    }

    // The same page again, and a second run beside it.
    assert_eq!(place.ok(&["report", "run"]), "run/report.html\n");
    assert_eq!(place.read("run/report.html"), page);
    let other = [&TRAIN[..], &["--output", "<b>", "--set", "stage.1.distill.steps=2"]].concat();
    place.ok(&other);
    let prompt = ["--prompt", "Once <i>upon", "--max-new-tokens", "3"];
    place.ok(&[&["report", "run", "<b>", "--output", "both.html"][..], &prompt].concat());
    let both = place.read("both.html");
    for said in ["stage.1.distill.steps", "Once &lt;i&gt;upon", "&lt;b&gt;", "<th>float</th>"] {
        assert!(both.contains(said), "{said}");
    }
    // Names are text, whatever they hold.
    assert!(!both.contains("<b>") && !both.contains("<i>upon"));
}

#[test]
fn a_run_that_goes_on_or_was_killed_has_a_page_too() {
    let place = Place::with_small_run(STAGES);
    place.ok(&TRAIN);
    let mut record: Value = serde_json::from_str(&place.read("run/run.json")).unwrap();
    record["status"] = "running".into();
    place.write("run/run.json", record.to_string());
    let metrics = place.read("run/metrics.jsonl");
    // Killed in the middle of a line of the distillation.
    let cut = metrics.rfind("\"event\":\"step\"").unwrap();
    place.write("run/metrics.jsonl", &metrics[..cut]);
    place.ok(&["report", "run"]);
    let page = place.read("run/report.html");
    assert!(page.contains("The run is running") && page.contains("distill: loss"));
    std::fs::remove_file(place.path("run/metrics.jsonl")).unwrap();
    place.ok(&["report", "run"]);
}

#[test]
fn what_is_no_run_is_refused_and_nothing_is_written() {
    let place = Place::new();
    place.write("folder.html", "kept");
    std::fs::create_dir(place.path("empty")).unwrap();
    for (arguments, code) in [
        (&["report", "empty"][..], 2),
        (&["report", "nowhere"], 2),
        (&["report"], 2),
        (&["report", "empty", "--output", "folder.html"], 2),
    ] {
        let ended = place.run(arguments);
        assert_eq!((ended.code, &*ended.out), (code, ""), "{}", ended.err);
    }
    assert_eq!(place.read("folder.html"), "kept");
    place.write("empty/run.json", "{");
    let ended = place.run(&["report", "empty"]);
    assert_eq!((ended.code, ended.err.lines().count()), (3, 3), "{}", ended.err);
}
