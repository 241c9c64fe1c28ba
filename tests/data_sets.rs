//! Data sets of every format, from the command line to the export's gate: what is trained, and what is
//! refused with what to do.
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too

mod common;

use common::{Place, datasets};
use fewbit::data::{DataFormat, Marks, Reader, Reading, TokenStream, Tokenizer, TrainOn};
use insta::assert_snapshot;
use serde_json::{Value, json};

const MODEL: &str = "embedded:tinystories-656k";
/// One token ends a turn, as in the templates of chat models.
const TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}{{ m.role + ': ' + m.content }}\
    {{ ' ' + eos_token if m.role == 'assistant' }}{{ '\n' }}{% endfor %}\
    {% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}";

const RECIPE: &str = r#"output = "run"
device = "cpu"
model.path = "embedded:tinystories-656k"
quant.bits = 4

[data.train]
path = "some.jsonl"
format = "messages"
chat_template = "chat.jinja"
length = 64

[data.validation]
path = "some.jsonl"
format = "messages"
chat_template = "chat.jinja"
length = 64

[[stage]]
[stage.calibrate]
method.rtn = {}
[[stage]]
[stage.tune_scales]
method.e2e_qp = {}
steps = 2
batch = 2
learning_rate = 1e-6
[[stage]]
[stage.evaluate]
task.ppl = {}
[[stage]]
[stage.export]
format.fewbit = {}
"#;

fn turns(pairs: &[(&str, &str)]) -> Value {
    pairs.iter().map(|(role, content)| json!({"role": role, "content": content})).collect()
}

fn conversations(count: usize) -> String {
    let line = |index: usize| {
        let asked = format!("Tell me of cat {index}.");
        let messages = turns(&[
            ("user", &asked),
            ("assistant", "Once there was a cat."),
            ("user", "And then?"),
            ("assistant", "It slept."),
        ]);
        json!({ "messages": messages }).to_string()
    };
    (0..count).map(line).collect::<Vec<_>>().join("\n")
}

fn place() -> Place {
    let place = Place::new();
    place.write("some.jsonl", conversations(12));
    place.write("chat.jinja", TEMPLATE);
    place.write("recipe.toml", RECIPE);
    place
}

/// Reads a file with the tokenizer of the small model.
fn read(place: &Place, name: &str, reading: &Reading, length: usize) -> TokenStream {
    let tokenizer = Tokenizer::load(&datasets().join("tinystories-656k")).unwrap();
    let template = &|| Ok(None);
    let marks = Marks { bos: Some(1), eos: Some(2) };
    let reader = Reader { tokenizer: &tokenizer, template, marks, length, vocab: 2048 };
    reader.read(&[place.path(name)], &reading.resolved(&[place.path(name)]).unwrap()).unwrap()
}

fn reading(place: &Place, train_on: TrainOn) -> Reading {
    let template = place.path("chat.jinja").display().to_string();
    let chat_template = Some(fewbit::data::TemplateChoice::File(template));
    // The tokens by name, which this model's folder would say.
    let names = json!({"bos_token": "<|start_story|>", "eos_token": "<|end_story|>"});
    let chat_template_kwargs = names.as_object().unwrap().clone();
    Reading {
        format: DataFormat::Messages,
        train_on,
        chat_template,
        chat_template_kwargs,
        date: None,
    }
}

/// The texts of what is trained, one a run of tokens.
fn trained(stream: &TokenStream) -> Vec<String> {
    let tokenizer = Tokenizer::load(&datasets().join("tinystories-656k")).unwrap();
    let flags = stream.supervised.as_ref().unwrap();
    let mut runs: Vec<Vec<u32>> = Vec::new();
    for at in 0..flags.len() {
        if flags[at] && (at == 0 || !flags[at - 1]) {
            runs.push(Vec::new());
        }
        if flags[at] {
            runs.last_mut().unwrap().push(stream.tokens[at]);
        }
    }
    runs.iter().map(|ids| tokenizer.decode(ids, false).unwrap()).collect()
}

