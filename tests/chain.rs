//! Stages that follow each other: one that keeps bits, groups and the kind of grid goes on from exactly
//! what the earlier one left; one on another grid starts from the latent weights.
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too

mod common;

use std::fmt::Write as _;

use common::{Place, events, few_stories};
use serde_json::Value;

const HEAD: &str = r#"output = "run"
device = "cpu"
model.path = "model"
[data.calibration]
path = "text.json"
samples = 8
length = 32
[data.train]
path = "text.json"
length = 32
[data.validation]
path = "few.json"
"#;

fn place(recipe: &str) -> Place {
    let place = Place::new();
    place.write("recipe.toml", recipe);
    place.write("few.json", few_stories(3));
    place.write("text.json", few_stories(12));
    place.copy_model("stories260k", "model");
    place
}

fn reconstruct(method: &str, bits: u8, rate: &str, more: &str) -> String {
    format!(
        "[[stage]]\n[stage.reconstruct]\nbits = {bits}\nmethod.{method} = {{}}\nsteps = 4\n\
         batch = 4\nlearning_rate = {rate}\nallow_worse = true\n{more}\n"
    )
}

fn distill(method: &str, bits: u8, rate: &str, more: &str) -> String {
    format!(
        "[[stage]]\n[stage.distill]\nbits = {bits}\nmethod.{method} = {{}}\n\
         objective.kl_forward = {{}}\nsteps = 2\nbatch = 4\nlearning_rate = {rate}\nallow_worse = true\n{more}\n"
    )
}

/// Whole steps from the first, and the end of it whatever it is worth.
const FAST: &str = "rate_unit = \"grid\"\nschedule.constant = {}\nvalidate.keep_best = false\n";

const EVALUATE: &str = "[[stage]]\n[stage.evaluate]\ntask.ppl = { context = 64 }\n";

fn recipe(quant: &str, stages: &[String]) -> String {
    let mut text = format!("{HEAD}[quant]\n{quant}\n");
    for stage in stages {
        let _ = write!(text, "{stage}{EVALUATE}");
    }
    text
}

/// Codes and scales of the last stage, and of the one before it, by tensor.
fn compare_last_two(place: &Place, stages: usize, what: &str) {
    let tensors = |index: usize| {
        let checkpoints = place.path("run/checkpoints");
        let dir = std::fs::read_dir(&checkpoints).unwrap().map(|e| e.unwrap().path()).find(|dir| {
            let name = dir.file_name().unwrap().to_str().unwrap().to_owned();
            name.split(['-', '_', '.']).any(|part| part.parse::<usize>() == Ok(index))
        });
        let dir = dir.unwrap_or_else(|| panic!("no checkpoints of stage {index}"));
        let mut found = std::collections::BTreeMap::new();
        for block in 0..5 {
            let path = dir.join(format!("block-{block:04}.safetensors"));
            let (header, values) = common::split_safetensors(&path);
            for name in header.as_object().unwrap().keys().filter(|name| *name != "__metadata__") {
                if !["latent", "step"].contains(&name.rsplit('.').next().unwrap()) {
                    let range = common::range_of(&header, name);
                    found.insert(name.clone(), values[range].to_vec());
                }
            }
        }
        found
    };
    // Every training stage is followed by an evaluation.
    let [before, after] = [tensors(2 * stages - 4), tensors(2 * stages - 2)];
    assert!(before.len() >= 5 * 7 * 2, "{} tensors", before.len());
    let changed: Vec<&String> = before
        .iter()
        .filter(|(name, bytes)| after.get(*name) != Some(*bytes))
        .map(|(name, _)| name)
        .collect();
    assert!(changed.is_empty(), "{what}: a stage at rate 0 changed {changed:?}");
}

