//! A linear's weight as it is held in memory once it is quantized: packed codes and a grid, which may
//! learn. No float copy of the weight exists beside them.

use burn::module::{Module, Param, ParamId, Reparameterization, Reparameterizer};
use burn::tensor::{DType, Device, Tensor, TensorData};
use half::f16;

use super::{
    Bits, Grid, GroupAxis, GroupLayout, QuantizedWeight, SCALE_FLOOR, ScaleDigits, ZeroKind,
};
use crate::error::{Error, Result};
use crate::ops::{self, CodedKind, CodedMatrix, FrozenGrid};

/// One over the distance of half precision's smallest numbers.
const SUBNORMALS: f32 = (1 << 24) as f32;

/// Which scales of a grid learn.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum LearnedScales {
    /// None: the weight is only used.
    #[default]
    Frozen,
    /// Every one.
    All,
    /// Of a binary-coding group, the one of greatest magnitude; the first at a tie (AlphaTuning).
    Largest,
}

/// What of a grid learns, and how.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Learned {
    /// Which scales.
    pub scales: LearnedScales,
    /// Whether the offsets of a binary-coding grid learn too; of codebooks, the centroids.
    pub offsets: bool,
    /// Whether scales are their start times `exp` of what learns, so that a learning rate is a
    /// relative step whatever the size of the scales.
    pub relative: bool,
    /// Whether gradients are divided by the number of weights in a group (AlphaTuning's
    /// stabilizer; not part of the true gradient).
    pub divide_by_group: bool,
}

/// Packed codes on a grid, on a linear's weight as a reparameterization of nothing: the stored
/// parameter is a single zero, expanded to the weight's shape.
#[derive(Debug, Module)]
pub struct CodedWeight {
    /// What learns of the scales: themselves, `[groups, planes]`; the largest of each group,
    /// `[groups, 1]`; or the logarithm of their ratio to the start, of either shape.
    pub scale: Param<Tensor<2>>,
    /// Offsets of a binary-coding grid, `[groups, 1]`; codebooks, `[books * centroids, vector]`; on a uniform
    /// grid its zero points, which never learn.
    pub offset: Param<Tensor<2>>,
    /// Scales as they were at the start, `[groups, planes]`; absent where `scale` is all there is.
    start: Option<Tensor<2>>,
    /// 1 at the largest scale of each group, else 0, `[groups, planes]`.
    largest: Option<Tensor<2>>,
    #[module(skip)]
    learned: Learned,
    #[module(skip)]
    matrix: CodedMatrix,
    #[module(skip)]
    layout: GroupLayout,
    #[module(skip)]
    bits: Bits,
    #[module(skip)]
    kind: CodedKind,
    #[module(skip)]
    zero_kind: Option<ZeroKind>,
    #[module(skip)]
    compute: DType,
    #[module(skip)]
    digits: ScaleDigits,
    #[module(skip)]
    frozen: FrozenGrid,
}

impl CodedWeight {
    /// A quantized weight on `device`, its codes shared with it where kernels can read them;
    /// forwards see the weight in `compute`.
    pub fn new(
        weight: &QuantizedWeight,
        learned: Learned,
        compute: DType,
        device: &Device,
    ) -> Self {
        let layout = weight.layout;
        let kind = match &weight.grid {
            Grid::Uniform { .. } => CodedKind::Uniform,
            Grid::BinaryCoding { .. } => CodedKind::BinaryCoding,
            Grid::Codebook { additive, .. } => CodedKind::Codebook(*additive),
        };
        let transposed = layout.axis == GroupAxis::Out;
        let (codes, group_len) = (weight.codes.clone(), layout.group_len);
        let matrix = CodedMatrix::new(codes, group_len, kind, transposed, device);
        let shape = (layout, weight.bits, kind);
        Self::on(matrix, shape, &weight.grid, learned, compute, device)
    }

