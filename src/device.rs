//! Devices by name. The only file that knows which backends were compiled in.

use burn::tensor::Device;

use crate::error::{Error, Result};

/// A device and the name it goes by.
#[derive(Clone, Debug)]
pub struct NamedDevice {
    /// `cpu`, `cuda:0`, ...
    pub name: String,
    /// burn's handle, without autodiff.
    pub device: Device,
    /// Whether it has memory of its own.
    pub discrete: bool,
}

/// The device that a name stands for: `auto`, `cpu`, `cuda[:i]`, `rocm[:i]`, `metal`, `vulkan`,
/// `wgpu`, the last three with an optional `:i` for the i-th discrete GPU.
///
/// # Errors
/// A usage error for an unknown name, or a backend that this binary was built without.
pub fn open(name: &str) -> Result<NamedDevice> {
    named(name).map_err(|error| error.at(format!("--device {name}, or `device` in the recipe")))
}

fn named(name: &str) -> Result<NamedDevice> {
    let name = if name == "auto" { best() } else { name };
    let (kind, index) = match name.split_once(':') {
        None => (name, None),
        Some((kind, index)) => {
            let index = index.parse::<usize>().map_err(|_| {
                Error::usage(format!("device `{name}` has no number after the colon"))
                    .fix(format!("{kind}:0"))
            })?;
            (kind, Some(index))
        }
    };
    let device = backend(kind, index)?;
    Ok(NamedDevice { name: name.to_owned(), device, discrete: kind != "cpu" })
}

/// Every device kind with the Cargo feature that brings it, best first.
const ALL: [(&str, &str); 6] = [
    ("cuda", "cuda"),
    ("metal", "metal"),
    ("rocm", "rocm"),
    ("vulkan", "vulkan"),
    ("wgpu", "wgpu"),
    ("cpu", "flex"),
];

/// The backends compiled into this binary, best first.
pub fn compiled() -> Vec<&'static str> {
    let compiled = [
        cfg!(feature = "cuda"),
        cfg!(feature = "metal"),
        cfg!(feature = "rocm"),
        cfg!(feature = "vulkan"),
        cfg!(feature = "wgpu"),
        cfg!(feature = "flex"),
    ];
    ALL.iter().zip(compiled).filter(|(_, compiled)| *compiled).map(|((name, _), _)| *name).collect()
}

/// A device that this binary can use, if what its backend needs is there.
#[derive(Clone, Debug)]
pub struct Found {
    /// What [`open`] takes.
    pub name: String,
    /// What the backend calls it, where it does.
    pub card: Option<String>,
}

/// What backend and system tell of the card behind a device.
#[derive(Clone, Debug, Default, Eq, PartialEq, serde::Serialize)]
pub struct Details {
    /// What kernels are compiled for: `ptx_sm90`, a Vulkan driver's name.
    pub target: Option<String>,
    /// Where it is, `0000:01:00.0`; none of a software device.
    pub pci: Option<String>,
    /// Version of its driver, where the system says it.
    pub driver: Option<String>,
    /// Bytes of its memory, where the system says them.
    pub memory: Option<u64>,
}

/// What there is to say of a device besides its name. Opens it.
pub fn details(device: &Device) -> Details {
    #[cfg(feature = "gpu")]
    if let Some(identity) = device.identity() {
        let physical = identity.physical.unwrap_or_default();
        let pci = physical.pci_address.map(|address| address.to_string());
        // What an AMD card's driver says of it, and NVIDIA's of itself.
        let says = |path: String| std::fs::read_to_string(path).ok();
        let memory = pci.as_ref().and_then(|pci| {
            says(format!("/sys/bus/pci/devices/{pci}/mem_info_vram_total"))?.trim().parse().ok()
        });
        let nvidia = physical.vendor == Some(burn::tensor::PciVendor::Nvidia);
        let driver = if nvidia {
            says("/proc/driver/nvidia/version".to_owned())
                .and_then(|text| text.lines().next().map(|line| line.trim().to_owned()))
        } else {
            says("/sys/module/amdgpu/version".to_owned()).map(|text| text.trim().to_owned())
        };
        return Details { target: Some(identity.fingerprint), pci, driver, memory };
    }
    let _ = device;
    Details::default()
}

