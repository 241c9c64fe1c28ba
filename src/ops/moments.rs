//! AdamW's state of one parameter: two tensors of its size, or codes of 8 bits in blocks with a scale each
//! (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization").

use std::sync::Arc;

use burn::tensor::{Device, Int, Tensor, TensorData};

use super::adamw::AdamWStep;
use super::bridge::{Plain, tensor};
use super::dynamic::{Map, SIGNED, UNSIGNED, ZERO};
use super::numbers::Restraint;
use crate::error::Result;

/// Values that share a scale. (The paper's 2048 makes one large gradient hide more of the others;
/// 256 costs three hundredths of a byte for each.)
pub(super) const BLOCK: usize = 256;

/// Parameters of fewer values keep moments in f32, as in the paper: they are what a training is sensitive to,
/// and no memory.
const SMALL: usize = 4096;

/// The running means of a parameter's gradient and of its square.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant)] // handles, one for each parameter
pub enum Moments {
    /// Both in f32, shaped as the parameter.
    F32([FloatMoment; 2]),
    /// Both in 8 bits.
    Int8(Int8Moments),
}

/// A mean in f32.
#[derive(Clone, Debug)]
pub struct FloatMoment(Plain);

/// Codes and scales of both means.
#[derive(Clone, Debug)]
pub struct Int8Moments {
    pub(super) halves: [Half; 2],
    /// The parameter's, or its transpose's.
    shape: Vec<usize>,
    /// Whether blocks are runs of the transposed parameter.
    pub(super) transposed: bool,
}

/// One mean in 8 bits.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant)] // as above
pub(super) enum Half {
    /// In this machine's memory, for kernels: a code for each value, a scale for each block.
    Host { codes: Arc<Vec<u8>>, scales: Arc<Vec<f32>> },
    /// On a device: `[blocks, 64]` words of four codes, the first in the lowest byte, and `[blocks, 1]`.
    Device { words: Tensor<2, Int>, scales: Tensor<2> },
}

/// Reads a tensor's values, row-major; they may lie in a file.
pub enum Values {
    /// As numbers.
    F32(Box<dyn FnOnce() -> Result<Vec<f32>> + Send>),
    /// As numbers that bf16 holds, and that are saved so.
    Bf16(Box<dyn FnOnce() -> Result<Vec<f32>> + Send>),
    /// As bytes.
    U8(Box<dyn FnOnce() -> Result<Vec<u8>> + Send>),
}

/// A tensor whose values are read when they are asked for, in whatever thread.
pub struct Later {
    /// Its name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its values.
    pub values: Values,
}

/// The shape of a tensor off the tape and its values as they are now, whatever becomes of it.
pub fn later<const D: usize>(tensor: Tensor<D>) -> (Vec<usize>, Values) {
    let shape = tensor.dims().to_vec();
    (shape, Values::F32(Box::new(move || Ok(tensor.into_data().iter::<f32>().collect()))))
}

/// What tensors of a saved state are called behind the path of their parameter: first and second
/// moment in f32; their codes; those of the transposed parameter; their scales.
pub const LEAVES: [[&str; 2]; 4] = [
    [".moment_1", ".moment_2"],
    [".moment_1_codes", ".moment_2_codes"],
    [".moment_1_codes_transposed", ".moment_2_codes_transposed"],
    [".moment_1_absmax", ".moment_2_absmax"],
];

impl Moments {
    /// From two tensors of the parameter's shape.
    pub fn new<const D: usize>(first: Tensor<D>, second: Tensor<D>) -> Self {
        Self::F32([first, second].map(|moment| FloatMoment(moment.into_dispatch())))
    }

    /// Zeros in 8 bits for `parameter`, whose rate is in units of its groups or not; `None` for one of fewer
    /// than 4096 values, whose moments are f32.
    ///
    /// # Shapes
    /// - parameter: any, off the tape; in units `[in, out]`
    pub fn int8<const D: usize>(parameter: &Tensor<D>, in_units: bool) -> Option<Self> {
        let mut shape = parameter.dims().to_vec();
        let len = shape.iter().product::<usize>();
        if len < SMALL {
            return None;
        }
        let transposed = in_units || super::adamw::lies_transposed(parameter);
        if transposed {
            shape.reverse();
        }
        let halves = [ZERO, 0].map(|zero| Half::Host {
            codes: Arc::new(vec![zero; len]),
            scales: Arc::new(vec![0.0; len.div_ceil(BLOCK)]),
        });
        Some(Self::Int8(Int8Moments { halves, shape, transposed }))
    }

