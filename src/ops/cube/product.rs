//! Products of few activations with packed codes: no weight is written to memory, a plane sums a row.

use burn::tensor::{Int, Tensor};
use burn_cubecl::cubecl;
use cubecl::prelude::*;

use super::coded::{Decoded, code_at, scales_of, value};
use super::{by_row, contiguous, empty, launch, row_of_plane};
use crate::ops::additive::Additive;
use crate::ops::bridge::Plain;

/// Activations up to which products are computed on the codes: a unit holds a sum for each. Decoded weights are
/// written and read again in 4 bytes each, whatever the number of activations. Not measured on a card.
pub(in crate::ops) const FEW: usize = 8;

/// Codes of the shortest run that ends where a word does; what a unit reads at a time.
pub(in crate::ops) fn codes_in_piece(bits: u8) -> usize {
    32 * words_in_piece(bits) / usize::from(bits)
}

fn words_in_piece(bits: u8) -> usize {
    usize::from(bits) >> u32::from(bits).trailing_zeros()
}

/// `x Wᵀ`, `[n, rows]`, of weights as [`decode`](super::decode) makes them, added up in another order.
///
/// # Shapes
/// - x: `[n, columns]`, `n` at most [`FEW`]
/// - words: `[rows, words per row]`
/// - scale: `[groups, 1]` or `[groups, bits]`, shift: `[groups, 1]`; pieces lie in one group
pub(in crate::ops) fn product(
    [x, scale, shift]: [Tensor<2>; 3],
    words: Tensor<2, Int>,
    bits: u8,
    decoded: Decoded,
) -> Plain {
    let ([n, columns], [rows, stride]) = (x.dims(), words.dims());
    let [groups, _] = shift.dims();
    let [x, scale, shift] = [x, scale, shift].map(Tensor::into_dispatch);
    let (piece, words_of_piece) = (codes_in_piece(bits), words_in_piece(bits));
    let inputs = [words.into_dispatch(), x, scale, shift];
    let [out] = launch("fewbit_product", inputs, [vec![n, rows]], move |inputs| {
        let [words, x, scale, shift] = contiguous(inputs);
        let out = empty(&x, [n, rows]);
        let (count, dim) = by_row(&x, rows);
        product_kernel::launch(
            &out.client,
            count,
            dim,
            words.into_buffer_arg(),
            x.into_buffer_arg(),
            scale.into_buffer_arg(),
            shift.into_buffer_arg(),
            out.clone().into_buffer_arg(),
            rows,
            columns,
            stride,
            rows * columns / groups,
            n,
            piece,
            words_of_piece,
            u32::from(bits),
            decoded.kind(),
        );
        [out]
    });
    out
}

/// As [`product`], of additive codebooks.
///
/// # Shapes
/// - x: `[n, inputs]`, `n` at most [`FEW`]
/// - words: `[rows, words per row]`, codes of a run of inputs one after the other
/// - scale: `[groups, 1]`, runs lie in one group
/// - books: `[books * centroids, vector]`
pub(in crate::ops) fn product_of_codebooks(
    [x, scale, books]: [Tensor<2>; 3],
    words: Tensor<2, Int>,
    bits: u8,
    additive: Additive,
) -> Plain {
    let ([n, columns], [rows, stride]) = (x.dims(), words.dims());
    let ([groups, _], [centroids, _]) = (scale.dims(), books.dims());
    let [x, scale, books] = [x, scale, books].map(Tensor::into_dispatch);
    let inputs = [words.into_dispatch(), x, scale, books];
    let [out] = launch("fewbit_product_of_codebooks", inputs, [vec![n, rows]], move |inputs| {
        let [words, x, scale, books] = contiguous(inputs);
        let out = empty(&x, [n, rows]);
        let (count, dim) = by_row(&x, rows);
        codebook_kernel::launch(
            &out.client,
            count,
            dim,
            words.into_buffer_arg(),
            x.into_buffer_arg(),
            scale.into_buffer_arg(),
            books.into_buffer_arg(),
            out.clone().into_buffer_arg(),
            rows,
            columns,
            stride,
            rows * columns / groups,
            centroids / additive.books,
            n,
            additive.books,
            additive.vector,
            u32::from(bits),
        );
        [out]
    });
    out
}

