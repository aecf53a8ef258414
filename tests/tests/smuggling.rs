//! The smuggling corpus through the daemon: hostile and ambiguous requests, alone and behind a good preflight, must
//! arrive at the upstream byte by byte, however the proxy reads them.

use preflightd_tests::{Behaviour, Config, Daemon, Engine, Upstream, smuggling};
use std::collections::BTreeMap;

#[test]
fn arrives_byte_by_byte() {
    let policy = format!(
        "[[policy]]\nname = \"all\"\nhosts = [\"{}\"]\norigins = [\"{}\"]\nmethods = [\"*\"]\nheaders = [\"*\"]\n",
        smuggling::HOST,
        smuggling::ORIGIN
    );
    let refusal = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n";
    for engine in Engine::BOTH {
        let upstream = Upstream::start(Behaviour::AtEnd(refusal.into()));
        let daemon = Daemon::start(Config::new(upstream.address(), policy.as_str()).engine(engine));
        let mut reasons = BTreeMap::<_, u64>::new();
        for case in smuggling::cases() {
            for front in ["", smuggling::PREFLIGHT] {
                let name =
                    format!("{engine:?}, {}{}", case.name, if front.is_empty() { "" } else { ", pipelined" });
                let index = upstream.count();
                let mut client = daemon.connect();
                client.send([front.as_bytes(), &case.bytes].concat());
                client.half_close();
                let heads = |bytes: &[u8]| bytes.windows(4).filter(|w| *w == b"\r\n\r\n").count();
                for _ in 0..heads(front.as_bytes()) + heads(&case.bytes[..case.answered]) {
                    let response = client.try_response().unwrap_or_else(|e| panic!("{name}: {e}"));
                    assert_eq!(response.status, 204, "{name}");
                }
                let rest = client.try_read_to_end().unwrap_or_else(|e| panic!("{name}: {e}"));
                assert_eq!(rest.escape_ascii().to_string(), refusal.escape_ascii().to_string(), "{name}");
                let recorded = upstream.ended(index).bytes;
                assert!(
                    recorded == case.passed(),
                    "{name}:\n  sent     {}\n  recorded {}",
                    case.passed().escape_ascii(),
                    recorded.escape_ascii()
                );
                *reasons.entry(case.reason.as_str()).or_default() += 1;
            }
        }
        let metrics = daemon.metrics();
        for (reason, wanted) in reasons {
            let labels = [("outcome", "passed"), ("reason", reason)];
            assert_eq!(metrics.count("preflightd_requests_total", &labels), wanted, "{engine:?}: {labels:?}");
        }
    }
}
