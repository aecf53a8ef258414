//! Pre-rendered answers: a template per policy, into which only origin, date and echoes are spliced.

use super::RouteId;

/// What an answer says of the connection (RFC 9112 §9.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Connection {
    /// HTTP/1.1 and it stays open: nothing is said.
    KeepAlive,
    /// HTTP/1.0 and the client asked to keep it: `Connection: keep-alive`.
    KeepAlive10,
    /// `Connection: close`.
    Close,
}

/// What was denied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DenyReason {
    /// The origin.
    Origin,
    /// The requested method.
    Method,
    /// A requested header.
    Headers,
}

/// What the answer tells the browser.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// Origin allowed (and in the native dialect method and headers too).
    Allowed,
    /// The browser will refuse, in the dialect's way.
    Denied(DenyReason),
}

/// An answer: pieces of the table and of the request; nothing is copied until [`Answer::render`].
#[derive(Clone, Copy, Debug)]
pub struct Answer<'a> {
    /// Allowed or denied.
    pub outcome: Outcome,
    /// Which route decided.
    pub route: RouteId,
    // The policy room adds its own (private) fields: template, origin, method, header lines.
    pub(super) _todo: std::marker::PhantomData<&'a ()>,
}

impl Answer<'_> {
    /// Upper bound of the rendered length in bytes.
    pub fn max_len(&self) -> usize {
        todo!()
    }

    /// Appends the whole response to `out`. Allocates only if `out` lacks [`Answer::max_len`] spare bytes.
    /// `date` is an IMF-fixdate (RFC 9110 §5.6.7), as every answer carries `Date` (§6.6.1).
    pub fn render(&self, _date: &[u8; 29], _connection: Connection, _out: &mut Vec<u8>) {
        todo!()
    }
}
