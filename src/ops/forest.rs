//! Sequences that share their beginnings, packed: what they share is there, and computed, once.

use std::ops::Range;

use burn::tensor::{Device, Tensor, TensorData};

/// Tokens of several sequences, each token once for all the sequences that begin with it.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Forest {
    /// Runs of tokens between which sequences part, in the order of their tokens.
    pub branches: Vec<Branch>,
    /// Tokens in all.
    pub len: usize,
}

/// A run of tokens, each behind the one before it.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Branch {
    /// Where its tokens lie.
    pub tokens: Range<usize>,
    /// The position of its first token in a sequence.
    pub depth: usize,
    /// Where the tokens before it lie, from the sequence's first on.
    pub before: Vec<Range<usize>>,
}

impl Forest {
    /// The forest in which each token stands behind another one, or opens a sequence.
    ///
    /// # Panics
    /// If a token stands before what it is behind of.
    pub fn new(parents: &[Option<usize>]) -> Self {
        let mut children = vec![0_usize; parents.len()];
        for (token, parent) in parents.iter().enumerate() {
            if let Some(parent) = parent {
                assert!(*parent < token, "a token before its parent");
                children[*parent] += 1;
            }
        }
        let mut branches: Vec<Branch> = Vec::new();
        let mut branch_of = vec![0; parents.len()];
        for (token, parent) in parents.iter().enumerate() {
            let goes_on = parent.is_some_and(|p| p + 1 == token && children[p] == 1);
            if goes_on && let Some(last) = branches.last_mut() {
                last.tokens.end += 1;
            } else {
                let mut branch = Branch { tokens: token..token + 1, ..Branch::default() };
                if let Some(parent) = parent {
                    let under: &Branch = &branches[branch_of[*parent]];
                    branch.before.clone_from(&under.before);
                    branch.before.push(under.tokens.start..parent + 1);
                    branch.depth = under.depth + parent + 1 - under.tokens.start;
                }
                branches.push(branch);
            }
            branch_of[token] = branches.len() - 1;
        }
        Self { branches, len: parents.len() }
    }

    /// The position of each token in its sequences, `[len]`.
    pub fn depths(&self) -> Vec<usize> {
        let of = |branch: &Branch| branch.depth..branch.depth + branch.tokens.len();
        self.branches.iter().flat_map(of).collect()
    }

    /// 0 where a token sees another, -inf where not, `[1, 1, copies * len, len]`; a token sees `window`
    /// tokens, itself among them.
    pub(super) fn mask(&self, copies: usize, window: usize, device: &Device) -> Tensor<4> {
        let mut mask = vec![f32::NEG_INFINITY; self.len * self.len];
        for branch in &self.branches {
            for token in branch.tokens.clone() {
                let row = &mut mask[token * self.len..][..self.len];
                let own = branch.tokens.start..token + 1;
                let seen = branch.before.iter().cloned().chain([own]).flatten();
                let live = branch.depth + token + 1 - branch.tokens.start;
                let early = live.saturating_sub(window);
                seen.skip(early).for_each(|key| row[key] = 0.0);
            }
        }
        let mask = mask.repeat(copies);
        let shape = [1, 1, copies * self.len, self.len];
        Tensor::from_data(TensorData::new(mask, shape), device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two sequences `0 1 2 3` and `0 1 4`, a third one `5`.
    fn three() -> Forest {
        Forest::new(&[None, Some(0), Some(1), Some(2), Some(1), None])
    }

    #[test]
    fn branches_part_where_sequences_do() {
        let branch = |tokens, depth, before: &[Range<usize>]| Branch {
            tokens,
            depth,
            before: before.to_vec(),
        };
        let shared = 0..2;
        let expected = [
            branch(0..2, 0, &[]),
            branch(2..4, 2, std::slice::from_ref(&shared)),
            branch(4..5, 2, std::slice::from_ref(&shared)),
            branch(5..6, 0, &[]),
        ];
        assert_eq!(three().branches, expected);
        assert_eq!(three().depths(), [0, 1, 2, 3, 2, 0]);
        assert_eq!(Forest::new(&[]).len, 0);
    }

    #[test]
    fn tokens_see_what_they_stand_behind() {
        let seen = |window| {
            let mask = three().mask(1, window, &Device::default());
            let mask: Vec<f32> = mask.into_data().iter::<f32>().collect();
            let row = |row: &[f32]| -> Vec<usize> { (0..6).filter(|i| row[*i] == 0.0).collect() };
            mask.chunks(6).map(row).collect::<Vec<_>>()
        };
        let all = [&[0][..], &[0, 1], &[0, 1, 2], &[0, 1, 2, 3], &[0, 1, 4], &[5]];
        assert_eq!(seen(usize::MAX), all);
        let two = [&[0][..], &[0, 1], &[1, 2], &[2, 3], &[1, 4], &[5]];
        assert_eq!(seen(2), two);
    }
}
