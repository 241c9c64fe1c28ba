//! Sixteen numbers or words at a time, in each instruction set: what kernels that are written for registers share.
//! Additions and multiplications stay apart, so that all give the same bits.

#![allow(unsafe_code)] // loads and stores of whole registers

/// Rows of a matrix that are computed together.
pub(in crate::ops::kernel) const LANES: usize = 16;

pub(in crate::ops::kernel) mod portable {
    use half::f16;

    use super::LANES;

    pub(in crate::ops::kernel) type F = [f32; LANES];
    pub(in crate::ops::kernel) type W = [u32; LANES];

    pub(in crate::ops::kernel) fn zero() -> F {
        [0.0; LANES]
    }

    pub(in crate::ops::kernel) fn splat(x: f32) -> F {
        [x; LANES]
    }

    pub(in crate::ops::kernel) fn whole(x: i32) -> W {
        [x.cast_unsigned(); LANES]
    }

    pub(in crate::ops::kernel) fn load(x: &[f32; LANES]) -> F {
        *x
    }

    pub(in crate::ops::kernel) fn load_half(x: &[u16; LANES]) -> F {
        x.map(|x| f16::from_bits(x).to_f32())
    }

    pub(in crate::ops::kernel) fn store(x: F) -> [f32; LANES] {
        x
    }

    pub(in crate::ops::kernel) fn load_words(x: &[u32; LANES]) -> W {
        *x
    }

    pub(in crate::ops::kernel) fn right(x: W, by: u32) -> W {
        x.map(|x| x >> by)
    }

    pub(in crate::ops::kernel) fn left(x: W, by: u32) -> W {
        x.map(|x| x << by)
    }

    pub(in crate::ops::kernel) fn and(a: W, b: W) -> W {
        std::array::from_fn(|i| a[i] & b[i])
    }

    pub(in crate::ops::kernel) fn or(a: W, b: W) -> W {
        std::array::from_fn(|i| a[i] | b[i])
    }

    pub(in crate::ops::kernel) fn add_words(a: W, b: W) -> W {
        std::array::from_fn(|i| a[i].wrapping_add(b[i]))
    }

    pub(in crate::ops::kernel) fn to_float(x: W) -> F {
        x.map(|x| x.cast_signed() as f32)
    }

    pub(in crate::ops::kernel) fn add(a: F, b: F) -> F {
        std::array::from_fn(|i| a[i] + b[i])
    }

    pub(in crate::ops::kernel) fn multiply(a: F, b: F) -> F {
        std::array::from_fn(|i| a[i] * b[i])
    }
}

#[cfg(target_arch = "x86_64")]
pub(in crate::ops::kernel) mod avx512 {
    use std::arch::x86_64 as x86;

    use super::LANES;

