//! A weight on a uniform grid, as encoders take it.

use crate::refusal::Refusal;

/// A borrowed weight `w = scale * (code - zero)`, computed in f32, with groups along the inputs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct UniformWeight<'a> {
    /// Output features (rows).
    pub out: usize,
    /// Input features (columns).
    pub inputs: usize,
    /// Weights of a row that share a scale; divides `inputs`.
    pub group_len: usize,
    /// Width of a code, 1 to 8.
    pub bits: u8,
    /// `[out, inputs]`, row-major.
    pub codes: &'a [u8],
    /// `[out, inputs / group_len]`.
    pub scale: &'a [f32],
    /// `[out, inputs / group_len]`, in units of a code.
    pub zero: &'a [f32],
}

impl<'a> UniformWeight<'a> {
    /// Whether lengths agree, so that no index is out of range.
    pub(crate) fn check(&self) -> Result<(), Refusal> {
        let Self { out, inputs, group_len, bits, codes, scale, zero } = *self;
        let refuse = |what: String| Err(Refusal::Unsound(what));
        if !(1..=8).contains(&bits) {
            return refuse(format!("codes of {bits} bits; 1 to 8 are possible"));
        }
        if inputs == 0 || group_len == 0 || !inputs.is_multiple_of(group_len) {
            return refuse(format!("group length {group_len} does not divide {inputs} inputs"));
        }
        let groups = inputs / group_len;
        for (what, found, each) in [
            ("codes", codes.len(), inputs),
            ("scales", scale.len(), groups),
            ("zero points", zero.len(), groups),
        ] {
            if out.checked_mul(each) != Some(found) {
                return refuse(format!("{found} {what} for {out} rows of {each}"));
            }
        }
        Ok(())
    }

    /// Groups in a row.
    fn groups(&self) -> usize {
        self.inputs / self.group_len
    }

    /// The weights of one row.
    pub(crate) fn row_values(&self, row: usize, out: &mut [f32]) {
        let groups = self.groups();
        let codes = &self.codes[row * self.inputs..][..self.inputs];
        for (group, (out, codes)) in
            out.chunks_mut(self.group_len).zip(codes.chunks(self.group_len)).enumerate()
        {
            let (scale, zero) = (self.scale[row * groups + group], self.zero[row * groups + group]);
            for (value, code) in out.iter_mut().zip(codes) {
                *value = scale * (f32::from(*code) - zero);
            }
        }
    }

    /// The scales and zero points that `len` weights from `start` of `row` use.
    pub(crate) fn grids(&self, row: usize, start: usize, len: usize) -> (&'a [f32], &'a [f32]) {
        let base = row * self.groups();
        let first = base + start / self.group_len;
        let last = base + (start + len - 1) / self.group_len;
        (&self.scale[first..=last], &self.zero[first..=last])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::BlockType;

    #[test]
    fn a_weight_that_contradicts_itself_is_refused() {
        let good = UniformWeight {
            out: 2,
            inputs: 32,
            group_len: 16,
            bits: 4,
            codes: &[0; 64],
            scale: &[1.0; 4],
            zero: &[8.0; 4],
        };
        assert_eq!(good.check(), Ok(()));
        for (weight, part) in [
            (UniformWeight { bits: 0, ..good }, "0 bits"),
            (UniformWeight { bits: 9, ..good }, "9 bits"),
            (UniformWeight { group_len: 0, ..good }, "group length 0"),
            (UniformWeight { group_len: 12, ..good }, "group length 12"),
            (UniformWeight { inputs: 0, ..good }, "0 inputs"),
            (UniformWeight { codes: &[0; 63], ..good }, "63 codes"),
            (UniformWeight { out: usize::MAX, ..good }, "64 codes"),
            (UniformWeight { scale: &[1.0; 2], ..good }, "2 scales"),
            (UniformWeight { zero: &[8.0; 5], ..good }, "5 zero points for 2 rows of 2"),
        ] {
            for refusal in [
                crate::encode(&weight, BlockType::Q8_0).unwrap_err(),
                crate::choose(&weight).unwrap_err(),
            ] {
                assert!(refusal.to_string().contains(part), "{refusal}");
            }
        }
    }
}
