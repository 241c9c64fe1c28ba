//! Every family through the main jobs: two bits by blocks and end to end, scales alone, and the folders
//! that come out. The models are those of `tests/parity`, with a tokenizer of numbered words.
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too

mod common;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use common::{Place, copy_folder};
use fewbit::store::safetensors::{Checkpoint, write_file};
use fewbit::store::{HostTensor, TensorSource};
use serde_json::{Value, json};

/// One folder for each `model_type`, and OPT's with projections.
fn families() -> BTreeMap<String, PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/parity");
    let folders = std::fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path());
    let mut folders: Vec<PathBuf> =
        folders.filter(|folder| folder.join("config.json").is_file()).collect();
    folders.sort();
    let kind = |folder: &PathBuf| config(folder)["model_type"].as_str().unwrap().to_owned();
    let mut all: BTreeMap<String, PathBuf> =
        folders.iter().rev().map(|folder| (kind(folder), folder.clone())).collect();
    // Its hidden states are wider than what its head reads.
    let projected = folders.into_iter().find(|folder| folder.ends_with("opt_proj"));
    all.extend(projected.map(|folder| ("opt_proj".to_owned(), folder)));
    all
}

fn config(folder: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(folder.join("config.json")).unwrap()).unwrap()
}

/// The model as `model`, text that it can read, and the head of a recipe.
fn prepared(folder: &Path) -> (Place, String) {
    let place = Place::new();
    copy_folder(folder, &place.path("model"));
    let config = config(folder);
    let text = config.get("text_config").unwrap_or(&config);
    let vocab = text["vocab_size"].as_u64().unwrap();
    let words: BTreeMap<String, u64> = (0..vocab).map(|id| (format!("w{id}"), id)).collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null, "pre_tokenizer": { "type": "WhitespaceSplit" },
        "post_processor": null, "decoder": null,
        "model": { "type": "WordLevel", "vocab": words, "unk_token": "w0" },
    });
    place.write("model/tokenizer.json", tokenizer.to_string());
    let mut lines = String::new();
    let mut state = 1u64;
    for _ in 0..12 {
        let mut text = String::new();
        for _ in 0..20 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let _ = write!(text, "w{} ", (state >> 33) % vocab);
        }
        let _ = writeln!(lines, "{}", json!({ "text": text }));
    }
    place.write("text.jsonl", lines);
    let head = "seed = 0\noutput = \"run\"\ndevice = \"cpu\"\n[model]\npath = \"model\"\n\
                [data.calibration]\npath = \"text.jsonl\"\nsamples = 4\nlength = 16\n\
                [data.train]\npath = \"text.jsonl\"\nlength = 16\n\
                [data.validation]\npath = \"text.jsonl\"\n";
    (place, head.to_owned())
}

/// Logits of a few tokens, whichever way a model is stored.
fn logits(place: &Place, model: &str) -> Vec<f32> {
    place.ok(&["logits", "--model", model, "--tokens", "3,1,4,15,9", "--output", "l.safetensors"]);
    let file = Checkpoint::open_file(&place.path("l.safetensors")).unwrap();
    file.read("logits").unwrap().to_f32().unwrap()
}

fn trains_and_exports(name: &str, folder: &Path, quant: &str, stages: &str) {
    let (place, head) = prepared(folder);
    let export = "[[stage]]\n[stage.export]\nallow_worse = true\nformat.fewbit = {}\nformat.dequantized = {}\n";
    let evaluate =
        "[[stage]]\n[stage.evaluate]\ntask.ppl = { context = 16 }\nbaselines = [\"float\"]\n";
    place.write("recipe.toml", format!("{head}{quant}{stages}{evaluate}{export}"));
    place.ok(&["train", "--recipe", "recipe.toml"]);
    place.ok(&["verify", "run/export/fewbit"]);
    let packed = logits(&place, "run/export/fewbit");
    let dense = logits(&place, "run/export/dequantized");
    let float = logits(&place, "model");
    let size = float.iter().fold(0.0f32, |size, x| size.max(x.abs()));
    let gap = |a: &[f32], b: &[f32]| {
        a.iter().zip(b).fold(0.0f32, |gap, (a, b)| gap.max((a - b).abs())) / size
    };
    assert_eq!(packed.len(), float.len());
    assert!(gap(&packed, &dense) < 1e-5, "{name}: {}", gap(&packed, &dense));
    assert!(gap(&packed, &float) > 1e-4, "{name} is not quantized");
}

#[test]
fn two_bits_by_blocks_and_end_to_end() {
    let stages = "[[stage]]\n[stage.reconstruct]\nbits = 4\nmethod.flexround = {}\nsteps = 3\n\
                  objective.mse = {}\nbatch = 2\nlearning_rate = 1e-3\nallow_worse = true\n\
                  [[stage]]\n[stage.reconstruct]\nmethod.seq = {}\nsteps = 3\nbatch = 2\n\
                  objective.mse = {}\nlearning_rate = 1e-3\nallow_worse = true\n\
                  [[stage]]\n[stage.distill]\nmethod.seq = {}\nobjective.kl_forward = {}\n\
                  steps = 3\nbatch = 2\nrate_unit = \"grid\"\nlearning_rate = 0.005\n\
                  allow_worse = true\n";
    for (name, folder) in families() {
        trains_and_exports(&name, &folder, "[quant]\nbits = 2\n", stages);
    }
}

