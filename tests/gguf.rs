//! GGUF files that stand alone: of another program, and of our own without their folder.
//! (`tests/oracles/gguf_of_others.py` made the other program's.)
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too

mod common;

use std::path::{Path, PathBuf};

use common::{Place, copy_folder, few_stories};
use fewbit::export::open_model;
use fewbit::model::ModelConfig;
use fewbit::store::TensorSource;
use fewbit::store::safetensors::Checkpoint;
use serde_json::{Value, json};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/gguf").join(name)
}

fn logits(place: &Place, model: &str, tokens: &str) -> Vec<f32> {
    place.ok(&["logits", "--model", model, "--tokens", tokens, "--output", "l.safetensors"]);
    let file = Checkpoint::open_file(&place.path("l.safetensors")).unwrap();
    file.read("logits").unwrap().to_f32().unwrap()
}

#[test]
fn a_file_of_another_program_is_read() {
    let place = Place::new();
    std::fs::copy(golden("tiny.gguf"), place.path("tiny.gguf")).unwrap();
    let about = std::fs::read_to_string(golden("tiny.json")).unwrap();
    let about: Value = serde_json::from_str(&about).unwrap();
    let ids: Vec<u32> = serde_json::from_value(about["tokens"].clone()).unwrap();
    // As llama.cpp cuts it, behind BOS.
    let opened = open_model(&place.path("tiny.gguf")).unwrap();
    let tokenizer = opened.tokenizer().unwrap();
    let text = about["text"].as_str().unwrap();
    assert_eq!(tokenizer.encode(text).unwrap(), ids[1..]);
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
    assert_eq!((opened.config.bos, &opened.config.eos[..]), (Some(1), &[2][..]));
    // As numpy computes it in 64 bits from what gguf-py unpacks.
    let listed: Vec<String> = ids.iter().map(ToString::to_string).collect();
    let found = logits(&place, "tiny.gguf", &listed.join(","));
    let expected: Vec<f32> = serde_json::from_value(about["logits"].clone()).unwrap();
    let last = &found[found.len() - expected.len()..];
    let worst = last.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst < 2e-5, "{worst}");
    let shown = place.ok(&["inspect", "tiny.gguf"]);
    for word in ["architecture llama", "Q5_1", "BF16", "blk.1.ffn_down.weight", "21 tensors"] {
        assert!(shown.contains(word), "{word}: {shown}");
    }
    let tensors = place.json(&["inspect", "tiny.gguf", "--json"]);
    assert_eq!(tensors["tensors"].as_array().unwrap().len(), 21);
    let args = ["generate", "--model", "tiny.gguf", "--prompt", "the", "--max-new-tokens", "8"];
    assert!(place.ok(&args).len() > 4);
}

#[test]
fn an_exported_file_needs_no_folder() {
    let place = Place::new();
    place.write("few.json", few_stories(3));
    let recipe = "output = \"run\"\ndevice = \"cpu\"\nmodel.path = \"embedded:tinystories-656k\"\n\
                  [quant]\nscales = \"f16\"\nbits = 4\ngroup_size = 32\nsymmetric = true\n\
                  [[stage]]\n[stage.calibrate]\nmethod.rtn = {}\n\
                  [[stage]]\n[stage.export]\nformat.gguf = {}\n";
    place.write("recipe.toml", recipe);
    place.ok(&["train", "--recipe", "recipe.toml"]);
    std::fs::copy(place.path("run/export/gguf/model.gguf"), place.path("alone.gguf")).unwrap();
    let eval = |model: &str| {
        let args = ["eval", "--model", model, "--data", "few.json", "--context", "64", "--json"];
        place.json(&args)["perplexity"].as_f64().unwrap()
    };
    assert_eq!(eval("alone.gguf").to_bits(), eval("run/export/gguf").to_bits());
    let ids = "1,20,300,4";
    assert_eq!(logits(&place, "alone.gguf", ids), logits(&place, "run/export/gguf", ids));
    // Alone in a folder without config.json it stands for the folder.
    std::fs::create_dir(place.path("folder")).unwrap();
    std::fs::copy(place.path("alone.gguf"), place.path("folder/any.gguf")).unwrap();
    assert_eq!(logits(&place, "folder", ids), logits(&place, "alone.gguf", ids));
    std::fs::copy(place.path("alone.gguf"), place.path("folder/other.gguf")).unwrap();
    let two = place.refused(&["eval", "--model", "folder", "--data", "few.json"]);
    assert!(two.starts_with("exit 2") && two.contains("2 GGUF files"), "{two}");
    let whole = std::fs::read(place.path("alone.gguf")).unwrap();
    place.write("cut.gguf", &whole[..whole.len() / 2]);
    let cut = place.refused(&["eval", "--model", "cut.gguf", "--data", "few.json"]);
    assert!(cut.contains("end beyond the file"), "{cut}");
    let other = place.refused(&["eval", "--model", "few.json", "--data", "few.json"]);
    assert!(other.starts_with("exit 2") && other.contains(".gguf"), "{other}");
}

