//! Regular expressions with RE2's meaning, full match, compiled to DFAs at load: matching is one table step per byte
//! and allocates nothing. What RE2 and this compiler read differently is refused, and so is what grows too large.

use regex_automata::{
    Anchored, MatchKind,
    dfa::{Automaton, StartKind, dense},
    nfa::thompson,
    util::{start, syntax},
};
use std::hash::{Hash, Hasher};

/// Longer patterns are refused.
const MAX_PATTERN: usize = 2048;
/// RE2 refuses repetitions beyond this.
const MAX_REPEAT: u32 = 1000;
/// Bytes of the NFA, of the DFA, and of the memory while the DFA is built.
const NFA_LIMIT: usize = 128 << 10;
const DFA_LIMIT: usize = 128 << 10;
const BUILD_LIMIT: usize = 384 << 10;

/// An automaton and the positions of its patterns.
type Group = (Box<[usize]>, dense::DFA<Vec<u32>>);

/// Several patterns that are tried at once.
#[derive(Debug, Default)]
pub(super) struct Regexes {
    groups: Vec<Group>,
    patterns: Box<[Box<str>]>,
}

/// The patterns say it all.
impl PartialEq for Regexes {
    fn eq(&self, other: &Self) -> bool {
        self.patterns == other.patterns
    }
}

impl Eq for Regexes {}

impl Hash for Regexes {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.patterns.hash(state);
    }
}

impl Regexes {
    /// Compiles what can be modelled; the rest is named by its position, with the reason.
    pub(super) fn new(patterns: &[&str]) -> (Self, Vec<(usize, String)>) {
        let mut groups: Vec<Group> = Vec::new();
        let mut refused = Vec::new();
        for (i, pattern) in patterns.iter().enumerate() {
            match check_syntax(pattern).and_then(|()| compile(&[pattern])) {
                Ok(dfa) => groups.push((Box::from([i]), dfa)),
                Err(reason) => refused.push((i, reason)),
            }
        }
        // One automaton for all of them if it stays small: then their number costs nothing.
        let good: Box<[usize]> = groups.iter().flat_map(|(at, _)| at.iter().copied()).collect();
        let together: Vec<&str> = good.iter().map(|&i| patterns[i]).collect();
        if together.len() > 1
            && let Ok(dfa) = compile(&together)
        {
            groups = vec![(good, dfa)];
        }
        (Self { groups, patterns: patterns.iter().map(|&p| p.into()).collect() }, refused)
    }

    /// None at all.
    pub(super) fn is_empty(&self) -> bool {
        self.patterns.is_empty()
    }

    /// Whether any pattern matches the whole of `text`.
    pub(super) fn is_match(&self, text: &[u8]) -> bool {
        self.groups.iter().any(|(_, dfa)| run(dfa, text).is_some())
    }

    /// Calls `found` with the position of every pattern that matches the whole of `text`.
    pub(super) fn each_match(&self, text: &[u8], mut found: impl FnMut(usize)) {
        for (positions, dfa) in &self.groups {
            if let Some(state) = run(dfa, text) {
                for i in 0..dfa.match_len(state) {
                    found(positions[dfa.match_pattern(state, i).as_usize()]);
                }
            }
        }
    }
}

/// The state after the last byte, if it is a match.
fn run(dfa: &dense::DFA<Vec<u32>>, text: &[u8]) -> Option<regex_automata::util::primitives::StateID> {
    let mut state = dfa.start_state(&start::Config::new().anchored(Anchored::Yes)).ok()?;
    for &byte in text {
        state = dfa.next_state(state, byte);
        if dfa.is_special_state(state) && (dfa.is_dead_state(state) || dfa.is_quit_state(state)) {
            return None;
        }
    }
    state = dfa.next_eoi_state(state);
    dfa.is_match_state(state).then_some(state)
}

