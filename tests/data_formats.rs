//! Data sets of examples: only completions count, from the command line to the export's gate.
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too

mod common;

use std::collections::BTreeSet;
use std::path::PathBuf;

use burn::tensor::{DType, Device};
use common::{Place, datasets};
use fewbit::data::{ChatTemplate, DataFormat, Marks, Reader, Reading, TokenStream, Tokenizer};
use fewbit::model::{Loader, ModelConfig};
use fewbit::stop::StopFlag;
use fewbit::store::safetensors::Checkpoint;
use fewbit::task::{PplConfig, measure};
use insta::assert_snapshot;

const MODEL: &str = "embedded:tinystories-656k";

const RECIPE: &str = r#"output = "run"
device = "cpu"
model.path = "embedded:tinystories-656k"
quant.bits = 4

[data.validation]
path = "some.jsonl"
format = "completion"
length = 128

[[stage]]
[stage.calibrate]
method.rtn = {}
[[stage]]
[stage.evaluate]
task.ppl = {}
[[stage]]
[stage.export]
format.fewbit = {}
"#;

/// A place with the recipe and the first `count` examples of the E2E validation set.
fn place(count: usize) -> Place {
    let text = std::fs::read_to_string(datasets().join("e2e_nlg/validation.jsonl")).unwrap();
    let some: Vec<&str> = text.lines().take(count).collect();
    let place = Place::new();
    place.write("some.jsonl", some.join("\n"));
    place.write("recipe.toml", RECIPE);
    place
}

#[test]
fn completions_alone_are_counted() {
    let dir = datasets().join("tinystories-656k");
    let (config, device) = (ModelConfig::read(&dir).unwrap(), Device::flex());
    let source = Checkpoint::open(&dir).unwrap();
    let loader = Loader { config: &config, source: &source, device: &device, dtype: DType::F32 };
    let model = loader.model().unwrap();
    let tokenizer = Tokenizer::load(&dir).unwrap();
    let place = place(20);
    let marks = Marks { bos: config.bos, eos: config.eos.first().copied() };
    let path: PathBuf = place.path("some.jsonl");
    let template = &|| Ok(None::<ChatTemplate>);
    let vocab = tokenizer.vocab_size();
    let reader = Reader { tokenizer: &tokenizer, template, marks, length: 256, vocab };
    let stream = reader.read(&[path], &Reading::from(DataFormat::Completion)).unwrap();
    let measure = |stream: &TokenStream| {
        let (task, stop) = (PplConfig::default(), StopFlag::default());
        measure(&model, &config, stream, &task, &device, &stop, &mut |_, _| {}).unwrap()
    };
    let found = measure(&stream);
    assert_eq!((found.context, found.stride), (256, 256));
    assert_eq!((found.tokens, found.completions_only), (stream.counted() as u64, true));

    // What counts and what does not are together what text of the same tokens gives.
    let flags = stream.supervised.clone().unwrap();
    let rest = flags.iter().map(|counts| !counts).collect();
    let rest = measure(&TokenStream { supervised: Some(rest), ..stream.clone() });
    let every = TokenStream { supervised: None, ..stream.clone() };
    let all = measure(&every);
    assert!(!all.completions_only);
    // A window's first token is never predicted, flagged or not.
    assert_eq!(found.tokens + rest.tokens, all.tokens);
    let sum = |part: &fewbit::task::Perplexity| part.nll_per_token * part.tokens as f64;
    let gap = sum(&found) + sum(&rest) - sum(&all);
    assert!(gap.abs() <= 1e-6 * sum(&all), "{gap}");
    assert!((found.nll_per_token - all.nll_per_token).abs() > 0.01);

    // A window in which nothing counts is not visited.
    let mut flags = flags;
    flags[..256].fill(false);
    let fewer = measure(&TokenStream { supervised: Some(flags), ..stream });
    assert_eq!(fewer.windows, found.windows - 1);
}

#[test]
fn eval_says_what_it_counted() {
    let place = place(12);
    let args = ["eval", "--model", MODEL, "--data", "some.jsonl", "--format", "completion"];
    let packed = [&args[..], &["--context", "128"]].concat();
    let out = place.ok(&packed);
    assert!(out.contains("windows of 128 tokens, stride 128,\n"), "{out}");
    assert!(
        out.contains(
            "completion tokens only, BOS before each example, EOS behind it,\n           \
             12 examples packed whole"
        ),
        "{out}"
    );
    let json = place.json(&[&packed[..], &["--json"]].concat());
    assert_eq!((&json["format"], &json["documents"]), (&"completion".into(), &12.into()));
    let tokens = json["tokens"].as_u64().unwrap();
    let per_example = tokens as f64 / 12.0;
    assert!((20.0..80.0).contains(&per_example), "{per_example}");
    // Other windows, the same completions.
    let wide = place.json(&[&args[..], &["--context", "512", "--json"]].concat());
    assert_eq!(wide["cut"], 0);
    assert!(wide["tokens"].as_u64().unwrap() >= tokens);

    let stride = place.refused(&[&packed[..], &["--stride", "64"]].concat());
    assert_snapshot!(stride, @r"
    exit 2
    error: stride = 64, but the examples are packed into windows of 128 tokens
      at   --stride
      try  stride = 128, or leave it out
    ");
    let text = place.refused(&["eval", "--model", MODEL, "--data", "some.jsonl"]);
    assert!(text.starts_with("exit 3\nerror: the line has no `text` key"), "{text}");
    let unknown = place.run(&["eval", "--model", "x", "--data", "y", "--format", "chat"]);
    assert_eq!(unknown.code, 2);
    assert!(unknown.err.contains("text, messages, instruction"), "{}", unknown.err);
}

#[test]
fn instructions_are_read_from_a_list() {
    let place = Place::new();
    place.write(
        "some.json",
        r#"[{"instruction": "Name a pet.", "input": "", "output": "A cat."},
            {"instruction": "Say it louder.", "input": "hello", "output": "HELLO", "id": 2}]"#,
    );
    let args = ["eval", "--model", MODEL, "--data", "some.json", "--format", "instruction"];
    let json = place.json(&[&args[..], &["--context", "64", "--json"]].concat());
    assert_eq!((&json["format"], &json["documents"]), (&"instruction".into(), &2.into()));
    assert!((4..40).contains(&json["tokens"].as_u64().unwrap()), "{json}");
}

