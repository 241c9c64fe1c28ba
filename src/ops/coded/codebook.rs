//! Weights of additive codebooks and gradients of scales and centroids, composed of burn's operations.

use burn::tensor::{IndexingUpdateOp, Int, Tensor};

use crate::ops::additive::Additive;

/// Codebooks, and the places of the centroids of each run in them.
type Sums<'a> = (Additive, &'a [Tensor<1, Int>]);

/// Sums of centroids, `[runs, vector]`.
fn sums(books: &Tensor<2>, places: &[Tensor<1, Int>]) -> Tensor<2> {
    let each = places.iter().map(|places| books.clone().select(0, places.clone()));
    each.reduce(|sum, centroids| sum + centroids).unwrap_or_else(|| books.clone())
}

/// The weights, `[groups, group_len]`.
pub(super) fn values(
    scale: &Tensor<2>,
    books: &Tensor<2>,
    (additive, places): Sums<'_>,
) -> Tensor<2> {
    let [groups, _] = scale.dims();
    let runs = places.first().map_or(0, |places| places.dims()[0]);
    let len = runs * additive.vector / groups.max(1);
    sums(books, places).reshape([groups, len]) * scale.clone()
}

/// Gradients of scales, `[groups, 1]`, and codebooks, from that of the weights.
pub(super) fn gradients(
    of_weight: &Tensor<2>,
    scale: &Tensor<2>,
    books: &Tensor<2>,
    (additive, places): Sums<'_>,
) -> (Tensor<2>, Tensor<2>) {
    let [groups, _] = scale.dims();
    let [rows, columns] = of_weight.dims();
    let len = rows * columns / groups;
    let of_weight = of_weight.clone().reshape([groups, len]);
    let of_scale = (of_weight.clone() * sums(books, places).reshape([groups, len])).sum_dim(1);
    let of_runs =
        (of_weight * scale.clone()).reshape([rows * columns / additive.vector, additive.vector]);
    let add = |sum: Tensor<2>, places: &Tensor<1, Int>| {
        sum.select_assign(0, places.clone(), of_runs.clone(), IndexingUpdateOp::Add)
    };
    let of_books = places.iter().fold(books.zeros_like(), add);
    (of_scale, of_books)
}
