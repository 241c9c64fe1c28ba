//! Methods that learn the grid of codes they find: the laws of PEQA, AlphaTuning and E2E-QP.

use burn::module::ParamId;
use burn::nn::Linear;
use burn::tensor::{DType, Device, Tensor};
use fewbit::method::{MethodConfig, fold, shorten_all};
use fewbit::quant::{
    Bits, CodedWeight, Grid, GroupAxis, GroupLayout, Learned, LearnedScales, QuantSpec,
    QuantizedWeight, ScaleDigits, Symmetry, ZeroKind,
};
use fewbit::train::{self, Optimizer, OptimizerConfig};

use super::laws::beyond;
use super::{
    GROUP_SIZES, asymmetric, bits_of, host, matrix, min_max, near, noise, noisy, recipe, rounded,
    spec,
};

fn coded(weight: &QuantizedWeight, learned: Learned, device: &Device) -> CodedWeight {
    CodedWeight::new(weight, learned, DType::F32, device)
}

fn linear(weight: &QuantizedWeight, learned: Learned, device: &Device) -> Linear {
    let weight = coded(weight, learned, device).into_parameter(ParamId::new());
    Linear { weight, bias: None }
}

fn of(linear: &Linear) -> &CodedWeight {
    linear.weight.reparameterization::<CodedWeight>().unwrap()
}

fn learned(method: &str) -> Learned {
    recipe(method).tunes().unwrap()
}

/// Round-to-nearest, then binary coding with an offset; per channel, in groups, along the outputs.
fn bases(device: &Device) -> Vec<(&'static str, QuantizedWeight)> {
    let mut bases = Vec::new();
    for group_size in GROUP_SIZES {
        let spec = spec(3, group_size, Symmetry::Asymmetric);
        bases.push(("peqa", rounded(&spec, &min_max(true), &noisy(3, device))));
        bases.push(("alphatuning", binary(&spec, device)));
    }
    let along_inputs = rounded(&asymmetric(3), &min_max(true), &noisy(4, device));
    let GroupLayout { out, inputs, .. } = along_inputs.layout;
    let layout =
        GroupLayout { out: inputs, inputs: out, axis: GroupAxis::Out, ..along_inputs.layout };
    bases.push(("peqa", QuantizedWeight { layout, ..along_inputs }));
    bases
}

fn binary(spec: &QuantSpec, device: &Device) -> QuantizedWeight {
    let w = noisy(5, device);
    let layout = spec.layout(w.dims()).unwrap();
    let bcq: MethodConfig = recipe("bcq = {}");
    fewbit::method::quantize(&bcq, spec, &min_max(true), layout, &w).unwrap()
}

fn differing(a: &[f32], b: &[f32]) -> usize {
    bits_of(a).iter().zip(bits_of(b)).filter(|(a, b)| **a != *b).count()
}

/// Steps towards the outputs of another weight.
fn trained(mut linear: Linear, steps: usize, rate: f64) -> Linear {
    let [inputs, outputs] = linear.weight.dims();
    let device = of(&linear).scale.device();
    let x = matrix(&noise(1, 12 * inputs, 1.0), inputs, &device);
    let target = matrix(&noise(2, 12 * outputs, 1.0), outputs, &device);
    let mut optimizer = Optimizer::new(&OptimizerConfig::default());
    for _ in 0..steps {
        (linear, _) = train::step(linear, &mut optimizer, 1, &|_| rate, |linear, _| {
            Ok((of(linear).linear(x.clone()) - target.clone()).square().mean())
        })
        .unwrap();
    }
    linear
}

#[test]
fn a_coded_weight_starts_as_what_it_was_made_of() {
    let device = Device::flex().autodiff();
    for (method, base) in bases(&device) {
        for options in ["{}", "{ relative = true }"] {
            let linear = linear(&base, learned(&format!("{method} = {options}")), &device);
            assert_eq!(fold(&linear.weight).unwrap().unwrap(), base, "{method} {options}");
            let weight = host(linear.weight.val().transpose());
            assert_eq!(bits_of(&weight), bits_of(&base.dequantize()), "{method} {options}");
        }
    }
}

