//! Every format of other runtimes, on every kind of grid: written, read back, verified, or refused
//! with a reason. (`tests/oracles/` has the runtimes themselves.)
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too

mod common;

use common::{Ended, Place, few_stories};
use fewbit::store::safetensors::Checkpoint;
use fewbit::store::{DType, TensorSource};
use serde_json::Value;

const FORMATS: [&str; 7] = ["mlx", "gptq", "autoround", "awq", "compressed_tensors", "bcq", "gguf"];

/// A grid: what makes it, and the formats that hold it exactly when scales are f16 numbers.
struct Grid {
    name: &'static str,
    quant: &'static str,
    stages: &'static str,
    holds: &'static [&'static str],
}

const RTN: &str = "[[stage]]\n[stage.calibrate]\nmethod.rtn = {}\n";
const SEQ: &str = "[[stage]]\n[stage.distill]\nmethod.seq = {}\nobjective.jsd = {}\nsteps = 1\n\
                   batch = 2\nlearning_rate = 1e-3\n";

const GRIDS: [Grid; 5] = [
    Grid {
        name: "4 bits, symmetric, groups of 32",
        quant: "bits = 4\ngroup_size = 32\nsymmetric = true",
        stages: RTN,
        holds: &FORMATS,
    },
    Grid {
        name: "4 bits, asymmetric, groups of 64",
        quant: "bits = 4\ngroup_size = 64",
        stages: RTN,
        holds: &FORMATS,
    },
    Grid {
        name: "3 bits, asymmetric, per channel",
        quant: "bits = 3",
        stages: RTN,
        holds: &FORMATS,
    },
    Grid {
        name: "2 bits, zero between two codes",
        quant: "bits = 2",
        stages: SEQ,
        holds: &FORMATS,
    },
    Grid {
        name: "3 sign planes",
        quant: "bits = 3",
        stages: "[[stage]]\n[stage.calibrate]\nmethod.bcq = {}\n",
        holds: &["bcq"],
    },
];

fn run(grid: &Grid, scales: &str) -> Place {
    let place = Place::new();
    place.write("few.json", few_stories(3));
    place.write("text.json", few_stories(8));
    place.write("recipe.toml", recipe(grid, scales));
    place.ok(&["train", "--recipe", "recipe.toml"]);
    place
}

fn recipe(grid: &Grid, scales: &str) -> String {
    format!(
        "output = \"run\"\ndevice = \"cpu\"\nmodel.path = \"embedded:tinystories-656k\"\n\
         [data]\nvalidation.path = \"few.json\"\ntrain = {{ path = \"text.json\", length = 64 }}\n\
         [quant]\nscales = \"{scales}\"\n{}\n{}[[stage]]\n[stage.export]\nformat.fewbit = {{}}\n",
        grid.quant, grid.stages
    )
}

#[test]
fn every_format_holds_a_grid_bit_for_bit_or_says_why_not() {
    for grid in GRIDS {
        let place = run(&grid, "f16");
        let eval = |model: &str| {
            let args =
                ["eval", "--model", model, "--data", "few.json", "--context", "64", "--json"];
            place.json(&args)["perplexity"].as_f64().unwrap()
        };
        let trained = eval("run");
        for format in FORMATS {
            let what = format!("{}, {format}", grid.name);
            let mut args = vec!["export", "--run", "run", "--format", format, "--output", format];
            if grid.holds.contains(&format) {
                args.extend(["--data", "few.json"]);
                place.ok(&args);
                place.ok(&["verify", format]);
                let found = eval(format);
                assert!((found / trained - 1.0).abs() < 1e-6, "{what}: {found}, {trained}");
            } else {
                let text = place.refused(&args);
                assert!(text.starts_with("exit 3"), "{what}: {text}");
                assert!(!place.path(format).exists(), "{what}");
            }
        }
    }
}

#[test]
fn scales_of_32_bits_are_refused_where_they_would_be_rounded() {
    let place = run(&GRIDS[0], "f32");
    for format in ["gptq", "awq", "gguf"] {
        let args = ["export", "--run", "run", "--format", format, "--output", format];
        let text = place.refused(&args);
        assert!(text.contains("f16"), "{text}");
    }
    // This one stores them as they are.
    let format = "compressed_tensors";
    place.ok(&["export", "--run", "run", "--format", format, "--output", format]);
}

