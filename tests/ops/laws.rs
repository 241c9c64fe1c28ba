//! What holds for the operations as a whole: no gradient is lost without a word, and what a device
//! does to save memory changes nothing.

use std::panic::{AssertUnwindSafe, catch_unwind};

use burn::tensor::{Device, Int, Tensor};
use fewbit::ops::{
    self, CodedKind, CodedMatrix, Comparison, Divergence, Divided, PackedCodes, Rule, TieRule,
    Unified,
};

use crate::binary_coding::UnifiedCase;
use crate::block::AttentionCase;
use crate::divided::DividedCase;
use crate::stepped::{MARGIN, SteppedCase};
use crate::{Dice, Matrix, Outcome, bits, both, on_processor};

// --- constants -----------------------------------------------------------------------------------

/// `f` panics because a constant is tracked, and for no other reason.
fn refuses(what: &str, f: impl FnOnce()) {
    let Err(panic) = catch_unwind(AssertUnwindSafe(f)) else {
        panic!("{what}: a gradient was lost")
    };
    let message = panic.downcast_ref::<&str>().copied().unwrap_or_default();
    assert!(message.contains("gives no gradient"), "{what}: {message}");
}

fn tracked(shape: [usize; 2]) -> Tensor<2> {
    Tensor::zeros(shape, &Device::flex().autodiff()).require_grad()
}

fn constant(shape: [usize; 2]) -> Tensor<2> {
    Tensor::zeros(shape, &Device::flex().autodiff())
}

const SHAPE: [usize; 2] = [2, 8];
const COLUMN: [usize; 2] = [2, 1];

#[test]
fn quantizers_refuse_tracked_constants() {
    let divided = |weight, zero_point| {
        let log_scale = tracked(COLUMN);
        let (log_division, log_row) = (constant(SHAPE), constant(COLUMN));
        let log_column = None;
        let (max_code, base) = (15, None);
        Divided { weight, base, log_scale, log_division, log_row, log_column, zero_point, max_code }
    };
    let unified = |zero_unified, middle| {
        let (log_scale, log_division) = (constant(COLUMN), tracked(SHAPE));
        let (log_row, alpha) = (constant(COLUMN), constant([2, 3]));
        Unified { log_scale, log_division, log_row, alpha, zero_unified, middle }
    };
    let map = |weight, codes, [zero_unified, middle]: [Tensor<2>; 2]| {
        let _ = unified(zero_unified, middle).map(weight, &codes, false);
    };
    let zeros = || [constant(COLUMN), constant(COLUMN)];
    both(|| {
        // As they should be, they pass.
        let _ = divided(constant(SHAPE), constant(COLUMN)).values();
        map(constant(SHAPE), constant(SHAPE), zeros());
        refuses("the weight", || {
            let _ = divided(tracked(SHAPE), constant(COLUMN)).values();
        });
        refuses("the zero point", || {
            let _ = divided(constant(SHAPE), tracked(COLUMN)).values();
        });
        refuses("a mapped weight", || map(tracked(SHAPE), constant(SHAPE), zeros()));
        refuses("mapped codes", || map(constant(SHAPE), tracked(SHAPE), zeros()));
        for at in 0..2 {
            let mut shift = zeros();
            shift[at] = tracked(COLUMN);
            refuses("the shift", || map(constant(SHAPE), constant(SHAPE), shift));
        }
    });
}

/// On other backends they are compositions of burn's operations, which track everything.
#[test]
fn kernels_refuse_tracked_constants() {
    if !on_processor() {
        return;
    }
    refuses("the target", || {
        let [output, target] = [constant(SHAPE), tracked(SHAPE)].map(|x| x.reshape([1, 2, 8]));
        let _ = ops::block_mse(output, target, false);
    });
    let case = AttentionCase::new([1, 3, 1, 1, 2], 1);
    refuses("rotary tables", || {
        let mut attending = case.attending(&Device::flex().autodiff(), case.plain());
        attending.cos = attending.cos.require_grad();
        let [q, k, v] = case.inputs.each_ref().map(|x| x.plain().reshape::<3, _>([1, 3, 4]));
        let _ = ops::causal_attention(q, k, v, &attending);
    });
    for tracked_at in 0..3 {
        let arguments = || {
            let shapes = [SHAPE, SHAPE, COLUMN].into_iter().enumerate();
            let mut all =
                shapes.map(|(i, s)| if i == tracked_at { tracked(s) } else { constant(s) });
            std::array::from_fn::<_, 3, _>(|_| all.next().unwrap())
        };
        let kind = Divergence::KlForward;
        let comparison =
            Comparison { divergence: kind, temperature: 1.0, top_k: None, tail: false };
        refuses("a divergence", || {
            let [student, teacher, weights] = arguments();
            let _ = ops::divergence(&comparison, student, teacher, weights);
        });
        refuses("a divergence's value", || {
            let [student, teacher, weights] = arguments();
            let _ = ops::divergence_value(&comparison, student, teacher, weights);
        });
        refuses("a comparison", || {
            let [student, teacher, weights] = arguments();
            let _ = ops::compare(student, teacher, weights);
        });
    }
    let targets = || Tensor::<2, Int>::zeros(COLUMN, &Device::flex());
    refuses("a cross-entropy", || {
        let _ = ops::cross_entropy(tracked(SHAPE), targets(), constant(COLUMN));
    });
    refuses("likelihoods", || {
        let _ = ops::negative_log_likelihood(tracked(SHAPE), targets());
    });
    refuses("a confidence", || {
        let _ = ops::confidence(tracked(SHAPE), constant(COLUMN));
    });
}

