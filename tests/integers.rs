//! Products in integers, with activations rounded to 8 bits: what they change, and where there are none.
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too

mod common;

use common::{Place, TRAIN, few_stories};

/// Plain rounding of a model at so many bits.
fn packed(model: &str, quant: &str) -> Place {
    let place = Place::new();
    place.copy_model(model, "model");
    place.write("few.json", few_stories(12));
    place.write(
        "recipe.toml",
        format!(
            r#"output = "run"
device = "cpu"
model.path = "model"
data.validation.path = "few.json"
quant = {{ {quant} }}
[[stage]]
[stage.calibrate]
method.rtn = {{}}
[[stage]]
[stage.export]
format.fewbit = {{}}
allow_worse = true
"#
        ),
    );
    place.ok(&TRAIN);
    place
}

fn perplexity(place: &Place, compute: &str) -> f64 {
    let args = ["eval", "--model", "run", "--data", "few.json", "--context", "128", "--json"];
    let found = place.json(&[&args[..], &["--compute", compute]].concat());
    found["perplexity"].as_f64().unwrap()
}

#[test]
fn rounded_activations_hardly_change_a_model() {
    for (model, quant) in [
        ("tinystories-656k", "bits = 4, group_size = 32, symmetric = true"),
        ("tinystories-656k", "bits = 3, group_size = 64"),
        ("stories260k", "bits = 8"),
        ("stories260k", "bits = 4, group_size = 4"),
    ] {
        let place = packed(model, quant);
        let [float, int8] = ["f32", "int8"].map(|compute| perplexity(&place, compute));
        // Rounded, and not for nothing.
        assert!(float.to_bits() != int8.to_bits(), "{model}, {quant}: {float}");
        assert!((int8 / float - 1.0).abs() < 0.01, "{model}, {quant}: {int8} for {float}");
    }
}

#[test]
fn texts_come_by_it_one_or_several() {
    let place = packed("stories260k", "bits = 4, group_size = 4, symmetric = true");
    let args = ["generate", "--model", "run", "--json", "--max-new-tokens", "24"];
    let with = |more: &[&str]| {
        let found = place.ok(&[&args[..], &["--compute", "int8"], more].concat());
        let line = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap();
        found.lines().map(|found| line(found)["text"].clone()).collect::<Vec<_>>()
    };
    let alone = with(&["--prompt", "Once upon a time"]);
    let together = with(&["--prompt", "Once upon a time", "--prompt", "One day, a cat"]);
    assert_eq!(alone[0], together[0]);
    assert_eq!(together.len(), 2);
}

#[test]
fn a_model_without_such_codes_is_refused() {
    let place = Place::new();
    place.copy_model("stories260k", "model");
    for args in [
        &["generate", "--model", "model", "--prompt", "Once"][..],
        &["bench", "--model", "model", "--part", "generate", "--repeat", "1"],
    ] {
        let error = place.refused(&[args, &["--compute", "int8"]].concat());
        assert!(error.contains("--compute int8") && error.contains("--compute f32"), "{error}");
    }
    let args = ["generate", "--model", "model", "--prompt", "x", "--compute", "i8"];
    let error = place.refused_briefly(&args);
    assert!(error.contains("f32, bf16 or int8"), "{error}");
}
