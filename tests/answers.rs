//! Tasks whose answers the model writes, through the binary.
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too

mod common;

use common::{Place, datasets};
use serde_json::Value;

/// A place with both data sets beside a small model.
fn place(model: &str) -> Place {
    let place = Place::new();
    place.copy_model(model, "model");
    for name in ["gsm8k", "ifeval"] {
        place.copy_model(name, name);
    }
    place
}

/// What `--samples` wrote, one object a row.
fn samples(place: &Place, name: &str) -> Vec<Value> {
    place.read(name).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn texts<'a>(samples: &'a [Value], key: &str) -> Vec<&'a str> {
    samples.iter().map(|sample| sample[key].as_str().unwrap()).collect()
}

#[test]
fn answers_do_not_depend_on_what_is_written_beside_them() {
    for model in ["tinystories-656k", "stories260k"] {
        let place = place(model);
        let eval = |batch: &str, file: &str| {
            let batch = format!("batch={batch}");
            let args = [
                "eval",
                "--model",
                "model",
                "--task",
                "gsm8k=gsm8k/sample.jsonl",
                "--set",
                "examples=gsm8k/examples.jsonl",
                "--set",
                "shots=1",
                "--set",
                "max_new_tokens=12",
                "--set",
                &batch,
                "--limit",
                "6",
                "--samples",
                file,
                "--json",
            ];
            place.json(&args)
        };
        let found = eval("1", "one.jsonl");
        assert_eq!(found, eval("4", "four.jsonl"), "{model}");
        let (one, four) = (samples(&place, "one.jsonl"), samples(&place, "four.jsonl"));
        assert_eq!(texts(&one, "answer"), texts(&four, "answer"), "{model}");
        assert_eq!((one.len(), found["rows"].as_u64()), (6, Some(6)));
        assert_eq!(
            (&found["task"], &found["shots"], &found["seed"]),
            (&"gsm8k".into(), &1.into(), &1234.into())
        );
        for sample in &one {
            let prompt = sample["prompt"].as_str().unwrap();
            let question = sample["question"].as_str().unwrap();
            assert!(prompt.ends_with(&format!("\n\nQuestion: {question}\nAnswer:")), "{prompt}");
            assert!(prompt.contains("\n#### ") && !sample["answer"].as_str().unwrap().is_empty());
            assert!(sample["tokens"].as_u64().unwrap() <= 12);
        }
        // The first draw of Python's random.Random(1234).sample(range(32), 1) is 28.
        let examples = std::fs::read_to_string(datasets().join("gsm8k/examples.jsonl")).unwrap();
        let drawn: Value = serde_json::from_str(examples.lines().nth(28).unwrap()).unwrap();
        let first = format!("Question: {}\nAnswer: ", drawn["question"].as_str().unwrap());
        assert!(one[0]["prompt"].as_str().unwrap().starts_with(&first), "{}", one[0]["prompt"]);
    }
}

#[test]
fn long_prompts_lose_their_beginning_and_it_is_said() {
    let place = place("stories260k");
    let args = [
        "eval",
        "--model",
        "model",
        "--data",
        "gsm8k/sample.jsonl",
        "--task",
        "gsm8k",
        "--set",
        "max_new_tokens=4",
        "--limit",
        "2",
    ];
    let out = place.ok(&args);
    let lines: Vec<&str> = out.lines().collect();
    assert!(
        lines[0].starts_with("gsm8k   strict_match 0.0000 ± 0.0000   flexible_extract "),
        "{out}"
    );
    let protocol = "protocol   5-shot drawn with seed 1234, greedy, at most 4 tokens,";
    assert_eq!(lines[1], protocol, "{out}");
    assert!(lines[2].starts_with("           no chat template, "), "{out}");
    assert!(lines[2].ends_with(", 2 prompts that lost their beginning"), "{out}");
    let found = place.json(&[&args[..], &["--json"]].concat());
    assert_eq!(found["cut"], 2);
}