/// A model of `tests/parity` with some settings changed, as `model`, and a tokenizer of single bytes.
fn changed(place: &Place, name: &str, changes: &Value) {
    let parity = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/parity").join(name);
    copy_folder(&parity, &place.path("model"));
    let text = std::fs::read_to_string(place.path("model/config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    place.write("model/config.json", config.to_string());
    let vocab = config["vocab_size"].as_u64().unwrap() as u32;
    let pieces: serde_json::Map<String, Value> = (0..vocab)
        .map(|id| (char::from_u32(33 + id + id / 94 * 67).unwrap().to_string(), json!(id)))
        .collect();
    let bytes = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true,
    });
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null, "pre_tokenizer": bytes, "post_processor": null, "decoder": bytes,
        "model": { "type": "BPE", "vocab": pieces, "merges": [] },
    });
    place.write("model/tokenizer.json", tokenizer.to_string());
    let lines = "{\"text\": \"abcdefghijklmnopqrstuvwxyzabcdefghijklmnop\"}\n".repeat(4);
    place.write("text.jsonl", lines);
    place.write(
        "recipe.toml",
        "seed = 0\noutput = \"run\"\ndevice = \"cpu\"\nmodel.path = \"model\"\n\
         data.validation.path = \"text.jsonl\"\n[quant]\nbits = 8\n\
         [[quant.override]]\nmatch = \"*\"\nkeep = true\n\
         [[stage]]\n[stage.calibrate]\nmethod.rtn = {}\n\
         [[stage]]\n[stage.export]\nformat.gguf = {}\n",
    );
}

/// Weights of a model that has none of its own in `tests/parity`.
fn random_weights(place: &Place) {
    let config = ModelConfig::read(&place.path("model")).unwrap();
    let (mut header, mut bytes) = (serde_json::Map::new(), Vec::new());
    let mut state = 1u64;
    for (name, shape) in config.tensors() {
        let start = bytes.len();
        let gain = if shape.len() == 1 { 1.0 } else { 0.0 };
        for _ in 0..shape.iter().product::<usize>() {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let value = (state >> 40) as f32 / 16_777_216.0 - 0.5 + gain;
            bytes.extend(value.to_le_bytes());
        }
        let place = json!({ "dtype": "F32", "shape": shape, "data_offsets": [start, bytes.len()] });
        header.insert(name, place);
    }
    let header = Value::Object(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.into_bytes());
    file.extend(bytes);
    place.write("model/model.safetensors", file);
}

/// Without its folder a file describes the same model, and gives the same logits.
#[test]
fn every_family_that_is_written_is_read() {
    let full =
        json!({ "sliding_window": null, "head_dim": 8, "layer_types": vec!["full_attention"; 4] });
    for (name, architecture, changes) in [
        ("exaone4", "exaone4", full),
        ("gemma", "gemma", json!({})),
        ("gemma2", "gemma2", json!({ "query_pre_attn_scalar": 12 })),
        ("gemma3_text", "gemma3", json!({ "query_pre_attn_scalar": 10 })),
        ("gpt2", "gpt2", json!({})),
        ("gpt_neox", "gptneox", json!({})),
        ("gpt_neox_seq", "gptneox", json!({})),
        ("granite", "granite", json!({})),
        ("llama_bias", "llama", json!({})),
        ("llama_linear", "llama", json!({})),
        ("ministral3", "mistral3", json!({})),
        ("mistral", "llama", json!({ "sliding_window": null })),
        ("olmo2", "olmo2", json!({ "tie_word_embeddings": false })),
        ("phi", "phi2", json!({})),
        ("phi3", "phi3", json!({})),
        ("qwen2", "qwen2", json!({})),
        ("qwen3", "qwen3", json!({})),
        ("qwen3_moe_all", "qwen3moe", json!({})),
        ("smollm3", "smollm3", json!({ "no_rope_layers": [1, 1, 1] })),
    ] {
        let place = Place::new();
        changed(&place, name, &changes);
        let stored = Checkpoint::open_file(&place.path("model/model.safetensors")).unwrap();
        let config = ModelConfig::read(&place.path("model")).unwrap();
        let suits = |(name, shape): &(String, Vec<usize>)| {
            stored
                .info(name)
                .is_some_and(|info| info.shape == *shape || config.arch.linears[0].columns)
        };
        if !config.tensors().iter().all(suits) {
            random_weights(&place);
        }
        place.ok(&["train", "--recipe", "recipe.toml"]);
        std::fs::rename(place.path("run/export/gguf/model.gguf"), place.path("alone.gguf"))
            .unwrap();
        let opened = open_model(&place.path("alone.gguf")).unwrap();
        assert_eq!(config.computes(&opened.config), None, "{name}");
        assert_eq!(opened.config.arch.gguf.unwrap().architecture, architecture, "{name}");
        let ids: Vec<String> = (0..36).map(|at| (at * 31 % 90).to_string()).collect();
        let [folder, alone] =
            ["model", "alone.gguf"].map(|model| logits(&place, model, &ids.join(",")));
        if name == "ministral3" {
            // Its factor of attention goes through 32 bits.
            let apart = folder.iter().zip(&alone).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(apart < 1e-4, "{name}: {apart}");
        } else {
            assert!(folder == alone, "{name}");
        }
    }
}

