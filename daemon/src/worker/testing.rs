//! What the tests of the workers share: a small table and requests for it.
#![forbid(unsafe_code)]

use crate::{
    http::HeadLimits,
    policy::{
        HostPattern, ListenerId, ListenerSpec, PathMatch, PolicySpec, RouteLabels, SourceRef, Table,
        dialect::{Rules, native},
    },
};

pub(super) const HEAD_LIMITS: HeadLimits = HeadLimits { max_bytes: 16 * 1024 };

/// A preflight that [`table`] allows.
pub(super) const REQUEST: &[u8] =
    b"OPTIONS /x HTTP/1.1\r\nHost: api.example\r\nOrigin: https://app.example\r\n\
    Access-Control-Request-Method: PUT\r\nAccess-Control-Request-Headers: x-a\r\n\r\n";

/// Not ours.
pub(super) const GET: &[u8] = b"GET /x HTTP/1.1\r\nHost: api.example\r\n\r\n";

/// [`REQUEST`] with further header lines.
pub(super) fn request(lines: &str) -> Vec<u8> {
    [&REQUEST[..REQUEST.len() - 2], lines.as_bytes(), b"\r\n"].concat()
}

/// A table with one policy for `api.example`, whose max-age is the generation.
pub(super) fn table(generation: u64) -> Table {
    let listener = ListenerSpec {
        id: ListenerId(0),
        name: "test".into(),
        own_literals: Vec::new(),
        loopback_is_own: true,
        public_ports: Vec::new(),
    };
    let cors = native::Cors {
        origins: vec!["https://app.example".into()],
        methods: vec!["PUT".into()],
        headers: vec!["x-a".into()],
        max_age: Some(generation.cast_signed()),
        ..native::Cors::default()
    };
    let policy = PolicySpec {
        name: "test".into(),
        source: SourceRef { origin: "test".into(), line: 1 },
        listeners: Vec::new(),
        hosts: vec![HostPattern::Exact("api.example".into())],
        paths: vec![PathMatch::Prefix("/".into())],
        for_methods: vec![],
        passes: None,
        on_denied: None,
        rules: Rules::Native(native::validate(&cors).0.expect("valid rules")),
    };
    Table::compile(&[listener], &[policy], &mut RouteLabels::new(8), generation).0
}
