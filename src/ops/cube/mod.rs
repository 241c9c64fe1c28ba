//! Kernels of ours for burn's CubeCL backend: CUDA, ROCm, Metal, Vulkan and wgpu from one source.
//!
//! A kernel runs in its turn among the device's other work (with burn's fusion as an operation of its own
//! between fused ones); the host waits for nothing and uploads nothing but numbers of the launch. All of them
//! compute in f32. Sums over a row are those of one plane (a warp, a subgroup), so kernels that have any need a
//! device with planes of one size. Where it has not, where tensors are of another type, where
//! [`DeviceKernels`](super::DeviceKernels) says so, and under [`composed`](super::composed), operations are composed
//! from burn's.

#![allow(clippy::cast_lossless, clippy::too_many_arguments)] // kernels: `as` is what CubeCL compiles
#![allow(missing_docs)] // what the macro makes of a kernel

mod adamw;
mod coded;
mod divided;
mod losses;
mod product;
mod stepped;
mod stochastic;

use std::cell::RefCell;

use burn::backend::fusion::custom::{
    CustomOpIr, HandleContainer, OperationFn, OperationIr, StreamId, TensorIr,
};
use burn::backend::fusion::{FusionBackend, FusionRuntime, FusionTensor};
use burn::backend::{
    BackendTensor, Cube, DispatchKindConversion, DispatchTensor, DispatchTensorKind,
    TensorMetadata as _,
};
use burn::tensor::{DType, Shape};
use burn_cubecl::cubecl;
use burn_cubecl::cubecl::ir::features::Plane;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_dtype;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeDevice};
use cubecl::prelude::*;

pub(super) use self::adamw::adamw;
pub(super) use self::coded::{Decoded, decode};
pub(super) use self::divided::{DividedInputs, divided, divided_backward};
pub(super) use self::losses::{cross_entropy, divergence};
pub(super) use self::product::{FEW, codes_in_piece, product, product_of_codebooks};
pub(super) use self::stepped::{SteppedInputs, stepped, stepped_backward};
pub(super) use self::stochastic::round_to_bf16;
use super::bridge::{Plain, is_composed};
use super::device_kernels::DeviceKernels;

/// What burn's fusion holds of a device tensor.
type Runtime = <CubeBackend as FusionBackend>::FusionRuntime;
type Handles = HandleContainer<<Runtime as FusionRuntime>::FusionHandle>;

/// Whether kernels that add nothing up can read this tensor, on the tape or off it: f32 on a device.
pub(super) fn reads(tensor: &Plain) -> bool {
    are_wanted() && tensor.dtype() == DType::F32 && device_of(tensor).is_some()
}

/// As [`reads`], of kernels that add up rows.
pub(super) fn reads_rows(tensor: &Plain) -> bool {
    tensor.dtype() == DType::F32 && add_rows(tensor)
}

/// Whether kernels that add up rows run where this tensor is, whatever its type.
pub(super) fn add_rows(tensor: &Plain) -> bool {
    are_wanted() && device_of(tensor).is_some_and(|device| adds_up(&device))
}

fn are_wanted() -> bool {
    DeviceKernels::chosen() != DeviceKernels::Off && !is_composed()
}

/// Which kernels run on the device of a tensor, by name; none of this machine's processor.
pub(super) fn kernels(tensor: &Plain) -> Option<&'static str> {
    let device = device_of(tensor)?;
    Some(match DeviceKernels::chosen() {
        DeviceKernels::Off => "none",
        _ if adds_up(&device) => "all",
        _ => "elements",
    })
}

fn device_of(tensor: &Plain) -> Option<CubeDevice> {
    let mut kind = &tensor.kind;
    if let DispatchTensorKind::Autodiff(inner) = kind {
        kind = inner;
    }
    let DispatchTensorKind::Cube(found) = kind else { return None };
    match found {
        BackendTensor::Float(tensor) => Some(tensor.device()),
        BackendTensor::Autodiff(tensor) => Some(tensor.primitive().device()),
        _ => None,
    }
}

/// What a device says of its planes.
#[derive(Clone, Copy)]
struct Planes {
    /// All of one size.
    even: bool,
    /// They add up, and the backend vouches for it.
    vouched: bool,
}

thread_local! {
    /// Devices that were asked, with their answers.
    static PLANES: RefCell<Vec<(CubeDevice, Planes)>> = const { RefCell::new(Vec::new()) };
}

/// Whether a device adds up numbers of a plane, as far as the process wants it to.
fn adds_up(device: &CubeDevice) -> bool {
    let planes = planes(device);
    planes.even && (planes.vouched || DeviceKernels::chosen() == DeviceKernels::All)
}

fn planes(device: &CubeDevice) -> Planes {
    PLANES.with_borrow_mut(|known| {
        if let Some((_, answer)) = known.iter().find(|(of, _)| of == device) {
            return *answer;
        }
        let client = device.client();
        let properties = client.properties();
        let hardware = &properties.hardware;
        let answer = Planes {
            even: hardware.plane_size_min == hardware.plane_size_max,
            vouched: properties.features.plane.contains(Plane::Ops),
        };
        known.push((device.clone(), answer));
        answer
    })
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

/// Cubes and units for a kernel whose planes take a row each.
fn by_row(like: &CubeTensor, rows: usize) -> (CubeCount, CubeDim) {
    let hardware = &like.client.properties().hardware;
    let plane = hardware.plane_size_max.max(1);
    let planes = (hardware.max_units_per_cube.min(256) / plane).clamp(1, 8);
    let cubes = rows.div_ceil(planes as usize);
    // A device need not take more than 65535 cubes in a direction.
    let across = cubes.clamp(1, 1 << 15);
    let count = CubeCount::Static(across as u32, cubes.div_ceil(across) as u32, 1);
    (count, CubeDim::new_2d(plane, planes))
}

/// The row of this plane, whose units are those of one `UNIT_POS_Y`.
#[cube]
fn row_of_plane() -> usize {
    let cube = CUBE_POS_Y as usize * CUBE_COUNT_X as usize + CUBE_POS_X as usize;
    cube * CUBE_DIM_Y as usize + UNIT_POS_Y as usize
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
