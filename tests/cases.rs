//! Models and files that once went wrong in silence, each with what is right. The inputs lie in
//! `tests/cases`; a fault found is fixed as a kind and gets its input here.
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too

mod common;

use std::path::Path;

use common::{Place, TRAIN, copy_folder};
use fewbit::store::TensorSource;
use fewbit::store::safetensors::Checkpoint;

fn case(name: &str) -> Place {
    let place = Place::new();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases");
    copy_folder(&root.join(name), &place.path(""));
    place
}

/// A refusal with exit code 3 that says these things and what to do.
fn refuses(place: &Place, args: &[&str], parts: &[&str]) {
    let told = place.refused(args);
    assert!(told.starts_with("exit 3\n") && told.contains("\n  try  "), "{args:?}: {told}");
    for part in parts {
        assert!(told.contains(part), "{args:?} does not say {part}: {told}");
    }
}

const CHECK: [&str; 3] = ["check", "--recipe", "recipe.toml"];
fn logits<'a>(model: &'a str, tokens: &'a str) -> [&'a str; 7] {
    ["logits", "--model", model, "--tokens", tokens, "--output", "l.safetensors"]
}

fn logits_of(place: &Place, model: &str, tokens: &str) -> Vec<f32> {
    place.ok(&logits(model, tokens));
    let file = Checkpoint::open_file(&place.path("l.safetensors")).unwrap();
    file.read("logits").unwrap().to_f32().unwrap()
}

#[test]
fn a_tokenizer_with_more_tokens_than_the_embedding() {
    let place = case("an_added_token_beyond_the_embedding");
    let eval = ["eval", "--model", "model", "--data", "text.jsonl", "--context", "16"];
    let parts = ["65 tokens", "embedding 64"];
    refuses(&place, &eval, &parts);
    refuses(&place, &["generate", "--model", "model", "--prompt", "w1 <pad>"], &parts);
}

#[test]
fn a_start_token_beyond_the_vocabulary() {
    let place = case("bos_beyond_the_vocabulary");
    let eval = ["eval", "--model", "model", "--data", "text.jsonl", "--context", "16"];
    let generate = ["generate", "--model", "model", "--prompt", "w1"];
    for args in [&CHECK[..], &eval, &generate] {
        refuses(&place, args, &["`bos_token_id` is 128000"]);
    }
}

#[test]
fn biases_that_the_config_does_not_announce() {
    let place = case("biases_that_config_does_not_announce");
    for args in [&CHECK[..], &TRAIN, &logits("model", "1,2")] {
        refuses(&place, args, &["a bias", "model.layers.0.self_attn.k_proj.bias"]);
    }
}

#[test]
fn more_blocks_than_the_config_says() {
    let place = case("more_blocks_in_the_file_than_in_config");
    for args in [&CHECK[..], &TRAIN, &logits("model", "1,2")] {
        refuses(&place, args, &["model.layers.1", "config.json says 1"]);
    }
}

#[test]
fn tables_that_are_computed_are_left_out() {
    let place = case("rotary_buffers_in_the_checkpoint");
    place.ok(&CHECK);
    place.ok(&TRAIN);
    let folder = logits_of(&place, "out/export/gguf", "1,5,9");
    assert_eq!(logits_of(&place, "out/export/gguf/model.gguf", "1,5,9"), folder);
}

#[test]
fn a_teacher_that_is_another_model() {
    let place = case("teacher_with_another_config");
    for args in [&CHECK[..], &TRAIN] {
        refuses(&place, args, &["teacher", "its rotations", "teacher/config.json"]);
    }
    place.ok(&["train", "--recipe", "recipe.toml", "--set", "model.teacher=student"]);
}

#[test]
fn a_tied_head_is_the_embedding() {
    let place = case("tied_with_another_head");
    place.ok(&TRAIN);
    let eval = |model: &str| {
        let args = ["eval", "--model", model, "--data", "text.jsonl", "--context", "16", "--json"];
        place.json(&args)["perplexity"].as_f64().unwrap()
    };
    let (float, packed) = (eval("model"), eval("out/export/fewbit"));
    assert!((packed / float - 1.0).abs() < 0.01, "{float} {packed}");
}

#[test]
fn dtypes_that_are_not_read() {
    let place = case("dtypes_that_are_not_read");
    for (folder, dtype) in [("f64", "F64"), ("f8", "F8_E4M3"), ("i8", "I8")] {
        let set = format!("model.path={folder}");
        let args = [&CHECK[..], &["--set", &set]].concat();
        refuses(&place, &args, &[dtype, "model.safetensors", "F32, F16 or BF16"]);
    }
}

