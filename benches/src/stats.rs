//! Medians, percentiles and the bounds of a median, free of assumptions on how noise is distributed.
#![forbid(unsafe_code)]

/// A median with the bounds within which it lies with 95 % confidence.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// The median.
    pub median: f64,
    /// Lower bound.
    pub lower: f64,
    /// Upper bound.
    pub upper: f64,
    /// How many values it was taken from.
    pub count: usize,
}

impl Estimate {
    /// The median of `values` with its bounds by order statistics (binomial, so exact for any distribution; below six
    /// values the bounds are the extremes and hold with less than 95 %). `None` without values.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<f64> = values.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        let count = sorted.len();
        let last = count.checked_sub(1)?;
        let median = f64::midpoint(sorted[last / 2], sorted[count / 2]);
        let below = outside(count);
        Some(Self { median, lower: sorted[below], upper: sorted[last - below], count })
    }
}

impl From<f64> for Estimate {
    /// Of what is counted or measured once.
    fn from(value: f64) -> Self {
        Self { median: value, lower: value, upper: value, count: 1 }
    }
}

/// How many values can be left out at either end so that the rest still spans the median in 95 % of all samples.
fn outside(count: usize) -> usize {
    // Probability that at most `k` of `count` values fall below the true median, summed up term by term.
    let mut term = 0.5_f64.powi(i32::try_from(count).unwrap_or(i32::MAX));
    let mut tail = term;
    let mut k = 0;
    while tail <= 0.025 && k < count / 2 {
        term *= (count - k) as f64 / (k + 1) as f64;
        tail += term;
        k += 1;
    }
    k.saturating_sub(1)
}

/// The value below which `percent` of `sorted` lie, 0 if it is empty.
pub fn percentile(sorted: &[u32], percent: usize) -> u32 {
    sorted.len().checked_sub(1).map_or(0, |last| sorted[last * percent / 100])
}

/// The median of `values`, NaN if there are none.
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    Estimate::of(values).map_or(f64::NAN, |estimate| estimate.median)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_leave_out_what_the_binomial_table_says() {
        // n, values below the lower bound: the classic table of sign-test intervals at 95 %.
        for (count, below) in [(1, 0), (5, 0), (6, 0), (8, 0), (9, 1), (10, 1), (12, 2), (20, 5), (30, 9)] {
            assert_eq!(outside(count), below, "{count} values");
        }
    }

    #[test]
    fn medians() {
        for (name, values, expected) in [
            ("one", vec![3.0], 3.0),
            ("odd", vec![9.0, 1.0, 2.0], 2.0),
            ("even", vec![4.0, 1.0, 2.0, 3.0], 2.5),
        ] {
            assert!((median(values) - expected).abs() < 1e-12, "{name}");
        }
        assert!(median([]).is_nan());
    }

    #[test]
    fn percentiles() {
        let values: Vec<u32> = (0..=100).collect();
        assert_eq!(percentile(&values, 50), 50);
        assert_eq!(percentile(&values, 99), 99);
        assert_eq!(percentile(&[], 50), 0);
    }
}
