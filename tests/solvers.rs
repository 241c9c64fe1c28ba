//! Methods that learn nothing, and the output head, from the recipe to a re-opened export.
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too

mod common;

use std::path::Path;

use burn::tensor::{DType, Device, Tensor};
use common::{Place, TRAIN, datasets, few_stories};
use fewbit::data::{TokenStream, Tokenizer, read_documents};
use fewbit::export::{OpenModel, open_model};
use fewbit::model::{CausalLm, Loader, ModelConfig, Positions, WeightSource};
use fewbit::store::TensorSource;
use fewbit::store::safetensors::Checkpoint;
use serde_json::{Value, json};

const FRAME: &str = r#"output = "run"
device = "cpu"
model.path = "embedded:tinystories-656k"

[data]
validation.path = "few.json"
calibration = { path = "text.json", samples = 16, length = 64 }

[quant]
QUANT

[[stage]]
[stage.calibrate]
STAGE
[[stage]]
[stage.evaluate]
task.ppl = { context = 128 }
baselines = ["float", "rtn"]
[[stage]]
[stage.export]
format.fewbit = {}
format.dequantized = {}
"#;

fn place(quant: &str, stage: &str) -> Place {
    let place = Place::new();
    place.write("recipe.toml", FRAME.replace("QUANT", quant).replace("STAGE", stage));
    place.write("few.json", few_stories(12));
    place.write("text.json", few_stories(40));
    place
}

fn trained(quant: &str, stage: &str) -> Place {
    let place = place(quant, stage);
    place.ok(&TRAIN);
    place
}

fn record(place: &Place) -> Value {
    serde_json::from_str(&place.read("run/run.json")).unwrap()
}

fn perplexity(place: &Place, what: &str) -> f64 {
    let record = record(place);
    let measured = record["results"]["measured"].as_array().unwrap();
    let found = measured.iter().find(|one| one["what"].as_str().unwrap().starts_with(what));
    found.unwrap()["result"]["perplexity"].as_f64().unwrap()
}

fn export(place: &Place, format: &str) -> OpenModel {
    open_model(&place.path(&format!("run/export/{format}"))).unwrap()
}

fn linears(opened: &OpenModel) -> Vec<String> {
    opened.manifest.as_ref().unwrap().linears.keys().cloned().collect()
}

/// Both exports hold the same weights, and evaluate to what the run measured.
fn exports_agree(place: &Place) {
    let trained = perplexity(place, "after");
    for format in ["fewbit", "dequantized"] {
        let folder = format!("run/export/{format}");
        let args = ["eval", "--model", &folder, "--data", "few.json", "--context", "128", "--json"];
        let found = place.json(&[&args[..], &["--device", "cpu"]].concat());
        assert_eq!(found["perplexity"].as_f64().unwrap().to_bits(), trained.to_bits(), "{format}");
        assert_eq!(place.json(&["verify", &folder, "--json"])["ok"], true, "{format}");
    }
}

fn same_weights(a: &Place, b: &Place) {
    let (a, b) = (export(a, "fewbit"), export(b, "fewbit"));
    for name in linears(&a) {
        assert_eq!(a.quantized(&name).unwrap(), b.quantized(&name).unwrap(), "{name}");
    }
    for name in a.checkpoint.names() {
        assert_eq!(a.checkpoint.read(name).unwrap(), b.checkpoint.read(name).unwrap(), "{name}");
    }
}

#[test]
fn gptq_beats_rounding() {
    let place = trained("bits = 3", "method.gptq = {}");
    assert!(perplexity(&place, "after") < 0.95 * perplexity(&place, "rtn"));
    exports_agree(&place);
    // The lazy update is only a matter of speed.
    same_weights(&place, &trained("bits = 3", "method.gptq = { block = 7 }"));
    let ordered = "method.gptq = { act_order = true, static_groups = true }";
    let place = trained("bits = 3\ngroup_size = 32", ordered);
    assert!(perplexity(&place, "after") < 0.97 * perplexity(&place, "rtn"));
    exports_agree(&place);
}

#[test]
fn gptq_refuses_an_order_that_scatters_groups() {
    let place = place("bits = 3\ngroup_size = 32", "method.gptq = { act_order = true }");
    let said = place.run(&TRAIN);
    assert_eq!(said.code, 2, "{}", said.err);
    assert!(said.err.contains("static_groups = true"), "{}", said.err);
}

#[test]
fn awq_without_balance_and_clipping_is_rounding() {
    let rounded = trained("bits = 3", "method.rtn = {}");
    same_weights(&rounded, &trained("bits = 3", "method.awq = { ratios = 1, clip = false }"));
}

