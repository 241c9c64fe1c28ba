//! Recipe → plan: stages type-checked in order, every linear's specification resolved.
//!
//! Reads `config.json` and tensor headers, never a weight.

use std::collections::{BTreeMap, BTreeSet};

use toml::de::{DeTable, DeValue};
use wildmatch::WildMatch;

use super::{Override, QuantSection, Recipe};
use crate::error::{Error, Result};
use crate::model::{ModelConfig, weight_name};
use crate::quant::{ActivationQuant, Bits, ObserverConfig, QuantSpec, Repr, no_width};
use crate::stage::{BASE, Before, Codes, Effect, StageConfig};

/// Patterns of overrides that mean every linear of attention, or of the MLP, whatever a family calls them.
const ATTENTION: &str = "attention";
const MLP: &str = "mlp";

/// A recipe that makes sense for a model.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The recipe.
    pub recipe: Recipe,
    /// What its linears are before the first stage.
    pub start: Repr,
    /// Its stages, resolved.
    pub stages: Vec<PlannedStage>,
    /// The output head's name.
    head: &'static str,
}

/// What the linears of a packed model are, by full name; empty for a float model.
#[derive(Clone, Debug, Default)]
pub struct Base {
    /// Bits and grouping, and what the codes stand for.
    pub linears: BTreeMap<String, (QuantSpec, Repr)>,
    /// The widths at which they can be read, where their planes serve several.
    pub widths: BTreeSet<Bits>,
}

impl Base {
    fn repr(&self) -> Result<Repr> {
        let mut kinds = self.linears.values().map(|(_, repr)| *repr);
        let Some(first) = kinds.next() else { return Ok(Repr::Dense) };
        match kinds.find(|repr| *repr != first) {
            None => Ok(first),
            Some(_) => Err(Error::preflight("some linears are uniform and some binary-coded")
                .at("model.path")
                .fix("the float model it was made from")),
        }
    }
}

/// One stage with everything decided.
#[derive(Clone, Debug, PartialEq)]
pub struct PlannedStage {
    /// The stage.
    pub config: StageConfig,
    /// What it quantizes, by linear.
    pub specs: BTreeMap<String, QuantSpec>,
    /// Whether a later stage may go on from the latent weights it learns.
    pub keeps_latents: bool,
    /// What this stage rounds the output head to.
    pub head: Option<QuantSpec>,
    /// Linears that an earlier stage quantized and this one leaves as they are.
    pub kept: Vec<String>,
    /// How grids start.
    pub observer: ObserverConfig,
    /// The specification of linears without an override.
    pub default_spec: QuantSpec,
    /// What is done to activations from this stage on, if it quantizes.
    pub activations: ActivationQuant,
    /// The last quantizing stage so far, this one included.
    pub latest: &'static str,
    /// Optimizer steps of all earlier stages.
    pub first_step: u64,
}

