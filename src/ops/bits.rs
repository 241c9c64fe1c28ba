//! Codes of 1 to 8 bits in dense streams of 32-bit words.
//!
//! Code `i` of width `b` occupies bits `i·b .. i·b + b` of the stream; bit 0 is the lowest bit of
//! word 0. A code may straddle two words, and the bits after the last code are zero. The row
//! variants start each row at a fresh word, so that a row can be read without the rows before it.

/// Bits in a word.
const WORD: usize = u32::BITS as usize;

/// Words that hold `columns` codes of `bits` bits: the length of one row.
pub fn words_per_row(columns: usize, bits: u8) -> usize {
    (columns * usize::from(bits)).div_ceil(WORD)
}

/// Packs `codes`, each below 2^`bits`, into `words_per_row(codes.len(), bits)` words.
///
/// # Panics
/// When `bits` is not in 1..=8.
pub fn pack(codes: &[u8], bits: u8) -> Vec<u32> {
    check_width(bits);
    let mut words = Vec::with_capacity(words_per_row(codes.len(), bits));
    pack_into(&mut words, codes, bits);
    words
}

/// Reads the first `count` codes of `words`.
///
/// # Panics
/// When `bits` is not in 1..=8 or `words` is too short for `count` codes.
pub fn unpack(words: &[u32], bits: u8, count: usize) -> Vec<u8> {
    check_width(bits);
    let mut codes = vec![0; count];
    unpack_into(&mut codes, words, bits);
    codes
}

/// Packs a row-major matrix with `columns` codes per row; each row takes
/// `words_per_row(columns, bits)` words.
///
/// # Panics
/// When `bits` is not in 1..=8 or `codes` is not a whole number of rows.
pub fn pack_rows(codes: &[u8], columns: usize, bits: u8) -> Vec<u32> {
    check_width(bits);
    let rows = whole_rows(codes.len(), columns);
    let mut words = Vec::with_capacity(rows * words_per_row(columns, bits));
    for row in codes.chunks_exact(columns.max(1)) {
        pack_into(&mut words, row, bits);
    }
    words
}

/// The inverse of [`pack_rows`]: `columns` codes for each row in `words`.
///
/// # Panics
/// When `bits` is not in 1..=8 or `words` is not a whole number of rows.
pub fn unpack_rows(words: &[u32], columns: usize, bits: u8) -> Vec<u8> {
    check_width(bits);
    let stride = words_per_row(columns, bits);
    let mut codes = vec![0; whole_rows(words.len(), stride) * columns];
    let rows = codes.chunks_exact_mut(columns.max(1));
    for (row, words) in rows.zip(words.chunks_exact(stride.max(1))) {
        unpack_into(row, words, bits);
    }
    codes
}

fn check_width(bits: u8) {
    assert!((1..=8).contains(&bits), "codes have 1 to 8 bits, not {bits}");
}

fn whole_rows(items: usize, per_row: usize) -> usize {
    let rows = items / per_row.max(1);
    assert_eq!(rows * per_row, items, "{items} items are no whole number of rows of {per_row}");
    rows
}

/// Appends the stream of `codes`. 32 codes of `bits` bits fill exactly `bits` words, so whole
/// blocks never share a word.
fn pack_into(words: &mut Vec<u32>, codes: &[u8], bits: u8) {
    debug_assert!(
        codes.iter().all(|&code| u32::from(code) < 1 << bits),
        "a code does not fit into {bits} bits"
    );
    let (blocks, rest) = codes.as_chunks::<WORD>();
    match bits {
        1 => pack_blocks::<1>(words, blocks),
        2 => pack_blocks::<2>(words, blocks),
        3 => pack_blocks::<3>(words, blocks),
        4 => pack_blocks::<4>(words, blocks),
        5 => pack_blocks::<5>(words, blocks),
        6 => pack_blocks::<6>(words, blocks),
        7 => pack_blocks::<7>(words, blocks),
        _ => pack_blocks::<8>(words, blocks),
    }
    if !rest.is_empty() {
        let mut block = [0; WORD];
        block[..rest.len()].copy_from_slice(rest);
        let end = words.len() + words_per_row(rest.len(), bits);
        pack_into(words, &block, bits);
        words.truncate(end);
    }
}