    fn on(
        matrix: CodedMatrix,
        (layout, bits, kind): (GroupLayout, Bits, CodedKind),
        grid: &Grid,
        learned: Learned,
        compute: DType,
        device: &Device,
    ) -> Self {
        let rows_of = |values: &[f32], columns: usize| {
            let data = TensorData::new(values.to_vec(), [values.len() / columns, columns]);
            Tensor::<2>::from_data(data, device)
        };
        let tensor = |values: &[f32]| rows_of(values, values.len() / layout.groups.max(1));
        let (scale, shift, zero_kind) = match grid {
            Grid::Uniform { scale, zero_point, zero_kind } => {
                (tensor(scale), tensor(zero_point), Some(*zero_kind))
            }
            Grid::BinaryCoding { alpha, offset } => (tensor(alpha), tensor(offset), None),
            Grid::Codebook { scale, books, additive } => {
                (tensor(scale), rows_of(books, additive.vector), None)
            }
        };
        let largest = (learned.scales == LearnedScales::Largest).then(|| {
            let planes = grid.scales().len() / layout.groups.max(1);
            let mut hot = vec![0.0; grid.scales().len()];
            for (group, plane) in grid.largest_planes(planes).into_iter().enumerate() {
                hot[group * planes + usize::from(plane)] = 1.0;
            }
            tensor(&hot)
        });
        let learns = learned.scales != LearnedScales::Frozen;
        // As [`Self::scales`] gives them: nothing is left to do at each product.
        let scale = match zero_kind {
            Some(_) if !learns => scale.clamp(SCALE_FLOOR, f32::MAX),
            _ => scale,
        };
        let relative = learns && learned.relative;
        let value = match (&largest, relative) {
            (None, false) => scale.clone(),
            (None, true) => scale.zeros_like(),
            (Some(_), true) => scale.clone().narrow(1, 0, 1).zeros_like(),
            (Some(largest), false) => (scale.clone() * largest.clone()).sum_dim(1),
        };
        let parameter = |value: Tensor<2>, learns: bool| {
            Param::initialized(ParamId::new(), value).set_require_grad(learns)
        };
        Self {
            scale: parameter(value, learns),
            offset: parameter(shift, learned.offsets && zero_kind.is_none()),
            start: (relative || largest.is_some()).then_some(scale),
            largest,
            learned,
            matrix,
            layout,
            bits,
            kind,
            zero_kind,
            compute,
            digits: ScaleDigits::F32,
            frozen: FrozenGrid::default(),
        }
    }

    /// With scales of few digits from now on; their gradient is that of the scales as they are.
    #[must_use]
    pub fn shortened(self, digits: ScaleDigits) -> Self {
        Self { digits, frozen: FrozenGrid::default(), ..self }
    }

    /// The same weight for products in integers, with activations rounded to 8 bits
    /// ([`CodedMatrix::in_integers`]); `None` where it has no such products.
    pub fn in_integers(&self) -> Option<Self> {
        let matrix = self.matrix.in_integers()?;
        Some(Self { matrix, frozen: FrozenGrid::default(), ..self.clone() })
    }

    /// The same codes on another grid, frozen. Nothing is decoded.
    ///
    /// # Errors
    /// When the grid is of another kind, or has another number of groups.
    pub fn with_grid(&self, grid: &Grid) -> Result<Self> {
        let codes = self.matrix.codes().clone();
        let weight = QuantizedWeight {
            codes,
            grid: grid.clone(),
            bits: self.bits,
            layout: self.layout,
            nested: Vec::new(),
        };
        let weight = weight.checked()?;
        let same = match grid {
            Grid::Uniform { .. } => self.kind == CodedKind::Uniform,
            Grid::BinaryCoding { .. } => self.kind == CodedKind::BinaryCoding,
            Grid::Codebook { additive, .. } => self.kind == CodedKind::Codebook(*additive),
        };
        if !same {
            return Err(Error::failed("the grid is of another kind than the codes"));
        }
        let (matrix, device) = (self.matrix.clone(), self.scale.device().inner());
        let shape = (self.layout, self.bits, self.kind);
        Ok(Self::on(matrix, shape, &weight.grid, Learned::default(), self.compute, &device))
    }

    /// As a linear's parameter; it keeps `id`.
    pub fn into_parameter(self, id: ParamId) -> Param<Tensor<2>> {
        let nothing = Tensor::<2>::zeros([1, 1], &self.scale.device());
        let nothing = nothing.expand([self.layout.inputs, self.layout.out]);
        let base = Param::initialized(id, nothing).set_require_grad(false);
        base.apply_reparameterization(Once(Some(self)))
    }

