//! Additive codebooks from the recipe to a text: solved, learned on, stored, read back.
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too

mod common;

use std::collections::{BTreeMap, BTreeSet};

use common::{Place, TRAIN, few_stories};
use serde_json::Value;

const RECIPE: &str = r#"output = "run"
device = "cpu"
model.path = "embedded:tinystories-656k"

[data]
validation.path = "few.json"
train = { path = "text.json", length = 64 }
calibration = { path = "text.json", samples = 8, length = 64 }

[quant]
bits = 2
group_size = 64
scales = "f16"

[[stage]]
[stage.calibrate]
method.aqlm = { vector = 2, code_bits = 4, rounds = 2, beam = 1 }
[[stage]]
[stage.evaluate]
task.ppl = { context = 64 }
[[stage]]
[stage.tune_scales]
method.aqlm_ft = {}
objective.kl_forward = {}
steps = 6
batch = 4
learning_rate = 1e-2
rate_unit = "grid"
[[stage]]
[stage.evaluate]
task.ppl = { context = 64 }
[[stage]]
[stage.export]
format.fewbit = {}
format.dequantized = {}
"#;

const NAME: &str = "model.layers.0.self_attn.q_proj";

/// What stands before a stage of [`RECIPE`].
const STAGE: &str = "[[stage]]\n";
/// Parts of [`RECIPE`] by number.
const HEAD: usize = 0;
const SOLVE: usize = 1;
const EVALUATE: usize = 2;
const EXPORT: usize = 5;

/// What comes before the stages, or one of them, without [`STAGE`].
fn part(index: usize) -> &'static str {
    RECIPE.split(STAGE).nth(index).unwrap()
}

/// Codebooks and scales that learn block by block; `keys` are the method's.
fn by_block(rate: &str, keys: &str) -> String {
    format!(
        "[stage.reconstruct]\nmethod.aqlm_ft = {{ {keys} }}\nsteps = 20\nbatch = 4\n\
         learning_rate = {rate}\nrate_unit = \"grid\"\nallow_worse = true\n"
    )
}

fn place() -> Place {
    let place = Place::new();
    place.write("recipe.toml", RECIPE);
    place.write("few.json", few_stories(12));
    place.write("text.json", few_stories(40));
    place
}

fn logits(place: &Place, args: &[&str]) -> Vec<u8> {
    let all = [&["logits", "--tokens", "1,80,90", "--output", "l.safetensors"], args].concat();
    place.ok(&all);
    std::fs::read(place.path("l.safetensors")).unwrap()
}

