//! The command line from outside: the real binary, real files, exit codes and exact sentences.
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too

mod common;

use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::sync::{Arc, Mutex, Weak};

use common::{Place, copy_folder, few_stories, join_safetensors, range_of, split_safetensors};
use insta::assert_snapshot;
use serde_json::Value;

const BUILTINS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/recipes");

/// Both halves of UPQ in a few steps, with every export there is.
const TINY: &str = r#"output = "run"
device = "cpu"
model.path = "embedded:tinystories-656k"
quant.bits = 4

[data]
validation.path = "few.json"
[data.calibration]
path = "embedded:tinystories/calibration.json"
samples = 8
length = 64
[data.train]
path = "embedded:tinystories/calibration.json"
length = 64

[[stage]]
[stage.reconstruct]
method.flexround = {}
steps = 3
learning_rate = 1e-2
[[stage]]
[stage.distill]
bits = 2
method.seq = {}
objective.jsd = {}
steps = 4
batch = 4
learning_rate = 1e-3
[[stage]]
[stage.evaluate]
task.ppl = { context = 128 }
[[stage]]
[stage.export]
format.fewbit = {}
format.dequantized = {}
"#;

/// A finished run of [`TINY`], made once for the tests that overlap in time.
fn finished() -> Arc<Place> {
    static RUN: Mutex<Weak<Place>> = Mutex::new(Weak::new());
    let mut run = RUN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some(place) = run.upgrade() {
        return place;
    }
    let place = Arc::new(Place::new());
    place.write("tiny.toml", TINY);
    place.write("few.json", few_stories(12));
    place.ok(&["train", "--recipe", "tiny.toml"]);
    *run = Arc::downgrade(&place);
    place
}

/// A place with a built-in recipe as `recipe.toml`, one text replaced.
fn edited(recipe: &str, from: &str, to: &str) -> Place {
    let text = std::fs::read_to_string(format!("{BUILTINS}/{recipe}.toml")).unwrap();
    assert!(text.contains(from), "{recipe} has no {from:?}");
    let place = Place::new();
    place.write("recipe.toml", text.replacen(from, to, 1));
    place
}

/// `fewbit check` of the recipe that [`edited`] wrote.
fn check_refuses(place: &Place, set: &[&str]) -> String {
    let overrides = set.iter().flat_map(|set| ["--set", set]);
    let args: Vec<&str> =
        ["check", "--recipe", "recipe.toml"].into_iter().chain(overrides).collect();
    place.refused(&args)
}

mod words {
    use super::*;

    #[test]
    fn shells_and_manuals_know_every_command() {
        let place = Place::new();
        for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
            let script = place.ok(&["completions", shell]);
            for word in ["recipes", "preview", "report", "recipe"] {
                assert!(script.contains(word), "{shell}, {word}");
            }
        }
        let pages = place.ok(&["man", "man"]);
        for name in ["fewbit", "fewbit-train", "fewbit-data-preview", "fewbit-report"] {
            assert!(pages.contains(&format!("man/{name}.1\n")), "{pages}");
            let page = place.read(&format!("man/{name}.1"));
            assert!(page.starts_with(".ie") && page.contains(".SH NAME"), "{page}");
        }
        assert!(place.read("man/fewbit-train.1").contains("recipe"));
        assert_eq!(place.run(&["completions", "tcsh"]).code, 2);
    }

    #[test]
    fn help_names_every_command_and_version_the_version() {
        let place = Place::new();
        let help = place.ok(&["--help"]);
        let commands = [
            "train", "check", "recipes", "explain", "runs", "watch", "eval", "verify", "inspect",
            "generate", "logits", "bench", "doctor", "serve",
        ];
        for command in commands {
            assert!(help.contains(&format!("\n  {command} ")), "{command} is not in {help}");
            let text = place.ok(&[command, "--help"]);
            assert!(text.contains("Usage: fewbit") && text.contains(command), "{text}");
        }
        let version = concat!("fewbit ", env!("CARGO_PKG_VERSION"), "\n");
        assert_eq!(place.ok(&["-V"]), version);
        let long = place.ok(&["--version"]);
        assert!(long.starts_with(version.trim_end()) && long.contains("; devices: "), "{long}");
    }

    #[test]
    fn a_wrong_command_line_is_exit_code_two_and_says_what_was_meant() {
        let place = Place::new();
        for (args, hint) in [
            (&["trian"][..], "'train'"),
            (&["train"], "--recipe <R>"),
            (&["train", "--recipe", "rtn_w4g128", "--sett", "a=b"], "'--set'"),
            (&["eval", "--model", "x", "--data", "y", "--task", "glue"], "ppl"),
            (&["logits", "--model", "x", "--tokens", "1,x", "--output", "y"], "'x'"),
        ] {
            let ended = place.run(args);
            assert_eq!((ended.code, &*ended.out), (2, ""), "{args:?}");
            assert!(ended.err.starts_with("error: ") && ended.err.contains(hint), "{}", ended.err);
        }
        assert_eq!(place.run(&[]).code, 2);
    }
}

mod recipes {
    use super::*;