#[test]
fn a_recipe_on_completions_passes_the_gate_and_verifies() {
    let place = place(12);
    let check = place.ok(&["check", "--recipe", "recipe.toml"]);
    assert!(check.contains("data.validation packs 12 examples into"), "{check}");
    place.ok(&["train", "--recipe", "recipe.toml"]);
    let json = place.json(&["verify", "run", "--data", "some.jsonl", "--json"]);
    assert_eq!(
        (&json["parity"]["format"], &json["parity"]["context"]),
        (&"completion".into(), &128.into())
    );
    let log = place.read("run/run.log");
    assert!(log.contains("completions only"), "{log}");
    let args = ["eval", "--model", "run", "--data", "some.jsonl", "--format", "completion"];
    let eval = place.json(&[&args[..], &["--context", "128", "--json"]].concat());
    assert_eq!(eval["perplexity"], json["perplexity"]);
    assert_eq!(eval["tokens"], json["parity"]["tokens"]);
}

#[test]
fn what_a_recipe_cannot_mean_is_refused() {
    let place = place(12);
    let check = |set: &str| place.refused(&["check", "--recipe", "recipe.toml", "--set", set]);
    assert_snapshot!(check("data.validation.format=completions"), @r"
    exit 2
    error: unknown choice `completions` for `format`
      at   --set data.validation.format=completions
      try  `completion` (known here: auto, completion, instruction, messages, text, tokens)
    ");
    assert_snapshot!(check("data.validation.fromat=text"), @r"
    exit 2
    error: unknown key `fromat`
      at   --set data.validation.fromat=text
      try  `format` (known here: chat_template, chat_template_kwargs, date, format, length, mix, path, samples, train_on)
    ");
    assert_snapshot!(check("stage.1.evaluate.task.ppl.context=64"), @r"
    exit 2
    error: context = 64, but the examples are packed into windows of 128 tokens
      at   task.ppl
      try  context = 128, or leave it out
    ");
    assert_snapshot!(check("data.validation.format=instruction"), @r#"
    exit 3
    error: the line has no `instruction` key (found: prompt, completion)
      at   some.jsonl, line 1, data.validation
      try  format = "completion": the line has its keys
    "#);
}

#[test]
fn examples_that_supervise_nothing_are_refused() {
    let place = place(12);
    place.write("some.jsonl", "{\"prompt\": \"Once\", \"completion\": \"\"}\n".repeat(3));
    assert_snapshot!(place.refused(&["train", "--recipe", "recipe.toml"]), @r"
    exit 3
    error: the data set has zero supervised tokens: its 3 completions are empty or lie beyond 128 tokens
      at   some.jsonl, data.validation
      try  completions that are not empty, shorter prompts, or longer windows
    ");
    let args = ["eval", "--model", MODEL, "--data", "some.jsonl", "--format", "completion"];
    let eval = place.refused(&args);
    assert!(eval.starts_with("exit 3\nerror: the data set has zero supervised tokens"), "{eval}");
}

#[test]
fn the_built_in_sets_are_what_they_say() {
    let place = Place::new();
    // Measured with a PyTorch harness in f32, within rounding of the printed digits.
    for (model, expected) in [("stories260k", 174.9), ("tinystories-656k", 728.1)] {
        let model = datasets().join(model).display().to_string();
        let data = "embedded:tinyshakespeare/validation.json";
        let json =
            place.json(&["eval", "--model", &model, "--data", data, "--context", "256", "--json"]);
        let found = json["perplexity"].as_f64().unwrap();
        assert!((found / expected - 1.0).abs() <= 5e-4, "{model}: {found} instead of {expected}");
        assert_eq!(json["documents"], 723);
    }
    let read = |name: &str| {
        let path = datasets().join("e2e_nlg").join(name);
        fewbit::data::read_completions(&path).unwrap()
    };
    let (train, validation) = (read("train.jsonl"), read("validation.jsonl"));
    assert_eq!((train.len(), validation.len()), (1436, 204));
    let known: BTreeSet<&str> = train.iter().map(|example| &*example.prompt).collect();
    assert!(validation.iter().all(|example| !known.contains(&*example.prompt)));
}