#[test]
fn answers_and_the_token_that_ends_them_are_trained() {
    let place = place();
    let stream = read(&place, "some.jsonl", &reading(&place, TrainOn::Assistant), 64);
    let runs = trained(&stream);
    assert_eq!(runs.len(), 24);
    for pair in runs.chunks(2) {
        assert_eq!(pair, ["Once there was a cat. <|end_story|>", "It slept. <|end_story|>"]);
    }
    // The template writes the first token itself, and nothing more is put around.
    let starts = stream.starts.as_ref().unwrap();
    let firsts: Vec<usize> =
        (0..starts.len()).filter(|at| starts[*at] as usize == at % 64).collect();
    let begins = firsts.iter().filter(|at| stream.tokens[**at] == 1).count();
    assert_eq!(begins, 12);
    assert_eq!(stream.tokens.iter().filter(|id| **id == 1).count(), 12);
    assert_eq!((stream.documents, stream.empty, stream.cut), (12, 0, 0));
    // What is before an answer is what the model will be asked with.
    let tokenizer = Tokenizer::load(&datasets().join("tinystories-656k")).unwrap();
    let asked = tokenizer.encode("<|start_story|>user: Tell me of cat 0.\nassistant:").unwrap();
    assert_eq!(stream.tokens[..asked.len()], asked);
    assert!(stream.supervised.as_ref().unwrap()[asked.len()]);

    let last = read(&place, "some.jsonl", &reading(&place, TrainOn::Last), 64);
    assert!(trained(&last).iter().all(|text| text == "It slept. <|end_story|>"));
    let each = read(&place, "some.jsonl", &reading(&place, TrainOn::Each), 64);
    assert_eq!((trained(&each).len(), each.documents), (24, 24));
    let all = read(&place, "some.jsonl", &reading(&place, TrainOn::All), 64);
    assert!(all.counted() > 2 * stream.counted());
}

#[test]
fn every_shape_of_a_file_gives_the_same_tokens() {
    let place = place();
    let lines = conversations(12);
    let list: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    place.write("list.json", serde_json::to_string_pretty(&list).unwrap());
    let shared = |row: &Value| {
        let turns = row["messages"].as_array().unwrap().iter();
        let from = |role: &Value| if role == "user" { "human" } else { "gpt" };
        let turns: Vec<Value> =
            turns.map(|m| json!({"from": from(&m["role"]), "value": m["content"]})).collect();
        json!({ "id": 1, "conversations": turns }).to_string()
    };
    place.write("share.jsonl", list.iter().map(shared).collect::<Vec<_>>().join("\n"));
    let mut reading = reading(&place, TrainOn::Assistant);
    let expected = read(&place, "some.jsonl", &reading, 64);
    for name in ["list.json", "share.jsonl"] {
        assert_eq!(read(&place, name, &reading, 64), expected, "{name}");
    }
    reading.format = DataFormat::Auto;
    assert_eq!(read(&place, "some.jsonl", &reading, 64), expected);

    // The tokens themselves.
    let stream = read(&place, "some.jsonl", &reading, 640);
    let flags = stream.supervised.as_ref().unwrap();
    let labels: Vec<i64> = (0..flags.len())
        .map(|at| if flags[at] { i64::from(stream.tokens[at]) } else { -100 })
        .collect();
    place.write("t.jsonl", json!({"input_ids": stream.tokens, "labels": labels}).to_string());
    let tokens = read(&place, "t.jsonl", &Reading::from(DataFormat::Tokens), 640);
    assert_eq!((tokens.tokens, tokens.supervised), (stream.tokens, stream.supervised));
}

#[test]
fn instructions_go_through_the_template_where_asked() {
    let place = place();
    let row = json!({"instruction": "Name a pet.", "input": "", "output": "A cat."});
    let more = json!({"instruction": "Louder.", "input": "hello", "output": "HELLO"});
    place.write("i.jsonl", format!("{row}\n{more}"));
    let reading =
        Reading { format: DataFormat::Instruction, ..reading(&place, TrainOn::Assistant) };
    let stream = read(&place, "i.jsonl", &reading, 64);
    assert_eq!(trained(&stream), ["A cat. <|end_story|>", "HELLO <|end_story|>"]);
    let tokenizer = Tokenizer::load(&datasets().join("tinystories-656k")).unwrap();
    let text = tokenizer.decode(&stream.tokens, false).unwrap();
    assert!(text.contains("user: Louder.\n\nhello\nassistant: HELLO"), "{text}");
    // As before where nobody asks.
    let plain = read(&place, "i.jsonl", &Reading::from(DataFormat::Instruction), 64);
    let text = tokenizer.decode(&plain.tokens, false).unwrap();
    assert!(text.contains("Louder.\n\nhello\n\nAnswer:\nHELLO"), "{text}");
}

