//! Learned rounding on one layer with few, correlated inputs: it must beat
//! round-to-nearest on inputs it has not known, and the low rank must not overfit more.

use burn::nn::Linear;
use burn::tensor::{Device, Tensor};
use fewbit::train::{self, Optimizer, OptimizerConfig, ScheduleConfig};

use super::{asymmetric, matrix, noise, rounded, started};

const OUT: usize = 32;
const INPUTS: usize = 64;
const STEPS: u64 = 400;

/// `rows` inputs whose neighbours are alike (an AR(1) process along the features).
fn inputs(seed: u64, rows: usize, device: &Device) -> Tensor<2> {
    let mut values = noise(seed, rows * INPUTS, 1.0);
    for row in values.chunks_mut(INPUTS) {
        for i in 1..INPUTS {
            row[i] = 0.8 * row[i - 1] + 0.6 * row[i];
        }
    }
    matrix(&values, INPUTS, device)
}

fn error(w_hat: &Tensor<2>, w: &Tensor<2>, x: &Tensor<2>) -> f64 {
    let change = x.clone().matmul((w_hat.clone() - w.clone()).transpose());
    f64::from(change.square().mean().into_scalar::<f32>())
}

/// Errors on known and fresh inputs, relative to round-to-nearest's.
fn relative(method: &str, seed: u64, rows: usize) -> [f64; 2] {
    let device = Device::flex().autodiff();
    let w = matrix(&noise(seed, OUT * INPUTS, 0.1), INPUTS, &device);
    let (known, fresh) = (inputs(seed + 1, rows, &device), inputs(seed + 2, 1024, &device));
    let spec = asymmetric(3);
    let target = known.clone().matmul(w.clone().transpose());
    let mut linear: Linear = started(method, &spec, &w);
    let mut optimizer = Optimizer::new(&OptimizerConfig::default());
    let schedule = ScheduleConfig::default();
    for step in 0..STEPS {
        let rate = 5e-3 * schedule.factor(step, STEPS);
        let (next, _) = train::step(linear, &mut optimizer, 1, &|_| rate, |linear, _| {
            Ok((linear.forward(known.clone()) - target.clone()).square().mean())
        })
        .unwrap();
        linear = next;
    }
    let learned = linear.weight.val().transpose();
    let rtn = rounded(&spec, &super::min_max(true), &w).dequantize();
    let rtn = matrix(&rtn, INPUTS, &device);
    [&known, &fresh].map(|x| error(&learned, &w, x) / error(&rtn, &w, x))
}

#[test]
fn learned_rounding_generalizes() {
    for rows in [48, 256] {
        let mut gaps = [0.0; 2];
        for seed in [100, 200, 300, 400] {
            for (method, gap) in ["flexround = {}", "lrq = { rank = 8 }"].iter().zip(&mut gaps) {
                let [known, fresh] = relative(method, seed, rows);
                assert!(known < 0.8, "{method}, {rows} rows, seed {seed}: {known} on known inputs");
                assert!(fresh < 1.0, "{method}, {rows} rows, seed {seed}: {fresh} on fresh ones");
                *gap += fresh / known / 4.0;
            }
        }
        let [flexround, lrq] = gaps;
        assert!(lrq <= flexround * 1.01, "{rows} rows: gap {lrq} of LRQ, {flexround} of FlexRound");
    }
}
