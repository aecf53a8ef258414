//! Decides a preflight by [`Term`]s, one look-up a step: the part of the policy table that needs no more than whole strings
//! and their ends. The program asks a map, `explain` and tests ask the table that the map was filled from.
//!
//! Whatever is not certain is asked of a worker. A decision is what [`crate::head`] and the table decide too.

use crate::{
    abi::{MAX_TEXT, Routes, Rule, Term, Value, ask, outcome, routes_flags, rule_flags, term},
    head::{Head, Span, TARGET, said},
    words::{
        Buffer, bits, byte, equal, first, front, highest_bit, host_bytes, inside, lowest, lowest_bit, word,
    },
};

/// What was decided; the value of [`Decide::verdict`].
pub mod verdict {
    /// Nothing yet.
    pub const OPEN: u32 = 0;
    /// The program answers, by the template [`super::Decide::template`].
    pub const ANSWER: u32 = 1;
    /// The proxy answers.
    pub const PROXY: u32 = 2;
    /// A worker decides; [`super::Decide::why`] says what the program could not.
    pub const ASK: u32 = 3;
}

/// What [`Decide::prepare`] wants.
pub mod wants {
    /// Nothing: it is decided.
    pub const NOTHING: u32 = 0;
    /// Its key looked up.
    pub const LOOK_UP: u32 = 1;
    /// Another step.
    pub const STEP: u32 = 2;
}

/// So many steps suffice: hosts and origins have 32 dots at most, paths 63 prefixes, and requested headers fill a segment.
pub const MAX_STEPS: u32 = 1024;

/// What is looked through or looked up at present.
mod phase {
    pub(super) const HOST_TEXT: u32 = 0;
    pub(super) const PORT_TEXT: u32 = 1;
    pub(super) const PORT: u32 = 2;
    pub(super) const HOST: u32 = 3;
    pub(super) const HOST_BELOW: u32 = 4;
    pub(super) const ANY_HOST: u32 = 5;
    pub(super) const PATH: u32 = 6;
    pub(super) const PATH_BELOW: u32 = 7;
    pub(super) const ORIGIN_TEXT: u32 = 8;
    pub(super) const ORIGIN: u32 = 9;
    pub(super) const ORIGIN_HOST: u32 = 10;
    pub(super) const ORIGIN_BELOW: u32 = 11;
    pub(super) const ANY_ORIGIN_HOST: u32 = 12;
    pub(super) const ORIGIN_UNKNOWN: u32 = 13;
    pub(super) const METHOD: u32 = 14;
    pub(super) const NAME_TEXT: u32 = 15;
    pub(super) const NAME: u32 = 16;
    pub(super) const QUESTION: u32 = 17;
    pub(super) const LEARNED: u32 = 18;
}

/// A decision under way.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Decide {
    /// What is looked up next.
    pub key: Term,
    /// The policy's rule, once it is known.
    pub rule: Rule,
    /// Dots of the host, or of the origin's host, that were not tried yet; or the hash of the question so far.
    dots: u64,
    /// Underscores of the origin's host.
    underscores: u64,
    /// The byte before the present word is a dot.
    after_dot: u64,
    /// Lengths of the path's prefixes that were not tried yet.
    prefixes: u64,
    listener: u32,
    phase: u32,
    /// The host without its port, then the origin's host, then the rest of the requested headers; or a part of the question.
    rest: Span,
    /// Where the text of the key is.
    text: u32,
    /// So many bytes of a text were looked through.
    offset: u32,
    /// 1: the host may be an address.
    literal: u32,
    /// The bit of the method.
    method: u32,
    /// The port in `Host`.
    port: u32,
    /// What the host's paths are kept under.
    paths: u32,
    /// Names of requested headers must stand behind this position; or the number of the part of the question.
    position: u32,
    /// Of [`verdict`].
    pub verdict: u32,
    /// With [`verdict::ASK`]: of [`ask`].
    pub why: u32,
    /// Of [`outcome`], but with [`verdict::ASK`].
    pub outcome: u32,
    /// With [`verdict::ANSWER`]: number of the template.
    pub template: u32,
}

const _: () = assert!(size_of::<Decide>().is_multiple_of(8));

