//! `fewbit serve` from outside: OpenAI's requests, wrong ones, many at once, and the end.
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use common::Place;
use serde_json::{Value, json};

const TEMPLATE: &str = "{% for m in messages %}{{ m.role }} said: {{ m.content | trim }}.\n{% endfor %}\
                        {% if add_generation_prompt %}assistant said: {% endif %}";

fn place() -> Place {
    let place = Place::new();
    place.copy_model("stories260k", "model");
    place.write("model/chat_template.jinja", TEMPLATE);
    place
}

/// A server, which ends with its test.
struct Server {
    process: Child,
    address: String,
}

struct Answer {
    status: u16,
    headers: String,
    body: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }
}

impl Server {
    fn start(place: &Place, args: &[&str]) -> Self {
        let all = [&["serve", "--model", "model", "--port", "0"], args].concat();
        let mut command = place.command(&all);
        let mut process = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().rsplit_once("http://").unwrap().1;
        let address = address.strip_suffix("/v1").unwrap().to_owned();
        Self { process, address }
    }

    fn open(&self, head: &str, body: &str) -> TcpStream {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_mins(1))).unwrap();
        let length = body.len();
        let rest =
            format!("Host: x\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}");
        stream.write_all(format!("{head}\r\n{rest}").as_bytes()).unwrap();
        stream
    }

    fn ask(&self, head: &str, body: &str) -> Answer {
        let mut text = Vec::new();
        self.open(head, body).read_to_end(&mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        let (headers, body) = text.split_once("\r\n\r\n").unwrap();
        let status = headers.split(' ').nth(1).unwrap().parse().unwrap();
        let headers = headers.to_ascii_lowercase();
        let body = if headers.contains("transfer-encoding: chunked") {
            unchunked(body)
        } else {
            body.to_owned()
        };
        Answer { status, headers, body }
    }

    fn get(&self, path: &str) -> Answer {
        self.ask(&format!("GET {path} HTTP/1.1"), "")
    }

    fn post(&self, path: &str, body: &Value) -> Answer {
        self.ask(&posted(path), &body.to_string())
    }

    /// The text of a completion.
    fn completed(&self, prompt: &str, more: &Value) -> String {
        let mut body = json!({ "model": "model", "prompt": prompt, "temperature": 0 });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let answer = self.post("/v1/completions", &body);
        assert_eq!(answer.status, 200, "{}", answer.body);
        answer.json()["choices"][0]["text"].as_str().unwrap().to_owned()
    }

    fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").body;
        let line = text.lines().find(|line| line.starts_with(&format!("fewbit_{name} ")));
        line.unwrap().rsplit_once(' ').unwrap().1.parse().unwrap()
    }

    /// Waits until no text runs and none waits.
    fn wait_until_idle(&self) {
        let begin = Instant::now();
        while self.metric("texts_running") + self.metric("texts_waiting") > 0.0 {
            assert!(begin.elapsed() < Duration::from_secs(20), "a text that nobody reads runs on");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn posted(path: &str) -> String {
    format!("POST {path} HTTP/1.1\r\nContent-Type: application/json")
}

fn unchunked(body: &str) -> String {
    let (mut text, mut rest) = (String::new(), body);
    while let Some((size, more)) = rest.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap();
        text.push_str(&more[..size]);
        rest = more[size..].trim_start_matches("\r\n");
        if size == 0 {
            break;
        }
    }
    text
}

/// The objects of a stream of server-sent events, whose last word is `[DONE]`.
fn pieces(answer: &Answer) -> Vec<Value> {
    assert!(answer.headers.contains("text/event-stream"), "{}", answer.headers);
    let mut data: Vec<&str> =
        answer.body.lines().filter_map(|l| l.strip_prefix("data: ")).collect();
    assert_eq!(data.pop(), Some("[DONE]"));
    data.iter().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn it_says_what_the_command_line_says() {
    let place = place();
    let server = Server::start(&place, &[]);
    assert_eq!(server.get("/health").json()["status"], "ok");
    let models = server.get("/v1/models").json();
    assert_eq!(models["data"][0]["id"], "model");
    assert_eq!(server.get("/v1/models/model").json()["object"], "model");

    let generate = ["generate", "--model", "model", "--json", "--max-new-tokens", "12"];
    let alone = |args: &[&str]| place.json(&[&generate[..], args].concat());
    let said = alone(&["--chat", "--prompt", "Hello Lily"]);
    let chat = json!({
        "model": "model", "temperature": 0, "max_tokens": 12,
        "messages": [{ "role": "user", "content": "Hello Lily" }],
    });
    let answer = server.post("/v1/chat/completions", &chat);
    let whole = answer.json();
    assert_eq!(whole["object"], "chat.completion");
    assert_eq!(whole["choices"][0]["message"]["content"], said["text"]);
    assert_eq!(whole["choices"][0]["finish_reason"], "length");
    assert_eq!(whole["usage"]["completion_tokens"], 12);

    // In pieces it is the same text, with the counts in the last one.
    let mut streamed = chat.clone();
    streamed["stream"] = true.into();
    streamed["stream_options"] = json!({ "include_usage": true });
    let pieces = pieces(&server.post("/v1/chat/completions", &streamed));
    let text = |piece: &Value| piece["choices"][0]["delta"]["content"].as_str().map(str::to_owned);
    let all: String = pieces.iter().filter_map(text).collect();
    assert_eq!(all, said["text"].as_str().unwrap());
    assert!(pieces.iter().all(|piece| piece["object"] == "chat.completion.chunk"));
    assert_eq!(pieces.last().unwrap()["usage"], whole["usage"]);

    // A stop cuts the text where the command line does, and several prompts are several answers.
    let prompts = ["One day, a girl", "The dog was"];
    let texts = prompts.map(|prompt| alone(&["--prompt", prompt])["text"].clone());
    let both = json!({ "model": "model", "prompt": prompts, "temperature": 0, "max_tokens": 12 });
    let both = server.post("/v1/completions", &both).json();
    for (index, text) in texts.iter().enumerate() {
        assert_eq!(both["choices"][index]["text"], *text, "{both}");
    }
    let first = texts[0].as_str().unwrap();
    let stop: String = first.chars().skip(6).take(3).collect();
    let cut = server.completed(prompts[0], &json!({ "max_tokens": 12, "stop": stop }));
    assert_eq!(cut, first.split(&stop).next().unwrap());

    // A seed is a text.
    let drawn = json!({ "temperature": 1.0, "seed": 7, "max_tokens": 12 });
    let of_seed = server.completed(prompts[0], &drawn);
    assert_eq!(server.completed(prompts[0], &drawn), of_seed);
}

#[test]
fn many_at_once_get_what_each_gets_alone() {
    let server = Server::start(&place(), &["--parallel", "4"]);
    let prompts =
        ["One day", "The big dog ran to the park and", "Lily", "A cat and a bird were", "He"];
    let tokens = |index: usize| json!({ "max_tokens": 6 + 5 * (index % 4) });
    let alone: Vec<String> = prompts
        .iter()
        .enumerate()
        .map(|(index, prompt)| server.completed(prompt, &tokens(index)))
        .collect();
    std::thread::scope(|scope| {
        let asked: Vec<_> = (0..20)
            .map(|index| {
                let (server, index) = (&server, index % prompts.len());
                (index, scope.spawn(move || server.completed(prompts[index], &tokens(index))))
            })
            .collect();
        for (index, thread) in asked {
            assert_eq!(thread.join().unwrap(), alone[index]);
        }
    });
    assert!(server.metric("generated_tokens_total") > server.metric("steps_total"));
}

#[test]
fn wrong_requests_are_refused_as_openai_does() {
    let place = place();
    let server = Server::start(&place, &["--max-body", "2"]);
    let (chat, plain) = ("/v1/chat/completions", "/v1/completions");
    let long = "a".repeat(3000);
    let cases = [
        (chat, "{".to_owned(), 400, "not valid JSON"),
        (chat, "[]".to_owned(), 400, "no JSON object"),
        (chat, json!({ "messages": [] }).to_string(), 400, "`model` is missing"),
        (chat, json!({ "model": "gpt-4", "messages": [] }).to_string(), 404, "no model `gpt-4`"),
        (chat, json!({ "model": "model" }).to_string(), 400, "`messages` is missing"),
        (chat, json!({ "model": "model", "messages": "hi" }).to_string(), 400, ""),
        (plain, json!({ "model": "model" }).to_string(), 400, "`prompt` is missing"),
        (plain, json!({ "model": "model", "prompt": [99999] }).to_string(), 400, "token 99999"),
        (plain, json!({ "model": "model", "prompt": [] }).to_string(), 400, "empty"),
        (plain, json!({ "model": "model", "prompt": "a", "n": 0 }).to_string(), 400, "`n` is 0"),
        (
            plain,
            json!({ "model": "model", "prompt": "a", "temperature": 9 }).to_string(),
            400,
            "`temperature` is 9",
        ),
        (
            plain,
            json!({ "model": "model", "prompt": "a", "logprobs": 2 }).to_string(),
            400,
            "`logprobs` is not supported",
        ),
        (plain, json!({ "model": "model", "prompt": long }).to_string(), 413, "larger than 2048"),
    ];
    for (path, body, status, words) in cases {
        let answer = server.ask(&posted(path), &body);
        assert_eq!(answer.status, status, "{body}: {}", answer.body);
        let message = answer.json()["error"]["message"].as_str().unwrap().to_owned();
        assert!(message.contains(words), "{body}: {message}");
    }
    assert_eq!(server.ask("POST /v1/completions HTTP/1.1", "{}").status, 415);
    assert_eq!(server.get("/v1/completions").status, 405);
    assert_eq!(server.get("/nowhere").status, 404);
    // Bytes that are no request end their connection alone.
    drop(server.open("\u{0}\u{1}", "garbage"));
    assert_eq!(server.get("/health").status, 200);

    let port = server.address.rsplit_once(':').unwrap().1;
    let taken = place.run(&["serve", "--model", "model", "--port", port]);
    assert_eq!(taken.code, 1, "{}", taken.err);
    assert!(taken.err.contains("the port is taken"), "{}", taken.err);
    assert_eq!(place.run(&["serve", "--model", "nowhere", "--port", "0"]).code, 2);
}

#[test]
fn a_key_is_asked_for_where_one_is_set() {
    let server = Server::start(&place(), &["--api-key", "secret"]);
    assert_eq!(server.get("/health").status, 200);
    assert_eq!(server.get("/v1/models").status, 401);
    let with = |key: &str| format!("GET /v1/models HTTP/1.1\r\nAuthorization: Bearer {key}");
    assert_eq!(server.ask(&with("other"), "").status, 401);
    assert_eq!(server.ask(&with("secret"), "").status, 200);
}

#[test]
fn a_full_line_refuses_and_a_client_that_leaves_makes_room() {
    let server = Server::start(&place(), &["--parallel", "1", "--queue", "0"]);
    let long = json!({ "model": "model", "prompt": "One day", "max_tokens": 400, "stream": true });
    let mut stream = server.open(&posted("/v1/completions"), &long.to_string());
    // Once it speaks, it runs.
    stream.read_exact(&mut [0; 64]).unwrap();
    let answer = server.post("/v1/completions", &json!({ "model": "model", "prompt": "a" }));
    // A small model may be done by now.
    if answer.status != 200 {
        assert_eq!(answer.status, 429, "{}", answer.body);
        assert!(answer.headers.contains("retry-after"), "{}", answer.headers);
        assert_eq!(answer.json()["error"]["code"], "queue_full");
    }
    drop(stream);
    server.wait_until_idle();
    server.completed("a", &json!({ "max_tokens": 2 }));
}

#[cfg(unix)]
#[test]
fn a_signal_ends_it_after_what_runs() {
    let mut server = Server::start(&place(), &["--grace", "20"]);
    let ask = json!({ "model": "model", "prompt": "One day", "max_tokens": 60, "temperature": 0 });
    let mut stream = server.open(&posted("/v1/completions"), &ask.to_string());
    let begin = Instant::now();
    while server.metric("texts_running") < 1.0 && server.metric("generated_tokens_total") < 60.0 {
        assert!(begin.elapsed() < Duration::from_secs(20));
    }
    let pid = server.process.id().to_string();
    std::process::Command::new("kill").args(["-TERM", &pid]).status().unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert!(text.starts_with("HTTP/1.1 200"), "{text}");
    assert!(text.contains("\"completion_tokens\":60"), "{text}");
    assert_eq!(server.process.wait().unwrap().code(), Some(143));
    assert!(TcpStream::connect(&server.address).is_err());
}