/// A stage at rate 0 behind one on the same grid changes no bit, for every pair that may follow each
/// other, in both kinds of stage.
#[test]
fn a_stage_at_rate_zero_changes_no_bit() {
    let uniform = ["flexround", "lrq", "block_ap"];
    let first = ["flexround", "lrq", "block_ap", "lwc", "signround"];
    let mut cases = Vec::new();
    for a in first {
        for b in uniform {
            cases.push(("bits = 4\ngroup_size = 4", 4, a, b));
        }
    }
    for a in uniform {
        cases.push(("bits = 3\nsymmetric = true", 3, a, "lsq"));
    }
    cases.push(("bits = 3\nsymmetric = true", 3, "lsq", "lsq"));
    cases.push(("bits = 3\nsymmetric = true", 3, "lsq", "flexround"));
    cases.push(("bits = 2", 2, "seq", "seq"));
    cases.push(("bits = 2\ngroup_size = 4", 2, "seq", "seq"));
    cases.push(("bits = 2", 2, "ternary", "ternary"));
    cases.push(("bits = 1", 1, "sign", "sign"));
    cases.push(("bits = 2\nscales = \"f16\"", 2, "seq", "seq"));
    for (index, (quant, bits, a, b)) in cases.into_iter().enumerate() {
        // A method on lsq's symmetric grid has to be symmetric too.
        let quant = if a == "block_ap" || b == "block_ap" {
            quant.replace("symmetric = true", "symmetric = false")
        } else {
            quant.to_owned()
        };
        if quant.contains("symmetric = false") && b == "lsq" {
            continue; // zero is not in the middle: another grid
        }
        let then = if index % 2 == 0 {
            distill(b, bits, "0.0", "")
        } else {
            reconstruct(b, bits, "0.0", "within = \"staged\"")
        };
        let place = place(&recipe(&quant, &[reconstruct(a, bits, "1e-2", ""), then]));
        place.ok(&["train", "--recipe", "recipe.toml"]);
        compare_last_two(&place, 2, &format!("{a} → {b}, {quant}"));
        let all: Vec<f64> = events(&place.path("run/metrics.jsonl"))
            .iter()
            .filter(|event| event["event"] == "evaluation" && event["what"] != "float")
            .map(|event| event["perplexity"].as_f64().unwrap())
            .collect();
        assert_eq!(all[0].to_bits(), all[1].to_bits(), "{a} → {b}, {quant}: {all:?}");
    }
}

/// Nor does one that tunes the grids of codes, of each kind, at once or piece by piece.
#[test]
fn grids_tuned_at_rate_zero_by_block_change_no_bit() {
    let solve = |method: &str| format!("[[stage]]\n[stage.calibrate]\nmethod.{method}\n");
    let codebooks = solve("aqlm = { vector = 2, code_bits = 4, rounds = 1, beam = 1 }");
    let levels = solve("aqlm = { vector = 1, code_bits = 2, rounds = 0 }");
    let (planes, even) = (solve("bcq = {}"), reconstruct("flexround", 2, "1e-2", ""));
    let f16 = "group_size = 4\nscales = \"f16\"";
    let pieces = "within = \"staged\"";
    for (quant, first, method, more) in [
        (f16, &codebooks, "aqlm_ft", ""),
        ("group_size = 4", &codebooks, "aqlm_ft", pieces),
        ("", &levels, "aqlm_ft", "rate_unit = \"grid\""),
        (f16, &even, "peqa", pieces),
        ("", &even, "e2e_qp", ""),
        ("", &planes, "alphatuning", ""),
    ] {
        let quant = format!("bits = 2\n{quant}");
        let stages = [first.clone(), reconstruct(method, 2, "0.0", more)];
        let place = place(&recipe(&quant, &stages));
        place.ok(&["train", "--recipe", "recipe.toml"]);
        compare_last_two(&place, 2, &format!("{method} {more}, {quant}"));
    }
}

