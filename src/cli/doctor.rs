//! `fewbit doctor`: what was built in and found, whether devices compute right, and how fast they are.

use std::fmt::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::LazyLock;

use burn::tensor::DType;
use clap::Args;
use serde_json::{Value, json};

use super::output;
use crate::bench::{Ceiling, Check, Disk, Numbers, device_kernels, reference, vector_level};
use crate::device::{self, Details, Found};
use crate::error::{Error, Kind, Result};
use crate::report::size;
use crate::run;
use crate::stop::StopFlag;

/// The types that fewbit computes in.
const TYPES: [(&str, DType); 2] = [("f32", DType::F32), ("bf16", DType::BF16)];

/// Arguments of `doctor`.
#[derive(Args, Debug)]
pub(super) struct DoctorArgs {
    /// Look at this device alone: cpu, cuda[:i], metal, rocm[:i], vulkan, wgpu [default: all there are]
    #[arg(long, value_name = "NAME")]
    device: Option<String>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What was found of one device.
struct Device {
    name: String,
    card: Option<String>,
    details: Details,
    /// Which of fewbit's kernels run there.
    kernels: Option<&'static str>,
    /// What its allocator took for the checks.
    held: Option<u64>,
    /// One for each type that was tried, or why none could be.
    types: Result<Vec<Type>>,
}

/// What a device does in one type.
struct Type {
    name: &'static str,
    found: Result<(Check, Ceiling)>,
}

/// Whatever is wrong, the mildest first.
#[derive(Default)]
struct Faults {
    /// What cannot be used.
    broken: Vec<String>,
    /// What computes wrong numbers.
    wrong: Vec<String>,
}

pub(super) fn run(args: &DoctorArgs, stop: &StopFlag) -> Result<()> {
    let devices = devices(args.device.as_deref())?;
    let built = Built::new();
    if !args.json {
        output::print(&built.as_text())?;
    }
    let reference = reference();
    let mut examined = Vec::new();
    for (found, problem) in devices {
        let device = examine(found, problem, reference.as_ref(), stop)?;
        if !args.json {
            output::print(&device.as_text())?;
        }
        examined.push(device);
    }
    let disk = Disk::measure(Path::new("."), stop);
    if let Err(error) = &disk
        && matches!(error.kind(), Kind::Stopped(_))
    {
        return disk.map(drop);
    }
    if args.json {
        output::json(&as_json(&built, &examined, &disk))?;
    } else {
        output::print(&disk_text(&disk))?;
    }
    let mut faults = Faults::default();
    for device in &examined {
        device.add_faults(&mut faults);
    }
    faults.broken.extend(disk.err().map(|_| "the current folder".to_owned()));
    let Faults { broken, wrong } = faults;
    if !wrong.is_empty() {
        return Err(Error::gate(format!("wrong numbers from {}", wrong.join(", ")))
            .at("fewbit doctor")
            .fix("another --device, or another driver for this one"));
    }
    if !broken.is_empty() {
        return Err(Error::failed(format!("cannot be used: {}", broken.join(", ")))
            .at("fewbit doctor")
            .fix("what the report says of it"));
    }
    if !args.json {
        output::line("all      passed")?;
    }
    Ok(())
}

/// The devices to look at, each with why it cannot be used, where that is known already.
fn devices(asked: Option<&str>) -> Result<Vec<(Found, Option<String>)>> {
    if let Some(name) = asked {
        let name = device::open(name)?.name;
        let kind = name.split(':').next().unwrap_or_default();
        let all = catch_unwind(|| device::found(kind)).unwrap_or_default();
        let found = all.into_iter().find(|found| found.name == name);
        return Ok(vec![(found.unwrap_or(Found { card: None, name }), None)]);
    }
    let mut all = Vec::new();
    for kind in device::compiled() {
        let none = || Found { name: kind.to_owned(), card: None };
        match catch_unwind(|| device::found(kind)) {
            Ok(found) if found.is_empty() => all.push((none(), Some("no such device".to_owned()))),
            Ok(found) => all.extend(found.into_iter().map(|found| (found, None))),
            Err(_) => all.push((none(), Some("its driver is not there".to_owned()))),
        }
    }
    Ok(all)
}

/// Checks and measures a device in each type.
fn examine(
    found: Found,
    problem: Option<String>,
    reference: Result<&Numbers, &Error>,
    stop: &StopFlag,
) -> Result<Device> {
    let Found { name, card } = found;
    if let Some(problem) = problem {
        // A backend whose device is not there is nothing that is wrong.
        let (details, types) = (Details::default(), Err(Error::failed(problem)));
        return Ok(Device { name, card, details, kernels: None, held: None, types });
    }
    let named = device::open(&name)?;
    let details = catch_unwind(AssertUnwindSafe(|| device::details(&named.device)));
    let details = details.unwrap_or_default();
    let kernels = catch_unwind(AssertUnwindSafe(|| device_kernels(&named.device)));
    let kernels = kernels.ok().flatten();
    let mut types = Vec::new();
    for (type_name, dtype) in TYPES {
        stop.check()?;
        let numbers = Numbers::on(&named, dtype);
        let found = numbers.and_then(|numbers| {
            let reference = reference.map_err(|e| Error::failed(e.what()))?;
            let check = numbers.against(reference, dtype);
            let ceiling =
                catch_unwind(AssertUnwindSafe(|| Ceiling::measure(&named.device, dtype, stop)));
            let gave_up = |_| Err(Error::failed("the backend gave up while it was measured"));
            Ok((check, ceiling.unwrap_or_else(gave_up)?))
        });
        if let Err(error) = &found
            && matches!(error.kind(), Kind::Stopped(_))
        {
            let types = Ok(types);
            return found.map(|_| Device { name, card, details, kernels, held: None, types });
        }
        types.push(Type { name: type_name, found });
    }
    let held = catch_unwind(AssertUnwindSafe(|| device::held(&named.device)));
    let held = held.ok().flatten().map(|[_, reserved]| reserved);
    Ok(Device { name, card, details, kernels, held, types: Ok(types) })
}

impl Device {
    fn add_faults(&self, faults: &mut Faults) {
        let Ok(types) = &self.types else { return };
        for Type { name, found } in types {
            let name = format!("{} in {name}", self.name);
            match found {
                Err(_) => faults.broken.push(name),
                Ok((check, _)) if !check.passed => faults.wrong.push(name),
                Ok(_) => {}
            }
        }
    }

