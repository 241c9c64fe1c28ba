//! Conversations by a chat template, and text that a model writes for training.
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too

mod common;

use common::{Ended, Place, few_stories};
use serde_json::{Value, json};

/// Everything that was said, in the words of a story.
const TEMPLATE: &str = "{% for m in messages %}{{ m.role }} said: {{ m.content | trim }}.\n{% endfor %}\
                        {% if add_generation_prompt %}assistant said: {% endif %}";

fn with_template(model: &str) -> Place {
    let place = Place::new();
    place.copy_model(model, "model");
    place.write("model/chat_template.jinja", TEMPLATE);
    // A template opens the text itself, and this one with nothing: so that plain text compares.
    let mut config: Value = serde_json::from_str(&place.read("model/config.json")).unwrap();
    config.as_object_mut().unwrap().remove("bos_token_id");
    place.write("model/config.json", config.to_string());
    place.write("model/tokenizer_config.json", "{}");
    place
}

/// The one text that `generate` gives.
fn generated(place: &Place, args: &[&str]) -> String {
    let found = place.json(&[&["generate", "--model", "model", "--json"], args].concat());
    found["text"].as_str().unwrap().to_owned()
}

fn chat(place: &Place, args: &[&str], input: &str) -> Ended {
    let command = place.command(&[&["chat", "--model", "model"], args].concat());
    let mut command = assert_cmd::Command::from_std(command);
    Ended::from(&command.write_stdin(input).output().unwrap())
}

#[test]
fn a_prompt_is_said_in_the_words_of_the_template() {
    for model in ["tinystories-656k", "stories260k"] {
        let place = with_template(model);
        let short = ["--max-new-tokens", "12"];
        let plain = "system said: Be kind.\nuser said: Hello Lily.\nassistant said: ";
        let raw = generated(&place, &[&["--prompt", plain], &short[..]].concat());
        let said = ["--prompt", "Hello Lily", "--system", "Be kind"];
        assert_eq!(generated(&place, &[&said[..], &short].concat()), raw, "{model}");
        let shown = place.ok(&[&["generate", "--model", "model"], &said[..], &short].concat());
        assert_eq!(shown, format!("{raw}\n"), "only the answer is shown");
        // Several are answered together, as each by itself.
        let both = ["generate", "--model", "model", "--chat", "--json", "--prompt", "Hello Lily"];
        let both = place.ok(&[&both[..], &["--prompt", "One day a big dog"], &short].concat());
        let texts: Vec<Value> = both.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        for (prompt, found) in ["Hello Lily", "One day a big dog"].iter().zip(&texts) {
            let alone = generated(&place, &[&["--chat", "--prompt", prompt], &short[..]].concat());
            assert_eq!(found["text"], alone, "{model}");
        }
    }
}

#[test]
fn a_chat_remembers_until_it_is_told_to_forget() {
    let place = with_template("tinystories-656k");
    let args = ["--max-new-tokens", "10", "--temperature", "0"];
    let ended = chat(&place, &args, "One day\nHello\n/reset\nOne day\n/system Be kind\nOne day\n");
    assert_eq!(ended.code, 0, "{}", ended.err);
    let said: Vec<&str> = ended.out.lines().collect();
    let ask = |text: &str| generated(&place, &["--prompt", text, "--max-new-tokens", "10"]);
    let first = ask("user said: One day.\nassistant said: ");
    assert_eq!(said[0], first);
    let all = format!(
        "user said: One day.\nassistant said: {}.\nuser said: Hello.\nassistant said: ",
        first.trim()
    );
    assert_eq!(said[1], ask(&all), "the second answer follows from the first exchange");
    assert_eq!(said[2], first, "and after /reset from nothing");
    let told = "system said: Be kind.\nuser said: One day.\nassistant said: ";
    assert_eq!(said[3], ask(told));
    assert!(ended.err.contains("a conversation by the model's chat template"), "{}", ended.err);
    let plain = chat(&place, &[&args[..], &["--plain"]].concat(), "One day\n");
    assert_eq!(plain.out, format!("{}\n", ask("One day")));
    assert!(plain.err.contains("each line is continued as plain text"), "{}", plain.err);
    // Exchanges that the context has no room for are forgotten.
    let words = "big ".repeat(120);
    let long = chat(&place, &args, &[words.as_str(); 6].join("\n"));
    assert_eq!((long.code, long.out.lines().count()), (0, 6), "{}", long.err);
    assert!(long.err.contains("its first exchange is forgotten"), "{}", long.err);
}

