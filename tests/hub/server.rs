//! A hub of one model on this machine, and beside it the place where it keeps large files.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use serde_json::json;
use sha1::Sha1;
use sha2::{Digest, Sha256};

pub(crate) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
pub(crate) const WEIGHTS: &str = "model.safetensors";

/// A request as it came.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) path: String,
    pub(crate) authorization: Option<String>,
    pub(crate) range: Option<String>,
    /// How many of this path came before.
    pub(crate) before: usize,
    /// Whether it came to where large files are.
    pub(crate) elsewhere: bool,
}

/// What is sent back.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(&'static str, String)>,
    pub(crate) body: Vec<u8>,
    /// The connection breaks after this much of the body.
    pub(crate) cut: Option<usize>,
}

impl Reply {
    pub(crate) fn status(status: u16) -> Self {
        Self { status, ..Self::default() }
    }

    pub(crate) fn with(mut self, name: &'static str, value: &str) -> Self {
        self.headers.push((name, value.to_owned()));
        self
    }
}

/// What a test wants otherwise.
type Script = dyn Fn(&Request, Reply) -> Reply + Send + Sync;

pub(crate) struct Server {
    pub(crate) address: String,
    seen: Arc<Mutex<Vec<Request>>>,
}

struct Shelf {
    files: BTreeMap<String, Vec<u8>>,
    seen: Arc<Mutex<Vec<Request>>>,
    elsewhere: String,
    script: Box<Script>,
}

impl Server {
    /// Serves `files` as owner/name; `script` sees each reply before it is sent.
    pub(crate) fn new(
        files: BTreeMap<String, Vec<u8>>,
        script: impl Fn(&Request, Reply) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let listen = || TcpListener::bind("127.0.0.1:0").unwrap();
        let (hub, store) = (listen(), listen());
        let at = |listener: &TcpListener| format!("http://{}", listener.local_addr().unwrap());
        let (address, elsewhere) = (at(&hub), at(&store));
        let seen = Arc::new(Mutex::new(Vec::new()));
        let shelf = Shelf { files, seen: Arc::clone(&seen), elsewhere, script: Box::new(script) };
        let shelf = Arc::new(shelf);
        for (listener, is_store) in [(hub, false), (store, true)] {
            let shelf = Arc::clone(&shelf);
            std::thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let shelf = Arc::clone(&shelf);
                    std::thread::spawn(move || shelf.serve(stream, is_store));
                }
            });
        }
        Self { address, seen }
    }

    pub(crate) fn seen(&self) -> Vec<Request> {
        self.seen.lock().unwrap().clone()
    }
}

impl Shelf {
    fn serve(&self, stream: TcpStream, elsewhere: bool) {
        let Some(mut request) = read(&stream) else { return };
        request.elsewhere = elsewhere;
        {
            let mut seen = self.seen.lock().unwrap();
            request.before = seen.iter().filter(|other| other.path == request.path).count();
            seen.push(request.clone());
        }
        let reply = (self.script)(&request, self.reply(&request));
        send(stream, &reply);
    }

    fn reply(&self, request: &Request) -> Reply {
        let list = |kind| format!("/api/{kind}/owner/name/revision/main?blobs=true");
        if [list("models"), list("datasets")].contains(&request.path) {
            let files: Vec<_> =
                self.files.iter().map(|(name, bytes)| listed(name, bytes)).collect();
            let body = json!({ "sha": COMMIT, "siblings": files }).to_string().into_bytes();
            return Reply { status: 200, body, ..Reply::default() };
        }
        let path = request.path.split('?').next().unwrap();
        // The name behind the commit, with the folders before it.
        let name = path.split_once(&format!("/resolve/{COMMIT}/")).map(|(_, name)| name);
        let name = name.unwrap_or_else(|| path.rsplit('/').next().unwrap());
        let Some(bytes) = self.files.get(name) else { return Reply::status(404) };
        if name == WEIGHTS && !request.elsewhere {
            let to = format!("{}/{name}?signature=secret", self.elsewhere);
            return Reply::status(302).with("Location", &to);
        }
        let from = request.range.as_ref().map(|range| {
            range.strip_prefix("bytes=").unwrap().strip_suffix('-').unwrap().parse().unwrap()
        });
        match from {
            None => Reply { status: 200, body: bytes.clone(), ..Reply::default() },
            Some(from) if from < bytes.len() => {
                let range = format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len());
                let body = bytes[from..].to_vec();
                Reply { status: 206, body, ..Reply::default() }.with("Content-Range", &range)
            }
            Some(_) => Reply::status(416),
        }
    }
}

/// As the hub lists it: large files by SHA-256, small ones by git's SHA-1.
fn listed(name: &str, bytes: &[u8]) -> serde_json::Value {
    if name == WEIGHTS {
        let lfs = json!({ "sha256": sha256(bytes), "size": bytes.len(), "pointerSize": 134 });
        return json!({ "rfilename": name, "size": bytes.len(), "blobId": "0", "lfs": lfs });
    }
    json!({ "rfilename": name, "size": bytes.len(), "blobId": git_sha1(bytes) })
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

pub(crate) fn git_sha1(bytes: &[u8]) -> String {
    let head = format!("blob {}\0", bytes.len());
    hex(&Sha1::digest([head.as_bytes(), bytes].concat()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |hex, byte| hex + &format!("{byte:02x}"))
}

fn read(stream: &TcpStream) -> Option<Request> {
    let mut lines = BufReader::new(stream).lines();
    let first = lines.next()?.ok()?;
    let path = first.split(' ').nth(1)?.to_owned();
    let (mut authorization, mut range) = (None, None);
    for line in lines.map_while(Result::ok).take_while(|line| !line.is_empty()) {
        let (name, value) = line.split_once(':')?;
        match name.to_lowercase().as_str() {
            "authorization" => authorization = Some(value.trim().to_owned()),
            "range" => range = Some(value.trim().to_owned()),
            _ => {}
        }
    }
    Some(Request { path, authorization, range, before: 0, elsewhere: false })
}

fn send(mut stream: TcpStream, reply: &Reply) {
    let mut lines = vec![
        format!("HTTP/1.1 {} Status", reply.status),
        "Connection: close".to_owned(),
        format!("Content-Length: {}", reply.body.len()),
    ];
    lines.extend(reply.headers.iter().map(|(name, value)| format!("{name}: {value}")));
    let head = lines.join("\r\n") + "\r\n\r\n";
    let body = &reply.body[..reply.cut.unwrap_or(reply.body.len())];
    // The other side may have gone.
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
}
