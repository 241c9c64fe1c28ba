//! The `fewbit` binary: everything is in the library.

fn main() -> std::process::ExitCode {
    fewbit::cli::main()
}