#[test]
fn a_check_foresees_what_an_export_would_refuse() {
    let place = Place::new();
    place.write("few.json", few_stories(3));
    place.write("text.json", few_stories(8));
    let check = |grid: &Grid, format: &str, scales: &str| {
        let recipe = recipe(grid, scales).replace("format.fewbit", &format!("format.{format}"));
        place.write("recipe.toml", recipe);
        place.run(&["check", "--recipe", "recipe.toml"])
    };
    for grid in &GRIDS {
        for format in FORMATS {
            let Ended { code, err, .. } = check(grid, format, "f16");
            let expected = if grid.holds.contains(&format) { 0 } else { 3 };
            assert_eq!(code, expected, "{}, {format}: {err}", grid.name);
        }
    }
    // Scales of 32 bits, which training leaves unless it is told: what the advice says does.
    for format in ["gptq", "autoround", "awq", "gguf"] {
        for grid in &GRIDS[..4] {
            let Ended { code, err, .. } = check(grid, format, "f32");
            assert_eq!(code, 3, "{}, {format}", grid.name);
            assert!(err.contains("quant.scales = \"f16\""), "{}, {format}: {err}", grid.name);
            let loss = format!("format.{format}.lossy = true");
            assert!(err.contains(&loss), "{}, {format}: {err}", grid.name);
            let set = format!("stage.1.export.{loss}");
            let lossy = place.run(&["check", "--recipe", "recipe.toml", "--set", &set]);
            assert_eq!(lossy.code, 0, "{}, {format}: {}", grid.name, lossy.err);
        }
    }
    assert_eq!(check(&GRIDS[0], "compressed_tensors", "f32").code, 0);
    // A run asks too, before it trains.
    check(&GRIDS[3], "gptq", "f32");
    let text = place.refused(&["train", "--recipe", "recipe.toml"]);
    assert!(text.starts_with("exit 3\nerror: format.gptq holds scales of fewer digits"), "{text}");
}

#[test]
fn scales_of_seven_bits_fit_gguf_in_five_bits_a_weight() {
    // Groups of 64 with any zero point: Q8_0 otherwise.
    let place = run(&GRIDS[1], "bits7");
    let told = place.ok(&["export", "--run", "run", "--format", "gguf", "--output", "out"]);
    assert!(told.contains("5.00 bits/weight"), "{told}");
    assert!(place.ok(&["inspect", "out"]).contains("Q4_1"));
    place.ok(&["verify", "out"]);
}

#[test]
fn a_damaged_file_is_found() {
    let place = run(&GRIDS[0], "f16");
    place.ok(&["export", "--run", "run", "--format", "gguf", "--output", "out"]);
    let file = place.path("out/model.gguf");
    // Alone it has no manifest to be compared with.
    let alone = place.run(&["verify", "out/model.gguf"]);
    assert_eq!(alone.code, 2, "{}", alone.err);
    let whole = std::fs::read(&file).unwrap();
    let mut damaged = whole.clone();
    *damaged.last_mut().unwrap() ^= 1;
    for bytes in [damaged, whole[..whole.len() / 2].to_vec()] {
        std::fs::write(&file, bytes).unwrap();
        let ended = place.run(&["verify", "out"]);
        assert_eq!(ended.code, 5, "{}", ended.err);
    }
}