    /// Both in f32, shaped as the parameter of this rank.
    pub fn tensors<const D: usize>(&self) -> [Tensor<D>; 2] {
        match self {
            Self::F32(both) => both.each_ref().map(|moment| tensor::<D>(moment.0.clone())),
            Self::Int8(both) => both.decoded(),
        }
    }

    /// The tensors to save, named by [`LEAVES`], of a parameter of rank `rank`. Nothing is copied before one is
    /// asked for its values.
    pub fn parts(&self, rank: usize) -> Vec<Later> {
        match self {
            Self::F32(_) => {
                let both = match rank {
                    1 => self.tensors::<1>().map(later),
                    _ => self.tensors::<2>().map(later),
                };
                let named = LEAVES[0].into_iter().zip(both);
                named
                    .map(|(name, (shape, values))| Later { name: name.into(), shape, values })
                    .collect()
            }
            Self::Int8(both) => both.parts(),
        }
    }

    /// Rebuilds what [`Moments::parts`] gave, by their names, and the parameter's rank; `None` when one is
    /// missing or they do not fit each other.
    pub fn from_parts(
        mut part: impl FnMut(&str) -> Option<TensorData>,
        device: &Device,
    ) -> Option<(Self, usize)> {
        if let Some(first) = part(LEAVES[0][0]) {
            let (second, rank) = (part(LEAVES[0][1])?, first.rank());
            let both = [first, second];
            let moments = if rank == 1 {
                let [first, second] = both.map(|m| Tensor::<1>::from_data(m, device));
                Self::new(first, second)
            } else {
                let [first, second] = both.map(|m| Tensor::<2>::from_data(m, device));
                Self::new(first, second)
            };
            return Some((moments, rank));
        }
        let mut shape: Option<Vec<usize>> = None;
        let mut transposed = false;
        let mut half = |i: usize| {
            let plain = part(LEAVES[1][i]);
            transposed = plain.is_none();
            let codes = plain.or_else(|| part(LEAVES[2][i]))?;
            let found = codes.shape().to_vec();
            let codes: Vec<u8> = codes.iter::<u8>().collect();
            let scales: Vec<f32> = part(LEAVES[3][i])?.iter::<f32>().collect();
            let fits = *shape.get_or_insert_with(|| found.clone()) == found
                && scales.len() == codes.len().div_ceil(BLOCK);
            fits.then(|| Half::Host { codes: Arc::new(codes), scales: Arc::new(scales) })
        };
        let halves = [half(0)?, half(1)?];
        let shape = shape?;
        let rank = shape.len();
        Some((Self::Int8(Int8Moments { halves, shape, transposed }), rank))
    }
}

impl Int8Moments {
    fn len(&self) -> usize {
        self.shape.iter().product()
    }

    fn parts(&self) -> Vec<Later> {
        let codes = if self.transposed { LEAVES[2] } else { LEAVES[1] };
        let mut parts = Vec::new();
        for (half, [codes, scales]) in
            self.halves.iter().zip([0, 1].map(|i| [codes[i], LEAVES[3][i]]))
        {
            let (len, shape) = (self.len(), self.shape.clone());
            let [bytes, numbers] = [half.clone(), half.clone()];
            parts.push(Later {
                name: codes.into(),
                shape,
                values: Values::U8(Box::new(move || Ok(bytes.on_host(len).0.to_vec()))),
            });
            parts.push(Later {
                name: scales.into(),
                shape: vec![len.div_ceil(BLOCK)],
                values: Values::F32(Box::new(move || Ok(numbers.on_host(len).1.to_vec()))),
            });
        }
        parts
    }

