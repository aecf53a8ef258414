//! Pre-rendered answers: a template per policy, into which only origin, date and echoes are spliced.

use super::RouteId;
use super::acrh::{self, Echo};
use std::{borrow::Cow, sync::Arc};

/// What an answer says of the connection (RFC 9112 §9.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Connection {
    /// HTTP/1.1 and it stays open: nothing is said.
    KeepAlive,
    /// HTTP/1.0 and the client asked to keep it: `Connection: keep-alive`.
    KeepAlive10,
    /// `Connection: close`.
    Close,
}

/// What was denied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DenyReason {
    /// The origin.
    Origin,
    /// The requested method.
    Method,
    /// A requested header.
    Headers,
}

/// What the answer tells the browser.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// Origin allowed (and in the native dialect method and headers too).
    Allowed,
    /// The browser will refuse, in the dialect's way.
    Denied(DenyReason),
}

/// An answer: pieces of the table and of the request; nothing is copied until [`Answer::render`].
#[derive(Clone, Copy, Debug)]
pub struct Answer<'a> {
    /// Allowed or denied.
    pub outcome: Outcome,
    /// Which route decided.
    pub route: RouteId,
    template: &'a Template,
    origin: &'a [u8],
    method: &'a [u8],
    request_headers: &'a [&'a [u8]],
    allow_headers: AllowHeaders,
    private_network: bool,
}

/// The `Access-Control-Allow-Headers` line where it depends on the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AllowHeaders {
    /// Static (in the template), or none.
    Fixed,
    Star,
    Echo,
}

impl<'a> Answer<'a> {
    /// `None` if the template echoes the requested headers and they cannot be echoed.
    #[inline]
    pub(super) fn new(
        outcome: Outcome,
        route: RouteId,
        template: &'a Template,
        request: &super::Preflight<'a>,
    ) -> Option<Self> {
        let allow_headers = match template.headers {
            EchoHeaders::Never => AllowHeaders::Fixed,
            mode => match (mode, acrh::judge(request.headers)) {
                (_, Echo::Unusable) => return None,
                (EchoHeaders::Always, _)
                | (EchoHeaders::IfAny, Echo::Usable { .. })
                | (EchoHeaders::StarButAuthorization, Echo::Usable { authorization: true }) => {
                    AllowHeaders::Echo
                }
                (EchoHeaders::StarButAuthorization, _) => AllowHeaders::Star,
                _ => AllowHeaders::Fixed,
            },
        };
        Some(Self {
            outcome,
            route,
            template,
            origin: request.origin,
            method: request.method,
            request_headers: request.headers,
            allow_headers,
            private_network: template.private_network && request.private_network,
        })
    }
}

impl Answer<'_> {
    /// Upper bound of the rendered length in bytes.
    pub fn max_len(&self) -> usize {
        let t = self.template;
        let echo = match self.allow_headers {
            AllowHeaders::Echo => self.request_headers.iter().map(|line| line.len() + 1).sum(),
            AllowHeaders::Star | AllowHeaders::Fixed => 1,
        };
        // The names and static values of all dynamic lines together, and the date, are below 256 bytes.
        256 + t.kind.start.len() + t.fixed.len() + self.origin.len() + self.method.len() + echo
    }

    /// Appends the whole response to `out`. Allocates only if `out` lacks [`Answer::max_len`] spare bytes.
    /// `date` is an IMF-fixdate (RFC 9110 §5.6.7), as every answer carries `Date` (§6.6.1).
    pub fn render(&self, date: &[u8; 29], connection: Connection, out: &mut Vec<u8>) {
        let t = self.template;
        let names = t.kind.names;
        out.reserve(self.max_len());
        out.extend_from_slice(t.kind.start);
        out.extend_from_slice(date);
        out.extend_from_slice(match connection {
            Connection::KeepAlive => b"\r\n",
            Connection::KeepAlive10 => names.keep_alive,
            Connection::Close => names.close,
        });
        if t.echo_origin {
            out.extend_from_slice(names.allow_origin);
            out.extend_from_slice(self.origin);
            out.extend_from_slice(b"\r\n");
        }
        out.extend_from_slice(&t.fixed);
        if t.echo_method {
            out.extend_from_slice(names.allow_methods);
            out.extend_from_slice(self.method);
            out.extend_from_slice(b"\r\n");
        }
        match self.allow_headers {
            AllowHeaders::Fixed => {}
            AllowHeaders::Star => {
                out.extend_from_slice(names.allow_headers);
                out.extend_from_slice(b"*\r\n");
            }
            AllowHeaders::Echo => {
                out.extend_from_slice(names.allow_headers);
                // Empty lines leave no comma, as in Envoy.
                let start = out.len();
                for line in self.request_headers.iter().filter(|line| !line.is_empty()) {
                    if out.len() > start {
                        out.push(b',');
                    }
                    out.extend_from_slice(line);
                }
                out.extend_from_slice(b"\r\n");
            }
        }
        if self.private_network {
            out.extend_from_slice(names.allow_private_network);
        }
        out.extend_from_slice(b"\r\n");
    }
}

