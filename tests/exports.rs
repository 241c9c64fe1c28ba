//! Every format of other runtimes, on every kind of grid: written, read back, verified, or refused
//! with a reason. (`tests/oracles/` has the runtimes themselves.)
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too

mod common;

use common::{Place, few_stories};

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
        holds: &["mlx", "gptq", "autoround", "awq", "compressed_tensors", "gguf"],
    },
    Grid {
        name: "4 bits, asymmetric, groups of 64",
        quant: "bits = 4\ngroup_size = 64",
        stages: RTN,
        holds: &["mlx", "gptq", "autoround", "awq", "compressed_tensors", "gguf"],
    },
    Grid {
        name: "3 bits, asymmetric, per channel",
        quant: "bits = 3",
        stages: RTN,
        holds: &["mlx", "gptq", "autoround", "compressed_tensors", "gguf"],
    },
    Grid {
        name: "2 bits, zero between two codes",
        quant: "bits = 2",
        stages: SEQ,
        holds: &["mlx", "gguf"],
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
    let recipe = format!(
        "output = \"run\"\ndevice = \"cpu\"\nmodel.path = \"embedded:tinystories-656k\"\n\
         [data]\nvalidation.path = \"few.json\"\ntrain = {{ path = \"text.json\", length = 64 }}\n\
         [quant]\nscales = \"{scales}\"\n{}\n{}[[stage]]\n[stage.export]\nformat.fewbit = {{}}\n",
        grid.quant, grid.stages
    );
    place.write("recipe.toml", recipe);
    place.ok(&["train", "--recipe", "recipe.toml"]);
    place
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
fn a_damaged_file_is_found() {
    let place = run(&GRIDS[0], "f16");
    place.ok(&["export", "--run", "run", "--format", "gguf", "--output", "out"]);
    let file = place.path("out/model.gguf");
    let whole = std::fs::read(&file).unwrap();
    let mut damaged = whole.clone();
    *damaged.last_mut().unwrap() ^= 1;
    for bytes in [damaged, whole[..whole.len() / 2].to_vec()] {
        std::fs::write(&file, bytes).unwrap();
        let ended = place.run(&["verify", "out"]);
        assert_eq!(ended.code, 5, "{}", ended.err);
    }
}
