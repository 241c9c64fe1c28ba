//! What an export would refuse, known before there is anything to export.

use burn::tensor::Device;

use super::format::{Kind, Writing};
use super::formats::{Format, FormatsConfig};
use super::parts::ModelParts;
use crate::error::Result;

/// Refuses what [`write`](super::write) would refuse of these linears, and writes nothing; gives the bits that a
/// weight will take. `parts` may hold stand-ins of what is yet to be made.
///
/// # Errors
/// Exit code 3 where the format cannot hold them, with what to do instead.
pub fn holds(
    parts: &ModelParts<'_>,
    format: Format,
    options: &FormatsConfig,
    device: &Device,
) -> Result<f64> {
    let (plain, all) = (format.plain(), Format::ALL.map(Format::plain));
    let keys = options.keys(format).unwrap_or(&*plain);
    let writing = Writing::new(parts, keys, &all, device)?;
    if let Kind::File(file) = keys.kind() {
        file.fits(&writing)?;
    }
    let (mut bits, mut weights) = (0.0, 0.0);
    for linear in parts.quantized.names() {
        let stored = writing.stored(linear)?;
        let len = stored.weight.layout.len() as f64;
        weights += len;
        bits += if let Kind::File(file) = keys.kind() {
            len * file.accepts(linear, &stored.weight, &writing.config)?
        } else {
            let tensors = writing.encode(linear, &stored.weight)?;
            8.0 * tensors.iter().map(|(_, tensor)| tensor.bytes.len() as f64).sum::<f64>()
        };
    }
    Ok(bits / f64::max(weights, 1.0))
}
