//! Second moments of a linear's inputs: the Hessian of its squared output error.
//!
//! For `|X w - X w'|^2` the Hessian in the weights of one row is `2 X^T X`, the same for every
//! row. It is gathered in f64 over the calibration tokens and scaled by their number, as in GPTQ
//! (Frantar et al., arXiv 2210.17323); [`Hessian::inverse_factor`] gives the triangular factor
//! that GPTQ walks through.

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor::{
    LltRegularization, cholesky_in_place, cholesky_in_place_scratch,
};
use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::linalg::triangular_inverse::invert_lower_triangular;
use faer::{Accum, Mat, MatRef, Par, Spec};

use crate::error::{Error, Result};

/// Rows converted to f64 and multiplied at a time: enough for a fast product, little memory.
const CHUNK: usize = 1024;

/// `(2 / tokens) * sum of x x^T` over the inputs `x` of a linear, gathered as they come.
#[derive(Clone, Debug)]
pub struct Hessian {
    size: usize,
    /// Sum of `x x^T`; only the lower triangle is kept up.
    sum: Mat<f64>,
    tokens: u64,
}

impl Hessian {
    /// An empty sum for inputs of `size` features; takes `8 * size^2` bytes.
    pub fn new(size: usize) -> Self {
        Self { size, sum: Mat::zeros(size, size), tokens: 0 }
    }

    /// Adds inputs: `rows` is `[tokens, size]`, row-major.
    ///
    /// # Panics
    /// When `rows` is no whole number of rows.
    pub fn add(&mut self, rows: &[f32]) {
        let size = self.size.max(1);
        assert!(rows.len().is_multiple_of(size), "{} numbers in rows of {size}", rows.len());
        let mut chunk = Vec::with_capacity(rows.len().min(size * CHUNK));
        for rows in rows.chunks(size * CHUNK) {
            chunk.clear();
            chunk.extend(rows.iter().map(|x| f64::from(*x)));
            // Row-major [tokens, size] is column-major [size, tokens].
            let inputs = MatRef::from_column_major_slice(&chunk, size, rows.len() / size);
            triangular::matmul(
                self.sum.as_mut(),
                BlockStructure::TriangularLower,
                Accum::Add,
                inputs,
                BlockStructure::Rectangular,
                inputs.transpose(),
                BlockStructure::Rectangular,
                1.0,
                Par::rayon(0),
            );
        }
        self.tokens += (rows.len() / size) as u64;
    }

    /// Number of inputs added.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Number of input features.
    pub fn size(&self) -> usize {
        self.size
    }

    /// The diagonal, `[size]`. A zero marks a dead column: an input that was never active.
    pub fn diagonal(&self) -> Vec<f64> {
        (0..self.size).map(|j| self.scale() * self.sum[(j, j)]).collect()
    }

    /// The whole symmetric matrix, `[size, size]`, without damping; zero before any input.
    pub fn matrix(&self) -> Mat<f64> {
        let scale = self.scale();
        Mat::from_fn(self.size, self.size, |i, j| scale * self.sum[(i.max(j), i.min(j))])
    }

