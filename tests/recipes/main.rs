//! The recipes that ship: they parse, they are the built-in ones, and each trains to known numbers.
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too

#[path = "../common/mod.rs"]
mod common;
mod threads;

use std::collections::BTreeMap;
use std::path::Path;

use common::{Place, events, few_stories};
use fewbit::recipe::{Recipe, builtins, find, parse, to_toml};
use serde_json::Value;

/// Relative to a stored number: what another CPU's summation order may change.
const TOLERANCE: f64 = 1e-3;

/// A recipe, what makes it short, and the numbers it then gives. A change of them is a line in the
/// CHANGELOG.
struct Stored {
    recipe: &'static str,
    set: &'static [&'static str],
    numbers: &'static [(&'static str, f64)],
}

const STORED: &[Stored] = &[
    Stored {
        recipe: "upq_int2_chat",
        set: &[
            "stage.3.distill.allow_worse=true",
            "stage.5.export.allow_worse=true",
            "data.calibration.samples=16",
            "data.calibration.length=128",
            "data.train.length=128",
            "stage.0.reconstruct.steps=4",
            "stage.1.reconstruct.steps=4",
            "stage.3.distill.steps=2",
            "stage.3.distill.log_every=1",
        ],
        numbers: &[
            ("block 0 loss", 0.016_231),
            ("block 1 loss", 0.027_524),
            ("block 0 loss", 0.207_700),
            ("block 1 loss", 0.258_723),
            ("float", 33.8058),
            ("rtn w2", 832.8368),
            ("after reconstruct", 98.9119),
            ("first loss", 1.0408),
            ("rtn w2", 832.8368),
            ("after distill", 81.5059),
        ],
    },
    Stored {
        recipe: "upq_int2_g64",
        set: &[
            "stage.3.distill.allow_worse=true",
            "stage.5.export.allow_worse=true",
            "data.calibration.samples=16",
            "data.calibration.length=128",
            "data.train.length=128",
            "stage.0.reconstruct.steps=4",
            "stage.1.reconstruct.steps=4",
            "stage.3.distill.steps=2",
            "stage.3.distill.log_every=1",
        ],
        numbers: &[
            ("block 0 loss", 0.012_389),
            ("block 1 loss", 0.021_842),
            ("block 0 loss", 0.337_279),
            ("block 1 loss", 0.498_776),
            ("float", 33.8058),
            ("rtn w2", 409.0905),
            ("after reconstruct", 167.9130),
            ("first loss", 1.7174),
            ("rtn w2", 409.0905),
            ("after distill", 141.1551),
        ],
    },
    Stored {
        recipe: "int2_blocks_then_scales",
        set: &[
            "stage.0.reconstruct.allow_worse=true",
            "stage.2.tune_scales.allow_worse=true",
            "stage.4.export.allow_worse=true",
            "data.calibration.samples=16",
            "data.calibration.length=128",
            "data.train.length=128",
            "stage.0.reconstruct.steps=4",
            "stage.2.tune_scales.steps=2",
            "stage.2.tune_scales.log_every=1",
        ],
        numbers: &[
            ("block 0 loss", 0.3288),
            ("block 1 loss", 0.5479),
            ("float", 33.8058),
            ("rtn w2", 409.0905),
            ("after reconstruct", 159.6932),
            ("first loss", 1.6854),
            ("rtn w2", 409.0905),
            ("after tune_scales", 158.0086),
        ],
    },
    Stored {
        recipe: "int4_chat",
        set: &[
            "stage.0.reconstruct.allow_worse=true",
            "stage.2.export.allow_worse=true",
            "data.calibration.samples=16",
            "data.calibration.length=128",
            "stage.0.reconstruct.steps=4",
        ],
        numbers: &[
            ("block 0 loss", 0.015_245),
            ("block 1 loss", 0.026_865),
            ("float", 33.8058),
            ("rtn w4", 37.4646),
            ("after reconstruct", 36.2703),
        ],
    },
    Stored {
        recipe: "attn4_mlp2",
        set: &[
            "stage.0.reconstruct.allow_worse=true",
            "stage.2.distill.allow_worse=true",
            "stage.4.export.allow_worse=true",
            "data.calibration.samples=16",
            "data.calibration.length=128",
            "data.train.length=128",
            "stage.0.reconstruct.steps=4",
            "stage.2.distill.steps=2",
            "stage.2.distill.log_every=1",
        ],
        numbers: &[
            ("block 0 loss", 0.1557),
            ("block 1 loss", 0.2502),
            ("float", 33.8058),
            ("rtn w2+w4", 77.4028),
            ("after reconstruct", 61.5630),
            ("first loss", 0.7247),
            ("rtn w2+w4", 77.4028),
            ("after distill", 56.5736),
        ],
    },
    Stored {
        recipe: "int2_small",
        set: &[
            "stage.1.distill.allow_worse=true",
            "stage.3.export.allow_worse=true",
            "data.calibration.samples=16",
            "stage.0.reconstruct.steps=4",
            "stage.1.distill.steps=2",
            "stage.1.distill.schedule.cosine.warmup=0",
            "stage.1.distill.log_every=1",
        ],
        numbers: &[
            ("block 0 loss", 0.195_099),
            ("block 1 loss", 0.238_488),
            ("first loss", 0.942_197),
            ("float", 33.8058),
            ("rtn w2", 832.8368),
            ("after distill", 79.4318),
        ],
    },
    Stored {
        recipe: "int2_small_g64",
        set: &[
            "stage.reconstruct.allow_worse=true",
            "stage.tune_scales.allow_worse=true",
            "stage.distill.allow_worse=true",
            "stage.export.allow_worse=true",
            "data.calibration.samples=16",
            "stage.reconstruct.steps=4",
            "stage.tune_scales.steps=2",
            "stage.tune_scales.log_every=1",
            "stage.distill.steps=2",
            "stage.distill.log_every=1",
        ],
        numbers: &[
            ("block 0 loss", 0.286_202),
            ("block 1 loss", 0.463_886),
            ("first loss", 1.5384),
            ("first loss", 1.7119),
            ("float", 33.8058),
            ("rtn w2", 409.0905),
            ("after distill", 135.3655),
        ],
    },
    Stored {
        recipe: "upq_paper",
        set: &[
            "stage.3.distill.allow_worse=true",
            "stage.5.export.allow_worse=true",
            "data.calibration.samples=16",
            "stage.1.reconstruct.steps=4",
            "stage.3.distill.steps=4",
            "stage.3.distill.log_every=1",
        ],
        numbers: &[
            ("float", 34.6141),
            ("block 0 loss", 3.2101),
            ("block 1 loss", 18.8967),
            ("rtn w4", 37.1045),
            ("after reconstruct", 35.4321),
            ("first loss", 0.3638),
            ("rtn w2", 859.0844),
            ("after distill", 282.4165),
        ],
    },
    Stored {
        recipe: "rtn_w4g128",
        set: &[],
        numbers: &[("float", 34.6142), ("after calibrate", 37.4020)],
    },
    Stored {
        recipe: "flexround_w4",
        set: &["data.calibration.samples=16", "stage.0.reconstruct.steps=4"],
        numbers: &[
            ("block 0 loss", 3.1480),
            ("block 1 loss", 18.1369),
            ("float", 34.6141),
            ("rtn w4", 37.1045),
            ("after reconstruct", 35.6422),
        ],
    },
    Stored {
        recipe: "upq_int2",
        set: &[
            "data.calibration.samples=16",
            "stage.1.reconstruct.steps=4",
            "stage.2.reconstruct.steps=4",
            "stage.3.distill.steps=4",
            "stage.3.distill.log_every=1",
        ],
        numbers: &[
            ("float", 34.6141),
            ("block 0 loss", 3.1608),
            ("block 1 loss", 18.4363),
            ("block 0 loss", 0.2002),
            ("block 1 loss", 0.2275),
            ("first loss", 0.9887),
            ("rtn w2", 859.0844),
            ("after distill", 73.4572),
        ],
    },
    Stored {
        recipe: "adadim_w3g128",
        set: &["data.calibration.samples=16"],
        numbers: &[("float", 34.6142), ("rtn w3", 54.4118), ("after calibrate", 51.7250)],
    },
    Stored {
        recipe: "anybcq_w234",
        set: &[
            "stage.1.tune_scales.steps=2",
            "stage.1.tune_scales.log_every=1",
            "stage.2.tune_scales.steps=2",
            "stage.2.tune_scales.log_every=1",
            "stage.3.tune_scales.steps=2",
            "stage.3.tune_scales.log_every=1",
            "stage.3.tune_scales.allow_worse=true",
            "stage.7.export.allow_worse=true",
        ],
        numbers: &[
            ("first loss", 1.2514),
            ("first loss", 0.331_734),
            ("first loss", 0.123_399),
            ("float", 34.6141),
            ("rtn w2", 769.2065),
            ("w2 after tune_scales", 77.3738),
            ("rtn w3", 54.4118),
            ("w3 after tune_scales", 43.8170),
            ("rtn w4", 37.4020),
            ("after tune_scales", 38.4284),
        ],
    },
    Stored {
        recipe: "aqlm_w2",
        set: &[
            "data.calibration.samples=16",
            "stage.2.tune_scales.steps=2",
            "stage.2.tune_scales.log_every=1",
        ],
        numbers: &[
            ("float", 34.6142),
            ("rtn w2", 435.5499),
            ("after calibrate", 63.5779),
            ("first loss", 0.705_992),
            ("after tune_scales", 59.7770),
        ],
    },
    Stored {
        recipe: "awq_w4g128",
        set: &["data.calibration.samples=16"],
        numbers: &[("float", 34.6142), ("rtn w4", 37.4020), ("after calibrate", 35.8701)],
    },
    Stored {
        recipe: "bcq_w3",
        set: &[],
        numbers: &[("float", 34.6142), ("rtn w3", 55.0256), ("after calibrate", 44.5690)],
    },
    Stored {
        recipe: "bitdistiller_w2g64",
        set: &["stage.0.distill.steps=4", "stage.0.distill.log_every=1"],
        numbers: &[
            ("first loss", 1.8611),
            ("float", 34.6142),
            ("rtn w2", 143.0048),
            ("after distill", 98.8191),
        ],
    },
    Stored {
        recipe: "efficientqat_w2g64",
        set: &[
            "data.calibration.samples=16",
            "stage.0.reconstruct.steps=4",
            "stage.2.distill.steps=4",
            "stage.2.distill.log_every=1",
        ],
        numbers: &[
            ("block 0 loss", 62.9136),
            ("block 1 loss", 466.5151),
            ("float", 34.6142),
            ("rtn w2", 435.5499),
            ("after reconstruct", 323.7321),
            ("first loss", 5.8322),
            ("rtn w2", 435.5499),
            ("after distill", 256.1866),
        ],
    },
    Stored {
        recipe: "alphatuning_w3",
        set: &[
            "stage.2.tune_scales.steps=4",
            "stage.2.tune_scales.log_every=1",
            "stage.2.tune_scales.validate.keep_best=false",
            "stage.2.tune_scales.allow_worse=true",
            "stage.4.export.allow_worse=true",
        ],
        numbers: &[
            ("float", 34.6141),
            ("after calibrate", 44.5689),
            ("first loss", 6.4104),
            ("after tune_scales", 82.8404),
        ],
    },
    Stored {
        recipe: "e2e_qp_w2",
        set: &[
            "data.calibration.samples=16",
            "stage.0.reconstruct.steps=4",
            "stage.2.tune_scales.steps=4",
            "stage.2.tune_scales.log_every=1",
        ],
        numbers: &[
            ("block 0 loss", 62.9136),
            ("block 1 loss", 466.5151),
            ("float", 34.6141),
            ("after reconstruct", 323.7320),
            ("first loss", 8.2307),
            ("after tune_scales", 248.4410),
        ],
    },
    Stored {
        recipe: "peqa_w3g128",
        set: &[
            "data.calibration.samples=16",
            "stage.2.tune_scales.steps=4",
            "stage.2.tune_scales.log_every=1",
            "stage.2.tune_scales.validate.keep_best=false",
            "stage.2.tune_scales.allow_worse=true",
            "stage.4.export.allow_worse=true",
        ],
        numbers: &[
            ("float", 34.6141),
            ("after calibrate", 45.0983),
            ("first loss", 6.5194),
            ("after tune_scales", 71.2169),
        ],
    },
    Stored {
        recipe: "peqa_w4",
        set: &[
            "stage.2.tune_scales.steps=4",
            "stage.2.tune_scales.log_every=1",
            "stage.2.tune_scales.validate.keep_best=false",
            "stage.2.tune_scales.allow_worse=true",
            "stage.4.export.allow_worse=true",
        ],
        numbers: &[
            ("float", 34.6141),
            ("after calibrate", 37.1045),
            ("first loss", 6.3087),
            ("after tune_scales", 64.7877),
        ],
    },
    Stored {
        recipe: "qlora_w4",
        set: &[
            "stage.0.finetune.steps=4",
            "stage.0.finetune.log_every=1",
            "stage.0.finetune.validate.keep_best=false",
            "stage.0.finetune.allow_worse=true",
        ],
        numbers: &[
            ("first loss", 6.2001),
            ("float", 34.6141),
            ("after finetune", 46.0142),
            ("after calibrate", 43.0955),
        ],
    },
    Stored {
        recipe: "gptq_w4g128",
        set: &["data.calibration.samples=16"],
        numbers: &[("float", 34.6142), ("rtn w4", 37.4020), ("after calibrate", 35.7538)],
    },
    Stored {
        recipe: "lrq_w4",
        set: &["data.calibration.samples=16", "stage.0.reconstruct.steps=4"],
        numbers: &[
            ("block 0 loss", 3.1480),
            ("block 1 loss", 19.1110),
            ("float", 34.6141),
            ("rtn w4", 37.1045),
            ("after reconstruct", 35.8754),
        ],
    },
    Stored {
        recipe: "lrq_w8a8",
        set: &["data.calibration.samples=16", "stage.0.reconstruct.steps=4"],
        numbers: &[
            ("block 0 loss", 0.4667),
            ("block 1 loss", 1.6966),
            ("float", 34.6141),
            ("rtn w8a8kv8", 35.0857),
            ("after reconstruct", 34.9289),
        ],
    },
    Stored {
        recipe: "lsq_w4",
        set: &["stage.0.distill.steps=4", "stage.0.distill.log_every=1"],
        numbers: &[
            ("first loss", 0.1438),
            ("float", 34.6142),
            ("rtn w4", 37.1045),
            ("after distill", 36.6931),
        ],
    },
    Stored {
        recipe: "omniquant_w3",
        set: &["data.calibration.samples=16", "stage.0.reconstruct.steps=4"],
        numbers: &[
            ("block 0 loss", 14.2366),
            ("block 1 loss", 88.8868),
            ("float", 34.6142),
            ("rtn w3", 55.0256),
            ("after reconstruct", 50.8883),
        ],
    },
    Stored {
        recipe: "paretoq_w2",
        set: &["stage.0.distill.steps=4", "stage.0.distill.log_every=1"],
        numbers: &[
            ("first loss", 5.6193),
            ("float", 34.6142),
            ("rtn w2", 859.0843),
            ("after distill", 110.2324),
        ],
    },
    Stored {
        recipe: "sign_w1",
        set: &["stage.0.distill.steps=4", "stage.0.distill.log_every=1"],
        numbers: &[
            ("first loss", 0.5396),
            ("float", 34.6142),
            ("rtn w1", 604_165.2),
            ("after distill", 693.0183),
        ],
    },
    Stored {
        recipe: "signround_w4",
        set: &["data.calibration.samples=16", "stage.0.reconstruct.steps=4"],
        numbers: &[
            ("block 0 loss", 2.9251),
            ("block 1 loss", 18.5127),
            ("float", 34.6142),
            ("rtn w4", 37.4020),
            ("after reconstruct", 36.9765),
        ],
    },
    Stored {
        recipe: "ternary_w2",
        set: &["stage.0.distill.steps=4", "stage.0.distill.log_every=1"],
        numbers: &[
            ("first loss", 0.4106),
            ("float", 34.6141),
            ("rtn w2", 859.0844),
            ("after distill", 201.1528),
        ],
    },
    Stored {
        recipe: "uniquanf_w3",
        set: &["data.calibration.samples=16", "stage.0.reconstruct.steps=4"],
        numbers: &[
            ("block 0 loss", 10.8973),
            ("block 1 loss", 44.9585),
            ("float", 34.6141),
            ("rtn w3", 55.0256),
            ("after reconstruct", 41.0968),
        ],
    },
];

