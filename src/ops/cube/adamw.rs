//! AdamW's update in place.

use burn_cubecl::cubecl;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::{by_element, launch};
use crate::ops::adamw::AdamWStep;
use crate::ops::bridge::{Plain, tensor};

/// A step's numbers as the kernel takes them.
#[derive(Clone, Copy)]
struct Form {
    numbers: [f32; 9],
    groups: usize,
    in_units: bool,
}

/// Parameter and moments after a step, of any rank; those that nobody else holds are written over. A parameter that
/// lies there transposed stays so.
///
/// # Shapes
/// - tensors: parameter, gradient and both moments, the same
/// - units: `[groups, 1]`, of runs of the row-major transpose of the parameter
/// - restraint: `[3]`, as [`Restraint`](crate::ops::Restraint) has it
pub(in crate::ops) fn adamw(
    step: &AdamWStep,
    shape: &[usize],
    units: Option<Plain>,
    [parameter, gradient, first, second]: [Plain; 4],
    restraint: Plain,
) -> [Plain; 3] {
    let [correction1, correction2] = step.corrections();
    let numbers = [
        step.shrink,
        step.beta1,
        step.beta2,
        1.0 - step.beta1,
        1.0 - step.beta2,
        step.epsilon,
        step.rate / correction1,
        1.0 / correction2,
        step.rate * step.weight_decay,
    ];
    let groups = units.as_ref().map_or(1, |units| tensor::<2>(units.clone()).dims()[0]);
    let form = Form { numbers: numbers.map(|x| x as f32), groups, in_units: units.is_some() };
    // A stand-in keeps the number of inputs fixed.
    let units = units.unwrap_or_else(|| restraint.clone());
    let inputs = [parameter, gradient, first, second, units, restraint];
    let outputs = [(); 3].map(|()| shape.to_vec());
    launch("fewbit_adamw", inputs, outputs, move |inputs| update(form, inputs))
}

fn update(form: Form, inputs: [CubeTensor; 6]) -> [CubeTensor; 3] {
    let [parameter, gradient, first, second, units, restraint] = inputs;
    // Groups are runs of the transpose, and a transposed view is updated as what it is a view of.
    let flip = form.in_units || !parameter.is_contiguous() && parameter.meta.num_dims() == 2;
    let orient = |mut x: CubeTensor| {
        if flip {
            x.meta.swap(0, 1);
        }
        x
    };
    let rows = |x: CubeTensor| into_contiguous(orient(x));
    let own = |x: CubeTensor| {
        let x = rows(x);
        if x.handle.can_mut() { x } else { x.copy() }
    };
    let [parameter, first, second] = [parameter, first, second].map(own);
    let gradient = rows(gradient);
    let [units, restraint] = [units, restraint].map(into_contiguous);
    let len = parameter.meta.num_elements();
    let (count, dim) = by_element(&parameter, len);
    let [shrink, beta1, beta2, new1, new2, epsilon, rate, correction2, decay] = form.numbers;
    adamw_kernel::launch(
        &parameter.client,
        count,
        dim,
        parameter.clone().into_buffer_arg(),
        gradient.into_buffer_arg(),
        first.clone().into_buffer_arg(),
        second.clone().into_buffer_arg(),
        units.into_buffer_arg(),
        restraint.into_buffer_arg(),
        len / form.groups.max(1),
        shrink,
        beta1,
        beta2,
        new1,
        new2,
        epsilon,
        rate,
        correction2,
        decay,
        form.in_units,
    );
    [parameter, first, second].map(orient)
}

#[cube(launch)]
fn adamw_kernel(
    parameter: &mut [f32],
    gradient: &[f32],
    first: &mut [f32],
    second: &mut [f32],
    units: &[f32],
    restraint: &[f32],
    group_len: usize,
    shrink: f32,
    beta1: f32,
    beta2: f32,
    new1: f32,
    new2: f32,
    epsilon: f32,
    rate: f32,
    correction2: f32,
    decay: f32,
    #[comptime] in_units: bool,
) {
    let at = ABSOLUTE_POS as usize;
    if at >= parameter.len() {
        terminate!();
    }
    // Where the gradients' norm is no number nothing changes.
    if restraint[2] > 0.0f32 {
        let damping = restraint[1];
        let g = gradient[at] * shrink * restraint[0];
        let m = first[at] * beta1 + g * new1;
        let v = second[at] * beta2 + g * g * new2;
        first[at] = m;
        second[at] = v;
        let mut step = rate * damping;
        if comptime!(in_units) {
            step *= units[at / group_len];
        }
        let root = (v * correction2).sqrt() + epsilon;
        parameter[at] = parameter[at] * (1.0f32 - decay * damping) - step * m / root;
    }
}
