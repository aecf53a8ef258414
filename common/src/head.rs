//! The head of a request, as strictly as a worker reads it and more: what a preflight that the program may answer says.
//!
//! A worker is the judge of everything that is refused here. What is taken here, a worker takes too, and reads alike.

use crate::{
    abi::ask,
    words::{
        Buffer, LOWER, bits, byte, count, equal, first, front, lowest, name_end, path_bytes, strange, word,
    },
};

/// Longer paths than this are known only by their length.
const MARKED: u32 = 64;
/// Request line, 64 lines of headers, empty line: as many as a worker takes.
const MAX_LINES: u32 = 66;
/// Words of a header's name, colon included.
const NAME_WORDS: u32 = 8;
/// Where the target of `OPTIONS /` begins.
pub const TARGET: u32 = 8;
/// So many steps suffice for a head that fills a segment of [`crate::words::LOOKED_AT`]: one for each word of the target,
/// for each line, and for each time that words are looked through.
pub const MAX_STEPS: u32 = 512;

/// What the lines of a head said.
pub mod said {
    /// `Host`.
    pub const HOST: u32 = 1;
    /// `Origin`.
    pub const ORIGIN: u32 = 2;
    /// `Access-Control-Request-Method`.
    pub const METHOD: u32 = 4;
    /// `Access-Control-Request-Headers`.
    pub const HEADERS: u32 = 8;
    /// `Connection`.
    pub const CONNECTION: u32 = 16;
    /// `Connection: close`.
    pub const CLOSE: u32 = 32;
    /// The empty line at the end.
    pub const END: u32 = 64;
}

/// A part of the buffer.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Span {
    /// Where it begins.
    pub at: u32,
    /// Where it ends.
    pub end: u32,
}

/// Reads a head, a step for each line and for each few words: loops are the caller's, as eBPF has its own.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Head {
    /// Line feeds of the present word that were not looked at yet.
    feeds: u64,
    /// A bit for each slash among the first 64 bytes of the path.
    pub slashes: u64,
    /// The byte before the present word of the path is a slash.
    after_slash: u64,
    /// Where the next word begins.
    at: u32,
    /// Bytes of the segment.
    len: u32,
    /// Where the present line begins.
    line: u32,
    /// Lines so far, and carriage returns.
    lines: u32,
    returns: u32,
    /// The part of the target that was not looked at yet.
    target: Span,
    /// Where the path ends; 0: not known yet.
    pub path_end: u32,
    /// Of [`said`].
    pub said: u32,
    /// Why it is not the program's to answer, of [`ask`]; 0: so far it may be.
    pub why: u32,
    /// The value of `Host`.
    pub host: Span,
    /// The value of `Origin`.
    pub origin: Span,
    /// The value of `Access-Control-Request-Method`.
    pub method: Span,
    /// The value of `Access-Control-Request-Headers`.
    pub headers: Span,
    /// Keeps the size a multiple of eight.
    zero: u32,
}

/// Puts blanks behind the `len` bytes that count, so that what an earlier head left there says nothing.
#[inline(always)]
pub fn seal(bytes: &mut Buffer, len: u32) {
    let at = (len & 2047) as usize;
    let mut i = 0;
    while i < 8 {
        bytes[at + i] = b' ';
        i += 1;
    }
}

impl Head {
    /// Begins with the first `len` bytes of a buffer that is [`seal`]ed there. In place: for eBPF's stack it is large.
    #[inline(always)]
    pub fn begin(&mut self, len: u32) {
        *self = Self::default();
        self.len = len;
    }

    /// Where the target is, once no step is left.
    #[inline(always)]
    pub fn target(&self) -> Span {
        Span { at: TARGET, end: self.target.end }
    }

    /// Whether all that a preflight must say was said, once no step is left.
    #[inline(always)]
    pub fn is_preflight(&mut self) -> bool {
        const ALL: u32 = said::HOST | said::ORIGIN | said::METHOD | said::END;
        if self.why == 0 && self.said & ALL != ALL {
            self.why = ask::NoPreflight;
        }
        self.why == 0
    }