fn files() -> BTreeMap<String, String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes");
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        files.insert(name, std::fs::read_to_string(&path).unwrap());
    }
    files
}

#[test]
fn the_files_are_the_built_in_recipes() {
    let built_in: BTreeMap<String, String> =
        builtins().iter().map(|recipe| (recipe.name.to_owned(), recipe.text.to_owned())).collect();
    assert!(!built_in.is_empty());
    assert_eq!(files(), built_in);
    for (name, text) in files() {
        assert_eq!(find(&name).unwrap().0, text);
    }
}

#[test]
fn each_parses_and_survives_being_written() {
    for (name, text) in files() {
        let (recipe, _): (Recipe, _) = parse(&text, &name, &[]).unwrap();
        assert_eq!(recipe.output, Path::new("runs").join(&name));
        let (again, _): (Recipe, _) = parse(&to_toml(&recipe).unwrap(), &name, &[]).unwrap();
        assert_eq!(recipe, again, "{name}");
    }
}

#[test]
fn each_opens_with_what_it_does_what_it_needs_and_its_command() {
    for (name, text) in files() {
        let head: Vec<&str> = text.lines().take_while(|line| line.starts_with('#')).collect();
        let head = head.join("\n");
        let command = format!("fewbit train --recipe {name}.toml");
        for words in ["# What it does ", "# What it needs ", "# Run ", "# A real model ", &command]
        {
            assert!(head.contains(words), "{name}.toml does not say {words:?}");
        }
        assert!(
            head.contains("--set model.path="),
            "{name}.toml does not say how to set the model"
        );
    }
}