#[test]
fn what_was_trained_is_stored_and_read_everywhere() {
    let place = place();
    place.ok(&TRAIN);
    let events = common::events(&place.path("run/metrics.jsonl"));
    let measured: Vec<f64> = events
        .iter()
        .filter(|event| event["event"] == "evaluation" && event["what"] != "float")
        .map(|event| event["perplexity"].as_f64().unwrap())
        .collect();
    assert!(matches!(&measured[..], [solved, learned] if learned < solved), "{measured:?}");

    place.ok(&["verify", "run"]);
    place.ok(&["verify", "run/export/fewbit"]);
    let read = |path: &str| -> Value { serde_json::from_str(&place.read(path)).unwrap() };
    let manifest = read("run/export/fewbit/manifest.json");
    let linear = &manifest["linears"][NAME];
    let grid = serde_json::json!({"codebook": {"books": 1, "vector": 2, "code_bits": 4}});
    assert_eq!((&linear["grid"], &linear["bits"]), (&grid, &serde_json::json!(2)));
    let inspected: Value = serde_json::from_str(&place.ok(&["inspect", "run", "--json"])).unwrap();
    let linear =
        &inspected["linears"].as_array().unwrap().iter().find(|l| l["name"] == NAME).unwrap();
    // Codes, a short scale for 64 inputs, and 16 centroids of two short numbers in 128 x 128 weights.
    let bits = 2.0 + 16.0 / 64.0 + (16.0 * 16.0 * 2.0) / (128.0 * 128.0);
    assert!((linear["bits_per_weight"].as_f64().unwrap() - bits).abs() < 1e-9, "{linear}");
    assert_eq!(linear["histogram"].as_array().unwrap().len(), 16);
    assert!(place.ok(&["inspect", "run"]).contains("1 x 4 for 2"));

    // The folder, the dense one, and the base with the adapter are one model.
    let packed = logits(&place, &["--model", "run/export/fewbit"]);
    assert!(packed == logits(&place, &["--model", "run/export/dequantized"]));
    let eval = ["eval", "--model", "run/export/fewbit", "--task", "ppl", "--data", "few.json"];
    let eval = [&eval[..], &["--context", "64", "--json"]].concat();
    let told: Value = serde_json::from_str(&place.ok(&eval)).unwrap();
    assert!((told["perplexity"].as_f64().unwrap() / measured[1] - 1.0).abs() < 1e-6, "{told}");
    place.write("solved.toml", [HEAD, SOLVE, EXPORT].map(part).join(STAGE));
    place.ok(&["train", "--recipe", "solved.toml", "--output", "solved"]);
    let adapter = ["--adapter", "run/adapters/aqlm_ft.safetensors"];
    let base = ["--model", "solved/export/fewbit"];
    assert!(packed != logits(&place, &base));
    assert!(packed == logits(&place, &[&base[..], &adapter[..]].concat()));

    // Text looks products up, and is what the dense folder writes.
    let text = |model: &str| {
        place.ok(&["generate", "--model", model, "--prompt", "Once upon", "--max-new-tokens", "12"])
    };
    assert_eq!(text("run/export/fewbit"), text("run/export/dequantized"));

    // Other formats say who holds it.
    for format in ["gguf", "gptq", "mlx", "bcq", "compressed_tensors"] {
        let ended = place.run(&["export", "--run", "run", "--format", format, "--output", "x"]);
        assert_eq!(ended.code, 3, "{format}: {}", ended.err);
        assert!(ended.err.contains("centroids of codebooks"), "{format}: {}", ended.err);
        assert!(ended.err.contains("format.fewbit"), "{format}: {}", ended.err);
        assert!(ended.err.contains("model.layers.0."), "{format}: {}", ended.err);
    }
}

#[test]
fn what_does_not_fit_is_refused_before_a_weight_is_read() {
    let place = place();
    let refused = |set: &[&str], words: &[&str]| {
        let sets = set.iter().flat_map(|key| ["--set", key]);
        let args: Vec<&str> =
            ["check", "--recipe", "recipe.toml"].into_iter().chain(sets).collect();
        let ended = place.run(&args);
        assert!([2, 3].contains(&ended.code), "{set:?}: {}", ended.err);
        assert!(words.iter().all(|word| ended.err.contains(word)), "{set:?}: {}", ended.err);
    };
    let key = |key: &str| format!("stage.0.calibrate.method.aqlm.{key}");
    let [bits, long, odd, none] = ["code_bits=8", "vector=16", "vector=3", "codebooks=0"].map(key);
    refused(&[&bits], &["1 codes of 8 bits for 2 weights are not bits = 2", "try  bits = 4"]);
    refused(&[&long], &["1 codes of 4 bits for 16 weights"]);
    refused(
        &[&odd, &key("code_bits=6")],
        &["vector = 3 does not divide group_size 64", "group_size = 66"],
    );
    refused(
        &[&odd, &key("code_bits=6"), "quant.group_size=\"channel\""],
        &["vector = 3 does not divide in_features 128", "vector = 2"],
    );
    refused(&[&none], &["codebooks = 0 is not in 1..=8"]);
    refused(&[&key("beam=17")], &["beam = 17"]);
    refused(&["quant.group_size=\"tensor\""], &["a scale for the whole matrix"]);
    refused(&["stage.4.export.format.gguf={}"], &["centroids of codebooks", "format.fewbit"]);
    refused(&["stage.2.tune_scales.method={peqa={}}"], &["peqa"]);
    // Codebooks learn behind a stage that left some, in the bits and groups that it left.
    let learn = by_block("1e-2", "");
    place.write("recipe.toml", [part(HEAD), &learn].join(STAGE));
    refused(&[], &["aqlm_ft goes on from codebook codes, and the weights are dense here"]);
    place.write("recipe.toml", [part(HEAD), part(SOLVE), &learn].join(STAGE));
    place.ok(&["check", "--recipe", "recipe.toml"]);
    let stays =
        "method.aqlm_ft leaves codes as they are, which are w2g64, and this stage asks for ";
    refused(
        &["stage.1.reconstruct.bits=4"],
        &[&format!("{stays}w4g64"), "the bits and group_size"],
    );
    refused(&["stage.1.reconstruct.group_size=32"], &[&format!("{stays}w2g32")]);
    // Two names of a whole row.
    let rows = ["quant.group_size=\"channel\"", "stage.1.reconstruct.group_size=128"];
    let rows = rows.iter().flat_map(|set| ["--set", set]);
    let mlp = ["--set", "quant.override=[{match=\"mlp\",keep=true}]"];
    let args = ["check", "--recipe", "recipe.toml"].into_iter().chain(rows).chain(mlp);
    place.ok(&args.collect::<Vec<_>>());
}