#[test]
fn without_a_template_nobody_pretends() {
    let place = Place::new();
    place.copy_model("stories260k", "model");
    for args in [
        &["generate", "--model", "model", "--prompt", "x", "--chat"][..],
        &["generate", "--model", "model", "--prompt", "x", "--system", "y"],
        &["chat", "--model", "model", "--system", "y"],
        &["data", "generate", "--model", "model", "--free", "1", "--out", "o", "--prompts", "p"],
    ] {
        let ended = place.run(args);
        assert!([2, 3].contains(&ended.code), "{args:?}: {}", ended.err);
        assert!(ended.out.is_empty());
    }
    let args = ["generate", "--model", "model", "--prompt", "x", "--chat-template-kwargs", "y"];
    let named = place.run(&args);
    assert_eq!(named.code, 2);
    assert!(named.err.contains("expected a JSON object"), "{}", named.err);
}

#[test]
fn a_model_writes_training_text_and_goes_on_where_it_was() {
    let place = with_template("tinystories-656k");
    place.write(
        "prompts.jsonl",
        (0..7)
            .map(|i| json!({"instruction": format!("Say {i}"), "output": "x"}).to_string() + "\n")
            .collect::<String>(),
    );
    let common = ["data", "generate", "--model", "model", "--max-new-tokens", "8", "--batch", "3"];
    let prompts = ["--prompts", "prompts.jsonl", "--per-prompt", "2"];
    let write = |out: &str| place.run(&[&common[..], &prompts, &["--out", out]].concat());
    assert_eq!(write("whole.jsonl").code, 0);
    let whole = place.read("whole.jsonl");
    let lines: Vec<Value> = whole.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 14);
    for (index, line) in lines.iter().enumerate() {
        assert_eq!(line["index"], index);
        assert_eq!(
            line["messages"][0],
            json!({"role": "user", "content": format!("Say {}", index / 2)})
        );
        assert_eq!(line["messages"][1]["role"], "assistant");
    }
    assert_ne!(lines[0]["messages"][1], lines[1]["messages"][1], "two answers are two draws");
    let settings: Value = serde_json::from_str(&place.read("whole.jsonl.settings.json")).unwrap();
    assert_eq!((&settings["texts"], &settings["seed"]), (&json!(14), &json!(0)));
    assert_eq!(settings["model_sha256"].as_str().unwrap().len(), 64);

    // Cut in the middle of a batch and of a line, it becomes the same file.
    place.write("part.jsonl", &whole[..whole.match_indices('\n').nth(7).unwrap().0 + 20]);
    std::fs::copy(place.path("whole.jsonl.settings.json"), place.path("part.jsonl.settings.json"))
        .unwrap();
    assert_eq!(write("part.jsonl").code, 0);
    assert_eq!(place.read("part.jsonl"), whole);
    let again = write("part.jsonl");
    assert!(again.code == 0 && again.err.contains("has all 14 texts"), "{}", again.err);

    // Other settings leave it alone until they are told not to.
    let other = [&common[..], &prompts, &["--seed", "1", "--out", "part.jsonl"]].concat();
    let refused = place.run(&other);
    assert_eq!(refused.code, 2);
    assert!(refused.err.contains("seed is not the same"), "{}", refused.err);
    assert_eq!(place.read("part.jsonl"), whole);
    assert_eq!(place.run(&[&other[..], &["--fresh"]].concat()).code, 0);
    assert_ne!(place.read("part.jsonl"), whole);
    place.write("mine.jsonl", "mine");
    let refused = write("mine.jsonl");
    assert_eq!((refused.code, place.read("mine.jsonl").as_str()), (2, "mine"));
}

#[test]
fn free_text_begins_with_nothing_and_trains() {
    let place = Place::with_small_run(
        "[[stage]]\n[stage.distill]\nmethod.lsq = {}\nobjective.jsd = {}\nsteps = 3\nbatch = 2\n\
         learning_rate = 1e-3\n",
    );
    place.write("few.json", few_stories(4));
    let free = ["data", "generate", "--model", "model", "--free", "12", "--out", "free.jsonl"];
    place.ok(&[&free[..], &["--max-new-tokens", "40"]].concat());
    let texts: Vec<Value> =
        place.read("free.jsonl").lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(texts.len(), 12);
    assert!(texts.iter().all(|line| line["text"].as_str().unwrap().len() > 20), "{texts:?}");
    // Three steps may make it worse; here only the text matters.
    let sets = ["data.train.path=free.jsonl", "stage.0.distill.allow_worse=true"];
    place.ok(&["train", "--recipe", "recipe.toml", "--set", sets[0], "--set", sets[1]]);
}