impl Plan {
    /// Resolves and type-checks `recipe` for a model. `base` says what its linears are when the model
    /// is packed already; `text` is the recipe's text and `set` what overrides it, to name places.
    ///
    /// # Errors
    /// Usage errors (exit 2) for a recipe that makes no sense, preflight errors (exit 3) for one
    /// that does not fit this model.
    pub fn new(
        recipe: Recipe,
        model: &ModelConfig,
        base: &Base,
        text: &str,
        set: &[String],
    ) -> Result<Self> {
        let lines = Lines::new(text, set);
        if recipe.stage.is_empty() {
            return Err(Error::usage("the recipe has no stage").fix("a [[stage]] table"));
        }
        let mut stages: Vec<PlannedStage> = Vec::new();
        let mut repr = base.repr()?;
        let start = repr;
        let mut latest = if repr == Repr::Dense { "float" } else { BASE };
        // What the linears are by now.
        let mut quantized: BTreeMap<String, QuantSpec> =
            base.linears.iter().map(|(name, (spec, _))| (name.clone(), *spec)).collect();
        let mut last_spec = quantized.values().next().copied();
        let activations = recipe.quant.of_activations();
        if activations.fixed().is_some() && model.arch.experts.is_some() {
            let what = "experts take no fixed grids of activations: some see hardly a token";
            return Err(Error::usage(what)
                .at(lines.place("quant.activations"))
                .fix("scheme = \"token\" there"));
        }
        let (mut calibrated, mut tuned) = (false, false);
        let mut widths = base.widths.clone();
        for (index, config) in recipe.stage.iter().enumerate() {
            let at =
                |error: Error| error.at(lines.place(&format!("stage.{index}.{}", config.name())));
            let stage = config.stage();
            stage.check().map_err(at)?;
            let before = Before { model, repr, tuned, activations, calibrated };
            repr = config.leaves(&before).map_err(at)?;
            if start != Repr::Dense && recipe.model.teacher.is_none() && stage.needs_float() {
                let error = Error::usage("this needs the float model, and model.path is packed");
                return Err(at(error.fix("model.teacher = the float model it was made from")));
            }
            calibrated |= stage.calibrates();
            let first_step =
                stages.last().map_or(0, |s| s.first_step + s.config.stage().steps(model.n_blocks));
            let effect = stage.effect();
            let codes = effect.codes();
            let resolved = if matches!(effect, Effect::Grids { .. }) {
                // What the linears are is what they stay; the head does not learn.
                let mut linears = quantized.clone();
                linears.remove(model.head());
                Resolved { linears, ..Resolved::default() }
            } else {
                Resolved::new(&recipe.quant, codes, model, &quantized, &lines)?
            };
            // The head is rounded once, by the first stage that quantizes.
            let head = resolved.head.filter(|_| quantized.is_empty());
            check_chain(codes, &resolved.linears, &quantized, &stages).map_err(at)?;
            check_tuned(codes, &resolved.linears, &quantized, model).map_err(at)?;
            let mut default_spec = default_spec(&recipe.quant, codes);
            if let Some(width) = stage.width().filter(|width| !widths.contains(width)) {
                return Err(no_width(width, widths)
                    .at(lines.place(&format!("stage.{index}.{}.bits", config.name()))));
            }
            match effect {
                Effect::Nothing => {}
                Effect::Codes(_) => {
                    quantized.extend(resolved.linears.clone());
                    last_spec = Some(default_spec);
                    let specs = resolved.linears.values();
                    widths = codes.map_or_else(BTreeSet::new, |codes| {
                        specs.flat_map(|spec| codes.method.widths(spec.bits)).collect()
                    });
                }
                Effect::Grids { .. } => {
                    let spec = last_spec.unwrap_or(default_spec);
                    default_spec = QuantSpec { bits: stage.width().unwrap_or(spec.bits), ..spec };
                }
                Effect::Floats => {
                    widths.clear();
                    quantized.retain(|name, _| name == model.head());
                    tuned |= base.linears.is_empty();
                }
            }
            if config.changes_model() {
                latest = config.name();
            }
            stages.push(PlannedStage {
                config: config.clone(),
                specs: resolved.linears,
                keeps_latents: recipe.stage[index + 1..].iter().any(|s| s.stage().takes_latents()),
                head,
                kept: resolved.kept,
                observer: codes
                    .and_then(|codes| codes.observer)
                    .unwrap_or(&recipe.quant.observer)
                    .clone(),
                default_spec,
                activations,
                latest,
                first_step,
            });
        }
        Ok(Self { recipe, start, stages, head: model.head() })
    }

    /// `dense → reconstruct(flexround, w4) → ...`.
    pub fn summary(&self) -> String {
        let mut parts = vec![self.start.to_string()];
        parts.extend(self.stages.iter().map(PlannedStage::summary));
        parts.join(" → ")
    }

    /// Every linear that some stage quantizes.
    pub fn quantized(&self) -> BTreeSet<&str> {
        let of = |stage: &'_ PlannedStage| stage.head.map(|_| self.head);
        let heads = self.stages.iter().filter_map(of);
        self.stages
            .iter()
            .flat_map(|stage| stage.specs.keys().map(String::as_str))
            .chain(heads)
            .collect()
    }

    /// Optimizer steps in all.
    pub fn steps(&self, blocks: usize) -> u64 {
        self.stages.iter().map(|stage| stage.config.stage().steps(blocks)).sum()
    }
}

impl PlannedStage {
    fn summary(&self) -> String {
        let name = self.config.name();
        let spec = format!("{}{}", self.default_spec, self.activations);
        match self.config.stage().summary(&spec) {
            words if words.is_empty() => name.to_owned(),
            words => format!("{name}({words})"),
        }
    }
}

