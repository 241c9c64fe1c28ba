//! Additive codebooks: how vectors of a row are sums of centroids.

/// What the codes of a weight in additive codebooks are: `books` of them for each run of `vector` inputs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Additive {
    /// Codebooks.
    pub books: usize,
    /// Inputs that a centroid stands for.
    pub vector: usize,
}

impl Additive {
    /// Codes in a row of so many inputs.
    pub fn codes(self, inputs: usize) -> usize {
        inputs / self.vector * self.books
    }

    /// Inputs of a row of so many codes.
    pub fn inputs(self, codes: usize) -> usize {
        codes / self.books * self.vector
    }

    /// Sums of the centroids of one row, added in the order of the codebooks, which is the format's.
    ///
    /// # Shapes
    /// - codes: `[inputs / vector, books]`
    /// - books: `[books, centroids, vector]`
    /// - out: `[inputs]`
    pub fn sums(self, codes: &[u8], books: &[f32], out: &mut [f32]) {
        // Of a known length, so that a centroid is a register.
        match self.vector {
            2 => sums_of::<2>(codes, (self.books, books), out),
            4 => sums_of::<4>(codes, (self.books, books), out),
            8 => sums_of::<8>(codes, (self.books, books), out),
            vector => any_sums(codes, (self.books, books), vector, out),
        }
    }
}

fn sums_of<const VECTOR: usize>(codes: &[u8], (count, books): (usize, &[f32]), out: &mut [f32]) {
    let (centroids, _) = books.as_chunks::<VECTOR>();
    let each = centroids.len() / count;
    let (runs, _) = out.as_chunks_mut::<VECTOR>();
    for (codes, out) in codes.chunks_exact(count).zip(runs) {
        for (index, (book, code)) in centroids.chunks_exact(each).zip(codes).enumerate() {
            let centroid = book[usize::from(*code)];
            if index == 0 {
                *out = centroid;
            } else {
                for (out, value) in out.iter_mut().zip(centroid) {
                    *out += value;
                }
            }
        }
    }
}

fn any_sums(codes: &[u8], (count, books): (usize, &[f32]), vector: usize, out: &mut [f32]) {
    let each = books.len() / count;
    for (codes, out) in codes.chunks_exact(count).zip(out.chunks_exact_mut(vector)) {
        for (index, (book, code)) in books.chunks_exact(each).zip(codes).enumerate() {
            let centroid = &book[usize::from(*code) * vector..][..vector];
            if index == 0 {
                out.copy_from_slice(centroid);
            } else {
                for (out, value) in out.iter_mut().zip(centroid) {
                    *out += value;
                }
            }
        }
    }
}
