//! Chat templates render to the byte as transformers does, and what it refuses is refused.
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use fewbit::data::chat::{Chat, ChatTemplate, Clock};
use serde_json::Value;

fn golden() -> Value {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/chat_templates.json");
    let path = std::env::var_os("FEWBIT_CHAT_TEMPLATES").map_or(own, Into::into);
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn template(source: &str, special: &Value, golden: &Value) -> fewbit::error::Result<ChatTemplate> {
    let special: BTreeMap<String, String> = serde_json::from_value(special.clone()).unwrap();
    let now = golden["now"].as_str().unwrap().parse().unwrap();
    let template = ChatTemplate::new(source, special, "golden")?;
    Ok(template.with_clock(Clock::At(now)))
}

fn chat(entry: &Value) -> Chat {
    let mut chat = Chat::of_messages(&entry["messages"]).unwrap();
    chat.set_tools(&entry["tools"]).unwrap();
    chat
}

#[test]
fn conversations_are_rendered_as_by_transformers() {
    let golden = golden();
    let (mut faults, mut count) = (String::new(), 0);
    for (name, entry) in golden["templates"].as_object().unwrap() {
        let template =
            template(entry["source"].as_str().unwrap(), &entry["special"], &golden).unwrap();
        for (conversation, expected) in entry["results"].as_object().unwrap() {
            let given = &golden["conversations"][conversation];
            let kwargs = given["kwargs"].as_object().unwrap().clone();
            let template = template.clone().with_kwargs(kwargs).unwrap();
            let chat = chat(given);
            for (prompt, expected) in [(false, &expected[0]), (true, &expected[1])] {
                let plain = golden["templates"][name]["results"][conversation][0].as_str();
                let expected = expected.as_str().map(|text| match text.strip_prefix('…') {
                    Some(end) => format!("{}{end}", plain.unwrap()),
                    None => text.to_owned(),
                });
                let found = template.render(&chat, prompt);
                count += 1;
                if found.as_ref().ok() != expected.as_ref() {
                    let _ = writeln!(
                        faults,
                        "{name}, {conversation}, prompt {prompt}\n  {found:?}\n  {expected:?}"
                    );
                }
            }
        }
    }
    assert!(faults.is_empty(), "\n{faults}");
    assert!(count >= 19 * 2, "{count}");
}

#[test]
fn small_templates_are_rendered_as_by_jinja() {
    let golden = golden();
    let mut faults = String::new();
    let context = golden["context"].as_object().unwrap();
    let mut kwargs = context.clone();
    let messages = kwargs.remove("messages").unwrap();
    let tools = kwargs.remove("tools").unwrap();
    let mut chat = Chat::of_messages(&messages).unwrap();
    chat.set_tools(&tools).unwrap();
    for case in golden["small"].as_array().unwrap() {
        let (source, expected) = (case[0].as_str().unwrap(), case[1].as_str());
        let template = template(source, &Value::Object(serde_json::Map::new()), &golden);
        let found = template.and_then(|t| t.with_kwargs(kwargs.clone())?.render(&chat, false));
        if found.as_deref().ok() != expected {
            let found = found.map_err(|error| error.to_string());
            let _ = writeln!(faults, "{source:?}\n  {found:?}\n  {expected:?}");
        }
    }
    assert!(faults.is_empty(), "\n{faults}");
}

fn refusal(source: &str) -> String {
    let chat = Chat::of_pair("Hi", "Hello");
    let template = ChatTemplate::new(source, BTreeMap::new(), "m/chat_template.jinja");
    let error = template.and_then(|template| template.render(&chat, true)).unwrap_err();
    assert_eq!(error.kind().exit_code(), 3);
    error.to_string()
}

/// Whatever a stranger's template does, it ends, soon and within memory.
#[test]
fn templates_that_run_away_are_stopped() {
    for source in [
        "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
        "{% for a in range(100000) %}{% for b in range(100000) %}xxxxxxxxxxxxxxxxxxxxxxxx{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(1) }}",
        "{% set ns = namespace(s='x') %}{% for a in range(64) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
        "{% set ns = namespace(s=['x']) %}{% for a in range(30) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s | tojson }}",
        "{{ 'x' * 100000000000 }}",
        "{% set ns = namespace(s=[]) %}{% for a in range(9000) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s | tojson }}",
        "{% set ns = namespace(s=[]) %}{% for a in range(9000) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s }}",
        "{% set ns = namespace(s=[]) %}{% for a in range(40) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s }}",
        "{% set ns = namespace(s='x') %}{% for a in range(64) %}{% set ns.s = ns.s.replace('x', 'xxxxxxxxxxxxxxxx') %}{% endfor %}{{ ns.s }}",
        "{% include 'default' %}",
        "{% set ns = namespace(s=[]) %}{% for a in range(60) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ raise_exception(ns.s) }}",
    ] {
        let refusal = refusal(source);
        assert!(refusal.contains("m/chat_template.jinja"), "{source}: {refusal}");
    }
}

#[test]
fn what_a_template_must_not_do_is_refused() {
    for (source, part) in [
        ("{% include '/etc/passwd' %}", "not found"),
        ("{% import 'x' as y %}{{ y.a() }}", "not found"),
        ("{{ open('/etc/passwd') }}", "unknown"),
        ("{{ ''.__class__.__mro__ }}", "undefined"),
        ("{% for a in messages %}", "no Jinja"),
        ("{{ 'a' | nothing }}", "filter nothing is unknown"),
        ("{{ messages[9].content }}", "undefined"),
    ] {
        let refusal = refusal(source);
        assert!(refusal.contains(part), "{source}: {refusal}");
    }
    insta::assert_snapshot!(refusal("a\n{{ raise_exception('roles must\nalternate') }}"), @r"
    the chat template refuses it: roles must alternate
      at   m/chat_template.jinja, template `default`
      try  a conversation as the model's template wants it, or another template
    ");
    insta::assert_snapshot!(refusal("a\n{{ messages.role.name + 'x' }}"), @r"
    the chat template fails: undefined value: `messages.role` is undefined
      at   m/chat_template.jinja, template `default`, line 2
      try  a conversation as the model's template wants it, or another template
    ");
    let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}";
    insta::assert_snapshot!(refusal(endless), @r"
    the chat template does not come to an end, or its text does not: it was stopped
      at   m/chat_template.jinja, template `default`, line 1
      try  the chat template that belongs to this model
    ");
}

#[test]
fn a_folder_says_which_template_is_taken() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    let render = |tools: bool| {
        let template = ChatTemplate::of_folder(folder.path()).unwrap().unwrap();
        let mut chat = Chat::of_pair("Hi", "Hello");
        if tools {
            chat.set_tools(&serde_json::json!([{"name": "f"}])).unwrap();
        }
        template.render(&chat, false).unwrap()
    };
    assert!(ChatTemplate::of_folder(folder.path()).unwrap().is_none());
    write(
        "tokenizer_config.json",
        r#"{"chat_template": "config {{ bos_token }}", "bos_token": {"content": "<b>"}}"#,
    );
    write("special_tokens_map.json", r#"{"eos_token": "<e>", "bos_token": "x"}"#);
    assert_eq!(render(false), "config <b>");
    write(
        "tokenizer_config.json",
        r#"{"chat_template": [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]}"#,
    );
    assert_eq!((render(false), render(true)), ("plain".into(), "tools".into()));
    write("chat_template.jinja", "file {{ eos_token }}");
    assert_eq!((render(false), render(true)), ("file <e>".into(), "file <e>".into()));
    std::fs::create_dir(folder.path().join("additional_chat_templates")).unwrap();
    write("additional_chat_templates/tool_use.jinja", "more");
    assert_eq!((render(false), render(true)), ("file <e>".into(), "more".into()));
    write("chat_template.jinja", "{% if %}");
    let error = ChatTemplate::of_folder(folder.path()).unwrap_err().to_string();
    assert!(error.contains("chat_template.jinja") && error.contains("line 1"), "{error}");
    std::fs::remove_file(folder.path().join("chat_template.jinja")).unwrap();
    write("tokenizer_config.json", r#"{"chat_template": 5}"#);
    let error = ChatTemplate::of_folder(folder.path()).unwrap_err().to_string();
    assert!(error.contains("neither a template nor a list"), "{error}");
}

#[test]
fn names_of_a_rendering_are_not_the_users() {
    let template = ChatTemplate::new("{{ x }}", BTreeMap::new(), "t").unwrap();
    let kwargs = |text: &str| serde_json::from_str(text).unwrap();
    let chat = Chat::of_pair("a", "b");
    let given = template.clone().with_kwargs(kwargs(r#"{"x": true}"#)).unwrap();
    assert_eq!(given.render(&chat, false).unwrap(), "True");
    let error = template.with_kwargs(kwargs(r#"{"messages": []}"#)).unwrap_err();
    assert_eq!(error.kind().exit_code(), 2);
    let asks = ChatTemplate::new("{{ strftime_now('%Y') }}", BTreeMap::new(), "t").unwrap();
    assert_eq!(asks.render(&chat, false).unwrap().len(), 4);
    let error = asks.with_clock(Clock::Unset).render(&chat, false).unwrap_err().to_string();
    assert!(error.contains("today's date"), "{error}");
}

#[test]
fn conversations_of_other_shapes_become_messages() {
    let chat = |text: &str| Chat::of_messages(&serde_json::from_str(text).unwrap());
    let one = chat(
        r#"[{"from": "system", "value": "s"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"},
            {"from": "tool", "value": "c", "weight": null}]"#,
    );
    let two = chat(
        r#"[{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "assistant", "content": "b", "tool_calls": null}, {"role": "tool", "content": "c"}]"#,
    );
    let (one, two) = (one.unwrap(), two.unwrap());
    for (a, b) in one.messages.iter().zip(&two.messages) {
        assert_eq!((&a["role"], &a["content"]), (&b["role"], &b["content"]));
    }
    assert_eq!(two.answers().collect::<Vec<_>>(), [2]);
    for (text, what) in [
        ("[]", "the list of messages is empty"),
        ("5", "the messages are a number, expected a list"),
        ("[5]", "message 1: it is a number, expected an object with role and content"),
        (r#"[{"role": "user"}, {"content": "x"}]"#, "message 2: it has no `role` (found: content)"),
        (
            r#"[{"from": "alien", "value": "x"}]"#,
            "message 1: `from` is `alien`, and only system, human, gpt and tool are known",
        ),
        (
            r#"[{"role": "user", "content": 5}]"#,
            "message 1: `content` is a number, expected a string or a list of parts",
        ),
        (
            r#"[{"role": "user", "content": [{"type": "image_url"}]}]"#,
            "message 1: a part of `content` is of type `image_url`, and only text is read",
        ),
    ] {
        assert_eq!(chat(text).unwrap_err(), what, "{text}");
    }
}