/// A bit for each of the methods that nearly all lists consist of; 0 for others.
#[inline(always)]
pub fn method_bit(method: u64, length: u32) -> u32 {
    let is = |text: &[u8; 8], of: u32| length == of && method == front(text) >> (8 * (8 - of));
    if is(b"\0\0\0\0\0GET", 3) {
        1
    } else if is(b"\0\0\0\0HEAD", 4) {
        2
    } else if is(b"\0\0\0\0POST", 4) {
        4
    } else if is(b"\0\0\0\0\0PUT", 3) {
        8
    } else if is(b"\0\0DELETE", 6) {
        16
    } else if is(b"\0\0\0PATCH", 5) {
        32
    } else if is(b"\0OPTIONS", 7) {
        64
    } else {
        0
    }
}

impl Term {
    /// Takes its text from `at` on.
    #[inline(always)]
    fn fill(&mut self, bytes: &Buffer, at: u32) {
        let length = u32::from(self.length);
        let mut before = 0;
        while before < MAX_TEXT {
            self.text[(before / 8) as usize] = word(bytes, at + before) & inside(length, before);
            before += 8;
        }
    }
}

impl Decide {
    /// Begins: by this table, on this listener, with this head. In place: for eBPF's stack it is large.
    #[inline(always)]
    pub fn begin(&mut self, generation: u32, listener: u32, head: &Head) {
        self.key.generation = generation;
        self.key.zero = 0;
        self.listener = listener;
        self.phase = phase::HOST_TEXT;
        self.rest = head.host;
        self.dots = 0;
        self.after_dot = 0;
        self.offset = 0;
        self.position = 0;
        self.verdict = verdict::OPEN;
        self.template = 0;
    }

    #[inline(always)]
    fn ask(&mut self, why: u32) -> u32 {
        self.verdict = verdict::ASK;
        self.why = why;
        wants::NOTHING
    }

    #[inline(always)]
    fn go(&mut self, phase: u32) -> u32 {
        self.phase = phase;
        wants::STEP
    }

    /// Wants a term with so much text from `at` on.
    #[inline(always)]
    fn look_up(&mut self, kind: u16, of: u32, at: u32, length: u32) -> u32 {
        self.key.kind = kind;
        self.key.of = of;
        self.key.length = length as u16;
        self.text = at;
        wants::LOOK_UP
    }

    /// What must be done next, of [`wants`]. A key that is wanted is in [`Decide::key`], and what is found goes to
    /// [`Decide::take`].
    #[inline(always)]
    pub fn prepare(&mut self, bytes: &Buffer, head: &Head) -> u32 {
        let wanted = self.next(bytes, head);
        if wanted == wants::LOOK_UP {
            self.key.fill(bytes, self.text);
            if self.phase == phase::LEARNED {
                self.key.text[0] = self.dots;
            }
        }
        wanted
    }

    #[inline(always)]
    fn next(&mut self, bytes: &Buffer, head: &Head) -> u32 {
        let (at, end) = (self.rest.at, self.rest.end);
        match self.phase {
            phase::HOST_TEXT => self.host_text(bytes),
            phase::PORT_TEXT => self.port_text(bytes),
            phase::HOST => self.look_up(term::HOST, self.listener, at, end - at),
            phase::HOST_BELOW => {
                if self.dots == 0 {
                    self.phase = phase::ANY_HOST;
                    return self.look_up(term::ANY_HOST, self.listener, 0, 0);
                }
                let dot = lowest_bit(self.dots);
                // `position`: a dot was tried already.
                let kind = if self.position == 0 { term::HOST_BELOW } else { term::HOST_FAR_BELOW };
                self.position = 1;
                self.dots &= self.dots - 1;
                self.look_up(kind, self.listener, at + dot, end - at - dot)
            }
            phase::PATH => self.look_up(term::PATH, self.paths, TARGET, head.path_end - TARGET),
            phase::PATH_BELOW => {
                if self.prefixes == 0 {
                    self.verdict = verdict::PROXY;
                    self.outcome = outcome::PassedRoute;
                    self.rule.label = 0;
                    return wants::NOTHING;
                }
                let length = highest_bit(self.prefixes);
                self.prefixes ^= 1 << length;
                self.look_up(term::PATH_BELOW, self.paths, TARGET, length)
            }
            phase::ORIGIN_TEXT => self.origin_text(bytes, head),
            phase::ORIGIN_HOST => self.origin_host(bytes),
            phase::ORIGIN_BELOW => {
                let kind = Self::below(bytes, head);
                if self.dots == 0 {
                    self.phase = phase::ANY_ORIGIN_HOST;
                    return self.look_up(kind, self.rule.origins, 0, 0);
                }
                let dot = lowest_bit(self.dots);
                self.dots &= self.dots - 1;
                if self.rule.flags & rule_flags::ONE_LABEL != 0 {
                    self.dots = 0;
                }
                self.look_up(kind, self.rule.origins, at + dot, end - at - dot)
            }
            phase::ORIGIN_UNKNOWN => {
                self.origin_unknown(head);
                wants::NOTHING
            }
            phase::METHOD => self.method(head),
            phase::QUESTION => self.question(bytes, head),
            _ => self.name_text(bytes),
        }
    }

