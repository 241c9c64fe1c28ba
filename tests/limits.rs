//! What a run may have of the machine: memory limits that are not the machine's, a disk that is just large
//! enough, and refusals that read no weight.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too

mod common;

use std::fs::File;
use std::io::Write;
use std::process::Command;
use std::time::Duration;

use common::{Ended, Place};
use serde_json::{Value, json};

/// The command below a limit of `prlimit`, which is what `ulimit` sets.
fn limited(place: &Place, limit: &str, args: &[&str]) -> Ended {
    let plain = place.command(args);
    let mut command = Command::new("prlimit");
    command.arg(limit).arg(plain.get_program()).args(plain.get_args());
    command.current_dir(plain.get_current_dir().unwrap());
    for (name, value) in plain.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command.env("XDG_CACHE_HOME", place.path("cache"));
    Ended::from(&command.output().unwrap())
}

/// A model of 600 MB that take no room on the disk: zeros nobody wrote.
fn sparse_model(place: &Place) {
    const WIDE: u64 = 200_000;
    place.copy_model("tinystories-656k", "model");
    let mut config: Value = serde_json::from_str(&place.read("model/config.json")).unwrap();
    let narrow = config["intermediate_size"].clone();
    config["intermediate_size"] = WIDE.into();
    place.write("model/config.json", config.to_string());
    let file = place.path("model/model.safetensors");
    let (mut header, _) = common::split_safetensors(&file);
    let mut end = 0;
    for (_, tensor) in
        header.as_object_mut().unwrap().iter_mut().filter(|(name, _)| *name != "__metadata__")
    {
        for side in
            tensor["shape"].as_array_mut().unwrap().iter_mut().filter(|side| **side == narrow)
        {
            *side = WIDE.into();
        }
        let shape = tensor["shape"].as_array().unwrap();
        let bytes = 4 * shape.iter().map(|side| side.as_u64().unwrap()).product::<u64>();
        tensor["dtype"] = "F32".into();
        tensor["data_offsets"] = json!([end, end + bytes]);
        end += bytes;
    }
    let text = header.to_string().into_bytes();
    let mut sparse = File::create(&file).unwrap();
    sparse.write_all(&(text.len() as u64).to_le_bytes()).unwrap();
    sparse.write_all(&text).unwrap();
    sparse.set_len(8 + text.len() as u64 + end).unwrap();
}

#[test]
fn a_limit_of_the_shell_is_a_limit_and_no_weight_is_read_first() {
    let place = Place::new();
    sparse_model(&place);
    // A hash of a file that has settled would be remembered.
    std::thread::sleep(Duration::from_millis(1200));
    let recipe = [
        "--recipe",
        "rtn_w4g128",
        "--set",
        "model.path=model",
        "--set",
        "quant.group_size=channel",
    ];
    for (limit, words) in [
        ("--as=1200000000", "ulimit -v allows 1.2 GB"),
        ("--data=1000000000", "ulimit -d allows 1.0 GB"),
    ] {
        for command in ["check", "train"] {
            let ended = limited(&place, limit, &[&[command], &recipe[..]].concat());
            assert_eq!(ended.code, 3, "{}", ended.err);
            assert!(ended.err.contains(words), "{}", ended.err);
        }
    }
    assert!(!place.path("runs").exists());
    let remembered = place.tree("cache").into_keys().any(|name| name.contains("hashes"));
    assert!(!remembered, "weights were hashed");
}
