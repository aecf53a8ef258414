//! What the rules of every dialect come down to, and how they judge a request that was routed to them.

use super::acrh::{Names, is_token};
use super::answer::Template;
use super::origin::{Origins, is_plain};
use super::strings::Strings;
use super::{Answer, Decision, DenyReason, OnDenied, Outcome, Preflight, RouteId, Trace};
use crate::reason::PassReason;
use std::sync::{Arc, LazyLock};

/// Longer method names pass: none is in use.
const MAX_METHOD: usize = 64;

/// Validated rules, whatever dialect they were written in. Clones share what is large. Two cache lines: the first has
/// what a request is compared with.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[repr(C, align(64))]
pub(super) struct Core {
    pub(super) origins: Origins,
    pub(super) methods: Methods,
    /// Allowed request headers; `None`: the answer lists them, and the browser judges.
    pub(super) headers: Option<Arc<Names>>,
    /// Set if every request passes, whoever asks.
    pub(super) gate: Option<PassReason>,
    /// What becomes of what is not allowed.
    pub(super) on_denied: OnDenied,
    pub(super) allowed: Template,
    pub(super) denied: Arc<Template>,
}

const _: () = assert!(size_of::<Core>() == 128);

/// Which methods are allowed.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Methods {
    /// The answer lists them, and the browser judges.
    Unchecked,
    /// These, beside GET, HEAD and POST (Fetch §4.9 never refuses those).
    Listed {
        /// Bits as of [`usual_bit`].
        usual: u8,
        /// Any others.
        others: Option<Arc<Strings>>,
    },
}

/// GET, HEAD and POST among the usual methods.
const SAFE: u8 = 0b111;

impl Methods {
    /// These, beside GET, HEAD and POST.
    pub(super) fn listed<T: AsRef<[u8]>>(list: &[T]) -> Self {
        let usual = list.iter().fold(SAFE, |bits, method| bits | usual_bit(method.as_ref()));
        let others: Vec<&[u8]> = list.iter().map(AsRef::as_ref).filter(|m| usual_bit(m) == 0).collect();
        Methods::Listed { usual, others: (!others.is_empty()).then(|| Arc::new(Strings::new(others))) }
    }
}

/// A bit for each of the methods that nearly all lists consist of; 0 for others.
fn usual_bit(method: &[u8]) -> u8 {
    match method {
        b"GET" => 1,
        b"HEAD" => 2,
        b"POST" => 4,
        b"PUT" => 8,
        b"DELETE" => 16,
        b"PATCH" => 32,
        b"OPTIONS" => 64,
        _ => 0,
    }
}

/// 204 without any CORS header, for the dialects that refuse so.
static BARE_NO_CONTENT: LazyLock<Arc<Template>> =
    LazyLock::new(|| Arc::new(Template::no_content().vary().build()));
/// 403 without any CORS header.
static BARE_FORBIDDEN: LazyLock<Arc<Template>> =
    LazyLock::new(|| Arc::new(Template::forbidden().vary().build()));

/// The shared 204 of a refusal.
pub(super) fn bare_no_content() -> Arc<Template> {
    Arc::clone(&BARE_NO_CONTENT)
}

/// The shared 403 of a refusal.
pub(super) fn bare_forbidden() -> Arc<Template> {
    Arc::clone(&BARE_FORBIDDEN)
}

impl Core {
    /// Rules that pass everything to the proxy, for this reason.
    pub(super) fn passing(reason: PassReason) -> Self {
        Self {
            gate: Some(reason),
            on_denied: OnDenied::Pass,
            origins: Origins::Web(super::origin::Web::default()),
            methods: Methods::Unchecked,
            headers: None,
            allowed: Template::no_content().build(),
            denied: bare_no_content(),
        }
    }

