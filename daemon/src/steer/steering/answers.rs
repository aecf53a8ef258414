//! What the kernel answers by: the table in its maps, a generation at a time, and the date.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use preflightd_common::abi::{event, swept};

use super::{
    super::{Counts, barrier, maps::Outcomes},
    KernelReport, Result, Steering,
};
use crate::policy::{Table, kernel::Summary};

/// How often what was decided is read, by route.
const READ: Duration = Duration::from_secs(1);
/// So many terms are written between two heartbeats: some ten milliseconds.
const CHUNK: usize = 8192;

/// What is known of kernel answers.
pub(super) struct Answers {
    /// In force; 0: none.
    generation: u32,
    /// The last one that was written, in force or not.
    last: u32,
    /// Templates of this one are kept too.
    before: u32,
    second: u32,
    max_head: u32,
    max_answered: u32,
    summary: Summary,
    /// The policies' own generation.
    table: u64,
    /// Entries of `ANSWERED` that the last sweep left, and insertions less removals at that time.
    swept: (u64, i64),
    outcomes: Vec<Outcomes>,
    labels: u32,
    read: Option<Instant>,
}

impl Answers {
    pub(super) fn new(max_answered: u32, max_head: usize) -> Self {
        Self {
            generation: 0,
            last: 0,
            before: 0,
            second: 0,
            max_head: u32::try_from(max_head).unwrap_or(u32::MAX),
            max_answered,
            summary: Summary::default(),
            table: 0,
            swept: (0, 0),
            outcomes: Vec::new(),
            labels: 0,
            read: None,
        }
    }

    /// Goes on behind the generation of an earlier daemon.
    pub(super) fn follow(&mut self, generation: u32) {
        self.last = generation;
        self.before = generation;
    }

    pub(super) fn generation(&self) -> u32 {
        self.generation
    }

    pub(super) fn second(&self) -> u32 {
        self.second
    }

    pub(super) fn max_head(&self) -> u32 {
        self.max_head
    }

    pub(super) fn swept(&mut self, slots: &[u32], counts: &Counts) {
        let left = slots.get(swept::Answered as usize).copied().unwrap_or(0);
        self.swept = (u64::from(left), balance(counts));
    }

    pub(super) fn report(&self, on: bool, counts: &Counts) -> KernelReport {
        let since = balance(counts) - self.swept.1;
        KernelReport {
            on: on && self.generation != 0,
            generation: self.table,
            summary: self.summary.clone(),
            answered: self.swept.0.saturating_add_signed(since).min(u64::from(self.max_answered)),
            max_answered: self.max_answered,
            outcomes: self.outcomes.clone(),
        }
    }
}

/// Entries made in `ANSWERED`, less those that the program removed.
fn balance(counts: &Counts) -> i64 {
    counts.event(event::AnsweredInserted).cast_signed() - counts.event(event::AnsweredRemoved).cast_signed()
}

impl Steering {
    /// Brings what the kernel can decide of the table into force, all of it at once: it is written beside what is in force,
    /// under a generation of its own, which one word then names.
    ///
    /// # Errors
    /// The kernel refuses a map. Nothing is answered by it then.
    pub(super) fn set_answers(&mut self, table: &Table) -> Result<()> {
        let listeners: Vec<_> = self.services.iter().map(|service| service.listener).collect();
        let made = table.for_kernel(&listeners);
        // Never 0: that says that there is none.
        let generation = self.answers.last.wrapping_add(1).max(1);
        let before = self.answers.last;
        self.answers.last = generation;
        if let Some(reason) = &made.summary.too_large {
            tracing::warn!("{reason}");
        }
        let written = self.write_answers(generation, &made);
        self.answers.generation = if written.is_ok() { generation } else { 0 };
        self.config.generation = self.answers.generation;
        self.maps.set_config(self.config)?;
        self.answers.table = table.generation();
        self.answers.labels = self.answers.labels.max(made.labels());
        self.answers.summary = made.summary;
        // Whoever has read the old generation is done with it.
        barrier::wait_for_programs();
        self.maps.keep_generation(generation, before)?;
        self.answers.before = before;
        written
    }

    fn write_answers(&mut self, generation: u32, made: &crate::policy::KernelTable) -> Result<()> {
        self.maps.add_templates(generation, &made.templates)?;
        let mut terms = made.terms.iter();
        loop {
            let mut some = terms.by_ref().take(CHUNK).peekable();
            if some.peek().is_none() {
                return Ok(());
            }
            self.maps.add_terms(generation, some)?;
            // It takes its time, and the daemon is well.
            if self.engaged {
                self.maps.beat(true)?;
            }
        }
    }

    /// The date, once a second; and what was decided.
    pub(super) fn set_date(&mut self) -> Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let second = u32::try_from(now).unwrap_or(u32::MAX);
        if second != self.answers.second {
            self.maps.set_date(second)?;
            self.answers.second = second;
        }
        if self.answers.read.is_none_or(|read| read.elapsed() >= READ) {
            self.answers.read = Some(Instant::now());
            self.answers.outcomes = self.maps.outcomes(self.answers.labels)?;
        }
        Ok(())
    }
}
