//! Fine-tuning: adapters and whole linears, what they leave, and what may follow.
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too

mod common;

use std::collections::BTreeMap;
use std::process::Stdio;
use std::time::{Duration, Instant};

use common::{Place, TRAIN, copy_folder, datasets};
use fewbit::model::ModelConfig;
use fewbit::stage::{FinetuneMethod, LoraConfig, QloraConfig, Targets};
use fewbit::store::safetensors::{Checkpoint, ShardWriter};
use fewbit::store::{HostTensor, TensorSource};
use serde_json::Value;

const HEAD: &str = r#"output = "run"
device = "cpu"
model.path = "model"
quant.bits = 4

[data]
validation.path = "few.json"
[data.calibration]
path = "text.json"
samples = 8
length = 64
[data.train]
path = "text.json"
length = 64
"#;

const EVALUATE: &str = "[[stage]]\n[stage.evaluate]\ntask.ppl = { context = 64 }\n";
const DENSE: &str = "[[stage]]\n[stage.export]\nformat.dequantized = {}\n";
const PACKED: &str = "[[stage]]\n[stage.export]\nformat.fewbit = {}\n";

const LORA: &str = "lora = { rank = 2, alpha = 6 }";
const QLORA: &str = "qlora = { rank = 2, alpha = 6, block = 4 }";
const FULL: &str = "full = {}";

/// A stage of `steps` steps.
fn finetune(method: &str, steps: usize) -> String {
    format!(
        "[[stage]]\n[stage.finetune]\nmethod.{method}\nsteps = {steps}\nbatch = 4\n\
         learning_rate = 1e-2\ncheckpoint_every = 4\nlog_every = 1\n"
    )
}

fn calibrate(method: &str, bits: u8) -> String {
    format!("[[stage]]\n[stage.calibrate]\nmethod.{method} = {{}}\nbits = {bits}\n")
}

/// A place with a recipe of these stages, its model and its text.
fn prepared(stages: &[&str]) -> Place {
    let place = Place::new();
    place.write("recipe.toml", format!("{HEAD}{}", stages.concat()));
    place.write("few.json", speeches("validation", 40));
    place.write("text.json", speeches("train", 200));
    place.copy_model("stories260k", "model");
    place
}

/// Lines of plays, which a model of children's stories has yet to learn.
fn speeches(part: &str, count: usize) -> String {
    let path = datasets().join(format!("tinyshakespeare/{part}.json"));
    let speeches: Vec<String> =
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    serde_json::to_string(&speeches[..count]).unwrap()
}

fn trained(stages: &[&str]) -> (Place, Value) {
    let place = prepared(stages);
    place.ok(&TRAIN);
    let record = record(&place);
    (place, record)
}

fn record(place: &Place) -> Value {
    serde_json::from_str(&place.read("run/run.json")).unwrap()
}

/// Perplexities by what was measured; of several alike the last.
fn perplexities(record: &Value) -> BTreeMap<String, f64> {
    let measured = record["results"]["measured"].as_array().unwrap().iter();
    let pair = |m: &Value| {
        (m["what"].as_str().unwrap().to_owned(), m["result"]["perplexity"].as_f64().unwrap())
    };
    measured.map(pair).collect()
}

fn tensors(place: &Place, folder: &str) -> BTreeMap<String, HostTensor> {
    let file = Checkpoint::open_file(&place.path(folder).join("model.safetensors")).unwrap();
    file.names().into_iter().map(|name| (name.to_owned(), file.read(name).unwrap())).collect()
}

/// The factors of one linear, `A` and `B`, from the folder that peft reads.
fn factors(place: &Place, method: &str, linear: &str) -> [HostTensor; 2] {
    let path = place.path(&format!("run/adapters/{method}/adapter_model.safetensors"));
    let file = Checkpoint::open_file(&path).unwrap();
    ["A", "B"]
        .map(|part| file.read(&format!("base_model.model.{linear}.lora_{part}.weight")).unwrap())
}

/// `base + scale * B A`, in f64.
fn merged(base: &HostTensor, [a, b]: &[HostTensor; 2], scale: f64) -> Vec<f32> {
    let ([out, inputs], rank) = ([base.shape[0], base.shape[1]], a.shape[0]);
    assert_eq!((&a.shape[..], &b.shape[..]), (&[rank, inputs][..], &[out, rank][..]));
    let [w, a, b] = [base, a, b].map(|tensor| tensor.to_f32().unwrap());
    let entry = |i: usize| {
        let (row, column) = (i / inputs, i % inputs);
        let terms =
            (0..rank).map(|r| f64::from(b[row * rank + r]) * f64::from(a[r * inputs + column]));
        (f64::from(w[i]) + scale * terms.sum::<f64>()) as f32
    };
    (0..out * inputs).map(entry).collect()
}