#[test]
fn a_loss_is_allowed_only_by_name_and_told() {
    let place = run(&GRIDS[4], "f32");
    let plain = ["export", "--run", "run", "--format", "gptq", "--output", "gptq"];
    assert!(place.refused(&plain).contains("binary-coded"));
    let lossy = [&plain[..], &["--set", "lossy=true", "--data", "few.json"]].concat();
    let told = place.ok(&lossy);
    assert!(told.contains("tensors changed: 14"), "{told}");
    assert!(told.contains("model.layers.0.mlp.up_proj") && told.contains(" became "), "{told}");
    let verified = place.ok(&["verify", "gptq", "--data", "few.json"]);
    assert!(verified.contains("measured again and equal"), "{verified}");
    let manifest: Value = serde_json::from_str(&place.read("gptq/manifest.json")).unwrap();
    assert_eq!(manifest["lossy"], true);
    for (name, linear) in manifest["linears"].as_object().unwrap() {
        let relative = linear["loss"]["relative"].as_f64().unwrap();
        assert!(relative > 0.0 && relative < 0.3, "{name}: {relative}");
    }
    assert!(place.read("gptq/README.md").contains("weights were changed by up to"));
    // The same codes with shorter scales: almost nothing.
    let place = run(&GRIDS[1], "f32");
    for format in ["mlx", "awq", "gguf", "bcq"] {
        let told = place.ok(&[
            "export",
            "--run",
            "run",
            "--format",
            format,
            "--output",
            format,
            "--set",
            "lossy=true",
        ]);
        assert!(told.contains("tensors changed: 14"), "{format}: {told}");
        place.ok(&["verify", format]);
        let manifest = place.read(&format!("{format}/manifest.json"));
        let manifest: Value = serde_json::from_str(&manifest).unwrap();
        let linears = manifest["linears"].as_object().unwrap();
        let relative = |l: &Value| l["loss"]["relative"].as_f64().unwrap();
        assert!(linears.values().all(|linear| relative(linear) < 1e-3), "{format}");
    }
}

/// Embedding and head as short floats or codes in every format that has them, and refused where not.
#[test]
fn embeddings_are_stored_as_asked() {
    let place = run(&GRIDS[0], "f16");
    let export = |format: &str, output: &str, as_what: &str| {
        let set = format!("embeddings={as_what}");
        let model = ["export", "--run", "run", "--format", format, "--output", output];
        place.run(&[&model[..], &["--set", &set]].concat())
    };
    let size = |name: &str| place.path(name).metadata().unwrap().len();
    let prompt = ["--prompt", "One day", "--max-new-tokens", "12", "--temperature", "0"];
    let speaks = |model: &str| place.ok(&[&["generate", "--model", model][..], &prompt].concat());
    let mut sizes = Vec::new();
    // The source's numbers are bf16's, as which the file holds them whatever is asked.
    for kind in ["bf16", "8", "4"] {
        let output = format!("gguf-{kind}");
        let ended = export("gguf", &output, kind);
        assert_eq!(ended.code, 0, "{}", ended.err);
        place.ok(&["verify", &output]);
        assert!(speaks(&output).len() > 10);
        sizes.push(size(&format!("{output}/model.gguf")));
    }
    assert!(sizes.is_sorted_by(|a, b| a > b), "{sizes:?}");
    // 2048 x 128 weights of 16 bits against 8.5.
    assert_eq!(sizes[0] - sizes[1], 2048 * 128 * 2 - 2048 * 128 / 32 * 34);
    for format in ["gptq", "autoround", "awq", "compressed_tensors", "bcq", "mlx"] {
        let ended = export(format, format, "f16");
        assert_eq!(ended.code, 0, "{format}: {}", ended.err);
        let stored = Checkpoint::open(&place.path(format)).unwrap();
        let embedding = stored.info("model.embed_tokens.weight").unwrap();
        assert_eq!(embedding.dtype, DType::F16, "{format}");
        place.ok(&["verify", format]);
        assert!(speaks(format).len() > 10);
    }
    for (format, bits, advice) in
        [("gguf", "6", "4, 8"), ("gguf", "3", "4, 8"), ("gptq", "8", "\"f16\"")]
    {
        let told = export(format, "never", bits);
        assert_eq!(told.code, 3, "{}", told.err);
        let says =
            told.err.contains(&format!("no {bits}-bit embedding")) && told.err.contains(advice);
        assert!(says, "{}", told.err);
    }
    let told = export("gguf", "never", "f64");
    assert!(told.code == 2 && told.err.contains("\"bf16\""), "{}", told.err);
}

