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
use crate::policy::{KernelTable, Table, kernel::Summary};

/// How often what was decided is read, by route.
const READ: Duration = Duration::from_secs(1);
/// So many terms are written between two heartbeats: some ten milliseconds.
const CHUNK: usize = 8192;

/// What is known of kernel answers.
pub(super) struct Answers {
    /// In force; 0: none.
    generation: u32,
    second: u32,
    max_head: u32,
    max_answered: u32,
    summary: Arc<Summary>,
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
            second: 0,
            max_head: u32::try_from(max_head).unwrap_or(u32::MAX),
            max_answered,
            summary: Arc::default(),
            table: 0,
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
        if let Some(reason) = &made.summary.too_large {
            tracing::warn!("{reason}");
        }
        // Random, so that what another daemon has written, or is still writing, is of another one; and never 0.
        let generation = (random()?[0] as u32).max(1);
        let before = self.config.generation;
        let written = self.write_answers(generation, &made);
        if !self.is_in_charge()? {
            return Ok(());
        }
        self.answers.generation = if written.is_ok() { generation } else { 0 };
        self.config.generation = self.answers.generation;
        self.maps.set_config(self.config)?;
        self.answers.table = table.generation();
        self.answers.labels = self.answers.labels.max(made.labels());
        self.answers.summary = Arc::new(made.summary);
        // Whoever has read the old generation is done with it then.
        barrier::wait_for_programs();
        for terms in self.maps.terms_but(self.answers.generation)?.chunks(CHUNK) {
            if !self.goes_on()? {
                return Ok(());
            }
            self.maps.remove_terms(terms)?;
        }
        // By the templates of before, answers are sent again.
        self.maps.keep_templates([self.answers.generation, before])?;
        written
    }

    fn write_answers(&mut self, generation: u32, made: &KernelTable) -> Result<()> {
        self.maps.add_templates(generation, &made.templates)?;
        let mut terms = made.terms.iter().peekable();
        while terms.peek().is_some() && self.goes_on()? {
            self.maps.add_terms(generation, terms.by_ref().take(CHUNK))?;
        }
        Ok(())
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
        if self.answers.read.is_none_or(|read| read.elapsed() >= READ) {
            self.answers.read = Some(Instant::now());
            self.answers.outcomes = self.maps.outcomes(self.answers.labels)?;
        }
        Ok(())
    }
}