#[test]
fn awq_beats_rounding_and_carries_its_norms() {
    let place = trained("bits = 3\ngroup_size = 32", "method.awq = {}");
    assert!(perplexity(&place, "after") < perplexity(&place, "rtn"));
    exports_agree(&place);
    let source = Checkpoint::open(&datasets().join("tinystories-656k")).unwrap();
    let norm = "model.layers.0.input_layernorm.weight";
    assert_ne!(export(&place, "fewbit").checkpoint.read(norm).unwrap(), source.read(norm).unwrap());
}

#[test]
fn adadim_takes_both_dimensions_and_exports_them() {
    let place = trained("bits = 3\ngroup_size = 32", "method.adadim = {}\ninputs = \"float\"");
    exports_agree(&place);
    let manifest = export(&place, "fewbit").manifest.unwrap();
    let axes: Vec<String> =
        manifest.linears.values().map(|record| format!("{:?}", record.axis)).collect();
    assert!(axes.iter().any(|axis| axis == "Out") && axes.iter().any(|axis| axis == "In"));
    assert!(perplexity(&place, "after") < 1.05 * perplexity(&place, "rtn"));
    let shown = place.ok(&["inspect", "run/export/fewbit"]);
    assert!(shown.contains("32 outputs"), "{shown}");
}

#[test]
fn binary_coding_beats_rounding_and_exports() {
    let place = trained("bits = 3\ngroup_size = 32", "method.bcq = {}");
    assert!(perplexity(&place, "after") < perplexity(&place, "rtn"));
    exports_agree(&place);
    let inspected = place.json(&["inspect", "run/export/fewbit", "--json"]);
    // 3 planes, and an f32 scale for each with an f32 offset for every 32 weights.
    assert!((inspected["bits_per_weight"].as_f64().unwrap() - 7.0).abs() < 1e-9);
    assert_eq!(inspected["linears"][0]["grid"], "binary_coding");
    assert_eq!(inspected["linears"][0]["axis"], "in");
    let shown = place.ok(&["inspect", "run/export/fewbit"]);
    assert!(shown.contains("3 planes"), "{shown}");
    assert!(shown.lines().all(|line| line.chars().count() <= 80), "{shown}");
}

#[test]
fn a_resumed_calibration_ends_in_the_same_bytes() {
    let whole = trained("bits = 3\ngroup_size = 32", "method.awq = {}");
    let place = place("bits = 3\ngroup_size = 32", "method.awq = {}");
    place.ok(&TRAIN);
    // As if it had been killed after the first block.
    let last = place.path("run/checkpoints/00-calibrate/block-0001.safetensors");
    std::fs::remove_file(last).unwrap();
    let mut record = record(&place);
    for stage in record["stages"].as_array_mut().unwrap() {
        stage["status"] = "stopped".into();
    }
    record["status"] = "stopped".into();
    place.write("run/run.json", record.to_string());
    std::fs::remove_dir_all(place.path("run/export")).unwrap();
    place.ok(&TRAIN);
    assert!(whole.tree("run/export") == place.tree("run/export"));
}

// --- the output head -----------------------------------------------------------------------------

#[test]
fn the_head_is_rounded_when_an_override_names_it() {
    let quant = "bits = 4\n[[quant.override]]\nmatch = \"lm_head\"\nbits = 8\n\
                 [[quant.override]]\nmatch = \"model.layers.0.*\"\nkeep = true";
    let place = trained(quant, "method.rtn = {}");
    exports_agree(&place);
    let packed = export(&place, "fewbit");
    let names = linears(&packed);
    assert_eq!(names.len(), 8, "{names:?}"); // one block and the head
    assert_eq!(packed.quantized("lm_head").unwrap().unwrap().bits.get(), 8);
    let config = place.read("run/export/dequantized/config.json");
    let config: Value = serde_json::from_str(&config).unwrap();
    assert_eq!(config["tie_word_embeddings"], false);
    // The embedding stays what it was.
    let source = Checkpoint::open(&datasets().join("tinystories-656k")).unwrap();
    // (This checkpoint holds it under the head's name.)
    let float = source.read("lm_head.weight").unwrap();
    assert_eq!(packed.checkpoint.read("model.embed_tokens.weight").unwrap(), float);
    let (after, rtn) = (perplexity(&place, "after"), perplexity(&place, "rtn"));
    assert_eq!(after.to_bits(), rtn.to_bits());
}

