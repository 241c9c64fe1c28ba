//! One target of `tests/fuzz/targets.rs`, which `FEWBIT_FUZZ_TARGET` names.
#![no_main]

#[path = "../../tests/fuzz/seeds.rs"]
#[allow(dead_code, clippy::unwrap_used)] // sound files that the tests damage; these grow their own
mod seeds;
#[path = "../../tests/fuzz/targets.rs"]
#[allow(clippy::unwrap_used)] // a fault is a panic here
mod targets;

use std::sync::OnceLock;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    static TARGET: OnceLock<fn(&[u8])> = OnceLock::new();
    let target = TARGET.get_or_init(|| {
        // libfuzzer-sys ends the process at every panic, also at one that the library catches.
        std::panic::set_hook(Box::new(|info| eprintln!("{info}")));
        let wanted = std::env::var("FEWBIT_FUZZ_TARGET").unwrap_or_default();
        let named = targets::ALL.iter().find(|(name, _)| *name == wanted);
        named.unwrap_or_else(|| panic!("FEWBIT_FUZZ_TARGET={wanted}: no such target")).1
    });
    if std::panic::catch_unwind(|| target(bytes)).is_err() {
        std::process::abort();
    }
});