    /// What was looked up; `None`: there is no such term.
    #[inline(always)]
    pub fn take(&mut self, bytes: &Buffer, head: &Head, found: Option<&Value>) {
        match self.phase {
            phase::PORT => {
                let Some(ports) = found else {
                    self.ask(ask::Host);
                    return;
                };
                let mut listed = ports[0] == 0;
                let mut i = 1;
                while i < ports.len() {
                    listed |= ports[i] == self.port;
                    i += 1;
                }
                if listed {
                    self.phase = phase::HOST;
                } else {
                    self.ask(ask::Host);
                }
            }
            phase::HOST | phase::HOST_BELOW | phase::ANY_HOST => match found {
                Some(value) => self.take_host(head, &Routes::of(value)),
                None if self.literal != 0 => {
                    self.ask(ask::Host);
                }
                None if self.phase == phase::ANY_HOST => {
                    self.ask(ask::UnknownHost);
                }
                None => self.phase = phase::HOST_BELOW,
            },
            phase::PATH | phase::PATH_BELOW => match found {
                Some(value) => {
                    self.rule = Rule::of(value);
                    if self.rule.flags & rule_flags::PASSES != 0 {
                        self.verdict = verdict::PROXY;
                        self.outcome = outcome::PassedRoute;
                    } else if self.rule.flags & rule_flags::LEARNED != 0 {
                        self.rest = head.target();
                        self.dots = u64::from(self.listener);
                        self.position = 0;
                        self.offset = 0;
                        self.phase = phase::QUESTION;
                    } else if self.rule.flags & rule_flags::DECIDES == 0 {
                        self.ask(ask::Rules);
                    } else {
                        self.method_text(bytes, head);
                    }
                }
                None => self.phase = phase::PATH_BELOW,
            },
            phase::LEARNED => {
                if found.is_some() {
                    self.ask(ask::Rules);
                } else {
                    self.verdict = verdict::PROXY;
                    self.outcome = outcome::PassedRoute;
                }
            }
            phase::ORIGIN => match found {
                Some(_) => {
                    self.method(head);
                }
                None => self.origin_below(bytes, head),
            },
            phase::ORIGIN_BELOW | phase::ANY_ORIGIN_HOST => {
                if found.is_some() {
                    self.method(head);
                } else if self.phase == phase::ANY_ORIGIN_HOST {
                    self.phase = phase::ORIGIN_UNKNOWN;
                }
            }
            _ => match found {
                Some([position, ..]) if *position >= self.position => {
                    self.position = *position + 1;
                    if self.rest.at == self.rest.end {
                        self.allowed(head);
                    } else {
                        // Behind the comma.
                        self.rest.at += 1;
                        self.offset = 0;
                        self.phase = phase::NAME_TEXT;
                    }
                }
                _ => self.refused(outcome::DeniedHeaders, outcome::PassedHeaders, head),
            },
        }
    }

