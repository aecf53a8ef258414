//! A worker's side: preflights that the proxy may be asked about are copied into a ring, and never waited for.
#![forbid(unsafe_code)]

use super::Counters;
use crate::{
    policy::{Decision, ListenerId},
    reason::PassReason,
};
use std::{
    fmt,
    sync::{Arc, atomic::Ordering},
};
use tokio::sync::Notify;

/// Longer heads are not sampled, in bytes.
pub(super) const MAX_SAMPLE: usize = 2048 - 4;
/// Samples of one worker that may wait.
const RING: usize = 32;

/// The head of a preflight.
pub(super) struct Sample {
    pub(super) listener: ListenerId,
    length: u16,
    bytes: [u8; MAX_SAMPLE],
}

impl Sample {
    /// The head's bytes.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.length)]
    }
}

/// What a worker shows its preflights to.
pub struct Sampler {
    ring: rtrb::Producer<Sample>,
    wake: Arc<Notify>,
    counters: Arc<Counters>,
    /// In shadow mode: which preflights are compared.
    shadow: Option<Lots>,
}

/// Draws a share of all.
#[derive(Debug)]
pub(super) struct Lots {
    /// Of 2^64 so many.
    share: u64,
    random: u64,
}

impl Lots {
    /// `share`: 0 to 1.
    pub(super) fn new(share: f64, seed: u64) -> Self {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "a share of 0 to 1, and casts saturate"
        )]
        let share = (share * u64::MAX as f64) as u64;
        Self { share, random: seed | 1 }
    }

    /// Xorshift (Marsaglia, 2003): good enough to draw lots.
    pub(super) fn draw(&mut self) -> bool {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random <= self.share
    }
}

impl fmt::Debug for Sampler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sampler").field("shadow", &self.shadow).finish_non_exhaustive()
    }
}

impl Sampler {
    pub(super) fn new(
        wake: Arc<Notify>,
        counters: Arc<Counters>,
        shadow: Option<Lots>,
    ) -> (Self, rtrb::Consumer<Sample>) {
        let (ring, intake) = rtrb::RingBuffer::new(RING);
        (Self { ring, wake, counters, shadow }, intake)
    }

    /// Nothing is answered, only compared.
    pub fn is_shadow(&self) -> bool {
        self.shadow.is_some()
    }

    /// A preflight was decided; `head`: its bytes.
    #[inline]
    pub fn see(&mut self, listener: ListenerId, head: &[u8], decision: &Decision<'_>) {
        let wanted = match &mut self.shadow {
            Some(lots) => lots.draw(),
            None => matches!(decision, Decision::Pass(PassReason::NotLearned, _)),
        };
        if wanted {
            self.take(listener, head);
        }
    }

    #[cold]
    fn take(&mut self, listener: ListenerId, head: &[u8]) {
        let mut sample = Sample { listener, length: head.len() as u16, bytes: [0; MAX_SAMPLE] };
        let Some(place) = sample.bytes.get_mut(..head.len()) else {
            self.counters.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        };
        place.copy_from_slice(head);
        if self.ring.push(sample).is_ok() {
            self.wake.notify_one();
        } else {
            self.counters.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::RouteId;

    const PASS: Decision<'static> = Decision::Pass(PassReason::NotLearned, RouteId::OTHER);
    const OTHER: Decision<'static> = Decision::Pass(PassReason::NoHost, RouteId::OTHER);

    fn sampler(shadow: Option<f64>) -> (Sampler, rtrb::Consumer<Sample>, Arc<Counters>) {
        let counters = Arc::new(Counters::default());
        let (sampler, intake) =
            Sampler::new(Arc::default(), counters.clone(), shadow.map(|share| Lots::new(share, 7)));
        (sampler, intake, counters)
    }

    #[test]
    fn what_may_be_learned_is_sampled_as_far_as_there_is_room() {
        let (mut sampler, mut intake, counters) = sampler(None);
        sampler.see(ListenerId(3), b"other", &OTHER);
        sampler.see(ListenerId(3), &[b'a'; MAX_SAMPLE + 1], &PASS);
        for _ in 0..=RING {
            sampler.see(ListenerId(3), b"head", &PASS);
        }
        assert_eq!(counters.dropped.load(Ordering::Relaxed), 2, "one too long, one too many");
        let sample = intake.pop().expect("a sample");
        assert_eq!((sample.listener, sample.bytes()), (ListenerId(3), &b"head"[..]));
        assert_eq!(intake.slots(), RING - 1);
    }

    #[test]
    fn a_share_is_compared_whatever_was_decided() {
        for (share, expected) in [(0.0, 0..=0), (0.1, 50..=150), (1.0, 1000..=1000)] {
            let (mut sampler, mut intake, _) = sampler(Some(share));
            let mut taken = 0;
            for _ in 0..1000 {
                sampler.see(ListenerId(0), b"head", &OTHER);
                taken += usize::from(intake.pop().is_ok());
            }
            assert!(expected.contains(&taken), "{share}: {taken}");
        }
    }
}
