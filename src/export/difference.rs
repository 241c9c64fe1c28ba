//! Two adapters side by side.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::adapter::{Adapter, AdapterRecord};

/// How far numbers are apart, each by `|a - b| / max(|a|, |b|)`: 0 where they are equal, and the
/// same whichever comes first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Change {
    /// Of all of them.
    pub mean: f64,
    /// Of the one that differs most.
    pub largest: f64,
    /// How many there are.
    pub numbers: usize,
}

/// What two adapters hold of a linear.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum Difference {
    /// The first alone holds it.
    OnlyA,
    /// The second alone holds it.
    OnlyB,
    /// Their bases have it in other bits, groups or sizes.
    OtherShape,
    /// Another part of the grid learned.
    OtherPart,
    /// Their bases have other codes, or differ in what both adapters leave as it is.
    OtherBase,
    /// Scales and offsets of one base.
    Comparable {
        /// Of the scales.
        scales: Change,
        /// Of the offsets, where they learned.
        #[serde(skip_serializing_if = "Option::is_none")]
        offsets: Option<Change>,
    },
}

impl Difference {
    /// Whether both adapters hold the same numbers.
    pub fn is_none(&self) -> bool {
        matches!(self, Self::Comparable { scales, offsets }
            if scales.largest == 0.0 && offsets.is_none_or(|offsets| offsets.largest == 0.0))
    }
}

impl Change {
    fn of(a: &[f32], b: &[f32]) -> Self {
        let mut change = Self { numbers: a.len(), ..Self::default() };
        let mut sum = 0.0;
        for (a, b) in a.iter().zip(b).map(|(a, b)| (f64::from(*a), f64::from(*b))) {
            let reference = a.abs().max(b.abs());
            let relative = if reference == 0.0 { 0.0 } else { (a - b).abs() / reference };
            sum += relative;
            change.largest = change.largest.max(relative);
        }
        change.mean = sum / a.len().max(1) as f64;
        change
    }

    /// This change and another together.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        let numbers = self.numbers + other.numbers;
        let sum = |change: Self| change.mean * change.numbers as f64;
        Self {
            mean: (sum(self) + sum(other)) / numbers.max(1) as f64,
            largest: self.largest.max(other.largest),
            numbers,
        }
    }
}

/// Every linear that one of two adapters holds, and how they differ there.
pub fn differences<'a>(a: &'a Adapter, b: &'a Adapter) -> Vec<(&'a str, Difference)> {
    let of = |adapter: &'a Adapter| adapter.records().collect::<BTreeMap<&str, &AdapterRecord>>();
    let (in_a, in_b) = (of(a), of(b));
    let names: BTreeSet<&str> = in_a.keys().chain(in_b.keys()).copied().collect();
    let one = |name: &str| match (in_a.get(name), in_b.get(name)) {
        (Some(_), None) => Difference::OnlyA,
        (None, _) => Difference::OnlyB,
        (Some(left), Some(right)) if left.bits != right.bits || left.layout() != right.layout() => {
            Difference::OtherShape
        }
        (Some(left), Some(right)) if left.part != right.part => Difference::OtherPart,
        (Some(left), Some(right)) if left.base_sha256 != right.base_sha256 => Difference::OtherBase,
        _ => {
            let of = |values: fn(&'a Adapter, &str) -> Option<&'a [f32]>| {
                values(a, name).zip(values(b, name)).map(|(a, b)| Change::of(a, b))
            };
            let scales = of(Adapter::scales).unwrap_or_default();
            Difference::Comparable { scales, offsets: of(Adapter::offsets) }
        }
    };
    names.into_iter().map(|name| (name, one(name))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_relative_and_symmetric() {
        let (a, b) = ([2.0, 0.0, -1.0, 0.0], [1.0, 0.0, 1.0, 3.0]);
        let change = Change::of(&a, &b);
        assert_eq!(change, Change { mean: (0.5 + 2.0 + 1.0) / 4.0, largest: 2.0, numbers: 4 });
        assert_eq!(change, Change::of(&b, &a));
        let both = change.and(Change { mean: 0.0, largest: 0.0, numbers: 4 });
        assert_eq!(both, Change { mean: change.mean / 2.0, largest: 2.0, numbers: 8 });
        assert_eq!(Change::default().and(Change::default()), Change::default());
    }
}