    fn decoded<const D: usize>(&self) -> [Tensor<D>; 2] {
        let maps = [&*SIGNED, &*UNSIGNED];
        [0, 1].map(|i| {
            let (codes, scales) = self.halves[i].clone().on_host(self.len());
            let value =
                |(at, code): (usize, &u8)| maps[i].values[usize::from(*code)] * scales[at / BLOCK];
            let values: Vec<f32> = codes.iter().enumerate().map(value).collect();
            let data = TensorData::new(values, self.shape.clone());
            let device = self.halves[i].device();
            let decoded = Tensor::<D>::from_data(data, &device);
            if self.transposed { decoded.transpose() } else { decoded }
        })
    }

    /// A step composed from burn's operations, in the order in which the kernel computes.
    pub(super) fn step<const D: usize>(
        self,
        step: &AdamWStep,
        units: Option<Tensor<2>>,
        parameter: Tensor<D>,
        gradient: Tensor<D>,
    ) -> (Tensor<D>, Self) {
        let Self { halves: [first, second], shape, transposed } = self;
        let before = (parameter.clone(), first.clone(), second.clone());
        let len = shape.iter().product::<usize>();
        let device = parameter.device();
        let orient = |x: Tensor<D>| if transposed { x.transpose() } else { x };
        let blocks = |x: Tensor<D>| in_blocks(orient(x).reshape([len]));
        let rate = (step.rate / step.corrections()[0]) as f32;
        let rates = units.map(|units| {
            let [groups, _] = units.dims();
            in_blocks((units * rate).expand([groups, len / groups]).reshape([len]))
        });
        let g = blocks(gradient) * step.shrink as f32;
        let g = match &step.restraint {
            Some(restraint) => restraint.shrink(g),
            None => g,
        };
        let m = first.decoded(&SIGNED, &device) * step.beta1 as f32
            + g.clone() * (1.0 - step.beta1) as f32;
        let v = second.decoded(&UNSIGNED, &device) * step.beta2 as f32
            + g.clone() * g * (1.0 - step.beta2) as f32;
        let correction2 = (1.0 / step.corrections()[1]) as f32;
        let root = (v.clone() * correction2).sqrt() + step.epsilon as f32;
        let weighted = match rates {
            None => m.clone() * rate,
            Some(rates) => rates * m.clone(),
        };
        let delta = weighted / root;
        let next = match &step.restraint {
            Some(restraint) => step.kept(blocks(parameter)) - delta * restraint.damping(),
            None => blocks(parameter) * step.keep() as f32 - delta,
        };
        let size: usize = next.dims().iter().product();
        let next = next.reshape([size]).narrow(0, 0, len);
        let dims: [usize; D] = std::array::from_fn(|axis| shape[axis]);
        let halves = [Half::encoded(m, &SIGNED, true), Half::encoded(v, &UNSIGNED, false)];
        let next = orient(next.reshape(dims));
        let Some(restraint) = &step.restraint else {
            return (next, Self { halves, shape, transposed });
        };
        let (parameter, first, second) = before;
        let [new_first, new_second] = halves;
        let halves = [
            new_first.unless_stopped(restraint, first, ZERO, &device),
            new_second.unless_stopped(restraint, second, 0, &device),
        ];
        (restraint.choose(next, parameter), Self { halves, shape, transposed })
    }
}

/// `[len]` as `[blocks, 256]`, the last one filled with zeros.
fn in_blocks(x: Tensor<1>) -> Tensor<2> {
    let [len] = x.dims();
    let blocks = len.div_ceil(BLOCK);
    let x = match blocks * BLOCK - len {
        0 => x,
        missing => Tensor::cat(vec![x.clone(), Tensor::zeros([missing], &x.device())], 0),
    };
    x.reshape([blocks, BLOCK])
}

impl Half {
    fn device(&self) -> Device {
        match self {
            Self::Host { .. } => Device::default(),
            Self::Device { scales, .. } => scales.device(),
        }
    }

