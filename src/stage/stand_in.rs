//! Linears as a plan will leave them, but for their values: what formats are asked about before anything
//! is trained.

use std::collections::BTreeMap;

use burn::tensor::{Device, Tensor, TensorData};

use super::kind::{Codes, Effect};
use super::state::ModelState;
use crate::error::{Error, Kind, Result};
use crate::export::{self, Format, FormatsConfig, ModelParts, Provenance};
use crate::method::{self, MethodConfig, Needs, RtnConfig};
use crate::quant::{
    Grid, GroupAxis, ObserverConfig, QuantSpec, QuantizedWeight, Repr, ScaleDType, ScaleDigits,
};

/// Rows that are really quantized: others repeat them.
const ROWS: usize = 8;

/// What each linear will be.
#[derive(Clone, Debug)]
pub struct StandIns {
    linears: BTreeMap<String, StandIn>,
    head: &'static str,
    /// Whether a stage leaves some linears as the packed folder holds them, of which nothing is known.
    unknown: bool,
}

#[derive(Clone, Debug, PartialEq)]
struct StandIn {
    spec: QuantSpec,
    method: MethodConfig,
    observer: ObserverConfig,
    /// The type that a later stage rounds the scales to.
    dtype: ScaleDType,
}

impl StandIns {
    /// Of a model whose linears are float, or `packed` codes of unknown values; `head` names its head.
    pub fn new(packed: bool, head: &'static str) -> Self {
        Self { unknown: packed, head, linears: BTreeMap::new() }
    }

    /// What a stage makes of them: of `specs`, and of the head where it rounds it.
    pub fn pass(
        &mut self,
        effect: Effect<'_>,
        specs: &BTreeMap<String, QuantSpec>,
        head: Option<QuantSpec>,
        observer: &ObserverConfig,
    ) {
        match effect {
            Effect::Nothing => {}
            Effect::Codes(Codes { method, .. }) => {
                let rtn = MethodConfig::Rtn(RtnConfig {});
                let tuned = method.tunes().is_some();
                // A solver sees inputs, and makes the grid that rounding has.
                // Its codes of another kind are asked for by kind alone.
                let alike = method.needs() == Needs::Weight || method.leaves() == Repr::Codebook;
                let method = if alike { method } else { &rtn };
                let stand_in = |spec: QuantSpec, method: &MethodConfig| StandIn {
                    spec,
                    method: method.clone(),
                    observer: observer.clone(),
                    dtype: ScaleDType::F32,
                };
                for (name, spec) in specs.iter().filter(|_| !tuned) {
                    self.linears.insert(name.clone(), stand_in(*spec, method));
                }
                self.linears.extend(head.map(|spec| (self.head.to_owned(), stand_in(spec, &rtn))));
            }
            Effect::Grids { dtype, .. } => {
                for name in specs.keys() {
                    if let Some(linear) = self.linears.get_mut(name) {
                        linear.dtype = dtype;
                    }
                }
            }
            Effect::Floats => {
                self.linears.retain(|name, _| name == self.head);
                self.unknown = false;
            }
        }
    }

    /// Asks every format whether it will hold them, with scales of these `digits`.
    ///
    /// # Errors
    /// A preflight error that names the format and what will do, which has been tried.
    pub fn check(
        &self,
        formats: &FormatsConfig,
        digits: ScaleDigits,
        model: &ModelState,
        device: &Device,
    ) -> Result<()> {
        if self.unknown {
            return Ok(());
        }
        for format in formats.formats() {
            let ask = |digits| self.ask(format, formats, digits, model, device);
            let refused = match ask(digits) {
                Err(refused) if refused.kind() == Kind::Preflight => refused,
                // What no stand-in can be made of is left to the export.
                Ok(_) | Err(_) => continue,
            };
            let mut advice = Vec::new();
            let shorter = [ScaleDigits::F16, ScaleDigits::Bits7].into_iter();
            let shorter = shorter
                .filter(|shorter| shorter.significant() < digits.significant())
                .find(|shorter| ask(*shorter).is_ok());
            advice.extend(shorter.map(|shorter| format!("quant.scales = \"{}\"", shorter.name())));
            let lossy = FormatsConfig::of(format, &["lossy=true".to_owned()]);
            if lossy.is_ok_and(|lossy| self.ask(format, &lossy, digits, model, device).is_ok()) {
                let name = format.name();
                advice.push(format!("format.{name}.lossy = true, which changes weights"));
            }
            let refused = match shorter {
                Some(_) => Error::preflight(format!(
                    "format.{} holds scales of fewer digits than the {} numbers that this plan \
                     leaves",
                    format.name(),
                    digits.name()
                )),
                None => refused,
            };
            let refused = refused.at(format!("format.{}", format.name()));
            let tried = !advice.is_empty();
            return Err(if tried { refused.fix(advice.join("; or ")) } else { refused });
        }
        Ok(())
    }

