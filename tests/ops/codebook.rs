//! Codes of additive codebooks: weights, products, and gradients of inputs, scales and centroids.

use burn::tensor::{Device, Tensor};
use fewbit::ops::{Additive, CodedKind, CodedMatrix, FrozenGrid, PackedCodes, continuing};
use proptest::prelude::*;

use crate::{Dice, Matrix, Outcome, Sum, cases, close, host, place, same};

const TOKENS: usize = 3;

#[derive(Debug)]
struct Case {
    /// `[rows, inputs / vector, books]`.
    codes: Vec<u8>,
    rows: usize,
    columns: usize,
    group_len: usize,
    width: u8,
    additive: Additive,
    /// x, scale, codebooks.
    inputs: [Matrix; 3],
    upstream: Vec<f32>,
}

impl Case {
    fn new(width: u8, seed: u64) -> Self {
        let mut dice = Dice::new(seed);
        let additive = Additive { books: 1 + dice.below(3), vector: dice.one_of(&[1, 2, 4, 5, 8]) };
        let rows = 1 + dice.below(70);
        let part = additive.vector * (1 + dice.below(9));
        let columns = part * (1 + dice.below(3));
        let group_len = dice.one_of(&[part, columns]);
        let codes = rows * additive.codes(columns);
        let centroids = additive.books << width;
        Self {
            codes: (0..codes).map(|_| dice.below(1 << width) as u8).collect(),
            rows,
            columns,
            group_len,
            width,
            additive,
            inputs: [
                dice.matrix([TOKENS, columns], 1.0),
                dice.matrix([rows * columns / group_len, 1], 1.0),
                dice.matrix([centroids, additive.vector], 1.0),
            ],
            upstream: dice.noise(TOKENS * rows, 1.0),
        }
    }

    fn matrix(&self, device: &Device) -> CodedMatrix {
        let codes = PackedCodes::pack(&self.codes, self.additive.codes(self.columns), self.width);
        let kind = CodedKind::Codebook(self.additive);
        CodedMatrix::new(codes, self.group_len, kind, false, device)
    }

    /// Where in the codebooks the numbers lie whose sum weight `[o, k]` is.
    fn places(&self, o: usize, k: usize) -> Vec<usize> {
        let Additive { books, vector } = self.additive;
        let run = (o * self.columns + k) / vector * books;
        let of = |(book, code): (usize, &u8)| {
            ((book << self.width) + usize::from(*code)) * vector + k % vector
        };
        self.codes[run..run + books].iter().enumerate().map(of).collect()
    }

    fn sum(&self, o: usize, k: usize) -> f32 {
        let numbers = self.places(o, k).into_iter().map(|at| self.inputs[2].values[at]);
        numbers.reduce(|sum, number| sum + number).unwrap()
    }

    fn group(&self, o: usize, k: usize) -> usize {
        (o * self.columns + k) / self.group_len
    }

    fn value(&self, o: usize, k: usize) -> f32 {
        self.inputs[1].values[self.group(o, k)] * self.sum(o, k)
    }
}

fn check(case: &Case) {
    let Case { rows, columns, ref upstream, .. } = *case;
    let x = &case.inputs[0];
    let output: Vec<Sum> = (0..TOKENS * rows)
        .map(|i| {
            let of = |k| x.at(i / rows, k) * f64::from(case.value(i % rows, k));
            (0..columns).map(of).collect()
        })
        .collect();
    let up = |n: usize, o: usize| f64::from(upstream[n * rows + o]);
    let of_x: Vec<Sum> = (0..TOKENS * columns)
        .map(|i| {
            let of = |o| up(i / columns, o) * f64::from(case.value(o, i % columns));
            (0..rows).map(of).collect()
        })
        .collect();
    let mut of_scale = vec![Sum::default(); case.inputs[1].values.len()];
    let mut of_books = vec![Sum::default(); case.inputs[2].values.len()];
    for (o, k) in (0..rows * columns).map(|i| (i / columns, i % columns)) {
        let group = case.group(o, k);
        for n in 0..TOKENS {
            let term = up(n, o) * x.at(n, k);
            of_scale[group].add(term * f64::from(case.sum(o, k)));
            for place in case.places(o, k) {
                of_books[place].add(term * f64::from(case.inputs[1].values[group]));
            }
        }
    }
    let f = |[x, scale, books]: [Tensor<2>; 3]| case.matrix(&x.device()).linear(x, scale, books);
    for found in Outcome::both(&case.inputs, upstream, f) {
        close("output", &found.values, &output, 3e-6);
        let exact = [&of_x, &of_scale, &of_books];
        for ((name, found), exact) in
            ["x", "scale", "books"].iter().zip(&found.gradients).zip(exact)
        {
            close(name, found, exact, 2e-5);
        }
    }
    // The next token of each text, looked up in the products of centroids: a weight that is small may be a
    // difference of large ones there.
    let [_, scales, numbers] = &case.inputs;
    let looked_up: Vec<Sum> = (0..TOKENS * rows)
        .map(|i| {
            let (n, o) = (i / rows, i % rows);
            let of = |(k, at): (usize, usize)| {
                let scale = f64::from(scales.values[case.group(o, k)]);
                x.at(n, k) * scale * f64::from(numbers.values[at])
            };
            let places = |k| case.places(o, k).into_iter().map(move |at| (k, at));
            (0..columns).flat_map(places).map(of).collect()
        })
        .collect();
    let device = place();
    let [x, scale, books] = case.inputs.each_ref().map(|input| input.on(&device));
    let (x, matrix) = (x.reshape([TOKENS, 1, columns]), case.matrix(&device));
    let frozen = FrozenGrid::default();
    for _ in 0..2 {
        let values = || [scale.clone(), books.clone()];
        let found = continuing(&device, || matrix.linear_frozen(x.clone(), &frozen, values));
        close("looked up", &host(found), &looked_up, 5e-6);
    }
    // The weights alone: the same bits in both forms.
    let expected: Vec<f32> =
        (0..rows * columns).map(|i| case.value(i / columns, i % columns)).collect();
    let grid = [case.inputs[1].clone(), case.inputs[2].clone()];
    let upstream: Vec<f32> = (0..rows * columns).map(|i| (i as f32 * 0.7).sin()).collect();
    let f = |[scale, books]: [Tensor<2>; 2]| case.matrix(&scale.device()).weight(scale, books);
    let mut of_books = vec![Sum::default(); case.inputs[2].values.len()];
    for (i, up) in upstream.iter().enumerate() {
        let (o, k) = (i / columns, i % columns);
        for place in case.places(o, k) {
            of_books[place]
                .add(f64::from(*up) * f64::from(case.inputs[1].values[case.group(o, k)]));
        }
    }
    for found in Outcome::both(&grid, &upstream, f) {
        same("weights", &found.values, &expected);
        close("books", &found.gradients[1], &of_books, 3e-6);
    }
}

proptest! {
    #![proptest_config(cases(256))]

    #[test]
    fn codebooks(width in 1u8..=8, seed in any::<u64>()) {
        check(&Case::new(width, seed));
    }
}