/// From any format into any other that holds the grid: codes, groups and weights are what they were.
#[test]
fn formats_turn_into_each_other() {
    for grid in [&GRIDS[0], &GRIDS[3], &GRIDS[4]] {
        let place = run(grid, "f16");
        let linears = |folder: &str| {
            let manifest = place.read(&format!("{folder}/manifest.json"));
            let manifest: Value = serde_json::from_str(&manifest).unwrap();
            let linears = manifest["linears"].as_object().unwrap();
            let part = |l: &Value| ["bits", "shape", "group_len"].map(|key| l[key].clone());
            linears.iter().map(|(name, l)| (name.clone(), part(l))).collect::<Vec<_>>()
        };
        let trained = linears("run/export/fewbit");
        for from in grid.holds {
            place.ok(&["export", "--run", "run", "--format", from, "--output", from]);
            let to = format!("{from}-back");
            place.ok(&["export", "--model", from, "--format", "fewbit", "--output", &to]);
            place.ok(&["verify", &to]);
            let back = linears(&to);
            assert_eq!(trained.len(), back.len(), "{}, {from}", grid.name);
            for ((name, a), (_, b)) in trained.iter().zip(&back) {
                // Wider codes may hold the same levels; groups are the longest that share a grid.
                assert!(a[0].as_u64() <= b[0].as_u64() && a[1] == b[1], "{from}: {name}");
            }
        }
        let [first, .., last] = grid.holds else { continue };
        place.ok(&["export", "--model", last, "--format", first, "--output", "across"]);
        place.ok(&["verify", "across"]);
    }
    // A model that nobody quantized: floats as floats, and no codes.
    let place = Place::new();
    place.copy_model("tinystories-656k", "float");
    place.ok(&["export", "--model", "float", "--format", "gguf", "--output", "file"]);
    place.ok(&["export", "--model", "file", "--format", "dequantized", "--output", "folder"]);
    let told =
        place.refused_briefly(&["export", "--model", "file", "--format", "mlx", "--output", "o"]);
    assert!(told.contains("nothing of this model is quantized"), "{told}");
    let told =
        place.refused_briefly(&["export", "--model", "fil", "--format", "mlx", "--output", "o"]);
    assert!(told.contains("fil"), "{told}");
}

/// `quant.target` chooses the digits of scales with which the format is smallest, and keeps the promise.
#[test]
fn a_target_is_met_at_its_natural_size() {
    let wanted = [
        // Asymmetric in groups of 64: Q4_1, where more digits would need Q8_0.
        (&GRIDS[1], "gguf", "bits7", 5.0),
        // Q4_0.
        (&GRIDS[0], "gguf", "f16", 4.5),
        // Scales in half precision, whatever is asked.
        (&GRIDS[0], "awq", "f16", 0.0),
        // Its own folder holds any scales, and those of 16 bits in 16.
        (&GRIDS[0], "fewbit", "f16", 4.5),
    ];
    for (grid, target, scales, bits) in wanted {
        let place = Place::new();
        place.write("text.json", few_stories(4));
        let recipe = format!(
            "output = \"run\"\ndevice = \"cpu\"\n[model]\npath = \"embedded:tinystories-656k\"\n\
             [data.train]\npath = \"text.json\"\nlength = 16\n[quant]\n{}\ntarget = \"{target}\"\n{}\
             [[stage]]\n[stage.export]\nformat.{target} = {{}}\n",
            grid.quant, grid.stages
        );
        place.write("recipe.toml", recipe);
        let checked = place.json(&["check", "--recipe", "recipe.toml", "--json"]);
        assert_eq!(checked["target"]["scales"], scales, "{} for {target}: {checked}", grid.name);
        place.ok(&["train", "--recipe", "recipe.toml"]);
        let manifest = place.read(&format!("run/export/{target}/manifest.json"));
        let manifest: Value = serde_json::from_str(&manifest).unwrap();
        let [promised, found] =
            [&checked["target"], &manifest].map(|of| of["bits_per_weight"].as_f64().unwrap());
        assert!((promised - found).abs() < 0.1, "{target}: {promised}, {found}");
        assert!(bits == 0.0 || (found - bits).abs() < 0.13, "{target}: {found}");
    }
    // Scales that the recipe names are kept, and what cannot be held is refused before anything runs.
    let place = Place::new();
    let recipe = "device = \"cpu\"\noutput = \"run\"\n[model]\npath = \"embedded:tinystories-656k\"\n\
                  [quant]\nbits = 4\ngroup_size = 32\ntarget = \"gguf\"\n\
                  [[stage]]\n[stage.calibrate]\nmethod.rtn = {}\n";
    place.write("recipe.toml", recipe);
    let set = ["check", "--recipe", "recipe.toml", "--json", "--set", "quant.scales=f16"];
    assert_eq!(place.json(&set)["target"]["scales"], "f16");
    let real =
        "[quant]\nbits = 3\ntarget = \"gptq\"\n[[stage]]\n[stage.calibrate]\nmethod.bcq = {}\n";
    let start = recipe.split("[quant]").next().unwrap();
    place.write("recipe.toml", format!("{start}{real}"));
    let told = place.refused(&["check", "--recipe", "recipe.toml"]);
    assert!(told.starts_with("exit 3") && told.contains("quant.target = \"gptq\""), "{told}");
    let typo = place.refused(&["check", "--recipe", "recipe.toml", "--set", "quant.target=gguff"]);
    assert!(typo.starts_with("exit 2") && typo.contains("gguf"), "{typo}");
}

