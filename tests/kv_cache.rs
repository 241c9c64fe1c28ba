//! Ways to hold keys and values: what each gives of a text, and what it takes.
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too

mod common;

use std::path::{Path, PathBuf};

use burn::tensor::{DType, Device};
use common::Place;
use fewbit::model::{
    CausalLm, Generation, KvHeld, KvMode, KvSetting, Loader, Memory, Positions, Prompt, Sampler,
    open_folder,
};
use fewbit::ops;

fn open(folder: &Path) -> CausalLm {
    let (config, source) = open_folder(folder).unwrap();
    let (device, dtype) = (&Device::flex(), DType::F32);
    Loader { config: &config, source: &source, device, dtype }.model().unwrap()
}

fn at(folder: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(folder)
}

fn stories() -> CausalLm {
    open(&at("datasets/stories260k"))
}

/// A setting with few tokens in high precision.
fn setting(mode: KvMode, bits: u8) -> KvSetting {
    KvSetting { bits, ratio: 0.25, recent: 4, ..KvSetting::new(mode) }
}

/// Everything important, as it was computed.
fn whole(mode: KvMode) -> KvSetting {
    KvSetting { ratio: 1.0, high: 32, ..KvSetting::new(mode) }
}

/// The streams of a text that is read in pieces, and what was held at its end.
fn read(model: &CausalLm, tokens: &[u32], pieces: &[usize]) -> (Vec<f32>, KvHeld) {
    let device = Device::flex();
    let (mut caches, mut past, mut found) = (Vec::new(), 0, Vec::new());
    for len in pieces {
        let positions = Positions::new(&model.config, past, *len, DType::F32, &device);
        let piece = CausalLm::tokens(&[&tokens[past..past + len]], &device);
        let hidden = model.finish(model.go_on(piece, &positions, &mut caches));
        found.extend(hidden.into_data().iter::<f32>());
        past += len;
    }
    (found, KvHeld::of(&caches))
}

fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|x| x.to_bits()).collect()
}

fn gap(a: &[f32], b: &[f32]) -> f64 {
    let sum: f64 = a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum();
    (sum / a.len() as f64).sqrt()
}

fn text(count: u32, vocab: usize) -> Vec<u32> {
    (0..count).map(|i| 3 + (i * i * 7 + i * 31) % (vocab as u32 - 3)).collect()
}

/// Windows, caps on scores, grouped heads, positions that are learned, and all the rest.
#[test]
fn with_everything_important_every_family_is_the_full_cache_bit_for_bit() {
    let mut seen = 0;
    for folder in std::fs::read_dir(at("tests/parity")).unwrap() {
        let folder = folder.unwrap().path();
        if !folder.join("reference.json").is_file() {
            continue;
        }
        let mut model = open(&folder);
        let tokens = text(14, model.vocab());
        let pieces = [5, 1, 1, 3, 1, 1, 2];
        let (full, _) = read(&model, &tokens, &pieces);
        let (composed, _) = ops::composed(|| read(&model, &tokens, &pieces));
        for mode in [KvMode::Mikv, KvMode::Evict] {
            model = model.with_kv(Some(whole(mode)));
            // The same operations; the full cache's kernel adds up in another order.
            let (found, _) = ops::composed(|| read(&model, &tokens, &pieces));
            assert_eq!(bits(&found), bits(&composed), "{mode:?} {}", folder.display());
            let (found, _) = read(&model, &tokens, &pieces);
            let gap = gap(&found, &full) / gap(&full, &vec![0.0; full.len()]);
            assert!(gap < 2e-6, "{mode:?} {}: {gap}", folder.display());
        }
        // Few bits change something, and nothing breaks; neither do tokens that are dropped.
        for mode in [KvMode::Mikv, KvMode::Uniform, KvMode::Evict] {
            let few = KvSetting { ratio: 0.3, recent: 1, ..setting(mode, 2) };
            model = model.with_kv(Some(few));
            let (found, _) = read(&model, &tokens, &pieces);
            assert!(found.iter().all(|x| x.is_finite()), "{mode:?} {}", folder.display());
            assert_ne!(bits(&found), bits(&full), "{mode:?} {}", folder.display());
            let first = 5 * full.len() / tokens.len();
            assert_eq!(bits(&found[..first]), bits(&full[..first]), "the first pass is exact");
        }
        seen += 1;
    }
    assert!(seen > 30, "{seen} models");
}

