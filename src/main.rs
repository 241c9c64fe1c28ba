//! The `fewbit` binary: everything is in the library.

use std::alloc::{GlobalAlloc, Layout};

use mimalloc::MiMalloc;

/// Training allocates and frees the same large tensors at every step; the system allocator gives
/// them back to the kernel each time, which costs a third of a distillation step.
///
/// An allocation that fails ends the process with a sentence and exit code 4, where the standard library
/// would abort.
struct Allocator;

// SAFETY: every call goes to mimalloc as it came, and what mimalloc gives comes back as it is; where it
// gives nothing, nothing comes back at all.
#[allow(unsafe_code)] // an allocator cannot be written without
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise is mimalloc's.
        or_end(unsafe { MiMalloc.alloc(layout) }, layout.size())
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { MiMalloc.dealloc(block, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        or_end(unsafe { MiMalloc.alloc_zeroed(layout) }, layout.size())
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as above.
        or_end(unsafe { MiMalloc.realloc(block, layout, size) }, size)
    }
}

fn or_end(block: *mut u8, size: usize) -> *mut u8 {
    if block.is_null() { fewbit::exhausted::end(size) } else { block }
}

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

fn main() -> std::process::ExitCode {
    fewbit::cli::main()
}
