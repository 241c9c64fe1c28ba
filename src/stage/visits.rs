//! How many tokens of the calibration text each expert of a block saw.

use std::cell::RefCell;
use std::collections::BTreeMap;

use burn::tensor::Tensor;

use super::context::StageContext;
use crate::model::Site;
use crate::report::{Event, Reporter};

/// Most experts that one warning names.
const NAMED: usize = 6;

/// Tokens by expert.
#[derive(Debug, Default)]
pub(super) struct Visits(RefCell<BTreeMap<usize, usize>>);

impl Visits {
    /// Counts what enters a site.
    pub(super) fn count(&self, site: Site, x: &Tensor<3>) {
        if let Site::Expert(expert) = site {
            let [_, tokens, _] = x.dims();
            *self.0.borrow_mut().entry(expert).or_default() += tokens;
        }
    }

    /// Says which experts saw fewer tokens than they have inputs: their second moments are no full
    /// matrix, and what a training makes of their weights rests on little.
    pub(super) fn report(self, ctx: &mut StageContext<'_>, index: usize) {
        let config = &ctx.model.config;
        let Some(experts) = config.experts(index) else { return };
        let text = few(&self.0.into_inner(), experts.count, config.d_model);
        if let Some(text) = text {
            let place = config.block_prefix(index);
            let text = format!("{place}: {text}; more of data.calibration helps");
            ctx.report.emit(&Event::Warning { text });
        }
    }
}

/// The experts with fewer visits than `inputs`, the fewest first.
fn few(visits: &BTreeMap<usize, usize>, count: usize, inputs: usize) -> Option<String> {
    let seen = |expert| (visits.get(&expert).copied().unwrap_or(0), expert);
    let mut few: Vec<(usize, usize)> =
        (0..count).map(seen).filter(|(tokens, _)| *tokens < inputs).collect();
    few.sort_unstable();
    let named = few.iter().take(NAMED).map(|(tokens, expert)| format!("{expert} ({tokens})"));
    let named: Vec<String> = named.collect();
    let more = if few.len() > NAMED { ", ..." } else { "" };
    (!few.is_empty()).then(|| {
        format!(
            "{} of {count} experts saw fewer tokens than their {inputs} inputs: {}{more}",
            few.len(),
            named.join(", ")
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_seen_are_named_first() {
        let visits = BTreeMap::from([(0, 40), (1, 7), (3, 64)]);
        let text = few(&visits, 4, 32).unwrap();
        assert_eq!(text, "2 of 4 experts saw fewer tokens than their 32 inputs: 2 (0), 1 (7)");
        assert_eq!(few(&BTreeMap::from([(0, 32)]), 1, 32), None);
        assert!(few(&visits, 40, 32).unwrap().ends_with("8 (0), ..."));
    }
}