    /// The linear's output, `[.., out]`, of `x`, `[.., in]`.
    pub fn linear<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        if self.learned == Learned::default() {
            let values = || [self.scales(), self.shift()];
            return self.matrix.linear_frozen(x, &self.frozen, values);
        }
        self.matrix.linear(x, self.scales(), self.shift())
    }

    /// Steps, or scales of the planes, as they are now, `[groups, planes]`.
    pub fn scales(&self) -> Tensor<2> {
        let mut learned = self.scale.val();
        if self.learned.scales == LearnedScales::Frozen && self.digits == ScaleDigits::F32 {
            return learned;
        }
        if self.learned.divide_by_group {
            learned = ops::scale_gradient(learned, 1.0 / self.layout.group_len as f64);
        }
        let scales = match (&self.start, &self.largest) {
            (None, _) => learned,
            (Some(start), None) => start.clone() * learned.exp(),
            (Some(start), Some(largest)) if self.learned.relative => {
                start.clone() * (largest.clone() * learned).exp()
            }
            (Some(start), Some(largest)) => {
                let rest = start.clone() * (largest.clone().neg() + 1.0);
                rest + largest.clone() * learned
            }
        };
        let digits = if self.zero_kind.is_some() { self.digits } else { self.digits.of_planes() };
        let scales = match digits {
            ScaleDigits::F32 => scales,
            digits => ops::shorten_ste(scales, digits.significant()),
        };
        match self.zero_kind {
            // A step that a large update drove below zero has to find its way back: gradient 1.
            Some(_) => ops::clamp_ste(scales, SCALE_FLOOR, f32::MAX),
            None => scales,
        }
    }

    /// Zero points, offsets or codebooks as forwards see them: codebooks that learn are numbers of half
    /// precision, with the gradient of what they are rounded from.
    fn shift(&self) -> Tensor<2> {
        let shift = self.offset.val();
        if !(self.learned.offsets && matches!(self.kind, CodedKind::Codebook(_))) {
            return shift;
        }
        // Below its smallest normal number it has steps of one size.
        let small = ops::round_ste(shift.clone() * SUBNORMALS) / SUBNORMALS;
        let below = shift.clone().abs().lower_scalar(f16::MIN_POSITIVE.to_f32());
        ops::shorten_ste(shift, f16::MANTISSA_DIGITS).mask_where(below, small)
    }

    /// Codes and grid. Law: they stand for what the forward computes with, bit for bit.
    ///
    /// # Errors
    /// When a learned scale is no longer a number.
    pub fn fold(&self) -> Result<QuantizedWeight> {
        let host = |tensor: Tensor<2>| tensor.into_data().iter::<f32>().collect::<Vec<f32>>();
        let (scale, shift) = (host(self.scales()), host(self.shift()));
        let grid = match (self.zero_kind, self.kind) {
            (Some(zero_kind), _) => Grid::Uniform { scale, zero_point: shift, zero_kind },
            (None, CodedKind::Codebook(additive)) => {
                Grid::Codebook { scale, books: shift, additive }
            }
            (None, _) => Grid::BinaryCoding { alpha: scale, offset: shift },
        };
        let codes = self.matrix.codes().clone();
        QuantizedWeight { codes, grid, bits: self.bits, layout: self.layout, nested: Vec::new() }
            .checked()
    }

    /// The learned scales where they learn as they are, and not by their logarithm.
    pub fn absolute_scales(&self) -> Option<ParamId> {
        let learns = self.learned.scales != LearnedScales::Frozen;
        (learns && !self.learned.relative).then_some(self.scale.id)
    }

    /// How its weights fall into groups.
    pub fn layout(&self) -> GroupLayout {
        self.layout
    }

    /// How many numbers learn.
    pub fn learned_numbers(&self) -> usize {
        let scales = self.learned.scales != LearnedScales::Frozen;
        let offsets = self.learned.offsets && self.zero_kind.is_none();
        [(scales, &self.scale), (offsets, &self.offset)]
            .into_iter()
            .map(|(learns, parameter)| if learns { parameter.shape().num_elements() } else { 0 })
            .sum()
    }

    /// Bytes in memory: codes, grid, and what learning adds to the grid's start. Gradients and
    /// optimizer state come on top, of the learned parameters alone.
    pub fn bytes(&self) -> usize {
        let of = |tensor: &Tensor<2>| tensor.shape().num_elements() * size_of::<f32>();
        let extra = [&self.start, &self.largest].into_iter().flatten().map(of).sum::<usize>();
        self.matrix.codes().bytes() + of(&self.scale.val()) + of(&self.offset.val()) + extra
    }
}

impl Reparameterization for CodedWeight {
    const NAME: &'static str = "coded";

    fn apply<const D: usize>(&self, _nothing: Tensor<D>) -> Tensor<D> {
        let weight = self.matrix.weight(self.scales(), self.shift()).transpose();
        let weight =
            if weight.dtype() == self.compute { weight } else { weight.cast(self.compute) };
        // A linear's weight has two dimensions; this is the cast of a rank that says so.
        Tensor::from_dispatch(weight.into_dispatch())
    }
}

/// Puts one prepared reparameterization on the one parameter it is applied to.
pub(crate) struct Once<R>(pub(crate) Option<R>);

impl<R: Reparameterization> Reparameterizer for Once<R> {
    type Reparam = R;

    fn reparameterize<const D: usize>(
        &mut self,
        _path: &str,
        param: Param<Tensor<D>>,
    ) -> (Param<Tensor<D>>, Option<R>) {
        (param, self.0.take())
    }
}
