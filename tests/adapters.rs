//! Scale adapters from outside: on the command line, in a chat, applied, compared, refused.
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too

mod common;

use std::io::Write;
use std::process::Stdio;
use std::sync::{Arc, Mutex, Weak};

use burn::tensor::DType;
use common::{Ended, Place, few_stories, join_safetensors, range_of, split_safetensors};
use fewbit::device;
use fewbit::export::{Adapter, Adapters, open_model};
use fewbit::model::{CausalLm, Loader, Positions};
use insta::assert_snapshot;
use serde_json::{Value, json};

/// A packed base alone.
const BASE: &str = r#"output = "base"
device = "cpu"
model.path = "embedded:tinystories-656k"
quant.bits = 4
data.validation.path = "few.json"
[[stage]]
[stage.calibrate]
method.rtn = {}
[[stage]]
[stage.export]
format.fewbit = {}
format.dequantized = {}
"#;

const TOKENS: &str = "1,15,300,7,44,1023,9";

/// Two bases; two runs and one in half precision on the first, one on the second. Made once for
/// the tests that overlap in time, and only read by them.
fn runs() -> Arc<Place> {
    static RUNS: Mutex<Weak<Place>> = Mutex::new(Weak::new());
    let mut runs = RUNS.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some(place) = runs.upgrade() {
        return place;
    }
    let place = Arc::new(Place::new());
    place.write("few.json", few_stories(12));
    place.write("base.toml", BASE);
    let signs = BASE.replace("rtn = {}", "bcq = { solve = \"alternating\", rounds = 15 }");
    place.write("signs.toml", signs.replace("bits = 4", "bits = 3"));
    place.ok(&["train", "--recipe", "base.toml"]);
    place.ok(&["train", "--recipe", "signs.toml", "--output", "signs_base"]);
    tuned(&place, "peqa_w4", "peqa", &[]);
    tuned(&place, "peqa_w4", "other", &["seed=5", "stage.2.tune_scales.adapter.name=other"]);
    tuned(&place, "peqa_w4", "half", &["stage.2.tune_scales.adapter.dtype=f16"]);
    tuned(&place, "alphatuning_w3", "signs", &[]);
    *runs = Arc::downgrade(&place);
    place
}

fn tuned(place: &Place, recipe: &str, output: &str, set: &[&str]) {
    let short = [
        "stage.2.tune_scales.steps=3",
        // Three steps need not be good ones.
        "stage.2.tune_scales.validate.keep_best=false",
        "stage.2.tune_scales.allow_worse=true",
        "stage.4.export.allow_worse=true",
        "data.validation.path=few.json",
        "device=cpu",
    ];
    let set = short.iter().chain(set).flat_map(|set| ["--set", set]);
    let args = ["train", "--recipe", recipe, "--output", output];
    place.ok(&args.into_iter().chain(set).collect::<Vec<_>>());
}

/// The base of a run, and the run.
const PAIRS: [(&str, &str); 4] =
    [("base", "peqa"), ("base", "other"), ("base", "half"), ("signs_base", "signs")];

fn at(place: &Place, name: &str) -> String {
    place.path(name).display().to_string()
}

fn file_of(run: &str) -> String {
    let name = match run {
        "signs" => "alphatuning",
        "other" => "other",
        _ => "peqa",
    };
    format!("{run}/adapters/{name}.safetensors")
}

/// Bytes of the logits that the command line writes.
fn logits(place: &Place, model: &str, adapter: Option<&str>) -> Vec<u8> {
    let work = Place::new();
    let model = at(place, model);
    let mut args = vec!["logits", "--model", &model, "--tokens", TOKENS, "--output", "l"];
    let file = adapter.map(|file| at(place, file));
    args.extend(file.iter().flat_map(|file| ["--adapter", file.as_str()]));
    work.ok(&args);
    split_safetensors(&work.path("l")).1
}

fn eval(place: &Place, model: &str, adapter: Option<&str>) -> Value {
    let mut args =
        vec!["eval", "--model", model, "--data", "few.json", "--context", "128", "--json"];
    args.extend(adapter.iter().flat_map(|file| ["--adapter", file]));
    place.json(&args)
}

mod applied {
    use super::*;

