//! Experts in place of an MLP: a router sends each token to a few of many small ones.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

use super::{LinearSpec, Role};

/// The experts of the blocks that have some.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Experts {
    /// How many a block has.
    pub count: usize,
    /// How many a token goes to.
    pub active: usize,
    /// Width of one.
    pub width: usize,
    /// Whether the weights of the chosen ones sum to 1.
    pub normalized: bool,
    /// The router's name within the block, a matrix `[count, d_model]`. It is never quantized: a token
    /// sent elsewhere is no small error.
    pub router: &'static str,
    /// Whether a block has experts, by its index.
    pub blocks: Vec<bool>,
    /// The linears of a block that has.
    pub linears: Vec<LinearSpec>,
}

/// The linears of `count` gated experts of one width, expert after expert, each named
/// `PREFIX.EXPERT.PART`.
pub(super) fn gated_experts(
    prefix: &str,
    parts: [&str; 3],
    count: usize,
    [d_model, width]: [usize; 2],
) -> Vec<LinearSpec> {
    let roles = [
        (Role::Gate, [width, d_model]),
        (Role::Up, [width, d_model]),
        (Role::Down, [d_model, width]),
    ];
    let one = |expert: usize| {
        parts.into_iter().zip(roles).map(move |(part, (role, shape))| LinearSpec {
            name: kept(format!("{prefix}.{expert}.{part}")),
            role,
            shape,
            bias: false,
            columns: false,
            expert: Some(expert),
        })
    };
    (0..count).flat_map(one).collect()
}

/// A name for as long as the process lives; the same one each time.
fn kept(name: String) -> &'static str {
    static NAMES: Mutex<BTreeSet<&'static str>> = Mutex::new(BTreeSet::new());
    let mut names = NAMES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(known) = names.get(name.as_str()) {
        return known;
    }
    let name: &'static str = name.leak();
    names.insert(name);
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn experts_come_one_after_the_other() {
        let make =
            || gated_experts("mlp.experts", ["gate_proj", "up_proj", "down_proj"], 3, [8, 5]);
        let all = make();
        assert_eq!(all.len(), 9);
        assert_eq!(all[5].name, "mlp.experts.1.down_proj");
        assert_eq!((all[5].role, all[5].shape, all[5].expert), (Role::Down, [8, 5], Some(1)));
        // Names are kept once, however often a config is read.
        assert!(std::ptr::eq(all[5].name, make()[5].name));
    }
}