#[test]
fn a_recipe_on_messages_trains_and_verifies() {
    let place = place();
    let check = place.ok(&["check", "--recipe", "recipe.toml"]);
    assert!(check.contains("data.train packs 12 examples into"), "{check}");
    place.ok(&["train", "--recipe", "recipe.toml"]);
    let json = place.json(&["verify", "run", "--data", "some.jsonl", "--json"]);
    assert_eq!(json["parity"]["format"], "messages");
    let args = ["eval", "--model", "run", "--data", "some.jsonl", "--data-format", "messages"];
    let args = [&args[..], &["--chat-template", "chat.jinja", "--context", "64"]].concat();
    let eval = place.json(&[&args[..], &["--json"]].concat());
    assert_eq!(eval["perplexity"], json["perplexity"]);
    let told = place.ok(&args);
    assert!(told.contains("only the answers of conversations counts"), "{told}");
    // Another template is another run.
    place.write("chat.jinja", TEMPLATE.replace("assistant", "model"));
    let other = place.refused(&["train", "--recipe", "recipe.toml"]);
    assert!(other.starts_with("exit 6\n"), "{other}");
}

#[test]
fn a_mix_has_its_shares_and_says_so() {
    let place = place();
    let text: Vec<Value> = (0..40)
        .map(|i| {
            json!(format!(
                "Once upon a time there was cat number {i}. It slept all day and all night."
            ))
        })
        .collect();
    place.write("text.json", Value::Array(text).to_string());
    place.write(
        "mix.toml",
        RECIPE.replacen(
            "path = \"some.jsonl\"\n",
            "mix = [{ path = \"some.jsonl\", weight = 3 }, { path = \"text.json\", format = \"text\" }]\n",
            1,
        ),
    );
    let check = place.ok(&["check", "--recipe", "mix.toml"]);
    assert!(check.contains("75.0 % some.jsonl"), "{check}");
    let json =
        place.json(&["data", "preview", "--recipe", "mix.toml", "--role", "train", "--json"]);
    let set = &json["sets"][0];
    let sources = set["sources"].as_array().unwrap();
    let visits: Vec<u64> =
        sources.iter().map(|source| source["visits"].as_u64().unwrap()).collect();
    let share = visits[0] as f64 / (visits[0] + visits[1]) as f64;
    assert!((share - 0.75).abs() < 0.05, "{visits:?}");
    assert_eq!(set["windows"], visits[0] + visits[1]);
    place.ok(&["train", "--recipe", "mix.toml"]);

    let refused = |set: &str| place.refused(&["check", "--recipe", "mix.toml", "--set", set]);
    assert_snapshot!(refused("data.train.mix.1.weight=0"), @r"
        exit 2
        error: weight = 0 of text.json is no number above 0
          at   mix, data.train
          try  weight = 1, or leave the source out
    ");
    assert_snapshot!(refused("data.train.path=some.jsonl"), @r"
        exit 2
        error: path and mix both say what is read
          at   data.train
          try  one of them
    ");
    assert_snapshot!(refused("data.train.mix.1.length=5"), @r"
        exit 2
        error: unknown key `length`
          at   --set data.train.mix.1.length=5
          try  one of: format, path, weight
    ");
    let validation = RECIPE.replace("path = \"some.jsonl\"", "mix = [{ path = \"some.jsonl\" }]");
    place.write("v.toml", validation);
    assert_snapshot!(place.refused(&["check", "--recipe", "v.toml"]), @r"
        exit 2
        error: a validation text is measured whole, and has no weights
          at   data.validation.mix
          try  path = a list of files
    ");
}

#[test]
fn preview_marks_what_is_trained() {
    let place = place();
    let shown = place.ok(&[
        "data",
        "preview",
        "--recipe",
        "recipe.toml",
        "--role",
        "train",
        "--samples",
        "1",
    ]);
    assert_snapshot!(shown, @r"
    data.train       some.jsonl   format messages, train_on assistant
    documents        12   cut 0 (0.0 %)   teach nothing 0 (0.0 %)
    tokens           768   trained 168 (21.9 %)   filling 26.3 %
    windows          12 of 64 tokens
    length           least 47   median 47   90 % 48   99 % 48   most 48

    sample 1 of 1, 47 tokens
      <|start_story|>user: Tell me of cat 0.
      assistant:[[ Once there was a cat. <|end_story|>]]
      user: And then?
      assistant:[[ It slept. <|end_story|>]]
    ");
    let json = place.json(&["data", "preview", "--recipe", "recipe.toml", "--json"]);
    let sets = json["sets"].as_array().unwrap();
    assert_eq!(sets.len(), 2);
    assert_eq!(
        (&sets[0]["set"], &sets[1]["set"]),
        (&json!("data.train"), &json!("data.validation"))
    );
    assert_eq!((&sets[0]["documents"], &sets[0]["teach_nothing"]), (&json!(12), &json!(0)));
    let spans = sets[0]["samples"][0]["spans"].as_array().unwrap();
    assert_eq!(spans[1], json!({"text": " Once there was a cat. <|end_story|>", "trained": true}));

    let args =
        ["data", "preview", "--model", MODEL, "--data", "embedded:tinystories/validation.json"];
    let shown = place.ok(&[&args[..], &["--samples", "1", "--length", "32"]].concat());
    assert!(shown.contains("documents        100\n"), "{shown}");
    assert!(shown.lines().all(|line| line.chars().count() <= 80), "{shown}");
    let nothing =
        place.refused(&["data", "preview", "--recipe", "recipe.toml", "--role", "calibration"]);
    assert!(
        nothing.starts_with("exit 2\nerror: the recipe has no [data.calibration]"),
        "{nothing}"
    );
}

#[test]
fn what_a_data_set_cannot_be_is_refused() {
    let place = place();
    let check = |set: &str| place.refused(&["check", "--recipe", "recipe.toml", "--set", set]);
    assert_snapshot!(check("data.train.format=text"), @r#"
    exit 2
    error: chat_template says nothing of data of format "text", which goes through no chat template
      at   chat_template, data.train
      try  format = "messages", or leave it out
    "#);
    assert_snapshot!(check("data.train.format=completion"), @r#"
    exit 3
    error: the line has no `prompt` key (found: messages)
      at   some.jsonl, line 1, data.train
      try  format = "messages": the line has its keys
    "#);
    assert_snapshot!(check("data.train.train_on=user"), @r"
    exit 2
    error: unknown choice `user` for `train_on`
      at   --set data.train.train_on=user
      try  one of: all, assistant, each, last
    ");
    assert_snapshot!(check("data.train.chat_template=true"), @r#"
    exit 3
    error: the model has no chat template, and format "messages" goes through one
      at   data.train
      try  chat_template = "FILE.jinja" (--chat-template FILE), or a model that has one
    "#);
    assert_snapshot!(check("data.train.chat_template=false"), @r"
    exit 2
    error: conversations become text through a chat template only
      at   chat_template = false, data.train
      try  chat_template = true, or the path of one
    ");
    assert_snapshot!(check("data.train.chat_template=none.jinja"), @r"
    exit 2
    error: there is no such chat template
      at   none.jinja, data.train
      try  check the path, or chat_template = true for the model's
    ");
    assert_snapshot!(check("data.train.chat_template_kwargs.messages=1"), @r"
    exit 2
    error: `messages` of a chat template comes from the conversation
      at   data.train
      try  other names, such as enable_thinking
    ");
    assert_snapshot!(check("data.train.date=tomorrow"), @r#"
    exit 2
    error: `tomorrow` is no date
      at   date, data.train
      try  date = "2024-07-26"
    "#);
    let file = |text: String| {
        place.write("some.jsonl", text);
        place.refused(&["check", "--recipe", "recipe.toml"])
    };
    assert_snapshot!(file(json!({"messages": [{"role": "user", "content": "x"}]}).to_string()), @r"
    exit 3
    error: the data set has zero supervised tokens: its 1 conversations have no answer of an assistant within 64 tokens
      at   some.jsonl, data.train
      try  conversations with turns of the role assistant behind others, or longer windows
    ");
    assert_snapshot!(file(json!({"messages": [{"role": "user", "text": 5}, 7]}).to_string()), @r#"
    exit 3
    error: message 2: it is a number, expected an object with role and content
      at   some.jsonl, line 1, data.train
      try  give {"messages": [{"role": "user", "content": "…"}, …]} on each line, or a JSON list of such objects
    "#);
    assert_snapshot!(file(json!({"messages": "x"}).to_string()), @r#"
    exit 3
    error: the messages are a string, expected a list
      at   some.jsonl, line 1, data.train
      try  give {"messages": [{"role": "user", "content": "…"}, …]} on each line, or a JSON list of such objects
    "#);
    assert_snapshot!(file(json!({"text": "x"}).to_string()), @r#"
    exit 3
    error: the line has no `messages` key (found: text)
      at   some.jsonl, line 1, data.train
      try  format = "text": the line has its keys
    "#);
    assert_snapshot!(file(format!("{}\n{{", json!({"messages": turns(&[("user", "a"), ("assistant", "b")])}))), @r#"
    exit 3
    error: the line is not valid JSON: EOF while parsing an object
      at   some.jsonl, line 2, data.train
      try  give {"messages": [{"role": "user", "content": "…"}, …]} on each line, or a JSON list of such objects
    "#);
}

#[test]
fn templates_that_do_not_fit_the_data_are_named_with_the_line() {
    let place = place();
    let template = |text: &str| {
        place.write("chat.jinja", text);
        place.refused(&["check", "--recipe", "recipe.toml"])
    };
    assert_snapshot!(template("{{ raise_exception('no system, please') }}"), @r"
    exit 3
    error: the chat template refuses it: no system, please
      at   chat.jinja, template `default`, some.jsonl, line 1, data.train
      try  a conversation as the model's template wants it, or another template
    ");
    assert_snapshot!(template("{{ strftime_now('%Y') }}"), @r#"
    exit 3
    error: the chat template asks for today's date, and data must not change
      at   chat.jinja, template `default`, line 1, some.jsonl, line 1, data.train
      try  date = "2024-07-26" beside the data's path, or any other
    "#);
    assert_snapshot!(template("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"), @r#"
    exit 3
    error: the chat template writes message 2 (assistant) otherwise once others follow it, from "4Tell me of cat 0.Once there was a cat.A" on
      at   chat.jinja, some.jsonl, line 1, data.train
      try  train_on = "each" (every answer ends an example of its own) or "last"; or messages without reasoning
    "#);
    assert_snapshot!(template("{% for m in messages %}"), @r"
    exit 3
    error: the chat template is no Jinja: syntax error: unexpected end of input, expected end of block
      at   chat.jinja, template `default`, line 1, data.train
      try  the chat template that belongs to this model
    ");
}

#[test]
fn tokens_with_labels_are_taken_as_they_are() {
    let place = place();
    let args = [
        "eval",
        "--model",
        MODEL,
        "--data",
        "t.jsonl",
        "--data-format",
        "tokens",
        "--context",
        "16",
    ];
    let eval = |row: &Value| {
        place.write("t.jsonl", row.to_string());
        place.run(&args)
    };
    let good = eval(
        &json!({"input_ids": [1, 5, 6, 7], "labels": [-100, -100, 6, 7], "attention_mask": [1, 1, 1, 1]}),
    );
    assert_eq!(good.code, 0, "{}", good.err);
    assert!(good.out.contains("over 2 tokens"), "{}", good.out);
    let refused = |row: Value| {
        place.write("t.jsonl", row.to_string());
        place.refused(&args)
    };
    assert_snapshot!(refused(json!({"input_ids": [1, 5], "labels": [5, 6]})), @r#"
    exit 3
    error: label 1 is 5 and token 1: a label is -100 or the token of its own place
      at   t.jsonl, line 1
      try  give {"input_ids": [1, …], "labels": [-100, …]} on each line, or a JSON list of such objects
    "#);
    assert_snapshot!(refused(json!({"input_ids": [1, 5], "labels": [1]})), @r#"
    exit 3
    error: `labels` has 1 entries, and `input_ids` 2
      at   t.jsonl, line 1
      try  give {"input_ids": [1, …], "labels": [-100, …]} on each line, or a JSON list of such objects
    "#);
    assert_snapshot!(refused(json!({"input_ids": [1, 50000]})), @r"
    exit 3
    error: token 50000 is beyond the model's vocabulary of 2048
      at   t.jsonl, line 1
      try  data tokenized for this model
    ");
    assert_snapshot!(refused(json!({"input_ids": [1, -5]})), @r#"
    exit 3
    error: `input_ids` holds -5, which is no token
      at   t.jsonl, line 1
      try  give {"input_ids": [1, …], "labels": [-100, …]} on each line, or a JSON list of such objects
    "#);
    assert_snapshot!(refused(json!({"input_ids": [1, 5], "labels": [-100, -100]})), @r"
    exit 3
    error: the data set has zero supervised tokens: all labels of its 1 records are -100 within 16 tokens
      at   t.jsonl
      try  labels that are the token where it is to be learned, or longer windows
    ");
    assert_snapshot!(refused(json!({"input_ids": "1 5"})), @r#"
    exit 3
    error: `input_ids` is a string, expected a list of numbers
      at   t.jsonl, line 1
      try  give {"input_ids": [1, …], "labels": [-100, …]} on each line, or a JSON list of such objects
    "#);
}

#[test]
fn a_format_is_found_where_only_one_fits() {
    let place = place();
    let auto = |text: &str| {
        place.write("a.jsonl", text);
        let args = [
            "data",
            "preview",
            "--model",
            MODEL,
            "--data",
            "a.jsonl",
            "--data-format",
            "auto",
            "--json",
        ];
        let args = [&args[..], &["--length", "16"]].concat();
        let ended = place.run(&args);
        match ended.code {
            0 => serde_json::from_str::<Value>(&ended.out).unwrap()["sets"][0]["format"]
                .as_str()
                .unwrap()
                .to_owned(),
            _ => place.refused(&args),
        }
    };
    assert_eq!(auto(r#"{"text": "a b", "id": 1}"#), "text");
    assert_eq!(auto(r#"["a", "b"]"#), "text");
    assert_eq!(auto(r#"{"prompt": "a", "completion": "b"}"#), "completion");
    assert_eq!(auto(r#"[{"instruction": "a", "input": "", "output": "b"}]"#), "instruction");
    assert_eq!(auto(r#"{"input_ids": [1, 2, 3]}"#), "tokens");
    assert_snapshot!(auto(r#"{"text": "a", "messages": []}"#), @r#"
    exit 3
    error: the line fits format "text" and "messages"
      at   a.jsonl, line 1
      try  format = "text", "messages", "instruction", "completion" or "tokens"
    "#);
    assert_snapshot!(auto(r#"{"question": "a", "answer": "b"}"#), @r#"
    exit 3
    error: no format has keys such as these: question, answer
      at   a.jsonl, line 1
      try  format = "text", "messages", "instruction", "completion" or "tokens"
    "#);
    place.write("prose.txt", "Once upon a time.");
    let args =
        ["data", "preview", "--model", MODEL, "--data", "prose.txt", "--data-format", "auto"];
    assert!(place.ok(&[&args[..], &["--length", "4"]].concat()).contains("format text"));
}

#[cfg(not(feature = "parquet"))]
#[test]
fn parquet_is_named_where_it_is_not_built_in() {
    let place = place();
    place.write("a.parquet", b"PAR1\x00\x01");
    let args =
        ["data", "preview", "--model", MODEL, "--data", "a.parquet", "--data-format", "auto"];
    assert_snapshot!(place.refused(&args), @r"
    exit 3
    error: the file is Parquet, which this build does not read
      at   a.parquet
      try  a build with `cargo build --release --features parquet`, or the same data as JSONL
    ");
}

#[cfg(feature = "parquet")]
#[test]
fn parquet_gives_what_its_rows_say() {
    let place = place();
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/messages.parquet");
    let chats = fewbit::data::read_conversations(std::path::Path::new(golden)).unwrap();
    let expected = |index: usize| {
        json!([{"role": "user", "content": format!("Tell me of cat {index}.")},
            {"role": "assistant", "content": "Once there was a café. 🐈"}])
    };
    assert_eq!(chats.len(), 5);
    for (index, chat) in chats.iter().enumerate() {
        assert_eq!(Value::Array(chat.messages.clone()), expected(index));
        assert!(chat.tools.is_none());
    }
    assert_eq!(DataFormat::Auto.of(std::path::Path::new(golden)).unwrap(), DataFormat::Messages);
    // Cut short, or a byte changed: refused or read, and no panic.
    let whole = std::fs::read(golden).unwrap();
    for at in 0..whole.len() {
        let mut damaged = whole.clone();
        damaged[at] ^= 0x55;
        place.write("d.parquet", &damaged);
        let _ = fewbit::data::read_conversations(&place.path("d.parquet"));
        place.write("d.parquet", &whole[..at]);
        if at > 4 {
            fewbit::data::read_conversations(&place.path("d.parquet")).unwrap_err();
        }
    }
}