/// The experts' matrices of one kind are one tensor, in codes too; one of them as floats among codes has no place.
#[test]
fn experts_are_stacked() {
    let place = Place::new();
    changed(
        &place,
        "qwen3_moe_all",
        &json!({ "hidden_size": 64, "moe_intermediate_size": 32, "num_local_experts": 5 }),
    );
    random_weights(&place);
    let recipe = |more: &str| {
        format!(
            "output = \"run\"\ndevice = \"cpu\"\nmodel.path = \"model\"\n[quant]\nbits = 4\ngroup_size = 32\n\
             symmetric = true\nscales = \"f16\"\n{more}[[stage]]\n[stage.calibrate]\nmethod.rtn = {{}}\n\
             [[stage]]\n[stage.export]\nformat.fewbit = {{}}\nformat.gguf = {{}}\n"
        )
    };
    place.write("recipe.toml", recipe(""));
    place.ok(&["train", "--recipe", "recipe.toml"]);
    place.ok(&["verify", "run/export/gguf"]);
    let told = place.ok(&["inspect", "run/export/gguf/model.gguf"]);
    assert!(told.contains("blk.1.ffn_down_exps.weight"), "{told}");
    std::fs::copy(place.path("run/export/gguf/model.gguf"), place.path("alone.gguf")).unwrap();
    let ids = "3,1,4,15,9,26,53";
    let trained = logits(&place, "run/export/fewbit", ids);
    assert_eq!(trained, logits(&place, "alone.gguf", ids));
    place.ok(&["export", "--model", "alone.gguf", "--format", "fewbit", "--output", "back"]);
    assert_eq!(trained, logits(&place, "back", ids));
    let one = "[[quant.override]]\nmatch = \"*.experts.3.*\"\nkeep = true\n";
    place.write("recipe.toml", recipe(one).replace("format.fewbit = {}\n", ""));
    let told = place.failed(&["train", "--recipe", "recipe.toml", "--fresh"]);
    assert!(told.contains("one quant.override for all"), "{told}");
}

#[test]
fn what_llama_cpp_cannot_compute_is_not_written() {
    for (name, changes, part) in [
        ("gemma2", json!({}), "the scale of its scores"),
        ("llama_dynamic", json!({}), "its rotations"),
        ("mistral", json!({}), "its windows of attention"),
        ("olmo2", json!({ "tie_word_embeddings": true }), "a head of its own"),
        ("olmo3", json!({}), "does not know models of type olmo3"),
        ("opt", json!({}), "does not know models of type opt"),
        ("phi3_window", json!({}), "its windows of attention"),
        ("phi_qk", json!({}), "has no self_attn.k_layernorm"),
        ("qwen3_moe", json!({}), "has no mlp.down_proj"),
        ("qwen3_moe_all", json!({ "norm_topk_prob": false }), "how its tokens find their experts"),
        ("smollm3", json!({ "no_rope_layers": [1, 0, 1] }), "its rotations"),
        ("exaone4", json!({ "sliding_window": null }), "as wide as the model"),
    ] {
        let place = Place::new();
        changed(&place, name, &changes);
        let said = place.failed(&["train", "--recipe", "recipe.toml"]);
        assert!(said.contains(part), "{name}: {said}");
    }
}