#[test]
fn configs_of_other_programs() {
    let place = case("configs_of_others");
    let model = case("rotary_buffers_in_the_checkpoint");
    copy_folder(&model.path("model"), &place.path("model"));
    for (name, parts) in [
        ("infinity", &["Infinity"][..]),
        ("factor_is_text", &["factor` is \""]),
        ("vocab_is_text", &["`vocab_size` is \""]),
        ("theta_zero", &["rope_theta` is 0"]),
        ("factor_zero", &["factor` is 0"]),
        ("eps_negative", &["`rms_norm_eps` is -"]),
        ("scaling_is_a_list", &["`rope_scaling` is ["]),
    ] {
        place.write("model/config.json", place.read(&format!("{name}.json")));
        refuses(&place, &logits("model", "1,2"), parts);
    }
    // A byte-order mark is no fault.
    place.write("model/config.json", place.read("byte_order_mark.json"));
    let told = place.failed(&logits("model", "1,2"));
    assert!(!told.contains("not valid"), "{told}");
}

#[test]
fn gptq_settings_beside_the_config() {
    let place = case("gptq_whose_config_lies_beside");
    let with = logits_of(&place, "model", "1");
    assert!(with.iter().all(|logit| logit.is_finite()));
    std::fs::remove_file(place.path("model/quantize_config.json")).unwrap();
    refuses(&place, &logits("model", "1"), &["packed", "quantization_config", "qweight"]);
}

#[test]
fn act_order_of_compressed_tensors() {
    let place = case("compressed_tensors_act_order");
    let expected: serde_json::Value = serde_json::from_str(&place.read("expected.json")).unwrap();
    let found = logits_of(&place, "model", "1,5,9,20,33");
    let rows = expected["logits"].as_array().unwrap().iter();
    let numbers: Vec<f64> = rows
        .flat_map(|row| row.as_array().unwrap())
        .filter_map(serde_json::Value::as_f64)
        .collect();
    assert_eq!(numbers.len(), found.len());
    let size = numbers.iter().fold(0.0f64, |size, x| size.max(x.abs()));
    for (found, expected) in found.iter().zip(&numbers) {
        assert!((f64::from(*found) - expected).abs() <= 1e-4 * size, "{found} {expected}");
    }
}

/// A recipe starts from whatever holds a model: the float model is what its packed weights stand for.
#[test]
fn training_starts_from_packed_folders_and_bare_files() {
    let place = Place::new();
    place.copy_model("tinystories-656k", "model");
    place.write("text.json", common::few_stories(12));
    let head = |path: &str, output: &str| {
        format!(
            "output = \"{output}\"\ndevice = \"cpu\"\nmodel.path = \"{path}\"\n\
             [data.validation]\npath = \"text.json\"\n[quant]\nscales = \"f16\"\n"
        )
    };
    let exports = "[[stage]]\n[stage.export]\nformat.gguf = {}\nformat.mlx = {}\nformat.gptq = {}\n\
                   format.awq = {}\nformat.autoround = {}\nformat.compressed_tensors = {}\n";
    let quant = "bits = 4\ngroup_size = 32\nsymmetric = true\n[[stage]]\n[stage.calibrate]\nmethod.rtn = {}\n";
    place.write("pack.toml", format!("{}{quant}{exports}", head("model", "packed")));
    place.ok(&["train", "--recipe", "pack.toml"]);
    let eval = |model: &str| {
        let args = ["eval", "--model", model, "--data", "text.json", "--context", "64", "--json"];
        place.json(&args)["perplexity"].as_f64().unwrap()
    };
    let float = eval("packed/export/mlx");
    for source in
        ["gguf", "gguf/model.gguf", "mlx", "gptq", "awq", "autoround", "compressed_tensors"]
    {
        let path = format!("packed/export/{source}");
        let again = "bits = 8\n[[stage]]\n[stage.calibrate]\nmethod.rtn = {}\n\
                     [[stage]]\n[stage.export]\nformat.fewbit = {}\nformat.dequantized = {}\n";
        let output = format!("from_{}", source.replace(['/', '.'], "_"));
        place.write("again.toml", format!("{}{again}", head(&path, &output)));
        place.ok(&["check", "--recipe", "again.toml"]);
        place.ok(&["train", "--recipe", "again.toml"]);
        for export in ["fewbit", "dequantized"] {
            let found = eval(&format!("{output}/export/{export}"));
            assert!((found / float - 1.0).abs() < 0.01, "{source} {export}: {found} {float}");
        }
    }
}
#[test]
fn a_gguf_of_a_model_without_a_tokenizer() {
    let place = case("gguf_of_a_model_without_a_tokenizer");
    refuses(&place, &CHECK, &["tokenizer.json", "format.gguf"]);
}

