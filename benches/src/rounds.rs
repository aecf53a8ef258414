//! Interleaved rounds: every combination once a round in shuffled order, disturbed slices measured again.
#![forbid(unsafe_code)]

use crate::stats::Estimate;
use preflightd_tests::random::Random;
use std::{collections::HashMap, hash::Hash, io, time::Duration};

/// A slice counts if other work took less than this share of one CPU meanwhile.
pub const TOLERATED: f64 = 0.03;
/// How much disturbance makes a slice count no more: [`TOLERATED`], or with `accept_noise` none does.
pub fn tolerated(accept_noise: bool) -> f64 {
    if accept_noise { f64::INFINITY } else { TOLERATED }
}

/// How often a disturbed slice is measured again before its round does without it.
pub const ATTEMPTS: usize = 3;

/// What one slice gave, and how far other work disturbed it.
#[derive(Clone, Copy, Debug)]
pub struct Slice<T> {
    /// The measured values.
    pub value: T,
    /// CPU time of other work over the slice's length.
    pub disturbance: f64,
}

impl<T> Slice<T> {
    /// From the CPU time that other work took during `length`.
    pub fn new(value: T, others: Duration, length: Duration) -> Self {
        Self { value, disturbance: others.as_secs_f64() / length.as_secs_f64().max(f64::MIN_POSITIVE) }
    }
}

/// All slices that count, by what was measured and by round.
#[derive(Debug)]
pub struct Rounds<K, T> {
    values: Vec<HashMap<K, T>>,
    /// Slices measured.
    pub slices: usize,
    /// Slices thrown away because other work disturbed them.
    pub discarded: usize,
}

impl<K: Copy + Eq + Hash, T: Copy> Rounds<K, T> {
    /// Measures each of `keys` once a round, `count` rounds long, in an order that is shuffled anew each round.
    /// Slices count that were `tolerated` ([`tolerated`]). `progress` hears of each round begun.
    ///
    /// # Errors
    /// A measurement fails.
    pub fn run(
        keys: &[K],
        count: usize,
        tolerated: f64,
        mut progress: impl FnMut(usize),
        mut measure: impl FnMut(K) -> io::Result<Slice<T>>,
    ) -> io::Result<Self> {
        let mut all = Self { values: Vec::with_capacity(count), slices: 0, discarded: 0 };
        let mut order = keys.to_vec();
        let mut random = Random::new(0);
        for round in 0..count {
            progress(round);
            random.shuffle(&mut order);
            let mut values = HashMap::new();
            for &key in &order {
                for _ in 0..ATTEMPTS {
                    let slice = measure(key)?;
                    all.slices += 1;
                    if slice.disturbance <= tolerated {
                        values.insert(key, slice.value);
                        break;
                    }
                    all.discarded += 1;
                }
            }
            all.values.push(values);
        }
        Ok(all)
    }

    /// Median and bounds of one value over the rounds.
    pub fn estimate(&self, key: K, value: impl Fn(&T) -> f64) -> Option<Estimate> {
        Estimate::of(self.values.iter().filter_map(|round| round.get(&key).map(&value)))
    }

    /// Median and bounds of the ratio `of` / `to`, each taken within one round: what changes slowly cancels out.
    pub fn ratio(&self, of: K, to: K, value: impl Fn(&T) -> f64) -> Option<Estimate> {
        Estimate::of(
            self.values.iter().filter_map(|round| Some(value(round.get(&of)?) / value(round.get(&to)?))),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_once_a_round_and_disturbed_slices_do_not_count() {
        let mut calls = 0;
        let rounds = Rounds::run(
            &['a', 'b', 'c'],
            7,
            TOLERATED,
            |_| (),
            |key| {
                calls += 1;
                let others = if key == 'c' { Duration::from_millis(50) } else { Duration::ZERO };
                Ok(Slice::new(if key == 'a' { 2.0 } else { 1.0 }, others, Duration::from_secs(1)))
            },
        )
        .expect("measured");
        assert_eq!(calls, 7 * (2 + ATTEMPTS));
        assert_eq!(rounds.discarded, 7 * ATTEMPTS);
        assert_eq!(
            rounds.ratio('a', 'b', |value| *value).map(|ratio| (ratio.median, ratio.count)),
            Some((2.0, 7))
        );
        assert!(rounds.ratio('a', 'c', |value| *value).is_none());
    }
}
