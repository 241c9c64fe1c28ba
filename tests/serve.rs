//! The endpoint from outside: OpenAI's objects and errors, streams, many at once, and its end.
#![cfg(unix)]
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use common::{Place, few_stories};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

const TEMPLATE: &str = "{% for m in messages %}{{ m.role }} said: {{ m.content | trim }}.\n{% endfor %}\
                        {% if add_generation_prompt %}assistant said: {% endif %}";

/// A packed base with a chat template, and an adapter.
const RECIPE: &str = r#"output = "base"
device = "cpu"
model.path = "model"
quant.bits = 4
data.validation.path = "few.json"
[[stage]]
[stage.calibrate]
method.rtn = {}
[[stage]]
[stage.export]
format.fewbit = {}
"#;

/// Made once for the tests that overlap in time, and only read by them.
fn place() -> Arc<Place> {
    static MADE: Mutex<Weak<Place>> = Mutex::new(Weak::new());
    let mut made = MADE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some(place) = made.upgrade() {
        return place;
    }
    let place = Arc::new(Place::new());
    place.copy_model("tinystories-656k", "model");
    place.write("model/chat_template.jinja", TEMPLATE);
    place.copy_model("stories260k", "plain");
    place.write("few.json", few_stories(12));
    place.write("base.toml", RECIPE);
    place.ok(&["train", "--recipe", "base.toml"]);
    let sets = [
        "model.path=model",
        "stage.2.tune_scales.steps=2",
        // Far from the base, so that texts differ.
        "stage.2.tune_scales.learning_rate=0.05",
        "stage.2.tune_scales.validate.keep_best=false",
        "stage.2.tune_scales.allow_worse=true",
        "stage.4.export.allow_worse=true",
        "data.validation.path=few.json",
        "device=cpu",
    ];
    let args = ["train", "--recipe", "peqa_w4", "--output", "tuned"];
    place.ok(&args
        .into_iter()
        .chain(sets.iter().flat_map(|set| ["--set", set]))
        .collect::<Vec<_>>());
    *made = Arc::downgrade(&place);
    place
}

struct Server {
    child: Child,
    port: u16,
}

/// What came back.
#[derive(Debug)]
struct Reply {
    status: u16,
    head: String,
    body: String,
}

impl Reply {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    /// The objects of a stream, which ends as it should.
    fn pieces(&self) -> Vec<Value> {
        let mut data: Vec<&str> =
            self.body.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        assert_eq!(data.pop(), Some("[DONE]"), "{self:?}");
        data.iter().map(|piece| serde_json::from_str(piece).unwrap()).collect()
    }
}