/// A variable of the shell that was empty: nothing is written beside the user's files, and starting over
/// removes none of them.
#[test]
fn an_output_without_a_name() {
    let place = case("an_output_without_a_name");
    for args in [&CHECK[..], &TRAIN, &[&TRAIN[..], &["--fresh"]].concat()] {
        let told = place.refused(args);
        assert!(told.starts_with("exit 2\nerror: the output has no name"), "{told}");
    }
    // The same folder by its name: it holds something else, whatever that is called.
    for output in [".", "../"] {
        let told = place.refused_briefly(&[&TRAIN[..], &["--fresh", "--output", output]].concat());
        assert!(told.starts_with("exit 2\n"), "{told}");
    }
    let files = |name: &str| place.path(name).is_file();
    assert!(files("checkpoints/mine.pt") && files("export/report.txt"));
    // In a run's own folder, too: a file that no run wrote stops what would remove it.
    let run = [&TRAIN[..], &["--output", "run"]].concat();
    place.ok(&run);
    place.write("run/export/notes.txt", "mine");
    place.ok(&run);
    let fresh = [&run[..], &["--fresh"]].concat();
    let told = place.refused(&fresh);
    assert!(told.starts_with("exit 2\n") && told.contains("run/export/notes.txt"), "{told}");
    std::fs::remove_file(place.path("run/export/notes.txt")).unwrap();
    // However deep.
    for name in ["run/checkpoints/00-calibrate/mine.pt", "run/export/fewbit/notes.txt"] {
        place.write(name, "mine");
        assert!(place.refused(&fresh).contains(name), "{name}");
        std::fs::remove_file(place.path(name)).unwrap();
    }
    place.ok(&fresh);
    assert!(files("run/export/fewbit/manifest.json"));
    let left: Vec<String> = place.tree("run").into_keys().collect();
    assert!(left.iter().all(|name| !name.contains("tmp")), "{left:?}");
    // A folder without a record is not a run's, were its names those of one.
    std::fs::remove_file(place.path("run/run.json")).unwrap();
    let told = place.refused(&run);
    assert!(told.contains("holds files of something else"), "{told}");
    let export =
        ["export", "--model", "run/export/fewbit", "--format", "dequantized", "--output", ""];
    let told = place.run(&export);
    assert_eq!(told.code, 2, "{}", told.err);
}

#[test]
fn files_that_are_no_text() {
    let place = case("files_that_are_no_text");
    let eval = |data: &'static str| {
        let model = ["eval", "--model", "embedded:tinystories-656k", "--context", "16", "--data"];
        [&model[..], &[data]].concat()
    };
    refuses(&place, &eval("utf16le.txt"), &["zero bytes", "utf16le.txt", "iconv"]);
    refuses(&place, &eval("text.jsonl.gz"), &["compressed (gzip)", "gunzip"]);
    place.write("marked.txt", b"\xff\xfeO\0n\0c\0e\0");
    refuses(&place, &eval("marked.txt"), &["zero bytes"]);
    place.write("archive.txt", b"PK\x03\x04\x14\x00\x00\x00 and so on");
    refuses(&place, &eval("archive.txt"), &["compressed (zip)"]);
    place.write(
        "prose.txt",
        "BZhang and Zoë went to the river and played with the big red ball all day.",
    );
    place.ok(&eval("prose.txt"));
    std::fs::create_dir(place.path("folder")).unwrap();
    let told = place.refused(&eval("folder"));
    assert!(told.contains("this is a folder"), "{told}");
    let told = place.refused(&eval("/dev/null"));
    assert!(told.contains("a pipe or a device"), "{told}");
    let told = place.refused(&eval("text.json"));
    assert!(told.contains("no such data file"), "{told}");
    // As examples of prompts and answers.
    let recipe = "output = \"run\"\ndevice = \"cpu\"\n[model]\npath = \"embedded:tinystories-656k\"\n\
                  [data.train]\npath = \"utf16le.txt\"\nformat = \"completion\"\nlength = 16\n[quant]\nbits = 4\n\
                  [[stage]]\n[stage.distill]\nmethod.lsq = {}\nobjective.jsd = {}\nsteps = 1\nlearning_rate = 1e-3\n";
    place.write("recipe.toml", recipe);
    refuses(&place, &CHECK, &["zero bytes"]);
}