    /// The upper triangular `U` with `H^-1 = U^T U`, `[size, size]`.
    ///
    /// `H` is damped first: `damping` times the mean of the measured diagonal is added to the
    /// diagonal, and a dead column gets a one instead of its zero. Then its rows and columns are
    /// put in `order`, a permutation of `0..size`: place `p` of the result is input `order[p]`.
    ///
    /// # Errors
    /// Without any input, and when the damped matrix is not positive definite.
    ///
    /// # Panics
    /// When `order` is not of length `size` or holds an index beyond it.
    pub fn inverse_factor(&self, damping: f64, order: &[usize]) -> Result<Mat<f64>> {
        assert_eq!(order.len(), self.size, "one place for each input");
        if self.tokens == 0 {
            return Err(Error::failed("the Hessian has seen no calibration token")
                .fix("add calibration text"));
        }
        let size = self.size;
        let mut matrix = self.damped_reverse(damping, order);
        let mut scratch =
            MemBuffer::new(cholesky_in_place_scratch::<f64>(size, Par::rayon(0), Spec::default()));
        let factored = cholesky_in_place(
            matrix.as_mut(),
            LltRegularization::default(),
            Par::rayon(0),
            MemStack::new(&mut scratch),
            Spec::default(),
        );
        // With J the reversal, `J H J = L L^T` gives `H^-1 = (J L^-1 J)^T (J L^-1 J)`, whose
        // factor is upper triangular: no inverse of H is ever formed.
        let mut upper = Mat::zeros(size, size);
        if factored.is_ok() {
            let lower = upper.as_mut().reverse_rows_and_cols_mut();
            invert_lower_triangular(lower, matrix.as_ref(), Par::rayon(0));
        }
        if (0..size).all(|j| upper[(j, j)].is_finite() && upper[(j, j)] > 0.0) {
            return Ok(upper);
        }
        Err(Error::failed(format!(
            "the Hessian of {} calibration tokens and {size} inputs is not positive definite with \
             damping {damping}",
            self.tokens
        ))
        .fix("a greater damping, or more calibration text"))
    }

    /// The squared output error that a weight error makes: the sum of `e^T H e` over the rows `e`
    /// of `error`, `[out, size]` row-major, with `H` un-damped.
    ///
    /// # Panics
    /// When `error` is not `[out, size]`.
    pub fn weighted_error(&self, error: &[f32], out: usize) -> f64 {
        self.row_errors(error, out).into_iter().sum()
    }

    /// The second moments of a run of inputs alone, `[len]` from `start` on.
    ///
    /// # Panics
    /// When the run goes beyond the inputs.
    #[must_use]
    pub fn block(&self, start: usize, len: usize) -> Self {
        let sum = self.sum.submatrix(start, start, len, len).to_owned();
        Self { size: len, sum, tokens: self.tokens }
    }

    /// [`Hessian::weighted_error`] of each row, `[out]`.
    ///
    /// # Panics
    /// When `error` is not `[out, size]`.
    pub fn row_errors(&self, error: &[f32], out: usize) -> Vec<f64> {
        assert_eq!(error.len(), out * self.size, "a weight error of {out} x {}", self.size);
        let size = self.size.max(1);
        let mut errors = Vec::with_capacity(out);
        for rows in error.chunks(size * CHUNK) {
            let rows: Vec<f64> = rows.iter().map(|e| f64::from(*e)).collect();
            let columns = MatRef::from_column_major_slice(&rows, size, rows.len() / size);
            let mut half = Mat::zeros(size, columns.ncols());
            triangular::matmul(
                half.as_mut(),
                BlockStructure::Rectangular,
                Accum::Replace,
                self.sum.as_ref(),
                BlockStructure::TriangularLower,
                columns,
                BlockStructure::Rectangular,
                1.0,
                Par::rayon(0),
            );
            // e^T H e is twice the lower triangle's part, which has the diagonal once too often.
            for row in 0..columns.ncols() {
                let terms = half.col_as_slice(row).iter().enumerate().map(|(j, below)| {
                    let e = columns[(j, row)];
                    e * (2.0 * below - self.sum[(j, j)] * e)
                });
                errors.push(self.scale() * terms.sum::<f64>());
            }
        }
        errors
    }

    fn scale(&self) -> f64 {
        2.0 / self.tokens.max(1) as f64
    }

