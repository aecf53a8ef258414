//! One request through the real path (head reader, table, answer), told step by step.
#![forbid(unsafe_code)]

pub(crate) mod browser;

use crate::{
    config::{Listener, escape},
    http::{Head, HeadLimits, HeadReader, PreflightHead, date},
    policy::{
        Connection as Persistence, Decision, DenyReason, ListenerId, Outcome, PolicySpec, Preflight, RouteId,
        SourceRef, Table, Trace,
        kernel::{KernelTable, Tier},
        labels::RouteLabel,
    },
    reason::PassReason,
};
use ahash::AHashMap;
use preflightd_common::abi::ask;
use serde::{Deserialize, Serialize};
use std::{
    fmt::Write as _,
    time::{SystemTime, UNIX_EPOCH},
};

pub use browser::Browser;

/// What a request meets.
#[derive(Clone, Copy, Debug)]
pub struct Context<'a> {
    /// The policies, compiled.
    pub table: &'a Table,
    /// The listener that takes the request.
    pub listener: ListenerId,
    /// Its name.
    pub listener_name: &'a str,
    /// It is steered: the proxy has what a worker does not answer, and a worker answers once and closes.
    pub steered: bool,
    /// What the kernel decides by, if it is steered and the kernel answers.
    pub kernel: Option<&'a KernelTable>,
    /// Route labels by number.
    pub labels: &'a [RouteLabel],
    /// Where each policy was written, by its name.
    pub sources: &'a Sources,
    /// Bounds of the head.
    pub limits: HeadLimits,
}

/// Where each policy was written, by its name.
pub type Sources = AHashMap<Box<str>, SourceRef>;

/// The sources of these policies.
pub fn sources(policies: &[PolicySpec]) -> Sources {
    policies.iter().map(|p| (p.name.as_str().into(), p.source.clone())).collect()
}

/// The number of the listener with this name; the first one if none is wanted.
///
/// # Errors
/// There is none: says which there are.
pub fn pick_listener(listeners: &[Listener], wanted: Option<&str>) -> Result<usize, String> {
    let Some(wanted) = wanted else {
        return if listeners.is_empty() { Err("there is no listener".to_owned()) } else { Ok(0) };
    };
    listeners.iter().position(|listener| listener.name == wanted).ok_or_else(|| {
        let names: Vec<_> = listeners.iter().map(|listener| &*listener.name).collect();
        format!("no listener is named `{wanted}`; there are: {}", names.join(", "))
    })
}

/// What became of the request and why. Everything in it is safe to print.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// The listener's name.
    pub listener: String,
    /// The table's generation.
    pub generation: u64,
    /// Each step, in order.
    pub steps: Vec<String>,
    /// `answered`, `passed` or `incomplete`.
    pub verdict: String,
    /// `allowed`, `denied_origin`, `denied_method`, `denied_headers`, or the reason of the pass.
    pub outcome: String,
    /// The verdict in words.
    pub words: String,
    /// Who decides: `kernel`, `worker` or `proxy`.
    pub tier: String,
    /// And why it is not the kernel, where it might be.
    pub tier_words: String,
    /// What matched, if anything did.
    pub route: Option<Route>,
    /// What a browser makes of the answer.
    pub browser: Option<Browser>,
    /// The answer's exact bytes.
    pub answer: Option<String>,
}

/// The route that matched.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Route {
    /// The host pattern.
    pub host: String,
    /// The path match.
    pub path: String,
    /// The policy's name.
    pub policy: String,
    /// The file that the policy stands in.
    pub file: String,
    /// Its line; 0 if unknown.
    pub line: u32,
}

/// Sends the bytes of a request through the real path.
pub fn explain(context: &Context<'_>, bytes: &[u8]) -> Report {
    let mut report = Report {
        listener: context.listener_name.to_owned(),
        generation: context.table.generation(),
        steps: Vec::new(),
        verdict: "passed".to_owned(),
        outcome: String::new(),
        words: String::new(),
        tier: "worker".to_owned(),
        tier_words: String::new(),
        route: None,
        browser: None,
        answer: None,
    };
    let tier = tier(context, bytes);
    if let Some(tier) = tier {
        tier.name().clone_into(&mut report.tier);
        report.tier_words = tier.words();
    }
    match HeadReader::new().read(bytes, context.limits) {
        Head::Incomplete => {
            report.steps.push(format!("head: {} bytes, and its end is not among them", bytes.len()));
            "incomplete".clone_into(&mut report.verdict);
            "incomplete".clone_into(&mut report.outcome);
            "the head has no end: the worker waits for more, and closes after limits.header_timeout. A head ends \
             with an empty line, and each line with CR LF."
                .clone_into(&mut report.words);
        }
        Head::Pass(reason) => {
            report.steps.push(format!("head: not a preflight to be answered ({})", reason.as_str()));
            passed(context, &mut report, reason);
        }
        Head::Preflight(head) => {
            let rest = bytes.len().saturating_sub(head.len);
            report.steps.push(format!(
                "head: a complete preflight of {} bytes for {} on {}{}",
                head.len,
                text(head.target),
                text(head.host),
                if rest > 0 { format!(" ({rest} bytes follow it)") } else { String::new() }
            ));
            decide(context, &head, tier, &mut report);
        }
    }
    report
}

