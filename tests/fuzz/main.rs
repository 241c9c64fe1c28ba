//! Damaged and forged files by the million: whatever the bytes, they are read or refused in three
//! lines with exit code 3, within time and memory that are stated here.
//!
//! A plain test run tries a few thousand cases, the same ones each time. `FEWBIT_FUZZ_CASES=10000000
//! cargo test --release --test fuzz -- --nocapture` tries that many and prints them by target;
//! `FEWBIT_FUZZ_TARGET` picks one, with `FEWBIT_FUZZ_CASE` the one case that a report names.
//! docs/robustness.md has the counts of a long run.
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too
#![allow(clippy::print_stdout, clippy::print_stderr)] // the report of a long run

#[path = "../common/mod.rs"]
mod common;
mod folders;
mod memory;
mod mutate;
mod seeds;
mod targets;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use common::{Place, datasets, few_stories};
use fewbit::store::HostTensor;
use fewbit::store::safetensors::write_file;
use mutate::{Random, Shape, damaged};

/// Cases of a plain test run.
const CASES: u64 = 20_000;
/// A case that takes longer counts as one that never ends.
const LONGEST: Duration = Duration::from_secs(10);
/// What reading may hold at once: this many times the file, ...
const TIMES: u64 = 100;
/// ... and this much besides: buffers of files. Where a `config.json` is read, the names of 4096 blocks
/// too, which 500 bytes of it may ask for.
fn besides(target: &str) -> u64 {
    match target {
        "config" | "folder" => 32 << 20,
        // What a template may make before it is stopped.
        "chat_template" => 512 << 20,
        _ => 2 << 20,
    }
}

/// A sound file: what a target takes before its bytes, they, and how they are built.
struct Seed {
    head: Vec<u8>,
    file: Vec<u8>,
    shape: Shape,
}

struct Target {
    name: &'static str,
    run: fn(&[u8]),
    /// Its part of all cases.
    share: u64,
    seeds: Vec<Seed>,
}

/// What became of a target's cases.
#[derive(Default)]
struct Found {
    cases: u64,
    longest: Duration,
    most: u64,
    times: u64,
    /// By what was said: how often, and the first case.
    faults: BTreeMap<String, (u64, u64)>,
}

impl Found {
    fn add(&mut self, other: Self) {
        self.cases += other.cases;
        self.longest = self.longest.max(other.longest);
        self.most = self.most.max(other.most);
        self.times = self.times.max(other.times);
        for (fault, (count, case)) in other.faults {
            let known = self.faults.entry(fault).or_insert((0, case));
            known.0 += count;
            known.1 = known.1.min(case);
        }
    }
}

/// A model that every format holds, exported in all of them as `run/export/FORMAT`.
fn exported() -> &'static Place {
    static PLACE: OnceLock<Place> = OnceLock::new();
    PLACE.get_or_init(export)
}

fn export() -> Place {
    let place = Place::new();
    place.copy_model("stories260k", "model");
    let config = serde_json::json!({
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 512,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": true,
        "bos_token_id": 1, "eos_token_id": 2,
    });
    place.write("model/config.json", config.to_string());
    let sizes = [
        ("embed_tokens", vec![512, 32]),
        ("norm", vec![32]),
        ("layers.0.input_layernorm", vec![32]),
        ("layers.0.post_attention_layernorm", vec![32]),
        ("layers.0.self_attn.q_proj", vec![32, 32]),
        ("layers.0.self_attn.k_proj", vec![32, 32]),
        ("layers.0.self_attn.v_proj", vec![32, 32]),
        ("layers.0.self_attn.o_proj", vec![32, 32]),
        ("layers.0.mlp.gate_proj", vec![64, 32]),
        ("layers.0.mlp.up_proj", vec![64, 32]),
        ("layers.0.mlp.down_proj", vec![32, 64]),
    ];
    let mut random = Random(7);
    let tensors = sizes.map(|(name, shape)| {
        let len: usize = shape.iter().product();
        let value = |_| (random.next() % 2001) as f32 / 4000.0 - 0.25;
        let values: Vec<f32> = (0..len).map(value).collect();
        (format!("model.{name}.weight"), HostTensor::bf16_from_f32(shape, &values))
    });
    write_file(&place.path("model/model.safetensors"), &tensors, &BTreeMap::new()).unwrap();
    place.write("few.json", few_stories(1));
    place.write(
        "recipe.toml",
        "output = \"run\"\ndevice = \"cpu\"\nmodel.path = \"model\"\n[data]\n\
         validation.path = \"few.json\"\n[quant]\nscales = \"f16\"\nbits = 4\ngroup_size = 32\n\
         symmetric = true\n[[stage]]\n[stage.calibrate]\nmethod.rtn = {}\n[[stage]]\n\
         [stage.export]\nformat = { fewbit = {}, dequantized = {}, mlx = {}, gptq = {}, \
         autoround = {}, awq = {}, compressed_tensors = {}, bcq = {}, gguf = {} }\n",
    );
    place.ok(&["train", "--recipe", "recipe.toml"]);
    place
}

