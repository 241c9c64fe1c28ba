//! What is held of one key head: its important tokens, and the others as codes.

use super::rows::{Coded, Exact};
use super::setting::KvSetting;

/// What is held of one key head.
#[derive(Clone, Debug)]
pub(super) struct Head {
    /// What keys are multiplied by before they are rounded, `[head_dim]`; empty for 1.
    balance: Vec<f32>,
    /// Important tokens, in the order of their positions.
    positions: Vec<u32>,
    /// Attention that those received.
    received: Vec<f32>,
    keys: Exact,
    values: Exact,
    /// The other tokens, in the order in which they were rounded.
    low_positions: Vec<u32>,
    low_keys: Coded,
    low_values: Coded,
}

impl Head {
    /// Nothing yet of a head of this width.
    pub(super) fn new(setting: &KvSetting, width: usize, balance: Vec<f32>) -> Self {
        let group = setting.group_of(width);
        Self {
            balance,
            positions: Vec::new(),
            received: Vec::new(),
            keys: Exact::new(setting.high),
            values: Exact::new(setting.high),
            low_positions: Vec::new(),
            low_keys: Coded::new(setting.bits, width, group),
            low_values: Coded::new(setting.bits, width, group),
        }
    }

    /// Positions of the important tokens.
    pub(super) fn important(&self) -> &[u32] {
        &self.positions
    }

    /// Numbers of a key.
    pub(super) fn width(&self) -> usize {
        self.low_keys.width()
    }

    /// Holds a token's key and value, and what it received.
    pub(super) fn add(&mut self, position: u32, [key, value]: [&[f32]; 2], received: f32) {
        self.positions.push(position);
        self.received.push(received);
        self.keys.push(key);
        self.values.push(value);
    }

    /// Forgets tokens from position `len` on.
    pub(super) fn truncate(&mut self, len: usize) {
        let before = |positions: &[u32]| -> Vec<bool> {
            positions.iter().map(|position| (*position as usize) < len).collect()
        };
        self.keep(&before(&self.positions));
        let low = before(&self.low_positions);
        self.low_keys.retain(&low);
        self.low_values.retain(&low);
        self.low_positions.retain(|position| (*position as usize) < len);
    }

    /// Adds what each important token received.
    pub(super) fn weigh(&mut self, received: Option<&[f32]>, evicts: bool) {
        let Some(received) = received else { return };
        for (row, (sum, position)) in self.received.iter_mut().zip(&self.positions).enumerate() {
            let column = if evicts { row } else { *position as usize };
            *sum += received.get(column).copied().unwrap_or(0.0);
        }
    }

    /// Leaves `count` important tokens of a text of `total`: the last ones, and of the others those that
    /// received most.
    pub(super) fn demote(&mut self, setting: &KvSetting, count: usize, total: usize) {
        let leaving = self.positions.len().saturating_sub(count);
        if leaving == 0 {
            return;
        }
        let recent = total.saturating_sub(if setting.mode.weighs() { setting.recent } else { 0 });
        let mut rows: Vec<usize> = (0..self.positions.len())
            .filter(|row| (self.positions[*row] as usize) < recent)
            .collect();
        // Of equals the older one leaves.
        rows.sort_by(|a, b| self.received[*a].total_cmp(&self.received[*b]).then(a.cmp(b)));
        rows.truncate(leaving);
        rows.sort_unstable();
        let mut keep = vec![true; self.positions.len()];
        let mut row = vec![0.0; self.low_keys.width()];
        for index in rows {
            keep[index] = false;
            if setting.mode.codes() {
                self.keys.read(index, &mut row);
                for (x, factor) in row.iter_mut().zip(&self.balance) {
                    *x *= factor;
                }
                self.low_keys.push(&row);
                self.values.read(index, &mut row);
                self.low_values.push(&row);
                self.low_positions.push(self.positions[index]);
            }
        }
        self.keep(&keep);
    }

    /// Keeps these of the important tokens.
    fn keep(&mut self, keep: &[bool]) {
        let width = self.low_keys.width();
        self.keys.retain(width, keep);
        self.values.retain(width, keep);
        let mut kept = keep.iter();
        self.positions.retain(|_| kept.next().is_some_and(|keep| *keep));
        let mut kept = keep.iter();
        self.received.retain(|_| kept.next().is_some_and(|keep| *keep));
    }