#[test]
fn more_bits_are_nearer_and_dropping_is_farther() {
    let mut model = stories();
    // A story, as the model tells it.
    let mut tokens = vec![1];
    let device = Device::flex();
    let sampler = Sampler { temperature: 1.0, ..Sampler::default() };
    let how = Generation { model: &model, device: &device, sampler, max_new: 159, ends: &[] };
    how.batch(&[Prompt { tokens: &[1], stream: 0 }], &mut |_, token| {
        tokens.push(token);
        Ok(true)
    })
    .unwrap();
    let pieces: Vec<usize> = std::iter::once(100).chain([1; 60]).collect();
    let (full, held) = read(&model, &tokens, &pieces);
    assert_eq!(held.bytes, 4 * held.numbers);
    let mut found = |setting: KvSetting| {
        model = model.clone().with_kv(Some(setting));
        let (found, held) = read(&model, &tokens, &pieces);
        (gap(&found, &full), held.bits())
    };
    let [two, three, four, eight] = [2, 3, 4, 8].map(|bits| found(setting(KvMode::Mikv, bits)));
    let uniform = found(setting(KvMode::Uniform, 2));
    let evict = found(setting(KvMode::Evict, 2));
    let gaps = [eight, four, three, two].map(|(gap, _)| gap);
    assert!(gaps.windows(2).all(|pair| pair[0] < pair[1]), "{gaps:?}");
    assert!(three.0 < evict.0 && two.0 < uniform.0, "{gaps:?} {evict:?} {uniform:?}");
    let sizes = [evict, two, three, four, eight].map(|(_, bits)| bits);
    // Eight codes of 2 to 4 bits are a word.
    assert!(sizes.is_sorted() && sizes[0] < sizes[1] && sizes[3] < sizes[4], "{sizes:?}");
    // Heads of 8 are a group: 0.25 * 16 + 0.75 * (2 + 4), and positions, importance and words that are not full.
    assert!(sizes[1] > 8.5 && sizes[1] < 14.0, "{sizes:?}");
}

#[test]
fn texts_are_continued_one_after_the_other_and_a_memory_goes_on() {
    let full = stories();
    let device = Device::flex();
    let tokens = text(60, full.vocab());
    let generated = |model: &CausalLm, memory: &mut Memory, tokens: &[u32], count: usize| {
        let sampler = Sampler::default();
        let how = Generation { model, device: &device, sampler, max_new: count, ends: &[] };
        let mut text = Vec::new();
        how.one(memory, Prompt { tokens, stream: 0 }, &mut |token| {
            text.push(token);
            Ok(true)
        })
        .unwrap();
        text
    };
    for mode in [KvMode::Mikv, KvMode::Evict] {
        let model = full.clone().with_kv(Some(whole(mode)));
        let mut memories = [Memory::default(), Memory::default()];
        // The second text shares a beginning of 20 tokens with the first one, the third one nothing.
        let second = [&tokens[..20], &tokens[40..]].concat();
        for prompt in [&tokens[..], &second, &tokens[7..]] {
            let [a, b] = &mut memories;
            let expected = generated(&full, a, prompt, 12);
            assert_eq!(generated(&model, b, prompt, 12), expected, "{mode:?}");
        }
    }
    for mode in [KvMode::Mikv, KvMode::Uniform, KvMode::Evict] {
        let model = full.clone().with_kv(Some(setting(mode, 3)));
        let alone = [&tokens[..], &tokens[..9], &tokens[30..]]
            .map(|prompt| generated(&model, &mut Memory::default(), prompt, 10));
        let sampler = Sampler::default();
        let how = Generation { model: &model, device: &device, sampler, max_new: 10, ends: &[] };
        let prompts = [&tokens[..], &tokens[..9], &tokens[30..]];
        let prompts = prompts.map(|tokens| Prompt { tokens, stream: 0 });
        let mut together = vec![Vec::new(); 3];
        how.batch(&prompts, &mut |place, token| {
            together[place].push(token);
            Ok(true)
        })
        .unwrap();
        assert_eq!(together, alone, "{mode:?}");
        // Cut where heads hold different tokens.
        let mut memory = Memory::default();
        for prompt in [&tokens[..], &tokens[..33], &tokens[..50], &tokens[..2]] {
            assert_eq!(generated(&model, &mut memory, prompt, 5).len(), 5);
        }
    }
}