/// When `Access-Control-Allow-Headers` echoes the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum EchoHeaders {
    /// Static list, or no line.
    Never,
    /// Always, even where nothing was asked (Envoy: the value is empty then).
    Always,
    /// Where names were asked for; else no line.
    IfAny,
    /// `*`, which covers everything but `authorization`: an echo where that is asked for (Fetch §3.2.4).
    StarButAuthorization,
}

/// The static bytes of an answer and what is spliced in.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Template {
    kind: &'static Kind,
    fixed: Arc<[u8]>,
    echo_origin: bool,
    echo_method: bool,
    headers: EchoHeaders,
    private_network: bool,
}

/// An answer in pieces.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Pieces {
    /// What stands before the date.
    pub front: Vec<u8>,
    /// What stands between date and origin.
    pub middle: Vec<u8>,
    /// Whether the origin stands here.
    pub origin: bool,
    /// What stands behind it.
    pub tail: Vec<u8>,
}

impl Template {
    /// `None`: more of the request than its origin is spliced in. The private network's line is left out: whoever asks for
    /// it must not get these.
    pub(super) fn pieces(&self, connection: Connection) -> Option<Pieces> {
        if self.echo_method || self.headers != EchoHeaders::Never {
            return None;
        }
        let names = self.kind.names;
        let mut middle = match connection {
            Connection::KeepAlive => b"\r\n",
            Connection::KeepAlive10 => names.keep_alive,
            Connection::Close => names.close,
        }
        .to_vec();
        let mut tail = [&*self.fixed, b"\r\n"].concat();
        if self.echo_origin {
            middle.extend_from_slice(names.allow_origin);
            tail.splice(..0, *b"\r\n");
        }
        Some(Pieces { front: self.kind.start.to_vec(), middle, origin: self.echo_origin, tail })
    }
}

impl Pieces {
    /// The whole answer.
    pub fn with(&self, date: &[u8; 29], origin: &[u8]) -> Vec<u8> {
        [&*self.front, date, &self.middle, if self.origin { origin } else { b"" }, &self.tail].concat()
    }
}

/// Status and spelling.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Kind {
    /// Status line, up to the date.
    start: &'static [u8],
    names: &'static Names,
    lower: bool,
}

/// 204 (RFC 9110 §15.3.5: neither Content-Length nor Content-Type).
static NO_CONTENT: Kind =
    Kind { start: b"HTTP/1.1 204 No Content\r\nDate: ", names: &CANONICAL, lower: false };
static FORBIDDEN: Kind = Kind { start: b"HTTP/1.1 403 Forbidden\r\nDate: ", names: &CANONICAL, lower: false };
static OK: Kind = Kind { start: b"HTTP/1.1 200 OK\r\nDate: ", names: &CANONICAL, lower: false };
/// As Envoy's local replies look on HTTP/1.
static ENVOY_OK: Kind = Kind { start: b"HTTP/1.1 200 OK\r\ndate: ", names: &LOWER, lower: true };

/// Field names in the two spellings that proxies use.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Names {
    keep_alive: &'static [u8],
    close: &'static [u8],
    allow_origin: &'static [u8],
    allow_methods: &'static [u8],
    allow_headers: &'static [u8],
    allow_private_network: &'static [u8],
}

static CANONICAL: Names = Names {
    keep_alive: b"\r\nConnection: keep-alive\r\n",
    close: b"\r\nConnection: close\r\n",
    allow_origin: b"Access-Control-Allow-Origin: ",
    allow_methods: b"Access-Control-Allow-Methods: ",
    allow_headers: b"Access-Control-Allow-Headers: ",
    allow_private_network: b"Access-Control-Allow-Private-Network: true\r\n",
};

