//! Answers that were learned of the proxy: each to one exact question, and asked only where no policy claims the request.
//!
//! Who asks the proxy, for how long an answer holds and when it is doubted is the business of the room `ask`; here is what
//! the table needs: which hosts may be learned of, the questions, and the answers by them.

use super::acrh::is_token;
use super::answer::Template;
use super::labels::{RouteId, RouteLabel, RouteLabels};
use super::origin::is_plain;
use super::strings::{Index, hash};
use super::{Answer, DenyReason, HostPattern, ListenerId, Outcome, Preflight};
use ahash::AHashMap;
use std::{fmt, sync::Arc};

/// The name that learned answers have among policies.
pub const POLICY: &str = "learned";

/// Longest target that is learned of, in bytes.
const MAX_TARGET: usize = 1024;
/// Longest method.
const MAX_METHOD: usize = 64;
/// Longest list of requested headers.
const MAX_NAMES: usize = 1024;
/// Longest `Host`: a name (RFC 1035) with its port.
const MAX_HOST: usize = 253 + 6;

/// Whose preflights may be learned of.
#[derive(Debug)]
pub struct Learnable {
    /// Empty: all.
    listeners: Vec<ListenerId>,
    exact: AHashMap<Box<[u8]>, RouteId>,
    /// Suffixes with their dot, longest first.
    below: Vec<(Box<[u8]>, RouteId)>,
}

impl Learnable {
    /// Hosts of these listeners (none: all listeners). Each pattern has one label, however many paths are learned.
    pub fn new(listeners: &[ListenerId], hosts: &[HostPattern], labels: &mut RouteLabels) -> Self {
        let mut learnable = Self { listeners: listeners.to_vec(), exact: AHashMap::new(), below: Vec::new() };
        for pattern in hosts {
            let label = labels.intern(RouteLabel {
                host: pattern.to_string().into(),
                route: "/*".into(),
                policy: POLICY.into(),
            });
            match pattern {
                HostPattern::Exact(name) => {
                    learnable.exact.insert(name.as_bytes().into(), label);
                }
                HostPattern::Wildcard(suffix) => learnable.below.push((suffix.as_bytes().into(), label)),
                // Learning is allowed host by host.
                HostPattern::Any => {}
            }
        }
        learnable.below.sort_by_key(|(suffix, _)| std::cmp::Reverse(suffix.len()));
        learnable
    }

    /// The label of a host: lower-case, without port.
    fn label(&self, listener: ListenerId, name: &[u8], is_address: bool) -> Option<RouteId> {
        if !self.listeners.is_empty() && !self.listeners.contains(&listener) {
            return None;
        }
        let below = || self.below.iter().find(|(s, _)| name.len() > s.len() && name.ends_with(s));
        self.exact.get(name).copied().or_else(|| below().filter(|_| !is_address).map(|(_, label)| *label))
    }
}

/// A preflight without anything that its answer may not depend on: what the proxy is asked, and what an answer holds for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Question {
    /// The listener.
    pub listener: ListenerId,
    /// `Host` as it was sent, in lower case.
    pub host: Box<str>,
    /// Path and query.
    pub target: Box<str>,
    /// `Origin`.
    pub origin: Box<str>,
    /// `Access-Control-Request-Method`.
    pub method: Box<str>,
    /// `Access-Control-Request-Headers`: lower-case, ascending, unique, joined by commas; empty: the line is not sent.
    pub headers: Box<str>,
}

