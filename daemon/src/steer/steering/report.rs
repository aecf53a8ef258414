//! What can be told of steering.

use preflightd_common::abi::kind;

use super::super::Counts;

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