fn plain(files: Vec<Vec<u8>>, shape: Shape) -> Vec<Seed> {
    files.into_iter().map(|file| Seed { head: Vec::new(), file, shape }).collect()
}

fn unsealed(manifest: &[u8]) -> Vec<u8> {
    let mut manifest: serde_json::Value = serde_json::from_slice(manifest).unwrap();
    manifest.as_object_mut().unwrap().remove("sha256");
    manifest.to_string().into_bytes()
}

/// The files of the exported folders.
fn folder_seeds() -> Vec<Seed> {
    let root = targets::FOLDERS.get().unwrap();
    let files = targets::folder_files().iter().zip(0..);
    let read = |format: &str, name: &str| {
        let file = std::fs::read(root.join(format).join(name)).unwrap();
        if name == "manifest.json" { unsealed(&file) } else { file }
    };
    files
        .map(|((format, name), place)| Seed {
            head: vec![place],
            file: read(format, name),
            shape: match Path::new(name).extension().and_then(|end| end.to_str()) {
                Some("safetensors") => Shape::Safetensors,
                Some("json") => Shape::Json,
                _ => Shape::Bytes,
            },
        })
        .collect()
}

fn all_targets(place: &Place) -> Vec<Target> {
    let export = place.path("run/export");
    let _ = targets::FOLDERS.set(export.clone());
    let dir = place.path("");
    let read = |name: &str| std::fs::read(export.join(name)).unwrap();
    let mut manifests: Vec<Vec<u8>> = ["fewbit", "gguf", "mlx"]
        .iter()
        .map(|format| read(&format!("{format}/manifest.json")))
        .collect();
    // As earlier versions wrote it: no hash stands in front of what is read of it.
    manifests.extend(manifests.clone().iter().map(|manifest| unsealed(manifest)));
    let record = vec![place.read("run/run.json").into_bytes()];
    let config = datasets().join("tinystories-656k/tokenizer_config.json");
    let base = export.join("fewbit");
    // What a target is damaged from, and its part of all cases.
    let of = |name: &str| -> (u64, Shape, Vec<Vec<u8>>) {
        match name {
            "safetensors" => (24, Shape::Safetensors, seeds::safetensors(&dir)),
            "index" => (8, Shape::Json, seeds::indexes()),
            "gguf" => (16, Shape::Bytes, seeds::ggufs()),
            "gguf_model" => (3, Shape::Bytes, vec![read("gguf/model.gguf")]),
            "recipe" => (6, Shape::Text, seeds::recipes()),
            "config" => (14, Shape::Json, seeds::configs()),
            "tokenizer" => (5, Shape::Json, seeds::tokenizers()),
            "tokenizer_config" => (2, Shape::Json, vec![std::fs::read(&config).unwrap()]),
            "documents" => (8, Shape::Lines, seeds::documents()),
            "examples" => (8, Shape::Lines, seeds::examples()),
            "chat_template" => (4, Shape::Text, seeds::chat_templates()),
            "adapter" => (5, Shape::Safetensors, seeds::adapters(&base, &dir)),
            "manifest" => (3, Shape::Json, manifests.clone()),
            "checkpoint" => (4, Shape::Safetensors, seeds::checkpoints(&base, &dir)),
            "run_record" => (1, Shape::Json, record.clone()),
            _ => (4, Shape::Bytes, Vec::new()),
        }
    };
    let all = targets::ALL.iter().map(|(name, run)| {
        let (part, shape, files) = of(name);
        let seeds = if files.is_empty() { folder_seeds() } else { plain(files, shape) };
        Target { name, run: *run, share: part, seeds }
    });
    all.collect()
}

