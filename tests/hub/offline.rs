//! What needs no network does not touch it: in a namespace without one, where the system lets us make it.

use std::process::{Command, Stdio};

use crate::common::{Ended, Place};
use crate::server::Server;
use crate::{command, error, inspect, model, run};

/// Whether this machine lets an ordinary user make a network namespace; says so if not.
#[allow(clippy::print_stderr)] // a test that did not run must be seen
fn has_namespaces() -> bool {
    let mut probe = Command::new("unshare");
    let status = probe.args(["-rn", "true"]).stdout(Stdio::null()).stderr(Stdio::null()).status();
    let can = status.is_ok_and(|status| status.success());
    if !can {
        eprintln!("skipped: `unshare -rn` is not permitted here");
    }
    can
}

/// The same command in a namespace without a network.
fn alone(command: &Command) -> Command {
    let mut alone = Command::new("unshare");
    alone.arg("-rn").arg(command.get_program()).args(command.get_args());
    alone.current_dir(command.get_current_dir().unwrap());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => alone.env(name, value),
            None => alone.env_remove(name),
        };
    }
    alone
}

fn run_alone(place: &Place, args: &[&str], offline: bool) -> Ended {
    let mut command = command(place, "https://huggingface.co", args);
    if offline {
        command.env("HF_HUB_OFFLINE", "1");
    }
    run(place, alone(&command))
}

#[test]
fn local_folders_and_what_is_built_in_need_no_network() {
    if !has_namespaces() {
        return;
    }
    let place = Place::new();
    place.copy_model("tinystories-656k", "models/llama");
    place.write("few.json", crate::common::few_stories(12));
    let check = ["check", "--recipe", "rtn_w4g128"];
    let eval = ["eval", "--data", "few.json", "--model"];
    let local = ["--set", "model.path=models/llama"];
    let commands: [Vec<&str>; 4] = [
        check.to_vec(),
        [&check[..], &local].concat(),
        [&eval[..], &["embedded:tinystories-656k"]].concat(),
        [&eval[..], &["models/llama"]].concat(),
    ];
    for args in commands {
        let ended = run_alone(&place, &args, false);
        assert_eq!(ended.code, 0, "{args:?}: {}", ended.err);
    }
}

#[test]
fn offline_a_hub_id_is_what_the_cache_holds() {
    if !has_namespaces() {
        return;
    }
    let (place, server) = (Place::new(), Server::new(model(), |_, reply| reply));
    let args = ["inspect", "owner/name"];
    let absent = run_alone(&place, &args, true);
    insta::assert_snapshot!(error(&absent, &server), @r"
    exit 2
    error: there is no such folder, nor a copy in the cache, and HF_HUB_OFFLINE is set
      at   owner/name
      try  unset it, or give a local folder
    ");
    let unreachable = run_alone(&place, &args, false);
    assert!(unreachable.err.contains("the hub cannot be reached"), "{}", unreachable.err);

    let got = inspect(&place, &server);
    assert_eq!(got.code, 0, "{}", got.err);
    for offline in [true, false] {
        assert_eq!(run_alone(&place, &args, offline).out, got.out);
    }
    let other = run_alone(&place, &["inspect", "owner/name@v2"], true);
    assert_eq!(other.code, 2, "{}", other.err);
}
