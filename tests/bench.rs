//! `fewbit bench` as scripts see it.
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too

mod common;

use common::Place;
use serde_json::Value;

/// Names and units of what was measured.
fn measured(found: &Value) -> Vec<(String, String)> {
    let parts = found["parts"].as_array().unwrap().iter();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    parts.map(|part| (text(&part["part"]), text(&part["unit"]))).collect()
}

#[test]
fn every_part_of_the_built_in_model() {
    let place = Place::new();
    let found =
        place.json(&["bench", "--device", "cpu", "--repeat", "3", "--length", "64", "--json"]);
    let expected = [
        ("block", "tokens"),
        ("distill", "tokens"),
        ("load", "bytes"),
        ("prompt", "tokens"),
        ("generate", "tokens"),
        ("generate", "tokens"),
        ("export", "weights"),
    ];
    let expected = expected.map(|(part, unit)| (part.to_owned(), unit.to_owned()));
    assert_eq!(measured(&found), expected);
    assert_eq!(found["model"]["parameters"], 656_000);
    assert_eq!(found["left_out"], Value::Array(Vec::new()));
    let ceiling = found["ceiling"]["flops"].as_f64().unwrap();
    for part in found["parts"].as_array().unwrap() {
        let number = |value: &Value| value.as_f64().unwrap();
        let seconds = &part["seconds"];
        assert_eq!(seconds["repeats"], 3);
        let order = ["fastest", "lower_quartile", "median", "upper_quartile", "slowest"];
        let order = order.map(|key| number(&seconds[key]));
        assert!(order[0] > 0.0 && order.is_sorted(), "{order:?}");
        let rate = number(&part["amount"]) / number(&seconds["median"]);
        assert!((number(&part["per_second"]) / rate - 1.0).abs() < 1e-9);
        match part["flops"].as_f64() {
            Some(flops) => {
                assert!((number(&part["of_ceiling"]) - flops / ceiling).abs() < 1e-9);
            }
            None => assert!(["load", "export"].contains(&part["part"].as_str().unwrap())),
        }
    }
    // What a block of two layers of 196 608 weights multiplies for 128 tokens, and attention's products.
    let block = &found["parts"][0];
    let operations =
        block["flops"].as_f64().unwrap() * block["seconds"]["median"].as_f64().unwrap();
    let weights = block_weights(&found);
    let counted = 6.0 * 128.0 * weights + 6.0 * 128.0 * 64.0 * 128.0;
    assert!((operations / counted - 1.0).abs() < 1e-9, "{operations} {counted}");
}

/// Weights of one block's linears, as the export counts them.
fn block_weights(found: &Value) -> f64 {
    let parts = found["parts"].as_array().unwrap();
    parts.last().unwrap()["amount"].as_f64().unwrap()
}

#[test]
fn lines_fit_a_terminal_and_nothing_is_left() {
    let place = Place::new();
    let text = place.ok(&["bench", "--device", "cpu", "--repeat", "1", "--part", "export,block"]);
    let wide = text.lines().find(|line| line.chars().count() > 80);
    assert_eq!(wide, None, "{text}");
    // In their own order, whatever was asked for first.
    let block = text.find("\nblock ").unwrap();
    assert!(block < text.find("\nexport ").unwrap() && !text.contains("\nprompt "), "{text}");
    assert_eq!(std::fs::read_dir(place.path("")).unwrap().count(), 0);
}

#[test]
fn a_block_of_a_large_model_needs_no_model() {
    let place = Place::new();
    let args = ["bench", "--device", "cpu", "--like", "smollm2-135m", "--repeat", "1"];
    let more = ["--part", "block", "--batch", "1", "--length", "16", "--method", "lsq", "--json"];
    let found = place.json(&[&args[..], &more].concat());
    assert_eq!(found["model"]["parameters"], 134_515_008);
    assert_eq!(found["model"]["random"], true);
    assert!(found["parts"][0]["what"].as_str().unwrap().starts_with("lsq 4 bits"));
    // Half of what the model alone would take in f32.
    if let Some(peak) = found["parts"][0]["peak_bytes"].as_u64() {
        assert!(peak < 134_515_008 * 4 / 2 + (400 << 20), "{peak}");
    }
}

#[test]
fn what_would_not_fit_is_refused_with_what_would() {
    let place = Place::new();
    let like = ["bench", "--device", "cpu", "--like", "llama-3.1-70b", "--repeat", "1"];
    let refused = place.run(&[&like[..], &["--part", "distill"]].concat());
    assert_eq!(refused.code, 3, "{}", refused.err);
    assert!(refused.err.contains("distill needs about ") && refused.err.contains("\n  try  "));
    let refused = place.run(&[&like[..], &["--part", "block", "--batch", "100000"]].concat());
    assert_eq!(refused.code, 3, "{}", refused.err);
}

#[test]
fn wrong_words_are_three_lines() {
    let place = Place::new();
    for (args, what, fix) in [
        (&["bench", "--part", "blok"][..], "no part `blok`", "block, distill, load"),
        (&["bench", "--like", "llama-9"], "`llama-9` is not known", "llama-3.1-8b"),
        (&["bench", "--method", "gptq"], "does not learn", "flexround"),
        (&["bench", "--length", "100000"], "context has 512", "--length 512"),
        (&["bench", "--like", "smollm2-135m", "--part", "load"], "in no file", "--write DIR"),
    ] {
        let ended = place.run(args);
        assert_eq!((ended.code, &*ended.out), (2, ""), "{args:?}: {}", ended.err);
        assert_eq!(ended.err.lines().count(), 3, "{}", ended.err);
        assert!(ended.err.contains(what) && ended.err.contains(fix), "{}", ended.err);
    }
    for args in [&["bench", "--write", "x"][..], &["bench", "--seconds", "0"]] {
        assert_eq!(place.run(args).code, 2, "{args:?}");
    }
}

#[test]
fn random_weights_are_a_model_like_another() {
    let place = Place::new();
    place.write(
        "config.json",
        r#"{"model_type":"llama","hidden_size":64,"intermediate_size":96,"num_hidden_layers":2,
            "num_attention_heads":4,"vocab_size":4096,"max_position_embeddings":128}"#,
    );
    let said = place.json(&["bench", "--like", "config.json", "--write", "random", "--json"]);
    assert_eq!((&said["written"], &said["seed"]), (&"random".into(), &0.into()));
    let bytes = said["bytes"].as_u64().unwrap();
    let args = ["bench", "--device", "cpu", "--model", "random", "--part", "load,prompt"];
    let found = place.json(&[&args[..], &["--repeat", "1", "--json"]].concat());
    assert_eq!(found["parts"][0]["amount"].as_f64().map(|amount| amount as u64), Some(bytes));
    let prompt = ["--prompt", "Once upon a time", "--max-new-tokens", "3"];
    place.ok(&[&["generate", "--device", "cpu", "--model", "random"][..], &prompt].concat());
    // A folder with something in it stays as it is.
    let before = place.tree("random");
    let refused = place.run(&["bench", "--like", "config.json", "--write", "random"]);
    assert_eq!(refused.code, 2, "{}", refused.err);
    assert!(refused.err.contains("not empty"), "{}", refused.err);
    assert_eq!(place.tree("random"), before);
    // And one that cannot be made is an error.
    let refused = place.run(&["bench", "--like", "config.json", "--write", "config.json/x"]);
    assert_eq!(refused.code, 1, "{}", refused.err);
    assert_eq!(refused.err.lines().count(), 3, "{}", refused.err);
}