    pub(in crate::ops::kernel) type F = x86::__m512;
    pub(in crate::ops::kernel) type W = x86::__m512i;

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(in crate::ops::kernel) fn zero() -> F {
        x86::_mm512_setzero_ps()
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(in crate::ops::kernel) fn splat(x: f32) -> F {
        x86::_mm512_set1_ps(x)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(in crate::ops::kernel) fn whole(x: i32) -> W {
        x86::_mm512_set1_epi32(x)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(in crate::ops::kernel) fn load(x: &[f32; LANES]) -> F {
        // SAFETY: sixteen floats are there.
        unsafe { x86::_mm512_loadu_ps(x.as_ptr()) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(in crate::ops::kernel) fn load_half(x: &[u16; LANES]) -> F {
        // SAFETY: sixteen numbers of half precision are there.
        x86::_mm512_cvtph_ps(unsafe { x86::_mm256_loadu_si256(x.as_ptr().cast()) })
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(in crate::ops::kernel) fn store(x: F) -> [f32; LANES] {
        let mut out = [0.0; LANES];
        // SAFETY: there is room for sixteen floats.
        unsafe { x86::_mm512_storeu_ps(out.as_mut_ptr(), x) };
        out
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(in crate::ops::kernel) fn load_words(x: &[u32; LANES]) -> W {
        // SAFETY: sixteen words are there.
        unsafe { x86::_mm512_loadu_si512(x.as_ptr().cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(in crate::ops::kernel) fn right(x: W, by: u32) -> W {
        x86::_mm512_srlv_epi32(x, whole(by.cast_signed()))
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(in crate::ops::kernel) fn left(x: W, by: u32) -> W {
        x86::_mm512_sllv_epi32(x, whole(by.cast_signed()))
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(in crate::ops::kernel) fn and(a: W, b: W) -> W {
        x86::_mm512_and_si512(a, b)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(in crate::ops::kernel) fn or(a: W, b: W) -> W {
        x86::_mm512_or_si512(a, b)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(in crate::ops::kernel) fn add_words(a: W, b: W) -> W {
        x86::_mm512_add_epi32(a, b)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(in crate::ops::kernel) fn to_float(x: W) -> F {
        x86::_mm512_cvtepi32_ps(x)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(in crate::ops::kernel) fn add(a: F, b: F) -> F {
        x86::_mm512_add_ps(a, b)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(in crate::ops::kernel) fn multiply(a: F, b: F) -> F {
        x86::_mm512_mul_ps(a, b)
    }
}

#[cfg(target_arch = "x86_64")]
pub(in crate::ops::kernel) mod avx2 {
    use std::arch::x86_64 as x86;

    use super::LANES;

    /// Two registers of eight.
    pub(in crate::ops::kernel) type F = [x86::__m256; 2];
    pub(in crate::ops::kernel) type W = [x86::__m256i; 2];

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(in crate::ops::kernel) fn zero() -> F {
        [x86::_mm256_setzero_ps(); 2]
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(in crate::ops::kernel) fn splat(x: f32) -> F {
        [x86::_mm256_set1_ps(x); 2]
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(in crate::ops::kernel) fn whole(x: i32) -> W {
        [x86::_mm256_set1_epi32(x); 2]
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(in crate::ops::kernel) fn load(x: &[f32; LANES]) -> F {
        // SAFETY: sixteen floats are there.
        unsafe { [x86::_mm256_loadu_ps(x.as_ptr()), x86::_mm256_loadu_ps(x[8..].as_ptr())] }
    }

    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    pub(in crate::ops::kernel) fn load_half(x: &[u16; LANES]) -> F {
        // SAFETY: sixteen numbers of half precision are there.
        let [a, b] = unsafe {
            [x86::_mm_loadu_si128(x.as_ptr().cast()), x86::_mm_loadu_si128(x[8..].as_ptr().cast())]
        };
        [x86::_mm256_cvtph_ps(a), x86::_mm256_cvtph_ps(b)]
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(in crate::ops::kernel) fn store(x: F) -> [f32; LANES] {
        let mut out = [0.0; LANES];
        // SAFETY: there is room for sixteen floats.
        unsafe {
            x86::_mm256_storeu_ps(out.as_mut_ptr(), x[0]);
            x86::_mm256_storeu_ps(out[8..].as_mut_ptr(), x[1]);
        }
        out
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(in crate::ops::kernel) fn load_words(x: &[u32; LANES]) -> W {
        // SAFETY: sixteen words are there.
        unsafe {
            [
                x86::_mm256_loadu_si256(x.as_ptr().cast()),
                x86::_mm256_loadu_si256(x[8..].as_ptr().cast()),
            ]
        }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(in crate::ops::kernel) fn right(x: W, by: u32) -> W {
        let [by, _] = whole(by.cast_signed());
        [x86::_mm256_srlv_epi32(x[0], by), x86::_mm256_srlv_epi32(x[1], by)]
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(in crate::ops::kernel) fn left(x: W, by: u32) -> W {
        let [by, _] = whole(by.cast_signed());
        [x86::_mm256_sllv_epi32(x[0], by), x86::_mm256_sllv_epi32(x[1], by)]
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(in crate::ops::kernel) fn and(a: W, b: W) -> W {
        [x86::_mm256_and_si256(a[0], b[0]), x86::_mm256_and_si256(a[1], b[1])]
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(in crate::ops::kernel) fn or(a: W, b: W) -> W {
        [x86::_mm256_or_si256(a[0], b[0]), x86::_mm256_or_si256(a[1], b[1])]
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(in crate::ops::kernel) fn add_words(a: W, b: W) -> W {
        [x86::_mm256_add_epi32(a[0], b[0]), x86::_mm256_add_epi32(a[1], b[1])]
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(in crate::ops::kernel) fn to_float(x: W) -> F {
        [x86::_mm256_cvtepi32_ps(x[0]), x86::_mm256_cvtepi32_ps(x[1])]
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(in crate::ops::kernel) fn add(a: F, b: F) -> F {
        [x86::_mm256_add_ps(a[0], b[0]), x86::_mm256_add_ps(a[1], b[1])]
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(in crate::ops::kernel) fn multiply(a: F, b: F) -> F {
        [x86::_mm256_mul_ps(a[0], b[0]), x86::_mm256_mul_ps(a[1], b[1])]
    }
}
