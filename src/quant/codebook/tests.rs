use proptest::prelude::*;

use super::*;
use crate::quant::{
    Additive, Bits, Grid, GroupAxis, GroupLayout, Hessian, QuantizedWeight, ScaleDType,
};

/// Numbers in -1..1 that need no generator crate.
fn noise(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next() + next() + next()).collect()
}

/// Of inputs that share some directions, each with its own size.
fn hessian(inputs: usize, seed: u32) -> Hessian {
    let (tokens, shared) = (3 * inputs, inputs.div_ceil(4));
    let [common, own] = [noise(tokens * shared, seed + 1), noise(tokens * inputs, seed + 2)];
    let (mix, size) = (noise(inputs * shared, seed + 3), noise(inputs, seed + 4));
    let value = |at: usize| {
        let (t, j) = (at / inputs, at % inputs);
        let mixed = (0..shared).map(|k| common[t * shared + k] * mix[j * shared + k]);
        (mixed.sum::<f32>() + own[at]) * (0.2 + size[j].abs())
    };
    let mut hessian = Hessian::new(inputs);
    hessian.add(&(0..tokens * inputs).map(value).collect::<Vec<f32>>());
    hessian
}

fn layout([out, inputs]: [usize; 2], group_len: usize) -> GroupLayout {
    let groups = out * inputs / group_len;
    GroupLayout { out, inputs, groups, group_len, axis: GroupAxis::In }
}

fn options(books: usize, vector: usize, bits: u8) -> CodebookOptions {
    CodebookOptions {
        additive: Additive { books, vector },
        bits: Bits::new(bits).unwrap(),
        rounds: 6,
        beam: 2,
        damping: 0.01,
        seed: 0,
    }
}

fn weight(found: &Solved, layout: GroupLayout, options: &CodebookOptions) -> QuantizedWeight {
    let (scale, books) = (found.scale.clone(), found.books.clone());
    let grid = Grid::Codebook { scale, books, additive: options.additive };
    let Additive { books, vector } = options.additive;
    let bits = usize::from(options.bits.get()) * books / vector;
    let bits = Bits::new(bits as u8).unwrap();
    QuantizedWeight::of_codebooks(&found.codes, grid, options.bits, bits, layout).unwrap()
}

fn error(weight: &[f32], found: &[f32], hessian: &Hessian, out: usize) -> f64 {
    let left: Vec<f32> = weight.iter().zip(found).map(|(w, v)| w - v).collect();
    hessian.weighted_error(&left, out)
}

#[test]
fn the_output_error_is_far_below_that_of_residual_k_means() {
    for (shape, group, options) in [
        ([48, 64], 32, options(1, 2, 4)),
        ([64, 96], 96, options(2, 4, 4)),
        ([64, 64], 64, options(1, 4, 8)),
    ] {
        let (plain, layout) = (noise(shape[0] * shape[1], 7), layout(shape, group));
        let inputs = hessian(shape[1], 11);
        let of = |rounds| {
            let options = CodebookOptions { rounds, ..options };
            let found = solve(&plain, &layout, &inputs, &options).unwrap();
            let values = weight(&found, layout, &options).dequantize();
            error(&plain, &values, &inputs, shape[0])
        };
        let (start, end) = (of(0), of(6));
        assert!(end < 0.5 * start, "{end} of {start}");
    }
}

#[test]
fn threads_change_nothing() {
    let (plain, layout) = (noise(150 * 64, 3), layout([150, 64], 32));
    let (inputs, options) = (hessian(64, 5), options(2, 4, 4));
    let of = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| solve(&plain, &layout, &inputs, &options).unwrap())
    };
    let (one, three) = (of(1), of(3));
    assert_eq!(one.codes, three.codes);
    let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<u32>>();
    assert_eq!(bits(&one.books), bits(&three.books));
    assert_eq!(bits(&one.scale), bits(&three.scale));
}

#[test]
fn a_weight_of_centroids_is_found_again() {
    // Four corners, each group with a scale of its own.
    let corners = [[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0f32]];
    let codes: Vec<usize> =
        noise(8 * 16, 9).iter().map(|x| (x.to_bits() >> 4) as usize & 3).collect();
    let plain: Vec<f32> = codes
        .iter()
        .enumerate()
        .flat_map(|(at, code)| corners[*code].map(|c| c * (1.0 + (at / 4 % 3) as f32)))
        .collect();
    let (layout, inputs) = (layout([8, 32], 8), hessian(32, 2));
    let options = options(1, 2, 2);
    let found = solve(&plain, &layout, &inputs, &options).unwrap();
    let values = weight_of(&found, layout, &options);
    assert!(plain.iter().zip(values).all(|(w, v)| (w - v).abs() < 2e-3));
}

fn weight_of(found: &Solved, layout: GroupLayout, options: &CodebookOptions) -> Vec<f32> {
    let grid = Grid::Codebook {
        scale: found.scale.clone(),
        books: found.books.clone(),
        additive: options.additive,
    };
    let bits = Bits::new(1).unwrap();
    let made = QuantizedWeight::of_codebooks(&found.codes, grid, options.bits, bits, layout);
    made.unwrap().dequantize()
}

