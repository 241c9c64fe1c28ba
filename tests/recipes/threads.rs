//! The same seed on the same machine gives the same bytes, whatever the number of threads.

use std::collections::BTreeMap;

use sha2::{Digest, Sha256};

use crate::STORED;
use crate::common::{Ended, Place, few_stories};

const THREADS: [&str; 3] = ["1", "2", "4"];

/// One recipe of each kind of work, and what makes it shorter still.
const KINDS: [(&str, &[&str]); 6] = [
    // Statistics, Cholesky, codes column by column.
    ("gptq_w4g128", &["data.calibration.samples=8"]),
    // Balancing and clipping, searched.
    ("awq_w4g128", &["data.calibration.samples=8"]),
    // Blocks with learned rounding, then distillation.
    (
        "upq_int2",
        &[
            "data.calibration.samples=8",
            "stage.1.reconstruct.steps=2",
            "stage.2.reconstruct.steps=2",
            "stage.3.distill.steps=2",
        ],
    ),
    // Quantized activations and low-rank scales.
    ("lrq_w8a8", &["data.calibration.samples=8", "stage.0.reconstruct.steps=2"]),
    // Scales on packed codes; an adapter.
    ("peqa_w4", &["stage.2.tune_scales.steps=2"]),
    // Low-rank factors on float weights.
    ("qlora_w4", &["stage.0.finetune.steps=2"]),
];

/// The hash of every export and adapter of a shortened run.
fn hashes(recipe: &str, set: &[&str], threads: &str) -> BTreeMap<String, String> {
    let place = Place::new();
    place.write("few.json", few_stories(12));
    let mut args = vec!["train", "--recipe", recipe, "--output", "run", "--device", "cpu"];
    for set in set.iter().chain(&["data.validation.path=few.json"]) {
        args.extend(["--set", set]);
    }
    let output = place.command(&args).env("RAYON_NUM_THREADS", threads).output().unwrap();
    let ended = Ended::from(&output);
    assert_eq!(ended.code, 0, "{recipe}: {}", ended.err);
    let mut hashes = BTreeMap::new();
    for folder in ["export", "adapters", "checkpoints"] {
        if !place.path("run").join(folder).exists() {
            continue;
        }
        for (name, bytes) in place.tree(&format!("run/{folder}")) {
            let hash = Sha256::digest(bytes)
                .iter()
                .fold(String::new(), |hex, byte| hex + &format!("{byte:02x}"));
            hashes.insert(format!("{folder}/{name}"), hash);
        }
    }
    assert!(hashes.keys().any(|name| name.starts_with("export/")), "{recipe}: no export");
    hashes
}

/// A line for each file that is not the same at every number of threads; and how many files there are.
fn differences(recipe: &str, set: &[&str]) -> (Vec<String>, usize) {
    let found = THREADS.map(|threads| hashes(recipe, set, threads));
    let [first, others @ ..] = &found;
    let mut lines = Vec::new();
    for (other, threads) in others.iter().zip(&THREADS[1..]) {
        assert!(other.keys().eq(first.keys()), "{recipe}: other files at {threads} threads");
        let differing = other.iter().filter(|(name, hash)| first[*name] != **hash);
        lines.extend(differing.map(|(name, _)| format!("{recipe} at {threads} threads: {name}\n")));
    }
    (lines, first.len())
}

#[test]
fn each_kind_of_work_gives_the_same_bytes_at_every_number_of_threads() {
    let mut faults = String::new();
    for (recipe, shorter) in KINDS {
        let stored = STORED.iter().find(|stored| stored.recipe == recipe).unwrap();
        faults.extend(differences(recipe, &[stored.set, shorter].concat()).0);
    }
    assert!(faults.is_empty(), "{faults}");
}

/// Every recipe; for a person, with `--ignored --nocapture`.
#[test]
#[ignore = "takes minutes"]
#[allow(clippy::print_stdout)] // the table is what it is run for
fn every_recipe_gives_the_same_bytes_at_every_number_of_threads() {
    let mut faults = String::new();
    for stored in STORED {
        let start = std::time::Instant::now();
        let (lines, files) = differences(stored.recipe, stored.set);
        let verdict = if lines.is_empty() { "the same" } else { "NOT THE SAME" };
        let seconds = start.elapsed().as_secs();
        println!("{:<26}{files:>4} files  {verdict}  {seconds} s", stored.recipe);
        faults.extend(lines);
    }
    assert!(faults.is_empty(), "{faults}");
}
