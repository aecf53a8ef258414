//! Any bytes as a first segment: whatever the kernel decides of it, a worker decides too, and answers in the same bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use preflightd::{
    http::{Head, HeadLimits, HeadReader},
    policy::{self, Decision, KernelTable, Preflight, Table, kernel::Tier},
    reason,
};
use preflightd_fuzz::Edits;
use std::sync::LazyLock;

#[path = "../../daemon/src/policy/kernel/samples.rs"]
#[expect(dead_code, reason = "the table is wanted, and the parts of requests as words")]
mod samples;

use samples::LISTENER;

const DATE: &[u8; 29] = b"Sun, 06 Nov 1994 08:49:37 GMT";
const LIMITS: HeadLimits = HeadLimits { max_bytes: 16_384 };

const PREFLIGHT: &[u8] = b"OPTIONS /v1/items/42 HTTP/1.1\r\n\
    Host: api.example\r\n\
    Connection: keep-alive\r\n\
    Access-Control-Request-Method: PUT\r\n\
    Access-Control-Request-Headers: content-type,x-a\r\n\
    Origin: https://app.example\r\n\
    Sec-Fetch-Mode: cors\r\n\
    \r\n";

static TABLE: LazyLock<(Table, KernelTable)> = LazyLock::new(|| {
    let table = samples::table(&[80, 8080]);
    let kernel = table.for_kernel(&[LISTENER]);
    (table, kernel)
});

static WORDS: LazyLock<Vec<&str>> = LazyLock::new(|| {
    let lists = [samples::HOSTS, samples::PATHS, samples::ORIGINS, samples::METHODS, samples::HEADERS];
    let punctuation = ["\r\n", "\r", "\n", ":", ",", " ", "\t", "\0", "_", "/", "//", "/.", "?", "#", ".", "..", "-", "0"];
    lists.concat().into_iter().chain(samples::LINES.iter().copied()).chain(punctuation).collect()
});

fuzz_target!(|edits: Edits<'_>| {
    let bytes = edits.apply(PREFLIGHT, &WORDS);
    let (table, kernel) = &*TABLE;
    let tier = kernel.tier(LISTENER, &bytes, LIMITS.max_bytes);
    if matches!(tier, Tier::Worker(_)) {
        return;
    }
    let head = match HeadReader::new().read(&bytes, LIMITS) {
        Head::Preflight(head) => head,
        // The proxy's too: the kernel need not look at all that a worker looks at before it says so.
        Head::Pass(_) if tier == Tier::Proxy => return,
        head => panic!("the kernel decides what a worker does not: {tier:?}, {head:?}"),
    };
    assert_eq!(head.len, bytes.len(), "something stands behind it");
    let request = Preflight {
        listener: LISTENER,
        host: head.host,
        target: head.target,
        origin: head.origin,
        method: head.method,
        headers: &head.headers,
        private_network: head.private_network,
    };
    match (tier, table.decide(&request)) {
        (Tier::Proxy, Decision::Pass(..)) => {}
        (Tier::Kernel(number), Decision::Answer(answer)) => {
            let mut worker = Vec::new();
            answer.render(DATE, head.connection, &mut worker);
            assert_eq!(kernel.templates[number as usize].with(DATE, head.origin), worker);
        }
        (tier, decision) => panic!("the kernel says {tier:?}, a worker {decision:?}"),
    }
});