    /// Takes the next word of the target, or looks through words for the end of a line and takes that; false: nothing further
    /// matters.
    #[inline(always)]
    pub fn step(&mut self, bytes: &Buffer) -> bool {
        if self.target.at < self.target.end {
            self.take_target(bytes);
            return self.why == 0;
        }
        let mut words = 0;
        while self.feeds == 0 {
            if words == 4 {
                return true;
            }
            let at = self.at;
            if at >= self.len {
                self.why = ask::Incomplete;
                return false;
            }
            let word = word(bytes, at);
            self.at = at + 8;
            let odd = strange(word);
            if odd != 0 {
                let (feeds, returns) = (equal(word, b'\n'), equal(word, b'\r'));
                if odd & !(feeds | returns) != 0 {
                    self.why = ask::Bytes;
                    return false;
                }
                self.returns += count(returns);
                self.feeds = feeds;
            }
            words += 1;
        }
        self.take_line(bytes)
    }

    /// Eight bytes of the target, or what is left of it: origin-form, with a path that every proxy normalises to itself.
    #[inline(always)]
    fn take_target(&mut self, bytes: &Buffer) {
        let at = self.target.at;
        let word = word(bytes, at);
        let valid = first(self.target.end - at);
        self.target.at = at + 8;
        let mut query = valid;
        if self.path_end == 0 {
            let questions = equal(word, b'?') & valid;
            let mut path = valid;
            if questions != 0 {
                let question = lowest(questions);
                path = first(question);
                self.path_end = at + question;
            } else if at + 8 >= self.target.end {
                self.path_end = self.target.end;
            }
            query = valid & !path;
            let slashes = equal(word, b'/') & path;
            let dots = equal(word, b'.') & path;
            // An empty segment, or one that begins with a dot and may be one of the special ones.
            let behind_slash = slashes << 8 | self.after_slash;
            if path_bytes(word) & path != path || behind_slash & (slashes | dots) != 0 {
                self.why = ask::Target;
            }
            self.after_slash = slashes >> 56;
            if at - TARGET < MARKED {
                self.slashes |= bits(slashes) << (at - TARGET);
            }
        }
        if (equal(word, b' ') | equal(word, b'#')) & query != 0 {
            self.why = ask::Target;
        }
    }

    /// A line is complete.
    #[inline(always)]
    fn take_line(&mut self, bytes: &Buffer) -> bool {
        let feed = self.at - 8 + lowest(self.feeds);
        self.feeds &= self.feeds - 1;
        let start = self.line;
        self.line = feed + 1;
        self.lines += 1;
        if byte(bytes, feed.wrapping_sub(1)) != b'\r' {
            self.why = ask::Bytes;
            return false;
        }
        if self.lines > MAX_LINES {
            self.why = ask::Lines;
            return false;
        }
        let end = feed - 1;
        if start == 0 {
            self.request_line(bytes, end);
        } else if start == end {
            if feed + 1 != self.len {
                self.why = ask::Behind;
            } else if self.returns != self.lines {
                self.why = ask::Bytes;
            }
            self.said |= said::END;
            return false;
        } else {
            self.header(bytes, start, end);
        }
        self.why == 0
    }

    /// `OPTIONS /… HTTP/1.1`, which begins so: the caller has seen the method.
    #[inline(always)]
    fn request_line(&mut self, bytes: &Buffer, end: u32) {
        if end < 18 || word(bytes, end - 8) != front(b"HTTP/1.1") || byte(bytes, end - 9) != b' ' {
            self.why = ask::Version;
        } else if byte(bytes, TARGET) != b'/' {
            self.why = ask::Target;
        } else {
            self.target = Span { at: TARGET, end: end - 9 };
        }
    }

