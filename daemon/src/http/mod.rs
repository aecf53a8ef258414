//! HTTP/1 heads: what is a complete, unambiguous preflight, and what is not ours.
#![forbid(unsafe_code)]

use crate::{policy::Connection, reason::PassReason};
use arrayvec::ArrayVec;

pub mod date;
pub mod error;

/// More `Access-Control-Request-Headers` lines than this pass to the proxy.
pub const MAX_REQUEST_HEADERS_LINES: usize = 32;

/// Bounds of a head.
#[derive(Clone, Copy, Debug)]
pub struct HeadLimits {
    /// Request line and headers with the empty line, in bytes.
    pub max_bytes: usize,
}

/// A complete preflight head. All slices point into the read buffer.
#[derive(Clone, Debug)]
pub struct PreflightHead<'a> {
    /// `Host` value.
    pub host: &'a [u8],
    /// Origin-form target: unambiguous path, then maybe a query.
    pub target: &'a [u8],
    /// `Origin` value.
    pub origin: &'a [u8],
    /// `Access-Control-Request-Method` value: a token.
    pub method: &'a [u8],
    /// `Access-Control-Request-Headers` values in order.
    pub headers: ArrayVec<&'a [u8], MAX_REQUEST_HEADERS_LINES>,
    /// `Access-Control-Request-Private-Network: true`.
    pub private_network: bool,
    /// What becomes of the connection after the answer.
    pub connection: Connection,
    /// Length of the head in bytes: the next request begins here.
    pub len: usize,
}

/// What the bytes so far are.
#[derive(Clone, Debug)]
pub enum Head<'a> {
    /// May still become a preflight: read on.
    Incomplete,
    /// A complete one.
    Preflight(PreflightHead<'a>),
    /// Not ours to answer: every byte goes to the proxy.
    Pass(PassReason),
}

/// Reads one head that arrives in pieces; total work is linear in its length however it is split.
#[derive(Clone, Copy, Debug, Default)]
pub struct HeadReader {
    scanned: usize,
}

impl HeadReader {
    /// A reader at the start of a request.
    pub fn new() -> Self {
        Self::default()
    }

    /// Looks at all bytes of the request so far (`buf` begins where the request begins and only ever grows).
    /// After [`Head::Preflight`] or [`Head::Pass`] start anew with [`HeadReader::new`].
    pub fn read<'a>(&mut self, _buf: &'a [u8], _limits: HeadLimits) -> Head<'a> {
        let _ = self.scanned;
        todo!()
    }
}
