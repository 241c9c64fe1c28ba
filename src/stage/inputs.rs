//! The inputs of a block's linears on fixed grids: where the grids start, and the student of block
//! reconstruction that learns them together with its weights.
//!
//! A grid starts on the extremes of its site over the calibration text and moves like LSQ's steps.

use std::cell::RefCell;
use std::collections::BTreeMap;

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};

use super::context::StageContext;
use super::streams::{Streams, loader};
use crate::error::{Error, Result};
use crate::export::activations::{self, InputGrids};
use crate::export::fewbit::Saved;
use crate::model::{Block, Positions, Role, Site, Tap};
use crate::quant::{ActivationQuant, Bits, InputGrid, activation};

/// A step of the optimizer moves a grid's step by no more than this share of where it started: with
/// Adam the rate is the distance, and some sites have steps smaller than any common rate.
const LARGEST_MOVE: f64 = 0.01;

/// The fixed grids of block `index` with the weights it has now, noted in the model and in what is
/// to be saved. Nothing happens unless the recipe asks for fixed grids.
pub(super) fn calibrate(
    ctx: &mut StageContext<'_>,
    streams: &Streams,
    index: usize,
    saved: &mut Saved,
) -> Result<()> {
    if ctx.model.activations.quant.fixed().is_some() {
        let block = loader(ctx, ctx.model).block(index)?;
        let grids = observe(ctx, streams, &block)?;
        activations::store(&ctx.model.config, index, &grids, &mut saved.dense);
        ctx.model.activations.set(index, grids);
    }
    Ok(())
}

/// Grids over the extremes of each site while `block` reads the quantized stream; none unless the
/// recipe asks for fixed ones.
pub(super) fn observe(
    ctx: &StageContext<'_>,
    streams: &Streams,
    block: &Block,
) -> Result<InputGrids> {
    let Some(bits) = ctx.model.activations.quant.fixed() else { return Ok(InputGrids::new()) };
    let ranges: RefCell<BTreeMap<Site, [f32; 2]>> = RefCell::default();
    let tap = |site, x: Tensor<3>| {
        if Site::INPUTS.contains(&site) {
            let low = x.clone().min().into_scalar::<f32>();
            let high = x.clone().max().into_scalar::<f32>();
            let mut ranges = ranges.borrow_mut();
            let range = ranges.entry(site).or_insert([low, high]);
            *range = [range[0].min(low), range[1].max(high)];
        }
        x
    };
    streams.forward(ctx, block, &streams.quantized, &tap)?;
    let ranges = ranges.into_inner().into_iter();
    Ok(ranges.map(|(site, [low, high])| (site, InputGrid::from_range(low, high, bits))).collect())
}

/// A part of a block whose linears are fitted together.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Piece {
    /// All of it.
    Whole,
    /// Queries and keys, by themselves.
    Scores,
    /// Values and output, by the residual stream behind attention.
    Attention,
    /// The MLP, by the block's output; its input is the residual stream behind attention.
    Mlp,
}

impl Piece {
    /// Whether a linear belongs to it.
    pub(super) fn holds(self, role: Role) -> bool {
        match self {
            Self::Whole => true,
            Self::Scores => role.feeds_scores(),
            Self::Attention => role.in_attention() && !role.feeds_scores(),
            Self::Mlp => !role.in_attention(),
        }
    }

    /// What it gives of its input.
    pub(super) fn forward(
        self,
        block: &Block,
        hidden: Tensor<3>,
        positions: &Positions,
        tap: &Tap<'_>,
    ) -> Tensor<3> {
        match self {
            Self::Whole => block.forward_tapped(hidden, positions, None, tap),
            Self::Scores => block.queries_and_keys(hidden, tap),
            Self::Attention => block.attend(hidden, positions, None, tap),
            Self::Mlp => block.feed_forward(hidden, tap),
        }
    }
}

/// A block under reconstruction.
#[derive(Debug, Module)]
pub(super) struct Student {
    /// The block, methods on its weights.
    pub block: Block,
    /// Its learned grids, if it has any.
    pub inputs: Option<StaticInputs>,
}

