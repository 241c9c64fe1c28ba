//! Kernels for devices against the composed form on the same device, and against this machine's processor.
//! Runs on whatever device the binary was built for; all kernels run, or a test says so.

use burn::tensor::{Device, Int, Tensor, TensorData};
use fewbit::ops::{
    self, AdamWStep, Additive, CodedKind, CodedMatrix, Comparison, DeviceKernels, Divergence,
    Divided, FrozenGrid, Moments, Numbers, PackedCodes, Restraint, Rule, Stepped, TieRule,
};

use crate::{Dice, Matrix, Outcome, bits, host, losses};

/// Relative to a value and to the mean magnitude of all: f32 sums in another order.
const TOLERANCE: f32 = 1e-5;

/// Of a loss, whose gradients are differences of logarithms that f32 rounds before.
const OF_LOSSES: f32 = 5e-5;

fn device() -> Device {
    // The same for every test of this process.
    DeviceKernels::All.choose();
    fewbit::device::open("auto").unwrap().device
}

/// What is compared with the composed form is not the composed form.
#[test]
fn all_kernels_run() {
    assert_eq!(ops::device_kernels(&device()), Some("all"));
}

fn near(what: &str, found: &[f32], expected: &[f32]) {
    near_by(what, TOLERANCE, found, expected);
}

fn near_by(what: &str, tolerance: f32, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let size = expected.iter().map(|x| x.abs()).sum::<f32>() / expected.len().max(1) as f32;
    for (i, (a, b)) in found.iter().zip(expected).enumerate() {
        let error = (a - b).abs();
        assert!(error <= tolerance * (b.abs() + size), "{what} at {i}: {a}, expected {b}");
    }
}

/// Values and gradients of `f` by the device's kernels, composed there, and on the processor.
fn check<const N: usize>(
    what: &str,
    inputs: &[Matrix; N],
    upstream: &[f32],
    f: impl Fn([Tensor<2>; N]) -> Tensor<2>,
) {
    let there = device().autodiff();
    let found = Outcome::on(&there, inputs, upstream, &f);
    let here = Outcome::on(&Device::flex().autodiff(), inputs, upstream, &f);
    let mut others = vec![("processor", here)];
    // `0` where what burn composes cannot run.
    if std::env::var_os("FEWBIT_TEST_COMPOSED").is_none_or(|value| value != "0") {
        others.push(("composed", ops::composed(|| Outcome::on(&there, inputs, upstream, &f))));
    }
    for (form, expected) in others {
        near(&format!("{what}, values, {form}"), &found.values, &expected.values);
        for (i, (a, b)) in found.gradients.iter().zip(&expected.gradients).enumerate() {
            near(&format!("{what}, gradient {i}, {form}"), a, b);
        }
    }
}

const SHAPES: [[usize; 2]; 4] = [[3, 7], [6, 128], [2, 1000], [40_000, 3]];

#[test]
fn stepped_quantizers() {
    let rules = [
        Rule::Affine { max_code: 15.0 },
        Rule::Lsq { middle: 2.0 },
        Rule::Seq { margin: 0.01, ties: TieRule::HalfEven },
        Rule::Seq { margin: 0.01, ties: TieRule::HalfUp },
        Rule::Ternary { margin: 0.01 },
        Rule::Sign,
    ];
    let mut dice = Dice::new(1);
    for (shape, rule) in SHAPES.into_iter().flat_map(|shape| rules.map(|rule| (shape, rule))) {
        let [groups, len] = shape;
        let width = if matches!(rule, Rule::Affine { .. }) { 4.0 } else { 1.0 };
        let weight = dice.matrix(shape, width);
        let step = Matrix::column((0..groups).map(|_| dice.normal().abs() + 0.3).collect());
        let zero = Matrix::column((0..groups).map(|_| (dice.normal() * 3.0).round()).collect());
        let rounding = dice.matrix(shape, 0.3);
        let upstream = dice.noise(groups * len, 1.0);
        let inputs = [weight, step, zero, rounding];
        for offsets in [false, true] {
            let values = |[weight, step, zero_point, rounding]: [Tensor<2>; 4]| {
                let rounding = offsets.then_some(rounding);
                Stepped { weight, step, zero_point, rounding, rule, step_gradient: 0.25 }.values()
            };
            check(&format!("{rule:?}, {shape:?}, {offsets}"), &inputs, &upstream, values);
        }
    }
}

/// Ties go to even on every device: their own rounding leaves them open.
#[test]
fn ties_go_to_even() {
    let values: Vec<f32> = (-9..=9).map(|i| i as f32 + 0.5).collect();
    let weight = Matrix::new([1, values.len()], values.clone()).on(&device());
    let one = |x: f32| Matrix::column(vec![x]).on(&device());
    let codes = Stepped::new(weight, one(1.0), one(16.0), Rule::Affine { max_code: 32.0 }).codes();
    let expected: Vec<f32> = values.iter().map(|x| x.round_ties_even() + 16.0).collect();
    assert_eq!(host(codes), expected);
}