impl Question {
    /// What is asked with a preflight. `None`: it is no question that others would ask again, for it is too long, odd, or
    /// asks for more than CORS.
    pub fn of(request: &Preflight<'_>) -> Option<Self> {
        let text = |bytes: &[u8], longest: usize| {
            let fits = bytes.len() <= longest && bytes.iter().all(u8::is_ascii_graphic);
            fits.then(|| String::from_utf8_lossy(bytes).into_owned().into_boxed_str())
        };
        let plain = !request.private_network
            && is_plain(request.origin)
            && request.method.len() <= MAX_METHOD
            && is_token(request.method)
            && !request.host.iter().any(u8::is_ascii_uppercase);
        if !plain || request.headers.iter().map(|line| line.len() + 1).sum::<usize>() > MAX_NAMES {
            return None;
        }
        let mut headers = Vec::new();
        for name in names(request.headers) {
            if !is_token(name) {
                return None;
            }
            headers.push(String::from_utf8_lossy(name).to_ascii_lowercase());
        }
        headers.sort_unstable();
        headers.dedup();
        Some(Self {
            listener: request.listener,
            host: text(request.host, MAX_HOST)?,
            target: text(request.target, MAX_TARGET)?,
            origin: text(request.origin, usize::MAX)?,
            method: text(request.method, MAX_METHOD)?,
            headers: headers.join(",").into(),
        })
    }

    /// The bytes that the proxy is asked with: no line more than the answer may depend on.
    pub fn bytes(&self) -> Vec<u8> {
        let Self { host, target, origin, method, headers, .. } = self;
        let mut text = format!(
            "OPTIONS {target} HTTP/1.1\r\nHost: {host}\r\nOrigin: {origin}\r\n\
             Access-Control-Request-Method: {method}\r\n"
        );
        if !headers.is_empty() {
            text.extend(["Access-Control-Request-Headers: ", headers, "\r\n"]);
        }
        text.push_str("\r\n");
        text.into_bytes()
    }

    /// The host's name: without port.
    pub fn host_name(&self) -> &str {
        match self.host.rsplit_once(':') {
            Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
            _ => &self.host,
        }
    }

    /// The path, without query.
    pub fn path(&self) -> &str {
        self.target.split('?').next().unwrap_or_default()
    }

    fn place(&self) -> u64 {
        let Self { listener, host, target, origin, method, .. } = self;
        place(*listener, host.as_bytes(), target.as_bytes(), origin.as_bytes(), method.as_bytes())
    }

    /// Whether this is what a preflight asks. Names must stand as browsers write them: ascending, each once.
    fn is(&self, request: &Preflight<'_>) -> bool {
        let mut asked = names(request.headers);
        *self.target.as_bytes() == *request.target
            && *self.origin.as_bytes() == *request.origin
            && *self.method.as_bytes() == *request.method
            && *self.host.as_bytes() == *request.host
            && self.listener == request.listener
            && names(&[self.headers.as_bytes()])
                .all(|name| asked.next().is_some_and(|asked| asked.eq_ignore_ascii_case(name)))
            && asked.next().is_none()
    }
}

impl fmt::Display for Question {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, target, origin, method, headers, .. } = self;
        write!(f, "{method} {host}{target} from {origin} with [{headers}]")
    }
}

/// Where a question is found. Its requested headers play no part: few are asked for at one place.
fn place(listener: ListenerId, host: &[u8], target: &[u8], origin: &[u8], method: &[u8]) -> u64 {
    hash(u64::from(listener.0), target)
        ^ hash(1, origin).rotate_left(1)
        ^ hash(2, method).rotate_left(2)
        ^ hash(3, host).rotate_left(3)
}

