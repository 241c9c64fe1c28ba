//! Which kernels of ours run on devices; on this machine's processor all of them always do.

use std::sync::atomic::{AtomicU8, Ordering};

use burn::tensor::Device;

/// Which kernels of ours run on devices; all else is composed from burn's operations.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum DeviceKernels {
    /// None of them.
    Off,
    /// What a device says it can do.
    #[default]
    Able,
    /// Sums over planes too where the backend does not vouch for them: CubeCL takes no software device at its
    /// word. Planes of one size are needed nevertheless.
    All,
}

impl DeviceKernels {
    /// Every choice by its name.
    pub const NAMES: [(&'static str, Self); 3] =
        [("off", Self::Off), ("on", Self::Able), ("all", Self::All)];

    /// Makes this the choice of the whole process, for what is computed from now on.
    pub fn choose(self) {
        CHOSEN.store(self as u8, Ordering::Relaxed);
    }

    /// The choice of this process.
    pub fn chosen() -> Self {
        let chosen = CHOSEN.load(Ordering::Relaxed);
        let found = Self::NAMES.into_iter().find(|(_, choice)| *choice as u8 == chosen);
        found.map_or_else(Self::default, |(_, choice)| choice)
    }
}

static CHOSEN: AtomicU8 = AtomicU8::new(DeviceKernels::Able as u8);

/// Which of our kernels a device runs: `all`, `elements` (those that add nothing up) or `none`. Opens the device;
/// nothing of this machine's processor.
pub fn device_kernels(device: &Device) -> Option<&'static str> {
    #[cfg(feature = "gpu")]
    {
        let tensor = burn::tensor::Tensor::<1>::zeros([1], device).into_dispatch();
        super::cube::kernels(&tensor)
    }
    #[cfg(not(feature = "gpu"))]
    {
        let _ = device;
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The only test of this binary that chooses.
    #[test]
    fn a_choice_holds() {
        assert_eq!(DeviceKernels::chosen(), DeviceKernels::Able);
        for (_, choice) in DeviceKernels::NAMES {
            choice.choose();
            assert_eq!(DeviceKernels::chosen(), choice);
        }
        DeviceKernels::default().choose();
    }

    #[cfg(feature = "flex")]
    #[test]
    fn the_processor_has_no_say() {
        assert_eq!(device_kernels(&Device::flex()), None);
    }
}
