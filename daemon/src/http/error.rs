//! The few error responses of our own: only where a request cannot be passed on.

/// Errors that end a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorResponse {
    /// 400: malformed, and there is no upstream to pass it to.
    BadRequest,
    /// 408: the head did not come in time (RFC 9110 §15.5.9).
    RequestTimeout,
    /// 421: not a preflight of ours, and there is no upstream (RFC 9110 §15.5.20).
    Misdirected,
    /// 431: the head is too large, and there is no upstream (RFC 6585 §5).
    HeadTooLarge,
    /// 502: the upstream cannot be reached.
    BadGateway,
    /// 503: too many connections to relay.
    Overloaded,
}

impl ErrorResponse {
    /// Appends the whole response with `Connection: close`, `Date`, a short plain-text body that says what and why.
    pub fn render(self, _date: &[u8; 29], _out: &mut Vec<u8>) {
        todo!()
    }
}