#[test]
fn instructions_are_followed_by_prompt_and_one_by_one() {
    let place = place("tinystories-656k");
    let args = [
        "eval",
        "--model",
        "model",
        "--task",
        "ifeval=ifeval/sample.jsonl",
        "--set",
        "max_new_tokens=24",
        "--limit",
        "10",
        "--samples",
        "rows.jsonl",
        "--json",
    ];
    let found = place.json(&args);
    let rows = samples(&place, "rows.jsonl");
    let lists: Vec<Vec<bool>> =
        rows.iter().map(|row| serde_json::from_value(row["strict"].clone()).unwrap()).collect();
    let followed: Vec<bool> = lists.concat();
    let count = |list: &[bool]| list.iter().filter(|followed| **followed).count() as f64;
    let all: Vec<bool> = lists.iter().map(|row| row.iter().all(|followed| *followed)).collect();
    let number = |name: &str| found[name].as_f64().unwrap();
    assert!((number("prompt_level_strict_acc") - count(&all) / 10.0).abs() < 1e-12);
    let share = count(&followed) / followed.len() as f64;
    assert!((number("inst_level_strict_acc") - share).abs() < 1e-12);
    assert!(number("inst_level_loose_acc") >= number("inst_level_strict_acc"));
    assert!(number("inst_level_strict_acc_stderr") > 0.0 && share > 0.0 && share < 1.0);
    assert_eq!(found["instructions"].as_u64().unwrap() as usize, followed.len());
    // The model tells stories, in lines without a star.
    assert!(rows.iter().all(|row| row["key"].is_u64() && row["ended"].is_string()));
}

#[test]
fn what_cannot_be_asked_is_refused() {
    let place = place("stories260k");
    let eval = |args: &[&str]| {
        let start = ["eval", "--model", "model"];
        place.refused(&[&start[..], args].concat())
    };
    let gsm8k = "gsm8k=gsm8k/sample.jsonl";
    let template = eval(&["--task", gsm8k, "--set", "chat_template=true"]);
    assert!(template.starts_with("exit 3\nerror: the model has no chat template"), "{template}");
    let room = eval(&["--task", "ifeval=ifeval/sample.jsonl"]);
    assert!(room.starts_with("exit 2\nerror: max_new_tokens = 1280 leaves no room"), "{room}");
    assert!(room.ends_with("try  max_new_tokens = 256\n"), "{room}");
    let system = eval(&["--task", gsm8k, "--set", "system=\"Hi.\""]);
    assert!(system.starts_with("exit 2\nerror: a system's turn is part of"), "{system}");
    let rows = eval(&["--task", "gsm8k"]);
    assert!(rows.starts_with("exit 2\nerror: gsm8k is measured on rows"), "{rows}");
    let nothing = eval(&["--task", gsm8k, "--limit", "0"]);
    assert!(nothing.starts_with("exit 2\nerror: limit = 0 measures nothing"), "{nothing}");
    place.write(
        "few.jsonl",
        "{\"question\": \"1+1?\", \"answer\": \"#### 2\"}\n{\"question\": 5}\n",
    );
    let row = eval(&["--task", "gsm8k=few.jsonl", "--set", "max_new_tokens=8"]);
    assert!(row.contains("few.jsonl, line 2") || row.contains("line 2, few.jsonl"), "{row}");
    place.write("one.jsonl", "{\"question\": \"1+1?\", \"answer\": \"#### 2\"}\n");
    let few = eval(&["--task", "gsm8k=one.jsonl", "--set", "max_new_tokens=8"]);
    assert!(few.contains("5 examples stand before a question, and there are 0"), "{few}");
    let kind = "{\"prompt\": \"x\", \"instruction_id_list\": [\"a:b\"], \"kwargs\": [{}]}\n";
    place.write("kind.jsonl", kind);
    let kind = eval(&["--task", "ifeval=kind.jsonl", "--set", "max_new_tokens=8"]);
    assert!(kind.contains("\"a:b\" is no instruction of IFEval"), "{kind}");
}