#[test]
fn before_a_step_the_model_is_its_base() {
    for method in [LORA, "lora = { targets = \"all\" }"] {
        let (place, record) = trained(&[&finetune(method, 0), EVALUATE, DENSE]);
        let perplexities = perplexities(&record);
        let [float, after] = ["float", "after finetune"].map(|what| perplexities[what]);
        assert_eq!(float.to_bits(), after.to_bits(), "{method}");
        assert!(tensors(&place, "model") == tensors(&place, "run/export/dequantized"));
        let [a, b] = factors(&place, "lora", "model.layers.0.self_attn.q_proj");
        assert!(a.to_f32().unwrap().iter().all(|x| *x != 0.0));
        assert!(b.to_f32().unwrap().iter().all(|x| *x == 0.0));
    }
}

#[test]
fn lora_learns_its_factors_alone_and_they_are_what_is_merged() {
    let (place, record) = trained(&[&finetune(LORA, 6), EVALUATE, DENSE]);
    let (base, after) = (tensors(&place, "model"), tensors(&place, "run/export/dequantized"));
    assert!(base.keys().eq(after.keys()));
    let mut by_hand = base.clone();
    let mut numbers = 0;
    for (name, tensor) in &base {
        let linear = name.strip_suffix(".weight").unwrap();
        if !["q_proj", "v_proj"].contains(&linear.rsplit('.').next().unwrap()) {
            assert!(after[name] == *tensor, "{name} changed");
            continue;
        }
        let factors = factors(&place, "lora", linear);
        numbers += factors.iter().map(|f| f.shape.iter().product::<usize>()).sum::<usize>();
        let expected = merged(tensor, &factors, 6.0 / 2.0);
        let found = after[name].to_f32().unwrap();
        assert!(after[name] != *tensor);
        assert!(expected.iter().zip(&found).all(|(a, b)| (a - b).abs() < 1e-6), "{name}");
        by_hand.insert(name.clone(), HostTensor::f32(tensor.shape.clone(), &expected));
    }
    assert_eq!(record["results"]["trainable"]["0"], numbers);

    copy_folder(&place.path("model"), &place.path("by_hand"));
    std::fs::remove_file(place.path("by_hand/model.safetensors")).unwrap();
    let mut writer = ShardWriter::create(&place.path("by_hand"), 1 << 30).unwrap();
    for (name, tensor) in &by_hand {
        writer.add(name, tensor).unwrap();
    }
    writer.finish(&BTreeMap::new()).unwrap();
    let args = ["eval", "--model", "by_hand", "--task", "ppl", "--data", "few.json"];
    let found = place.json(&[&args[..], &["--context", "64", "--json"]].concat());
    let apart = found["perplexity"].as_f64().unwrap();
    let together = perplexities(&record)["after finetune"];
    assert!((apart / together - 1.0).abs() < 1e-5, "{apart} {together}");
    assert!(together < perplexities(&record)["float"]);

    let config: Value =
        serde_json::from_str(&place.read("run/adapters/lora/adapter_config.json")).unwrap();
    assert_eq!(config["r"], 2);
    assert_eq!(config["lora_alpha"], 6.0);
    assert_eq!(config["target_modules"], serde_json::json!(["q_proj", "v_proj"]));
}

/// What a quantized base holds: each block of weights on at most 15 levels, whatever the targets.
#[test]
fn qlora_learns_beside_weights_on_a_grid() {
    for targets in ["[\"o_proj\"]", "\"all\""] {
        let method = format!("qlora = {{ rank = 2, alpha = 6, block = 4, targets = {targets} }}");
        let (place, record) = trained(&[&finetune(&method, 0), EVALUATE, DENSE]);
        let base = tensors(&place, "run/export/dequantized");
        let weights = base["model.layers.0.self_attn.o_proj.weight"].to_f32().unwrap();
        for block in weights.chunks(4) {
            let step = block.iter().fold(0.0f32, |peak, w| peak.max(w.abs())) / 7.0;
            let on_grid = |w: &f32| (w / step - (w / step).round()).abs() < 1e-4;
            assert!(step == 0.0 || block.iter().all(on_grid), "{block:?}");
        }
        let start = perplexities(&record)["after finetune"];
        let (place, record) = trained(&[&finetune(&method, 6), EVALUATE, DENSE]);
        assert!(perplexities(&record)["after finetune"] < start);
        let name = "model.layers.1.self_attn.o_proj";
        let expected =
            merged(&base[&format!("{name}.weight")], &factors(&place, "qlora", name), 3.0);
        let found = tensors(&place, "run/export/dequantized")[&format!("{name}.weight")].clone();
        let near = |(a, b): (&f32, &f32)| (a - b).abs() < 1e-6;
        assert!(expected.iter().zip(&found.to_f32().unwrap()).all(near));
    }
}