/// Latents wait while scales are tuned: at rate 0 as if nothing had been in between, and at any rate what goes on
/// begins with the codes and scales that were left.
#[test]
fn latents_wait_behind_tuned_scales() {
    let export = "[[stage]]\n[stage.export]\nformat.fewbit = {}\nallow_worse = true\n";
    let tune = |method: &str, rate: &str| {
        format!(
            "[[stage]]\n[stage.tune_scales]\nmethod.{method} = {{}}\nobjective.kl_forward = {{}}\n\
             steps = 4\nbatch = 4\nlearning_rate = {rate}\nrate_unit = \"grid\"\nadapter.dtype = \"f32\"\nallow_worse = true\n"
        )
    };
    for (quant, learns) in [("bits = 2\ngroup_size = 4", "block_ap"), ("bits = 2", "seq")] {
        let run = |between: String, rate: &str| {
            let last = distill(learns, 2, rate, FAST);
            let stages = [reconstruct(learns, 2, "1e-2", ""), between, last];
            let place = place(&(recipe(quant, &stages) + export));
            place.ok(&["train", "--recipe", "recipe.toml"]);
            place
        };
        let file = "run/export/fewbit/model.safetensors";
        let of = |place: &Place| common::split_safetensors(&place.path(file)).1;
        let none = of(&run(EVALUATE.to_owned(), "0.3"));
        assert!(none != of(&run(EVALUATE.to_owned(), "0.0")), "{learns} learned nothing");
        for between in [
            tune("e2e_qp", "0.0"),
            tune("peqa", "0.0"),
            distill("e2e_qp", 2, "0.0", ""),
            reconstruct("peqa", 2, "0.0", ""),
        ] {
            assert!(of(&run(between.clone(), "0.3")) == none, "{learns}: {between}");
        }
        let place = run(tune("e2e_qp", "3e-3"), "0.0");
        let told = events(&place.path("run/metrics.jsonl"));
        let told = told.iter().filter(|event| event["event"] == "evaluation");
        let all: Vec<f64> = told.map(|event| event["perplexity"].as_f64().unwrap()).collect();
        let [.., blocks, tuned, last] = all[..] else { panic!("{all:?}") };
        assert!(
            blocks.to_bits() != tuned.to_bits() && tuned.to_bits() == last.to_bits(),
            "{all:?}"
        );
    }
}

/// Latents that begin away from the borders of their levels have the same codes, and learn others.
#[test]
fn a_margin_changes_no_code_until_something_learns() {
    let margin = format!("{FAST}start_margin = 0.1");
    for (quant, bits, method) in [
        ("bits = 2\ngroup_size = 4", 2, "block_ap"),
        ("bits = 2\nscales = \"f16\"", 2, "seq"),
        ("bits = 3\nsymmetric = true", 3, "lsq"),
        ("bits = 1", 1, "sign"),
    ] {
        let run = |rate: &str, more: &str| {
            let stages = [reconstruct(method, bits, "1e-2", ""), distill(method, bits, rate, more)];
            let place = place(&recipe(quant, &stages));
            place.ok(&["train", "--recipe", "recipe.toml"]);
            place
        };
        compare_last_two(&run("0.0", &margin), 2, &format!("{method}, {quant}"));
        let learned = |place: Place, stage: &str| {
            let last = format!("run/checkpoints/{stage}-distill/block-0000.safetensors");
            common::split_safetensors(&place.path(&last)).1
        };
        let [none, some] = [FAST, &margin].map(|more| learned(run("0.1", more), "02"));
        assert!(none != some, "{method}, {quant}");
        // On a grid of its own, from the float model's weights.
        let first = |rate: &str, more: &str| {
            let place = place(&recipe(quant, &[distill(method, bits, rate, more)]));
            place.ok(&["train", "--recipe", "recipe.toml"]);
            learned(place, "00")
        };
        for (rate, same) in [("0.0", true), ("0.1", false)] {
            let [none, some] = [FAST, &margin].map(|more| first(rate, more));
            assert!((none == some) == same, "{method}, {quant}, rate {rate}");
        }
    }
    let stages = [reconstruct("seq", 2, "1e-2", ""), distill("seq", 2, "0.1", "")];
    let place = place(&recipe("bits = 2", &stages));
    for (set, what) in [
        ("stage.2.distill.start_margin=0.5", "start_margin = 0.5 leaves no level"),
        ("stage.2.distill.start_margin=-0.1", "start_margin = -0.1 leaves no level"),
        ("stage.2.distill.start_margin=nan", "start_margin = NaN leaves no level"),
    ] {
        let text = place.refused(&["check", "--recipe", "recipe.toml", "--set", set]);
        assert!(text.starts_with("exit 2") && text.contains(what), "{text}");
    }
    let set = ["stage.2.distill.method={e2e_qp={}}", "stage.2.distill.start_margin=0.1"];
    let set = set.map(|set| ["--set", set]).concat();
    let text = place.refused(&[&["check", "--recipe", "recipe.toml"], &set[..]].concat());
    assert!(text.contains("method.e2e_qp learns no latent weights"), "{text}");
}

