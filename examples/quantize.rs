//! A recipe, run from Rust: `cargo run --release --example quantize`.
//!
//! Rounds the built-in model to 4 bits in groups of 128, measures it beside the float model and packs it, as
//! `fewbit train --recipe rtn_w4g128` does, into `quantized/` here. Run again, it finds the run complete.
#![allow(clippy::print_stdout)] // an example prints

use fewbit::report::Reporters;
use fewbit::report::terminal::Terminal;
use fewbit::run::{Options, train};
use fewbit::stop::StopFlag;

fn main() -> fewbit::error::Result<()> {
    let options = Options {
        recipe: "rtn_w4g128".to_owned(),
        // As on the command line; `model.path=...` for a model of your own.
        set: vec!["quant.bits=4".to_owned()],
        output: Some("quantized".into()),
        device: Some("cpu".to_owned()),
        fresh: false,
        probe: false,
        reuse: None,
        price_per_hour: None,
    };
    let screen = Reporters::new(vec![Box::new(Terminal::new())]);
    let record = train(&options, screen, &StopFlag::default())?;
    for measured in &record.results.measured {
        println!("{}: {:.3}", measured.what, measured.result.first());
    }
    for export in &record.results.exports {
        println!(
            "{}: {} bytes, {:.2} bits a weight",
            export.path.display(),
            export.bytes,
            export.bits_per_weight
        );
    }
    Ok(())
}