#[test]
fn full_learns_every_linear_and_nothing_else() {
    let (place, record) = trained(&[&finetune(FULL, 3), EVALUATE, DENSE]);
    let (base, after) = (tensors(&place, "model"), tensors(&place, "run/export/dequantized"));
    let mut numbers = 0;
    for (name, tensor) in &base {
        let linear = name.contains("_proj");
        assert_eq!(after[name] != *tensor, linear, "{name}");
        numbers += if linear { tensor.shape.iter().product::<usize>() } else { 0 };
    }
    assert_eq!(record["results"]["trainable"]["0"], numbers);
    assert!(!place.path("run/adapters").exists());
}

/// LLaMA-7B: rank 4 on queries and values is 2,097,152 numbers.
#[test]
fn the_count_of_a_7b_model_is_the_published_one() {
    let place = Place::new();
    let config = r#"{"model_type": "llama", "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "hidden_act": "silu",
        "tie_word_embeddings": false}"#;
    place.write("config.json", config);
    let model = ModelConfig::read(&place.path("")).unwrap();
    let lora = |targets| {
        FinetuneMethod::Lora(LoraConfig { targets, ..LoraConfig::default() }).trainable(&model)
    };
    assert_eq!(lora(Targets::queries_and_values()), 2_097_152);
    assert_eq!(lora(Targets::all()), 32 * 4 * (4 * 2 * 4096 + 3 * (4096 + 11008)));
    let qlora = FinetuneMethod::Qlora(QloraConfig::default());
    assert_eq!(qlora.trainable(&model), lora(Targets::all()));
    let full = FinetuneMethod::Full(fewbit::stage::FullConfig {});
    assert_eq!(full.trainable(&model), 6_476_005_376);
}

/// Killed in the middle, gone on from a saved state, and an export lost and written again: the same
/// bytes.
#[test]
fn an_interrupted_run_ends_in_the_same_bytes() {
    for method in [LORA, QLORA, FULL] {
        let stages = [&finetune(method, 40)[..], &calibrate("rtn", 4), PACKED];
        let (whole, _) = trained(&stages);
        let place = prepared(&stages);
        let state = place.path("run/checkpoints/00-finetune/state-000001.safetensors");
        let mut command = place.command(&TRAIN);
        let mut run = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let start = Instant::now();
        while !state.exists() && run.try_wait().unwrap().is_none() {
            assert!(start.elapsed() < Duration::from_mins(2), "no saved state");
            std::thread::sleep(Duration::from_millis(1));
        }
        run.kill().unwrap();
        run.wait().unwrap();
        assert!(state.exists(), "{method}: the run ended before it was killed");
        let ended = place.run(&TRAIN);
        assert_eq!(ended.code, 0, "{}", ended.err);
        assert!(place.read("run/metrics.jsonl").contains("\"resumed\""), "{method}");
        let same = |place: &Place| {
            ["run/export", "run/adapters"].iter().all(|folder| {
                !whole.path(folder).exists() || place.tree(folder) == whole.tree(folder)
            })
        };
        assert!(same(&place), "{method}");
        std::fs::remove_dir_all(place.path("run/export")).unwrap();
        place.ok(&TRAIN);
        assert!(same(&place), "{method}");
    }
}