#[cube(launch)]
fn product_kernel(
    words: &[u32],
    x: &[f32],
    scale: &[f32],
    shift: &[f32],
    out: &mut [f32],
    rows: usize,
    columns: usize,
    stride: usize,
    group_len: usize,
    #[comptime] n: usize,
    #[comptime] piece: usize,
    #[comptime] words_of_piece: usize,
    #[comptime] bits: u32,
    #[comptime] kind: u32,
) {
    let row = row_of_plane();
    if row >= rows {
        terminate!();
    }
    let mut sums = zeros(n);
    let mut at = UNIT_POS_X as usize;
    while at * piece < columns {
        let first = at * piece;
        let group = (row * columns + first) / group_len;
        let scales = scales_of(scale, group, bits, kind);
        let shift = shift[group];
        let word = row * stride + at * words_of_piece;
        #[unroll]
        for i in 0..piece {
            // The last piece of a row may be a part of one.
            if first + i < columns {
                let code = code_at(words, word, i * comptime!(bits as usize), bits);
                let weight = value(code, &scales, shift, bits, kind);
                add(&mut sums, x, first + i, columns, weight, n);
            }
        }
        at += CUBE_DIM_X as usize;
    }
    write(&sums, out, row, rows, n);
}

#[cube(launch)]
fn codebook_kernel(
    words: &[u32],
    x: &[f32],
    scale: &[f32],
    books: &[f32],
    out: &mut [f32],
    rows: usize,
    columns: usize,
    stride: usize,
    group_len: usize,
    centroids: usize,
    #[comptime] n: usize,
    #[comptime] count: usize,
    #[comptime] vector: usize,
    #[comptime] bits: u32,
) {
    let row = row_of_plane();
    if row >= rows {
        terminate!();
    }
    let mut sums = zeros(n);
    let mut run = UNIT_POS_X as usize;
    while run * vector < columns {
        let first = run * vector;
        let scale = scale[(row * columns + first) / group_len];
        let mut weights = zeros(vector);
        #[unroll]
        for book in 0..count {
            let bit = (run * count + book) * comptime!(bits as usize);
            let code = code_at(words, row * stride, bit, bits) as usize;
            let centroid = (book * centroids + code) * vector;
            #[unroll]
            for i in 0..vector {
                weights[i] += books[centroid + i];
            }
        }
        #[unroll]
        for i in 0..vector {
            add(&mut sums, x, first + i, columns, weights[i] * scale, n);
        }
        run += CUBE_DIM_X as usize;
    }
    write(&sums, out, row, rows, n);
}

#[cube]
fn zeros(#[comptime] len: usize) -> Array<f32> {
    let mut zeros = Array::<f32>::new(len);
    #[unroll]
    for i in 0..len {
        zeros[i] = 0.0f32;
    }
    zeros
}

/// Adds what a weight of one column gives to the sum of each row of `x`.
#[cube]
fn add(
    sums: &mut Array<f32>,
    x: &[f32],
    column: usize,
    columns: usize,
    weight: f32,
    #[comptime] n: usize,
) {
    #[unroll]
    for i in 0..n {
        sums[i] += weight * x[i * columns + column];
    }
}

/// The sums of all units of a plane, as column `row` of the result.
#[cube]
fn write(sums: &Array<f32>, out: &mut [f32], row: usize, rows: usize, #[comptime] n: usize) {
    #[unroll]
    for i in 0..n {
        let sum = plane_sum(sums[i]);
        if UNIT_POS_X == 0 {
            out[i * rows + row] = sum;
        }
    }
}