    /// Codes and scales of `len` values in this machine's memory.
    pub(super) fn on_host(self, len: usize) -> (Arc<Vec<u8>>, Arc<Vec<f32>>) {
        match self {
            Self::Host { codes, scales } => (codes, scales),
            Self::Device { words, scales } => {
                // As i64, whatever integers the device has; the low 32 bits are the word.
                let words = words.into_data();
                let bytes = words.iter::<i64>().flat_map(|word| (word as u32).to_le_bytes());
                let codes = bytes.take(len).collect();
                (Arc::new(codes), Arc::new(scales.into_data().iter::<f32>().collect()))
            }
        }
    }

    /// As words; what fills the last block is code `zero`.
    fn on_device(self, zero: u8, device: &Device) -> (Tensor<2, Int>, Tensor<2>) {
        match self {
            Self::Device { words, scales } => (words, scales),
            Self::Host { codes, scales } => {
                let blocks = scales.len();
                let mut codes = codes.to_vec();
                codes.resize(blocks * BLOCK, zero);
                let words = codes.as_chunks::<4>().0.iter().map(|four| i32::from_le_bytes(*four));
                let words = TensorData::new::<i32, _>(words.collect(), [blocks, BLOCK / 4]);
                let scales = TensorData::new(scales.to_vec(), [blocks, 1]);
                (Tensor::from_data(words, device), Tensor::from_data(scales, device))
            }
        }
    }

    /// This, or what there was before where nothing may change.
    fn unless_stopped(self, restraint: &Restraint, old: Self, zero: u8, device: &Device) -> Self {
        let (words, scales) = self.on_device(zero, device);
        let (old_words, old_scales) = old.on_device(zero, device);
        let words = restraint.choose_words(words, old_words);
        Self::Device { words, scales: restraint.choose(scales, old_scales) }
    }

    /// `[blocks, 256]`.
    fn decoded(self, map: &Map, device: &Device) -> Tensor<2> {
        let (words, scales) = self.on_device(map.zero, device);
        let [blocks, quarter] = words.dims();
        let words = words.reshape([blocks * quarter, 1]);
        let four = [0, 8, 16, 24]
            .map(|shift| words.clone().bitwise_right_shift_scalar(shift).bitwise_and_scalar(0xff));
        let codes = Tensor::cat(four.into(), 1).reshape([blocks * BLOCK]);
        table(&map.values, device).select(0, codes).reshape([blocks, BLOCK]) * scales
    }

    /// Of `[blocks, 256]`.
    fn encoded(x: Tensor<2>, map: &Map, signed: bool) -> Self {
        let [blocks, _] = x.dims();
        let device = x.device();
        let scales = x.clone().abs().max_dim(1).clamp_max(f32::MAX);
        let divisor = scales.clone().mask_fill(scales.clone().equal_elem(0.0), 1.0);
        let share = (x.clone().abs() / divisor).clamp_max(1.0).reshape([blocks * BLOCK]);
        let thresholds = table(&map.thresholds, &device);
        // How many thresholds are not above it, a bit at a time.
        let mut k = Tensor::<1, Int>::zeros([blocks * BLOCK], &device);
        for bit in [128, 64, 32, 16, 8, 4, 2, 1] {
            let threshold = thresholds.clone().select(0, k.clone() + (bit - 1));
            k = k + share.clone().greater_equal(threshold).int() * bit;
        }
        let x = x.reshape([blocks * BLOCK]);
        let codes = if signed {
            let zero = i32::from(ZERO);
            let below = k.clone().clamp_max(zero).neg() + zero;
            (k + zero).mask_where(x.lower_elem(0.0), below)
        } else {
            // A mean of squares that is not 0 does not become 0.
            k.clone().mask_where(x.greater_elem(0.0), k.clamp_min(1))
        };
        let four = codes.reshape([blocks * BLOCK / 4, 4]);
        let byte =
            |i: u8| four.clone().narrow(1, usize::from(i), 1).bitwise_left_shift_scalar(8 * i);
        let words = byte(0).bitwise_or(byte(1)).bitwise_or(byte(2)).bitwise_or(byte(3));
        Self::Device { words: words.reshape([blocks, BLOCK / 4]), scales }
    }
}

fn table(values: &[f32; 256], device: &Device) -> Tensor<1> {
    Tensor::from_data(TensorData::new(values.to_vec(), [256]), device)
}
