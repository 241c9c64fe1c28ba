//! `fewbit doctor` as scripts see it.
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too

mod common;

use common::Place;

#[test]
fn the_cpu_passes_in_both_types() {
    let place = Place::new();
    let found = place.json(&["doctor", "--device", "cpu", "--json"]);
    assert_eq!(found["passed"], true, "{found}");
    assert_eq!(found["fewbit"]["version"], env!("CARGO_PKG_VERSION"));
    assert!(found["fewbit"]["backends"].as_array().unwrap().contains(&"cpu".into()));
    assert!(found["fewbit"]["threads"].as_u64().unwrap() > 0);
    let devices = found["devices"].as_array().unwrap();
    assert_eq!((devices.len(), &devices[0]["name"]), (1, &"cpu".into()));
    let types = devices[0]["types"].as_array().unwrap();
    let names: Vec<_> = types.iter().map(|found| found["compute"].as_str().unwrap()).collect();
    assert_eq!(names, ["f32", "bf16"]);
    for found in types {
        let check = &found["check"];
        let number = |key: &str| check[key].as_f64().unwrap();
        // Kernels sum in another order than the backend does: all the same would be no comparison.
        assert!(number("logits") > 0.0 && number("gradient") > 0.0, "{check}");
        assert!(number("logits") <= check["allowed"][0].as_f64().unwrap());
        for speed in ["flops", "small_flops", "large_flops", "bytes"] {
            assert!(found["speed"][speed].as_f64().unwrap() > 0.0, "{speed}");
        }
    }
    let off = |index: usize| types[index]["check"]["logits"].as_f64().unwrap();
    assert!(off(0) < off(1) / 100.0, "bf16 is no better than f32");
    for speed in ["write", "read"] {
        assert!(found["disk"][speed].as_f64().unwrap() > 0.0, "{speed}");
    }
    assert_eq!(std::fs::read_dir(place.path("")).unwrap().count(), 0);
}

#[test]
fn lines_fit_a_terminal() {
    let text = Place::new().ok(&["doctor", "--device", "cpu"]);
    let wide = text.lines().find(|line| line.chars().count() > 80);
    assert_eq!(wide, None, "{text}");
    assert!(text.ends_with("all      passed\n"), "{text}");
}

#[test]
fn a_choice_of_kernels_that_is_none_is_a_usage_error() {
    let place = Place::new();
    let mut command = place.command(&["doctor", "--device", "cpu"]);
    let ended = command.env("FEWBIT_DEVICE_KERNELS", "of").output().unwrap();
    let text = String::from_utf8_lossy(&ended.stderr);
    assert_eq!((ended.status.code(), &*ended.stdout), (Some(2), &b""[..]), "{text}");
    assert!(text.contains("no choice of kernels: `of`"), "{text}");
    assert!(text.contains("environment variable FEWBIT_DEVICE_KERNELS"), "{text}");
    assert!(text.contains("one of: off, on, all"), "{text}");
}

#[test]
fn a_device_that_is_none_is_a_usage_error() {
    let place = Place::new();
    let ended = place.run(&["doctor", "--device", "gpu"]);
    assert_eq!((ended.code, &*ended.out), (2, ""), "{}", ended.err);
    assert!(ended.err.contains("unknown device `gpu`"), "{}", ended.err);
    assert_eq!(ended.err.lines().count(), 3);
}

/// The folder that a command runs in is gone: nobody, root included, can write there.
#[cfg(target_os = "linux")]
#[test]
fn a_folder_that_cannot_be_written_is_a_line_and_exit_code_one() {
    let place = Place::new();
    std::fs::create_dir(place.path("gone")).unwrap();
    let fewbit = env!("CARGO_BIN_EXE_fewbit");
    let script = format!("cd gone && rmdir ../gone && exec '{fewbit}' doctor --device cpu --json");
    let mut command = std::process::Command::new("sh");
    let ended = command.args(["-c", &script]).current_dir(place.path("")).output().unwrap();
    assert_eq!(ended.status.code(), Some(1));
    let found: serde_json::Value = serde_json::from_slice(&ended.stdout).unwrap();
    assert_eq!(
        (&found["passed"], &found["devices"][0]["types"][0]["passed"]),
        (&false.into(), &true.into())
    );
    assert!(found["disk_problem"].as_str().unwrap().contains("scratch file"), "{found}");
}
