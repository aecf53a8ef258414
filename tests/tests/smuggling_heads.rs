//! The smuggling corpus through the head reader alone, split in many ways: nothing in it may be read as a preflight.
#![forbid(unsafe_code)]

use preflightd::{
    http::{Head, HeadLimits, HeadReader},
    reason::PassReason,
};
use preflightd_tests::smuggling::{Case, PREFLIGHT, cases};
use std::collections::HashSet;

#[path = "../../daemon/src/http/reference.rs"]
mod reference;

const LIMITS: HeadLimits = HeadLimits { max_bytes: 16 * 1024 };

/// Reads a connection as a worker does when the given lengths have arrived: bytes answered, and why the rest passes
/// (`None`: more was awaited).
fn read(bytes: &[u8], arrived: impl IntoIterator<Item = usize>) -> (usize, Option<PassReason>) {
    let mut answered = 0;
    let mut reader = HeadReader::new();
    for end in arrived.into_iter().chain([bytes.len()]) {
        loop {
            match reader.read(&bytes[answered..end], LIMITS) {
                Head::Incomplete => break,
                Head::Preflight(head) => {
                    answered += head.len;
                    reader = HeadReader::new();
                }
                Head::Pass(reason) => return (answered, Some(reason)),
            }
        }
    }
    (answered, None)
}

fn expected(case: &Case) -> (usize, Option<PassReason>) {
    (case.answered, (case.reason != PassReason::Truncated).then_some(case.reason))
}

#[test]
fn the_control_is_a_preflight() {
    assert_eq!(read(PREFLIGHT.as_bytes(), []), (PREFLIGHT.len(), None));
}

#[test]
fn there_are_many_cases_with_names_of_their_own() {
    let cases = cases();
    let names: HashSet<_> = cases.iter().map(|case| case.name).collect();
    assert_eq!(names.len(), cases.len());
    assert!(cases.len() >= 150, "{}", cases.len());
}

#[test]
fn every_case_passes_for_its_reason() {
    for case in cases() {
        assert_eq!(read(&case.bytes, []), expected(&case), "{}", case.name);
    }
}

#[test]
fn however_it_arrives() {
    for case in cases() {
        // Of the largest cases only some splits, lest this take minutes.
        let step = case.bytes.len() / 1000 + 1;
        for at in (0..case.bytes.len()).step_by(step) {
            assert_eq!(read(&case.bytes, [at]), expected(&case), "{}, split at {at}", case.name);
        }
        for piece in [1, 2, 3, 7, 64, 1460] {
            let arrived = (0..case.bytes.len()).step_by(piece);
            assert_eq!(read(&case.bytes, arrived), expected(&case), "{}, {piece} bytes at a time", case.name);
        }
    }
}

#[test]
fn the_reference_reads_none_of_it_either() {
    for case in cases() {
        assert_eq!(reference::preflight(case.passed(), LIMITS.max_bytes), None, "{}", case.name);
    }
}