/// Bytes that a device's allocator holds, where the backend tells: of tensors, and all that it took from the
/// card. It gives none back by itself, so the second is a peak.
pub fn held(device: &Device) -> Option<[u64; 2]> {
    let usage = device.clone().inner().memory_pool_usage()?;
    Some([usage.bytes_in_use, usage.bytes_reserved])
}

/// The devices of a compiled backend that are there; a backend without its driver may panic here.
pub fn found(kind: &str) -> Vec<Found> {
    let count = match kind {
        "cpu" => 1,
        #[cfg(feature = "cuda")]
        "cuda" => Device::enumerate(burn::tensor::DeviceType::Cuda).into_iter().count(),
        #[cfg(feature = "rocm")]
        "rocm" => Device::enumerate(burn::tensor::DeviceType::Rocm).into_iter().count(),
        #[cfg(feature = "metal")]
        "metal" => Device::enumerate(burn::tensor::DeviceType::Metal).into_iter().count().min(1),
        #[cfg(feature = "vulkan")]
        "vulkan" => Device::enumerate(burn::tensor::DeviceType::Vulkan).into_iter().count().min(1),
        #[cfg(feature = "wgpu")]
        "wgpu" => Device::enumerate(burn::tensor::DeviceType::Wgpu).into_iter().count().min(1),
        _ => 0,
    };
    // An index of the last three counts discrete cards alone, so the default one stands for them.
    let indexed = ["cuda", "rocm"].contains(&kind);
    let name = |index| if indexed { format!("{kind}:{index}") } else { kind.to_owned() };
    (0..count).map(name).map(|name| Found { card: card(&name), name }).collect()
}

/// What the backend calls a device.
fn card(name: &str) -> Option<String> {
    #[cfg(feature = "gpu")]
    if name != "cpu" {
        return Some(named(name).ok()?.device.identity()?.name);
    }
    processor().filter(|_| name == "cpu")
}

/// What the processor calls itself, where the system tells.
fn processor() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    line.split_once(':').map(|(_, name)| name.trim().to_owned())
}

fn best() -> &'static str {
    compiled().first().copied().unwrap_or("cpu")
}

#[cfg_attr(
    not(any(
        feature = "cuda",
        feature = "rocm",
        feature = "metal",
        feature = "vulkan",
        feature = "wgpu"
    )),
    allow(unused_variables)
)] // the CPU has no index
fn backend(kind: &str, index: Option<usize>) -> Result<Device> {
    #[cfg(any(feature = "metal", feature = "vulkan", feature = "wgpu"))]
    let gpu = match index {
        Some(index) => burn::tensor::DeviceKind::DiscreteGpu(index),
        None => burn::tensor::DeviceKind::DefaultDevice,
    };
    match kind {
        #[cfg(feature = "flex")]
        "cpu" => Ok(Device::flex()),
        #[cfg(feature = "cuda")]
        "cuda" => Ok(Device::cuda(index.unwrap_or(0))),
        #[cfg(feature = "rocm")]
        "rocm" => Ok(Device::rocm(index.unwrap_or(0))),
        #[cfg(feature = "metal")]
        "metal" => Ok(Device::metal(gpu)),
        #[cfg(feature = "vulkan")]
        "vulkan" => Ok(Device::vulkan(gpu)),
        #[cfg(feature = "wgpu")]
        "wgpu" => Ok(Device::wgpu(gpu)),
        _ => Err(match ALL.iter().find(|(name, _)| *name == kind) {
            Some((_, feature)) => {
                Error::usage(format!("this binary was built without the {kind} backend"))
                    .fix(format!("--device {}, or build with --features {feature}", best()))
            }
            None => Error::usage(format!("unknown device `{kind}`"))
                .fix(format!("one of: auto, {}", compiled().join(", "))),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_devices_are_usage_errors() {
        assert_eq!(open("gpu").unwrap_err().kind().exit_code(), 2);
        assert_eq!(open("cuda:x").unwrap_err().kind().exit_code(), 2);
        let text = open("gpu").unwrap_err().to_string();
        assert!(text.contains("  at   --device gpu, or `device` in the recipe"), "{text}");
    }

    #[cfg(feature = "flex")]
    #[test]
    fn the_cpu_opens() {
        assert_eq!(open("cpu").unwrap().name, "cpu");
        assert!(!open("cpu").unwrap().discrete);
        let names: Vec<String> = found("cpu").into_iter().map(|found| found.name).collect();
        assert_eq!((names, found("abacus").len()), (vec!["cpu".to_owned()], 0));
    }
}