/// A method that finds its own grid does not follow one of the same kind, bits and groups: what was
/// learned there would be lost without a word.
fn check_chain(
    codes: Option<Codes<'_>>,
    specs: &BTreeMap<String, QuantSpec>,
    quantized: &BTreeMap<String, QuantSpec>,
    earlier: &[PlannedStage],
) -> Result<()> {
    let Some(Codes { method, .. }) = codes.filter(|codes| !codes.method.resumes()) else {
        return Ok(());
    };
    let made = |stage: &PlannedStage| {
        stage.config.stage().effect().codes().and_then(|codes| codes.method.grid())
    };
    let last = earlier.iter().rev().find_map(made);
    let same = |(name, spec): (&String, &QuantSpec)| {
        quantized.get(name).is_some_and(|q| (q.bits, q.group_size) == (spec.bits, spec.group_size))
    };
    if last.is_none() || last != method.grid() || !specs.iter().any(same) {
        return Ok(());
    }
    Err(Error::usage(format!(
        "method.{} finds a grid of its own, and an earlier stage has left one of the same bits and \
         groups",
        method.name()
    ))
    .fix(
        "other bits or groups in this stage, or method.flexround, which goes on from what is there",
    ))
}

/// A method that learns grids alone keeps the codes: those have to be there, in the stage's bits and groups.
fn check_tuned(
    codes: Option<Codes<'_>>,
    specs: &BTreeMap<String, QuantSpec>,
    quantized: &BTreeMap<String, QuantSpec>,
    model: &ModelConfig,
) -> Result<()> {
    let Some(Codes { method, .. }) = codes.filter(|codes| codes.method.tunes().is_some()) else {
        return Ok(());
    };
    for (name, linear) in model.linears() {
        let Some(spec) = specs.get(&name) else { continue };
        let keeps = format!("method.{} leaves codes as they are", method.name());
        let Some(left) = quantized.get(&name) else {
            return Err(Error::usage(format!("{keeps}, and no stage has left any of this linear"))
                .at(name)
                .fix("keep = true in a [[quant.override]]"));
        };
        // Groups of a whole row have two names.
        let shape = |spec: &QuantSpec| (spec.bits, spec.layout(linear.shape).ok());
        if shape(left) != shape(spec) {
            let what = format!("{keeps}, which are {left}, and this stage asks for {spec}");
            return Err(Error::usage(what)
                .at(name)
                .fix("in this stage the bits and group_size of the stage that made the codes"));
        }
    }
    Ok(())
}

fn default_spec(quant: &QuantSection, codes: Option<Codes<'_>>) -> QuantSpec {
    QuantSpec {
        bits: codes.and_then(|codes| codes.bits).unwrap_or(quant.bits),
        group_size: codes.and_then(|codes| codes.group_size).unwrap_or(quant.group_size),
        symmetry: codes.and_then(|codes| codes.symmetric).unwrap_or(quant.symmetric),
    }
}

/// The linears of one stage.
#[derive(Default)]
struct Resolved {
    linears: BTreeMap<String, QuantSpec>,
    kept: Vec<String>,
    /// The output head's, when an override names it.
    head: Option<QuantSpec>,
}