/// Which tier decides on a steered listener. The kernel looks at the same table.
fn tier(context: &Context<'_>, bytes: &[u8]) -> Option<Tier> {
    if !context.steered {
        return None;
    }
    let none = KernelTable::default();
    let tier = context.kernel.unwrap_or(&none).tier_of_any(context.listener, bytes, context.limits.max_bytes);
    Some(match tier {
        Tier::Worker(_) if context.kernel.is_none() => Tier::Worker(ask::Off),
        tier => tier,
    })
}

impl Report {
    /// A browser would go on to the real request, at least without credentials.
    pub fn allowed(&self) -> bool {
        self.browser.as_ref().is_some_and(Browser::allows)
    }
}

fn decide(context: &Context<'_>, head: &PreflightHead<'_>, tier: Option<Tier>, report: &mut Report) {
    let request = Preflight {
        listener: context.listener,
        host: head.host,
        target: head.target,
        origin: head.origin,
        method: head.method,
        headers: &head.headers,
        private_network: head.private_network,
    };
    let mut steps = Steps(std::mem::take(&mut report.steps));
    let decision = context.table.decide_traced(&request, &mut steps);
    report.steps = steps.0;
    match decision {
        Decision::Pass(reason, route) => {
            let unknown = tier == Some(Tier::Worker(ask::UnknownHost)) && reason == PassReason::NotLearned;
            if context.steered && (reason == PassReason::NoHost || unknown) {
                // Workers get only the hosts of policies.
                Tier::Proxy.name().clone_into(&mut report.tier);
                report.tier_words = Tier::Proxy.words();
            }
            report.route = matched(context, route);
            passed(context, report, reason);
        }
        Decision::Answer(answer) => {
            report.route = matched(context, answer.route);
            let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
            let mut bytes = Vec::with_capacity(answer.max_len());
            // A worker beside the proxy answers once.
            let once = matches!(tier, Some(Tier::Worker(_) | Tier::Proxy));
            let persistence = if once { Persistence::Close } else { head.connection };
            answer.render(&date::imf_fixdate(now), persistence, &mut bytes);
            let browser = browser::judge(head, &bytes);
            "answered".clone_into(&mut report.verdict);
            let (outcome, words) = match answer.outcome {
                Outcome::Allowed if browser.allows() => ("allowed", "the policy allows it."),
                Outcome::Allowed => (
                    "allowed",
                    "the policy allows the origin, but the browser will refuse what is asked (see below).",
                ),
                Outcome::Denied(DenyReason::Origin) => {
                    ("denied_origin", "the policy does not allow this origin.")
                }
                Outcome::Denied(DenyReason::Method) => {
                    ("denied_method", "the policy does not allow this method.")
                }
                Outcome::Denied(DenyReason::Headers) => {
                    ("denied_headers", "the policy does not allow one of these headers.")
                }
            };
            outcome.clone_into(&mut report.outcome);
            words.clone_into(&mut report.words);
            report.browser = Some(browser);
            report.answer = Some(String::from_utf8_lossy(&bytes).into_owned());
        }
    }
}

fn passed(context: &Context<'_>, report: &mut Report, reason: PassReason) {
    reason.as_str().clone_into(&mut report.outcome);
    let whose = if report.tier == "proxy" {
        "the kernel gives it to the proxy"
    } else if context.steered {
        "it is the proxy's (a worker that has it already turns it away with 421, and it goes to the proxy when it comes again)"
    } else {
        "it goes to the upstream, byte for byte"
    };
    report.words = format!("{whose}, because {}.", pass_words(reason));
}

fn matched(context: &Context<'_>, route: RouteId) -> Option<Route> {
    if route == RouteId::OTHER {
        return None;
    }
    let label = context.labels.get(route.0 as usize)?;
    let source = context.sources.get(&*label.policy);
    Some(Route {
        host: escape(&label.host),
        path: escape(&label.route),
        policy: escape(&label.policy),
        file: source.map(|s| escape(&s.origin)).unwrap_or_default(),
        line: source.map_or(0, |s| s.line),
    })
}

/// Bytes of the network, safe to print.
fn text(bytes: &[u8]) -> String {
    bytes.escape_ascii().to_string()
}

struct Steps(Vec<String>);

impl Trace for Steps {
    fn step(&mut self, text: impl FnOnce() -> String) {
        self.0.push(escape(&text()));
    }
}