thread_local! {
    static PLACE: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Runs one case; gives what went wrong, the time and the memory it took.
fn tried(target: &Target, bytes: &[u8]) -> (Option<String>, Duration, u64) {
    let start = Instant::now();
    let run = || catch_unwind(AssertUnwindSafe(|| (target.run)(bytes)));
    let (ended, held) = memory::most_held(run);
    let took = start.elapsed();
    let fault = match ended {
        Ok(()) if held > TIMES * bytes.len() as u64 + besides(target.name) => {
            Some(format!("{held} bytes held for a file of {}", bytes.len()))
        }
        Ok(()) => None,
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|t| (*t).to_owned()));
            Some(format!("{}: {}", PLACE.take(), text.unwrap_or_default()))
        }
    };
    (fault, took, held)
}

/// The fault without what differs from case to case: the first line, no numbers, nothing quoted.
fn kind_of(fault: &str) -> String {
    let mut kind = String::new();
    let mut until = None;
    for letter in fault.lines().next().unwrap_or_default().chars().take(400) {
        match (until, letter) {
            (Some(end), letter) if letter == end => until = None,
            (None, '`' | '"') => until = Some(letter),
            (None, '[') => until = Some(']'),
            (None, letter) if letter.is_ascii_digit() && kind.ends_with('#') => {}
            (None, letter) if letter.is_ascii_digit() => kind.push('#'),
            (None, letter) => kind.push(letter),
            _ => {}
        }
    }
    kind
}

fn bytes_of(target: &Target, number: u64) -> Vec<u8> {
    let name = target.name.bytes().fold(0_u64, |sum, byte| sum * 131 + u64::from(byte));
    let mut random = Random(name ^ number.wrapping_mul(0xd134_2543_de82_ef95));
    let (seed, other) = (random.pick(&target.seeds), random.pick(&target.seeds));
    let file = damaged(&mut random, seed.shape, &seed.file, &other.file);
    [&seed.head[..], &file].concat()
}

/// What a thread is at: target and case, and since when.
#[derive(Default)]
struct Now {
    target: AtomicU64,
    case: AtomicU64,
    since: AtomicU64,
}

fn work(
    targets: &[Target],
    shares: &[u64],
    (own, of): (u64, u64),
    now: &Now,
    begun: Instant,
) -> Vec<Found> {
    let mut all = Vec::new();
    for (place, (target, cases)) in targets.iter().zip(shares).enumerate() {
        let mut found = Found::default();
        for number in (own..*cases).step_by(of as usize) {
            let bytes = bytes_of(target, number);
            now.target.store(place as u64, Ordering::Relaxed);
            now.case.store(number, Ordering::Relaxed);
            now.since.store(begun.elapsed().as_millis() as u64, Ordering::Relaxed);
            let (fault, took, held) = tried(target, &bytes);
            found.cases += 1;
            found.longest = found.longest.max(took);
            found.most = found.most.max(held);
            let beyond = held.saturating_sub(besides(target.name));
            found.times = found.times.max(beyond / (bytes.len() as u64).max(1));
            if let Some(fault) = fault {
                let known = found.faults.entry(kind_of(&fault)).or_insert((0, number));
                known.0 += 1;
            }
        }
        all.push(found);
    }
    now.since.store(u64::MAX, Ordering::Relaxed);
    all
}

