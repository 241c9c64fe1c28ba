//! The card of a folder: what it is, for who finds it.

use std::collections::{BTreeMap, BTreeSet};

use super::manifest::Manifest;
use super::record::MANIFEST_FILE;

/// The card's name in a folder.
pub(super) const CARD: &str = "README.md";

/// Fields of the source's card that are true of what is made from it.
const KEPT: [&str; 6] = ["license", "license_name", "license_link", "language", "datasets", "tags"];

/// The head of a card, as the hub reads it, from the source's card; empty where that has nothing to say.
fn head(source: &str, model: &str) -> String {
    let mut kept = String::new();
    let mut keeps = false;
    let mut lines = source.lines();
    if lines.next().map(str::trim_end) == Some("---") {
        for line in lines.take_while(|line| line.trim_end() != "---") {
            // A field goes on in lines that are indented or items of a list.
            if !line.starts_with([' ', '-', '\t']) {
                let (key, _) = line.split_once(':').unwrap_or_default();
                keeps = KEPT.contains(&key.trim());
            }
            if keeps {
                kept.push_str(line);
                kept.push('\n');
            }
        }
    }
    // owner/name of the hub, not a path.
    let of_hub = model.split('/').count() == 2 && !model.starts_with(['.', '/']);
    if of_hub {
        kept += "base_model: ";
        kept += model;
        kept.push('\n');
    }
    if kept.is_empty() { kept } else { format!("---\n{kept}---\n\n") }
}

/// Its text, with what of the source's card goes on being true.
pub(super) fn card(manifest: &Manifest, source: &str) -> String {
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
        "{head}# {model}\n\n\
         {what}, written by fewbit {version} as `{name}`: {about}.\n\n\
         Made from {model} (sha256 of its files {sha}). `{MANIFEST_FILE}` has hashes of \
         everything, `fewbit verify` checks them; {kept}.\n",
        head = head(source, &manifest.provenance.model),
        model = manifest.provenance.model,
        version = env!("CARGO_PKG_VERSION"),
        name = manifest.format.name(),
        about = manifest.format.about(),
        sha = &manifest.provenance.model_sha256,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stays_true_of_a_card() {
        let source = "---\nlibrary_name: transformers\nlicense: apache-2.0\nlanguage:\n- en\n- ko\n\
                      model-index:\n- name: x\n  results: []\n---\n# License: not a field\n";
        let told = head(source, "models/x/y");
        assert_eq!(told, "---\nlicense: apache-2.0\nlanguage:\n- en\n- ko\n---\n\n");
        assert_eq!(head("# A card\nlicense: mit\n", "/a/b"), "");
        assert_eq!(head("", "owner/name"), "---\nbase_model: owner/name\n---\n\n");
    }
}
