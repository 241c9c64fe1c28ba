//! What an export would refuse, known before there is anything to export.

use burn::tensor::Device;

use super::format::{Kind, Writing};
use super::formats::{Format, FormatsConfig};
use super::parts::ModelParts;
use crate::error::Result;

/// Refuses what [`write`](super::write) would refuse of these linears, and writes nothing. `parts` may hold
/// stand-ins of what is yet to be made.
///
/// # Errors
/// Exit code 3 where the format cannot hold them, with what to do instead.
pub fn holds(
    parts: &ModelParts<'_>,
    format: Format,
    options: &FormatsConfig,
    device: &Device,
) -> Result<()> {
    let (plain, all) = (format.plain(), Format::ALL.map(Format::plain));
    let keys = options.keys(format).unwrap_or(&*plain);
    let writing = Writing::new(parts, keys, &all, device)?;
    if let Kind::File(file) = keys.kind() {
        file.fits(&writing)?;
    }
    for linear in parts.quantized.names() {
        let stored = writing.stored(linear)?;
        match keys.kind() {
            Kind::File(file) => file.accepts(linear, &stored.weight, &writing.config)?,
            _ => drop(writing.encode(linear, &stored.weight)?),
        }
    }
    Ok(())
}