    /// The damped Hessian in reverse `order`; the lower triangle only.
    fn damped_reverse(&self, damping: f64, order: &[usize]) -> Mat<f64> {
        let (size, scale) = (self.size, self.scale());
        let diagonal = self.diagonal();
        // The mean of what was measured, so that damping does not depend on the inputs' unit.
        let lambda = damping * diagonal.iter().sum::<f64>() / size.max(1) as f64;
        Mat::from_fn(size, size, |i, j| {
            let (row, column) = (order[size - 1 - i], order[size - 1 - j]);
            match i.cmp(&j) {
                std::cmp::Ordering::Less => 0.0,
                std::cmp::Ordering::Equal if diagonal[row] == 0.0 => 1.0 + lambda,
                std::cmp::Ordering::Equal => diagonal[row] + lambda,
                std::cmp::Ordering::Greater => scale * self.sum[(row.max(column), row.min(column))],
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Hessian {
        let mut hessian = Hessian::new(2);
        hessian.add(&[1.0, 0.8, 0.5, 0.9]);
        hessian.add(&[1.2, 1.0]);
        hessian
    }

    /// Numbers in -1..1 that need no generator crate.
    fn noise(count: usize) -> Vec<f32> {
        let mut state = 1u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    #[test]
    fn by_hand() {
        let hessian = example();
        assert_eq!((hessian.tokens(), hessian.size()), (3, 2));
        let matrix = hessian.matrix();
        for (place, expected) in [((0, 0), 1.793_333), ((0, 1), 1.633_333), ((1, 1), 1.633_333)] {
            assert!((matrix[place] - expected).abs() < 1e-6, "{matrix:?}");
        }
        assert_eq!(matrix, matrix.transpose());
        let upper = hessian.inverse_factor(0.01, &[0, 1]).unwrap();
        for (place, expected) in
            [((0, 0), 2.269_864), ((0, 1), -2.246_300), ((1, 0), 0.0), ((1, 1), 0.778_389)]
        {
            assert!((upper[place] - expected).abs() < 1e-5, "{upper:?}");
        }
    }

    #[test]
    fn the_factor_is_of_the_inverse_in_the_given_order() {
        let size = 40;
        let mut hessian = Hessian::new(size);
        let mut rows = noise(size * 60);
        rows.iter_mut().skip(7).step_by(size).for_each(|x| *x = 0.0);
        hessian.add(&rows);
        let order: Vec<usize> = (0..size).map(|p| p * 7 % size).collect();
        let upper = hessian.inverse_factor(0.02, &order).unwrap();
        let (matrix, diagonal) = (hessian.matrix(), hessian.diagonal());
        assert_eq!(diagonal.iter().position(|d| *d == 0.0), Some(7));
        let lambda = 0.02 * diagonal.iter().sum::<f64>() / size as f64;
        let damped = Mat::from_fn(size, size, |i, j| {
            let dead = if order[i] == 7 { 1.0 } else { 0.0 };
            matrix[(order[i], order[j])] + if i == j { lambda + dead } else { 0.0 }
        });
        let identity = &damped * (upper.transpose() * &upper);
        for i in 0..size {
            for j in 0..size {
                let expected = f64::from(u8::from(i == j));
                assert!((identity[(i, j)] - expected).abs() < 1e-10);
                assert!(i <= j || upper[(i, j)] == 0.0);
            }
        }
    }

    #[test]
    fn the_weighted_error_is_the_squared_output_error() {
        let (size, tokens, out) = (37, 1500, 5);
        let (rows, error) = (noise(size * tokens), noise(size * out));
        let mut hessian = Hessian::new(size);
        hessian.add(&rows);
        let mut expected = 0.0;
        for x in rows.chunks(size) {
            for e in error.chunks(size) {
                let dot: f64 = x.iter().zip(e).map(|(x, e)| f64::from(*x) * f64::from(*e)).sum();
                expected += dot * dot;
            }
        }
        expected *= 2.0 / tokens as f64;
        let found = hessian.weighted_error(&error, out);
        assert!((found - expected).abs() < 1e-9 * expected, "{found} {expected}");
    }

    #[test]
    fn too_little_text_is_said() {
        let text = Hessian::new(2).inverse_factor(0.01, &[0, 1]).unwrap_err().to_string();
        assert!(text.contains("no calibration token"), "{text}");
        let mut hessian = Hessian::new(3);
        hessian.add(&[1.0, 1.0, 1.0]);
        let text = hessian.inverse_factor(0.0, &[0, 1, 2]).unwrap_err().to_string();
        assert!(text.contains("not positive definite"), "{text}");
        assert!(text.contains("damping"), "{text}");
        assert!(hessian.inverse_factor(0.01, &[0, 1, 2]).is_ok());
        hessian.add(&[f32::NAN, 0.0, 0.0]);
        assert!(hessian.inverse_factor(0.01, &[0, 1, 2]).is_err());
    }
}