    #[test]
    fn are_listed_shown_and_copied_but_never_over_a_file() {
        let place = Place::new();
        let list = place.json(&["recipes", "list", "--json"]);
        let recipes = list["recipes"].as_array().unwrap();
        let text = place.ok(&["recipes", "list"]);
        let rows: Vec<&str> = text.lines().filter(|line| line.starts_with("  ")).collect();
        assert_eq!(recipes.len(), rows.len());
        for (recipe, line) in recipes.iter().zip(rows) {
            let word = |key: &str| recipe[key].as_str().unwrap();
            let (name, about) = (word("name"), word("about"));
            assert!(line.trim_start().starts_with(name) && line.ends_with(about), "{line}");
            assert!(line.contains(&format!("  {}  ", word("bits"))), "{line}");
            assert!(text.contains(&format!("{}\n", word("group"))), "{recipe}");
            let source = std::fs::read_to_string(format!("{BUILTINS}/{name}.toml")).unwrap();
            assert_eq!(place.ok(&["recipes", "show", name]), source);
            assert_eq!(place.ok(&["recipes", "show", &format!("{name}.toml")]), source);
        }
        assert_eq!(place.ok(&["recipes", "copy", "upq_int2", "mine.toml"]), "");
        assert_eq!(place.read("mine.toml"), place.ok(&["recipes", "show", "upq_int2"]));
        let again = place.refused(&["recipes", "copy", "rtn_w4g128", "mine.toml"]);
        assert_snapshot!(again, @r"
            exit 2
            error: there is such a file already
              at   mine.toml
              try  another name
        ");
        let folder = place.refused(&["recipes", "copy", "rtn_w4g128", "none/mine.toml"]);
        assert_snapshot!(folder, @r"
            exit 2
            error: there is no such folder to write to
              at   none
              try  create it first, or check the path
        ");
        let output = ["--tokens", "1", "--output", "none/l.safetensors"];
        let logits = place.refused(&[&["logits", "--model", "x/y"], &output[..]].concat());
        assert_eq!(logits, folder);
        let unknown = place.refused(&["recipes", "copy", "rtn_w4", "other.toml"]);
        assert_snapshot!(unknown, @r"
            exit 2
            error: there is no recipe `rtn_w4`
              at   the path itself, recipes/, and the built-in recipes
              try  rtn_w4g128, or `fewbit recipes list`
        ");
    }

    #[test]
    fn all_pass_the_check() {
        let place = Place::new();
        for recipe in place.json(&["recipes", "list", "--json"])["recipes"].as_array().unwrap() {
            let name = recipe["name"].as_str().unwrap();
            let text = place.ok(&["check", "--recipe", name]);
            for label in ["plan ", "model ", "needs "] {
                assert!(text.lines().any(|line| line.starts_with(label)), "{name}: {text}");
            }
            let check = place.json(&["check", "--recipe", &format!("{name}.toml"), "--json"]);
            assert_eq!(check["ok"], true);
            assert_eq!(check["model"], "tinystories-656k");
            assert_eq!(check["output"], format!("runs/{name}"));
            assert_eq!((&check["blocks"], &check["quantized"]), (&2.into(), &14.into()));
            assert!(check["plan"].as_str().unwrap().starts_with("dense → "));
            assert!(check["device"].is_string() && check["kept"].is_array());
            for key in ["host_bytes", "disk_bytes", "seconds"] {
                assert!(check["needs"][key].as_f64().unwrap() > 0.0, "{name}: {key}");
            }
            let stages = check["stages"].as_array().unwrap();
            assert!(
                stages.iter().all(|stage| stage["name"].is_string() && stage["steps"].is_u64())
            );
        }
        assert!(place.tree("").is_empty(), "check wrote something");
    }

    #[test]
    fn say_what_they_would_take_for_a_model() {
        let place = Place::new();
        place.copy_model("stories260k", "model");
        let list = place.json(&["recipes", "list", "--for", "model", "--device", "cpu", "--json"]);
        let (mut told, mut refused) = (0, 0);
        for recipe in list["recipes"].as_array().unwrap() {
            told += usize::from(recipe["needs"]["seconds"].as_f64().is_some_and(|time| time > 0.0));
            // Some groups cannot be filled in: those of stages and of factors.
            refused += usize::from(recipe["refused"].is_string());
        }
        assert!(told >= 25, "{list}");
        assert_eq!(told + refused, list["recipes"].as_array().unwrap().len());
        assert_eq!(place.tree("").keys().filter(|path| !path.starts_with("model/")).count(), 0);
        let missing = place.refused(&["recipes", "list", "--for", "nowhere"]);
        assert!(missing.contains("nowhere"), "{missing}");
    }

    #[test]
    fn a_copy_for_a_model_passes_the_check_and_keeps_its_comments() {
        let place = Place::new();
        place.copy_model("stories260k", "model");
        place.write(
            "talk.jsonl",
            "{\"text\": \"Once upon a time there was a dog.\"}\n".repeat(4000),
        );
        let told = place.ok(&[
            "recipes",
            "copy",
            "gptq_w4g128",
            "mine.toml",
            "--for",
            "model",
            "--device",
            "cpu",
            "--data",
            "talk.jsonl",
            "--validation",
            "talk.jsonl",
        ]);
        // The inputs of its linears are 64 and 172 wide: no group of a useful size divides both.
        assert!(told.contains("set       quant.group_size = \"channel\"\n"), "{told}");
        assert!(told.contains("\nneeds "), "{told}");
        let text = place.read("mine.toml");
        let original = place.ok(&["recipes", "show", "gptq_w4g128"]);
        assert_eq!(text.matches('#').count(), original.matches('#').count());
        assert!(text.contains("path = \"model\"") && text.contains("talk.jsonl"), "{text}");
        assert!(text.contains("output = \"runs/gptq_w4g128-model\""), "{text}");
        place.ok(&["check", "--recipe", "mine.toml"]);
    }

    #[test]
    fn have_a_schema_that_knows_every_key() {
        let place = Place::new();
        let schema: Value = serde_json::from_str(&place.ok(&["recipes", "schema"])).unwrap();
        assert_eq!(schema["title"], "fewbit recipe");
        assert!(schema["properties"]["quant"].is_object());
    }

    #[test]
    fn explain_their_keys() {
        let place = Place::new();
        let bits = place.ok(&["explain", "quant.bits"]);
        assert!(
            bits.starts_with("quant.bits\n") && bits.contains("an integer from 1 to 8"),
            "{bits}"
        );
        assert!(bits.contains("it has to be there") && bits.contains("4 ("), "{bits}");
        assert!(bits.lines().all(|line| line.chars().count() <= 80), "{bits}");
        let sections = place.ok(&["explain"]);
        assert!(sections.contains("stage.distill"), "{sections}");
        let json = place.json(&["explain", "steps", "--json"]);
        assert!(json["keys"].as_array().unwrap().len() >= 3);
        assert_snapshot!(place.refused(&["explain", "quant.bitz"]), @r"
            exit 2
            error: no key of a recipe is called `quant.bitz`
              at   the keys that recipes have
              try  `quant.bits`, or `fewbit explain` for the sections
        ");
    }

    #[test]
    fn a_dry_run_is_a_check() {
        let place = Place::new();
        let text = place.ok(&["train", "--recipe", "upq_int2", "--dry-run"]);
        assert!(text.starts_with("plan ") && text.contains("\nneeds "), "{text}");
        assert!(place.tree("").is_empty(), "a dry run wrote something");
    }
}

mod recipe_errors {
    use super::*;

    #[test]
    fn an_unknown_key() {
        let place = edited("flexround_w4", "learning_rate = 1e-2", "learnig_rate = 1e-2");
        assert_snapshot!(check_refuses(&place, &[]), @r"
            exit 2
            error: unknown key `learnig_rate`
              at   recipe.toml line 36:
                   36 | learnig_rate = 1e-2
                      | ^^^^^^^^^^^^
              try  `learning_rate` (known here: allow_worse, batch, bits, checkpoint_every, group_size, input_prob, keep, keep_best, learning_rate, memory, method, objective, observer, optimizer, quantize_activations, rate_unit, schedule, start_from, steps, streams, symmetric, within)
        ");
        let train = place.refused(&["train", "--recipe", "recipe.toml"]);
        assert_eq!(train, check_refuses(&place, &[]), "train and check say the same");
    }

    #[test]
    fn a_wrong_type() {
        let place = edited("rtn_w4g128", "bits = 4", "bits = \"four\"");
        assert_snapshot!(check_refuses(&place, &[]), @r#"
            exit 2
            error: `bits`: expected an integer, found string "four"
              at   recipe.toml line 20:
                   20 | bits = "four"
                      |        ^^^^^^
              try  write an integer, without quotes
        "#);
    }

    #[test]
    fn an_unknown_method() {
        let place = edited("flexround_w4", "method.flexround", "method.flexrond");
        assert_snapshot!(check_refuses(&place, &[]), @r"
            exit 2
            error: unknown choice `flexrond` for `method`
              at   recipe.toml line 33:
                   33 | method.flexrond = {}
                      |        ^^^^^^^^
              try  `flexround` (known here: adadim, alphatuning, anybcq, aqlm, aqlm_ft, awq, bcq, block_ap, e2e_qp, flexround, gptq, lrq, lsq, lwc, peqa, rtn, seq, sign, signround, ternary, uniquanf)
        ");
    }

    #[test]
    fn broken_toml() {
        let place = edited("rtn_w4g128", "[quant]", "[quant");
        assert_snapshot!(check_refuses(&place, &[]), @r"
            exit 2
            error: not valid TOML: unclosed table, expected `]`
              at   recipe.toml line 19:
                   19 | [quant
                      |       ^
              try  put strings in double quotes, and check the brackets and `=` here and just before
        ");
    }

    #[test]
    fn a_recipe_that_is_not_there() {
        let place = Place::new();
        assert_snapshot!(place.refused(&["train", "--recipe", "missing.toml"]), @r"
            exit 2
            error: there is no recipe `missing.toml`
              at   the path itself, recipes/, and the built-in recipes
              try  `fewbit recipes list`
        ");
        assert_snapshot!(place.refused(&["check", "--recipe", "upq_in2"]), @r"
            exit 2
            error: there is no recipe `upq_in2`
              at   the path itself, recipes/, and the built-in recipes
              try  upq_int2, or `fewbit recipes list`
        ");
    }

    #[test]
    fn overrides_that_lead_nowhere() {
        let place = edited("upq_int2", "seed = 0", "seed = 0");
        assert_snapshot!(check_refuses(&place, &["quant.bitz=3"]), @r"
            exit 2
            error: unknown key `bitz`
              at   --set quant.bitz=3
              try  `bits` (known here: activations, bits, group_size, kv_cache, observer, override, scales, symmetric, target)
        ");
        assert_snapshot!(check_refuses(&place, &["quant.bits"]), @r"
            exit 2
            error: `quant.bits` has no `=`
              at   --set quant.bits
              try  write --set key=value
        ");
        assert_snapshot!(check_refuses(&place, &["stage.9.distill.steps=3"]), @r"
            exit 2
            error: `stage` has 6 entries, so there is no `stage.9`
              at   --set stage.9.distill.steps=3
              try  an index from 0 to 5, or add an entry to the file
        ");
    }

    #[test]
    fn bits_out_of_range() {
        let place = edited("rtn_w4g128", "bits = 4", "bits = 9");
        assert_snapshot!(check_refuses(&place, &[]), @r"
            exit 2
            error: bits = 9 is not in 1..=8
              at   recipe.toml line 20:
                   20 | bits = 9
                      |        ^
              try  write a number from 1 to 8
        ");
    }

    #[test]
    fn a_learning_rate_below_zero() {
        let place = edited("flexround_w4", "learning_rate = 1e-2", "learning_rate = -1");
        assert_snapshot!(check_refuses(&place, &[]), @r"
            exit 2
            error: learning_rate = -1 is not a rate
              at   recipe.toml line 36:
                   36 | learning_rate = -1
                      |                 ^^
              try  write a number of at least 0
        ");
    }

    #[test]
    fn a_group_size_that_does_not_divide() {
        let place = edited("rtn_w4g128", "group_size = 128", "group_size = 100");
        assert_snapshot!(check_refuses(&place, &[]), @r"
            exit 3
            error: group_size 100 does not divide in_features 128
              at   model.layers.0.self_attn.q_proj.weight, quant.group_size (recipe line 21)
              try  group_size = 128, or a [[quant.override]] for this linear
        ");
    }

    #[test]
    fn an_override_that_matches_nothing() {
        let rule = "symmetric = false\n[[quant.override]]\nmatch = \"*.down_prj\"\nbits = 8";
        let place = edited("rtn_w4g128", "symmetric = false", rule);
        assert_snapshot!(check_refuses(&place, &[]), @r#"
            exit 2
            error: the override `*.down_prj` matches no linear
              at   quant.override.0.match (recipe line 24)
              try  "attention", "mlp", or a pattern such as "*.down_proj", "model.layers.0.*" or "lm_head"
        "#);
    }

    #[test]
    fn stages_in_an_order_that_makes_no_sense() {
        let twice = "[stage.calibrate]\nmethod.rtn = {}\n[[stage]]\n[stage.calibrate]";
        let place = edited("rtn_w4g128", "[stage.calibrate]", twice);
        assert_snapshot!(check_refuses(&place, &[]), @r"
            exit 2
            error: calibrate needs float weights, and they are quantized already
              at   stage.1.calibrate (recipe line 29)
              try  stage.reconstruct or stage.distill here, or a float model and this stage first
        ");
        let first = "[stage.export]\nformat.fewbit = {}\n[[stage]]\n[stage.calibrate]";
        let place = edited("rtn_w4g128", "[stage.calibrate]", first);
        assert_snapshot!(check_refuses(&place, &[]), @r"
            exit 2
            error: export needs quantized weights, and no earlier stage makes any
              at   stage.0.export (recipe line 26)
              try  a stage.calibrate, stage.reconstruct or stage.distill before it
        ");
    }

    #[test]
    fn a_format_that_will_not_hold_the_scales() {
        let place = Place::new();
        place.write("few.json", few_stories(4));
        place.write("recipe.toml", TINY.replace("format.dequantized", "format.gptq"));
        assert_snapshot!(check_refuses(&place, &[]), @r#"
            exit 3
            error: format.gptq holds scales of fewer digits than the f32 numbers that this plan leaves
              at   format.gptq, stage.3.export
              try  quant.scales = "f16"; or format.gptq.lossy = true, which changes weights
        "#);
        let scales = ["check", "--recipe", "recipe.toml", "--set", "quant.scales=f16"];
        place.ok(&scales);
        place.ok(&[
            "check",
            "--recipe",
            "recipe.toml",
            "--set",
            "stage.3.export.format.gptq.lossy=true",
        ]);
    }

    #[test]
    fn a_device_that_is_not_compiled_in() {
        let place = Place::new();
        let args = ["check", "--recipe", "rtn_w4g128", "--device", "abacus"];
        let error = place.refused(&args);
        let place = "\n  at   --device abacus, or `device` in the recipe\n  try  one of: auto, ";
        assert!(error.starts_with("exit 2\nerror: unknown device `abacus`"), "{error}");
        assert!(error.contains(place), "{error}");
    }
}

mod data_errors {
    use super::*;

    fn check_refuses_text(name: &str, text: &str) -> String {
        let place = edited("rtn_w4g128", "embedded:tinystories/validation.json", name);
        place.write(name, text);
        check_refuses(&place, &[])
    }

    #[test]
    fn text_that_is_too_short() {
        assert_snapshot!(check_refuses_text("short.json", "[\"Once upon a time.\"]"), @r"
            exit 3
            error: the data has 7 tokens, but one window of 256 tokens needs 256
              at   data.validation
              try  add text, or use a shorter context
        ");
        let place = edited("flexround_w4", "samples = 128", "samples = 5000");
        assert_snapshot!(check_refuses(&place, &[]), @r"
            exit 3
            error: the data has 181156 tokens, but 5000 windows of 128 tokens need 640000
              at   data.calibration
              try  add text, shorten the windows, or set samples to at most 1415
        ");
    }

    #[test]
    fn a_file_that_is_not_there() {
        let place = edited("rtn_w4g128", "embedded:tinystories/validation.json", "nowhere.json");
        assert_snapshot!(check_refuses(&place, &[]), @r"
            exit 2
            error: there is no such data file
              at   nowhere.json, data.validation
              try  check the path
        ");
    }

    #[test]
    fn a_file_that_only_the_training_text_names() {
        let place = Place::new();
        let text = TINY.replace(
            "path = \"embedded:tinystories/calibration.json\"\nsamples = 8\n",
            "samples = 8\n",
        );
        place.write("recipe.toml", text.replace("embedded:tinystories/calib", "nowhere/calib"));
        place.write("few.json", few_stories(4));
        assert_snapshot!(check_refuses(&place, &[]), @r"
            exit 2
            error: there is no such data file
              at   nowhere/calibration.json, data.train
              try  check the path
        ");
    }

    #[test]
    fn lines_that_are_not_documents() {
        let broken = "{\"text\": \"One.\"}\n{\"text\": }\n";
        assert_snapshot!(check_refuses_text("lines.jsonl", broken), @r#"
            exit 3
            error: the line is not valid JSON: expected value
              at   lines.jsonl, line 2, data.validation
              try  give {"text": "…"} on each line, a JSON list of strings, or plain text
        "#);
        let nameless = "{\"text\": \"One.\"}\n{\"txt\": \"Two.\"}\n";
        assert_snapshot!(check_refuses_text("lines.jsonl", nameless), @r#"
            exit 3
            error: the line has no `text` key (found: txt)
              at   lines.jsonl, line 2, data.validation
              try  give {"text": "…"} on each line, a JSON list of strings, or plain text
        "#);
        assert_snapshot!(check_refuses_text("empty.txt", ""), @r#"
            exit 3
            error: the file is empty
              at   empty.txt, data.validation
              try  give {"text": "…"} on each line, a JSON list of strings, or plain text
        "#);
    }
}

mod model_errors {
    use super::*;

    /// A copy of the smallest model as `model`, and a recipe for it.
    fn copied() -> Place {
        let place = edited("rtn_w4g128", "embedded:tinystories-656k", "model");
        place.copy_model("stories260k", "model");
        place
    }

    /// `check`, `train` and `eval` all refuse the folder; the first one's words.
    fn all_refuse(place: &Place) -> String {
        let channel = "quant.group_size=channel";
        let error = check_refuses(place, &[channel]);
        assert_eq!(place.refused(&["train", "--recipe", "recipe.toml", "--set", channel]), error);
        place.write("text.txt", "Once upon a time.");
        assert_eq!(place.refused(&["eval", "--model", "model", "--data", "text.txt"]), error);
        error
    }

    #[test]
    fn a_truncated_file() {
        let place = copied();
        let bytes = std::fs::read(place.path("model/model.safetensors")).unwrap();
        place.write("model/model.safetensors", &bytes[..bytes.len() / 2]);
        assert_snapshot!(all_refuse(&place), @r"
            exit 3
            error: the file is truncated: 1044992 bytes expected, 522496 found
              at   model/model.safetensors
              try  download it again
        ");
    }

    #[test]
    fn a_missing_shard() {
        let place = copied();
        let shard = "model-00001-of-00002.safetensors";
        let index = serde_json::json!({ "weight_map": { "model.norm.weight": shard } });
        place.write("model/model.safetensors.index.json", index.to_string());
        std::fs::remove_file(place.path("model/model.safetensors")).unwrap();
        assert_snapshot!(all_refuse(&place), @r"
            exit 3
            error: shard model-00001-of-00002.safetensors, which the index names, is missing
              at   model/model-00001-of-00002.safetensors
              try  download the checkpoint again
        ");
    }

    #[test]
    fn an_architecture_that_is_not_supported() {
        let place = copied();
        let config = place.read("model/config.json").replace("\"llama\"", "\"mamba\"");
        place.write("model/config.json", config);
        assert_snapshot!(all_refuse(&place), @r"
            exit 3
            error: model_type `mamba` is not supported
              at   model/config.json
              try  a model of type exaone4, gemma, gemma2, gemma3_text, gemma3, gpt2, gpt_neo, gpt_neox, gptj, granite, hyperclovax, llama, ministral3, mistral, olmo2, olmo3, opt, phi, phi3, qwen2, qwen3, qwen3_moe, smollm3
        ");
    }

    #[test]
    fn a_config_that_belongs_to_other_weights() {
        let place = copied();
        let config = place.read("model/config.json").replace("172", "176");
        place.write("model/config.json", config);
        assert_snapshot!(check_refuses(&place, &["quant.group_size=channel"]), @r"
            exit 3
            error: the tensor has shape [172, 64], config.json asks for [176, 64]
              at   model.layers.0.mlp.gate_proj.weight
              try  check that config.json belongs to these weights
        ");
    }

    #[test]
    fn a_weight_that_is_not_a_number() {
        let place = copied();
        let file = place.path("model/model.safetensors");
        let (header, mut values) = split_safetensors(&file);
        let start = range_of(&header, "model.layers.1.mlp.up_proj.weight").start;
        values[start..start + 4].copy_from_slice(&f32::NAN.to_le_bytes());
        join_safetensors(&file, &header, &values);
        let data = "embedded:tinystories/validation.json";
        let eval = place.refused(&["eval", "--model", "model", "--data", data]);
        assert_snapshot!(eval, @r"
            exit 3
            error: the tensor holds NaN at index [0, 0]
              at   model.layers.1.mlp.up_proj.weight, model/model.safetensors
              try  the checkpoint is damaged; download it again
        ");
        // Headers alone cannot show it, so the run has begun; nothing is exported.
        let args = ["train", "--recipe", "recipe.toml", "--set", "quant.group_size=channel"];
        let train = place.run(&args);
        assert!(train.code != 0 && train.err.ends_with(eval.split_once('\n').unwrap().1));
        assert!(!place.path("runs/rtn_w4g128/export").exists());
    }

    #[test]
    fn a_model_that_is_not_there() {
        let place = Place::new();
        let args = ["eval", "--model", "nowhere", "--data", "embedded:tinystories/train.json"];
        assert_snapshot!(place.refused(&args), @r"
            exit 2
            error: there is no such model
              at   nowhere
              try  a Hugging Face folder, a GGUF file, a fewbit run or export, or a hub id owner/name
        ");
    }

    #[test]
    fn tokens_and_contexts_that_the_model_does_not_have() {
        let place = copied();
        let args = ["logits", "--model", "model", "--tokens", "1,600", "--output", "l.safetensors"];
        assert_snapshot!(place.refused(&args), @r"
            exit 2
            error: token 600 is not in the model's 512
              at   --tokens
              try  ids below 512
        ");
        place.write("text.txt", "Once upon a time.");
        let args = ["eval", "--model", "model", "--data", "text.txt", "--context", "4096"];
        assert_snapshot!(place.refused(&args), @r"
            exit 2
            error: context = 4096 is not between 2 and the model's 512
              at   --context
              try  context = 512
        ");
        let args = ["eval", "--model", "model", "--data", "text.txt", "--stride", "600"];
        let stride = place.refused(&args);
        assert!(stride.starts_with("exit 2\n") && stride.contains("at   --stride\n"), "{stride}");
        let short = place.refused(&["eval", "--model", "model", "--data", "text.txt"]);
        assert!(short.starts_with("exit 3\n") && short.contains("at   text.txt\n"), "{short}");
        let many = vec!["1"; 513].join(",");
        place.refused(&["logits", "--model", "model", "--tokens", &many, "--output", "l"]);
    }
}

mod output_folder {
    use super::*;

    #[test]
    fn a_folder_of_something_else_is_left_alone() {
        let place = Place::new();
        std::fs::create_dir(place.path("photos")).unwrap();
        place.write("photos/cat.jpg", "cat");
        let train = |more: &[&'static str]| {
            let args = [&["train", "--recipe", "rtn_w4g128", "--output"], more].concat();
            place.refused(&args)
        };
        assert_snapshot!(train(&["photos"]), @r"
            exit 2
            error: the output folder holds files of something else
              at   photos/cat.jpg
              try  another --output
        ");
        assert_eq!(train(&["photos", "--fresh"]), train(&["photos"]));
        assert_snapshot!(train(&["photos/cat.jpg"]), @r"
            exit 2
            error: the output is a file
              at   photos/cat.jpg
              try  another --output
        ");
    }
}

mod results {
    use super::*;

    const DATA: &str = "embedded:tinystories/validation.json";

    fn eval(place: &Place, model: &str) -> Value {
        let args = ["eval", "--model", model, "--data", "few.json", "--context", "128", "--json"];
        place.json(&args)
    }

    #[test]
    fn eval_prints_the_protocol_with_the_number() {
        let place = finished();
        let eval = eval(&place, "embedded:tinystories-656k");
        assert_eq!((&eval["task"], &eval["bos"]), (&"ppl".into(), &true.into()));
        assert_eq!((&eval["context"], &eval["stride"]), (&128.into(), &128.into()));
        assert_eq!(eval["model"], "embedded:tinystories-656k");
        assert_eq!(eval["data_sha256"].as_str().unwrap().len(), 64);
        let (nll, tokens) = (&eval["nll_per_token"], eval["tokens"].as_u64().unwrap());
        let perplexity = eval["perplexity"].as_f64().unwrap();
        assert!((nll.as_f64().unwrap().exp() / perplexity - 1.0).abs() < 1e-9);
        assert!((20.0..60.0).contains(&perplexity), "{perplexity}");
        assert_eq!(tokens, eval["windows"].as_u64().unwrap() * 127);
        let args = ["eval", "--model", "embedded:tinystories-656k", "--data", "few.json"];
        let text = place.ok(&args);
        for word in ["perplexity ", "protocol ", "data ", "model ", "stride 512", "BOS before"] {
            assert!(text.contains(word), "{text}");
        }
    }

    #[test]
    fn both_exports_of_a_run_evaluate_bit_equal_and_as_the_run_said() {
        let place = finished();
        let number = |model: &str| eval(&place, model)["perplexity"].as_f64().unwrap().to_bits();
        let packed = number("run/export/fewbit");
        assert_eq!(packed, number("run/export/dequantized"));
        assert_eq!(packed, number("run"), "a run stands for its packed export");
        let record: Value = serde_json::from_str(&place.read("run/run.json")).unwrap();
        let measured = record["results"]["measured"].as_array().unwrap();
        let last = measured.iter().rfind(|m| m["what"] == "after distill").unwrap();
        assert_eq!(last["result"]["perplexity"].as_f64().unwrap().to_bits(), packed);
        let float = measured.iter().find(|m| m["what"] == "float").unwrap();
        let float = float["result"]["perplexity"].as_f64().unwrap().to_bits();
        assert_eq!(float, number("embedded:tinystories-656k"));
        assert_ne!(float, packed);
    }

    #[test]
    fn a_finished_run_has_the_promised_folder() {
        let place = finished();
        let files = place.tree("run");
        for name in ["recipe.toml", "run.json", "metrics.jsonl", "run.log"] {
            assert!(files.contains_key(name), "{name}");
        }
        for format in ["fewbit", "dequantized"] {
            for name in ["config.json", "model.safetensors", "tokenizer.json", "manifest.json"] {
                assert!(files.contains_key(&format!("export/{format}/{name}")), "{format}/{name}");
            }
        }
        let board = |name: &&String| name.starts_with("tensorboard/events.out.tfevents.");
        assert!(files.keys().any(|name| board(&name)));
        let events = common::events(&place.path("run/metrics.jsonl"));
        assert!(events.iter().all(|event| event["time"].is_f64() && event["event"].is_string()));
        // The resolved recipe is a recipe.
        assert!(place.ok(&["check", "--recipe", "run/recipe.toml"]).starts_with("plan "));
    }

    #[test]
    fn verify_accepts_what_was_written_and_finds_every_damage() {
        let place = finished();
        for format in ["fewbit", "dequantized"] {
            let verify = place.json(&["verify", &format!("run/export/{format}"), "--json"]);
            assert_eq!((&verify["ok"], &verify["format"]), (&true.into(), &format.into()));
            assert_eq!((&verify["linears"], &verify["dense_tensors"]), (&14.into(), &6.into()));
            assert_eq!(verify["parity"]["trained"], verify["parity"]["exported"]);
        }
        let text = place.ok(&["verify", "run/export/fewbit", "--data", "few.json"]);
        assert!(
            text.lines().all(|line| line.starts_with("ok  ")) && text.contains("again and equal")
        );

        let work = Place::new();
        let fresh = || copy_folder(&place.path("run/export/fewbit"), &work.path("packed"));
        let file = work.path("packed/model.safetensors");
        let scales = "model.layers.0.mlp.up_proj.scales";

        fresh();
        let (mut header, mut values) = split_safetensors(&file);
        values[range_of(&header, scales).start] ^= 1;
        join_safetensors(&file, &header, &values);
        assert_snapshot!(work.refused(&["verify", "packed"]), @r"
            exit 5
            error: a tensor does not match its hash
              at   packed, model.layers.0.mlp.up_proj.scales
              try  export the run again
        ");

        fresh();
        let (_, values) = split_safetensors(&file);
        let entry = header.as_object_mut().unwrap().remove(scales).unwrap();
        header["a.stranger"] = entry;
        join_safetensors(&file, &header, &values);
        assert_snapshot!(work.refused(&["verify", "packed"]), @r"
            exit 5
            error: a llama has no such tensor, and it would be left out
              at   a.stranger, packed
              try  the config.json that belongs to these weights
        ");

        for (from, to) in [("\"bits\": 2", "\"bits\": 3"), ("\"weights_sha256\": \"", "$0f")] {
            fresh();
            let to = to.replace("$0", from);
            let manifest = work.read("packed/manifest.json").replacen(from, &to, 1);
            work.write("packed/manifest.json", manifest);
            assert!(work.refused(&["verify", "packed"]).starts_with("exit 5\n"), "{to}");
        }

        fresh();
        work.write("packed/manifest.json", "{");
        assert!(work.refused(&["verify", "packed"]).starts_with("exit 5\n"));
        std::fs::remove_file(work.path("packed/manifest.json")).unwrap();
        assert!(work.refused(&["verify", "packed"]).starts_with("exit 2\n"));
    }

    #[test]
    fn inspect_shows_models_exports_runs_and_checkpoints() {
        let place = finished();
        place.copy_model("stories260k", "inspected");
        let dense = place.json(&["inspect", "inspected", "--json"]);
        assert_eq!(dense["tensors"].as_array().unwrap().len(), 47);
        assert_eq!(dense["linears"].as_array().unwrap().len(), 0);
        assert_eq!(dense["bits_per_weight"], Value::Null);

        let export = place.json(&["inspect", "run/export/fewbit", "--json"]);
        let run = place.json(&["inspect", "run", "--json"]);
        assert_eq!(run["linears"], export["linears"]);
        let block = "run/checkpoints/00-reconstruct/block-0001.safetensors";
        let block = place.json(&["inspect", block, "--json"]);
        for (what, count, bits) in [(&export, 14, 2), (&block, 7, 4)] {
            let linears = what["linears"].as_array().unwrap();
            assert_eq!(linears.len(), count);
            for linear in linears {
                assert_eq!(linear["bits"], bits);
                let codes: u64 = linear["histogram"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|n| n.as_u64().unwrap())
                    .sum();
                let sizes = [0, 1].map(|axis| linear["shape"][axis].as_u64().unwrap());
                assert_eq!(codes, sizes[0] * sizes[1], "every weight has a code");
            }
            let mean = what["bits_per_weight"].as_f64().unwrap();
            assert!(mean > f64::from(bits) && mean < f64::from(bits) + 0.5, "{mean}");
        }
        let text = place.ok(&["inspect", "run"]);
        assert!(text.contains("all 2-bit codes") && text.contains("lm_head.weight"), "{text}");
        assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
        let heading = text.lines().find(|line| line.starts_with("linear ")).unwrap();
        assert!(heading.ends_with("  bits  group  bits/weight    codes, share in %"), "{heading}");
        let text = place.ok(&["inspect", "run/checkpoints/00-reconstruct/block-0001.safetensors"]);
        assert!(text.contains("all 4-bit codes") && text.contains("q_proj.latent"), "{text}");
        assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
        let text = place.ok(&["inspect", "inspected"]);
        assert!(
            text.contains("model.embed_tokens.weight") && text.contains("47 tensors"),
            "{text}"
        );
    }

    #[test]
    fn inspect_names_what_is_no_model_and_what_is_missing() {
        let place = Place::new();
        place.write("notes.txt", "Not a model, and longer than eight bytes.");
        assert_snapshot!(place.refused(&["inspect", "notes.txt"]), @r"
            exit 3
            error: this is not a safetensors file
              at   notes.txt
              try  check the path; if it should be one, download it again
        ");
        copy_folder(&finished().path("run/export/fewbit"), &place.path("packed"));
        let file = place.path("packed/model.safetensors");
        let (mut header, values) = split_safetensors(&file);
        for part in ["codes", "scales"] {
            let name = format!("model.layers.0.mlp.up_proj.{part}");
            let entry = header.as_object_mut().unwrap().remove(&name).unwrap();
            header[part] = entry;
            join_safetensors(&file, &header, &values);
            let error = place.refused(&["inspect", "packed"]);
            assert!(error.contains("no tensor of this name"), "{error}");
            assert!(error.ends_with("try  export the run again\n"), "{error}");
        }
    }

    fn reference(model: &str) -> Value {
        let path = common::datasets().join(model).join("reference.json");
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
    }

    #[test]
    fn generate_continues_greedily_like_the_reference() {
        let reference = reference("tinystories-656k");
        let model = "embedded:tinystories-656k";
        let prompt = reference["prompt"].as_str().unwrap();
        let count = reference["greedy_ids"].as_array().unwrap().len().to_string();
        let args = ["generate", "--model", model, "--prompt", prompt, "--max-new-tokens", &count];
        let text = Place::new().ok(&args);
        // The reference shows the BOS token; we do not.
        let expected = reference["greedy_text"].as_str().unwrap();
        let expected = expected.strip_prefix("<|start_story|>").unwrap();
        assert_eq!(text.trim(), expected.trim());
    }

    #[test]
    fn logits_are_the_references() {
        let place = Place::new();
        let reference = reference("tinystories-656k");
        let ids = reference["prompt_ids"].as_array().unwrap();
        let tokens = ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
        let model = "embedded:tinystories-656k";
        place.ok(&["logits", "--model", model, "--tokens", &tokens, "--output", "l.safetensors"]);
        let (header, values) = split_safetensors(&place.path("l.safetensors"));
        assert_eq!(header["logits"]["dtype"], "F32");
        assert_eq!(header["logits"]["shape"], serde_json::json!([1, ids.len(), 2048]));
        let last = &values[(ids.len() - 1) * 2048 * 4..];
        let logit = |id: usize| f32::from_le_bytes(last[4 * id..][..4].try_into().unwrap());
        let close = |id: usize, value: &Value| {
            let expected = value.as_f64().unwrap();
            assert!((f64::from(logit(id)) - expected).abs() < 2e-3, "{id}: {}", logit(id));
        };
        for (id, value) in reference["logits_first8"].as_array().unwrap().iter().enumerate() {
            close(id, value);
        }
        for pair in reference["last_logits_top5"].as_array().unwrap() {
            close(pair[0].as_u64().unwrap() as usize, &pair[1]);
        }
    }

    #[test]
    fn a_reader_that_leaves_is_no_error() {
        let place = finished();
        for args in [&["recipes", "show", "upq_int2"][..], &["inspect", "run", "--json"]] {
            let mut child =
                place.command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
            let mut line = Vec::new();
            let mut reader = BufReader::with_capacity(1, child.stdout.take().unwrap());
            reader.read_until(b' ', &mut line).unwrap();
            drop(reader);
            let output = child.wait_with_output().unwrap();
            assert!(
                output.status.success(),
                "{args:?}: {}",
                String::from_utf8_lossy(&output.stderr)
            );
            assert!(output.stderr.is_empty());
        }
    }

    #[test]
    fn what_goes_to_a_file_has_no_control_characters() {
        let place = finished();
        let outputs = [
            place.run(&["train", "--recipe", "tiny.toml", "--output", "piped"]),
            place.run(&["eval", "--model", "run", "--data", DATA, "--windows", "2"]),
            place.run(&["inspect", "run"]),
            place.run(&["check", "--recipe", "upq_int2"]),
        ];
        let control = |text: &str| text.chars().any(|c| c.is_control() && c != '\n');
        for ended in outputs {
            assert_eq!(ended.code, 0, "{}", ended.err);
            assert!(!control(&ended.out) && !control(&ended.err), "{:?}{:?}", ended.out, ended.err);
        }
        let log = place.read("piped/run.log");
        assert!(!control(&log), "{log:?}");
    }
}

mod looking_on {
    use super::*;

    #[test]
    fn runs_are_listed_with_their_state_and_result() {
        let place = finished();
        let list = place.json(&["runs", ".", "--json"]);
        let [run] = &list["runs"].as_array().unwrap()[..] else { panic!("{list}") };
        assert_eq!((&run["state"], &run["path"]), (&"done".into(), &"./run".into()));
        assert!(run["perplexity"].as_f64().unwrap() > 1.0 && run["bytes"].as_u64().unwrap() > 0);
        assert!(run.get("process").is_none() && run.get("stage").is_none());
        let table = place.ok(&["runs", "."]);
        let rows: Vec<&str> = table.lines().collect();
        assert!(rows[0].starts_with("run  state"), "{table}");
        assert!(
            rows[1].starts_with("run  done ")
                && (rows[1].ends_with(" ago") || rows[1].ends_with("now")),
            "{table}"
        );
        let none = Place::new();
        let missing = none.run(&["runs"]);
        assert!(missing.code != 0 && missing.err.contains("runs"), "{}", missing.err);
        let empty = none.run(&["runs", "."]);
        assert_eq!((empty.code, &*empty.err), (0, "no run in .\n"));
    }

    #[test]
    fn a_run_that_is_over_is_shown_by_its_last_lines() {
        let place = finished();
        let ended = place.run(&["watch", "run", "--lines", "3"]);
        assert_eq!((ended.code, &*ended.out), (0, ""));
        assert_eq!(ended.err.lines().count(), 3, "{}", ended.err);
        assert!(ended.err.lines().last().unwrap().starts_with("done      run"), "{}", ended.err);
        assert_snapshot!(place.run(&["watch", "."]).err.replace("error", "\nerror"), @r"

            error: this is no run's folder: there is no run.json
              at   .
              try  a folder that `fewbit train` wrote, runs/NAME for instance
        ");
    }

    #[test]
    fn a_run_in_the_making_is_followed_to_its_end() {
        let place = Place::new();
        place.write("tiny.toml", TINY.replace("steps = 4", "steps = 40"));
        place.write("few.json", few_stories(12));
        let mut train = place.command(&["train", "--recipe", "tiny.toml"]);
        let mut train = train.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(train.stderr.take().unwrap()).lines();
        // The folder is there from the first stage on.
        assert!(lines.by_ref().any(|line| line.unwrap().starts_with("stage  1/4")));
        let list = place.json(&["runs", "run", "--json"]);
        let run = &list["runs"][0];
        assert_eq!(run["state"], "running");
        assert_eq!(run["process"][0], train.id());
        let watched = place.run(&["watch", "run"]);
        assert_eq!(watched.code, 0, "{}", watched.err);
        assert!(
            watched.err.lines().last().unwrap().starts_with("done      run"),
            "{}",
            watched.err
        );
        lines.for_each(drop);
        assert!(train.wait().unwrap().success());
    }
}

mod what_is_shown {
    use super::*;

    fn tiny() -> Place {
        let place = Place::new();
        place.write("tiny.toml", TINY);
        place.write("few.json", few_stories(12));
        place
    }

    #[test]
    fn quiet_is_the_last_line_and_the_results() {
        let place = tiny();
        let ended = place.run(&["train", "--recipe", "tiny.toml", "--quiet"]);
        assert_eq!(ended.code, 0, "{}", ended.err);
        assert!(ended.out.starts_with("model "), "{}", ended.out);
        let last = ended.err.lines().last().unwrap();
        assert!(last.starts_with("done "), "{}", ended.err);
        let known = |line: &&str| line.starts_with("warning") || line.starts_with(' ');
        assert!(ended.err.lines().filter(|line| !known(line)).count() <= 2, "{}", ended.err);
    }

    #[test]
    fn json_is_an_object_on_each_line_errors_too() {
        let place = tiny();
        let ended = place.run(&["train", "--recipe", "tiny.toml", "--log-format", "json"]);
        assert_eq!(ended.code, 0, "{}", ended.err);
        let events: Vec<Value> =
            ended.err.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let kinds: Vec<&str> =
            events.iter().map(|event| event["event"].as_str().unwrap()).collect();
        for kind in ["plan", "needs", "block", "step", "exported", "done"] {
            assert!(kinds.contains(&kind), "{kinds:?}");
        }
        let refused = place.run(&["--log-format", "json", "train", "--recipe", "missing"]);
        let error: Value = serde_json::from_str(&refused.err).unwrap();
        assert_eq!((refused.code, &error["exit_code"]), (2, &2.into()));
        assert_eq!(error["event"], "error");
        for args in [&["runs", "recipes-are-not-runs"][..], &["watch", "run"]] {
            std::fs::create_dir_all(place.path("recipes-are-not-runs")).unwrap();
            let ended = place.run(&[&["--log-format", "json"], args].concat());
            assert_eq!(ended.code, 0, "{}", ended.err);
            let told: Vec<Value> =
                ended.err.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
            assert!(told.iter().all(|line| line["text"].is_string()) && !told.is_empty());
        }
        let both = place.run(&["--quiet", "--log-format", "json", "recipes", "list"]);
        assert_eq!(both.code, 2);
    }
}