#[test]
fn divided_quantizers() {
    let mut dice = Dice::new(2);
    for (shape, sharing) in [([4, 9], 1), ([6, 128], 3), ([2, 1000], 2), ([40_000, 3], 4)] {
        let [groups, len] = shape;
        let weight = dice.matrix(shape, 2.0);
        let zero =
            Matrix::column((0..groups).map(|_| (dice.normal() * 2.0).round() + 7.0).collect());
        let base = Matrix::column((0..groups).map(|_| dice.normal().abs() + 0.5).collect());
        let column = |dice: &mut Dice, rows: usize| Matrix::column(dice.noise(rows, 0.2));
        let inputs = [
            column(&mut dice, groups),
            dice.matrix(shape, 0.2),
            column(&mut dice, groups / sharing),
            dice.matrix([1, len * sharing], 0.2),
        ];
        let upstream = dice.noise(groups * len, 1.0);
        for (based, columns) in [(false, false), (true, true), (true, false)] {
            let values = |[log_scale, log_division, log_row, log_column]: [Tensor<2>; 4]| {
                let device = log_scale.device().inner();
                let divided = Divided {
                    weight: weight.on(&device),
                    base: based.then(|| base.on(&device)),
                    log_scale,
                    log_division,
                    log_row,
                    log_column: columns.then_some(log_column),
                    zero_point: zero.on(&device),
                    max_code: 15,
                };
                divided.values()
            };
            check(&format!("{shape:?}, {based}, {columns}"), &inputs, &upstream, values);
        }
    }
}

/// Value and gradient as one list.
fn loss(loss: ops::LossValue) -> [Vec<f32>; 2] {
    [host(loss.value), host(loss.gradient)]
}

#[test]
fn losses() {
    let mut dice = Dice::new(3);
    let kinds = [
        Divergence::KlForward,
        Divergence::KlReverse,
        Divergence::Jsd { beta: 0.5 },
        Divergence::Jsd { beta: 0.1 },
        Divergence::Cakld { gamma: 0.3 },
        Divergence::Adaptive { near: 0.1, far: 0.6 },
    ];
    for [tokens, vocab] in [[1, 3], [5, 100], [7, 4099]] {
        let case = losses::Case {
            student: dice.matrix([tokens, vocab], 3.0),
            teacher: dice.matrix([tokens, vocab], 3.0),
            weights: Matrix::column((1..=tokens).map(|i| (i % 3) as f32 / tokens as f32).collect()),
            targets: (0..tokens).map(|_| dice.below(vocab) as i32).collect(),
        };
        let losses::Case { student, teacher, weights, targets } = &case;
        for (divergence, temperature) in kinds.into_iter().flat_map(|k| [(k, 1.0), (k, 2.5)]) {
            let comparison = Comparison { divergence, temperature, top_k: None, tail: false };
            let on = |device: &Device| {
                let [s, t, w] = [student, teacher, weights].map(|x| x.on(device));
                loss(ops::divergence(&comparison, s, t, w))
            };
            let what = format!("{divergence:?} at {temperature}, {tokens}x{vocab}");
            let forms = [("kernel", on(&device())), ("composed", ops::composed(|| on(&device())))];
            if matches!(divergence, Divergence::Adaptive { .. }) {
                let expected = on(&Device::flex());
                for (form, found) in forms {
                    for (a, b) in found.iter().zip(&expected) {
                        near_by(&format!("{what}, {form}"), OF_LOSSES, a, b);
                    }
                }
            } else {
                for (form, [value, gradient]) in forms {
                    case.check(&format!("{what}, {form}"), &comparison, [&value, &gradient]);
                }
            }
        }
        let entropy = |device: &Device| {
            let targets = TensorData::new(targets.clone(), [tokens, 1]);
            let targets = Tensor::<2, Int>::from_data(targets, device);
            loss(ops::cross_entropy(student.on(device), targets, weights.on(device)))
        };
        let found = entropy(&device());
        let composed = ops::composed(|| entropy(&device()));
        for expected in [composed, entropy(&Device::flex())] {
            for (a, b) in found.iter().zip(&expected) {
                near_by(&format!("cross-entropy, {tokens}x{vocab}"), OF_LOSSES, a, b);
            }
        }
    }
}

fn adamw_numbers(step: u64, restraint: Option<Restraint>) -> AdamWStep {
    AdamWStep {
        shrink: 0.7,
        beta1: 0.9,
        beta2: 0.99,
        epsilon: 1e-8,
        rate: 1e-2,
        weight_decay: 0.1,
        step,
        restraint,
    }
}

