//! Draws as Python's `random.Random(seed).sample` makes them, which choose few-shot examples in
//! lm-evaluation-harness: a Mersenne Twister (Matsumoto and Nishimura, ACM TOMACS 8, 1998), MT19937.

const LENGTH: usize = 624;
const MIDDLE: usize = 397;
/// Python keeps a list of what is left up to this many, and a set of what was taken above.
const SMALL: usize = 21;

/// A generator in the state of `random.Random(seed)`.
pub(super) struct PythonRandom {
    state: [u32; LENGTH],
    at: usize,
}

impl PythonRandom {
    /// Seeds it with a number as Python does, by the number's words.
    pub(super) fn new(seed: u32) -> Self {
        let mut state = [0; LENGTH];
        state[0] = 19_650_218;
        for i in 1..LENGTH {
            let last: u32 = state[i - 1] ^ (state[i - 1] >> 30);
            state[i] = last.wrapping_mul(1_812_433_253).wrapping_add(i as u32);
        }
        let mut i = 1;
        // One word of key: its index, which is added, stays 0.
        for _ in 0..LENGTH {
            let last = (state[i - 1] ^ (state[i - 1] >> 30)).wrapping_mul(1_664_525);
            state[i] = (state[i] ^ last).wrapping_add(seed);
            i = Self::next_index(i, &mut state);
        }
        for _ in 1..LENGTH {
            let last = (state[i - 1] ^ (state[i - 1] >> 30)).wrapping_mul(1_566_083_941);
            state[i] = (state[i] ^ last).wrapping_sub(i as u32);
            i = Self::next_index(i, &mut state);
        }
        state[0] = 0x8000_0000;
        Self { state, at: LENGTH }
    }

    fn next_index(i: usize, state: &mut [u32; LENGTH]) -> usize {
        if i + 1 < LENGTH {
            return i + 1;
        }
        state[0] = state[LENGTH - 1];
        1
    }

    fn word(&mut self) -> u32 {
        if self.at == LENGTH {
            for i in 0..LENGTH {
                let joined =
                    (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % LENGTH] & 0x7fff_ffff);
                let odd = if joined & 1 == 1 { 0x9908_b0df } else { 0 };
                self.state[i] = self.state[(i + MIDDLE) % LENGTH] ^ (joined >> 1) ^ odd;
            }
            self.at = 0;
        }
        let mut word = self.state[self.at];
        self.at += 1;
        word ^= word >> 11;
        word ^= (word << 7) & 0x9d2c_5680;
        word ^= (word << 15) & 0xefc6_0000;
        word ^ (word >> 18)
    }

    /// A number below `count`, which is not 0.
    fn below(&mut self, count: usize) -> usize {
        let bits = usize::BITS - count.leading_zeros();
        loop {
            let drawn = (self.word() >> (32 - bits.min(32))) as usize;
            if drawn < count {
                return drawn;
            }
        }
    }

    /// `count` unlike places of a list of `length` in the order they were drawn; no more than there are.
    pub(super) fn sample(&mut self, length: usize, count: usize) -> Vec<usize> {
        let count = count.min(length);
        let mut small = SMALL;
        if count > 5 {
            small += 4_usize.pow((3.0 * count as f64).log(4.0).ceil() as u32);
        }
        if length > small {
            let mut taken = Vec::with_capacity(count);
            while taken.len() < count {
                let drawn = self.below(length);
                if !taken.contains(&drawn) {
                    taken.push(drawn);
                }
            }
            return taken;
        }
        let mut left: Vec<usize> = (0..length).collect();
        let draw = |_| {
            let drawn = self.below(left.len());
            left.swap_remove(drawn)
        };
        (0..count).map(draw).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_those_of_python() {
        // [r.sample(range(n), k) for n, k in ...] with r = random.Random(1234), Python 3.11.
        let mut random = PythonRandom::new(1234);
        assert_eq!(random.sample(7473, 5), [6374, 3610, 957, 61, 742]);
        assert_eq!(random.sample(7473, 5), [7462, 6610, 4769, 286, 5501]);
        assert_eq!(random.sample(20, 6), [2, 3, 11, 7, 0, 15]);
        assert_eq!(random.sample(300, 8), [8, 177, 247, 237, 76, 46, 93, 58]);
        assert_eq!(random.sample(3, 5).len(), 3);
    }
}
