//! Where texts are continued: few activations at a time, and nobody asks for the bits of the dense model.

use std::cell::Cell;

use burn::tensor::Device;

thread_local! {
    static CONTINUING: Cell<bool> = const { Cell::new(false) };
}

/// Runs `f`, in which texts are continued on `device`: there a product of few activations with packed codes on a
/// frozen grid ([`CodedMatrix::linear_frozen`](super::CodedMatrix::linear_frozen)) is computed on the codes, another
/// order of the same sum. Elsewhere weights are decoded, so that a packed model gives the bits of the dense one that
/// it stands for. Holds for the thread that runs `f`: the calling one, or on this machine's processor one of rayon's,
/// whose others stay awake for it.
pub fn continuing<R: Send>(device: &Device, f: impl FnOnce() -> R + Send) -> R {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            CONTINUING.set(self.0);
        }
    }
    let f = || {
        let _restore = Restore(CONTINUING.replace(true));
        f()
    };
    // Other devices have a queue for each thread, and their tensors are of the caller's.
    #[cfg(feature = "flex")]
    if *device == Device::flex() {
        return super::awake::awake(f);
    }
    #[cfg(not(feature = "flex"))]
    let _ = device;
    f()
}

/// Whether the calling thread is inside [`continuing`].
#[cfg(any(feature = "flex", feature = "gpu"))]
pub(super) fn is_continuing() -> bool {
    CONTINUING.get()
}