    #[test]
    fn an_adapter_on_its_base_is_the_export_of_its_run() {
        let place = runs();
        for (base, run) in PAIRS {
            let expected = logits(&place, run, None);
            assert_eq!(logits(&place, base, Some(&file_of(run))), expected, "{run}");
            // A run stands for its adapter, and what it exported has the base's codes.
            assert_eq!(logits(&place, base, Some(run)), expected, "{run}");
            assert_eq!(logits(&place, run, Some(run)), expected, "{run}");
            assert_ne!(logits(&place, base, None), expected, "{run}");
        }
        assert_eq!(logits(&place, "other", Some("peqa")), logits(&place, "peqa", None));
        let both = eval(&place, "base", Some("peqa"));
        assert_eq!(both["perplexity"], eval(&place, "peqa", None)["perplexity"]);
        assert_eq!(both["adapter"]["name"], "peqa");
        assert_eq!(both["adapter"]["path"], file_of("peqa"));
        assert_eq!(both["adapter"]["sha256"].as_str().unwrap().len(), 64);
        let base = eval(&place, "base", None);
        assert!(base["adapter"].is_null() && base["perplexity"] != both["perplexity"]);
        let line = ["eval", "--model", "base", "--data", "few.json", "--adapter", "peqa"];
        let text = place.ok(&line);
        assert!(
            text.contains("\nadapter    peqa peqa/adapters/peqa.safetensors sha256 "),
            "{text}"
        );
    }

    #[test]
    fn half_precision_takes_half_the_bytes() {
        let place = runs();
        let values = |run: &str| split_safetensors(&place.path(&file_of(run))).1.len();
        assert_eq!(2 * values("half"), values("peqa"));
    }

    #[test]
    fn applying_writes_what_the_run_exported() {
        let (place, work) = (runs(), Place::new());
        for (base, run) in PAIRS {
            let (model, adapter) = (at(&place, base), at(&place, run));
            let apply = ["adapter", "apply", "--model", &model, "--adapter", &adapter];
            work.ok(&[&apply[..], &["--output", "new"]].concat());
            work.ok(&["verify", "new"]);
            let bytes = |place: &Place, dir: &str| {
                std::fs::read(place.path(&format!("{dir}/model.safetensors"))).unwrap()
            };
            assert!(bytes(&work, "new") == bytes(&place, &format!("{run}/export/fewbit")), "{run}");
            let manifest: Value = serde_json::from_str(&work.read("new/manifest.json")).unwrap();
            let inspect = work.json(&["adapter", "inspect", &adapter, "--json"]);
            assert_eq!(manifest["adapter"], inspect["adapter"]);
            let own: Value =
                serde_json::from_str(&place.read(&format!("{run}/export/fewbit/manifest.json")))
                    .unwrap();
            assert_eq!(manifest["linears"], own["linears"], "{run}");
            assert_eq!(manifest["dense"], own["dense"], "{run}");
            assert!(own.get("adapter").is_none());
        }
    }

    #[test]
    fn every_format_is_written_from_a_run_and_from_a_base_with_an_adapter() {
        let (place, work) = (runs(), Place::new());
        let (run, base, data) = (at(&place, "peqa"), at(&place, "base"), at(&place, "few.json"));
        let perplexity = |model: &str| {
            let args = ["eval", "--model", model, "--data", &data, "--context", "128", "--json"];
            work.json(&args)["perplexity"].as_f64().unwrap().to_bits()
        };
        for format in ["fewbit", "dequantized"] {
            for source in [&["--run", &run][..], &["--model", &base, "--adapter", &run]] {
                let to = ["--format", format, "--output", "new", "--data", &data];
                let text = work.ok(&[&["export"], source, &to].concat());
                assert!(text.starts_with("exported   new\nformat     "), "{text}");
                assert!(text.contains("logits and perplexity "), "{text}");
                let verify = work.json(&["verify", "new", "--data", &data, "--json"]);
                assert_eq!(verify["format"], format);
                assert_eq!(verify["perplexity"], verify["parity"]["exported"]);
                assert_eq!(perplexity("new"), perplexity(&run), "{format}");
            }
        }
        // A dense folder says nothing of codes.
        let config: Value = serde_json::from_str(&work.read("new/config.json")).unwrap();
        assert!(config.get("quantization_config").is_none());
    }

