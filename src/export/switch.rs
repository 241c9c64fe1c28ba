//! Several adapters on one loaded model: codes are shared, a switch changes scales alone.

use std::collections::{BTreeMap, BTreeSet};

use burn::nn::Linear;

use super::adapter::Adapter;
use super::folder::OpenModel;
use crate::error::{Error, Result};
use crate::model::CausalLm;
use crate::quant::{CodedWeight, Grid, QuantizedWeight};

/// Grids by the name of their linear.
type Grids = BTreeMap<String, Grid>;

/// Named adapters of one base, checked against it, with their grids on the host.
#[derive(Clone, Debug)]
pub struct Adapters {
    /// The base's own grids of every linear that an adapter holds.
    base: Grids,
    named: Vec<(String, Grids)>,
    on: Option<usize>,
}

impl Adapters {
    /// The adapters of `opened`, none of them on.
    ///
    /// # Errors
    /// Exit code 6 when one was trained on another base.
    pub fn new(opened: &OpenModel, adapters: &[(String, Adapter)]) -> Result<Self> {
        let (mut base, mut named) = (Grids::new(), Vec::new());
        for (name, adapter) in adapters {
            opened.check_adapter(adapter)?;
            let mut grids = Grids::new();
            for (linear, _) in adapter.records() {
                let Some(weight) = opened.quantized(linear)? else { continue };
                let Some(grid) = adapter.grid(linear, &weight)? else { continue };
                base.entry(linear.to_owned()).or_insert_with(|| weight.grid.clone());
                let weight = QuantizedWeight { grid, ..weight }.checked();
                let weight = weight.map_err(|e| e.at(format!("adapter {name}")).at(linear))?;
                grids.insert(linear.to_owned(), weight.grid);
            }
            named.push((name.clone(), grids));
        }
        Ok(Self { base, named, on: None })
    }

    /// Their names, in the order given.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.named.iter().map(|(name, _)| name.as_str())
    }

    /// The one whose scales the model has; `None` for the base's own.
    pub fn on(&self) -> Option<&str> {
        self.on.map(|index| self.named[index].0.as_str())
    }

    /// Puts the scales of adapter `name`, or with `None` the base's own, in `model`, which was
    /// loaded from the base. Codes are not touched, nor copied.
    ///
    /// # Errors
    /// When there is no such adapter, or the model was loaded from something else; it is then as
    /// it was.
    pub fn switch(&mut self, model: &mut CausalLm, name: Option<&str>) -> Result<()> {
        let place = |name| {
            self.names().position(|known| known == name).ok_or_else(|| {
                Error::usage(format!("there is no adapter `{name}`")).fix("one of those given")
            })
        };
        let to = name.map(place).transpose()?;
        let empty = Grids::new();
        let of = |index: Option<usize>| index.map_or(&empty, |index| &self.named[index].1);
        let changed: BTreeSet<&String> = of(self.on).keys().chain(of(to).keys()).collect();
        let mut linears: BTreeMap<String, &mut Linear> = model.linears_mut().collect();
        let mut parameters = Vec::new();
        for name in changed {
            let grid = of(to).get(name).or_else(|| self.base.get(name));
            let linear = linears.remove(name.as_str());
            let (Some(grid), Some(linear)) = (grid, linear) else {
                return Err(Error::failed("the model has no such linear").at(name));
            };
            let coded = linear.weight.reparameterization::<CodedWeight>().ok_or_else(|| {
                Error::failed("the model does not hold this linear as codes").at(name)
            })?;
            let swapped = coded.with_grid(grid).map_err(|e| e.at(name))?;
            let parameter = swapped.into_parameter(linear.weight.id);
            parameters.push((linear, parameter));
        }
        // Nothing can fail any more.
        for (linear, parameter) in parameters {
            linear.weight = parameter;
        }
        self.on = to;
        Ok(())
    }
}