#[test]
fn a_chat_template_makes_turns_of_the_examples() {
    let place = place("stories260k");
    let template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}\
                    {% if add_generation_prompt %}[assistant]{% endif %}";
    place.write("model/chat_template.jinja", template);
    let args = |multiturn: &'static str| {
        vec![
            "eval",
            "--model",
            "model",
            "--task",
            "gsm8k=gsm8k/sample.jsonl",
            "--set",
            "shots=1",
            "--set",
            "max_new_tokens=4",
            "--limit",
            "1",
            "--set",
            "chat_template=true",
            "--set",
            "system=\"Think.\"",
            "--set",
            multiturn,
            "--samples",
            "rows.jsonl",
            "--json",
        ]
    };
    let found = place.json(&args("multiturn=true"));
    assert_eq!((&found["chat_template"], &found["system"]), (&true.into(), &"Think.".into()));
    let prompt = samples(&place, "rows.jsonl")[0]["prompt"].as_str().unwrap().to_owned();
    assert!(prompt.starts_with("[system]Think.[user]Question: "), "{prompt}");
    assert!(prompt.contains("\nAnswer:[assistant]") && prompt.ends_with("\nAnswer:[assistant]"));
    assert_eq!(prompt.matches("[user]").count(), 2);
    place.json(&args("multiturn=false"));
    let prompt = samples(&place, "rows.jsonl")[0]["prompt"].as_str().unwrap().to_owned();
    assert_eq!((prompt.matches("[user]").count(), prompt.matches("[assistant]").count()), (1, 1));
}

#[test]
fn a_recipe_measures_them_beside_the_float_model() {
    let place = Place::with_small_run(
        "[[stage]]\n[stage.calibrate]\nmethod.rtn = {}\n\n[[stage]]\n[stage.evaluate]\n\
         tasks = [{ gsm8k = { data = \"gsm8k/sample.jsonl\", shots = 0, limit = 3, max_new_tokens = 6 } },\n\
         { ifeval = { data = \"ifeval/sample.jsonl\", limit = 3, max_new_tokens = 12 } }]\n",
    );
    for name in ["gsm8k", "ifeval"] {
        place.copy_model(name, name);
    }
    let table = place.ok(&common::TRAIN);
    // A model of 260,000 weights solves no problem: nothing is a multiple of that.
    assert!(table.contains("strict_match") && !table.contains("NaN"), "{table}");
    let run: Value = serde_json::from_str(&place.read("run/run.json")).unwrap();
    let text = run.to_string();
    for number in ["strict_match", "inst_level_loose_acc"] {
        // The float model's, and the rounded one's.
        assert!(text.matches(&format!("\"{number}\"")).count() >= 2, "{text}");
    }
}

/// What is written counts: ten times the rows and ten times the tokens take a hundred times as long. Each `check`
/// measures the machine anew, which may be busy then: the bounds are wide.
#[test]
fn check_counts_what_is_written() {
    let place = place("stories260k");
    place.write("text.json", common::few_stories(4));
    let seconds = |task: &str, limit: usize, tokens: usize| {
        let recipe = format!(
            "output = \"run\"\ndevice = \"cpu\"\nmodel.path = \"model\"\nquant.bits = 4\n\
             data.validation.path = \"text.json\"\n[[stage]]\n[stage.calibrate]\nmethod.rtn = {{}}\n\
             [[stage]]\n[stage.evaluate]\ntask.{task} = {{ data = \"{task}/sample.jsonl\", batch = 1, \
             limit = {limit}, max_new_tokens = {tokens} }}\n"
        );
        place.write("recipe.toml", recipe);
        place.json(&["check", "--recipe", "recipe.toml", "--json"])["needs"]["seconds"]
            .as_f64()
            .unwrap()
    };
    for task in ["gsm8k", "ifeval"] {
        let few = seconds(task, 4, 20);
        let many = seconds(task, 40, 200);
        assert!(many > 3.0 * few && few > 0.0, "{task}: {few}, {many}");
        // No more rows than the file has.
        let all = seconds(task, 4000, 200);
        assert!(all < 50.0 * many, "{task}: {many}, {all}");
    }
}