/// A pass reason as a clause.
fn pass_words(reason: PassReason) -> &'static str {
    match reason {
        PassReason::NotOptions => "the method is not OPTIONS (methods are case-sensitive)",
        PassReason::MalformedHead => "the head is not well-formed HTTP/1, so proxies may read it differently",
        PassReason::BareLf => "a line ends with LF alone instead of CR LF",
        PassReason::ObsFold => "a header line is folded over several lines",
        PassReason::HeadTooLarge => "the head is longer than limits.max_head_bytes or has too many lines",
        PassReason::Version => "its HTTP version is neither 1.0 nor 1.1",
        PassReason::Truncated => "the connection ended before the head did",
        PassReason::AsteriskForm => "its target is `*`, which asks about the server as a whole",
        PassReason::AbsoluteForm => "its target is a whole URL, as clients send it to forward proxies",
        PassReason::BadTarget => "its target holds bytes that no URL has (fragment, controls, non-ASCII)",
        PassReason::AmbiguousPath => {
            "its path has dot segments, empty segments, `\\` or `;`, which proxies read differently"
        }
        PassReason::EncodedPath => "its path is percent-encoded, and proxies route before or after decoding",
        PassReason::NoOrigin => "it has no Origin: an OPTIONS request, but no preflight",
        PassReason::BadOrigin => "it has several Origin lines, or an empty one",
        PassReason::NoRequestMethod => {
            "it has no Access-Control-Request-Method: an OPTIONS request, but no preflight"
        }
        PassReason::BadRequestMethod => "its Access-Control-Request-Method is repeated, empty or no token",
        PassReason::BadHost => "it has no Host line, or several",
        PassReason::Body => "it has a body, and no preflight has one",
        PassReason::AmbiguousHeader => "a header name has characters that some proxies rewrite or drop",
        PassReason::HopByHop => "it has Upgrade, Expect, or a Connection line that names other headers",
        PassReason::Credentials => "it has Cookie or Authorization, and no browser sends them on a preflight",
        PassReason::ForeignHost => "its Host is an address or port that is not ours, or is malformed",
        PassReason::NoHost => "no policy on this listener serves this host",
        PassReason::NoRoute => "no policy of this host serves this path",
        PassReason::Conflict => "several policies of equal right claim it",
        PassReason::NoCors => "its route has no CORS policy: the application behind the proxy answers",
        PassReason::NotLearned => "no answer of the proxy to exactly this is known, or holds any more",
        PassReason::Shadow => "the daemon runs in shadow mode, and answers nothing",
        PassReason::Disabled => "its policy is switched off",
        PassReason::Unsupported => "its policy has a part that cannot be modelled exactly",
        PassReason::Stale => "its policy's source has been unreachable for too long",
        PassReason::OriginNotAllowed => "its policy does not allow the origin, and passes such requests",
        PassReason::MethodNotAllowed => "its policy does not allow the method, and passes such requests",
        PassReason::HeadersNotAllowed => "its policy does not allow a header, and passes such requests",
        PassReason::UnusableRequestHeaders => {
            "its Access-Control-Request-Headers is no list of names, too long, or split over too many lines"
        }
        PassReason::Draining => "the daemon is shutting down",
    }
}

/// The report for people, with colours; print it through `anstream`.
pub fn render(report: &Report) -> String {
    use anstyle::{AnsiColor, Style};
    let bold = Style::new().bold();
    let good = AnsiColor::Green.on_default().bold();
    let bad = AnsiColor::Red.on_default().bold();
    let neutral = AnsiColor::Yellow.on_default().bold();
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = writeln!(
        out,
        "{bold}steps{bold:#}    on listener {}, table generation {}",
        report.listener, report.generation
    );
    for (i, step) in report.steps.iter().enumerate() {
        let _ = writeln!(out, "  {:2}. {step}", i + 1);
    }
    if let Some(route) = &report.route {
        let place = if route.line > 0 { format!(" ({}:{})", route.file, route.line) } else { String::new() };
        let _ = writeln!(
            out,
            "{bold}policy{bold:#}   {}{place}, host {}, path {}",
            route.policy, route.host, route.path
        );
    }
    let colour = match (&*report.verdict, report.allowed()) {
        ("answered", true) => good,
        ("answered", false) => bad,
        _ => neutral,
    };
    let _ = writeln!(
        out,
        "{bold}verdict{bold:#}  {colour}{}, {}{colour:#}: {}",
        report.verdict, report.outcome, report.words
    );
    if !report.tier_words.is_empty() {
        let _ = writeln!(out, "{bold}tier{bold:#}     {}", report.tier_words);
    }
    if let Some(browser) = &report.browser {
        for (how, refusals) in [
            ("without credentials", &browser.without_credentials),
            ("with credentials", &browser.with_credentials),
        ] {
            if refusals.is_empty() {
                let _ = writeln!(out, "{bold}browser{bold:#}  {how}: {good}goes on{good:#}");
            } else {
                let why = refusals.join("; ");
                let _ = writeln!(out, "{bold}browser{bold:#}  {how}: {bad}refuses{bad:#}: {why}");
            }
        }
        for note in &browser.notes {
            let _ = writeln!(out, "{bold}note{bold:#}     {note}");
        }
    }
    if let Some(answer) = &report.answer {
        let _ = writeln!(out, "{bold}answer{bold:#}   {} bytes:", answer.len());
        for line in answer.split_inclusive('\n') {
            let _ = writeln!(
                out,
                "  {}",
                line.escape_debug().to_string().replace("\\\"", "\"").replace("\\'", "'")
            );
        }
    }
    out
}