    /// `name: value`. The names that matter are compared with their colon; no byte of another line can look like a part of
    /// them, since a line feed stays none when it is made lower-case.
    #[inline(always)]
    fn header(&mut self, bytes: &Buffer, start: u32, end: u32) {
        let name = word(bytes, start) | LOWER;
        match (name & 0xff) as u8 {
            b'a' => {
                if name == front(b"access-c") && (word(bytes, start + 8) | LOWER) == front(b"ontrol-r") {
                    return self.access_control_request(bytes, start, end);
                }
                self.refuse_if(name == front(b"authoriz"));
            }
            b'c' => {
                let second = word(bytes, start + 8) | LOWER;
                if name == front(b"connecti") && second << 40 == front(b"\0\0\0\0\0on:") {
                    return self.connection(bytes, start + 11, end);
                }
                let length = name == front(b"content-") && second & 0xff == u64::from(b'l');
                self.refuse_if(length || name << 8 == front(b"\0cookie:"));
            }
            b'e' => self.refuse_if(name << 8 == front(b"\0expect:")),
            b'h' => {
                if name << 24 == front(b"\0\0\0host:") {
                    let host = self.value(bytes, start + 5, end, said::HOST);
                    self.host = host;
                    return;
                }
                self.refuse_if(name == front(b"http2-se"));
            }
            b'k' => self.refuse_if(name == front(b"keep-ali")),
            b'm' => self.refuse_if(name == front(b"max-forw")),
            b'o' if name << 8 == front(b"\0origin:") => {
                let origin = self.value(bytes, start + 7, end, said::ORIGIN);
                self.origin = origin;
                return;
            }
            b'p' => self.refuse_if(name == front(b"proxy-au") || name == front(b"proxy-co")),
            b't' => {
                let te = name << 40 == front(b"\0\0\0\0\0te:");
                self.refuse_if(te || name == front(b"transfer") || name == front(b"trailer:"));
            }
            b'u' => self.refuse_if(name == front(b"upgrade:")),
            b'x' => {
                let claims = name == front(b"x-http-m") || name == front(b"x-method");
                self.refuse_if(claims || name == front(b"x-origin") || name == front(b"x-rewrit"));
            }
            _ => {}
        }
        let mut at = start;
        let mut words = 0;
        while words < NAME_WORDS {
            let (end, colon) = name_end(word(bytes, at));
            if end != 0 {
                if !colon || (words == 0 && end == 0x80) {
                    self.why = ask::Name;
                }
                return;
            }
            at += 8;
            words += 1;
        }
        self.why = ask::Name;
    }

    #[inline(always)]
    fn refuse_if(&mut self, special: bool) {
        if special {
            self.why = ask::Header;
        }
    }

    /// `Access-Control-R…`.
    #[inline(always)]
    fn access_control_request(&mut self, bytes: &Buffer, start: u32, end: u32) {
        let third = word(bytes, start + 16) | LOWER;
        let fourth = word(bytes, start + 24) | LOWER;
        if third == front(b"equest-m") && fourth << 16 == front(b"\0\0ethod:") {
            let method = self.value(bytes, start + 30, end, said::METHOD);
            self.method = method;
        } else if third == front(b"equest-h") && fourth << 8 == front(b"\0eaders:") {
            let headers = self.value(bytes, start + 31, end, said::HEADERS);
            self.headers = headers;
        } else {
            self.why = ask::Header;
        }
    }

    /// One `keep-alive` or `close` and nothing else.
    #[inline(always)]
    fn connection(&mut self, bytes: &Buffer, at: u32, end: u32) {
        let value = self.value(bytes, at, end, said::CONNECTION);
        let length = value.end.wrapping_sub(value.at);
        let word_one = word(bytes, value.at) | LOWER;
        let word_two = word(bytes, value.at + 8) | LOWER;
        if length == 10 && word_one == front(b"keep-ali") && word_two << 48 == front(b"\0\0\0\0\0\0ve") {
            return;
        }
        if length == 5 && word_one << 24 == front(b"\0\0\0close") {
            self.said |= said::CLOSE;
            return;
        }
        self.why = ask::Header;
    }

    /// The value from `at` to `end`, without one blank before it. It is not empty, and neither begins nor ends with a blank.
    #[inline(always)]
    fn value(&mut self, bytes: &Buffer, at: u32, end: u32, what: u32) -> Span {
        if self.said & what != 0 {
            self.why = ask::Repeated;
        }
        self.said |= what;
        let at = if byte(bytes, at) == b' ' { at + 1 } else { at };
        if at >= end || byte(bytes, at) == b' ' || byte(bytes, end - 1) == b' ' {
            self.why = ask::Value;
        }
        Span { at, end }
    }
}

const _: () = assert!(size_of::<Head>().is_multiple_of(8));

/// Reads a head, where a plain loop will do: `None` if it is not the program's to answer, with the reason.
///
/// # Errors
/// The reason, of [`ask`].
pub fn read(buffer: &mut Buffer, len: u32) -> Result<Head, u32> {
    if len as usize > crate::words::LOOKED_AT {
        return Err(ask::Segment);
    }
    seal(buffer, len);
    if word(buffer, 0) != u64::from_le_bytes(*crate::preflight::METHOD) {
        return Err(ask::NoPreflight);
    }
    let mut head = Head::default();
    head.begin(len);
    let mut steps = 0;
    while steps < MAX_STEPS && head.step(buffer) {
        steps += 1;
    }
    if head.is_preflight() { Ok(head) } else { Err(head.why) }
}
