//! Kernels of ours for burn's CubeCL backend: CUDA, ROCm, Metal, Vulkan and wgpu from one source.
//!
//! A kernel runs in its turn among the device's other work (with burn's fusion as an operation of its own
//! between fused ones); the host waits for nothing and uploads nothing but numbers of the launch. All of them
//! compute in f32, sums by a tree over the units of a cube. Where tensors are of another type, and under
//! [`composed`](super::composed), operations are composed from burn's.

#![allow(clippy::cast_lossless, clippy::too_many_arguments)] // kernels: `as` is what CubeCL compiles
#![allow(missing_docs)] // what the macro makes of a kernel

mod adamw;
mod coded;
mod losses;
mod quantizers;

use burn::backend::fusion::custom::{
    CustomOpIr, HandleContainer, OperationFn, OperationIr, StreamId, TensorIr,
};
use burn::backend::fusion::{FusionBackend, FusionRuntime, FusionTensor};
use burn::backend::{
    BackendTensor, Cube, DispatchKindConversion, DispatchTensor, DispatchTensorKind, Shape,
    TensorMetadata as _,
};
use burn::tensor::DType;
use burn_cubecl::CubeBackend;
use burn_cubecl::cubecl;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_dtype;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

pub(super) use self::adamw::adamw;
pub(super) use self::coded::{Decoded, decode};
pub(super) use self::losses::{cross_entropy, divergence};
pub(super) use self::quantizers::{
    DividedInputs, SteppedInputs, divided, divided_backward, stepped, stepped_backward,
};
use super::bridge::{Plain, is_composed};

/// What burn's fusion holds of a device tensor.
type Runtime = <CubeBackend as FusionBackend>::FusionRuntime;
type Handles = HandleContainer<<Runtime as FusionRuntime>::FusionHandle>;

/// Whether kernels can read this tensor, on the tape or off it: f32 on a device.
pub(super) fn reads(tensor: &Plain) -> bool {
    let mut kind = &tensor.kind;
    if let DispatchTensorKind::Autodiff(inner) = kind {
        kind = inner;
    }
    matches!(kind, DispatchTensorKind::Cube(_)) && tensor.dtype() == DType::F32 && !is_composed()
}

/// Runs `run` on device tensors off the tape, when it is their turn. Its results are f32 and have the shapes
/// `outputs`; an input that nobody else holds may be written over.
fn launch<const I: usize, const O: usize>(
    name: &'static str,
    inputs: [Plain; I],
    outputs: [Vec<usize>; O],
    run: impl Fn([CubeTensor; I]) -> [CubeTensor; O] + Send + Sync + 'static,
) -> [Plain; O] {
    let inputs = inputs.map(device_tensor);
    let client = inputs[0].client.clone();
    let inputs = inputs.map(FusionTensor::into_ir);
    let outputs = outputs.map(|shape| {
        TensorIr::uninit(client.create_empty_handle(), Shape::from(shape), DType::F32)
    });
    let description = CustomOpIr::new(name, &inputs, &outputs);
    let results = outputs.each_ref().map(|output| output.id);
    let operation = OperationFn(move |handles: &mut Handles| {
        let tensors = inputs.each_ref().map(|input| handles.get_float_tensor::<CubeBackend>(input));
        for (id, tensor) in results.iter().zip(run(tensors)) {
            handles.register_float_tensor::<CubeBackend>(id, tensor);
        }
        Ok(())
    });
    let made = client.register(StreamId::current(), OperationIr::Custom(description), operation);
    let mut made = made.into_iter();
    std::array::from_fn(|_| match made.next() {
        Some(tensor) => plain(tensor),
        // As many as the description has outputs.
        None => unreachable!("an output of {name} is missing"),
    })
}