    /// Judges a request.
    #[inline]
    pub(super) fn judge<'a>(
        &'a self,
        request: &Preflight<'a>,
        route: RouteId,
        trace: &mut impl Trace,
    ) -> Decision<'a> {
        if let Some(reason) = self.gate {
            trace.step(|| format!("passed: the policy is {}", reason.as_str()));
            return Decision::Pass(reason, route);
        }
        if !is_plain(request.origin) {
            trace.step(|| "origin: not visible ASCII, or too long: passed".to_owned());
            return Decision::Pass(PassReason::BadOrigin, route);
        }
        let usual_bit = usual_bit(request.method);
        if usual_bit == 0 && (request.method.len() > MAX_METHOD || !is_token(request.method)) {
            trace.step(|| "method: not a token: passed".to_owned());
            return Decision::Pass(PassReason::BadRequestMethod, route);
        }
        let allowed = self.origins.allow(request.origin);
        trace.step(|| {
            format!("origin: {} {}", request.origin.escape_ascii(), self.origins.explain(request.origin))
        });
        if !allowed {
            return self.refuse(request, DenyReason::Origin, route, trace);
        }
        match &self.methods {
            Methods::Unchecked => {
                trace.step(|| format!("method: {} is left to the browser", request.method.escape_ascii()));
            }
            Methods::Listed { usual, others } => {
                let safe = usual_bit & SAFE != 0;
                let allowed = usual & usual_bit != 0
                    || others.as_ref().is_some_and(|others| others.contains(request.method));
                trace.step(|| {
                    let method = request.method.escape_ascii();
                    match (safe, allowed) {
                        (true, _) => format!("method: {method} needs no permission"),
                        (_, true) => format!("method: {method} is listed"),
                        (_, false) => format!("method: {method} is not listed (methods are case-sensitive)"),
                    }
                });
                if !allowed {
                    return self.refuse(request, DenyReason::Method, route, trace);
                }
            }
        }
        if let Some(names) = &self.headers {
            let allowed = names.allow(request.headers);
            trace.step(|| {
                let asked: Vec<String> = request.headers.iter().map(|l| l.escape_ascii().to_string()).collect();
                match (asked.is_empty(), allowed) {
                    (true, _) => "headers: none were asked for".to_owned(),
                    (_, true) => format!("headers: {} are listed", asked.join(", ")),
                    (_, false) => format!(
                        "headers: {} are not all listed, or not lower-case, sorted and unique as browsers send them",
                        asked.join(", ")
                    ),
                }
            });
            if !allowed {
                return self.refuse(request, DenyReason::Headers, route, trace);
            }
        } else {
            trace.step(|| "headers: left to the browser".to_owned());
        }
        finish(Outcome::Allowed, &self.allowed, request, route, trace)
    }

    fn refuse<'a>(
        &'a self,
        request: &Preflight<'a>,
        reason: DenyReason,
        route: RouteId,
        trace: &mut impl Trace,
    ) -> Decision<'a> {
        if self.on_denied == OnDenied::Pass {
            trace.step(|| "passed: the proxy answers what this policy does not allow".to_owned());
            let reason = match reason {
                DenyReason::Origin => PassReason::OriginNotAllowed,
                DenyReason::Method => PassReason::MethodNotAllowed,
                DenyReason::Headers => PassReason::HeadersNotAllowed,
            };
            return Decision::Pass(reason, route);
        }
        finish(Outcome::Denied(reason), &self.denied, request, route, trace)
    }
}

fn finish<'a>(
    outcome: Outcome,
    template: &'a Template,
    request: &Preflight<'a>,
    route: RouteId,
    trace: &mut impl Trace,
) -> Decision<'a> {
    let Some(answer) = Answer::new(outcome, route, template, request) else {
        trace.step(|| {
            "passed: the requested headers cannot be echoed (not a list of names, or too long)".to_owned()
        });
        return Decision::Pass(PassReason::UnusableRequestHeaders, route);
    };
    trace.step(|| match outcome {
        Outcome::Allowed => "answered: allowed".to_owned(),
        Outcome::Denied(_) => "answered: denied, the browser will refuse".to_owned(),
    });
    Decision::Answer(answer)
}