impl Student {
    /// The output of a piece of the block; activations as `quant` says, on the learned grids where
    /// there are any.
    pub(super) fn forward(
        &self,
        piece: Piece,
        hidden: Tensor<3>,
        positions: &Positions,
        quant: ActivationQuant,
    ) -> Tensor<3> {
        let none = InputGrids::new();
        let tap = |site, x| match self.inputs.as_ref().and_then(|inputs| inputs.at(site)) {
            Some(grid) => grid.quantize(x),
            None => activations::quantize(&quant, &none, site, x),
        };
        piece.forward(&self.block, hidden, positions, &tap)
    }
}

/// One learned grid for each site that feeds linears.
#[derive(Debug, Module)]
pub(super) struct StaticInputs {
    attention: LearnedGrid,
    attention_output: LearnedGrid,
    mlp: LearnedGrid,
    mlp_output: LearnedGrid,
}

/// The fields' names are the sites', which [`highest_rate`] relies on.
impl StaticInputs {
    /// Started on `grids`; `None` when a site has none.
    pub(super) fn new(grids: &InputGrids, bits: Bits, device: &Device) -> Option<Self> {
        let learned = |site| grids.get(&site).map(|grid| LearnedGrid::new(*grid, bits, device));
        Some(Self {
            attention: learned(Site::Attention)?,
            attention_output: learned(Site::AttentionOutput)?,
            mlp: learned(Site::Mlp)?,
            mlp_output: learned(Site::MlpOutput)?,
        })
    }

    fn at(&self, site: Site) -> Option<&LearnedGrid> {
        match site {
            Site::Attention => Some(&self.attention),
            Site::AttentionOutput => Some(&self.attention_output),
            Site::Mlp => Some(&self.mlp),
            Site::MlpOutput => Some(&self.mlp_output),
            // Experts have none: `check` refuses fixed grids there.
            _ => None,
        }
    }

    /// The grids as they are now.
    ///
    /// # Errors
    /// When a step is no longer a positive number.
    pub(super) fn grids(&self) -> Result<InputGrids> {
        let mut grids = InputGrids::new();
        for site in Site::INPUTS {
            let Some(grid) = self.at(site).map(LearnedGrid::grid) else { continue };
            if !grid.is_sound() {
                let what = format!("the learned step of the activations became {}", grid.scale);
                return Err(Error::failed(what)
                    .at(site.name())
                    .fix("a smaller learning_rate.activation"));
            }
            grids.insert(site, grid);
        }
        Ok(grids)
    }
}

/// The highest learning rate that a parameter of a [`Student`] with these grids at the start takes,
/// by its path; `None` for one that is not part of a learned grid.
pub(super) fn highest_rate(path: &str, start: &InputGrids) -> Option<f64> {
    let (site, name) = path.strip_prefix("inputs.")?.split_once('.')?;
    let of_site = |(known, grid): (&Site, &InputGrid)| (known.name() == site).then_some(grid.scale);
    let scale = start.iter().find_map(of_site)?;
    Some(if name == "input_scale" { LARGEST_MOVE * f64::from(scale) } else { f64::INFINITY })
}

#[derive(Debug, Module)]
struct LearnedGrid {
    /// Step, `[1]`.
    input_scale: Param<Tensor<1>>,
    /// Zero point in code units before rounding, `[1]`.
    input_zero: Param<Tensor<1>>,
    #[module(skip)]
    bits: Bits,
}

impl LearnedGrid {
    fn new(grid: InputGrid, bits: Bits, device: &Device) -> Self {
        let parameter = |value: f32| Param::from_tensor(Tensor::from_data([value], device));
        Self { input_scale: parameter(grid.scale), input_zero: parameter(grid.zero), bits }
    }

    fn quantize(&self, x: Tensor<3>) -> Tensor<3> {
        activation::per_tensor(x, self.input_scale.val(), self.input_zero.val(), self.bits)
    }

    fn grid(&self) -> InputGrid {
        let number = |tensor: Tensor<1>| tensor.into_scalar::<f32>();
        InputGrid { scale: number(self.input_scale.val()), zero: number(self.input_zero.val()) }
    }
}