#[test]
fn commands_take_it_say_what_it_held_and_refuse_what_makes_no_sense() {
    let place = Place::new();
    place.write(
        "text.txt",
        "Once upon a time there was a dog. He was happy and ran to the park. ".repeat(60),
    );
    let model = ["--model", "embedded:tinystories-656k"];
    let generate =
        [&["generate"], &model[..], &["--prompt", "Once upon a time", "--json"]].concat();
    let generate = [&generate[..], &["--max-new-tokens", "40"]].concat();
    let plain = place.json(&generate);
    let with = |more: &[&str]| place.json(&[&generate[..], more].concat());
    assert_eq!(with(&["--kv-cache", "full"])["text"], plain["text"]);
    let exact = with(&["--kv-cache", "mikv", "--kv-ratio", "1", "--kv-high", "32"]);
    assert_eq!(exact["text"], plain["text"]);
    let few =
        with(&["--kv-cache", "mikv", "--kv-bits", "2", "--kv-group", "16", "--kv-recent", "4"]);
    assert_eq!(few["kv_bits_expected"], 0.25 * 16.0 + 0.75 * 4.0);
    assert!(few["kv_bits"].as_f64().unwrap() < 14.0, "{few}");

    let eval =
        [&["eval"], &model[..], &["--data", "text.txt", "--context", "128", "--json"]].concat();
    let eval = [&eval[..], &["--windows", "2"]].concat();
    let with = |more: &[&str]| place.json(&[&eval[..], more].concat());
    let full = with(&["--kv-cache", "full"]);
    assert_eq!((full["tokens"].as_u64(), full["prefill"].as_u64()), (Some(126), Some(64)));
    // The same tokens in one pass, up to the order of additions.
    let pieces = with(&["--set", "prefill=64", "--set", "piece=7"]);
    let [a, b] = [&full, &pieces].map(|found| found["nll_per_token"].as_f64().unwrap());
    assert!((a - b).abs() < 1e-5, "{a} {b}");
    let low = with(&["--kv-cache", "uniform", "--kv-bits", "2"]);
    assert_ne!(low["nll_per_token"].as_f64(), Some(a));
    assert!(low["kv_bytes"].as_u64().unwrap() < full["kv_bytes"].as_u64().unwrap() / 4);
    let shown: Vec<&str> = eval.iter().copied().filter(|arg| *arg != "--json").collect();
    let shown = place.ok(&[&shown[..], &["--kv-cache", "mikv"]].concat());
    assert!(shown.contains("keys and values mikv 4 bits ratio 0.25"), "{shown}");

    for (args, what, at, fix) in [
        (&["--kv-cache", "mikv", "--kv-bits", "1"][..], "2 to 8 bits, not 1", "--kv-bits", "4"),
        (&["--kv-cache", "mikv", "--kv-ratio", "2"], "0 to 1, not 2", "--kv-ratio", "0.25"),
        (
            &["--kv-cache", "mikv", "--kv-group", "5"],
            "groups of 5 do not divide",
            "--kv-group",
            "16",
        ),
        (&["--kv-cache", "mikv", "--kv-high", "8"], "16 or 32 bits, not 8", "--kv-high", "16"),
    ] {
        let ended = place.run(&[&generate[..], args].concat());
        assert_eq!(ended.code, 2, "{}", ended.err);
        let lines: Vec<&str> = ended.err.lines().collect();
        assert!(lines.len() == 3 && lines[0].contains(what), "{}", ended.err);
        assert!(
            lines[1].ends_with(at) && lines[2].ends_with(&format!("{at} {fix}")),
            "{}",
            ended.err
        );
    }
    for args in [&["--kv-bits", "2"][..], &["--kv-cache", "mikw"]] {
        assert_eq!(place.run(&[&generate[..], args].concat()).code, 2);
    }
    let refused =
        place.refused(&[&eval[..], &["--kv-cache", "full", "--set", "prefill=127"]].concat());
    assert!(refused.contains("prefill = 127 leaves nothing to count of 128 tokens"), "{refused}");
}