#[test]
fn training_goes_on_with_scales_of_few_digits() {
    let device = Device::flex().autodiff();
    for (method, base) in bases(&device) {
        for options in ["{}", "{ relative = true }"] {
            let text = format!("{method} = {options}");
            let mut linear = trained(linear(&base, learned(&text), &device), 2, 0.01);
            shorten_all([&mut linear], ScaleDigits::Bits7);
            let start = fold(&linear.weight).unwrap().unwrap();
            let linear = trained(linear, 20, 0.002);
            let end = fold(&linear.weight).unwrap().unwrap();
            assert!(end != start && beyond(&end, ScaleDigits::Bits7) < 4e-7, "{text}");
            let weight = host(linear.weight.val().transpose());
            assert_eq!(bits_of(&weight), bits_of(&end.dequantize()), "{text}");
        }
    }
}

#[test]
fn training_moves_scales_and_nothing_else() {
    let device = Device::flex().autodiff();
    for (method, base) in bases(&device) {
        for options in ["{}", "{ relative = true }"] {
            let text = format!("{method} = {options}");
            let after = trained(linear(&base, learned(&text), &device), 3, 0.01);
            let after = fold(&after.weight).unwrap().unwrap();
            assert_eq!(after.codes, base.codes, "{text}");
            let groups = base.layout.groups;
            assert_eq!(differing(after.grid.scales(), base.grid.scales()), groups, "{text}");
            match (&after.grid, &base.grid) {
                (Grid::Uniform { zero_point: a, .. }, Grid::Uniform { zero_point: b, .. })
                | (Grid::BinaryCoding { offset: a, .. }, Grid::BinaryCoding { offset: b, .. }) => {
                    assert_eq!(a, b);
                }
                _ => panic!("another grid"),
            }
            // One step of AdamW is about the rate: relative where that was asked for.
            if options.contains("relative") {
                let ratio = after.grid.scales().iter().zip(base.grid.scales());
                assert!(ratio.into_iter().all(|(a, b)| (a / b).ln().abs() < 0.031), "{text}");
            }
        }
    }
}

#[test]
fn every_scale_and_the_offsets_learn_when_asked_to() {
    let device = Device::flex().autodiff();
    let base = binary(&asymmetric(3), &device);
    let groups = base.layout.groups;
    for (learn, scales, offsets) in
        [("largest", groups, 0), ("all", 3 * groups, 0), ("all_and_offset", 3 * groups, groups)]
    {
        let linear =
            linear(&base, learned(&format!("alphatuning = {{ learn = {learn:?} }}")), &device);
        assert_eq!(of(&linear).learned_numbers(), scales + offsets);
        let after = fold(&trained(linear, 2, 0.01).weight).unwrap().unwrap();
        let (Grid::BinaryCoding { alpha, offset }, Grid::BinaryCoding { alpha: a, offset: o }) =
            (&after.grid, &base.grid)
        else {
            panic!("another grid")
        };
        assert_eq!((differing(alpha, a), differing(offset, o)), (scales, offsets), "{learn}");
    }
}

#[test]
fn peqa_by_hand() {
    let device = Device::flex().autodiff();
    let w = matrix(&[0.9, -0.6, 0.3, -0.1], 4, &device);
    let base = rounded(&asymmetric(2), &min_max(true), &w);
    near(&base.dequantize(), &[1.0, -0.5, 0.5, 0.0]);
    // ds = Σ_n dY (X W̄ᵀ) with W̄ = [2, -1, 1, 0].
    let coded = coded(&base, learned("peqa = {}"), &device);
    let x = matrix(&[1.0, 2.0, 3.0, 4.0, -1.0, 0.5, 0.0, 2.0], 4, &device);
    let up = matrix(&[2.0, -3.0], 1, &device);
    let gradients = (coded.linear(x) * up).sum().backward();
    let expected = 2.0 * (2.0 - 2.0 + 3.0) - 3.0 * (-2.0 - 0.5);
    near(&host(coded.scale.val().grad(&gradients).unwrap()), &[expected]);
}

