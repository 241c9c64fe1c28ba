//! Data sets of the hub: which files are meant, and that they come as a model's do.

use std::collections::BTreeMap;

use super::server::{COMMIT, Server};
use super::{Place, assert_snapshot, command, error, run};

fn files() -> BTreeMap<String, Vec<u8>> {
    let row = |text: &str| format!("{{\"text\": \"{text}\"}}\n").into_bytes();
    BTreeMap::from([
        ("README.md".to_owned(), b"# Data".to_vec()),
        ("data/train-0.jsonl".to_owned(), row("Once upon a time")),
        ("data/train-1.jsonl".to_owned(), row("there was a cat")),
        ("data/test.jsonl".to_owned(), row("and a dog")),
        ("dataset_infos.json".to_owned(), b"{}".to_vec()),
    ])
}

fn preview(place: &Place, server: &Server, name: &str, offline: bool) -> super::Ended {
    let args = ["data", "preview", "--model", "embedded:tinystories-656k", "--data", name];
    let args = [&args[..], &["--length", "4", "--json"]].concat();
    let mut command = command(place, &server.address, &args);
    if offline {
        command.env("HF_HUB_OFFLINE", "1");
    }
    run(place, command)
}

#[test]
fn files_of_a_data_set_are_named_by_name_folder_or_pattern() {
    let (place, server) = (Place::new(), Server::new(files(), |_, reply| reply));
    for offline in [false, true] {
        for (name, documents) in [
            ("hub:owner/name/data/train-0.jsonl", 1),
            ("hub:owner/name/data/train-*", 2),
            ("hub:owner/name@main/data", 3),
        ] {
            let ended = preview(&place, &server, name, offline);
            assert_eq!(ended.code, 0, "{name}: {}", ended.err);
            let json: serde_json::Value = serde_json::from_str(&ended.out).unwrap();
            assert_eq!(json["sets"][0]["documents"], documents, "{name}, offline {offline}");
        }
    }
    let cached = place.tree("hf/hub/datasets--owner--name");
    assert!(cached.contains_key(&format!("snapshots/{COMMIT}/data/train-1.jsonl")));
    assert!(cached.keys().all(|name| !name.contains("README")), "{:?}", cached.keys());
    assert_snapshot!(error(&preview(&place, &server, "hub:owner/name", false), &server), @r"
        exit 2
        error: the hub's data set has 3 files of data
          at   owner/name
          try  hub:owner/name/FILE, a folder, or a pattern with *: data/test.jsonl, data/train-0.jsonl, data/train-1.jsonl
    ");
    assert_snapshot!(error(&preview(&place, &server, "hub:owner/name/none", false), &server), @r"
        exit 2
        error: the hub's data set has no file `none`
          at   owner/name
          try  hub:owner/name/FILE, a folder, or a pattern with *: data/test.jsonl, data/train-0.jsonl, data/train-1.jsonl
    ");
    assert_snapshot!(error(&preview(&place, &server, "hub:owner", false), &server), @r"
        exit 2
        error: this is no data set of the hub
          at   hub:owner
          try  hub:owner/name, or hub:owner/name@revision/FILE
    ");
    let other = error(&preview(&place, &server, "hub:owner/other", false), &server);
    assert_snapshot!(other, @r"
        exit 2
        error: the data set is not here, and the hub has none
          at   owner/other, HUB
          try  check the id
    ");
}