    /// Looks through a word of the host: a plain name in lower case, and perhaps a port behind it.
    #[inline(always)]
    fn host_text(&mut self, bytes: &Buffer) -> u32 {
        let Span { at, end } = self.rest;
        let offset = self.offset;
        if end - at > MAX_TEXT {
            return self.ask(ask::Host);
        }
        let word = word(bytes, at + offset);
        let mut valid = first(end - at - offset);
        let colons = equal(word, b':') & valid;
        let mut name_end = end;
        if colons != 0 {
            let colon = lowest(colons);
            valid = first(colon);
            name_end = at + offset + colon;
        }
        if !self.host_word(word, valid) {
            return self.ask(ask::Host);
        }
        if colons == 0 && at + self.offset < end {
            return wants::STEP;
        }
        let dots = self.dots;
        if name_end == at || dots & 1 != 0 || byte(bytes, name_end - 1) == b'.' {
            return self.ask(ask::Host);
        }
        // Perhaps an address, whose spellings are many: only the very text of a listed one is known.
        let last = if dots == 0 { at } else { at + highest_bit(dots) + 1 };
        self.literal = u32::from(byte(bytes, last).is_ascii_digit());
        self.rest.end = name_end;
        if colons == 0 {
            self.phase = phase::HOST;
            return self.look_up(term::HOST, self.listener, at, name_end - at);
        }
        self.offset = name_end + 1;
        self.port = 0;
        self.prefixes = u64::from(end);
        self.go(phase::PORT_TEXT)
    }

    /// A digit of the port in `Host`; no zero in front.
    #[inline(always)]
    fn port_text(&mut self, bytes: &Buffer) -> u32 {
        let end = self.prefixes as u32;
        let digit = byte(bytes, self.offset);
        if self.offset >= end || !digit.is_ascii_digit() || (self.port == 0 && digit == b'0') {
            return self.ask(ask::Host);
        }
        self.port = self.port * 10 + u32::from(digit - b'0');
        self.offset += 1;
        if self.port > 0xffff {
            return self.ask(ask::Host);
        }
        if self.offset != end {
            return wants::STEP;
        }
        self.phase = phase::PORT;
        self.look_up(term::LISTENER, self.listener, 0, 0)
    }

    /// Takes a word of a host; false: it has a byte that no plain host has, or an empty label.
    #[inline(always)]
    fn host_word(&mut self, word: u64, valid: u64) -> bool {
        let dots = equal(word, b'.') & valid;
        let empty = (dots << 8 | self.after_dot) & dots;
        self.after_dot = dots >> 56;
        self.dots |= bits(dots) << (self.offset & 63);
        self.underscores |= bits(equal(word, b'_') & valid) << (self.offset & 63);
        self.offset += 8;
        ((host_bytes(word) & valid) ^ valid) | empty == 0
    }

    /// The host is known: by its longest paths first.
    #[inline(always)]
    fn take_host(&mut self, head: &Head, routes: &Routes) {
        let length = head.path_end - TARGET;
        let is_short = length < MAX_TEXT;
        if routes.flags & routes_flags::REGEX != 0 {
            self.ask(ask::Regex);
            return;
        }
        if routes.flags & routes_flags::LONG != 0 && !is_short {
            self.ask(ask::LongPath);
            return;
        }
        self.paths = routes.host;
        let mut ends = head.slashes;
        let mut whole = 0;
        if is_short {
            whole = 1 << length;
            ends |= whole;
        }
        self.prefixes = routes.prefixes & ends;
        self.phase = if routes.exact & whole != 0 { phase::PATH } else { phase::PATH_BELOW };
    }

    /// Looks through a word of the origin: visible ASCII without a comma, and short.
    #[inline(always)]
    fn origin_text(&mut self, bytes: &Buffer, head: &Head) -> u32 {
        let Span { at, end } = head.origin;
        let offset = self.offset;
        if end - at > MAX_TEXT {
            return self.ask(ask::Origin);
        }
        let word = word(bytes, at + offset);
        if (equal(word, b' ') | equal(word, b',')) & first(end - at - offset) != 0 {
            return self.ask(ask::Origin);
        }
        self.offset = offset + 8;
        if at + self.offset < end {
            return wants::STEP;
        }
        if self.rule.flags & rule_flags::ALL_ORIGINS != 0 {
            return self.go(phase::METHOD);
        }
        self.phase = phase::ORIGIN;
        self.look_up(term::ORIGIN, self.rule.origins, at, end - at)
    }

