//! The errors of the container's crate in our three lines, with what a recipe can do about a refusal.

use fewbit_gguf::{BlockType, Refusal};

use crate::error::Error;

/// What to do about a file whose contents cannot be.
pub(super) const DAMAGED: &str = "another copy of the file: this one is damaged or incomplete";

impl From<fewbit_gguf::Error> for Error {
    fn from(error: fewbit_gguf::Error) -> Self {
        let mut ours = match error.io() {
            Some(source) => Self::of_io(error.what(), source),
            // It is about the contents of a file.
            None => Self::preflight(error.what()),
        };
        if let Some(place) = error.place() {
            ours = ours.at(place);
        }
        match error.advice() {
            Some(advice) => ours.fix(advice),
            None if error.io().is_some() => ours,
            None => ours.of_input(DAMAGED),
        }
    }
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        let error = Self::preflight(refusal.to_string());
        match advice(&refusal) {
            Some(advice) => error.fix(advice),
            None => error,
        }
    }
}

fn advice(refusal: &Refusal) -> Option<String> {
    const EXACT: &str = "export format.fewbit or format.dequantized, which hold every grid";
    Some(match refusal {
        Refusal::Unsound(_) => return None,
        Refusal::ReadOnly(_) => {
            format!("ask for one of {}", BlockType::WRITTEN.map(BlockType::name).join(", "))
        }
        Refusal::PartialBlocks { .. } => {
            "take a type with smaller blocks, or leave this weight dense".to_owned()
        }
        Refusal::Inexact { .. } => format!("let the type be chosen, or {EXACT}"),
        Refusal::InexactValue { .. } => "store it as F32".to_owned(),
        Refusal::Rows { .. } => {
            "leave this weight dense, store it as F32, or export another format".to_owned()
        }
        Refusal::Scales { .. } => format!("quant.scales = \"f16\" in training, or {EXACT}"),
        Refusal::ZeroPoint { .. } => format!("train with integer zero points, or {EXACT}"),
        Refusal::Groups { .. } => "train with groups of 32 or a multiple of it".to_owned(),
        Refusal::Grid { .. } => {
            format!("train with a zero point in the middle of the codes, or {EXACT}")
        }
    })
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::path::Path;

    use fewbit_gguf::{Header, Reader};

    use super::*;
    use crate::error::Kind;

    #[test]
    fn a_refusal_comes_with_what_to_do() {
        let scales = Refusal::Scales { inexact: 1, of: 2, change: 0.000_2 };
        let error = Error::from(scales);
        assert_eq!(error.kind(), Kind::Preflight);
        assert_eq!(
            error.at("w").to_string(),
            "1 of 2 scales are no f16 values, which is what GGUF stores; rounding them would change \
             weights by up to 0.02 %\n  at   w\n  try  quant.scales = \"f16\" in training, or export \
             format.fewbit or format.dequantized, which hold every grid"
        );
        for (refusal, advice) in [
            (Refusal::ReadOnly(BlockType::Q5K), "one of TQ2_0, Q2_0"),
            (Refusal::Rows { inputs: 44 }, "dense"),
            (Refusal::Scales { inexact: 1, of: 1, change: f64::INFINITY }, "format.fewbit"),
            (Refusal::ZeroPoint { zero: 7.1, bits: 4 }, "integer zero"),
            (Refusal::Groups { group_len: 16 }, "groups of 32"),
            (Refusal::Grid { bits: 8, zero: 200.0, group_len: 64 }, "middle"),
        ] {
            let error = Error::from(refusal).to_string();
            assert!(error.contains(advice), "{error}");
        }
    }

    #[test]
    fn a_damaged_file_keeps_place_and_advice() {
        let error = Reader::new(io::Cursor::new(b"GGML"), Path::new("m.gguf")).unwrap_err();
        let error = Error::from(error);
        assert_eq!(error.kind(), Kind::Preflight);
        assert_eq!(
            error.to_string(),
            "the file is no GGUF file: it does not start with `GGUF`\n  at   m.gguf\n  try  give a \
             file that ends in .gguf"
        );
    }

    /// As [`Error::io`] words them.
    #[test]
    fn errors_of_the_file_system_keep_their_exit_codes() {
        struct Full;
        impl io::Write for Full {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::StorageFull.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let path = Path::new("no/such/model.gguf");
        let full = Error::from(Header::new().start(Full, path).map(drop).unwrap_err());
        let missing = Error::from(Reader::open(path).unwrap_err());
        let source = std::fs::File::open(path).unwrap_err();
        for (error, wanted) in [
            (full, Error::io("write", path, &io::ErrorKind::StorageFull.into())),
            (missing, Error::io("read", path, &source)),
        ] {
            assert_eq!(error.kind(), wanted.kind());
            assert_eq!(error.to_string(), wanted.to_string());
        }
    }
}