#[test]
fn adamw() {
    let mut dice = Dice::new(4);
    for (shape, transposed) in [([33, 65], false), ([33, 65], true), ([4, 512], true)] {
        let start = dice.matrix(shape, 1.0);
        let gradients: Vec<Matrix> = (0..3).map(|_| dice.matrix(shape, 0.1)).collect();
        let units = Matrix::column((0..shape[1]).map(|_| dice.normal().abs() + 0.1).collect());
        for in_units in [false, true] {
            let run = |device: &Device| {
                let lay = |x: &Matrix| {
                    let x = x.on(device);
                    // The same values, laid out the other way round.
                    if transposed { x.transpose().add_scalar(0.0).transpose() } else { x }
                };
                let (mut parameter, mut moments) = (lay(&start), None::<Moments>);
                let held = parameter.clone();
                for (gradient, step) in gradients.iter().zip(1..) {
                    let (numbers, gradient) = (adamw_numbers(step, None), lay(gradient));
                    let (next, after) = if in_units {
                        let units = units.on(device);
                        ops::adamw_step_in_units(&numbers, units, parameter, gradient, moments)
                    } else {
                        ops::adamw_step(&numbers, parameter, gradient, moments)
                    };
                    (parameter, moments) = (next, Some(after));
                }
                assert_eq!(host(held), start.values, "what others hold");
                let [first, second] = moments.unwrap().tensors::<2>();
                [parameter, first, second].map(host)
            };
            let found = run(&device());
            for expected in [ops::composed(|| run(&device())), run(&Device::flex())] {
                for (a, b) in found.iter().zip(&expected) {
                    near(&format!("{shape:?}, transposed {transposed}, units {in_units}"), a, b);
                }
            }
        }
    }
}

/// A norm that stays on the device clips and damps as one that is known does, and one that is no number
/// changes nothing.
#[test]
fn restraints() {
    let mut dice = Dice::new(5);
    let (start, gradient) = (dice.matrix([8, 16], 1.0), dice.matrix([8, 16], 0.1));
    let step = |device: &Device, norm: f32| {
        let norm = Tensor::<1>::from_data([norm], device);
        let largest = Tensor::<1>::from_data([50.0], device);
        let (restraint, largest) = Restraint::new(&norm, largest, Some(2.0), 0.5);
        let numbers = adamw_numbers(1, Some(restraint));
        let start = start.on(device);
        let (parameter, moments) = ops::adamw_step(&numbers, start, gradient.on(device), None);
        let [first, second] = moments.tensors::<2>();
        ([parameter, first, second].map(host), host(largest)[0])
    };
    for (norm, shrink, damping) in [(100.0, 0.02, 1.0), (1.0, 1.0, 0.04)] {
        let clipped = AdamWStep { shrink: 0.7 * shrink, ..adamw_numbers(1, None) };
        let numbers = AdamWStep { rate: 1e-2 * damping, ..clipped };
        let here = Device::flex();
        let (parameter, moments) =
            ops::adamw_step(&numbers, start.on(&here), gradient.on(&here), None);
        let [first, second] = moments.tensors::<2>();
        let expected = [parameter, first, second].map(host);
        let forms = [step(&device(), norm), ops::composed(|| step(&device(), norm))];
        for (found, largest) in forms {
            assert_eq!(largest.to_bits(), norm.max(50.0).to_bits());
            found.iter().zip(&expected).for_each(|(a, b)| near(&format!("norm {norm}"), a, b));
        }
    }
    for norm in [f32::NAN, f32::INFINITY] {
        for (found, largest) in [step(&device(), norm), ops::composed(|| step(&device(), norm))] {
            assert_eq!((found[0].as_slice(), largest), (start.values.as_slice(), 50.0), "{norm}");
            assert!(found[1..].iter().flatten().all(|x| *x == 0.0), "{norm}");
        }
    }
}

#[test]
fn numbers_are_read_once() {
    let on = |value: f32| Numbers::of(Tensor::from_data([value], &device()));
    let before = ops::device_reads();
    let mut all = [on(3.0), Numbers::one(2.0), on(4.0).root(), Numbers::sum([on(1.0), on(5.0)])];
    assert_eq!(ops::device_reads(), before);
    Numbers::read_all(all.iter_mut());
    assert_eq!(ops::device_reads(), before + 1);
    let values: Vec<f64> = all.iter().flat_map(Numbers::values).collect();
    assert_eq!(values, [3.0, 2.0, 2.0, 6.0]);
}

