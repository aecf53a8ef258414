//! Route labels: small stable numbers for (host pattern, path match, policy), so that counters survive reloads and
//! their cardinality is bounded.

use ahash::AHashMap;
use std::sync::Arc;

/// Number of a route's label. 0 is "none, or beyond the bound".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RouteId(pub u32);

impl RouteId {
    /// No route, or one beyond the bound.
    pub const OTHER: RouteId = RouteId(0);
}

/// What a label says.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RouteLabel {
    /// The host pattern as written, such as `*.example.com`.
    pub host: Arc<str>,
    /// The path match as written: `/exact`, `/prefix*`, `~regex`.
    pub route: Arc<str>,
    /// The policy's name.
    pub policy: Arc<str>,
}

/// Interns route labels; numbers are never reused, at most `capacity` of them (the rest share [`RouteId::OTHER`]).
#[derive(Debug)]
pub struct RouteLabels {
    capacity: usize,
    ids: AHashMap<RouteLabel, RouteId>,
    labels: Vec<RouteLabel>,
}

impl RouteLabels {
    /// `capacity` counts label 0.
    pub fn new(capacity: usize) -> Self {
        let other = RouteLabel { host: "".into(), route: "".into(), policy: "".into() };
        Self { capacity: capacity.max(1), ids: AHashMap::new(), labels: vec![other] }
    }

    /// The number of this label, new or known; [`RouteId::OTHER`] beyond the bound.
    pub fn intern(&mut self, label: RouteLabel) -> RouteId {
        if let Some(id) = self.ids.get(&label) {
            return *id;
        }
        if self.labels.len() >= self.capacity {
            return RouteId::OTHER;
        }
        let id = RouteId(self.labels.len() as u32);
        self.labels.push(label.clone());
        self.ids.insert(label, id);
        id
    }

    /// All labels by number; the first is "other".
    pub fn all(&self) -> &[RouteLabel] {
        &self.labels
    }

    /// The bound.
    pub fn capacity(&self) -> usize {
        self.capacity
    }
}
