//! Models from the hub, against a small one on this machine: redirects, refusals, cut connections, what must
//! not be believed; and names that look like the hub's.
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too

#[path = "../common/mod.rs"]
mod common;
mod data;
mod offline;
mod secrets;
mod server;

use std::collections::BTreeMap;
use std::process::Command;
use std::time::{Duration, Instant};

use common::{Ended, Place, datasets};
use insta::assert_snapshot;
use server::{COMMIT, Reply, Server, WEIGHTS, git_sha1, sha256};

const TOKEN: &str = "hf_thisIsTheTokenOfTheTest";
const LISTING: &str = "/api/models/";

fn model() -> BTreeMap<String, Vec<u8>> {
    let folder = datasets().join("tinystories-656k");
    let names = ["config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS];
    let read = |name: &str| (name.to_owned(), std::fs::read(folder.join(name)).unwrap());
    let mut files: BTreeMap<_, _> = names.into_iter().map(read).collect();
    // Not asked for.
    files.insert("README.md".to_owned(), b"# A model".to_vec());
    files.insert("onnx/model.json".to_owned(), b"{}".to_vec());
    files
}

/// A command that may use the network, of which `address` is all there is.
fn command(place: &Place, address: &str, args: &[&str]) -> Command {
    let mut command = place.command(args);
    for name in ["HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"] {
        command.env_remove(name);
    }
    command.env("HF_ENDPOINT", address).env("HF_HOME", place.path("hf")).env("HF_TOKEN", TOKEN);
    // Everything that could be said is said.
    command.env("RUST_LOG", "trace");
    command
}

/// Runs it; whatever happens, the token is in nothing that it said or wrote.
fn run(place: &Place, command: Command) -> Ended {
    let mut command = assert_cmd::Command::from_std(command);
    let ended = Ended::from(&command.timeout(Duration::from_mins(1)).output().unwrap());
    assert!(!ended.err.contains("panicked"), "{}", ended.err);
    assert!(!ended.out.contains(TOKEN) && !ended.err.contains(TOKEN), "{}", ended.err);
    assert!(!ended.err.contains("signature=secret"), "{}", ended.err);
    for (name, bytes) in place.tree("") {
        let found = bytes.windows(TOKEN.len()).any(|window| window == TOKEN.as_bytes());
        assert!(!found, "the token is in {name}");
    }
    ended
}

fn inspect(place: &Place, server: &Server) -> Ended {
    run(place, command(place, &server.address, &["inspect", "owner/name"]))
}

/// The error alone, with the server's address as `HUB`.
fn error(ended: &Ended, server: &Server) -> String {
    assert_ne!(ended.code, 0);
    let start = ended.err.find("error: ").unwrap();
    format!("exit {}\n{}", ended.code, ended.err[start..].replace(&server.address, "HUB"))
}

/// What the cache holds of the model, below its folder.
fn cached(place: &Place) -> BTreeMap<String, Vec<u8>> {
    let folder = "hf/hub/models--owner--name";
    if place.path(folder).exists() { place.tree(folder) } else { BTreeMap::new() }
}

fn is_whole(place: &Place) {
    let (files, cached) = (model(), cached(place));
    let names = ["config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS];
    assert_eq!(cached["refs/main"], COMMIT.as_bytes());
    for name in names {
        let hash = if name == WEIGHTS { sha256(&files[name]) } else { git_sha1(&files[name]) };
        assert!(cached[&format!("blobs/{hash}")] == files[name], "{name}");
        assert!(cached[&format!("snapshots/{COMMIT}/{name}")] == files[name], "{name}");
    }
    assert_eq!(cached.len(), 2 * names.len() + 1, "{:?}", cached.keys());
}

#[test]
fn the_token_goes_to_the_hub_and_not_where_it_redirects_to() {
    let (place, server) = (Place::new(), Server::new(model(), |_, reply| reply));
    let ended = inspect(&place, &server);
    assert_eq!(ended.code, 0, "{}", ended.err);
    assert!(ended.err.contains("getting owner/name from the hub: 4 files"), "{}", ended.err);
    is_whole(&place);
    let seen = server.seen();
    let with = format!("Bearer {TOKEN}");
    assert!(seen.iter().any(|request| request.elsewhere));
    for request in &seen {
        let expected = if request.elsewhere { None } else { Some(&with) };
        assert_eq!(request.authorization.as_ref(), expected, "{request:?}");
    }

    // The second time only the commit is asked for; offline, nothing.
    assert_eq!(inspect(&place, &server).out, ended.out);
    assert_eq!(server.seen().len(), seen.len() + 1);
    let mut offline = command(&place, &server.address, &["inspect", "owner/name"]);
    offline.env("HF_HUB_OFFLINE", "1");
    assert_eq!(run(&place, offline).out, ended.out);
    assert_eq!(server.seen().len(), seen.len() + 1);
    // Nor where nobody answers.
    let gone = run(&place, command(&place, "http://127.0.0.1:1", &["inspect", "owner/name"]));
    assert_eq!(gone.out, ended.out);
    assert!(gone.err.contains("the hub cannot be reached"), "{}", gone.err);
}

#[test]
fn refusals_say_what_to_do() {
    let refused = |status: u16, code: &'static str, token: bool| {
        let place = Place::new();
        let server =
            Server::new(model(), move |_, _| Reply::status(status).with("X-Error-Code", code));
        let mut command = command(&place, &server.address, &["inspect", "owner/name"]);
        if !token {
            command.env_remove("HF_TOKEN");
        }
        let ended = run(&place, command);
        assert!(cached(&place).is_empty());
        error(&ended, &server)
    };
    let all = [
        refused(401, "RepoNotFound", false),
        refused(401, "RepoNotFound", true),
        refused(401, "GatedRepo", false),
        refused(403, "GatedRepo", true),
        refused(404, "RepoNotFound", true),
        refused(404, "RevisionNotFound", true),
        refused(418, "", true),
    ];
    assert_snapshot!(all.join("\n"), @r"
    exit 2
    error: there is no such folder, and the hub shows none without a token
      at   owner/name, HUB
      try  check the id; for a gated or private model HF_TOKEN or `hf auth login`

    exit 2
    error: there is no such folder, and the hub has none for this token
      at   owner/name, HUB
      try  check the id; for a private model HF_TOKEN or `hf auth login` anew

    exit 1
    error: the hub lets only accounts with access have this model
      at   owner/name, HUB
      try  ask for access on HUB/owner/name, then HF_TOKEN or `hf auth login`

    exit 1
    error: the hub lets only accounts with access have this model
      at   owner/name, HUB
      try  ask for access on HUB/owner/name, then HF_TOKEN or `hf auth login`

    exit 2
    error: there is no such folder, and the hub has none
      at   owner/name, HUB
      try  check the id

    exit 2
    error: the model has no revision `main`
      at   owner/name, HUB
      try  a branch, tag or commit of HUB/owner/name

    exit 1
    error: the hub answers 418 I'm a teapot
      at   owner/name, HUB
      try  check HF_ENDPOINT and what stands between, or give a local folder
    ");
}

#[test]
fn a_busy_hub_is_asked_again_when_it_says() {
    let place = Place::new();
    let server = Server::new(model(), |request, reply| match request.before {
        0 if request.path.starts_with(LISTING) => Reply::status(429).with("Retry-After", "1"),
        0 if request.elsewhere => Reply::status(503).with("Retry-After", "0"),
        1 if request.elsewhere => Reply::status(500).with("Retry-After", "0"),
        _ => reply,
    });
    let start = Instant::now();
    let ended = inspect(&place, &server);
    assert_eq!(ended.code, 0, "{}", ended.err);
    assert!(ended.err.contains("the hub asks to wait"), "{}", ended.err);
    assert!(start.elapsed() >= Duration::from_secs(1));
    is_whole(&place);
}

#[test]
fn a_hub_that_stays_busy_is_left_alone() {
    let place = Place::new();
    let server = Server::new(model(), |_, _| Reply::status(503).with("Retry-After", "0"));
    assert_snapshot!(error(&inspect(&place, &server), &server), @r"
    exit 1
    error: the hub fails again and again: the hub answers 503 Service Unavailable
      at   owner/name, HUB
      try  the same command later: it goes on from what has come
    ");
    assert_eq!(server.seen().len(), 6);
}

#[test]
fn a_cut_connection_goes_on_where_it_was() {
    let place = Place::new();
    let server = Server::new(model(), |request, reply| match request.before {
        before @ 0..2 if request.elsewhere => Reply { cut: Some(100_000 + before), ..reply },
        _ => reply,
    });
    let ended = inspect(&place, &server);
    assert_eq!(ended.code, 0, "{}", ended.err);
    is_whole(&place);
    let ranges = server.seen().into_iter().filter(|request| request.elsewhere);
    let ranges: Vec<_> = ranges.map(|request| request.range).collect();
    let from = |bytes: usize| Some(format!("bytes={bytes}-"));
    assert_eq!(ranges, [None, from(100_000), from(200_001)]);
}

#[test]
fn what_an_earlier_process_left_is_gone_on_from_and_not_believed() {
    let weights = model()[WEIGHTS].clone();
    let part = format!("hf/hub/models--owner--name/blobs/{}.incomplete", sha256(&weights));
    let left = |bytes: &[u8], ignores_ranges: bool| {
        let place = Place::new();
        std::fs::create_dir_all(place.path(&part).parent().unwrap()).unwrap();
        place.write(&part, bytes);
        let whole = weights.clone();
        let server = Server::new(model(), move |request, reply| {
            let ignored = ignores_ranges && reply.status == 206 && request.elsewhere;
            if ignored {
                Reply { status: 200, body: whole.clone(), ..Reply::default() }
            } else {
                reply
            }
        });
        let ended = inspect(&place, &server);
        assert_eq!(ended.code, 0, "{}", ended.err);
        is_whole(&place);
        let ranges = server.seen().into_iter().filter(|request| request.elsewhere);
        ranges.map(|request| request.range).collect::<Vec<_>>()
    };
    let range = |bytes: usize| Some(format!("bytes={bytes}-"));
    assert_eq!(left(&weights[..50_000], false), [range(50_000)]);
    assert_eq!(left(&weights[..50_000], true), [range(50_000)]);
    assert_eq!(left(&weights, false), []);
    // Damaged, or of something longer: from the start.
    assert_eq!(left(&vec![7; 50_000], false), [range(50_000), None]);
    assert_eq!(left(&vec![7; weights.len() + 1], false), [None]);
}

#[test]
fn a_file_that_is_not_the_listed_one_is_refused() {
    let refused = |change: fn(&mut Vec<u8>)| {
        let place = Place::new();
        let server = Server::new(model(), move |request, mut reply| {
            if request.path.ends_with("/tokenizer.json") || request.elsewhere {
                change(&mut reply.body);
            }
            reply
        });
        let ended = inspect(&place, &server);
        let cached = cached(&place);
        assert!(!cached.contains_key("refs/main"));
        assert!(!cached.keys().any(|name| name.starts_with("snapshots/")), "{:?}", cached.keys());
        for name in ["tokenizer.json", WEIGHTS] {
            let bytes = &model()[name];
            for hash in [sha256(bytes), git_sha1(bytes)] {
                assert!(!cached.contains_key(&format!("blobs/{hash}")));
            }
        }
        error(&ended, &server)
    };
    let all = [
        refused(|body| body[1000] ^= 1),
        refused(|body| body.truncate(1000)),
        refused(|body| body.push(0)),
    ];
    assert_snapshot!(all.join("\n"), @r"
    exit 1
    error: the file that came has SHA-256 7aa778daafdc2b82ef7bb5395a3a87b736b1d734a802dee35e744f5969b880bf, the hub lists 187d0d5e8360d9625e40e0b35ec57d1ef0eea1a60ddcf09412246bed3484852f
      at   model.safetensors, owner/name
      try  the same command again; if it stays so, something between changes files

    exit 1
    error: the file has 1000 bytes, and the hub lists 2626168
      at   model.safetensors, owner/name
      try  the same command again, or another revision

    exit 1
    error: the file has 2626169 bytes, and the hub lists 2626168
      at   model.safetensors, owner/name
      try  the same command again, or another revision
    ");
}

#[test]
fn a_small_file_is_checked_too() {
    let place = Place::new();
    let server = Server::new(model(), |request, mut reply| {
        if request.path.ends_with("/tokenizer.json") {
            reply.body[1000] ^= 1;
        }
        reply
    });
    let error = error(&inspect(&place, &server), &server);
    assert!(error.contains("git SHA-1") && error.contains("at   tokenizer.json"), "{error}");
}

#[test]
fn a_listing_cannot_lead_out_of_the_cache() {
    for name in ["../../../evil.json", "/tmp/evil.json", "a/../../evil.json"] {
        let place = Place::new();
        let mut files = model();
        files.insert(name.to_owned(), b"{}".to_vec());
        let server = Server::new(files, |_, reply| reply);
        assert_eq!(inspect(&place, &server).code, 0);
        is_whole(&place);
    }
}

#[test]
fn a_path_that_is_not_there_does_not_ask_the_hub() {
    let (place, server) = (Place::new(), Server::new(model(), |_, reply| reply));
    place.copy_model("tinystories-656k", "models/llama");
    let absolute = place.path("modles/llama").display().to_string();
    let paths =
        ["./modles/llama", "models/x/y", "../models/llama", &absolute, "~/models/llama", "lama"];
    for path in paths {
        let ended = run(&place, command(&place, &server.address, &["inspect", path]));
        let error = error(&ended, &server);
        assert!(error.starts_with("exit 2\nerror: there is no such "), "{path}: {error}");
        assert!(error.contains(&format!("at   {path}")), "{path}: {error}");
        if path.contains("modles") {
            let right = path.replace("modles", "models");
            assert!(error.contains(&format!("try  {right}")), "{path}: {error}");
        }
    }
    assert!(server.seen().is_empty(), "{:?}", server.seen());
}

#[test]
fn an_id_that_is_almost_a_path_says_both() {
    let (place, server) = (Place::new(), Server::new(model(), |_, reply| reply));
    place.copy_model("tinystories-656k", "models/llama");
    let args = ["inspect", "models/lama"];
    let mut quiet = command(&place, &server.address, &args);
    quiet.env_remove("RUST_LOG");
    let ended = run(&place, quiet);
    assert_snapshot!(ended.err.replace(&server.address, "HUB"), @r"
    note      there is no folder models/lama (models/llama is here); asking the hub for models/lama
    error: there is no such folder, and the hub has none
      at   models/lama, HUB
      try  models/llama, which is here; or check the id
    ");
    let mut offline = command(&place, &server.address, &args);
    offline.env_remove("RUST_LOG").env("HF_HUB_OFFLINE", "1");
    let asked = server.seen().len();
    assert_snapshot!(run(&place, offline).err, @r"
    error: there is no such folder, nor a copy in the cache, and HF_HUB_OFFLINE is set
      at   models/lama
      try  models/llama, which is here; or unset it, or give a local folder
    ");
    assert_eq!(server.seen().len(), asked);
    let gone = command(&place, "http://127.0.0.1:1", &args);
    let ended = run(&place, gone);
    assert_snapshot!(error(&ended, &server), @r"
    exit 1
    error: there is no such folder, and the hub cannot be reached: Connection refused (os error 111)
      at   models/lama, http://127.0.0.1:1
      try  models/llama, which is here; or check the network, or give a local folder
    ");

    let args = ["inspect", "models/other"];
    let other = run(&place, command(&place, &server.address, &args));
    let note = other.err.find("there is no folder models/other here; asking the hub").unwrap();
    assert!(note < other.err.find("error: ").unwrap(), "{}", other.err);
}