    #[inline(always)]
    fn below(bytes: &Buffer, head: &Head) -> u16 {
        if byte(bytes, head.origin.at + 4) == b's' { term::HTTPS_BELOW } else { term::HTTP_BELOW }
    }

    /// The origin is not listed. Of one that is spelled as browsers do it can be said whether its host is below a listed
    /// one, and for certain that it is not allowed.
    #[inline(always)]
    fn origin_below(&mut self, bytes: &Buffer, head: &Head) {
        let Span { at, end } = head.origin;
        let start = word(bytes, at);
        let host = if start == front(b"https://") {
            at + 8
        } else if start << 8 == front(b"\0http://") {
            at + 7
        } else {
            end
        };
        if host >= end {
            self.ask(ask::Origin);
            return;
        }
        self.rest = Span { at: host, end };
        self.dots = 0;
        self.underscores = 0;
        self.after_dot = 0;
        self.offset = 0;
        self.phase = phase::ORIGIN_HOST;
    }

    /// Looks through a word of the origin's host, which has no port.
    #[inline(always)]
    fn origin_host(&mut self, bytes: &Buffer) -> u32 {
        let Span { at, end } = self.rest;
        let word = word(bytes, at + self.offset);
        let valid = first(end - at - self.offset);
        if !self.host_word(word, valid) {
            return self.ask(ask::Origin);
        }
        if at + self.offset < end {
            return wants::STEP;
        }
        let dots = self.dots;
        if dots & 1 != 0 || byte(bytes, end - 1) == b'.' {
            return self.ask(ask::Origin);
        }
        // The label before the first dot, or all of it.
        let label = (dots & dots.wrapping_neg()).wrapping_sub(1);
        let flags = self.rule.flags;
        let odd = flags & rule_flags::ONE_LABEL != 0 && self.underscores & label != 0;
        if flags & rule_flags::ORIGINS_BELOW == 0 || odd {
            self.dots = 0;
            return self.go(phase::ORIGIN_UNKNOWN);
        }
        self.go(phase::ORIGIN_BELOW)
    }

    #[inline(always)]
    fn origin_unknown(&mut self, head: &Head) {
        if self.rule.flags & rule_flags::MORE_ORIGINS != 0 {
            self.ask(ask::Origin);
        } else {
            self.refused(outcome::DeniedOrigin, outcome::PassedOrigin, head);
        }
    }

    /// One of the usual methods, or a worker's: before anything is said of the origin, for one that is no token passes.
    #[inline(always)]
    fn method_text(&mut self, bytes: &Buffer, head: &Head) {
        let Span { at, end } = head.method;
        let length = end - at;
        let text = if length < 8 { word(bytes, at) & ((1 << (8 * length)) - 1) } else { 0 };
        self.method = method_bit(text, length);
        self.offset = 0;
        self.phase = phase::ORIGIN_TEXT;
        if self.method == 0 {
            self.ask(ask::Method);
        }
    }

    #[inline(always)]
    fn method(&mut self, head: &Head) -> u32 {
        let bit = self.method;
        if self.rule.flags & rule_flags::ALL_METHODS == 0 && self.rule.methods & bit == 0 {
            self.refused(outcome::DeniedMethod, outcome::PassedMethod, head);
            return wants::NOTHING;
        }
        if self.rule.flags & rule_flags::ALL_NAMES != 0 || head.said & said::HEADERS == 0 {
            self.allowed(head);
            return wants::NOTHING;
        }
        self.rest = head.headers;
        self.position = 0;
        self.offset = 0;
        self.go(phase::NAME_TEXT)
    }

    /// Looks through a word of the next name of the requested headers: up to a comma, without blanks.
    #[inline(always)]
    fn name_text(&mut self, bytes: &Buffer) -> u32 {
        let Span { at, end } = self.rest;
        let offset = self.offset;
        let word = word(bytes, at + offset);
        let stops = (equal(word, b',') | equal(word, b' ')) & first(end - at - offset);
        let mut length = end - at;
        if stops != 0 {
            length = offset + lowest(stops);
        } else if at + offset + 8 < end {
            self.offset = offset + 8;
            // Longer than any in the table.
            return if offset > MAX_TEXT { self.ask(ask::Names) } else { wants::STEP };
        }
        // An empty one, also behind a comma at the end, is tolerated by workers, as are blanks.
        let is_last = at + length == end;
        let comma = byte(bytes, at + length) == b',' && at + length + 1 != end;
        if length == 0 || length > MAX_TEXT || (!is_last && !comma) {
            return self.ask(ask::Names);
        }
        self.phase = phase::NAME;
        self.rest.at = at + length;
        self.look_up(term::NAME, self.rule.names, at, length)
    }

