//! Rounding to bf16 up or down by chance: a unit for each value.

use burn_cubecl::cubecl;
use cubecl::prelude::*;

use super::{by_element, contiguous, empty, launch};
use crate::ops::bridge::Plain;
use crate::ops::stochastic::{Chance, LEAST, ROUNDS};

/// The values rounded; the row-major place of each decides by what chance.
pub(in crate::ops) fn round_to_bf16(x: Plain, shape: Vec<usize>, chance: &Chance) -> Plain {
    // A round's factor has 15 bits, and what is added 16.
    let rounds = chance.rounds().map(|[factor, added]| factor << 16 | added);
    let [out] = launch("fewbit_round_to_bf16", [x], [shape.clone()], move |inputs| {
        let [x] = contiguous(inputs);
        let out = empty(&x, shape.clone());
        let (count, dim) = by_element(&out, shape.iter().product());
        let [a, b, c, d, e, f] = rounds;
        round_kernel::launch(
            &out.client,
            count,
            dim,
            x.into_buffer_arg(),
            out.clone().into_buffer_arg(),
            a,
            b,
            c,
            d,
            e,
            f,
        );
        [out]
    });
    out
}

const _: () = assert!(ROUNDS == 6, "the kernel has an argument for each round");

#[cube(launch)]
fn round_kernel(x: &[f32], out: &mut [f32], a: u32, b: u32, c: u32, d: u32, e: u32, f: u32) {
    let at = ABSOLUTE_POS as usize;
    if at >= out.len() {
        terminate!();
    }
    let place = at as u32;
    // Each round mixes one half of the place by the other; they take turns.
    let mut left = place >> 16u32;
    let mut right = place & 0xffffu32;
    left ^= mixed(right, a);
    right ^= mixed(left, b);
    left ^= mixed(right, c);
    right ^= mixed(left, d);
    left ^= mixed(right, e);
    right ^= mixed(left, f);
    let draw = right;
    let bits = u32::reinterpret(x[at]);
    let magnitude = bits & 0x7fff_ffffu32;
    let moved = (magnitude + draw) & 0xffff_0000u32;
    // Infinite stays so, and what is no number gets its quiet bit.
    let moved = select(magnitude > 0x7f80_0000u32, 0x7fc0_0000u32, moved);
    let moved = moved | (bits & 0x8000_0000u32);
    let least = comptime!(LEAST.to_bits());
    out[at] = f32::reinterpret(select(magnitude < least, 0u32, moved));
}

/// What a round adds to the other half.
#[cube]
fn mixed(half: u32, round: u32) -> u32 {
    let product = ((half + (round & 0xffffu32)) & 0xffffu32) * (round >> 16u32);
    (product ^ (product >> 15u32)) & 0xffffu32
}