fn names<'a>(lines: &'a [&'a [u8]]) -> impl Iterator<Item = &'a [u8]> {
    lines
        .iter()
        .flat_map(|line| line.split(|&b| b == b','))
        .map(<[u8]>::trim_ascii)
        .filter(|name| !name.is_empty())
}

/// A question with the proxy's answer to it.
#[derive(Debug)]
pub struct Learned {
    question: Arc<Question>,
    template: Template,
    outcome: Outcome,
}

impl Learned {
    /// `no_content`: the status is 204, else 200 without content. `lines`: the `Access-Control-*` lines that the proxy
    /// sent, one of them the `Access-Control-Allow-Origin`.
    pub fn new(question: Arc<Question>, no_content: bool, lines: &[(String, String)]) -> Self {
        let mut builder = if no_content { Template::no_content() } else { Template::plain_ok() };
        let mut allowed = false;
        for (name, value) in lines {
            if name.eq_ignore_ascii_case("access-control-allow-origin") {
                let same = *value == *question.origin;
                allowed |= same || value == "*";
                // Spliced in: so answers to many origins are one and the same template.
                builder = if same {
                    builder.origin(false)
                } else {
                    builder.line("Access-Control-Allow-Origin", value)
                };
            } else {
                builder = builder.line(name, value);
            }
        }
        let outcome = if allowed { Outcome::Allowed } else { Outcome::Denied(DenyReason::Origin) };
        Self { question, template: builder.vary().build(), outcome }
    }

    /// What it answers.
    pub fn question(&self) -> &Arc<Question> {
        &self.question
    }
}

/// All answers that hold, immutable.
#[derive(Debug)]
pub struct Answers {
    learnable: Arc<Learnable>,
    entries: Box<[Arc<Learned>]>,
    index: Index,
}

impl Answers {
    /// Of these questions, each there once.
    pub fn new(learnable: Arc<Learnable>, entries: Vec<Arc<Learned>>) -> Self {
        let hashed: Vec<_> = entries.iter().map(|entry| entry.question.place()).zip(0..).collect();
        Self { learnable, entries: entries.into(), index: Index::new(&hashed) }
    }

    /// Whose preflights may be learned of.
    pub fn learnable(&self) -> &Arc<Learnable> {
        &self.learnable
    }

    /// The questions.
    pub fn questions(&self) -> impl Iterator<Item = &Question> {
        self.entries.iter().map(|entry| &*entry.question)
    }

    /// The label of a host: lower-case, without port. `None`: nothing is learned of it.
    pub(super) fn label(&self, listener: ListenerId, name: &[u8], is_address: bool) -> Option<RouteId> {
        self.learnable.label(listener, name, is_address)
    }

    /// The answer to a preflight of a host with this label.
    pub(super) fn answer<'a>(&'a self, request: &Preflight<'a>, label: RouteId) -> Option<Answer<'a>> {
        if request.private_network {
            return None;
        }
        let Preflight { listener, host, target, origin, method, .. } = *request;
        let found = self.index.find(place(listener, host, target, origin, method), |i| {
            self.entries[i as usize].question.is(request)
        })?;
        let Learned { template, outcome, .. } = &*self.entries[found as usize];
        Answer::new(*outcome, label, template, request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Connection;

    const REQUEST: Preflight<'static> = Preflight {
        listener: ListenerId(1),
        host: b"app.example:8080",
        target: b"/v1/cart?q=1",
        origin: b"https://shop.example",
        method: b"PUT",
        headers: &[b"content-type,x-a"],
        private_network: false,
    };

    fn learnable() -> Arc<Learnable> {
        let hosts = [
            HostPattern::Exact("app.example".into()),
            HostPattern::Wildcard(".dev.example".into()),
            HostPattern::Any,
        ];
        Arc::new(Learnable::new(&[ListenerId(1)], &hosts, &mut RouteLabels::new(10)))
    }

    #[test]
    fn who_may_be_learned_of() {
        let learnable = learnable();
        for (listener, host, address, expected) in [
            (1, "app.example", false, Some(1)),
            (0, "app.example", false, None),
            (1, "other.example", false, None),
            (1, "a.b.dev.example", false, Some(2)),
            (1, "dev.example", false, None),
            (1, ".dev.example", false, None),
            (1, "1.dev.example", true, None),
        ] {
            let label = learnable.label(ListenerId(listener), host.as_bytes(), address);
            assert_eq!(label, expected.map(RouteId), "{listener} {host}");
        }
    }

    #[test]
    fn a_question_holds_what_an_answer_depends_on_and_no_more() {
        let question = Question::of(&REQUEST).expect("a question");
        let expected = "OPTIONS /v1/cart?q=1 HTTP/1.1\r\nHost: app.example:8080\r\nOrigin: https://shop.example\r\n\
                        Access-Control-Request-Method: PUT\r\nAccess-Control-Request-Headers: content-type,x-a\r\n\r\n";
        assert_eq!(String::from_utf8(question.bytes()).expect("ASCII"), expected);
        assert_eq!((question.host_name(), question.path()), ("app.example", "/v1/cart"));
        let lines: [&[u8]; 3] = [b" X-A , content-type", b"", b"x-a"];
        let odd = Preflight { headers: &lines, ..REQUEST };
        assert_eq!(Question::of(&odd), Some(question), "normalised");
        let long = [b'a'; 1025];
        let many: [&[u8]; 1] = [&long];
        for (name, odd) in [
            ("private network", Preflight { private_network: true, ..REQUEST }),
            ("capitals", Preflight { host: b"App.example", ..REQUEST }),
            ("long target", Preflight { target: &long, ..REQUEST }),
            ("long names", Preflight { headers: &many, ..REQUEST }),
            ("no token", Preflight { headers: &[b"a b"], ..REQUEST }),
            ("long method", Preflight { method: &long[..65], ..REQUEST }),
            ("a line end in the origin", Preflight { origin: b"https://a\r\nCookie: b", ..REQUEST }),
        ] {
            assert_eq!(Question::of(&odd), None, "{name}");
        }
    }

    #[test]
    fn only_the_very_question_is_answered() {
        let lines = [
            ("Access-Control-Allow-Origin".to_owned(), "https://shop.example".to_owned()),
            ("Access-Control-Allow-Methods".to_owned(), "GET,PUT".to_owned()),
        ];
        let question = Arc::new(Question::of(&REQUEST).expect("a question"));
        let answers = Answers::new(learnable(), vec![Arc::new(Learned::new(question, true, &lines))]);
        let rendered = |request: &Preflight<'_>| {
            let answer = answers.answer(request, RouteId(1))?;
            let mut out = Vec::new();
            answer.render(b"Sun, 06 Nov 1994 08:49:37 GMT", Connection::KeepAlive, &mut out);
            Some(String::from_utf8(out).expect("ASCII"))
        };
        let expected = "HTTP/1.1 204 No Content\r\nDate: Sun, 06 Nov 1994 08:49:37 GMT\r\n\
                        Access-Control-Allow-Origin: https://shop.example\r\n\
                        Access-Control-Allow-Methods: GET,PUT\r\nVary: Origin, Access-Control-Request-Method, \
                        Access-Control-Request-Headers\r\n\r\n";
        assert_eq!(rendered(&REQUEST).as_deref(), Some(expected));
        let split: [&[u8]; 2] = [b"content-type ", b" x-a"];
        assert!(rendered(&Preflight { headers: &split, ..REQUEST }).is_some(), "split by a gateway");
        for (name, other) in [
            ("listener", Preflight { listener: ListenerId(0), ..REQUEST }),
            ("port", Preflight { host: b"app.example", ..REQUEST }),
            ("query", Preflight { target: b"/v1/cart?q=2", ..REQUEST }),
            ("origin", Preflight { origin: b"https://shop.example.evil", ..REQUEST }),
            ("method", Preflight { method: b"put", ..REQUEST }),
            ("fewer names", Preflight { headers: &[b"content-type"], ..REQUEST }),
            ("more names", Preflight { headers: &[b"content-type,x-a,x-b"], ..REQUEST }),
            ("no names", Preflight { headers: &[], ..REQUEST }),
            ("another order", Preflight { headers: &[b"x-a,content-type"], ..REQUEST }),
            ("private network", Preflight { private_network: true, ..REQUEST }),
        ] {
            assert_eq!(rendered(&other), None, "{name}");
        }
    }
}