#[test]
fn what_no_token_entered_is_judged_by_its_weights() {
    let (plain, layout) = (noise(32 * 32, 3), layout([32, 32], 32));
    let (nothing, options) = (Hessian::new(32), options(1, 2, 4));
    let found = solve(&plain, &layout, &nothing, &options).unwrap();
    let values = weight(&found, layout, &options).dequantize();
    let squares = |values: &mut dyn Iterator<Item = f32>| values.map(|v| v * v).sum::<f32>();
    let left = squares(&mut plain.iter().zip(&values).map(|(w, v)| w - v));
    assert!(left < 0.15 * squares(&mut plain.iter().copied()), "{left}");
}

#[test]
fn what_cannot_be_is_refused() {
    let (plain, inputs) = (noise(8 * 16, 1), hessian(16, 1));
    let ask = |layout: GroupLayout, options: CodebookOptions| {
        solve(&plain, &layout, &inputs, &options).unwrap_err().to_string()
    };
    let text = ask(layout([8, 16], 16), options(1, 4, 8));
    assert!(text.contains("256 centroids for 32 vectors"), "{text}");
    let text = ask(layout([8, 16], 2), options(1, 4, 4));
    assert!(text.contains("runs of 4 inputs do not fill groups of 2"), "{text}");
    assert!(ask(layout([8, 8], 8), options(1, 4, 4)).contains("disagree"));
}

#[test]
fn codebook_bits() {
    // CodeGEMM's configurations: 2.125, 2.125 and 2.5 bits a weight beside their codebooks.
    for (books, vector, group, expected) in
        [(2, 8, 128, 2.125), (1, 4, 128, 2.125), (1, 4, 32, 2.5)]
    {
        let (additive, layout) = (Additive { books, vector }, layout([64, 256], group));
        let grid = Grid::Codebook {
            scale: vec![0.5; layout.groups],
            books: vec![0.25; books * 256 * vector],
            additive,
        };
        let codes = vec![3; 64 * additive.codes(256)];
        let eight = Bits::EIGHT;
        let weight = QuantizedWeight::of_codebooks(&codes, grid, eight, Bits::TWO, layout).unwrap();
        let beside = (16 * books * 256 * vector) as f64 / 16384.0;
        assert!((weight.bits_per_weight() - beside - expected).abs() < 1e-12);
        assert_eq!(weight.histogram().0[3], codes.len() as u64);
        assert_eq!(weight.histogram().0.len(), 256);
        // Scales that half precision does not hold take 32 bits.
        let long = Grid::Codebook {
            scale: vec![0.1; layout.groups],
            books: vec![0.25; books * 256 * vector],
            additive,
        };
        let long = QuantizedWeight { grid: long, ..weight };
        let expected = expected + 16.0 / group as f64;
        assert!((long.bits_per_weight() - beside - expected).abs() < 1e-12);
    }
}

#[test]
fn weights_by_hand() {
    let additive = Additive { books: 2, vector: 2 };
    let books = vec![1.0, 0.0, 0.5, -0.5, 0.25, 0.25, -1.0, 2.0];
    let grid = Grid::Codebook { scale: vec![3.0, -2.0], books, additive };
    let (layout, one) = (layout([1, 4], 2), Bits::new(1).unwrap());
    let weight = QuantizedWeight::of_codebooks(&[1, 0, 0, 1], grid, one, one, layout).unwrap();
    assert_eq!(weight.dequantize(), [2.25, -0.75, 0.0, -4.0]);
    let damaged = |change: &dyn Fn(&mut QuantizedWeight)| {
        let mut damaged = weight.clone();
        change(&mut damaged);
        damaged.checked().is_err()
    };
    assert!(damaged(&|w| w.bits = Bits::TWO));
    assert!(damaged(&|w| w.layout.axis = GroupAxis::Out));
    assert!(damaged(&|w| {
        let Grid::Codebook { books, .. } = &mut w.grid else { return };
        books[0] = f32::NAN;
    }));
    assert!(damaged(&|w| {
        let Grid::Codebook { books, .. } = &mut w.grid else { return };
        books.pop();
    }));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn the_error_never_grows(
        books in 1usize..=3,
        vector in prop::sample::select(vec![1usize, 2, 4]),
        bits in 1u8..=4,
        beam in 1usize..=4,
        groups in 1usize..=3,
        seed in 0u32..1000,
    ) {
        let (out, inputs) = (20, 8 * groups);
        let (plain, layout) = (noise(out * inputs, seed), layout([out, inputs], 8));
        let options = CodebookOptions { beam, ..options(books, vector, bits) };
        let found = solve(&plain, &layout, &hessian(inputs, seed), &options).unwrap();
        prop_assert!(found.errors.windows(2).all(|pair| pair[1] <= pair[0]), "{:?}", found.errors);
        prop_assert!(ScaleDType::of(&found.books) == ScaleDType::F16);
        prop_assert!(found.scale.iter().all(|scale| scale.is_finite()));
    }
}