fn compile(patterns: &[&str]) -> Result<dense::DFA<Vec<u32>>, String> {
    dense::Builder::new()
        // `All` rather than leftmost-first: of `a|ab` both must still be alive after the `a`.
        .configure(
            dense::Config::new()
                .start_kind(StartKind::Anchored)
                .match_kind(MatchKind::All)
                .accelerate(false)
                .dfa_size_limit(Some(DFA_LIMIT))
                .determinize_size_limit(Some(BUILD_LIMIT)),
        )
        .thompson(thompson::Config::new().utf8(false).nfa_size_limit(Some(NFA_LIMIT)))
        .syntax(syntax::Config::new().unicode(false).utf8(false).nest_limit(50))
        .build_many(patterns)
        .map_err(|error| {
            if error.is_size_limit_exceeded() {
                "it needs too large an automaton".to_owned()
            } else {
                use std::error::Error;
                error.source().map_or_else(|| error.to_string(), ToString::to_string)
            }
        })
}

/// Refuses what RE2 does not know or reads otherwise; what is left means the same on ASCII text in both.
fn check_syntax(pattern: &str) -> Result<(), String> {
    if pattern.len() > MAX_PATTERN {
        return Err(format!("it is longer than {MAX_PATTERN} bytes"));
    }
    if !pattern.is_ascii() {
        return Err("it has characters outside ASCII".to_owned());
    }
    let p = pattern.as_bytes();
    let mut i = 0;
    let mut class = false;
    while i < p.len() {
        let rest = &p[i..];
        match rest[0] {
            b'\\' => {
                match rest.get(1) {
                    None => return Err("it ends in a backslash".to_owned()),
                    Some(b'<' | b'>') => return Err("`\\<` and `\\>` mean different things".to_owned()),
                    // In RE2 `\b` in a class is an error, here a backspace.
                    Some(b'b') if class => return Err("`\\b` in a class".to_owned()),
                    Some(b'b') if rest.get(2) == Some(&b'{') => return Err("`\\b{` is not RE2".to_owned()),
                    Some(c) if c.is_ascii_alphanumeric() && !b"dDsSwWbBAzaftnrvx".contains(c) => {
                        return Err(format!("`\\{}` is not supported", char::from(*c)));
                    }
                    Some(_) => {}
                }
                i += 2;
                continue;
            }
            b'[' if !class => {
                class = true;
                i += 1;
                // `]` right after `[` or `[^` is itself.
                if p.get(i) == Some(&b'^') {
                    i += 1;
                }
                if p.get(i) == Some(&b']') {
                    i += 1;
                }
                continue;
            }
            b']' if class => class = false,
            b'[' if rest.get(1) == Some(&b':') => {
                let end = pattern[i..].find(":]").ok_or("a class name does not end")?;
                i += end + 2;
                continue;
            }
            b'[' => return Err("`[` inside a class; write `\\[`".to_owned()),
            c @ (b'&' | b'-' | b'~') if class && rest.get(1) == Some(&c) => {
                return Err(format!("`{0}{0}` inside a class", char::from(c)));
            }
            b'(' if !class && rest.get(1) == Some(&b'?') => check_group(&rest[2..])?,
            b'{' if !class => {
                let end = rest.iter().position(|&c| c == b'}').ok_or("`{` without `}`; write `\\{`")?;
                check_repeat(&rest[1..end])?;
            }
            // A `}` of a repetition ends here too; a lone one is itself in both.
            _ => {}
        }
        i += 1;
    }
    if class { Err("`[` without `]`".to_owned()) } else { Ok(()) }
}

/// What may follow `(?`.
fn check_group(rest: &[u8]) -> Result<(), String> {
    let named = rest.starts_with(b"P<") || rest.first() == Some(&b'<');
    let flags = rest.iter().position(|c| !b"imsU-".contains(c)).and_then(|n| rest.get(n));
    if named || matches!(flags, Some(b':' | b')')) {
        Ok(())
    } else {
        Err("a group beginning with `(?` that RE2 does not have".to_owned())
    }
}