impl Server {
    fn start(place: &Place, model: &str, args: &[&str]) -> Self {
        let begin = ["serve", "--model", model, "--port", "0"];
        let mut command = place.command(&[&begin[..], args].concat());
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).env_remove("FEWBIT_API_KEY");
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let port = line.trim().strip_suffix("/v1").and_then(|line| line.rsplit(':').next());
        let port = port.and_then(|port| port.parse().ok());
        Self { child, port: port.unwrap_or_else(|| panic!("no address in {line:?}")) }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream.set_read_timeout(Some(Duration::from_mins(1))).unwrap();
        stream
    }

    /// Sends a request and leaves the answer to be read.
    fn ask(&self, head: &str, body: &str) -> TcpStream {
        let mut stream = self.connect();
        let length = body.len();
        let head = head.replace('\n', "\r\n");
        let request = format!("{head}\r\nContent-Length: {length}\r\n\r\n{body}");
        stream.write_all(request.as_bytes()).unwrap();
        stream
    }

    fn send(&self, head: &str, body: &str) -> Reply {
        read(self.ask(head, body))
    }

    fn get(&self, path: &str) -> Reply {
        self.send(&format!("GET {path} HTTP/1.0"), "")
    }

    fn post(&self, path: &str, body: &Value) -> Reply {
        self.send(&post(path), &body.to_string())
    }

    /// The text of a greedy completion.
    fn text(&self, model: &str, prompt: &str, tokens: usize) -> String {
        let ask = json!({"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0});
        let reply = self.post("/v1/completions", &ask);
        assert_eq!(reply.status, 200, "{reply:?}");
        reply.json()["choices"][0]["text"].as_str().unwrap().to_owned()
    }

    fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").body;
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("fewbit_{name} ")));
        line.unwrap_or_else(|| panic!("no {name} in {text}")).parse().unwrap()
    }

    fn wait_until(&self, what: &str, is: impl Fn(&Self) -> bool) {
        let start = Instant::now();
        while !is(self) {
            assert!(start.elapsed() < Duration::from_mins(1), "never: {what}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Exit code and what it said.
    fn ended(mut self) -> (i32, String) {
        let mut told = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut told).unwrap();
        (self.child.wait().unwrap().code().unwrap_or(-1), told)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn post(path: &str) -> String {
    format!("POST {path} HTTP/1.0\nContent-Type: application/json")
}

fn read(mut stream: TcpStream) -> Reply {
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{text:?}"));
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap();
    Reply { status, head: head.to_ascii_lowercase(), body: body.to_owned() }
}

/// A request that takes a while: texts of all the context.
fn long(count: usize) -> Value {
    json!({"model": "base", "prompt": "Once", "max_tokens": 500, "temperature": 2, "n": count,
           "stream": true})
}

#[test]
fn answers_have_the_shape_and_the_text_that_they_should() {
    let place = place();
    let server = Server::start(&place, "base", &["--adapter", "tales=tuned"]);
    let known = server.get("/v1/models").json();
    let ids: Vec<&str> =
        known["data"].as_array().unwrap().iter().map(|m| m["id"].as_str().unwrap()).collect();
    assert_eq!((known["object"].as_str(), &ids[..]), (Some("list"), &["base", "tales"][..]));
    assert_eq!(server.get("/v1/models/tales").json()["object"], "model");
    assert_eq!(server.get("/health").json(), json!({"status": "ok"}));

    // Chat, in one piece, as `generate` says it.
    let said = |args: &[&str]| {
        let found = place.json(&[&["generate", "--model", "base", "--json"], args].concat());
        found["text"].as_str().unwrap().to_owned()
    };
    let expected = said(&["--chat", "--prompt", "Hello Lily", "--max-new-tokens", "12"]);
    let mut ask = json!({"model": "base", "max_tokens": 12, "temperature": 0,
        "messages": [{"role": "user", "content": "Hello Lily"}]});
    let whole = server.post("/v1/chat/completions", &ask).json();
    let choice = &whole["choices"][0];
    assert_eq!(whole["object"], "chat.completion");
    assert_eq!(
        choice["message"],
        json!({"role": "assistant", "content": expected, "refusal": null})
    );
    assert_eq!(choice["finish_reason"], "length");
    let usage = &whole["usage"];
    assert_eq!(usage["completion_tokens"], 12);
    let total = usage["prompt_tokens"].as_u64().unwrap() + 12;
    assert_eq!(usage["total_tokens"], total);

    // In pieces.
    ask["stream"] = true.into();
    ask["stream_options"] = json!({"include_usage": true});
    let reply = server.post("/v1/chat/completions", &ask);
    assert!(reply.head.contains("content-type: text/event-stream"), "{}", reply.head);
    let pieces = reply.pieces();
    let [first, middle @ .., last, counts] = &pieces[..] else { panic!("{pieces:?}") };
    assert!(pieces.iter().all(|piece| piece["object"] == "chat.completion.chunk"));
    assert!(pieces.iter().all(|piece| piece["id"] == first["id"]));
    assert_eq!(first["choices"][0]["delta"]["role"], "assistant");
    let text: String =
        middle.iter().map(|p| p["choices"][0]["delta"]["content"].as_str().unwrap()).collect();
    assert_eq!(text, expected);
    assert_eq!(last["choices"][0]["finish_reason"], "length");
    assert_eq!((&counts["choices"], &counts["usage"]), (&json!([]), usage));

    // Completions: several prompts, several texts, tokens, a stop, an end, a seed.
    let prompt = "Once upon a time";
    let expected = said(&["--prompt", prompt, "--max-new-tokens", "20"]);
    assert_eq!(server.text("base", prompt, 20), expected);
    let word = expected.split_whitespace().nth(5).unwrap();
    let ask = json!({"model": "base", "prompt": [prompt, "One day"], "max_tokens": 20,
        "temperature": 0, "stop": word});
    let both = server.post("/v1/completions", &ask).json();
    assert_eq!(both["object"], "text_completion");
    assert_eq!(both["choices"][0]["text"], expected.split(word).next().unwrap());
    assert_eq!(both["choices"][0]["finish_reason"], "stop");
    assert_eq!(both["choices"][1]["index"], 1);
    let draw = |seed: u64| {
        let ask = json!({"model": "base", "prompt": [1, 300, 44], "n": 2, "seed": seed,
            "max_tokens": 12, "temperature": 1, "top_p": 0.9, "top_k": 50, "min_p": 0.01,
            "repetition_penalty": 1.1});
        let found = server.post("/v1/completions", &ask).json();
        [0, 1].map(|i| found["choices"][i]["text"].as_str().unwrap().to_owned())
    };
    let drawn = draw(7);
    assert_eq!(drawn, draw(7));
    assert_ne!(drawn[0], drawn[1]);
    assert_ne!(drawn, draw(8));

    // An adapter answers as it does alone, and the base as before.
    let tuned = said(&["--adapter", "tuned", "--prompt", prompt, "--max-new-tokens", "20"]);
    assert_ne!(tuned, expected);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| assert_eq!(server.text("tales", prompt, 20), tuned));
            scope.spawn(|| assert_eq!(server.text("base", prompt, 20), expected));
        }
    });
    assert!(server.metric("adapter_switches_total") >= 1.0);
}