/// The licence and the fields of the card that stay true.
#[test]
fn licences_travel_along() {
    let place = run(&GRIDS[0], "f16");
    place.copy_model("tinystories-656k", "model");
    place.write("model/LICENSE.txt", "MIT");
    place.write("model/README.md", "---\nlicense: mit\nlibrary_name: transformers\n---\n# Mine\n");
    place.write(
        "recipe.toml",
        "output = \"rounded\"\ndevice = \"cpu\"\n[model]\npath = \"model\"\n[quant]\nbits = 4\n\
         group_size = 32\nscales = \"f16\"\n[[stage]]\n[stage.calibrate]\nmethod.rtn = {}\n[[stage]]\n[stage.export]\nformat.fewbit = {}\n",
    );
    place.ok(&["train", "--recipe", "recipe.toml"]);
    for format in ["gguf", "fewbit"] {
        place.ok(&["export", "--run", "rounded", "--format", format, "--output", format]);
        assert_eq!(place.read(&format!("{format}/LICENSE.txt")), "MIT");
        let card = place.read(&format!("{format}/README.md"));
        assert!(card.starts_with("---\nlicense: mit\n---\n\n# model\n"), "{card}");
        place.ok(&["verify", format]);
    }
}

#[test]
fn formats_take_settings_of_their_own() {
    let place = run(&GRIDS[0], "f16");
    let export = |format: &str, output: &str, set: &[&str]| {
        let base = ["export", "--run", "run", "--format", format, "--output", output];
        let set = set.iter().flat_map(|set| ["--set".to_owned(), (*set).to_owned()]);
        let args: Vec<String> = base.map(str::to_owned).into_iter().chain(set).collect();
        place.run(&args.iter().map(String::as_str).collect::<Vec<_>>())
    };
    // The embedding is the larger part of this model.
    assert_eq!(export("mlx", "plain", &[]).code, 0);
    let embedded = export("mlx", "embedded", &["embeddings=4"]);
    assert_eq!(embedded.code, 0, "{}", embedded.err);
    assert!(embedded.out.contains("tensors changed: 1\n"), "{}", embedded.out);
    let size = |name: &str| place.path(name).join("model.safetensors").metadata().unwrap().len();
    assert!(size("embedded") < size("plain") * 6 / 10);
    place.ok(&["verify", "embedded"]);
    let said = place.ok(&[
        "generate",
        "--model",
        "embedded",
        "--prompt",
        "One day",
        "--max-new-tokens",
        "20",
    ]);
    assert!(said.len() > 20, "{said}");
    // Fewer planes out of the same file; the full precision is what is compared.
    let nested = export("bcq", "nested", &["precisions=[2, 3]"]);
    assert_eq!(nested.code, 0, "{}", nested.err);
    place.ok(&["verify", "nested"]);
    assert!(place.read("nested/config.json").contains("plane_major"));
    let refused = export("bcq", "never", &["precisions=[4]"]);
    assert_eq!(refused.code, 2, "{}", refused.err);
    // Narrower floats round, and are refused unless that is allowed.
    let refused = export("dequantized", "half", &["dtype=bf16"]);
    assert_eq!(refused.code, 3, "{}", refused.err);
    let rounded = export("dequantized", "half", &["dtype=bf16", "lossy=true"]);
    assert_eq!(rounded.code, 0, "{}", rounded.err);
    assert!(rounded.out.contains("16.00 bits/weight"), "{}", rounded.out);
    place.ok(&["verify", "half"]);
    assert!(place.read("half/config.json").contains("bfloat16"));
    for (set, word) in [("scale=f16", "scale"), ("scales=f17", "f17"), ("scales", "KEY=VALUE")] {
        let refused = export("mlx", "never", &[set]);
        assert_eq!(refused.code, 2, "{}", refused.err);
        assert!(refused.err.contains(word), "{}", refused.err);
    }
}