#[test]
fn coded_weights() {
    let mut dice = Dice::new(6);
    for (bits, [rows, columns], group_len) in [
        (1, [4, 64], 32),
        (2, [3, 40], 40),
        (3, [5, 96], 32),
        (4, [8, 24], 8),
        (5, [4, 33], 33),
        (7, [6, 20], 10),
        (8, [2, 12], 6),
        // As many as a weight has: some of burn's faults were not seen in fewer.
        (2, [160, 576], 64),
        (3, [160, 576], 64),
    ] {
        let codes: Vec<u8> = (0..rows * columns).map(|_| dice.below(1 << bits) as u8).collect();
        let packed = PackedCodes::pack(&codes, columns, bits);
        let groups = rows * columns / group_len;
        for kind in [CodedKind::Uniform, CodedKind::BinaryCoding] {
            let scales = if kind == CodedKind::Uniform { 1 } else { usize::from(bits) };
            let inputs = [
                dice.matrix([5, columns], 1.0),
                dice.matrix([groups, scales], 1.0),
                dice.matrix([groups, 1], 2.0),
            ];
            let upstream = dice.noise(5 * rows, 1.0);
            let product = |[x, scale, shift]: [Tensor<2>; 3]| {
                let device = x.device();
                let matrix = CodedMatrix::new(packed.clone(), group_len, kind, false, &device);
                matrix.linear(x, scale, shift)
            };
            check(&format!("{bits} bits, {kind:?}"), &inputs, &upstream, product);
        }
    }
}

/// Products of few activations are computed on the codes where texts are continued.
#[test]
fn products_on_codes() {
    const ROWS: usize = 37;
    let mut dice = Dice::new(7);
    let codebook = |books, vector| CodedKind::Codebook(Additive { books, vector });
    for (bits, columns, group_len, kind) in [
        (1, 64, 32, CodedKind::Uniform),
        (2, 2000, 16, CodedKind::Uniform),
        (2, 40, 40, CodedKind::Uniform),
        (2, 576, 64, CodedKind::BinaryCoding),
        (3, 96, 32, CodedKind::Uniform),
        (3, 41, 41 * ROWS, CodedKind::BinaryCoding),
        (4, 24, 8, CodedKind::Uniform),
        (5, 33, 33, CodedKind::Uniform),
        (6, 48, 16, CodedKind::Uniform),
        (7, 64, 32, CodedKind::Uniform),
        (8, 4096, 128, CodedKind::Uniform),
        // Groups that end inside a word: decoded.
        (4, 20, 10, CodedKind::Uniform),
        (8, 576, 64, codebook(1, 8)),
        (8, 2048, 2048, codebook(2, 8)),
        (5, 36, 12, codebook(3, 4)),
    ] {
        let (codes_in_row, grid) = match kind {
            CodedKind::Codebook(additive) => {
                (additive.codes(columns), [additive.books << bits, additive.vector])
            }
            _ => (columns, [ROWS * columns / group_len, 1]),
        };
        let codes = (0..ROWS * codes_in_row).map(|_| dice.below(1 << bits) as u8);
        let codes = PackedCodes::pack(&codes.collect::<Vec<u8>>(), codes_in_row, bits);
        let scales = if kind == CodedKind::BinaryCoding { usize::from(bits) } else { 1 };
        let scale = dice.matrix([ROWS * columns / group_len, scales], 1.0);
        let shift = dice.matrix(grid, 2.0);
        for n in [1, 3, 8, 9] {
            let x = dice.matrix([n, columns], 1.0);
            let product = |device: &Device| {
                let matrix = CodedMatrix::new(codes.clone(), group_len, kind, false, device);
                let grid = || [&scale, &shift].map(|x| x.on(device));
                let x = x.on(device);
                host(ops::continuing(device, || {
                    matrix.linear_frozen(x, &FrozenGrid::default(), grid)
                }))
            };
            let what = format!("{bits} bits, {kind:?}, {n} x {columns}, groups of {group_len}");
            near(&what, &product(&device()), &ops::composed(|| product(&Device::flex())));
        }
    }
}

/// Bits by chance are those of the processor, whatever the layout.
#[test]
fn rounding_to_bf16() {
    let mut dice = Dice::new(8);
    for shape in [[1, 1], [33, 65], [300, 301]] {
        let mut x = dice.matrix(shape, 1.0);
        let odd = [0.0, f32::INFINITY, 1e-38, f32::MAX, -0.007_812_5];
        x.values.iter_mut().zip(odd).for_each(|(value, odd)| *value = odd);
        for seed in [0, 7] {
            let on = |device: &Device| {
                let rows = x.on(device);
                let lying = rows.clone().transpose();
                [rows, lying].map(|x| host(ops::round_to_bf16(x, seed)))
            };
            let expected = on(&Device::flex());
            for (form, found) in
                [("kernel", on(&device())), ("composed", ops::composed(|| on(&device())))]
            {
                for (a, b) in found.iter().zip(&expected) {
                    assert!(bits(a) == bits(b), "{form}, {shape:?}, {seed}");
                }
            }
        }
    }
}
