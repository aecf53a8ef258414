//! What follows from the counters: storms, ports that are not ours, how full the map is.

use std::time::{Duration, Instant};

use aya::programs::{SchedClassifier, TestRun as _, TestRunOptions};
use preflightd_common::abi::{event, kind, swept};

use super::{
    super::{Error, PRIVILEGES, maps::Swept, object},
    Result, Steering, preflights,
};
use crate::config::Engage;

/// Over what time rates are measured.
const WINDOW: Duration = Duration::from_secs(1);
/// How long it must be calm until a storm is over.
const CALM: Duration = Duration::from_secs(10);
/// What is not ours on a port is judged over this time, from so many connections on.
const JUDGED: Duration = Duration::from_secs(10);
const JUDGED_FROM: u64 = 8;
/// What is plain HTTP/1.
const OURS: [u32; 3] = [kind::Preflight, kind::Options, kind::Other];
/// So many clients may wait in silence for each that has spoken of late: in a time that fades by this much each time that
/// a port is judged, ten minutes in all, as long as silent clients are kept.
const SILENT_EACH: f64 = 8.0;
const FADING: f64 = 1.0 - 1.0 / 60.0;

/// How long a port is disengaged at first; each time twice as long.
pub(super) const FIRST_PAUSE: Duration = Duration::from_mins(1);
const LONGEST_PAUSE: Duration = Duration::from_hours(1);

/// Why, and how long, a port's connections are not deferred.
pub(super) struct Disengaged {
    pub(super) why: String,
    until: Instant,
}

/// Whether there is a storm.
#[derive(Debug)]
pub(super) struct Storm {
    pub(super) on: bool,
    /// Preflights per second.
    pub(super) rate: f64,
    pub(super) calm_since: Option<Instant>,
}

/// How full `PENDING` is, about: evictions are not told.
#[derive(Debug, Default)]
pub(super) struct Occupancy {
    /// Entries that the last sweep left, and the balance of insertions and removals at that time.
    pub(super) swept: u64,
    pub(super) balance: i64,
    pub(super) now: u64,
    pub(super) silent: Vec<u32>,
}

impl Steering {
    /// The rate of preflights, and what follows from it.
    pub(super) fn measure(&mut self, now: Instant) {
        let (since, before) = self.earlier;
        let passed = now.duration_since(since);
        if passed < WINDOW {
            return;
        }
        let count = preflights(&self.counts);
        #[expect(clippy::cast_precision_loss, reason = "a rate need not be exact")]
        let rate = count.saturating_sub(before) as f64 / passed.as_secs_f64();
        self.earlier = (now, count);
        self.storm.rate = rate;
        let options = &self.options;
        if rate > f64::from(options.storm_above) {
            if !self.storm.on && options.engage == Engage::Storm {
                tracing::info!(rate, "a storm of preflights: deferring handshakes");
            }
            self.storm.on = true;
            self.storm.calm_since = None;
        } else if self.storm.on && rate < f64::from(options.storm_below) {
            let since = *self.storm.calm_since.get_or_insert(now);
            if now.duration_since(since) >= CALM {
                if options.engage == Engage::Storm {
                    tracing::info!(rate, "the storm is over: not a packet is touched");
                }
                self.storm.on = false;
                self.storm.calm_since = None;
            }
        } else {
            self.storm.calm_since = None;
        }
    }

    /// Disengages ports whose connections are not for us to defer.
    pub(super) fn judge(&mut self, now: Instant) {
        if now.duration_since(self.judged.0) < JUDGED {
            return;
        }
        let before = std::mem::replace(&mut self.judged, (now, self.counts.clone())).1;
        for (port, row) in &mut self.rows {
            let new = |kind| self.counts.port(row.row, kind).saturating_sub(before.port(row.row, kind));
            let silent = self.pending.silent.get(row.row as usize).copied().unwrap_or(0);
            if let Some(off) = &row.disengaged {
                if now >= off.until {
                    tracing::info!(port, "the port is tried again");
                    row.disengaged = None;
                    // Those wait since then.
                    row.silent_before = silent;
                    row.spoken = 0.0;
                }
                continue;
            }
            let ours = OURS.into_iter().map(new).sum::<u64>();
            #[expect(clippy::cast_precision_loss, reason = "an estimate")]
            let spoken = row.spoken * FADING + ours as f64;
            row.spoken = spoken;
            // They go one after the other.
            row.silent_before = row.silent_before.min(silent);
            let why = objection(new, silent - row.silent_before, spoken);
            if why.is_none() && ours >= JUDGED_FROM {
                row.pause = FIRST_PAUSE;
            }
            if let Some(why) = why {
                tracing::warn!(
                    port,
                    why,
                    again_in = ?row.pause,
                    "the port is not steered for a while: take it out of the configuration if it is not plain HTTP"
                );
                row.disengaged = Some(Disengaged { why, until: now + row.pause });
                row.pause = (row.pause * 2).min(LONGEST_PAUSE);
            }
        }
    }

    /// How full `PENDING` is, 0 to 1.
    pub(super) fn fill(&self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let fill = self.occupied() as f64 / f64::from(self.max_pending.max(1));
        fill
    }