/// The dotted keys that head comments set exist.
#[test]
fn the_keys_that_head_comments_set_exist() {
    for (name, text) in files() {
        let head = text.lines().take_while(|line| line.starts_with('#'));
        let words = head.flat_map(|line| line.trim_matches(['#', '\\', ' ']).split_whitespace());
        let words: Vec<&str> = words.collect();
        let sets: Vec<String> = words
            .windows(2)
            .filter(|pair| pair[0] == "--set" && pair[1].contains('='))
            .map(|pair| pair[1].trim_end_matches([',', '.', ';']).to_owned())
            .collect();
        assert!(!sets.is_empty(), "{name}");
        let result = parse::<Recipe>(&text, &name, &sets);
        assert!(result.is_ok(), "{name}: {}", result.unwrap_err());
    }
}

#[test]
fn each_resolves_to_a_plan() {
    let place = Place::new();
    for name in files().keys() {
        let check = place.json(&["check", "--recipe", name, "--json"]);
        assert_eq!(check["ok"], true, "{name}");
        let plan = check["plan"].as_str().unwrap();
        assert!(plan.starts_with("dense → ") && plan.contains("export("), "{name}: {plan}");
    }
}

#[test]
fn each_trains_to_the_stored_numbers() {
    for name in files().keys() {
        assert!(
            STORED.iter().any(|stored| stored.recipe == name),
            "recipes/{name}.toml has no stored numbers: add a row to tests/recipes/main.rs"
        );
    }
    let mut faults = String::new();
    for stored in STORED {
        let found = train(stored);
        let equal = found.len() == stored.numbers.len()
            && found.iter().zip(stored.numbers).all(|((name, value), (stored_name, expected))| {
                name == stored_name && (value / expected - 1.0).abs() <= TOLERANCE
            });
        if !equal {
            // As many digits as the tolerance sees.
            let lines = found.iter().map(|(name, value)| {
                let digits = if *value < 1.0 { 6 } else { 4 };
                format!("    ({name:?}, {value:.digits$}),\n")
            });
            faults.extend([stored.recipe, " gives\n", &lines.collect::<String>()]);
        }
    }
    assert!(faults.is_empty(), "{faults}");
}