/// What is asked for wrongly is told, whatever may be lost; widths may be mixed; and what is rounded
/// of tensors that were never quantized is told too.
#[test]
fn losses_are_no_licence() {
    let place = run(&GRIDS[4], "f16");
    let base = ["export", "--run", "run", "--output", "out", "--format"];
    let args = [&base[..], &["bcq", "--set", "precisions=[3]", "--set", "lossy=true"]].concat();
    assert!(place.refused(&args).starts_with("exit 2"));
    // Groups along the outputs, which no other format has, and eight bits in AWQ's four.
    let recipe = place.read("recipe.toml");
    let mixed = recipe.replace("output = \"run\"", "output = \"mixed\"").replace(
        "[[stage]]\n[stage.calibrate]",
        "[[quant.override]]\nmatch = \"*.down_proj\"\nbits = 4\n[[stage]]\n[stage.calibrate]",
    );
    place.write("mixed.toml", mixed);
    place.ok(&["train", "--recipe", "mixed.toml"]);
    let args = ["export", "--run", "mixed", "--output", "mixed.bcq", "--format", "bcq"];
    place.ok(&[&args[..], &["--set", "precisions=[1, 2]"]].concat());
    place.ok(&["verify", "mixed.bcq"]);
    let eight = recipe
        .replace("output = \"run\"", "output = \"eight\"")
        .replace("bits = 3", "bits = 8")
        .replace("method.bcq = {}", "method.rtn = {}");
    place.write("eight.toml", eight);
    place.ok(&["train", "--recipe", "eight.toml"]);
    let args = ["export", "--run", "eight", "--output", "eight.awq", "--format", "awq"];
    assert!(place.refused(&args).starts_with("exit 3"));
    let told = place.ok(&[&args[..], &["--set", "lossy=true"]].concat());
    assert!(told.contains("tensors changed: 14"), "{told}");
    place.ok(&["verify", "eight.awq"]);
    // Allowed, and not needed: nothing is lossy.
    let args =
        [&base[..], &["dequantized", "--set", "lossy=false", "--set", "lossy=true"]].concat();
    let told = place.ok(&args);
    assert!(told.contains("equal") && !told.contains("lossy"), "{told}");
    let told = place.ok(&[&args[..], &["--set", "dtype=bf16"]].concat());
    assert!(told.contains("tensors changed: 14"), "{told}");
}

/// A file that may not grow further is what a full disk is to a program.
#[cfg(unix)]
#[test]
fn a_full_disk_leaves_the_old_folder() {
    let place = run(&GRIDS[0], "f16");
    for format in ["fewbit", "dequantized"].into_iter().chain(FORMATS) {
        let args = ["export", "--run", "run", "--format", format, "--output", "out"];
        place.ok(&args);
        let before = place.tree("out");
        let fewbit = place.command(&args);
        let mut limited = std::process::Command::new("sh");
        limited
            .args(["-c", "trap '' XFSZ; ulimit -f 128; exec \"$0\" \"$@\""])
            .arg(fewbit.get_program())
            .args(args)
            .current_dir(place.path(""))
            .envs(fewbit.get_envs().filter_map(|(name, value)| Some((name, value?))));
        let output = limited.output().unwrap();
        let err = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(4), "{format}: {err}");
        assert!(err.contains("  try  "), "{err}");
        assert!(place.tree("out") == before, "{format}: the old folder changed");
        let left: Vec<_> = std::fs::read_dir(place.path(""))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .filter(|name| name.starts_with(".out"))
            .collect();
        assert_eq!(left, Vec::<String>::new(), "{format}");
        std::fs::remove_dir_all(place.path("out")).unwrap();
    }
}