/// `B` is a constant so that every shift below is one too.
fn pack_blocks<const B: usize>(words: &mut Vec<u32>, blocks: &[[u8; WORD]]) {
    for block in blocks {
        let mut out = [0_u32; B];
        for (i, &code) in block.iter().enumerate() {
            // Masked so that a code that is too large cannot damage its neighbours.
            let code = u32::from(code) & ((1 << B) - 1);
            let (word, shift) = (i * B / WORD, i * B % WORD);
            out[word] |= code << shift;
            if shift + B > WORD {
                out[word + 1] |= code >> (WORD - shift);
            }
        }
        words.extend_from_slice(&out);
    }
}

/// Fills `codes` from the start of `words`.
pub(super) fn unpack_into(codes: &mut [u8], words: &[u32], bits: u8) {
    let needed = words_per_row(codes.len(), bits);
    assert!(words.len() >= needed, "{needed} words needed, {} given", words.len());
    let (blocks, rest) = codes.as_chunks_mut::<WORD>();
    let (whole, tail) = words[..needed].split_at(blocks.len() * usize::from(bits));
    match bits {
        1 => unpack_blocks::<1>(blocks, whole),
        2 => unpack_blocks::<2>(blocks, whole),
        3 => unpack_blocks::<3>(blocks, whole),
        4 => unpack_blocks::<4>(blocks, whole),
        5 => unpack_blocks::<5>(blocks, whole),
        6 => unpack_blocks::<6>(blocks, whole),
        7 => unpack_blocks::<7>(blocks, whole),
        _ => unpack_blocks::<8>(blocks, whole),
    }
    if !rest.is_empty() {
        let (mut block, mut padded) = ([0; WORD], [0; 8]);
        padded[..tail.len()].copy_from_slice(tail);
        unpack_into(&mut block, &padded, bits);
        rest.copy_from_slice(&block[..rest.len()]);
    }
}

