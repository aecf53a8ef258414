//! What a table is compiled from: validated policies, whoever wrote them (files now, Kubernetes later).

use super::dialect;
use crate::reason::PassReason;
use std::fmt;
use std::sync::Arc;

/// A listener's number within one configuration; every lookup begins with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ListenerId(pub u16);

/// What the table must know of a listener.
#[derive(Clone, Debug)]
pub struct ListenerSpec {
    /// Its number.
    pub id: ListenerId,
    /// Its name, as policies write it.
    pub name: String,
    /// IP literals (lower-case, IPv6 in brackets, no port) by which a client may rightly call this listener.
    /// A `Host` that is any other IP literal passes, unless a policy lists it exactly.
    pub own_literals: Vec<String>,
    /// Loopback literals (127.0.0.0/8, `[::1]`) count as own: true for wildcard and loopback binds.
    pub loopback_is_own: bool,
    /// Ports that may stand in `Host`. Empty: any valid port.
    pub public_ports: Vec<u16>,
}

/// Where a policy was written, for messages: `file:line`, or kind, `namespace/name` and perhaps field of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceRef {
    /// File path or object.
    pub origin: Arc<str>,
    /// Line from 1; 0 of an object.
    pub line: u32,
}

impl SourceRef {
    /// A line of a file that somebody answers for, and not an object that others may change: what is wrong in it refuses
    /// all.
    pub fn is_file(&self) -> bool {
        self.line != 0
    }
}

impl fmt::Display for SourceRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => f.write_str(&self.origin),
            line => write!(f, "{}:{line}", self.origin),
        }
    }
}

/// A host pattern of a policy.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum HostPattern {
    /// Every host name (but no foreign IP literal).
    Any,
    /// One host, lower-case, no port.
    Exact(String),
    /// `*.suffix`: stored as `.suffix`, lower-case. One label or more, except in the ingress-nginx dialect (exactly
    /// one, as its server-name regex has it).
    Wildcard(String),
}

/// A path match of a policy.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PathMatch {
    /// The whole path, byte-exact.
    Exact(String),
    /// On element boundaries: `/foo` matches `/foo`, `/foo/` and `/foo/bar`, never `/foobar` (Gateway API PathPrefix).
    Prefix(String),
    /// RE2 full match of the path.
    Regex(String),
}

impl fmt::Display for HostPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HostPattern::Any => f.write_str("*"),
            HostPattern::Exact(name) => f.write_str(name),
            HostPattern::Wildcard(suffix) => write!(f, "*{suffix}"),
        }
    }
}

impl fmt::Display for PathMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PathMatch::Exact(path) => f.write_str(path),
            PathMatch::Prefix(path) => write!(f, "{path}*"),
            PathMatch::Regex(pattern) => write!(f, "~{pattern}"),
        }
    }
}

/// What to do with a preflight that the policy does not allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OnDenied {
    /// Answer it in the dialect's way, so that the browser refuses.
    Answer,
    /// Leave it to the proxy.
    Pass,
}

/// One policy, validated.
#[derive(Clone, Debug)]
pub struct PolicySpec {
    /// Unique within its source.
    pub name: String,
    /// Where it was written.
    pub source: SourceRef,
    /// Listeners that it serves; empty: all.
    pub listeners: Vec<ListenerId>,
    /// Hosts that it serves; never empty.
    pub hosts: Vec<HostPattern>,
    /// Paths that it serves; never empty (`/` as a prefix is the whole host).
    pub paths: Vec<PathMatch>,
    /// Of its preflights only those that ask for one of these methods (ACRM, byte-exact); empty: all. Where it shares a path
    /// with a policy for all methods, it goes before that.
    pub for_methods: Vec<String>,
    /// Its requests go to the proxy, all of them, for this reason: it is switched off, its source has been unreachable for
    /// too long, or it only says that nothing else answers there.
    pub passes: Option<PassReason>,
    /// Overrides the dialect's own way.
    pub on_denied: Option<OnDenied>,
    /// The CORS rules in their dialect.
    pub rules: dialect::Rules,
}

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Severity {
    /// Works, but not as its author may think.
    Warning,
    /// Refused.
    Error,
}

impl Severity {
    /// `error` or `warning`.
    pub fn as_str(self) -> &'static str {
        match self {
            Severity::Error => "error",
            Severity::Warning => "warning",
        }
    }
}

/// Something wrong or doubtful in a policy; whoever read the file adds file, line and column.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Refused or only doubtful.
    pub severity: Severity,
    /// Stable kebab-case name, such as `origin-trailing-slash`.
    pub code: &'static str,
    /// The key below the policy that it concerns, in the dialect's own words, such as `origins` or `cors-allow-origin`.
    pub field: &'static str,
    /// Position in the field's list.
    pub item: Option<usize>,
    /// What is wrong.
    pub message: String,
    /// What to do about it.
    pub help: String,
}
