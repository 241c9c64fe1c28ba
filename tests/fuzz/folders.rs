//! Exported folders of every format: each flipped bit is noticed, and the same damage ends in the same
//! exit code whatever the format.

use std::path::Path;

use fewbit::export::Manifest;

use super::common::{Place, copy_folder, join_safetensors, range_of, split_safetensors};
use super::{exported, variable};

/// Bits that are flipped in each file of each folder; all of them for 0.
const FLIPS: u64 = 40;

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// What `verify` does before it computes anything.
fn is_whole(dir: &Path) -> bool {
    let manifest = Manifest::read(dir).ok().flatten();
    manifest.is_some_and(|manifest| manifest.check_files(dir).is_ok())
}

/// A copy of the exports, with the formats' names.
fn copied() -> (Place, Vec<String>) {
    let place = Place::new();
    copy_folder(&exported().path("run/export"), &place.path("export"));
    let formats = names(&place.path("export"));
    assert_eq!(formats.len(), 9);
    (place, formats)
}

#[test]
fn every_flipped_bit_is_noticed() {
    let (place, formats) = copied();
    let flips = variable("FEWBIT_FUZZ_FLIPS").unwrap_or(FLIPS);
    let tried: u64 = std::thread::scope(|scope| {
        let tried = |format: String| {
            let dir = place.path("export").join(format);
            scope.spawn(move || flipped(&dir, flips))
        };
        let threads: Vec<_> = formats.into_iter().map(tried).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    println!("{tried} flipped bits, all noticed");
}

/// Flips this many bits in each file of a folder, or every one for 0; gives how many that were.
fn flipped(dir: &Path, flips: u64) -> u64 {
    let mut tried = 0;
    assert!(is_whole(dir), "{}", dir.display());
    for name in names(dir) {
        let path = dir.join(&name);
        let whole = std::fs::read(&path).unwrap();
        let bits = 8 * whole.len() as u64;
        // Odd: another bit of the bytes each time.
        let step = bits.checked_div(flips).map_or(1, |step| step | 1);
        for bit in (0..bits).step_by(step as usize) {
            let mut bytes = whole.clone();
            bytes[(bit / 8) as usize] ^= 1 << (bit % 8);
            std::fs::write(&path, bytes).unwrap();
            assert!(!is_whole(dir), "{}: bit {bit}", path.display());
            tried += 1;
        }
        std::fs::write(&path, whole).unwrap();
    }
    assert!(is_whole(dir), "{}", dir.display());
    tried
}

#[test]
fn verify_names_what_was_changed_added_or_taken_away() {
    let (place, formats) = copied();
    let refused = |format: &str, parts: &[&str]| {
        let told = place.refused(&["verify", &format!("export/{format}")]);
        assert!(told.starts_with("exit 5\n"), "{format}: {told}");
        for part in parts {
            assert!(told.contains(part), "{format} does not say {part}: {told}");
        }
    };
    for format in formats {
        let dir = place.path("export").join(&format);
        let manifest = place.read(&format!("export/{format}/manifest.json"));
        for name in names(&dir) {
            let path = dir.join(&name);
            let whole = std::fs::read(&path).unwrap();
            let mut bytes = whole.clone();
            bytes[whole.len() / 2] ^= 4;
            std::fs::write(&path, bytes).unwrap();
            refused(&format, &[]);
            if name != "manifest.json" {
                std::fs::remove_file(&path).unwrap();
                refused(&format, &[]);
            }
            std::fs::write(&path, whole).unwrap();
        }
        for name in ["extra.safetensors", "chat_template.jinja", "model-2.safetensors"] {
            std::fs::write(dir.join(name), "x").unwrap();
            refused(&format, &["does not name", name]);
            std::fs::remove_file(dir.join(name)).unwrap();
        }
        // Sections that a reader does not need.
        let mut value: serde_json::Value = serde_json::from_str(&manifest).unwrap();
        for key in ["logits", "dense", "linears", "seed", "bit_order"] {
            let mut other = value.clone();
            other[key] = serde_json::json!({});
            std::fs::write(dir.join("manifest.json"), other.to_string()).unwrap();
            refused(&format, &["manifest"]);
        }
        // One of an earlier version is read, and what it cannot prove is said.
        value.as_object_mut().unwrap().remove("sha256");
        std::fs::write(dir.join("manifest.json"), value.to_string()).unwrap();
        let told = place.ok(&["verify", &format!("export/{format}")]);
        assert!(told.contains("old manifest"), "{told}");
        std::fs::write(dir.join("manifest.json"), manifest).unwrap();
    }
}

/// Cuts each file of each format in half, in turn, and looks at what commands say.
#[test]
fn damage_has_one_exit_code_whatever_the_format() {
    let (place, formats) = copied();
    place.write("few.json", super::few_stories(1));
    let cut = |path: &Path| {
        let whole = std::fs::read(path).unwrap();
        std::fs::write(path, &whole[..whole.len() / 2]).unwrap();
        whole
    };
    let refused = |args: &[&str], what: &str| {
        let told = place.refused(args);
        assert!(told.starts_with("exit 3\n"), "{what}: {told}");
    };
    for format in formats {
        let model = &format!("export/{format}");
        let eval = ["eval", "--model", model, "--data", "few.json", "--context", "16"];
        place.ok(&eval);
        for name in [
            "config.json",
            "manifest.json",
            "model.safetensors",
            "model.gguf",
            "tokenizer.json",
            "tokenizer_config.json",
        ] {
            let path = place.path(model).join(name);
            if path.is_file() {
                let whole = cut(&path);
                refused(&eval, &format!("{model}/{name}"));
                refused(
                    &["generate", "--model", model, "--prompt", "a"],
                    &format!("{model}/{name}"),
                );
                std::fs::write(path, whole).unwrap();
            }
        }
        let whole = cut(&place.path("few.json"));
        refused(&eval, "few.json");
        place.write("few.json", whole);
    }
    let path = place.path("export/gguf/model.gguf");
    let whole = cut(&path);
    refused(&["eval", "--model", "export/gguf/model.gguf", "--data", "few.json"], "model.gguf");
    std::fs::write(path, whole).unwrap();
}

#[test]
fn logits_that_are_no_numbers_are_refused() {
    let place = Place::new();
    copy_folder(&exported().path("model"), &place.path("model"));
    let file = place.path("model/model.safetensors");
    let (header, mut values) = split_safetensors(&file);
    // 3e38 in bf16: finite, and too large to be summed.
    let gains = values[range_of(&header, "model.norm.weight")].chunks_exact_mut(2);
    gains.for_each(|gain| gain.copy_from_slice(&[0x61, 0x7f]));
    join_safetensors(&file, &header, &values);
    place.write("few.json", super::few_stories(1));
    for args in [
        &["logits", "--model", "model", "--tokens", "5,6", "--output", "l"][..],
        &["generate", "--model", "model", "--prompt", "a"],
        &["eval", "--model", "model", "--data", "few.json", "--context", "16"],
    ] {
        let told = place.refused_briefly(args);
        assert!(told.contains("inf") || told.contains("NaN"), "{args:?}: {told}");
    }
}