// --- recomputation -------------------------------------------------------------------------------

/// A device that drops outputs and computes them again gives the same bits. The operation stands
/// between two others, so that its inputs and its output are among what is dropped.
fn survives_recomputation<const N: usize, const D: usize>(
    what: &str,
    inputs: &[Matrix; N],
    f: impl Fn([Tensor<2>; N]) -> Tensor<D>,
) {
    let between = |inputs: [Tensor<2>; N]| f(inputs.map(|x| x * 1.0)).square();
    let keeps = Device::flex().autodiff();
    let drops = Device::flex().autodiff().gradient_checkpointing();
    let count = f(inputs.each_ref().map(|x| x.on(&keeps))).shape().num_elements();
    let upstream = Dice::new(9).noise(count, 1.0);
    both(|| {
        let [kept, dropped] = [&keeps, &drops]
            .map(|device| Outcome::on(device, inputs, &upstream, between))
            .map(|outcome| (bits(&outcome.values), outcome.gradients.map(|g| bits(&g))));
        assert!(kept == dropped, "{what}");
        // An input of an operation without gradient for it is none of these.
        assert!(kept.1.iter().any(|gradient| gradient.iter().any(|bits| *bits != 0)), "{what}");
    });
}

#[test]
fn quantizers_survive_recomputation() {
    for columns in [false, true] {
        let case = DividedCase::new(33, 2, 2, columns, 1);
        survives_recomputation("divided", &case.inputs, |inputs| {
            case.operation(&inputs[0].device(), inputs).values()
        });
        // The division factors out of another operation, as LRQ has them.
        survives_recomputation("divided by a product", &case.inputs, |[scale, d, row, column]| {
            let d = ops::matmul(row.clone().repeat_dim(0, 2), d.mean_dim(0));
            case.operation(&scale.device(), [scale, d, row, column]).values()
        });
    }
    for rule in [
        Rule::Affine { max_code: 15.0 },
        Rule::Lsq { middle: 8.0 },
        Rule::Seq { margin: MARGIN, ties: TieRule::HalfUp },
        Rule::Ternary { margin: MARGIN },
        Rule::Sign,
    ] {
        for offsets in [false, true] {
            let case = SteppedCase::new(rule, 33, 3, offsets, 2);
            survives_recomputation("stepped", &case.inputs, |inputs| {
                case.operation(inputs).values()
            });
        }
    }
    for filter in [false, true] {
        let case = UnifiedCase::new(33, 3, 3, filter, 3);
        survives_recomputation("mapping", &case.inputs, |inputs| case.map(inputs));
    }
    let mut dice = Dice::new(4);
    let codes: Vec<u8> = (0..51).map(|_| dice.below(8) as u8).collect();
    let codes = PackedCodes::pack(&codes, 17, 3);
    let kind = CodedKind::BinaryCoding;
    let packed = CodedMatrix::new(codes, 17, kind, false, &Device::flex());
    let grid = [dice.matrix([3, 3], 1.0), dice.matrix([3, 1], 1.0)];
    survives_recomputation("coded weight", &grid, |[alpha, offset]| packed.weight(alpha, offset));
    let [alpha, offset] = grid;
    let inputs = [dice.matrix([4, 17], 1.0), alpha, offset];
    survives_recomputation("coded linear", &inputs, |[x, alpha, offset]| {
        packed.linear(x, alpha, offset)
    });
    survives_recomputation("exp", &[dice.matrix([3, 17], 1.0)], |[x]| ops::exp(ops::exp(x)));
}

#[test]
fn a_block_survives_recomputation() {
    let mut dice = Dice::new(5);
    let [a, b] = [dice.matrix([6, 33], 1.0), dice.matrix([6, 33], 1.0)];
    let (weight, gain) = (dice.matrix([17, 33], 1.0), dice.matrix([1, 33], 1.0));
    let target = dice.matrix([6, 33], 1.0);
    survives_recomputation("linear", &[a.clone(), weight.clone()], |[x, w]| {
        ops::linear(x.reshape([2, 3, 33]), w.transpose())
    });
    survives_recomputation("matmul", &[weight, a.clone()], |[w, x]| ops::matmul(w, x.transpose()));
    survives_recomputation("rms_norm", &[a.clone(), gain], |[x, gain]| {
        ops::rms_norm(x, gain.reshape([33]), 1e-5)
    });
    survives_recomputation("swiglu", &[a.clone(), b], |[gate, up]| ops::swiglu(gate, up));
    survives_recomputation("block_mse", &[a], |[x]| {
        let target = target.on(&x.device()).reshape([2, 3, 33]);
        ops::block_mse(x.reshape([2, 3, 33]), target, true)
    });
    let case = AttentionCase::new([2, 17, 2, 2, 4], 6);
    survives_recomputation("attention", &case.inputs, |inputs| case.run(inputs, case.plain()));
}