#[test]
fn bf16_activations_stay_near_f32() {
    let f32 = STORED.iter().find(|stored| stored.recipe == "upq_int2").unwrap();
    let set: Vec<&str> = [f32.set, &["model.compute=bf16"]].concat();
    let found = train(&Stored { recipe: f32.recipe, set: set.leak(), numbers: &[] });
    assert_eq!(found.len(), f32.numbers.len());
    for ((name, value), (_, expected)) in found.iter().zip(f32.numbers) {
        assert!(
            (value / expected - 1.0).abs() < 0.03,
            "{name}: {value} in bf16, {expected} in f32"
        );
    }
}

/// The first loss of every block and stage, and every perplexity, in order.
fn train(stored: &Stored) -> Vec<(String, f64)> {
    let place = Place::new();
    place.write("few.json", few_stories(12));
    let mut args = vec!["train", "--recipe", stored.recipe, "--output", "run", "--device", "cpu"];
    for set in stored.set.iter().chain(&["data.validation.path=few.json"]) {
        args.extend(["--set", set]);
    }
    place.ok(&args);
    let events = events(&place.path("run/metrics.jsonl"));
    events.iter().filter_map(number).collect()
}

fn number(event: &Value) -> Option<(String, f64)> {
    let (name, value) = match event["event"].as_str()? {
        "block_loss" if event["step"] == 0 => {
            (format!("block {} loss", event["block"]), &event["loss"])
        }
        "step" if event["step"] == 1 => ("first loss".to_owned(), &event["values"]["train/loss"]),
        "evaluation" => (event["what"].as_str()?.to_owned(), &event["perplexity"]),
        _ => return None,
    };
    Some((name, value.as_f64()?))
}
