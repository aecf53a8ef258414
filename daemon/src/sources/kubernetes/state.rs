//! What is known of the API server as a source, for whoever shows it.

use super::resolve::{Imported, Noted};
use serde_json::{Value, json};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

/// The source at one moment.
#[derive(Clone, Debug, Default)]
pub struct State {
    /// What the objects came down to; in order of names.
    pub policies: Arc<[Imported]>,
    /// What was found wrong or doubtful.
    pub findings: Arc<[Noted]>,
    /// Grows with each change of the policies, or of whether they are stale.
    pub revision: u64,
    /// Everything has been listed once.
    pub synced: bool,
    /// It could not be asked for so long that its policies pass.
    pub stale: bool,
    /// When all was well the last time.
    pub fresh: Option<Instant>,
    /// How many objects there are, by kind.
    pub objects: Vec<(&'static str, usize)>,
    /// Why it cannot be asked, or a kind of object not be watched; by kind.
    pub failing: Vec<(&'static str, String)>,
    /// Kinds that the API server does not know.
    pub absent: Vec<&'static str>,
    /// Requests to it that failed, by kind.
    pub failures: Vec<(&'static str, u64)>,
    /// How long the objects took to be resolved, the last time.
    pub resolving: Duration,
}

impl State {
    /// So long ago all was well; `None`: never.
    pub fn age(&self) -> Option<Duration> {
        self.fresh.map(|fresh| fresh.elapsed())
    }

    /// For people and scripts.
    pub fn json(&self) -> Value {
        /// More findings than these are counted, and not shown.
        const SHOWN: usize = 1000;
        let passing = self.policies.iter().filter(|policy| policy.spec.passes.is_some()).count();
        let findings = self.findings.iter().take(SHOWN).map(|finding| {
            json!({
                "severity": finding.severity.as_str(),
                "code": finding.code,
                "object": finding.object.to_string(),
                "field": finding.field,
                "message": finding.message,
                "help": finding.help,
            })
        });
        let map = |pairs: Vec<(&'static str, Value)>| -> serde_json::Map<String, Value> {
            pairs.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
        };
        json!({
            "synced": self.synced,
            "stale": self.stale,
            "age_seconds": self.age().map(|age| age.as_secs()),
            "objects": map(self.objects.iter().map(|(kind, count)| (*kind, json!(count))).collect()),
            "failing": map(self.failing.iter().map(|(kind, why)| (*kind, json!(why))).collect()),
            "absent": self.absent,
            "policies": self.policies.len(),
            "policies_passing": passing,
            "findings": findings.collect::<Vec<_>>(),
            "findings_total": self.findings.len(),
        })
    }
}