#[test]
fn how_likely_tokens_were_is_told() {
    let place = place();
    let server = Server::start(&place, "base", &[]);
    let number = |value: &Value| value.as_f64().unwrap();
    let mut ask = json!({"model": "base", "max_tokens": 9, "temperature": 0, "logprobs": true,
        "top_logprobs": 3, "messages": [{"role": "user", "content": "Hello Lily"}]});
    let whole = server.post("/v1/chat/completions", &ask).json();
    let choice = &whole["choices"][0];
    let content = choice["logprobs"]["content"].as_array().unwrap();
    assert_eq!(content.len(), 9);
    let text: String = content.iter().map(|token| token["token"].as_str().unwrap()).collect();
    assert_eq!(text, choice["message"]["content"].as_str().unwrap());
    for token in content {
        let top = token["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 3);
        // Greedily the likeliest is chosen.
        assert_eq!((&top[0]["token"], &top[0]["logprob"]), (&token["token"], &token["logprob"]));
        let logprobs: Vec<f64> = top.iter().map(|token| number(&token["logprob"])).collect();
        assert!(logprobs.is_sorted_by(|a, b| a >= b) && logprobs[0] < 0.0, "{logprobs:?}");
        assert!(logprobs.iter().map(|x| x.exp()).sum::<f64>() < 1.0 + 1e-6, "{logprobs:?}");
    }
    // In pieces it is the same, each with its text.
    ask["stream"] = true.into();
    let mut told = Vec::new();
    for piece in server.post("/v1/chat/completions", &ask).pieces() {
        let choice = &piece["choices"][0];
        let new: Vec<Value> = choice["logprobs"]["content"].as_array().cloned().unwrap_or_default();
        let text: String = new.iter().map(|token| token["token"].as_str().unwrap()).collect();
        assert_eq!(text, choice["delta"]["content"].as_str().unwrap_or_default());
        told.extend(new);
    }
    // The prompt is known by now, and sums come in another order.
    assert_eq!(told.len(), content.len());
    for (told, token) in told.iter().zip(content) {
        assert_eq!(told["token"], token["token"]);
        assert!((number(&told["logprob"]) - number(&token["logprob"])).abs() < 1e-4);
    }

    let ask = json!({"model": "base", "prompt": "Once upon a time", "max_tokens": 6,
        "temperature": 0, "logprobs": 2});
    let found = server.post("/v1/completions", &ask).json();
    let (choice, logprobs) = (&found["choices"][0], &found["choices"][0]["logprobs"]);
    let tokens: Vec<&str> =
        logprobs["tokens"].as_array().unwrap().iter().map(|t| t.as_str().unwrap()).collect();
    assert_eq!(tokens.concat(), choice["text"].as_str().unwrap());
    assert_eq!(logprobs["text_offset"][1], tokens[0].chars().count());
    assert_eq!(logprobs["top_logprobs"][0][tokens[0]], logprobs["token_logprobs"][0]);
    assert_eq!(logprobs["top_logprobs"][0].as_object().unwrap().len(), 2);
    // Nobody asked.
    let ask = json!({"model": "base", "prompt": "Once", "max_tokens": 2});
    assert!(server.post("/v1/completions", &ask).json()["choices"][0]["logprobs"].is_null());
}

#[test]
fn a_text_is_the_same_alone_and_among_others() {
    let place = place();
    let server = Server::start(&place, "base", &["--parallel", "5"]);
    let story = "Lily and Tom went to the park with the big red ball that their mom had bought. ";
    let prompts: Vec<(String, usize)> = (0..9)
        .map(|index| (story.repeat(index % 4) + &story[..9 + 7 * index], 60 - 6 * index))
        .collect();
    let alone: Vec<String> =
        prompts.iter().map(|(prompt, tokens)| server.text("base", prompt, *tokens)).collect();
    std::thread::scope(|scope| {
        for ((prompt, tokens), alone) in prompts.iter().zip(&alone) {
            let server = &server;
            scope.spawn(move || assert_eq!(server.text("base", prompt, *tokens), *alone));
        }
    });
    let steps = server.metric("steps_total");
    assert!(steps < 1.9 * server.metric("generated_tokens_total") / 2.0, "{steps} steps alone");
}

#[test]
fn what_prompts_begin_with_alike_is_computed_once() {
    let place = place();
    let story = "Lily and Tom went to the park with the big red ball that their mom had bought. ";
    let begun = story.repeat(6);
    let prompts = ["Then", "Then they saw", "A dog", "Then they saw a cat"];
    let prompts = prompts.map(|end| format!("{begun}{end}"));
    let texts = |args: &[&str]| {
        let server = Server::start(&place, "base", args);
        // One token, as a question of yes or no wants it, leaves its prompt behind, too.
        let tokens = |prompt: &String| if *prompt == prompts[0] { 1 } else { 12 };
        let texts = prompts.each_ref().map(|prompt| server.text("base", prompt, tokens(prompt)));
        let tokens = ["prompt_tokens_total", "prompt_tokens_known_total"];
        (texts, tokens.map(|name| server.metric(name)))
    };
    let (texts_of_each, [all, known]) = texts(&["--prefix-cache", "0"]);
    assert!(all > 300.0 && known == 0.0, "{known} of {all}");
    let (texts_of_shared, [same, known]) = texts(&[]);
    assert_eq!(texts_of_shared, texts_of_each);
    assert!((same - all).abs() < 0.5 && known > 0.7 * all, "{known} of {all}");
}

#[test]
fn a_long_prompt_comes_in_pieces_and_is_the_same_text() {
    // stories260k has a context of 512 tokens, the other model too: pieces are of 64 here.
    let place = place();
    let words = "Once upon a time there was a little girl who had a red ball and a dog. ".repeat(9);
    let text = |args: &[&str]| {
        let server = Server::start(&place, "plain", args);
        let text = server.text("plain", &words, 16);
        (text, server.metric("steps_total"))
    };
    let (whole, _) = text(&["--prefix-cache", "0"]);
    let (pieces, _) = text(&["--prefix-cache", "0", "--prompt-piece", "64"]);
    assert_eq!(pieces, whole);
}

#[test]
fn penalties_change_what_is_said() {
    let place = place();
    let server = Server::start(&place, "base", &[]);
    let text = |more: Value| {
        let mut ask =
            json!({"model": "base", "prompt": "Once", "max_tokens": 60, "temperature": 0});
        ask.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let reply = server.post("/v1/completions", &ask);
        reply.json()["choices"][0]["text"].as_str().unwrap().to_owned()
    };
    let distinct = |text: &str| {
        let words: std::collections::BTreeSet<&str> = text.split(' ').collect();
        words.len() as f64 / text.split(' ').count() as f64
    };
    let plain = text(json!({}));
    assert_eq!(text(json!({"presence_penalty": 0, "frequency_penalty": null})), plain);
    for penalty in ["presence_penalty", "frequency_penalty"] {
        let varied = text(json!({ penalty: 2 }));
        assert!(distinct(&varied) > distinct(&plain), "{penalty}: {varied} and {plain}");
    }
}

#[test]
fn what_is_wrong_is_said() {
    let place = place();
    let server =
        Server::start(&place, "base", &["--parallel", "1", "--queue", "1", "--max-body", "64"]);
    let message = json!([{"role": "user", "content": "x"}]);
    let chat = |more: Value| {
        let mut ask = json!({"model": "base", "messages": message, "max_tokens": 2});
        ask.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        ask.to_string()
    };
    let completion = |prompt: Value| json!({"model": "base", "prompt": prompt}).to_string();
    let table = [
        ("/v1/chat/completions", "{\"model\"".to_owned(), 400, "not valid JSON"),
        ("/v1/chat/completions", "[]".to_owned(), 400, "no JSON object"),
        ("/v1/chat/completions", String::new(), 400, "not valid JSON"),
        ("/v1/chat/completions", "[".repeat(9000), 400, "not valid JSON"),
        ("/v1/chat/completions", chat(json!({"model": null})), 400, "`model` is missing"),
        ("/v1/chat/completions", chat(json!({"model": "gpt-4"})), 404, "no model `gpt-4`"),
        ("/v1/chat/completions", chat(json!({"messages": null})), 400, "`messages` is missing"),
        ("/v1/chat/completions", chat(json!({"messages": []})), 400, "is empty"),
        ("/v1/chat/completions", chat(json!({"messages": [{"content": 1}]})), 400, "message 1"),
        ("/v1/chat/completions", chat(json!({"temperature": "hot"})), 400, "`temperature` is"),
        ("/v1/chat/completions", chat(json!({"temperature": -1})), 400, "`temperature` is -1"),
        ("/v1/chat/completions", chat(json!({"top_p": 1.5})), 400, "`top_p`"),
        ("/v1/chat/completions", chat(json!({"max_tokens": 0})), 400, "`max_tokens`"),
        ("/v1/chat/completions", chat(json!({"max_completion_tokens": 1.5})), 400, "whole number"),
        ("/v1/chat/completions", chat(json!({"n": 0})), 400, "`n` is 0"),
        ("/v1/chat/completions", chat(json!({"n": 3})), 400, "asks for 3 texts"),
        ("/v1/chat/completions", chat(json!({"stop": [1]})), 400, "`stop`"),
        ("/v1/chat/completions", chat(json!({"stream": "yes"})), 400, "`stream`"),
        ("/v1/chat/completions", chat(json!({"seed": 0.5})), 400, "`seed`"),
        ("/v1/chat/completions", chat(json!({"presence_penalty": 3})), 400, "from -2 to 2"),
        ("/v1/chat/completions", chat(json!({"top_logprobs": 2})), 400, "needs `logprobs`"),
        ("/v1/chat/completions", chat(json!({"logprobs": 2})), 400, "true or false"),
        ("/v1/chat/completions", chat(json!({"tools": [{}]})), 400, "not supported"),
        ("/v1/completions", completion(json!("x ".repeat(2000))), 400, "the model's context 512"),
        ("/v1/completions", completion(json!([])), 400, "empty"),
        ("/v1/completions", completion(json!([1, 2048])), 400, "token 2048"),
        ("/v1/completions", completion(json!([1, "x"])), 400, "`prompt` is"),
        ("/v1/completions", completion(json!("x".repeat(70_000))), 413, "larger than 65536"),
        ("/v1/embeddings", "{}".to_owned(), 404, "no POST /v1/embeddings"),
        ("/v1/models", "{}".to_owned(), 405, "takes GET"),
    ];
    for (path, body, status, what) in table {
        let reply = server.send(&post(path), &body);
        let found = reply.json();
        let message = found["error"]["message"].as_str().unwrap();
        assert_eq!(reply.status, status, "{path} {body:.90}: {found}");
        assert!(message.contains(what), "{path} {body:.90}: {message}");
        assert!(found["error"]["type"].is_string());
    }
    let plain = server.send("POST /v1/completions HTTP/1.0", &completion(json!("x")));
    assert_eq!(plain.status, 415);
    assert_eq!(server.get("/v1/models/gpt-4").json()["error"]["code"], "model_not_found");
    // What asks for nothing is no fault.
    let nothing = chat(json!({"frequency_penalty": 0, "logit_bias": {}, "tools": [], "user": "me",
        "response_format": {"type": "text"}, "logprobs": false, "stop": null}));
    assert_eq!(server.send(&post("/v1/chat/completions"), &nothing).status, 200);
    // No bytes of another language, and no end of a body that never comes.
    let mut stream = server.connect();
    stream.write_all(b"\x16\x03\x01 not HTTP\r\n\r\n").unwrap();
    let mut text = Vec::new();
    let _ = stream.read_to_end(&mut text);
    drop(server.ask("POST /v1/completions HTTP/1.0\nX: y", "{"));

    // One runs, one waits, the next one comes too early, unless the first is done by then: so more than once.
    let mut tries = (0..100).map(|_| {
        let _running = server.ask(&post("/v1/completions"), &long(2).to_string());
        server.send(&post("/v1/completions"), &completion(json!("x")))
    });
    let full = tries.find(|reply| reply.status != 200).expect("no queue was full");
    assert_eq!((full.status, &full.json()["error"]["code"]), (429, &json!("queue_full")));
    assert!(full.head.contains("retry-after: "), "{}", full.head);
}

#[test]
fn who_leaves_makes_room() {
    let place = place();
    let server = Server::start(&place, "base", &["--parallel", "2"]);
    let mut left = server.ask(&post("/v1/completions"), &long(60).to_string());
    let mut some = [0; 300];
    left.read_exact(&mut some).unwrap();
    drop(left);
    server.wait_until("nothing runs", |s| {
        s.metric("texts_running") + s.metric("texts_waiting") < 1.0
    });
    let written = server.metric("generated_tokens_total");
    assert!(written < 20_000.0, "{written} tokens of 30000 were written for nobody");
    // The same for an answer in one piece.
    let mut whole = long(60);
    whole["stream"] = false.into();
    let left = server.ask(&post("/v1/completions"), &whole.to_string());
    server.wait_until("it runs", |s| s.metric("texts_running") > 0.0);
    drop(left);
    server.wait_until("nothing runs", |s| {
        s.metric("texts_running") + s.metric("texts_waiting") < 1.0
    });
    assert!(server.metric("generated_tokens_total") < 40_000.0);
}

#[test]
fn a_signal_lets_running_answers_end_for_a_while() {
    let place = place();
    let server = Server::start(&place, "base", &["--grace", "60"]);
    let running = server.ask(&post("/v1/completions"), &long(2).to_string());
    server.wait_until("it runs", |s| s.metric("texts_running") > 0.0);
    server.signal(Signal::TERM);
    assert!(!read(running).pieces().is_empty());
    let (code, told) = server.ended();
    assert_eq!(code, 143, "{told}");
    assert!(told.contains("error: stopped by a signal\n  try  "), "{told}");

    let server = Server::start(&place, "base", &["--grace", "0", "--parallel", "2"]);
    let running = server.ask(&post("/v1/completions"), &long(100).to_string());
    server.wait_until("it runs", |s| s.metric("texts_running") > 0.0);
    server.signal(Signal::INT);
    let cut = read(running);
    assert!(cut.body.contains("the server is stopping"), "{}", cut.body);
    assert_eq!(server.ended().0, 130);
}

#[test]
fn keys_ports_and_names_are_checked() {
    let place = place();
    let server = Server::start(&place, "plain", &["--api-key", "sesame", "--name", "a/b"]);
    assert_eq!(server.get("/v1/models").status, 401);
    assert_eq!(server.send("GET /v1/models HTTP/1.0\nAuthorization: Bearer x", "").status, 401);
    let with_key = "HTTP/1.0\nAuthorization: Bearer sesame";
    let list = server.send(&format!("GET /v1/models {with_key}"), "").json();
    assert_eq!(list["data"][0]["id"], "a/b");
    assert_eq!(server.send(&format!("GET /v1/models/a/b {with_key}"), "").status, 200);
    assert_eq!(server.get("/health").status, 200);
    let head = format!("POST /v1/chat/completions {with_key}\nContent-Type: application/json");
    let ask = json!({"model": "a/b", "messages": [{"role": "user", "content": "x"}]}).to_string();
    let refused = server.send(&head, &ask);
    assert_eq!(
        (refused.status, &refused.json()["error"]["code"]),
        (400, &json!("no_chat_template"))
    );

    let port = server.port.to_string();
    let text = place.refused(&["serve", "--model", "plain", "--port", &port]);
    assert!(text.starts_with("exit 1\nerror: the port is taken"), "{text}");
    let text = place.refused(&["serve", "--model", "nowhere", "--port", "0"]);
    assert!(!text.starts_with("exit 1\n"), "{text}");
    let text = place.refused(&["serve", "--model", "base", "--adapter", "base=tuned"]);
    assert!(
        text.starts_with("exit 2\nerror: the model and an adapter are both named base"),
        "{text}"
    );
    let text = place.refused(&["serve", "--model", "base", "--api-key", ""]);
    assert!(text.starts_with("exit 2\nerror: the API key is empty"), "{text}");
    let text = place.refused(&["serve", "--model", "base", "--host", "256.0.0.1"]);
    assert!(text.starts_with("exit 2\nerror: the host is no address"), "{text}");
    assert_eq!(place.run(&["serve", "--model", "base", "--parallel", "0"]).code, 2);
}

#[test]
fn a_width_is_a_model_of_its_own() {
    let place = Place::new();
    let recipe = RECIPE
        .replace("method.rtn = {}", "method.anybcq = { lowest = 2, rounds = 2 }")
        .replace("\"model\"", "\"embedded:tinystories-656k\"");
    place.write("base.toml", recipe + "allow_worse = true\n");
    place.write("few.json", few_stories(4));
    place.ok(&["train", "--recipe", "base.toml", "--set", "quant.group_size=64"]);
    let server = Server::start(&place, "base", &[]);
    let models = server.get("/v1/models").json();
    let names: Vec<&str> = models["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|model| model["id"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["base", "base@3bit", "base@2bit"]);
    let mut texts = Vec::new();
    for (name, bits) in [("base", "4"), ("base@3bit", "3"), ("base@2bit", "2")] {
        let args =
            ["--model", "base", "--bits", bits, "--prompt", "Once upon", "--max-new-tokens", "12"];
        let alone = place.json(&[&["generate", "--json"], &args[..]].concat());
        let text = server.text(name, "Once upon", 12);
        assert_eq!(alone["text"], text, "{name}");
        texts.push(text);
    }
    texts.dedup();
    assert!(texts.len() > 1, "{texts:?}");
    drop(server);
    let one = Server::start(&place, "base", &["--bits", "2"]);
    assert_eq!(one.get("/v1/models").json()["data"].as_array().unwrap().len(), 1);
}