static LOWER: Names = Names {
    keep_alive: b"\r\nconnection: keep-alive\r\n",
    close: b"\r\nconnection: close\r\n",
    allow_origin: b"access-control-allow-origin: ",
    allow_methods: b"access-control-allow-methods: ",
    allow_headers: b"access-control-allow-headers: ",
    allow_private_network: b"access-control-allow-private-network: true\r\n",
};

/// What caches must key an answer by.
const VARY: &str = "Origin, Access-Control-Request-Method, Access-Control-Request-Headers";

impl Template {
    /// 204.
    pub(super) fn no_content() -> Builder {
        Builder::new(&NO_CONTENT)
    }

    /// 403 without a body.
    pub(super) fn forbidden() -> Builder {
        Builder::new(&FORBIDDEN).line("Content-Length", "0")
    }

    /// 200 without content.
    pub(super) fn plain_ok() -> Builder {
        Builder::new(&OK).line("Content-Length", "0")
    }

    /// Envoy's 200.
    pub(super) fn envoy_ok() -> Builder {
        Builder::new(&ENVOY_OK).line("server", "envoy").line("content-length", "0")
    }
}

/// Puts a [`Template`] together.
#[derive(Debug)]
pub(super) struct Builder {
    template: Template,
    fixed: Vec<u8>,
}

impl Builder {
    fn new(kind: &'static Kind) -> Self {
        let template = Template {
            kind,
            fixed: Arc::default(),
            echo_origin: false,
            echo_method: false,
            headers: EchoHeaders::Never,
            private_network: false,
        };
        Self { template, fixed: Vec::new() }
    }

    /// A static line; the name is written in the template's own spelling.
    pub(super) fn line(mut self, name: &str, value: &str) -> Self {
        if self.template.kind.lower {
            self.fixed.extend(name.bytes().map(|b| b.to_ascii_lowercase()));
        } else {
            self.fixed.extend_from_slice(name.as_bytes());
        }
        self.fixed.extend_from_slice(b": ");
        self.fixed.extend_from_slice(value.as_bytes());
        self.fixed.extend_from_slice(b"\r\n");
        self
    }

    /// A static line if there is a value.
    pub(super) fn line_if(self, name: &str, value: Option<impl AsRef<str>>) -> Self {
        match value {
            Some(value) => self.line(name, value.as_ref()),
            None => self,
        }
    }

    /// `Vary` by all that CORS answers depend on.
    pub(super) fn vary(self) -> Self {
        self.line("Vary", VARY)
    }

    /// `Access-Control-Allow-Origin`: the literal `*`, or the request's origin.
    pub(super) fn origin(mut self, star: bool) -> Self {
        if star {
            return self.line("Access-Control-Allow-Origin", "*");
        }
        self.template.echo_origin = true;
        self
    }

    /// `Access-Control-Allow-Credentials: true`, if so.
    pub(super) fn credentials(self, credentials: bool) -> Self {
        self.line_if("Access-Control-Allow-Credentials", credentials.then_some("true"))
    }

    /// `Access-Control-Allow-Methods`.
    pub(super) fn methods(mut self, methods: &AllowMethods<'_>) -> Self {
        match methods {
            AllowMethods::Omit => self,
            AllowMethods::Fixed(value) => self.line("Access-Control-Allow-Methods", value),
            AllowMethods::Echo => {
                self.template.echo_method = true;
                self
            }
        }
    }

    /// A static `Access-Control-Allow-Headers`, or how it echoes.
    pub(super) fn headers(mut self, fixed: Option<&str>, echo: EchoHeaders) -> Self {
        self.template.headers = echo;
        self.line_if("Access-Control-Allow-Headers", fixed)
    }

    /// Answers the private network request header.
    pub(super) fn private_network(mut self, yes: bool) -> Self {
        self.template.private_network = yes;
        self
    }

    pub(super) fn build(self) -> Template {
        Template { fixed: self.fixed.into(), ..self.template }
    }
}

/// What stands in `Access-Control-Allow-Methods`.
#[derive(Debug)]
pub(super) enum AllowMethods<'a> {
    Omit,
    Fixed(Cow<'a, str>),
    Echo,
}
