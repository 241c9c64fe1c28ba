//! The card of a folder: what it is, for who finds it.

use std::collections::{BTreeMap, BTreeSet};

use super::manifest::Manifest;
use super::record::MANIFEST_FILE;

/// The card's name in a folder.
pub(super) const CARD: &str = "README.md";

/// Its text.
pub(super) fn card(manifest: &Manifest) -> String {
    let mut widths: BTreeMap<u8, usize> = BTreeMap::new();
    for record in manifest.linears.values() {
        *widths.entry(record.bits.get()).or_default() += 1;
    }
    let width = |(bits, count): (&u8, &usize)| {
        let linears = if *count == 1 { "matrix" } else { "matrices" };
        format!("{count} {linears} in {bits} bits")
    };
    let widths: Vec<String> = widths.iter().map(width).collect();
    let methods: BTreeSet<&str> =
        manifest.linears.values().map(|record| record.method.as_str()).collect();
    let methods = methods.into_iter().collect::<Vec<_>>().join(", ");
    let what = if widths.is_empty() {
        "Nothing quantized".to_owned()
    } else {
        format!("{} by {methods}", widths.join(", "))
    };
    let losses = manifest.linears.values().filter_map(|record| record.loss);
    let losses = losses.chain(manifest.rounded.values().copied());
    let worst = losses.map(|loss| loss.relative).fold(0.0, f64::max);
    let kept = if manifest.lossy {
        format!(
            "the format does not hold all of what was trained: weights were changed by up to \
             {:.2} % (relative norm per matrix)",
            100.0 * worst
        )
    } else {
        "the weights decode to what was trained, bit for bit".to_owned()
    };
    format!(
        "# {model}\n\n\
         {what}, written by fewbit {version} as `{name}`: {about}.\n\n\
         Made from {model} (sha256 of its files {sha}). `{MANIFEST_FILE}` has hashes of \
         everything, `fewbit verify` checks them; {kept}.\n",
        model = manifest.provenance.model,
        version = env!("CARGO_PKG_VERSION"),
        name = manifest.format.name(),
        about = manifest.format.about(),
        sha = &manifest.provenance.model_sha256,
    )
}