    /// Writes the rows of every token that is held: to its position's place, or where others were dropped
    /// one behind the other.
    pub(super) fn read_into(
        &self,
        packed: bool,
        width: usize,
        keys: &mut [f32],
        values: &mut [f32],
    ) {
        for (index, position) in self.positions.iter().enumerate() {
            let at = width * if packed { index } else { *position as usize };
            self.keys.read(index, &mut keys[at..at + width]);
            self.values.read(index, &mut values[at..at + width]);
        }
        for (index, position) in self.low_positions.iter().enumerate() {
            let at = width * *position as usize;
            let key = &mut keys[at..at + width];
            self.low_keys.read(index, key);
            // `q / b` times `k b` is `q` times `k b / b`.
            for (x, factor) in key.iter_mut().zip(&self.balance) {
                *x /= factor;
            }
            self.low_values.read(index, &mut values[at..at + width]);
        }
    }

    pub(super) fn bytes(&self) -> usize {
        let Self { balance, positions, received, keys, values, low_positions, .. } = self;
        size_of_val(&balance[..])
            + size_of_val(&positions[..])
            + size_of_val(&received[..])
            + keys.bytes()
            + values.bytes()
            + size_of_val(&low_positions[..])
            + self.low_keys.bytes()
            + self.low_values.bytes()
    }
}

/// What a key channel is multiplied by, and its query channel divided: `sqrt(max |q| / max |k|)`, by which
/// both have the same largest number and their product stays.
pub(super) fn balance(q: f32, k: f32) -> f32 {
    let factor = (q / k).sqrt();
    // A channel without numbers has nothing to balance.
    if factor.is_normal() { factor } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::super::setting::KvMode;
    use super::*;

    #[test]
    fn balancing_makes_both_sides_as_large_and_leaves_their_product() {
        let (q, k) = ([8.0f32, 0.5], [2.0f32, 2.0]);
        let b: Vec<f32> = q.iter().zip(k).map(|(q, k)| balance(*q, k)).collect();
        assert_eq!(b, [2.0, 0.5]);
        let dot = |q: &[f32], k: &[f32]| -> f32 { q.iter().zip(k).map(|(q, k)| q * k).sum() };
        let (over, times): (Vec<f32>, Vec<f32>) =
            (0..2).map(|c| (q[c] / b[c], k[c] * b[c])).unzip();
        assert_eq!((&over[..], &times[..]), (&[4.0, 1.0][..], &[4.0, 1.0][..]));
        assert_eq!((dot(&q, &k), dot(&over, &times)), (17.0, 17.0));
        // Nothing to balance by.
        let idle = [balance(0.0, 2.0), balance(3.0, 0.0), balance(0.0, 0.0)];
        assert_eq!(idle.map(f32::to_bits), [1.0f32; 3].map(f32::to_bits));
    }

    /// A head of `width` 2 that has seen tokens which received these sums.
    fn head(setting: &KvSetting, received: &[f32]) -> Head {
        let mut head = Head::new(setting, 2, vec![2.0, 0.5]);
        for (position, received) in received.iter().enumerate() {
            let at = position as f32;
            head.add(position as u32, [&[at, -1.0], &[1.0, at]], *received);
        }
        head
    }

    #[test]
    fn the_last_tokens_and_those_that_received_most_stay_and_the_others_are_rounded() {
        let setting = KvSetting { recent: 2, high: 32, ..KvSetting::new(KvMode::Mikv) };
        let received = [0.5, 3.0, 0.1, 0.1, 2.0, 0.0, 0.0];
        let mut mikv = head(&setting, &received);
        mikv.demote(&setting, 4, 7);
        assert_eq!(mikv.positions, [1, 4, 5, 6]);
        assert_eq!(mikv.received, [3.0, 2.0, 0.0, 0.0]);
        assert_eq!(mikv.low_positions, [0, 2, 3]);
        let [mut keys, mut values] = [[0.0; 14]; 2];
        mikv.read_into(false, 2, &mut keys, &mut values);
        for position in 0..7 {
            let near = |a: f32, b: f32| (a - b).abs() < 0.01;
            let at = 2 * position;
            assert!(near(keys[at], position as f32) && near(keys[at + 1], -1.0), "{keys:?}");
            assert!(near(values[at], 1.0) && near(values[at + 1], position as f32), "{values:?}");
        }
        let evict = KvSetting { mode: KvMode::Evict, ..setting };
        let mut evicted = head(&evict, &received);
        evicted.demote(&evict, 4, 7);
        assert_eq!(evicted.positions, mikv.positions);
        assert!(evicted.low_positions.is_empty());
        let uniform = KvSetting { mode: KvMode::Uniform, ..setting };
        let mut all = head(&uniform, &received);
        all.demote(&uniform, 0, 7);
        assert_eq!((all.positions.len(), all.low_positions.len()), (0, 7));
    }
}
