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
        let Self { books: count, vector } = self;
        let each = books.len() / count.max(1);
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
}