fn device_tensor(tensor: Plain) -> FusionTensor<Runtime> {
    match <DispatchTensor as DispatchKindConversion<Cube>>::try_into_backend(tensor) {
        Ok(BackendTensor::Float(tensor) | BackendTensor::Int(tensor)) => tensor,
        Ok(_) => panic!("a kernel was given another type"),
        // Inputs of one operation share a device; burn's own operations panic here too.
        Err(e) => panic!("tensors of one operation on two devices: {e}"),
    }
}

fn plain(tensor: FusionTensor<Runtime>) -> Plain {
    <DispatchTensor as DispatchKindConversion<Cube>>::from_backend(BackendTensor::Float(tensor))
}

/// Row-major tensors.
fn contiguous<const I: usize>(tensors: [CubeTensor; I]) -> [CubeTensor; I] {
    tensors.map(into_contiguous)
}

/// An f32 tensor on the device of `like`, to be written.
fn empty(like: &CubeTensor, shape: impl Into<Vec<usize>>) -> CubeTensor {
    let shape = Shape::from(shape.into());
    empty_device_dtype(like.client.clone(), like.device.clone(), shape, DType::F32)
}

/// Cubes and units for a kernel whose units take an element each.
fn by_element(like: &CubeTensor, elements: usize) -> (CubeCount, CubeDim) {
    let dim = CubeDim::new(&like.client, elements);
    (cubecl::calculate_cube_count_elemwise(&like.client, elements, dim), dim)
}

/// Cubes and units for a kernel whose cubes take a row each, and the number of units.
fn by_row(like: &CubeTensor, [rows, columns]: [usize; 2]) -> (CubeCount, CubeDim, usize) {
    // A tree needs a power of two; a device has at least as many units.
    let most = like.client.properties().hardware.max_units_per_cube.clamp(1, 256) as usize;
    let most = 1 << most.ilog2();
    let units = columns.next_power_of_two().clamp(1, most);
    // A device need not take more than 65535 cubes in a direction.
    let across = rows.clamp(1, 1 << 15);
    let count = CubeCount::Static(across as u32, rows.div_ceil(across) as u32, 1);
    (count, CubeDim::new_1d(units as u32), units)
}

/// The row of this cube.
#[cube]
fn row_of_cube() -> usize {
    CUBE_POS_Y as usize * CUBE_COUNT_X as usize + CUBE_POS_X as usize
}

/// The sum of every unit's number, in every unit.
#[cube]
fn cube_sum(value: f32, #[comptime] units: usize) -> f32 {
    let mut shared = Shared::new_slice(units);
    let unit = UNIT_POS as usize;
    shared[unit] = value;
    sync_cube();
    let mut half = CUBE_DIM_X as usize / 2;
    while half > 0 {
        if unit < half {
            let other = shared[unit + half];
            shared[unit] += other;
        }
        sync_cube();
        half /= 2;
    }
    let total = shared[0];
    sync_cube();
    total
}

/// The largest of every unit's number, in every unit.
#[cube]
fn cube_max(value: f32, #[comptime] units: usize) -> f32 {
    let mut shared = Shared::new_slice(units);
    let unit = UNIT_POS as usize;
    shared[unit] = value;
    sync_cube();
    let mut half = CUBE_DIM_X as usize / 2;
    while half > 0 {
        if unit < half {
            let other = shared[unit + half];
            let own = shared[unit];
            shared[unit] = select(other > own, other, own);
        }
        sync_cube();
        half /= 2;
    }
    let largest = shared[0];
    sync_cube();
    largest
}

/// The nearest integer, ties to even: what devices call round leaves ties to them.
#[cube]
fn round_even(x: f32) -> f32 {
    let low = x.floor();
    let rest = x - low;
    let half = low * 0.5f32;
    let odd = half - half.floor() > 0.25f32;
    let up = rest > 0.5f32 || (rest == 0.5f32 && odd);
    select(up, low + 1.0f32, low)
}

#[cube]
fn clamped(x: f32, low: f32, high: f32) -> f32 {
    select(x < low, low, select(x > high, high, x))
}
