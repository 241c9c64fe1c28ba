//! A packed model with an adapter's scales: checked, and written as a model of its own.

use std::collections::BTreeMap;
use std::path::Path;

use super::adapter::Adapter;
use super::convert::Foreign;
use super::folder::OpenModel;
use super::formats::{Format, FormatsConfig};
use super::gate::Gate;
use super::manifest::Manifest;
use super::parts::{ModelParts, Quantized};
use super::record::Provenance;
use super::write::{Exported, write_adapted};
use crate::error::{Error, Kind, Result};
use crate::quant::QuantizedWeight;

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

    /// Whether fewbit packed it.
    pub fn is_own(&self) -> bool {
        self.manifest.as_ref().is_some_and(|manifest| manifest.format == Format::Fewbit)
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

/// A packed folder, with its adapter's scales where it has one.
impl Quantized for OpenModel {
    fn names(&self) -> Vec<&str> {
        self.linears().map(|(name, _)| name.as_str()).collect()
    }

    fn linear(&self, name: &str) -> Result<(QuantizedWeight, String)> {
        let record = self.linears().find(|(linear, _)| *linear == name);
        let (Some((_, record)), Some(weight)) = (record, self.quantized(name)?) else {
            return Err(Error::failed("the folder has no codes of this linear").at(name));
        };
        let tuned = self.adapter.as_ref().filter(|adapter| adapter.scales(name).is_some());
        let method = tuned.map_or(&record.method, |adapter| &adapter.head().method);
        Ok((weight, method.clone()))
    }
}

/// As [`write_opened`], of a model that fewbit did not pack.
fn write_foreign(
    opened: &OpenModel,
    format: Format,
    options: &FormatsConfig,
    target: &Path,
    gate: &Gate<'_>,
    device: &str,
) -> Result<Exported> {
    let foreign = Foreign::new(opened, format)?;
    if format == Format::Fewbit && foreign.names().is_empty() {
        let what = "nothing of this model is quantized, and format.fewbit holds codes and scales";
        return Err(Error::preflight(what).at(opened.dir.display()).fix(
            "format.dequantized or format.gguf, or a run that quantizes it: `fewbit train --recipe \
             rtn_w4g128`",
        ));
    }
    let parts = ModelParts {
        dir: &foreign.dir,
        source: &foreign.source,
        quantized: &foreign,
        dense: &BTreeMap::new(),
        activations: None,
        provenance: foreign.provenance(device)?,
    };
    write_adapted(&parts, None, (format, options), target, gate)
}

/// Writes any model that was opened, with its adapter's scales where it has one, as `format` to `target`,
/// behind the gate of [`super::write::write`]. Provenance is the source's; `device` is where the gate
/// measures.
///
/// # Errors
/// As [`super::write::write`].
pub fn write_opened(
    opened: &OpenModel,
    format: Format,
    options: &FormatsConfig,
    target: &Path,
    gate: &Gate<'_>,
    device: &str,
) -> Result<Exported> {
    if !opened.is_own() {
        return write_foreign(opened, format, options, target, gate, device);
    }
    let manifest = opened.packed_manifest()?;
    // `verify` expects equal numbers on the device that is named here.
    let provenance = Provenance { device: device.to_owned(), ..manifest.provenance.clone() };
    let parts = ModelParts {
        dir: &opened.dir,
        source: &opened.checkpoint,
        quantized: opened,
        dense: &BTreeMap::new(),
        activations: manifest.activations.clone(),
        provenance,
    };
    let head = opened.adapter.as_ref().map(Adapter::head).or(manifest.adapter.as_ref());
    write_adapted(&parts, head, (format, options), target, gate)
}