/// `n`, `n,` or `n,m` between the braces, as RE2 has it.
fn check_repeat(inner: &[u8]) -> Result<(), String> {
    let text = String::from_utf8_lossy(inner);
    let (low, high) = text.split_once(',').unwrap_or((&text, ""));
    let number = |s: &str| !s.is_empty() && s.len() <= 4 && s.bytes().all(|b| b.is_ascii_digit());
    if !number(low) || !(high.is_empty() || number(high)) {
        return Err(format!("`{{{text}}}` is not a repetition; write `\\{{`"));
    }
    for n in [low, high] {
        if n.parse::<u32>().is_ok_and(|n| n > MAX_REPEAT) {
            return Err(format!("more than {MAX_REPEAT} repetitions"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_match() {
        for (pattern, yes, no) in [
            (".*", &["", "abc"][..], &["a\nb"][..]),
            ("a|ab", &["a", "ab"], &["", "abc", "xa"]),
            ("ab?", &["a", "ab"], &["abb"]),
            (
                r".*\.envoyproxy\.io",
                &["www.envoyproxy.io", ".envoyproxy.io"],
                &["www.envoyproxy.io.evil", "xenvoyproxyio"],
            ),
            (
                r"https://[a-z]+\.example\.com(:\d+)?",
                &["https://a.example.com", "https://a.example.com:80"],
                &["https://.example.com", "https://a.example.com:"],
            ),
            ("(?i)https://A", &["HTTPS://a"], &["https://b"]),
            ("^a$", &["a"], &["aa", "a\n"]),
            ("[]a]+", &["]a]"], &["b"]),
            ("[^]a]", &["b"], &["]"]),
            ("[[:alpha:]]+", &["abC"], &["1"]),
            ("a{2,3}", &["aa", "aaa"], &["a", "aaaa"]),
            (r"\/a\-b", &["/a-b"], &[]),
        ] {
            let (regex, refused) = Regexes::new(&[pattern]);
            assert_eq!(refused, [], "{pattern}");
            for text in yes {
                assert!(regex.is_match(text.as_bytes()), "{pattern} on {text}");
            }
            for text in no {
                assert!(!regex.is_match(text.as_bytes()), "{pattern} on {text}");
            }
        }
    }

    #[test]
    fn refuses_what_differs_from_re2_or_is_too_large() {
        for pattern in [
            "(?=a)",
            "(?P=a)",
            r"\1",
            r"\pL",
            r"\Qa\E",
            r"\C",
            "[a&&b]",
            "[[a]b]",
            "[a--b]",
            "(?x)a",
            "(?u)a",
            "a{,3}",
            "a{1001}",
            "a{b}",
            "a{",
            r"\b{start}",
            r"[\b]",
            r"\<a",
            "(",
            "[a",
            "é",
            r"a\",
            "(((a{100}){100}){100})",
            "(.*a.{20}b.*){5}",
        ] {
            let (regexes, refused) = Regexes::new(&["a", pattern]);
            assert_eq!(refused.iter().map(|(i, _)| *i).collect::<Vec<_>>(), [1], "{pattern}");
            assert!(regexes.is_match(b"a") && !regexes.is_match(b"b"), "{pattern}");
        }
        assert_eq!(Regexes::new(&[&"a".repeat(MAX_PATTERN + 1)]).1.len(), 1);
    }

    #[test]
    fn tells_every_match() {
        for (patterns, groups) in [
            (vec!["x.*".to_owned(), "(".to_owned(), ".*y".to_owned(), "z".to_owned()], 1),
            // Too large together.
            (vec!["x[a-f]{900}.*y".into(), "(".into(), "x[g-y]{0,900}.*".into(), "z[a-f]{900}".into()], 3),
        ] {
            let refs: Vec<&str> = patterns.iter().map(String::as_str).collect();
            let (regexes, refused) = Regexes::new(&refs);
            assert_eq!((regexes.groups.len(), refused.len()), (groups, 1), "{patterns:?}");
            let mut found = Vec::new();
            regexes.each_match(format!("x{}y", "a".repeat(900)).as_bytes(), |i| found.push(i));
            found.sort_unstable();
            assert_eq!(found, [0, 2], "{patterns:?}");
        }
    }
}