impl Resolved {
    fn new(
        quant: &QuantSection,
        codes: Option<Codes<'_>>,
        model: &ModelConfig,
        quantized: &BTreeMap<String, QuantSpec>,
        lines: &Lines<'_>,
    ) -> Result<Self> {
        let default = default_spec(quant, codes);
        let patterns: Vec<WildMatch> =
            quant.overrides.iter().map(|o| WildMatch::new(&o.pattern)).collect();
        let mut used = vec![false; patterns.len()];
        let mut resolved = Self::default();
        for (index, rule) in
            quant.overrides.iter().enumerate().filter(|(_, o)| o.pattern == model.head())
        {
            used[index] = true;
            let spec = rule.apply(default_spec(quant, None));
            spec.layout(model.head_shape())
                .map_err(|error| error.at(model.head()).at(lines.place("quant.group_size")))?;
            resolved.head = (codes.is_some() && !rule.keep).then_some(spec);
        }
        for (name, linear) in model.linears() {
            let shape = linear.shape;
            let part = if linear.role.in_attention() { ATTENTION } else { MLP };
            let mut spec = default;
            let mut keep = false;
            for (index, (pattern, rule)) in patterns.iter().zip(&quant.overrides).enumerate() {
                if rule.pattern == part || pattern.matches(&name) {
                    used[index] = true;
                    spec = rule.apply(spec);
                    keep = rule.keep;
                }
            }
            let Some(Codes { method, .. }) = codes.filter(|_| !keep) else { continue };
            spec.layout(shape).map_err(|error| {
                error.at(weight_name(&name)).at(lines.place("quant.group_size"))
            })?;
            match method.accepts(&spec) {
                Ok(()) => {
                    method.accepts_shape(shape).map_err(|error| error.at(&name))?;
                    resolved.linears.insert(name, spec);
                }
                // A linear whose override asks for other bits than this method has stays as an
                // earlier stage left it.
                Err(_) if spec.bits != default.bits && quantized.contains_key(&name) => {
                    resolved.kept.push(name);
                }
                Err(error) => return Err(error.at(name).at(lines.place("quant.bits"))),
            }
        }
        if let Some(index) = used.iter().position(|used| !used) {
            let pattern = &quant.overrides[index].pattern;
            return Err(Error::usage(format!("the override `{pattern}` matches no linear"))
                .at(lines.place(&format!("quant.override.{index}.match")))
                .fix(patterns_of(model)));
        }
        Ok(resolved)
    }
}

/// Patterns that match something of a model.
fn patterns_of(model: &ModelConfig) -> String {
    let last = model.specs(0).last().map_or("", |spec| spec.name);
    let (last, block) = (last.rsplit('.').next().unwrap_or(last), model.block_prefix(0));
    let head = model.head();
    format!(
        "\"{ATTENTION}\", \"{MLP}\", or a pattern such as \"*.{last}\", \"{block}.*\" or \"{head}\""
    )
}

impl Override {
    /// The specification with what this rule changes.
    fn apply(&self, spec: QuantSpec) -> QuantSpec {
        QuantSpec {
            bits: self.bits.unwrap_or(spec.bits),
            group_size: self.group_size.unwrap_or(spec.group_size),
            symmetry: self.symmetric.unwrap_or(spec.symmetry),
        }
    }
}

/// Where keys stand in the recipe's text.
struct Lines<'a> {
    text: &'a str,
    set: &'a [String],
    root: Option<DeTable<'a>>,
}

impl<'a> Lines<'a> {
    fn new(text: &'a str, set: &'a [String]) -> Self {
        Self { text, set, root: DeTable::parse(text).ok().map(toml::Spanned::into_inner) }
    }

    /// `key (recipe line N)`, the override that set it, or only the key.
    fn place(&self, key: &str) -> String {
        let sets = |set: &&String| set.split('=').next().is_some_and(|name| name.trim() == key);
        if let Some(set) = self.set.iter().rev().find(sets) {
            return format!("--set {set}");
        }
        match self.line(key) {
            Some(line) => format!("{key} (recipe line {line})"),
            None => key.to_owned(),
        }
    }

    fn line(&self, key: &str) -> Option<usize> {
        let mut parts = key.split('.');
        let first = parts.next()?;
        let (name, mut value) = self.root.as_ref()?.get_key_value(first)?;
        let mut at = name.span().start;
        for part in parts {
            match value.get_ref() {
                DeValue::Table(table) => {
                    let (name, inner) = table.get_key_value(part)?;
                    at = name.span().start;
                    value = inner;
                }
                DeValue::Array(list) => {
                    value = list.get(part.parse::<usize>().ok()?)?;
                    at = value.span().start;
                }
                _ => return None,
            }
        }
        Some(self.text[..at].matches('\n').count() + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_keys_in_tables_and_lists() {
        let text = "seed = 0\n[quant]\nbits = 4\n\n[[stage]]\n[stage.reconstruct]\nsteps = 1\n";
        let set = ["quant.group_size=100".to_owned()];
        let lines = Lines::new(text, &set);
        assert_eq!(lines.place("quant.bits"), "quant.bits (recipe line 3)");
        assert_eq!(lines.line("stage.0.reconstruct.steps"), Some(7));
        assert_eq!(lines.place("quant.symmetric"), "quant.symmetric");
        assert_eq!(lines.place("quant.group_size"), "--set quant.group_size=100");
    }
}