    /// The digits of scales, of these in order, with which a format takes the fewest bits a weight, and how
    /// many; the first of equal ones. `None` where nothing is known of the linears.
    ///
    /// # Errors
    /// Why the format holds them with none of these.
    pub fn smallest(
        &self,
        format: Format,
        options: &FormatsConfig,
        digits: &[ScaleDigits],
        model: &ModelState,
        device: &Device,
    ) -> Result<Option<(ScaleDigits, f64)>> {
        if self.unknown {
            return Ok(None);
        }
        let mut best: Option<(ScaleDigits, f64)> = None;
        let mut refused = None;
        for digits in digits {
            match self.ask(format, options, *digits, model, device) {
                Ok(bits) if best.is_none_or(|(_, least)| bits < least) => {
                    best = Some((*digits, bits));
                }
                Ok(_) => {}
                Err(error) => refused = Some(error),
            }
        }
        match (best, refused) {
            (None, Some(error)) => Err(error),
            (best, _) => Ok(best),
        }
    }

    fn ask(
        &self,
        format: Format,
        options: &FormatsConfig,
        digits: ScaleDigits,
        model: &ModelState,
        device: &Device,
    ) -> Result<f64> {
        let made = self.made(digits, model, device)?;
        let parts = ModelParts {
            dir: &model.dir,
            source: &model.checkpoint,
            quantized: &made,
            dense: &BTreeMap::new(),
            activations: model.activations.if_on(),
            provenance: Provenance::default(),
        };
        export::holds(&parts, format, options, device)
    }

    /// One linear of each kind.
    fn made(
        &self,
        digits: ScaleDigits,
        model: &ModelState,
        device: &Device,
    ) -> Result<BTreeMap<String, (QuantizedWeight, String)>> {
        let config = &model.config;
        let mut shapes: BTreeMap<String, [usize; 2]> = config.linear_shapes().into_iter().collect();
        shapes.insert(config.head().to_owned(), config.head_shape());
        let mut kinds: Vec<(&str, &StandIn)> = Vec::new();
        let mut made = BTreeMap::new();
        for (name, linear) in &self.linears {
            let last = name.rsplit('.').next().unwrap_or(name);
            let Some(shape) = shapes.get(name) else { continue };
            if kinds.contains(&(last, linear)) {
                continue;
            }
            kinds.push((last, linear));
            // Formats ask for rows in whole packs of up to 32, and GGUF for whole pairs in each head.
            let unit = 64 * model.config.n_heads.max(1);
            let [out, inputs] = *shape;
            let out = if out < 2 * unit { out } else { unit + out % unit };
            let weight = linear.make([out, inputs], digits, device).map_err(|e| e.at(name))?;
            made.insert(name.clone(), (weight, linear.method.name().to_owned()));
        }
        Ok(made)
    }
}

impl StandIn {
    /// A weight of this shape, `[out, in]`, without meaning.
    fn make(
        &self,
        shape: [usize; 2],
        digits: ScaleDigits,
        device: &Device,
    ) -> Result<QuantizedWeight> {
        let [out, inputs] = shape;
        let layout = self.spec.layout(shape)?;
        if let Some(config) = self.method.codebook() {
            return config.stand_in(&self.spec, layout)?.with_scales(digits);
        }
        let repeats = layout.axis == GroupAxis::In && layout.group_len <= inputs && out > ROWS;
        let rows = if repeats { ROWS } else { out };
        let some = if repeats { self.spec.layout([rows, inputs])? } else { layout };
        let weight = TensorData::new(values(rows * inputs), [rows, inputs]);
        let weight = Tensor::from_data(weight, device);
        let found = method::quantize(&self.method, &self.spec, &self.observer, some, &weight)?;
        let mut found = found.with_scales(digits)?;
        if self.dtype == ScaleDType::F16 {
            found = found.with_scales(ScaleDigits::F16)?;
        }
        if !repeats {
            return Ok(found);
        }
        let codes: Vec<u8> = found.codes.to_vec().into_iter().cycle().take(out * inputs).collect();
        let grid = match found.grid {
            Grid::Uniform { scale, zero_point, zero_kind } => {
                let groups = layout.groups;
                let [scale, zero_point] =
                    [scale, zero_point].map(|v| v.into_iter().cycle().take(groups).collect());
                Grid::Uniform { scale, zero_point, zero_kind }
            }
            Grid::BinaryCoding { alpha, offset } => {
                let planes = alpha.len() / offset.len().max(1);
                let alpha = alpha.into_iter().cycle().take(planes * layout.groups).collect();
                let offset = offset.into_iter().cycle().take(layout.groups).collect();
                Grid::BinaryCoding { alpha, offset }
            }
            codebook @ Grid::Codebook { .. } => codebook,
        };
        QuantizedWeight::new(&codes, grid, found.bits, layout)
    }
}

/// Numbers of both signs, as weights are: sums of digits of a sequence that repeats nowhere, around a mean that
/// drifts, so that no two groups have zero at the same level.
fn values(count: usize) -> Vec<f32> {
    let mut state = 1u32;
    let mut next = || {
        // Numerical Recipes' generator.
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1u32 << 24) as f32 - 0.5
    };
    let drift = |at: usize| 0.02 * (at as f32 * 0.013).sin();
    (0..count).map(|at| 0.05 * (next() + next() + next()) + drift(at)).collect()
}