/// Latents are what is learned, not what is rounded: with them the next stage starts elsewhere.
#[test]
fn another_grid_starts_where_it_is_told() {
    let perplexity = |from: &str| {
        let second = reconstruct("seq", 2, "0.0", &format!("start_from = \"{from}\""));
        let place = place(&recipe("bits = 4", &[reconstruct("block_ap", 4, "1e-2", ""), second]));
        place.ok(&["train", "--recipe", "recipe.toml"]);
        let events = events(&place.path("run/metrics.jsonl"));
        let last = events.iter().rfind(|event| event["event"] == "evaluation").unwrap();
        last["perplexity"].as_f64().unwrap()
    };
    let [latents, rounded, float] = ["latents", "rounded", "float"].map(perplexity);
    assert!(latents.to_bits() != rounded.to_bits() && latents.to_bits() != float.to_bits());
    assert!([latents, rounded, float].iter().all(|p| p.is_finite()));
}

/// A resumed run finds the latents of finished stages again.
#[test]
fn chained_stages_resume_to_the_same_bytes() {
    let stages = [
        reconstruct("block_ap", 4, "1e-2", ""),
        reconstruct("seq", 2, "0.02", "rate_unit = \"grid\"\nwithin = \"staged\""),
        distill("seq", 2, "0.02", "rate_unit = \"grid\""),
    ];
    let text = recipe("bits = 4", &stages) + "[[stage]]\n[stage.export]\nformat.fewbit = {}\n";
    let whole = place(&text);
    whole.ok(&["train", "--recipe", "recipe.toml"]);
    let stopped = place(&text);
    stopped.ok(&["train", "--recipe", "recipe.toml"]);
    // As if it had been killed in its second stage, with one block done.
    let dirs = std::fs::read_dir(stopped.path("run/checkpoints")).unwrap();
    let mut dirs: Vec<_> = dirs.map(|entry| entry.unwrap().path()).collect();
    dirs.sort();
    let record = stopped.path("run/run.json");
    let mut run: Value = serde_json::from_str(&std::fs::read_to_string(&record).unwrap()).unwrap();
    run["status"] = "running".into();
    for stage in run["stages"].as_array_mut().unwrap().iter_mut().skip(2) {
        stage["status"] = "pending".into();
    }
    std::fs::write(&record, run.to_string()).unwrap();
    for dir in &dirs {
        let name = dir.file_name().unwrap().to_str().unwrap();
        let index: usize = name.split(['-', '_', '.']).find_map(|part| part.parse().ok()).unwrap();
        if index > 2 {
            std::fs::remove_dir_all(dir).unwrap();
        } else if index == 2 {
            for block in 1..5 {
                let file = dir.join(format!("block-{block:04}.safetensors"));
                std::fs::remove_file(file).unwrap();
            }
        }
    }
    std::fs::remove_dir_all(stopped.path("run/export")).unwrap();
    stopped.ok(&["train", "--recipe", "recipe.toml"]);
    assert!(whole.tree("run/export") == stopped.tree("run/export"));
}

/// What was learned is never lost without a word.
#[test]
fn a_method_with_a_grid_of_its_own_does_not_follow_the_same_grid() {
    for (method, more) in [("lwc", "an earlier stage"), ("signround", "an earlier stage")] {
        let stages = [reconstruct("flexround", 4, "1e-2", ""), reconstruct(method, 4, "1e-2", "")];
        let place = place(&recipe("bits = 4", &stages));
        let text = place.refused(&["check", "--recipe", "recipe.toml"]);
        assert!(text.starts_with("exit 2") && text.contains(more), "{text}");
        // With other bits it starts from the latents.
        place.ok(&["check", "--recipe", "recipe.toml", "--set", "stage.2.reconstruct.bits=3"]);
    }
}
