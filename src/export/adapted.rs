//! A packed model with an adapter's scales: checked, and written as a model of its own.

use std::collections::BTreeMap;
use std::path::Path;

use super::write::write_adapted;
use super::{
    Adapter, Exported, Format, FormatsConfig, Gate, Manifest, ModelParts, OpenModel, Provenance,
};
use crate::error::{Error, Kind, Result};

impl OpenModel {
    /// The model with an adapter's scales.
    ///
    /// # Errors
    /// As [`OpenModel::check_adapter`].
    pub fn with_adapter(mut self, adapter: Adapter) -> Result<Self> {
        self.check_adapter(&adapter)?;
        self.adapter = Some(adapter);
        Ok(self)
    }

    /// Refuses an adapter that was not trained on this model.
    ///
    /// # Errors
    /// Exit code 6 when the adapter belongs to another base, or the model holds no codes.
    pub fn check_adapter(&self, adapter: &Adapter) -> Result<()> {
        self.packed_manifest().map_err(|e| {
            let base = &adapter.head().base;
            e.with_kind(Kind::Mismatch)
                .at(format!("adapter {}", adapter.head().name))
                .fix(format!("the packed base it was trained on: export/fewbit of a run on {base}"))
        })?;
        adapter.check(|name| self.quantized(name)).map_err(|e| e.at(self.dir.display()))
    }

    /// The manifest of a folder that holds codes.
    ///
    /// # Errors
    /// A usage error when this one does not.
    pub fn packed_manifest(&self) -> Result<&Manifest> {
        self.manifest.as_ref().filter(|m| m.format == Format::Fewbit).ok_or_else(|| {
            Error::usage("this model is not packed by fewbit: it has no codes and scales")
                .at(self.dir.display())
                .fix("a run's export/fewbit; `fewbit train --recipe rtn_w4g128` makes one")
        })
    }
}

/// Writes a packed model, with its adapter's scales where it has one, as `format` to `target`,
/// behind the gate of [`super::write`]. Provenance is the source's; `device` is where the gate
/// measures.
///
/// # Errors
/// A usage error when the model holds no codes; otherwise as [`super::write`].
pub fn write_opened(
    opened: &OpenModel,
    format: Format,
    options: FormatsConfig,
    target: &Path,
    gate: &Gate<'_>,
    device: &str,
) -> Result<Exported> {
    let manifest = opened.packed_manifest()?;
    // `verify` expects equal numbers on the device that is named here.
    let provenance = Provenance { device: device.to_owned(), ..manifest.provenance.clone() };
    let parts = ModelParts {
        dir: &opened.dir,
        source: &opened.checkpoint,
        quantized: opened,
        dense: &BTreeMap::new(),
        activations: manifest.activations.clone(),
        options,
        provenance,
    };
    let head = opened.adapter.as_ref().map(Adapter::head).or(manifest.adapter.as_ref());
    write_adapted(&parts, head, format, target, gate)
}