/// The three routes of the notes: from the weight's gradient, from the output, by differences (the
/// output is linear in the scales, so any step is exact).
#[test]
fn peqa_gradients_by_three_routes() {
    let device = Device::flex().autodiff();
    for (_, base) in bases(&device).into_iter().filter(|(method, _)| *method == "peqa") {
        let inputs = base.layout.inputs;
        let x = matrix(&noise(7, 6 * inputs, 1.0), inputs, &device);
        let up = matrix(&noise(8, 6 * base.layout.out, 1.0), base.layout.out, &device);
        let of_output = |base: &QuantizedWeight| {
            let coded = coded(base, learned("peqa = {}"), &device);
            let loss = (coded.linear(x.clone()) * up.clone()).sum();
            let value = f64::from(loss.clone().into_scalar::<f32>());
            let gradients = loss.backward();
            (host(coded.scale.val().grad(&gradients).unwrap()), value)
        };
        let (from_output, loss) = of_output(&base);
        let coded = coded(&base, learned("peqa = {}"), &device);
        let weight = coded.clone().into_parameter(ParamId::new()).val();
        let gradients = (x.clone().matmul(weight) * up.clone()).sum().backward();
        let from_weight = host(coded.scale.val().grad(&gradients).unwrap());
        let size = from_weight.iter().fold(1.0f32, |max, g| max.max(g.abs()));
        let by_difference = |group: usize| {
            let mut moved = base.clone();
            let Grid::Uniform { scale, .. } = &mut moved.grid else { panic!("another grid") };
            let step = scale[group];
            scale[group] += step;
            ((of_output(&moved).1 - loss) / f64::from(step)) as f32
        };
        for (group, (a, b)) in from_output.iter().zip(&from_weight).enumerate() {
            assert!((a - b).abs() <= 1e-5 * size, "{a} {b}");
            let c = by_difference(group);
            assert!((a - c).abs() <= 2e-4 * size, "{a} {c}");
        }
    }
}

/// A uniform grid is a binary-coding one whose scales are tied: `alpha_i = s 2^(i-1)`,
/// `o = s ((2^b - 1)/2 - z)`.
#[test]
fn peqa_is_its_binary_coding_image_with_tied_scales() {
    let device = Device::flex().autodiff();
    let base = rounded(&asymmetric(3), &min_max(true), &noisy(9, &device));
    let Grid::Uniform { scale, zero_point, .. } = &base.grid else { panic!("another grid") };
    let ties = [0.5f32, 1.0, 2.0];
    let alpha = scale.iter().flat_map(|s| ties.map(|tie| s * tie)).collect();
    let middle = |z: &f32| 3.5 - z;
    let offset = scale.iter().zip(zero_point).map(|(s, z)| s * middle(z)).collect();
    let image = QuantizedWeight { grid: Grid::BinaryCoding { alpha, offset }, ..base.clone() };
    let inputs = base.layout.inputs;
    let x = matrix(&noise(10, 5 * inputs, 1.0), inputs, &device);
    let up = matrix(&noise(11, 5 * base.layout.out, 1.0), base.layout.out, &device);
    let run = |weight: &QuantizedWeight, method: &str| {
        let coded = coded(weight, learned(method), &device);
        let y = coded.linear(x.clone());
        let gradients = (y.clone() * up.clone()).sum().backward();
        let of_scale = host(coded.scale.val().grad(&gradients).unwrap());
        (host(y), of_scale, coded.offset.val().grad(&gradients).map(host))
    };
    let (y, of_step, _) = run(&base, "peqa = {}");
    let (z, of_alpha, of_offset) = run(&image, "alphatuning = { learn = \"all_and_offset\" }");
    let close = |a: f32, b: f32, size: f32| (a - b).abs() <= 1e-5 * size.max(1.0);
    assert!(y.iter().zip(&z).all(|(a, b)| close(*a, *b, a.abs())));
    for (group, step) in of_step.iter().enumerate() {
        let alphas = &of_alpha[group * 3..][..3];
        let through_alphas: f32 = alphas.iter().zip(ties).map(|(g, tie)| g * tie).sum();
        let through_offset = of_offset.as_ref().unwrap()[group] * middle(&zero_point[group]);
        assert!(close(*step, through_alphas + through_offset, 10.0 * step.abs()));
    }
}

