//! What can be told of steering.

use std::sync::Arc;

use preflightd_common::abi::{ask, event, kind};

use super::super::{Counts, maps::Outcomes};
use crate::policy::{KernelTable, kernel::Summary};

/// What the programs do at present.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Nothing is deferred or counted.
    Off,
    /// Connections are counted.
    Observing,
    /// New connections are deferred.
    Steering,
    /// Another daemon, or `preflightd detach`, has taken the programs over.
    Replaced,
}

impl State {
    /// All of them.
    pub const ALL: [State; 4] = [State::Off, State::Observing, State::Steering, State::Replaced];

    /// The metric label.
    pub fn as_str(self) -> &'static str {
        match self {
            State::Off => "off",
            State::Observing => "observing",
            State::Steering => "steering",
            State::Replaced => "replaced",
        }
    }
}

/// What can be told of steering.
#[derive(Clone, Debug)]
pub struct Report {
    /// What is done.
    pub state: State,
    /// Why no more than that, or what else is to be known.
    pub reasons: Vec<String>,
    /// Interfaces that have the program.
    pub interfaces: Vec<String>,
    /// The ports.
    pub ports: Vec<PortReport>,
    /// Counters.
    pub counts: Counts,
    /// Connections that wait for their first data, about.
    pub pending: u64,
    /// So many fit.
    pub max_pending: u32,
    /// What the kernel answers.
    pub kernel: KernelReport,
}

/// What can be told of kernel answers.
#[derive(Clone, Debug)]
pub struct KernelReport {
    /// It answers.
    pub on: bool,
    /// Generation of the policies that it answers by.
    pub generation: u64,
    /// What it decides by.
    pub table: Arc<KernelTable>,
    /// Connections that it has answered on, about.
    pub answered: u64,
    /// So many fit.
    pub max_answered: u32,
    /// What it decided, by the number of the route's label.
    pub outcomes: Vec<Outcomes>,
}

impl KernelReport {
    /// At most so many policies are named that are not the kernel's.
    const NAMED: usize = 100;

    fn json(&self, counts: &Counts) -> serde_json::Value {
        let Summary { hosts, paths, origins, names, templates, left, too_large } = &self.table.summary;
        let asked = ask::NAMES.iter().zip(&counts.asked).filter(|(_, count)| **count > 0);
        serde_json::json!({
            "on": self.on,
            "generation": self.generation,
            "connections": self.answered,
            "max_connections": self.max_answered,
            "answers": counts.event(event::KernelAnswer),
            "asked": asked
                .map(|(name, count)| ((*name).to_owned(), serde_json::Value::from(*count)))
                .collect::<serde_json::Map<_, _>>(),
            "table": {
                "hosts": hosts,
                "paths": paths,
                "origins": origins,
                "header_names": names,
                "answers": templates,
                "too_large": too_large,
                "left_to_workers": left.len(),
                "left": left
                    .iter()
                    .take(Self::NAMED)
                    .map(|(policy, why)| serde_json::json!({ "policy": policy.as_ref(), "why": why }))
                    .collect::<Vec<_>>(),
            },
        })
    }
}

impl Report {
    /// For people and scripts.
    pub fn json(&self) -> serde_json::Value {
        let ports = self.ports.iter().map(|port| {
            let counts = (0..).zip(kind::NAMES).map(|(slot, name)| {
                ((*name).to_owned(), serde_json::Value::from(self.counts.port(port.row, slot)))
            });
            serde_json::json!({
                "port": port.port,
                "listeners": port.listeners,
                "disengaged": port.disengaged,
                "connections": counts.collect::<serde_json::Map<_, _>>(),
            })
        });
        serde_json::json!({
            "state": self.state.as_str(),
            "reasons": self.reasons,
            "interfaces": self.interfaces,
            "ports": ports.collect::<Vec<_>>(),
            "pending": self.pending,
            "max_pending": self.max_pending,
            "kernel": self.kernel.json(&self.counts),
        })
    }
}

/// What can be told of a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortReport {
    /// The port.
    pub port: u16,
    /// Its row of [`Counts::ports`].
    pub row: u32,
    /// The listeners' names.
    pub listeners: Vec<String>,
    /// Why its connections are not deferred any more.
    pub disengaged: Option<String>,
}
