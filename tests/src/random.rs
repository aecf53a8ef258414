//! Numbers that only have to be spread, the same in every run.
#![forbid(unsafe_code)]

/// SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// Seeds side by side give numbers that have nothing to do with each other.
    pub fn new(seed: u64) -> Self {
        Self(scramble(seed))
    }

    /// Below `bound`.
    pub fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        ((u128::from(scramble(self.0)) * bound as u128) >> 64) as usize
    }

    /// One of `items`, which are not empty.
    pub fn pick<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.below(items.len())]
    }

    /// Puts `items` into another order.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }
}

fn scramble(mut bits: u64) -> u64 {
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    bits ^ (bits >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_spread_and_come_again_by_their_seed() {
        let draw = |seed| {
            let mut random = Random::new(seed);
            (0..10_000).map(|_| random.below(10)).collect::<Vec<_>>()
        };
        for seed in [0, 1, 2, u64::MAX] {
            let numbers = draw(seed);
            assert_eq!(numbers, draw(seed), "seed {seed}");
            for wanted in 0..10 {
                let count = numbers.iter().filter(|number| **number == wanted).count();
                assert!((900..1100).contains(&count), "seed {seed}: {wanted} came {count} times");
            }
        }
        let same = draw(1).iter().zip(draw(2)).filter(|(one, other)| **one == *other).count();
        assert!((900..1100).contains(&same), "two seeds agree {same} times");
    }

    #[test]
    fn shuffling_loses_nothing() {
        let mut items: Vec<_> = (0..100).collect();
        Random::new(7).shuffle(&mut items);
        assert_ne!(items, (0..100).collect::<Vec<_>>());
        items.sort_unstable();
        assert_eq!(items, (0..100).collect::<Vec<_>>());
    }
}