#[test]
fn alphatuning_may_divide_by_the_group() {
    let device = Device::flex().autodiff();
    let base = binary(&asymmetric(2), &device);
    let inputs = base.layout.inputs;
    let x = matrix(&noise(12, 4 * inputs, 1.0), inputs, &device);
    let gradient = |method: &str| {
        let coded = coded(&base, learned(method), &device);
        let gradients = coded.linear(x.clone()).sum().backward();
        host(coded.scale.val().grad(&gradients).unwrap())
    };
    let plain = gradient("alphatuning = {}");
    let divided = gradient("alphatuning = { divide_by_group = true }");
    let length = base.layout.group_len as f32;
    assert!(plain.iter().zip(&divided).all(|(p, d)| (p / length - d).abs() <= 1e-6 * p.abs()));
}

#[test]
fn the_largest_scale_is_found_wherever_it_is() {
    let device = Device::flex().autodiff();
    let layout = GroupLayout { out: 3, inputs: 2, groups: 3, group_len: 2, axis: GroupAxis::In };
    let alpha = vec![0.5, -2.0, 3.0, 1.0, 1.0, -1.0];
    let grid = Grid::BinaryCoding { alpha, offset: vec![0.0; 3] };
    let bits = Bits::new(2).unwrap();
    let base = QuantizedWeight::new(&[0, 1, 2, 3, 1, 2], grid, bits, layout).unwrap();
    let coded = coded(&base, learned("alphatuning = {}"), &device);
    assert_eq!(host(coded.scale.val()), [-2.0, 3.0, 1.0]);
    assert_eq!(host(coded.scales()), base.grid.scales());
}

#[test]
fn another_grid_on_the_same_codes_and_back() {
    let device = Device::flex();
    for (_, base) in bases(&device) {
        let a = coded(&base, Learned::default(), &device);
        let mut grid = base.grid.clone();
        match &mut grid {
            Grid::Uniform { scale, .. } => scale.iter_mut().for_each(|s| *s *= 1.5),
            Grid::BinaryCoding { alpha, .. } => alpha.iter_mut().for_each(|a| *a *= 1.5),
            _ => panic!("another grid"),
        }
        let b = a.with_grid(&grid).unwrap();
        let inputs = base.layout.inputs;
        let x: Tensor<2> = matrix(&noise(13, 3 * inputs, 1.0), inputs, &device);
        let before = host(a.linear(x.clone()));
        assert_ne!(host(b.linear(x.clone())), before);
        let again = b.with_grid(&base.grid).unwrap();
        assert_eq!(bits_of(&host(again.linear(x))), bits_of(&before));
        assert!(again.with_grid(&other_kind(&base)).is_err());
    }
}

fn other_kind(base: &QuantizedWeight) -> Grid {
    let groups = base.layout.groups;
    match &base.grid {
        Grid::Uniform { .. } => Grid::BinaryCoding {
            alpha: vec![1.0; groups * usize::from(base.bits.get())],
            offset: vec![0.0; groups],
        },
        Grid::BinaryCoding { .. } => Grid::Uniform {
            scale: vec![1.0; groups],
            zero_point: vec![0.0; groups],
            zero_kind: ZeroKind::Integer,
        },
        _ => panic!("another grid"),
    }
}

#[test]
fn bytes_are_those_of_codes_and_grid() {
    let device = Device::flex();
    let w = Tensor::ones([8, 256], &device);
    let base = rounded(&spec(4, "128", Symmetry::Asymmetric), &min_max(true), &w);
    let frozen = coded(&base, Learned::default(), &device);
    assert_eq!(frozen.bytes(), 8 * 128 + 2 * 4 * 16);
    let all = Learned { scales: LearnedScales::All, ..Learned::default() };
    assert_eq!(coded(&base, all, &device).bytes(), frozen.bytes());
    assert_eq!(coded(&base, all, &device).learned_numbers(), 16);
}

#[test]
fn a_method_that_makes_codes_tunes_none() {
    assert!(recipe("rtn = {}").tunes().is_none());
    let w = noisy(14, &Device::flex());
    for method in ["peqa = {}", "alphatuning = {}", "e2e_qp = {}"] {
        let text = super::start_from(method, &asymmetric(3), &w, 0).unwrap_err().to_string();
        assert!(text.contains("makes no codes") && text.contains("tune_scales"), "{text}");
    }
}