#[test]
fn scales_alone_on_balanced_weights() {
    let stages = "[[stage]]\n[stage.calibrate]\nmethod.awq = {}\n\
                  [[stage]]\n[stage.tune_scales]\nmethod.peqa = {}\nobjective.cross_entropy = {}\n\
                  steps = 3\nbatch = 2\nlearning_rate = 1e-3\nallow_worse = true\n";
    for (name, folder) in families() {
        // Four bits in the MLP, eight in attention, by what a family calls neither.
        let quant = "[quant]\nbits = 4\n[[quant.override]]\nmatch = \"attention\"\nbits = 8\n";
        trains_and_exports(&name, &folder, quant, stages);
    }
}

/// Pieces of a block follow each other, or the recipe is refused; a fused matrix is one of them.
#[test]
fn staging_is_for_blocks_with_one_after_the_other() {
    let stages = "[[stage]]\n[stage.reconstruct]\nmethod.seq = {}\nwithin = \"staged\"\nsteps = 3\n\
                  objective.mse = {}\nbatch = 2\nlearning_rate = 1e-3\nallow_worse = true\n";
    for (name, folder) in families() {
        if ["phi", "gptj", "gpt_neox"].contains(&name.as_str()) {
            let (place, head) = prepared(&folder);
            place.write("recipe.toml", format!("{head}[quant]\nbits = 2\n{stages}"));
            let told = place.refused(&["check", "--recipe", "recipe.toml"]);
            assert!(told.contains("side by side") && told.contains("within = "), "{told}");
        } else if ["gpt2", "phi3", "opt", "olmo2", "gemma3_text"].contains(&name.as_str()) {
            trains_and_exports(&name, &folder, "[quant]\nbits = 2\n", stages);
        }
    }
}

/// A block with experts: the router stays as it is, every expert is quantized, those that saw too few
/// tokens are named, and what cannot hold them says so.
#[test]
fn experts_are_quantized_and_their_router_is_not() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/parity/qwen3_moe");
    let (place, head) = prepared(&folder);
    // Five tokens for five experts, two each: some of them see none.
    let head = head.replace("samples = 4\nlength = 16", "samples = 1\nlength = 5");
    for method in ["gptq = {}", "awq = {}", "adadim = {}"] {
        let quant = format!(
            "[quant]\nbits = 4\n[[stage]]\n[stage.calibrate]\nmethod.{method}\n\
             [[stage]]\n[stage.export]\nallow_worse = true\nformat.fewbit = {{}}\n\
             format.dequantized = {{}}\n"
        );
        place.write("recipe.toml", format!("{head}{quant}"));
        let ended = place.run(&["train", "--recipe", "recipe.toml", "--fresh"]);
        assert_eq!(ended.code, 0, "{}", ended.err);
        let told = (ended.out + &ended.err).replace('\n', " ");
        assert!(told.contains("model.layers.1") && told.contains("of 5 experts saw"), "{told}");
        place.ok(&["verify", "run/export/fewbit"]);
        let read = |dir: &str| Checkpoint::open(&place.path(dir)).unwrap();
        let (float, dense) = (read("model"), read("run/export/dequantized"));
        let values = |file: &Checkpoint, name: &str| file.read(name).unwrap().to_f32().unwrap();
        let router = "model.layers.1.mlp.gate.weight";
        assert_eq!(values(&float, router), values(&dense, router));
        for expert in 0..5 {
            let name = format!("model.layers.1.mlp.experts.{expert}.down_proj.weight");
            assert_ne!(values(&float, &name), values(&dense, &name), "{method}, {expert}");
        }
    }
    // llama.cpp has no block without experts in such a model; this one has.
    for (format, says) in [("mlx", "one tensor"), ("gguf", "has no mlp.down_proj")] {
        let told = place
            .refused_briefly(&["export", "--run", "run", "--format", format, "--output", "out"]);
        assert!(told.starts_with("exit 3") && told.contains(says), "{told}");
    }
    let grids = "[quant]\nbits = 4\nactivations = { bits = 8, scheme = \"tensor\" }\n\
                 [[stage]]\n[stage.calibrate]\nmethod.rtn = {}\n";
    place.write("recipe.toml", format!("{head}{grids}"));
    let told = place.refused(&["check", "--recipe", "recipe.toml"]);
    assert!(told.contains("fixed grids") && told.contains("scheme = \"token\""), "{told}");
    place.write("recipe.toml", format!("{head}{grids}").replace("tensor", "token"));
    place.ok(&["train", "--recipe", "recipe.toml", "--fresh", "--set", "output=tokens"]);
}

/// All experts of a block in one tensor, as some programs save them.
#[test]
fn stacked_experts_are_refused_by_name() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/parity/qwen3_moe");
    let (place, _) = prepared(&folder);
    let source = Checkpoint::open(&folder).unwrap();
    let names = source.names();
    let kept = names.iter().filter(|name| !name.contains(".experts."));
    let mut tensors: Vec<(String, HostTensor)> =
        kept.map(|name| ((*name).to_owned(), source.read(name).unwrap())).collect();
    let stacked = "model.layers.1.mlp.experts.gate_up_proj";
    tensors.push((stacked.to_owned(), HostTensor::f32([5, 14, 28], &[0.5; 5 * 14 * 28])));
    write_file(&place.path("model/model.safetensors"), &tensors, &BTreeMap::new()).unwrap();
    let told = place.refused(&["logits", "--model", "model", "--tokens", "3,1", "--output", "l"]);
    assert!(told.starts_with("exit 3") && told.contains(stacked), "{told}");
}