/// The errors of each block, `[before, after]`, as a stage reported them.
fn errors(place: &Place, stage: usize) -> Vec<[f64; 2]> {
    let events = common::events(&place.path("run/metrics.jsonl"));
    let blocks = events.iter().filter(|e| e["event"] == "block" && e["stage"] == stage);
    blocks.map(|e| ["mse_before", "mse_after"].map(|key| e[key].as_f64().unwrap())).collect()
}

/// Tensors of a stage's folder under `checkpoints/`, by name.
fn tensors(place: &Place, stage: &str) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    for path in std::fs::read_dir(place.path(&format!("run/checkpoints/{stage}"))).unwrap() {
        let (header, values) = common::split_safetensors(&path.unwrap().path());
        for name in header.as_object().unwrap().keys().filter(|name| *name != "__metadata__") {
            found.insert(name.clone(), values[common::range_of(&header, name)].to_vec());
        }
    }
    found
}

/// Both built-in models, with the groups that divide their linears.
const MODELS: [(&str, &str); 2] =
    [("embedded:tinystories-656k", "64"), ("stories260k", "\"channel\"")];

#[test]
fn blocks_come_nearer_to_the_float_ones_by_codebooks_and_scales_alone() {
    for (model, group) in MODELS {
        let run = |rate: &str, keys: &str| {
            let place = place();
            place.copy_model("stories260k", "stories260k");
            let learn = by_block(rate, keys);
            place.write("recipe.toml", [part(HEAD), part(SOLVE), &learn].join(STAGE));
            let [model, group] =
                [format!("model.path={model}"), format!("quant.group_size={group}")];
            place.ok(&[&TRAIN[..], &["--set", &model, "--set", &group]].concat());
            place
        };
        let still = run("0.0", "");
        let (solved, kept) = (tensors(&still, "00-calibrate"), tensors(&still, "01-reconstruct"));
        assert!(solved.len() >= 2 * 7 * 3, "{model}: {} tensors", solved.len());
        assert!(solved == kept, "{model}: a stage at rate 0 changed what the solver left");

        let trained = run("1e-2", "");
        let [before, after] = [errors(&still, 1), errors(&trained, 1)];
        assert!(after.iter().all(|[start, end]| *end < 0.98 * start), "{model}: {after:?}");
        // The first block starts alike; later ones read what the fitted ones put out, not the solved ones.
        assert_eq!(before[0][0].to_bits(), after[0][0].to_bits(), "{model}");
        let nearer = before[1..].iter().zip(&after[1..]).all(|([was, _], [is, _])| is < was);
        assert!(before.len() == after.len() && nearer, "{model}: {before:?} {after:?}");

        // Codes stay; codebooks and scales move, or what is named of them.
        let moved = |place: &Place| -> BTreeSet<String> {
            let now = tensors(place, "01-reconstruct");
            assert!(now.keys().eq(solved.keys()), "{model}: other tensors");
            let other = now.into_iter().filter(|(name, bytes)| solved[name] != *bytes);
            other.map(|(name, _)| name.rsplit('.').next().unwrap().to_owned()).collect()
        };
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        assert_eq!(moved(&trained), names(&["codebooks", "scales"]), "{model}");
        let books = run("1e-2", "learn = \"codebooks\"");
        assert_eq!(moved(&books), names(&["codebooks"]), "{model}");
    }
}