fn unpack_blocks<const B: usize>(blocks: &mut [[u8; WORD]], words: &[u32]) {
    for (block, words) in blocks.iter_mut().zip(words.as_chunks::<B>().0) {
        for (i, code) in block.iter_mut().enumerate() {
            let (word, shift) = (i * B / WORD, i * B % WORD);
            let mut bits = words[word] >> shift;
            if shift + B > WORD {
                bits |= words[word + 1] << (WORD - shift);
            }
            *code = (bits & ((1 << B) - 1)) as u8;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The definition, bit by bit.
    fn pack_slowly(codes: &[u8], bits: u8) -> Vec<u32> {
        let bits = usize::from(bits);
        let mut words = vec![0; (codes.len() * bits).div_ceil(32)];
        for (i, &code) in codes.iter().enumerate() {
            for bit in 0..bits {
                let place = i * bits + bit;
                words[place / 32] |= u32::from(code >> bit & 1) << (place % 32);
            }
        }
        words
    }

    fn counting_codes(count: usize, bits: u8) -> Vec<u8> {
        (0..count).map(|i| ((i * 37 + 11) % (1 << bits)) as u8).collect()
    }

    #[test]
    fn four_bits_by_hand() {
        assert_eq!(pack(&[1, 2, 3, 4, 5, 6, 7, 8, 9], 4), [0x8765_4321, 9]);
        assert_eq!(unpack(&[0x8765_4321, 9], 4, 9), [1, 2, 3, 4, 5, 6, 7, 8, 9]);
    }

    #[test]
    fn three_bits_straddle_words() {
        // Code 10 takes bits 30..33: its two low bits end word 0, its high bit starts word 1.
        let mut codes = [0; 11];
        codes[0] = 0b101;
        codes[10] = 0b110;
        assert_eq!(pack(&codes, 3), [0b101 | 0b10 << 30, 1]);
        assert_eq!(unpack(&pack(&codes, 3), 3, 11), codes);
    }

    #[test]
    fn other_widths_by_hand() {
        assert_eq!(pack(&[1, 0, 1, 1], 1), [0b1101]);
        assert_eq!(pack(&[3, 0, 1, 2], 2), [0b1001_0011]);
        assert_eq!(pack(&[0x12, 0x34, 0x56, 0x78, 0x9a], 8), [0x7856_3412, 0x9a]);
        // Code 6 of 5 bits takes bits 30..35.
        assert_eq!(pack(&[0, 0, 0, 0, 0, 0, 0b10111], 5), [0b11 << 30, 0b101]);
        assert_eq!(pack(&[], 3), [0; 0]);
        assert_eq!(unpack(&[], 3, 0), [0; 0]);
    }

    #[test]
    fn every_length_around_the_word_and_block_boundaries() {
        for bits in 1..=8 {
            for count in 0..=100 {
                let codes = counting_codes(count, bits);
                let words = pack(&codes, bits);
                assert_eq!(words, pack_slowly(&codes, bits), "{bits} bits, {count} codes");
                assert_eq!(words.len(), words_per_row(count, bits));
                assert_eq!(unpack(&words, bits, count), codes);
            }
        }
    }

    #[test]
    fn rows_start_at_fresh_words() {
        let codes = [1, 2, 3, 4, 5, 6];
        assert_eq!(pack_rows(&codes, 3, 3), [0b011_010_001, 0b110_101_100]);
        assert_eq!(unpack_rows(&[0b011_010_001, 0b110_101_100], 3, 3), codes);
        assert_eq!(words_per_row(11, 3), 2);
        assert_eq!(words_per_row(32, 3), 3);
        assert_eq!(pack_rows(&[], 0, 4), [0; 0]);
        assert_eq!(unpack_rows(&[], 0, 4), [0; 0]);
    }

    #[test]
    #[should_panic(expected = "2 words needed, 1 given")]
    fn too_few_words_are_refused() {
        unpack(&[0], 3, 11);
    }

    #[test]
    #[should_panic(expected = "no whole number of rows")]
    fn a_broken_row_is_refused() {
        pack_rows(&[0; 7], 3, 3);
    }

    #[test]
    #[should_panic(expected = "does not fit into 2 bits")]
    #[cfg(debug_assertions)]
    fn a_code_that_does_not_fit_is_refused() {
        pack(&[4], 2);
    }

    proptest! {
        #[test]
        fn packs_as_defined_and_back(
            (bits, codes) in (1_u8..=8).prop_flat_map(|bits| {
                (Just(bits), prop::collection::vec(0..=u8::MAX >> (8 - bits), 0..300))
            }),
        ) {
            let words = pack(&codes, bits);
            prop_assert_eq!(&words, &pack_slowly(&codes, bits));
            prop_assert_eq!(unpack(&words, bits, codes.len()), codes);
        }

        #[test]
        fn rows_are_packed_one_by_one(
            (bits, columns, codes) in (1_u8..=8, 1_usize..80, 0_usize..6).prop_flat_map(
                |(bits, columns, rows)| {
                    let code = 0..=u8::MAX >> (8 - bits);
                    (Just(bits), Just(columns), prop::collection::vec(code, columns * rows))
                },
            ),
        ) {
            let words = pack_rows(&codes, columns, bits);
            let expected: Vec<u32> =
                codes.chunks(columns).flat_map(|row| pack_slowly(row, bits)).collect();
            prop_assert_eq!(&words, &expected);
            prop_assert_eq!(unpack_rows(&words, columns, bits), codes);
        }

        #[test]
        fn a_prefix_ignores_what_follows(
            words in prop::collection::vec(any::<u32>(), 0..20),
            bits in 1_u8..=8,
            part in 0.0..=1.0,
        ) {
            let whole = words.len() * 32 / usize::from(bits);
            let count = (whole as f64 * part) as usize;
            prop_assert_eq!(&unpack(&words, bits, count), &unpack(&words, bits, whole)[..count]);
        }
    }
}
