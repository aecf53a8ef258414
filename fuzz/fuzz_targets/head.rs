//! Any bytes as a head: no panic, the same however they arrive, and a preflight only where the plain reference reads the
//! very same one.
//!
//! The first two bytes of the input say how the rest is split and limited; what follows `OPTIONS` may be anything.
#![no_main]

use libfuzzer_sys::fuzz_target;
use preflightd::{
    http::{Head, HeadLimits, HeadReader},
    policy::Connection,
};

#[path = "../../daemon/src/http/reference.rs"]
mod reference;

fuzz_target!(|input: &[u8]| {
    let &[piece, limit, ref bytes @ ..] = input else { return };
    let limits = HeadLimits { max_bytes: if limit == 0 { 4096 } else { 16 * usize::from(limit) } };

    let whole = HeadReader::new().read(bytes, limits);
    let mut reader = HeadReader::new();
    let pieces = (0..bytes.len()).step_by(usize::from(piece).max(1)).chain([bytes.len()]);
    let in_pieces = pieces
        .map(|end| reader.read(&bytes[..end], limits))
        .find(|head| !matches!(head, Head::Incomplete))
        .unwrap_or(Head::Incomplete);
    assert_eq!(format!("{whole:?}"), format!("{in_pieces:?}"));

    let ours = match whole {
        Head::Preflight(head) => Some(reference::Preflight {
            host: head.host.to_vec(),
            target: head.target.to_vec(),
            origin: head.origin.to_vec(),
            method: head.method.to_vec(),
            headers: head.headers.iter().map(|line| line.to_vec()).collect(),
            private_network: head.private_network,
            keep: head.connection != Connection::Close,
            keep_1_0: head.connection == Connection::KeepAlive10,
            len: head.len,
        }),
        _ => None,
    };
    assert_eq!(ours, reference::preflight(bytes, limits.max_bytes));
});