    fn as_text(&self) -> String {
        let card = self.card.as_ref().map_or_else(String::new, |card| format!("  {card}"));
        let mut text = format!("\ndevice   {}{card}\n", self.name);
        let Details { target, pci, driver, memory } = &self.details;
        let facts = [
            ("compiles for", target.clone()),
            ("PCI", pci.clone()),
            ("driver", driver.clone()),
            ("memory", memory.map(size)),
            ("fewbit's kernels", self.kernels.map(in_words)),
            ("taken by these checks", self.held.map(size)),
        ];
        for (what, fact) in facts.into_iter().filter_map(|(what, fact)| Some((what, fact?))) {
            let _ = writeln!(text, "         {what}: {fact}");
        }
        let types = match &self.types {
            Ok(types) => types,
            Err(problem) => {
                let _ = writeln!(text, "         {}", problem.what());
                return text;
            }
        };
        for Type { name, found } in types {
            match found {
                Err(error) => {
                    let _ = writeln!(text, "  {name:<5}  cannot be used: {}", error.what());
                }
                Ok((check, ceiling)) => {
                    let Check { logits, gradient, passed, farthest, allowed, .. } = check;
                    let word = if *passed { "passed" } else { "WRONG" };
                    let _ = writeln!(
                        text,
                        "  {name:<5}  {word}: logits off by {logits:.1e} (at most {:.0e})\n\
                         \x20        gradients off by {gradient:.1e} (at most {:.0e}), farthest in\n\
                         \x20        {farthest}",
                        allowed[0], allowed[1],
                    );
                    let _ = writeln!(
                        text,
                        "         {:.1} GFLOP/s at {}, {:.1} at {}; memory {:.1} GB/s",
                        ceiling.small_flops / 1e9,
                        ceiling.small_side,
                        ceiling.large_flops / 1e9,
                        ceiling.large_side,
                        ceiling.bytes / 1e9,
                    );
                }
            }
        }
        text
    }