#[test]
fn a_wildcard_leaves_the_head_alone() {
    let place = trained("bits = 4\n[[quant.override]]\nmatch = \"*\"\nbits = 3", "method.rtn = {}");
    assert!(export(&place, "fewbit").quantized("lm_head").unwrap().is_none());
    assert_eq!(linears(&export(&place, "fewbit")).len(), 14);
}

// --- the streams ---------------------------------------------------------------------------------

/// The last block's recorded error is that of the exported model's own stream against the float
/// model's, on the calibration windows.
#[test]
fn recorded_errors_are_those_of_the_baked_blocks() {
    let place = trained("bits = 4", "method.gptq = {}");
    let recorded = record(&place)["results"]["block_mse"]["0"].clone();
    let folder = datasets().join("tinystories-656k");
    let source = Checkpoint::open(&folder).unwrap();
    let tokenizer = Tokenizer::load(&folder).unwrap();
    let documents = read_documents(&place.path("text.json")).unwrap();
    let stream = TokenStream::build(&documents, &tokenizer, Some(1)).unwrap();
    let windows = stream.spread(16, 64).unwrap();
    let rows: Vec<&[u32]> = windows.iter().map(|w| stream.window(*w, 64)).collect();
    let float = residuals(&folder, &source, &rows);
    let baked = residuals(&folder, &export(&place, "fewbit"), &rows);
    for (block, (a, b)) in float.into_iter().zip(baked).enumerate() {
        let mse = f64::from((a - b).square().mean().into_scalar::<f32>());
        let recorded = recorded[block][1].as_f64().unwrap();
        assert!((mse / recorded - 1.0).abs() < 1e-5, "block {block}: {mse}, {recorded}");
    }
}

/// Examples that share a window do not see each other: two to a window or one, blocks have the same errors.
#[test]
fn packed_examples_are_calibrated_each_by_itself() {
    let stages = [
        ("calibrate", "method.gptq = {}"),
        ("calibrate", "method.awq = {}"),
        ("calibrate", "method.adadim = {}"),
        (
            "reconstruct",
            "method.flexround = {}\nwithin = \"staged\"\nsteps = 3\nlearning_rate = 1e-3",
        ),
    ];
    let errors = |name: &str, stage: &str, examples: usize| {
        let place = place("bits = 4", stage);
        let packed =
            format!("samples = {}, length = {}, format = \"tokens\"", 16 / examples, 32 * examples);
        let recipe = place.read("recipe.toml").replace("samples = 16, length = 64", &packed);
        place.write("recipe.toml", recipe.replace("stage.calibrate", &format!("stage.{name}")));
        let token =
            |row: usize, at: usize| if at == 0 { 1 } else { 3 + (row * 37 + at * at * 11) % 1900 };
        let row = |row| (0..32).map(|at| token(row, at)).collect::<Vec<_>>();
        let rows = (0..16).map(|at| json!({ "input_ids": row(at), "labels": row(at) }).to_string());
        place.write("text.json", rows.collect::<Vec<_>>().join("\n"));
        if name == "reconstruct" {
            let recipe = place.read("recipe.toml");
            let batch = format!("steps = 3\nallow_worse = true\nbatch = {}", 16 / examples);
            place.write("recipe.toml", recipe.replace("steps = 3", &batch));
        }
        place.ok(&TRAIN);
        let errors = record(&place)["results"]["block_mse"]["0"].clone();
        serde_json::from_value::<Vec<[f64; 2]>>(errors).unwrap()
    };
    for (name, stage) in stages {
        let [alone, together] = [1, 2].map(|examples| errors(name, stage, examples));
        assert_eq!(alone.len(), 2);
        for (a, b) in alone.iter().flatten().zip(together.iter().flatten()) {
            assert!((a - b).abs() <= 1e-4 * a, "{stage}: {alone:?}, {together:?}");
        }
    }
}

/// The residual stream behind each block.
fn residuals(folder: &Path, source: &dyn WeightSource, rows: &[&[u32]]) -> Vec<Tensor<3>> {
    let device = Device::flex();
    let config = ModelConfig::read(folder).unwrap();
    let loader = Loader { config: &config, source, device: &device, dtype: DType::F32 };
    let model = loader.model().unwrap();
    let positions = Positions::new(&config, 0, rows[0].len(), DType::F32, &device);
    let mut hidden = model.embed(CausalLm::tokens(rows, &device), &positions);
    let mut all = Vec::new();
    for block in &model.blocks {
        hidden = block.forward(hidden, &positions);
        all.push(hidden.clone());
    }
    all
}