/// Ends the process when a case does not end.
fn watch(targets: &[Target], threads: &[Arc<Now>], begun: Instant) {
    loop {
        std::thread::sleep(Duration::from_millis(500));
        let mut running = false;
        for now in threads {
            let since = now.since.load(Ordering::Relaxed);
            running |= since != u64::MAX;
            let took = (begun.elapsed().as_millis() as u64).saturating_sub(since);
            if u128::from(took) > LONGEST.as_millis() {
                let target = targets[now.target.load(Ordering::Relaxed) as usize].name;
                let case = now.case.load(Ordering::Relaxed);
                eprintln!("{target}: case {case} has not ended after {LONGEST:?}");
                std::process::exit(101);
            }
        }
        if !running {
            return;
        }
    }
}

fn variable(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap())
}

fn run(targets: &[Target], cases: u64, threads: u64) -> Vec<Found> {
    let whole: u64 = targets.iter().map(|target| target.share).sum();
    let shares: Vec<u64> = targets.iter().map(|t| (cases * t.share).div_ceil(whole)).collect();
    let begun = Instant::now();
    let now: Vec<Arc<Now>> = (0..threads).map(|_| Arc::default()).collect();
    let total = Mutex::new(targets.iter().map(|_| Found::default()).collect::<Vec<_>>());
    std::thread::scope(|scope| {
        for own in 0..threads {
            let (now, shares, total) = (now[own as usize].clone(), &shares, &total);
            scope.spawn(move || {
                let found = work(targets, shares, (own, threads), &now, begun);
                let mut total = total.lock().unwrap_or_else(PoisonError::into_inner);
                total.iter_mut().zip(found).for_each(|(total, found)| total.add(found));
            });
        }
        watch(targets, &now, begun);
    });
    total.into_inner().unwrap_or_else(PoisonError::into_inner)
}

fn table(targets: &[Target], found: &[Found]) -> usize {
    println!("| Target | Cases | Faults | Longest case | Most memory | Times the file |");
    println!("|---|---|---|---|---|---|");
    let mut faults = 0;
    for (target, found) in targets.iter().zip(found) {
        let count: u64 = found.faults.values().map(|(count, _)| count).sum();
        println!(
            "| {} | {} | {count} | {:.1} ms | {:.1} MiB | {} |",
            target.name,
            found.cases,
            found.longest.as_secs_f64() * 1e3,
            found.most as f64 / f64::from(1 << 20),
            found.times,
        );
        faults += found.faults.len();
    }
    for (target, found) in targets.iter().zip(found) {
        for (fault, (count, case)) in &found.faults {
            println!("\n{}: {count} times, first in case {case}:\n{fault}", target.name);
        }
    }
    faults
}

#[test]
fn whatever_the_bytes_they_are_read_or_refused() {
    let place = exported();
    let mut targets = all_targets(place);
    let wanted = std::env::var("FEWBIT_FUZZ_TARGET").ok();
    targets.retain(|target| wanted.as_deref().is_none_or(|name| target.name == name));
    for target in &targets {
        for seed in &target.seeds {
            (target.run)(&[&seed.head[..], &seed.file].concat());
        }
    }
    if let Some(number) = variable("FEWBIT_FUZZ_CASE") {
        let bytes = bytes_of(&targets[0], number);
        println!("{}", String::from_utf8_lossy(&bytes[..bytes.len().min(4000)]));
        return (targets[0].run)(&bytes);
    }
    // The message of a panic stands in the report, once.
    std::panic::set_hook(Box::new(|info| {
        PLACE.set(info.location().map(ToString::to_string).unwrap_or_default());
    }));
    let cases = variable("FEWBIT_FUZZ_CASES").unwrap_or(CASES);
    let found = run(&targets, cases, variable("FEWBIT_FUZZ_THREADS").unwrap_or(1));
    drop(std::panic::take_hook());
    let faults = table(&targets, &found);
    assert_eq!(faults, 0, "{faults} kinds of fault");
}
