//! The `fewbit` binary: everything is in the library.

/// Training allocates and frees the same large tensors at every step; the system allocator gives
/// them back to the kernel each time, which costs a third of a distillation step.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    fewbit::cli::main()
}