    /// Takes a word of the question: its target, method, origin, requested headers and host, one after the other.
    #[inline(always)]
    fn question(&mut self, bytes: &Buffer, head: &Head) -> u32 {
        let Span { at, end } = self.rest;
        let length = end.wrapping_sub(at);
        if self.offset < length {
            let there = (first(length - self.offset) >> 7).wrapping_mul(0xff);
            self.dots = mixed(self.dots, word(bytes, at + self.offset) & there);
            self.offset += 8;
            return wants::STEP;
        }
        self.dots = mixed(self.dots, u64::from(length));
        self.offset = 0;
        self.position += 1;
        self.rest = match self.position {
            1 => head.method,
            2 => head.origin,
            3 => head.headers,
            4 => head.host,
            _ => {
                self.phase = phase::LEARNED;
                return self.look_up(term::LEARNED, self.paths, TARGET, 0);
            }
        };
        wants::STEP
    }

    #[inline(always)]
    fn allowed(&mut self, head: &Head) {
        self.verdict = verdict::ANSWER;
        self.outcome = outcome::Allowed;
        self.template = self.rule.allowed + u32::from(head.said & said::CLOSE != 0);
    }

    #[inline(always)]
    fn refused(&mut self, answered: u32, passed: u32, head: &Head) {
        if self.rule.flags & rule_flags::DENIED_PASS != 0 {
            self.verdict = verdict::PROXY;
            self.outcome = passed;
        } else if self.rule.flags & rule_flags::DENIED_ASK != 0 {
            self.ask(ask::Rules);
        } else {
            self.verdict = verdict::ANSWER;
            self.outcome = answered;
            self.template = self.rule.denied + u32::from(head.said & said::CLOSE != 0);
        }
    }
}

#[inline(always)]
fn mixed(hash: u64, word: u64) -> u64 {
    let product = (hash ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    product ^ (product >> 32)
}

/// The hash of a question, as [`term::LEARNED`] has it. Not keyed: who finds two questions with the same hash has a worker
/// look at the second one in vain.
pub fn question(
    listener: u32,
    target: &[u8],
    method: &[u8],
    origin: &[u8],
    headers: &[u8],
    host: &[u8],
) -> u64 {
    let mut hash = u64::from(listener);
    for part in [target, method, origin, headers, host] {
        for chunk in part.chunks(8) {
            let mut bytes = [0; 8];
            bytes[..chunk.len()].copy_from_slice(chunk);
            hash = mixed(hash, u64::from_le_bytes(bytes));
        }
        hash = mixed(hash, part.len() as u64);
    }
    hash
}

/// Decides, where a plain loop and any look-up will do.
pub fn decide(
    generation: u32,
    listener: u32,
    buffer: &Buffer,
    head: &Head,
    mut look_up: impl FnMut(&Term) -> Option<Value>,
) -> Decide {
    let mut decide = Decide::default();
    decide.begin(generation, listener, head);
    let mut steps = 0;
    while decide.verdict == verdict::OPEN && steps < MAX_STEPS {
        if decide.prepare(buffer, head) == wants::LOOK_UP {
            let found = look_up(&decide.key);
            decide.take(buffer, head, found.as_ref());
        }
        steps += 1;
    }
    decide
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_have_bits() {
        let bit = |text: &str| {
            let mut padded = [0; 8];
            padded[..text.len()].copy_from_slice(text.as_bytes());
            method_bit(u64::from_le_bytes(padded), text.len() as u32)
        };
        let bits = ["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"].map(bit);
        assert_eq!(bits, [1, 2, 4, 8, 16, 32, 64]);
        for other in ["", "get", "GE", "GETS", "HEADS", "PURGE", "CONNECT"] {
            assert_eq!(bit(other), 0, "{other}");
        }
    }
}