/// One input a code: 2^bits free levels for a linear, a scale for each group of it.
#[test]
fn scalar_codebooks_are_solved_learned_and_read_everywhere() {
    for bits in [4, 3, 2] {
        let place = place();
        let learn = by_block("1e-2", "");
        let baseline = format!("{}baselines = [\"rtn\"]\n", part(EVALUATE));
        let parts = [part(HEAD), part(SOLVE), &baseline, &learn, part(EVALUATE), part(EXPORT)];
        place.write("recipe.toml", parts.join(STAGE));
        let sets = [
            format!("quant.bits={bits}"),
            "stage.0.calibrate.method.aqlm.vector=1".to_owned(),
            format!("stage.0.calibrate.method.aqlm.code_bits={bits}"),
            "stage.4.export.allow_worse=true".to_owned(),
        ];
        let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
        place.ok(&[&TRAIN[..], &sets].concat());
        let events = common::events(&place.path("run/metrics.jsonl"));
        let perplexity = |what: &str| {
            let of = |e: &&Value| e["event"] == "evaluation" && e["what"] == what;
            events.iter().find(of).unwrap()["perplexity"].as_f64().unwrap()
        };
        let [plain, solved] =
            [format!("rtn w{bits}"), "after calibrate".to_owned()].map(|what| perplexity(&what));
        assert!(solved < plain, "{bits} bits: {solved} beside {plain} of evenly spaced levels");
        assert!(errors(&place, 2).iter().all(|[start, end]| end < start), "{bits} bits");

        place.ok(&["verify", "run"]);
        place.ok(&["verify", "run/export/fewbit"]);
        let told = place.ok(&["inspect", "run/export/fewbit"]);
        assert!(told.contains(&format!("1 x {bits} for 1")), "{told}");
        let packed = logits(&place, &["--model", "run/export/fewbit"]);
        assert!(packed == logits(&place, &["--model", "run/export/dequantized"]), "{bits} bits");
        let eval = ["eval", "--model", "run/export/fewbit", "--task", "ppl", "--data", "few.json"];
        let eval = [&eval[..], &["--context", "64", "--json"]].concat();
        let told: Value = serde_json::from_str(&place.ok(&eval)).unwrap();
        let after = perplexity("after reconstruct");
        assert!((told["perplexity"].as_f64().unwrap() / after - 1.0).abs() < 1e-6, "{told}");
        let text = |model: &str| {
            let prompt = ["generate", "--model", model, "--prompt", "Once upon"];
            place.ok(&[&prompt[..], &["--max-new-tokens", "12"]].concat())
        };
        assert_eq!(text("run/export/fewbit"), text("run/export/dequantized"), "{bits} bits");

        // Each of the weights is one of 2^bits levels times its group's scale.
        let (header, values) =
            common::split_safetensors(&place.path("run/export/dequantized/model.safetensors"));
        let of = &values[common::range_of(&header, &format!("{NAME}.weight"))];
        let weights = of.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
        let group: BTreeSet<u32> = weights.take(64).map(f32::to_bits).collect();
        assert!((2..=1 << bits).contains(&group.len()), "{} levels in {bits} bits", group.len());
    }
}
