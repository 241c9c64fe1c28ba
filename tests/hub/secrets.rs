//! The token of the hub is in nothing that a run says or leaves.

use crate::common::Place;
use crate::server::{Reply, Server};
use crate::{TOKEN, command, model, run};

/// [`run`] looks through outputs and files after every command, logs at their most talkative.
#[test]
fn a_run_and_what_goes_wrong_leave_no_token_behind() {
    let (place, server) = (Place::new(), Server::new(model(), |_, reply| reply));
    place.write("few.json", crate::common::few_stories(12));
    let with = |address: &str, args: &[&str]| {
        let mut command = command(&place, address, args);
        command.env("XDG_CACHE_HOME", place.path("cache")).env("RUST_LOG", "debug");
        run(&place, command)
    };
    let train = [
        "train",
        "--recipe",
        "lsq_w4",
        "--output",
        "run",
        "--set",
        "model.path=owner/name",
        "--set",
        "stage.0.distill.steps=2",
        "--set",
        "stage.0.distill.log_every=1",
        "--set",
        "data.validation.path=few.json",
    ];
    let ended = with(&server.address, &train);
    assert_eq!(ended.code, 0, "{}", ended.err);
    let files = place.tree("run");
    for part in ["run.json", "run.log", "metrics.jsonl", "tensorboard/", "export/"] {
        assert!(files.keys().any(|name| name.starts_with(part)), "no {part} in {:?}", files.keys());
    }
    let ended = with(
        &server.address,
        &["export", "--model", "run", "--format", "dequantized", "--output", "out"],
    );
    assert_eq!(ended.code, 0, "{}", ended.err);

    // What fails, and where a token may be typed by mistake.
    let refusing = Server::new(model(), |_, _| Reply::status(401));
    let secret = format!("https://me:{TOKEN}@huggingface.co/owner/name");
    let in_address = server.address.replace("http://", &format!("http://me:{TOKEN}@"));
    let in_address = in_address.rsplit_once(':').unwrap().0.to_owned() + ":1";
    for (address, model) in [
        (refusing.address.as_str(), "owner/other"),
        ("http://127.0.0.1:1", "owner/other"),
        (&in_address, "owner/other"),
        ("not an address", "owner/other"),
        (&server.address, secret.as_str()),
    ] {
        let ended = with(address, &["inspect", model]);
        assert_ne!(ended.code, 0, "{address} {model}");
        let set = format!("model.path={model}");
        let args = ["train", "--recipe", "rtn_w4g128", "--output", "failed", "--set", &set];
        assert_ne!(with(address, &args).code, 0, "{address} {model}");
    }
}
