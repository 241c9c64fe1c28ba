//! The gated activation of the MLP, with its gradients.

use rayon::prelude::*;

use super::min_tasks;
use crate::ops::vector::{self, Level, at};

/// Elements of one task.
const CHUNK: usize = 1 << 13;

/// `out = silu(gate) * up`, all of one length.
pub(crate) fn swiglu(gate: &[f32], up: &[f32], out: &mut [f32]) {
    forward(Level::best(), gate, up, out);
}

/// The gradients of gate and up, overwritten.
pub(crate) fn swiglu_backward(
    d: &[f32],
    gate: &[f32],
    up: &[f32],
    dgate: &mut [f32],
    dup: &mut [f32],
) {
    backward(Level::best(), [d, gate, up], dgate, dup);
}

fn forward(level: Level, gate: &[f32], up: &[f32], out: &mut [f32]) {
    debug_assert!(gate.len() == out.len() && up.len() == out.len());
    let small = min_tasks(out.len());
    out.par_chunks_mut(CHUNK)
        .zip(gate.par_chunks(CHUNK).zip(up.par_chunks(CHUNK)))
        .with_min_len(small)
        .for_each(|(out, (gate, up))| {
            at!(level, forward_chunk(gate, up, out));
        });
}

#[inline(always)]
#[allow(clippy::inline_always)] // compiled for the caller's instruction set
fn forward_chunk(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
        *out = gate / (1.0 + vector::exp(-gate)) * up;
    }
}

fn backward(level: Level, [d, gate, up]: [&[f32]; 3], dgate: &mut [f32], dup: &mut [f32]) {
    debug_assert!([d.len(), gate.len(), up.len(), dup.len()] == [dgate.len(); 4]);
    let small = min_tasks(d.len());
    dgate
        .par_chunks_mut(CHUNK)
        .zip(dup.par_chunks_mut(CHUNK))
        .zip(d.par_chunks(CHUNK).zip(gate.par_chunks(CHUNK).zip(up.par_chunks(CHUNK))))
        .with_min_len(small)
        .for_each(|((dgate, dup), (d, (gate, up)))| {
            at!(level, backward_chunk([d, gate, up], dgate, dup));
        });
}

#[inline(always)]
#[allow(clippy::inline_always)] // compiled for the caller's instruction set
fn backward_chunk([d, gate, up]: [&[f32]; 3], dgate: &mut [f32], dup: &mut [f32]) {
    let inputs = d.iter().zip(gate).zip(up);
    for ((dgate, dup), ((d, gate), up)) in dgate.iter_mut().zip(dup).zip(inputs) {
        let decay = vector::exp(-gate);
        let open = 1.0 / (1.0 + decay);
        // `1 - open` without its cancellation; where the decay is infinite, `open` is 0.
        let shut = decay.min(f32::MAX) * open;
        *dgate = d * up * (open * (1.0 + gate * shut));
        *dup = d * (gate * open);
    }
}

#[cfg(test)]
mod tests {
    use super::super::sample::{assert_same, bits, noise};
    use super::*;

    const LENGTHS: [usize; 9] = [0, 1, 7, 15, 16, 17, 33, 100, 70_001];

    #[track_caller]
    fn assert_close(found: f32, exact: f64, size: f64) {
        assert!((f64::from(found) - exact).abs() <= 5e-7 * size, "{found} for {exact}");
    }

    #[test]
    fn values_and_gradients_are_exact_enough() {
        for len in LENGTHS {
            let [gate, up, d] = [noise(len, 0.1, 20.0), noise(len, 0.4, 3.0), noise(len, 0.8, 2.0)];
            let [mut out, mut dgate, mut dup] = [(); 3].map(|()| vec![f32::NAN; len]);
            swiglu(&gate, &up, &mut out);
            swiglu_backward(&d, &gate, &up, &mut dgate, &mut dup);
            for i in 0..len {
                let [gate, up, d] = [gate[i], up[i], d[i]].map(f64::from);
                let open = 1.0 / (1.0 + (-gate).exp());
                let silu = gate * open;
                assert_close(out[i], silu * up, (silu * up).abs());
                assert_close(dup[i], d * silu, (d * silu).abs());
                let slope = open * (1.0 + gate * (1.0 - open));
                assert_close(dgate[i], d * up * slope, (d * up).abs());
            }
        }
    }

    #[test]
    fn the_ends_are_finite() {
        let gate = [-3e38, -200.0, -88.5, -0.0, 0.0, 88.5, 200.0, 3e38];
        let [mut out, mut dgate, mut dup] = [[f32::NAN; 8]; 3];
        swiglu(&gate, &[1.0; 8], &mut out);
        swiglu_backward(&[1.0; 8], &gate, &[1.0; 8], &mut dgate, &mut dup);
        for (i, gate) in gate.into_iter().enumerate() {
            let far = if gate > 0.0 { gate } else { 0.0 };
            assert!((out[i] - far).abs() < 1e-30 && (dup[i] - far).abs() < 1e-30);
            let slope = if gate == 0.0 { 0.5 } else { f32::from(gate > 0.0) };
            assert!((dgate[i] - slope).abs() < 1e-30, "{} at {gate}", dgate[i]);
        }
    }

    #[test]
    fn every_instruction_set_and_number_of_threads_gives_the_same_bits() {
        for len in LENGTHS {
            let [gate, up, d] = [noise(len, 0.1, 90.0), noise(len, 0.4, 3.0), noise(len, 0.8, 2.0)];
            assert_same(&format!("{len} entries"), |level| {
                let [mut out, mut dgate, mut dup] = [(); 3].map(|()| vec![0.0; len]);
                forward(level, &gate, &up, &mut out);
                backward(level, [&d, &gate, &up], &mut dgate, &mut dup);
                bits(&[out, dgate, dup].concat())
            });
        }
    }
}