    fn as_json(&self) -> Value {
        let types = self.types.as_ref().map(|types| {
            let one = |Type { name, found }: &Type| match found {
                Ok((check, ceiling)) => json!({
                    "compute": name, "usable": true, "passed": check.passed, "check": check,
                    "speed": ceiling,
                }),
                Err(error) => json!({
                    "compute": name, "usable": false, "passed": false, "problem": error.what(),
                }),
            };
            types.iter().map(one).collect::<Vec<Value>>()
        });
        json!({
            "name": self.name,
            "card": self.card,
            "details": self.details,
            "kernels": self.kernels,
            "held": self.held,
            "problem": types.as_ref().err().map(|error| error.what()),
            "types": types.as_ref().ok(),
        })
    }
}

/// Which kernels run, in words.
fn in_words(kernels: &str) -> String {
    let words = match kernels {
        "elements" => "those that add nothing up",
        other => other,
    };
    words.to_owned()
}

/// What this binary and this machine are.
struct Built {
    backends: Vec<&'static str>,
    features: Vec<&'static str>,
    threads: usize,
    total: Option<u64>,
    free: Option<u64>,
}

impl Built {
    fn new() -> Self {
        let features = cfg!(feature = "parquet").then_some("parquet");
        let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self {
            backends: device::compiled(),
            features: features.into_iter().collect(),
            threads,
            total: run::memory_total(),
            free: run::memory_available(),
        }
    }

    fn as_text(&self) -> String {
        let some = |bytes: Option<u64>| bytes.map_or_else(|| "?".to_owned(), size);
        let commit = COMMIT.map_or_else(String::new, |commit| format!(", commit {commit}"));
        let features = if self.features.is_empty() { "none" } else { &self.features.join(", ") };
        format!(
            "fewbit   {}{commit}; backends: {}; further features: {features}\n\
             system   {} {}, {} threads, kernels in {}\n\
             memory   {} in all, {} free\n",
            env!("CARGO_PKG_VERSION"),
            self.backends.join(", "),
            std::env::consts::OS,
            std::env::consts::ARCH,
            self.threads,
            vector_level(),
            some(self.total),
            some(self.free),
        )
    }

    fn as_json(&self) -> Value {
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "commit": COMMIT,
            "backends": self.backends,
            "features": self.features,
            "os": std::env::consts::OS,
            "arch": std::env::consts::ARCH,
            "threads": self.threads,
            "vector": vector_level(),
            "memory": { "total": self.total, "free": self.free },
        })
    }
}

/// What `--version` says: version, commit where it is known, and what was compiled in.
pub(super) fn version() -> &'static str {
    static TEXT: LazyLock<String> = LazyLock::new(|| {
        let commit = COMMIT.map_or_else(String::new, |commit| format!(", commit {commit}"));
        let version = env!("CARGO_PKG_VERSION");
        format!("{version}{commit}; devices: {}", device::compiled().join(", "))
    });
    &TEXT
}

/// What it was built from, where whoever built it said so.
const COMMIT: Option<&str> = option_env!("FEWBIT_COMMIT");

fn disk_text(disk: &Result<Disk>) -> String {
    match disk {
        Err(error) => format!("\ndisk     cannot be used: {}\n", error.what()),
        Ok(Disk { write, read, uncached, free }) => {
            let from = if *uncached { "" } else { " (of what the system holds in memory)" };
            let free = free.map_or_else(|| "?".to_owned(), size);
            format!(
                "\ndisk     {:.0} MB/s written, {:.0} MB/s read{from}, {free} free here\n",
                write / 1e6,
                read / 1e6
            )
        }
    }
}

fn as_json(built: &Built, devices: &[Device], disk: &Result<Disk>) -> Value {
    let passed = devices.iter().all(|device| {
        let mut faults = Faults::default();
        device.add_faults(&mut faults);
        faults.broken.is_empty() && faults.wrong.is_empty()
    });
    json!({
        "fewbit": built.as_json(),
        "devices": devices.iter().map(Device::as_json).collect::<Vec<Value>>(),
        "disk": disk.as_ref().ok(),
        "disk_problem": disk.as_ref().err().map(Error::what),
        "passed": passed && disk.is_ok(),
    })
}