    #[test]
    fn an_output_that_is_something_else_is_left_alone() {
        let (place, work) = (runs(), Place::new());
        common::copy_folder(&place.path("peqa/export/fewbit"), &work.path("packed"));
        std::fs::create_dir(work.path("photos")).unwrap();
        work.write("photos/cat.jpg", "cat");
        let export = |output: &str| {
            work.refused(&["export", "--model", "packed", "--format", "fewbit", "--output", output])
        };
        assert_snapshot!(export("photos"), @r"
            exit 2
            error: the output folder holds files of something else
              at   photos/cat.jpg
              try  another --output
        ");
        assert_snapshot!(export("photos/cat.jpg"), @r"
            exit 2
            error: the output is no folder
              at   photos/cat.jpg
              try  another --output
        ");
        assert_snapshot!(export("packed"), @r"
            exit 2
            error: the output folder would replace what is read
              at   packed
              try  another --output
        ");
        common::copy_folder(&work.path("packed"), &work.path("mine"));
        work.write("mine/notes.txt", "notes");
        assert!(export("mine").contains("  at   mine/notes.txt\n"));
        work.write("no.json", "{}");
        let run = ["export", "--run", "packed", "--format", "fewbit", "--output", "new"];
        assert_snapshot!(work.refused(&run), @r"
            exit 2
            error: this is no run's folder: it has no run.json
              at   packed
              try  a folder that `fewbit train` wrote, or --model for another packed folder
        ");
        let dense = at(&place, "base/export/dequantized");
        let dense = ["export", "--model", &dense, "--format", "fewbit", "--output", "new"];
        let error = work.refused(&dense);
        assert!(error.starts_with("exit 3\nerror: nothing of this model is quantized"), "{error}");
    }
}

mod refused {
    use super::*;

    #[test]
    fn a_base_that_the_adapter_was_not_trained_on() {
        let (place, work) = (runs(), Place::new());
        let adapter = at(&place, "peqa");
        // What is at the output already stays.
        common::copy_folder(&place.path("peqa/export/fewbit"), &work.path("new"));
        let apply = |model: &str| {
            let args = ["adapter", "apply", "--model", model, "--adapter", &adapter];
            let error = work.refused(&[&args[..], &["--output", "new"]].concat());
            assert!(error.starts_with("exit 6\n"), "{error}");
            let eval = ["eval", "--model", model, "--data", "embedded:tinystories/validation.json"];
            assert_eq!(work.refused(&[&eval[..], &["--adapter", &adapter]].concat()), error);
            let chat = ["chat", "--model", model, "--adapter", &adapter];
            assert_eq!(work.refused(&chat), error);
            error
        };
        let bits = apply(&at(&place, "signs_base"));
        let sentence = "the adapter belongs to another base: 128 x 384 in 3 bits and groups of 384, \
                        not 128 x 384 in 4 bits and groups of 384";
        assert!(bits.contains(sentence), "{bits}");

        let dense = apply(&at(&place, "base/export/dequantized"));
        assert!(dense.contains("this model is not packed by fewbit"), "{dense}");
        assert!(dense.contains("try  the packed base it was trained on"), "{dense}");
        assert_eq!(apply("embedded:tinystories-656k").lines().nth(1), dense.lines().nth(1));

        work.copy_model("stories260k", "model");
        let other = BASE.replace("embedded:tinystories-656k", "model");
        let other = other.replace("data.validation.path = \"few.json\"\n", "");
        work.write("other.toml", other);
        work.ok(&["train", "--recipe", "other.toml", "--output", "other"]);
        assert!(apply("other").contains("the adapter belongs to another base: "));

        common::copy_folder(&place.path("base/export/fewbit"), &work.path("damaged"));
        let file = work.path("damaged/model.safetensors");
        let (header, mut values) = split_safetensors(&file);
        values[range_of(&header, "model.layers.1.mlp.up_proj.codes").start] ^= 1;
        join_safetensors(&file, &header, &values);
        assert_snapshot!(apply("damaged"), @r"
            exit 6
            error: the adapter belongs to another base: the codes do not match their hash
              at   adapter peqa, model.layers.1.mlp.up_proj, damaged
              try  the base it was trained on, made from tinystories-656k
        ");
    }

    #[test]
    fn files_that_are_no_adapters() {
        let (place, work) = (runs(), Place::new());
        let base = at(&place, "base");
        let bytes = std::fs::read(place.path(&file_of("peqa"))).unwrap();
        work.write("short.safetensors", &bytes[..bytes.len() / 2]);
        let mut damaged = bytes;
        *damaged.last_mut().unwrap() ^= 1;
        work.write("damaged.safetensors", &damaged);
        work.write("notes.txt", "Not an adapter, and longer than eight bytes.");
        let model = place.path("peqa/export/fewbit/model.safetensors");
        work.write("model.safetensors", std::fs::read(model).unwrap());
        std::fs::create_dir(work.path("empty")).unwrap();
        std::fs::create_dir(work.path("two")).unwrap();
        for run in ["peqa", "other"] {
            let file = std::fs::read(place.path(&file_of(run))).unwrap();
            work.write(&format!("two/{run}.safetensors"), file);
        }
        let mut errors = String::new();
        for file in [
            "short.safetensors",
            "damaged.safetensors",
            "notes.txt",
            "model.safetensors",
            "missing.safetensors",
            "empty",
            "two",
        ] {
            let args = ["logits", "--model", &base, "--tokens", "1", "--output", "l", "--adapter"];
            let error = work.refused(&[&args[..], &[file]].concat());
            let inspect = work.refused(&["adapter", "inspect", file]);
            assert_eq!(inspect, error);
            errors += &error;
        }
        let errors = errors.replace("\nexit ", "\n\nexit ");
        let sizes = format!("{} bytes expected, {} found", damaged.len(), damaged.len() / 2);
        let errors = errors.replace(&sizes, "SIZES");
        assert_snapshot!(errors, @r"
            exit 3
            error: the file is no adapter of fewbit's: the file is truncated: SIZES
              at   short.safetensors
              try  a file under a run's adapters/

            exit 3
            error: the adapter is damaged: its values do not match their hash
              at   damaged.safetensors
              try  another copy of it

            exit 3
            error: the file is no adapter of fewbit's: this is not a safetensors file
              at   notes.txt
              try  a file under a run's adapters/

            exit 3
            error: the file is no adapter of fewbit's: its metadata do not say so
              at   model.safetensors
              try  a file under a run's adapters/

            exit 2
            error: there is no such adapter
              at   missing.safetensors
              try  a file under a run's adapters/

            exit 2
            error: the folder holds no adapter
              at   empty
              try  a file under a run's adapters/, or the run

            exit 2
            error: the folder holds 2 adapters
              at   two
              try  one of them: two/other.safetensors
        ");
    }
}

mod shown {
    use super::*;

    #[test]
    fn inspect_says_what_an_adapter_is() {
        let place = runs();
        for (run, method, dtype, bits, part) in [
            ("peqa", "peqa", "f32", 4, "scales"),
            ("half", "peqa", "f16", 4, "scales"),
            ("signs", "alphatuning", "f32", 3, "alpha_1"),
        ] {
            let file = file_of(run);
            let shown = place.json(&["adapter", "inspect", &file, "--json"]);
            assert_eq!(place.json(&["inspect", &file, "--json"]), shown);
            assert_eq!(shown["adapter"]["method"], method);
            assert_eq!(shown["adapter"]["base"], "tinystories-656k");
            assert_eq!((&shown["dtype"], &shown["numbers"]), (&dtype.into(), &2560.into()));
            let bytes = std::fs::metadata(place.path(&file)).unwrap().len();
            assert_eq!(shown["bytes"].as_u64().unwrap(), bytes);
            let linears = shown["linears"].as_array().unwrap();
            assert_eq!(linears.len(), 14);
            assert!(linears.iter().all(|l| l["bits"] == bits && l["part"] == part));
            let text = place.ok(&["adapter", "inspect", run]);
            assert_eq!(text, place.ok(&["inspect", &file]));
            assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
            let each = if dtype == "f16" { 2 } else { 4 };
            for words in [
                format!(", by {method}, in {dtype}\nbase       tinystories-656k sha256 "),
                format!("\nholds      {part} of 14 linears\n"),
                format!("\n2560 numbers of {each} bytes: "),
            ] {
                assert!(text.contains(&words), "{words:?} in {text}");
            }
        }
    }

    #[test]
    fn diff_says_how_far_two_are_apart() {
        let place = runs();
        let diff = |a: &str, b: &str| place.json(&["adapter", "diff", a, b, "--json"]);
        let same = diff("peqa", "peqa");
        assert_eq!((&same["same_base"], &same["equal"]), (&true.into(), &true.into()));
        assert_eq!(same["scales"], json!({ "mean": 0.0, "largest": 0.0, "numbers": 2560 }));
        let seeds = diff("peqa", "other");
        assert_eq!((&seeds["same_base"], &seeds["equal"]), (&true.into(), &false.into()));
        assert_eq!(seeds["scales"], diff("other", "peqa")["scales"]);
        let half = diff("peqa", "half");
        let largest = half["scales"]["largest"].as_f64().unwrap();
        assert!(largest > 0.0 && largest <= 2f64.powi(-11), "{largest}");
        let kinds = diff("peqa", "signs");
        assert_eq!((&kinds["same_base"], &kinds["equal"]), (&false.into(), &false.into()));
        let states = kinds["linears"].as_array().unwrap().iter();
        assert!(states.map(|l| &l["difference"]["state"]).all(|state| state == "other_shape"));
        for (a, b, words) in [
            ("peqa", "peqa", "\nequal in every number\n"),
            ("peqa", "half", "\nbase       the same, made from tinystories-656k\n"),
            ("peqa", "other", "\n2560 scales: a mean change of "),
            ("peqa", "signs", "not the same: both from tinystories-656k, packed differently\n"),
        ] {
            let text = place.ok(&["adapter", "diff", a, b]);
            assert!(text.contains(words), "{words:?} in {text}");
            assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        }
    }

    #[test]
    fn help_fits_the_screen() {
        let place = Place::new();
        let commands: [&[&str]; 6] = [
            &["adapter"],
            &["adapter", "inspect"],
            &["adapter", "diff"],
            &["adapter", "apply"],
            &["export"],
            &["chat"],
        ];
        let all = place.ok(&["--help"]);
        for command in commands {
            let mut help = place.command(&[command, &["--help"]].concat());
            let output = help.env("COLUMNS", "100").output().unwrap();
            let text = Ended::from(&output).out;
            assert!(text.contains(&format!("Usage: fewbit {} ", command.join(" "))), "{text}");
            assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
            assert!(all.contains(&format!("\n  {} ", command[0])), "{all}");
        }
        let chat = place.ok(&["chat", "--help"]);
        assert!(chat.contains("chat template,") && chat.contains("/help"), "{chat}");
    }
}

mod switching {
    use super::*;

    #[test]
    fn adapters_come_and_go_bit_for_bit() {
        let place = runs();
        let opened = open_model(&place.path("base/export/fewbit")).unwrap();
        let device = device::open("cpu").unwrap().device;
        let loader =
            Loader { config: &opened.config, source: &opened, device: &device, dtype: DType::F32 };
        let mut model = loader.model().unwrap().with_tap(opened.tap());
        let tokens: Vec<u32> = TOKENS.split(',').map(|id| id.parse().unwrap()).collect();
        let logits_of = |model: &CausalLm| -> Vec<u8> {
            let positions = Positions::new(&opened.config, 0, tokens.len(), model.dtype(), &device);
            let hidden = model.hidden(CausalLm::tokens(&[&tokens], &device), &positions);
            let logits = model.logits(hidden.reshape([tokens.len(), opened.config.d_model]));
            logits.into_data().iter::<f32>().flat_map(f32::to_le_bytes).collect()
        };
        let read = |run: &str| Adapter::read(&place.path(&file_of(run))).unwrap();
        let named = ["peqa", "other", "half"].map(|run| (run.to_owned(), read(run)));
        let mut adapters = Adapters::new(&opened, &named).unwrap();
        let base = logits(&place, "base", None);
        assert_eq!((logits_of(&model), adapters.on()), (base.clone(), None));
        for name in [Some("peqa"), Some("other"), Some("peqa"), None, Some("half"), None] {
            adapters.switch(&mut model, name).unwrap();
            assert_eq!(adapters.on(), name);
            let expected = name.map_or_else(|| base.clone(), |run| logits(&place, run, None));
            assert_eq!(logits_of(&model), expected, "{name:?}");
        }
        let error = adapters.switch(&mut model, Some("third")).unwrap_err();
        assert_eq!((error.kind().exit_code(), logits_of(&model)), (2, base));
        let wrong = Adapters::new(&opened, &[("signs".to_owned(), read("signs"))]).unwrap_err();
        assert_eq!(wrong.kind().exit_code(), 6);
    }

    fn chat(args: &[&str], input: &[u8]) -> Ended {
        let place = runs();
        let mut command = place.command(&[&["chat"], args].concat());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(input).unwrap();
        Ended::from(&child.wait_with_output().unwrap())
    }

    #[test]
    fn a_chat_switches_in_between_and_survives_slips() {
        let place = runs();
        let prompt = "Once upon a time";
        let expected = |model: &str| {
            let args = ["generate", "--model", model, "--prompt", prompt, "--max-new-tokens", "6"];
            let text = place.ok(&args);
            text[text.find(prompt).unwrap() + prompt.len()..].to_owned()
        };
        let adapters = ["--adapter", "tales=peqa", "--adapter", "other"];
        let args = [&["--model", "base", "--max-new-tokens", "6"][..], &adapters].concat();
        let long = "word ".repeat(3000);
        let input = format!(
            "{prompt}\n/adapter other\n{prompt}\n/adaptr tales\n/adapter tails\n\n/adapter tales\n\
             {prompt}\r\n{long}\n/adapters\n/adapter none\n{prompt}\n/sing\n/help\n/quit\n{prompt}\n"
        );
        let Ended { code, out, err } = chat(&args, input.as_bytes());
        assert_eq!(code, 0, "{err}");
        let texts = ["peqa", "other", "peqa", "base"].map(expected);
        assert_eq!(out, texts.concat());
        let took = |line: &str| {
            let (before, ms) = line.rsplit_once(", in ")?;
            ms.strip_suffix(" ms")?.parse::<f64>().ok().map(|_| format!("{before}, in TIME"))
        };
        let err: Vec<String> =
            err.lines().map(|line| took(line).unwrap_or_else(|| line.to_owned())).collect();
        assert_snapshot!(err.join("\n"), @r"
            base on cpu
            the model has no chat template: each line is continued as plain text; /help for commands
            * tales
              other
              none, the model's own scales
            adapter other is on, in TIME
            there is no command /adaptr; did you mean /adapter?
            there is no adapter tails; did you mean tales?
            adapter tales is on, in TIME
            the prompt has 6002 tokens, and the model's context 512
            * tales
              other
              none, the model's own scales
            the model's own scales are on, in TIME
            there is no command /sing; /help lists them
            a line of text      said to the model; where it has no chat template, continued by it
            /reset              forget the conversation
            /system TEXT        begin anew, the model told this before; without TEXT, told nothing
            /adapter NAME       put that adapter's scales in the model
            /adapter none       put the model's own scales back
            /adapters           list the adapters
            /help               this
            /quit               leave; so does the end of the input
        ");

        // The end of the input ends it too, also without a last line's end; so does a bad byte not.
        let ended = chat(&["--model", "base", "--max-new-tokens", "6"], b"\xff\nOnce upon a time");
        assert_eq!((ended.code, ended.out), (0, expected("base")));
        assert!(ended.err.contains("this line is not UTF-8 text\n"), "{}", ended.err);
    }

    #[test]
    fn draws_are_repeatable_and_names_are_checked() {
        let place = runs();
        let args = ["--model", "base", "--max-new-tokens", "8", "--temperature", "1.5"];
        let input = b"The dog\nThe dog\n";
        let first = chat(&args, input);
        assert_eq!((first.code, &first.out), (0, &chat(&args, input).out));
        let seeded = chat(&[&args[..], &["--seed", "1"]].concat(), input);
        assert_ne!(seeded.out, first.out);
        for args in [["--temperature", "-1"], ["--top-p", "0"], ["--top-p", "2"]] {
            let ended = place.run(&[&["chat", "--model", "base"], &args[..]].concat());
            assert_eq!(ended.code, 2, "{}", ended.err);
        }
        let twice = ["chat", "--model", "base", "--adapter", "peqa", "--adapter", "peqa"];
        assert_snapshot!(place.refused(&twice), @r"
            exit 2
            error: two adapters are named peqa
              at   --adapter
              try  --adapter NAME=FILE with another name
        ");
        let reserved = ["chat", "--model", "base", "--adapter", "none=peqa"];
        assert!(place.refused(&reserved).starts_with("exit 2\nerror: \"none\" cannot be"));
    }

    #[cfg(unix)]
    #[test]
    fn a_signal_ends_a_chat_that_waits_and_one_that_writes() {
        use std::io::Read;

        let place = runs();
        for input in [&b""[..], b"Once upon a time\n"] {
            let mut command =
                place.command(&["chat", "--model", "base", "--max-new-tokens", "400"]);
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
            let mut child = command.spawn().unwrap();
            let mut stdin = child.stdin.take().unwrap();
            stdin.write_all(input).unwrap();
            // It works once it has said something.
            let mut byte = [0];
            if input.is_empty() {
                child.stderr.as_mut().unwrap().read_exact(&mut byte).unwrap();
            } else {
                child.stdout.as_mut().unwrap().read_exact(&mut byte).unwrap();
            }
            let pid = rustix::process::Pid::from_child(&child);
            rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
            let output = child.wait_with_output().unwrap();
            drop(stdin);
            let ended = Ended::from(&output);
            assert_eq!(ended.code, 130, "{}", ended.err);
            assert!(ended.err.contains("error: stopped by a signal\n"), "{}", ended.err);
        }
    }
}