    /// Entries that each CPU may make until the next tick: together they leave an eighth free, so that nobody is evicted.
    pub(super) fn room(&self) -> u32 {
        let all = u64::from(self.max_pending);
        // Free entries that other CPUs may hold back (`LOCAL_FREE_TARGET`, kernel/bpf/bpf_lru_list.c).
        let held_back = (self.cpus * 128).min(all / 2);
        let usable = (all / 8 * 7).saturating_sub(held_back);
        let free = usable.saturating_sub(self.occupied());
        u32::try_from(free / self.cpus.max(1)).unwrap_or(u32::MAX)
    }

    pub(super) fn occupied(&self) -> u64 {
        let since = self.balance() - self.pending.balance;
        self.pending.swept.saturating_add_signed(since).min(u64::from(self.max_pending))
    }

    /// Insertions less removals.
    pub(super) fn balance(&self) -> i64 {
        self.counts.event(event::Inserted).cast_signed() - self.counts.event(event::Removed).cast_signed()
    }

    pub(super) fn sweep(&mut self) -> Result<()> {
        self.maps.prepare_sweep()?;
        let program: &mut SchedClassifier = object::program(&mut self.ebpf, "sweep_pending");
        // The least that counts as a frame.
        let frame = [0; 14];
        let options = TestRunOptions { data_in: Some(&frame), ..TestRunOptions::default() };
        let begin = Instant::now();
        program.test_run(options).map_err(Error::new("sweep the map of waiting connections", PRIVILEGES))?;
        self.times.sweeping = begin.elapsed();
        let Swept { slots, silent } = self.maps.swept()?;
        self.answers.swept(&slots, &self.counts);
        let all = [swept::Observed, swept::Deferred, swept::Acknowledged, swept::Given];
        self.pending = Occupancy {
            swept: all.iter().map(|slot| u64::from(slots[*slot as usize])).sum(),
            balance: self.balance(),
            now: u64::from(slots[swept::Deferred as usize]) + u64::from(slots[swept::Acknowledged as usize]),
            silent,
        };
        Ok(())
    }
}

/// Why connections of a port are not for us to defer, if so. `new`: how many connections opened with a kind since the port
/// was judged last; `silent`: how many wait; `spoken`: how many opened with plain HTTP/1 of late.
fn objection(new: impl Fn(u32) -> u64, silent: u32, spoken: f64) -> Option<String> {
    let foreign = [
        (kind::Tls, "TLS"),
        (kind::H2c, "HTTP/2 without TLS"),
        (kind::ProxyProtocol, "the PROXY protocol"),
        (kind::ServerFirst, "a server that speaks first"),
    ];
    let ours: u64 = OURS.into_iter().map(&new).sum();
    let (most, what) = foreign.into_iter().map(|(kind, what)| (new(kind), what)).max().unwrap_or_default();
    if most >= JUDGED_FROM && most >= ours {
        return Some(format!("{most} of the last {} connections began with {what}", most + ours));
    }
    // Browsers open connections ahead of need; where HTTP is spoken, most that come speak.
    (u64::from(silent) >= JUDGED_FROM && f64::from(silent) > SILENT_EACH * spoken).then(|| {
        format!(
            "{silent} clients wait, as for a server that speaks first, and {spoken:.0} have spoken of late"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_that_are_not_ours() {
        /// Name, connections by kind, clients that wait, those that have spoken of late, what the objection says.
        type Case = (&'static str, &'static [(u32, u64)], u32, f64, Option<&'static str>);
        let cases: &[Case] = &[
            ("nobody", &[], 0, 0.0, None),
            ("plain HTTP", &[(kind::Other, 100), (kind::Preflight, 3)], 2, 103.0, None),
            ("TLS", &[(kind::Tls, 8)], 0, 0.0, Some("8 of the last 8 connections began with TLS")),
            ("a little TLS", &[(kind::Tls, 7)], 0, 0.0, None),
            ("as much TLS as HTTP", &[(kind::Tls, 20), (kind::Other, 20)], 0, 20.0, Some("TLS")),
            ("less TLS than HTTP", &[(kind::Tls, 20), (kind::Other, 21)], 0, 21.0, None),
            ("the PROXY protocol", &[(kind::ProxyProtocol, 9)], 0, 0.0, Some("PROXY")),
            ("all wait", &[], 8, 0.0, Some("8 clients wait")),
            ("a few wait", &[], 7, 0.0, None),
            ("one strayed to a server that speaks first", &[], 9, 1.0, Some("9 clients wait")),
            ("browsers that opened ahead of need, on a quiet site", &[], 8, 1.0, None),
            ("the same in the midst of traffic", &[(kind::Other, 50)], 300, 50.0, None),
        ];
        for (name, counts, silent, spoken, want) in cases {
            let new = |kind| counts.iter().find(|(of, _)| *of == kind).map_or(0, |(_, count)| *count);
            let got = objection(new, *silent, *spoken);
            match want {
                None => assert_eq!(got, None, "{name}"),
                Some(want) => {
                    assert!(got.as_deref().is_some_and(|why| why.contains(want)), "{name}: {got:?}");
                }
            }
        }
    }
}