/// Later stages quantize what fine-tuning left, and compare with it.
#[test]
fn what_it_leaves_is_quantized_by_later_stages() {
    let rest = [EVALUATE, &calibrate("gptq", 8), EVALUATE, PACKED].concat();
    let (place, record) = trained(&[&finetune(LORA, 20), &rest]);
    let found = perplexities(&record);
    let [float, tuned, rounded] =
        ["float", "after finetune", "after calibrate"].map(|what| found[what]);
    assert!(tuned < float && (rounded / tuned - 1.0).abs() < 0.01, "{found:?}");
    let errors = record["results"]["block_mse"]["2"].as_array().unwrap();
    let base = prepared(&[&calibrate("gptq", 8), EVALUATE]);
    base.ok(&TRAIN);
    let without = self::record(&base);
    let without = without["results"]["block_mse"]["0"].as_array().unwrap();
    for (with, without) in errors.iter().zip(without) {
        let [with, without] = [with, without].map(|mse| mse[1].as_f64().unwrap());
        assert!(with < 4.0 * without, "errors are not those of rounding: {with} {without}");
    }
    let plan = place.json(&["check", "--recipe", "recipe.toml", "--json"]);
    let plan = plan["plan"].as_str().unwrap();
    assert!(plan.starts_with("dense → finetune(lora r2, cross_entropy) → evaluate"), "{plan}");
}

#[test]
fn codes_become_the_values_they_stand_for() {
    let stages = [&calibrate("rtn", 4)[..], EVALUATE, &finetune(LORA, 0), EVALUATE, DENSE];
    let found = perplexities(&trained(&stages).1);
    let [codes, values] = ["after calibrate", "after finetune"].map(|what| found[what]);
    assert!((codes / values - 1.0).abs() < 1e-5, "{found:?}");
}

#[test]
fn bf16_models_are_tuned_in_f32() {
    let place = prepared(&[&finetune(LORA, 4), EVALUATE]);
    place.ok(&[&TRAIN[..], &["--set", "model.compute=bf16"]].concat());
    let found = perplexities(&record(&place));
    assert!(found["after finetune"] < found["float"], "{found:?}");
}

#[test]
fn what_makes_no_sense_is_refused() {
    let refused = |stages: &[&str], code: u8, sentences: &[&str]| {
        let error = prepared(stages).refused(&TRAIN);
        assert!(error.starts_with(&format!("exit {code}\n")), "{error}");
        for sentence in sentences {
            assert!(error.contains(sentence), "{error}");
        }
    };
    let method = |method: &str| finetune(method, 1);
    refused(&[&method("lora = { rank = 0 }")], 2, &["rank = 0", "stage.0.finetune"]);
    refused(&[&method("lora = { alpha = 0 }")], 2, &["alpha = 0", "alpha = 8"]);
    refused(&[&method("lora = { targets = [\"q_prj\"] }")], 2, &["`q_prj`", "`q_proj`"]);
    refused(&[&method("lora = { targets = [] }")], 2, &["targets = [] adapts nothing"]);
    refused(&[&method("lora = { rnk = 2 }")], 2, &["`rnk`", "`rank`"]);
    refused(&[&method("peqa = {}")], 2, &["`peqa`", "lora"]);
    refused(&[&method("qlora = { bits = 3 }")], 2, &["bits = 3", "bits = 4"]);
    let large = ["rank 65 is above 32", "layers.0.self_attn.v_proj.weight", "rank = 32 or less"];
    refused(&[&method("lora = { rank = 65, targets = [\"v_proj\"] }")], 3, &large);
    let block = ["block 32 does not divide in_features 172", "down_proj.weight"];
    refused(&[&method("qlora = {}")], 3, &block);
    let nothing = "export needs quantized weights";
    refused(&[&method(LORA), PACKED], 2, &[nothing, "stage.calibrate"]);
    refused(&[EVALUATE, DENSE], 2, &[nothing]);
    let rate = method(LORA).replace("1e-2", "-1.0");
    refused(&[&rate], 2, &["learning_rate = -1 is not a rate"]);
    let mse = method(LORA) + "objective.mse = {}\n";
    refused(&[&mse], 2, &["objective.mse compares block outputs"]);
    let tune =
        "[[stage]]\n[stage.tune_scales]\nmethod.peqa = {}\nsteps = 1\nlearning_rate = 1e-3\n";
    refused(&[&calibrate("rtn", 4), &method(LORA), tune], 2, &["the weights are dense here"]);
    let place = prepared(&[&calibrate("rtn", 4), &method(LORA)]);
    let text = place.read("recipe.toml");
    let activations = "[quant.activations]\nbits = 8\nscheme = \"token\"\n[[stage]]";
    place.write("recipe.toml", text.replacen("[[stage]]", activations, 1));
    let error = place.refused(&TRAIN);
    assert!(error.contains("an earlier stage has quantized activations"), "{error}");
}
