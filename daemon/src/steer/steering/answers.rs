//! What the kernel answers by: the table in its maps, a generation at a time, and the date.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use preflightd_common::abi::{event, swept};

use super::{
    super::{Counts, barrier, maps::Outcomes},
    KernelReport, Result, Steering, random,
};
use crate::policy::{KernelTable, Table};

/// How often what was decided is read, by route; where there are few of them, with each tick.
const READ: Duration = Duration::from_secs(1);
const FEW: u32 = 1024;
/// When a table that could not be written is tried again.
const AGAIN: Duration = Duration::from_secs(10);
/// So many terms are written between two heartbeats: some ten milliseconds.
const CHUNK: usize = 8192;

/// What is known of kernel answers.
pub(super) struct Answers {
    /// In force; 0: none.
    generation: u32,
    second: u32,
    max_head: u32,
    max_answered: u32,
    /// In force; empty without one.
    table: Arc<KernelTable>,
    /// The policies' own generation.
    policies: u64,
    /// What could not be written, why not, and when it is tried again.
    failed: Option<Failed>,
    /// Entries of `ANSWERED` that the last sweep left, and insertions less removals at that time.
    swept: (u64, i64),
    outcomes: Vec<Outcomes>,
    labels: u32,
    read: Option<Instant>,
}

struct Failed {
    table: Arc<KernelTable>,
    policies: u64,
    why: String,
    again: Instant,
}

impl Answers {
    pub(super) fn new(max_answered: u32, max_head: usize) -> Self {
        Self {
            generation: 0,
            second: 0,
            max_head: u32::try_from(max_head).unwrap_or(u32::MAX),
            max_answered,
            table: Arc::default(),
            policies: 0,
            failed: None,
            swept: (0, 0),
            outcomes: Vec::new(),
            labels: 0,
            read: None,
        }
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

    /// How full `ANSWERED` is, about, 0 to 1.
    pub(super) fn fill(&self, counts: &Counts) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let fill = self.occupied(counts) as f64 / f64::from(self.max_answered.max(1));
        fill
    }

    fn occupied(&self, counts: &Counts) -> u64 {
        let since = balance(counts) - self.swept.1;
        self.swept.0.saturating_add_signed(since).min(u64::from(self.max_answered))
    }

    /// Why the kernel answers less than it might.
    pub(super) fn reasons(&self, counts: &Counts) -> Vec<String> {
        let mut reasons = Vec::new();
        if let Some(failed) = &self.failed {
            reasons.push(format!(
                "the kernel answers nothing, for its table could not be written: {}",
                failed.why
            ));
        }
        reasons.extend(self.table.summary.too_large.clone());
        if self.fill(counts) > CROWDED {
            reasons.push(format!(
                "of {} connections that the kernel may have answered on nearly all are there, and workers answer what \
                 comes on others: raise steer.max_answered",
                self.max_answered
            ));
        }
        reasons
    }

    pub(super) fn report(&self, on: bool, counts: &Counts) -> KernelReport {
        KernelReport {
            on: on && self.generation != 0 && self.table.summary.too_large.is_none(),
            generation: self.policies,
            table: Arc::clone(&self.table),
            answered: self.occupied(counts),
            max_answered: self.max_answered,
            outcomes: self.outcomes.clone(),
        }
    }
}

/// From what share on `ANSWERED` is crowded.
pub(super) const CROWDED: f64 = 0.875;

/// Entries made in `ANSWERED`, less those that the program removed.
fn balance(counts: &Counts) -> i64 {
    counts.event(event::AnsweredInserted).cast_signed() - counts.event(event::AnsweredRemoved).cast_signed()
}

impl Steering {
    /// Brings what the kernel can decide of the table into force, all of it at once: it is written beside what is in force,
    /// under a generation of its own, which one word then names.
    ///
    /// # Errors
    /// The kernel refuses a map. Nothing is answered by it then, until another try succeeds.
    pub(super) fn set_answers(&mut self, table: &Table) -> Result<()> {
        let listeners: Vec<_> = self.services.iter().map(|service| service.listener).collect();
        self.publish(Arc::new(table.for_kernel(&listeners)), table.generation())
    }

    /// Tries once more what could not be written.
    pub(super) fn publish_if_due(&mut self, now: Instant) -> Result<()> {
        match self.answers.failed.take_if(|failed| now >= failed.again) {
            Some(failed) => self.publish(failed.table, failed.policies),
            None => Ok(()),
        }
    }

    fn publish(&mut self, table: Arc<KernelTable>, policies: u64) -> Result<()> {
        let result = self.try_publish(&table, policies);
        if let Err(error) = &result {
            // Better nothing than what was in force before.
            self.answers.generation = 0;
            self.config.generation = 0;
            self.answers.table = Arc::default();
            let again = Instant::now() + AGAIN;
            self.answers.failed = Some(Failed { table, policies, why: error.to_string(), again });
            self.maps.set_config(self.config)?;
        }
        result
    }

    fn try_publish(&mut self, table: &Arc<KernelTable>, policies: u64) -> Result<()> {
        // Random, so that what another daemon has written, or is still writing, is of another one; and never 0.
        let generation = (random()?[0] as u32).max(1);
        let before = self.config.generation;
        // What was left half-way takes room.
        if !self.clear_answers(before, before)? || !self.write_answers(generation, table)? {
            return Ok(());
        }
        self.answers.generation = generation;
        self.config.generation = generation;
        self.maps.set_config(self.config)?;
        self.answers.failed = None;
        self.answers.policies = policies;
        self.answers.labels = self.answers.labels.max(table.labels());
        self.answers.table = Arc::clone(table);
        // By the templates of before, answers are sent again.
        self.clear_answers(generation, before)?;
        Ok(())
    }

    /// Removes all terms but those of this generation, and the templates of all but two; false: somebody else is in charge.
    fn clear_answers(&mut self, generation: u32, before: u32) -> Result<bool> {
        // Whoever has read another generation is done with it then.
        barrier::wait_for_programs();
        for terms in self.maps.terms_but(generation)?.chunks(CHUNK) {
            if !self.goes_on()? {
                return Ok(false);
            }
            self.maps.remove_terms(terms)?;
        }
        self.maps.keep_templates([generation, before])?;
        self.goes_on()
    }

    /// False: somebody else is in charge.
    fn write_answers(&mut self, generation: u32, table: &KernelTable) -> Result<bool> {
        self.maps.add_templates(generation, &table.templates)?;
        let mut terms = table.terms.iter().peekable();
        while terms.peek().is_some() {
            if !self.goes_on()? {
                return Ok(false);
            }
            self.maps.add_terms(generation, terms.by_ref().take(CHUNK))?;
        }
        self.goes_on()
    }

    /// Within what takes its time: the daemon is well, and if it is in charge no more it stops.
    fn goes_on(&mut self) -> Result<bool> {
        let goes_on = self.is_in_charge()?;
        if goes_on && self.engaged {
            self.maps.beat(true)?;
        }
        Ok(goes_on)
    }

    /// The date, once a second; and what was decided.
    pub(super) fn set_date(&mut self) -> Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let second = u32::try_from(now).unwrap_or(u32::MAX);
        if second != self.answers.second {
            self.maps.set_date(second)?;
            self.answers.second = second;
        }
        if self.answers.labels <= FEW || self.answers.read.is_none_or(|read| read.elapsed() >= READ) {
            self.answers.read = Some(Instant::now());
            self.answers.outcomes = self.maps.outcomes(self.answers.labels)?;
        }
        Ok(())
    }
}
