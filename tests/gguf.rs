//! GGUF files that stand alone: of another program, and of our own without their folder.
//! (`tests/oracles/gguf_of_others.py` made the other program's.)
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too

mod common;

use std::path::{Path, PathBuf};

use common::{Place, few_stories};
use fewbit::export::open_model;
use fewbit::store::TensorSource;
use fewbit::store::safetensors::Checkpoint;
use serde_json::Value;

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
