//! `Access-Control-Request-Headers`: checked against a list, or validated for an echo, in one bounded pass.

use super::strings::Strings;

/// More bytes than this over all lines are never echoed.
pub(super) const MAX_ECHO: usize = 4096;

/// OWS that is borne before and after one element (RFC 9110 §5.6.1 knows no bound; hostile clients do not either).
const MAX_OWS: usize = 2;
/// Empty elements and lines that are borne over all lines.
const MAX_EMPTY: usize = 16;

/// Up to this many allowed names are merged with the requested ones; among more each is looked up.
const MERGED: usize = 16;

/// Header names that a policy allows.
#[derive(Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Names {
    /// Lower-case, ascending, unique.
    sorted: Strings,
    longest: usize,
}

impl Names {
    pub(super) fn new<T: AsRef<[u8]>>(names: impl IntoIterator<Item = T>) -> Self {
        let mut sorted: Vec<Box<[u8]>> =
            names.into_iter().map(|n| n.as_ref().to_ascii_lowercase().into_boxed_slice()).collect();
        sorted.sort_unstable();
        sorted.dedup();
        let longest = sorted.iter().map(|n| n.len()).max().unwrap_or(0);
        Self { sorted: Strings::new(sorted), longest }
    }

    /// In ascending order.
    pub(super) fn iter(&self) -> impl Iterator<Item = &[u8]> {
        self.sorted.iter()
    }

    /// Whether every requested name is allowed. A browser sends them lower-case, sorted and unique (Fetch
    /// §4.8): so each must stand behind the one before, and nothing is scanned further than the longest allowed name.
    pub(super) fn allow(&self, lines: &[&[u8]]) -> bool {
        let few = self.sorted.len() <= MERGED;
        let mut names = self.sorted.iter();
        let mut from = 0;
        let mut empty = 0;
        for line in lines {
            let mut rest = *line;
            loop {
                let mut ows = MAX_OWS;
                rest = skip_ows(rest, &mut ows);
                if let None | Some(b',') = rest.first() {
                    empty += 1;
                    if empty > MAX_EMPTY {
                        return false;
                    }
                } else {
                    let len = if few {
                        // Both are sorted: each allowed name is looked at once.
                        names
                            .find(|name| rest.starts_with(name) && ends_at(rest, name.len()))
                            .map(<[u8]>::len)
                    } else {
                        let scan = &rest[..rest.len().min(self.longest + 1)];
                        let end = scan.iter().position(|&b| is_separator(b)).unwrap_or(scan.len());
                        let found = self.sorted.find(&rest[..end]).filter(|&at| at >= from);
                        found.map(|at| {
                            from = at + 1;
                            end
                        })
                    };
                    let Some(len) = len else { return false };
                    rest = skip_ows(&rest[len..], &mut ows);
                }
                match rest.split_first() {
                    None => break,
                    Some((b',', more)) => rest = more,
                    Some(_) => return false,
                }
            }
        }
        true
    }
}

/// Whether an element ends at `at`.
fn ends_at(text: &[u8], at: usize) -> bool {
    text.get(at).is_none_or(|&b| is_separator(b))
}

fn is_separator(b: u8) -> bool {
    CLASS[usize::from(b)] == SEPARATOR
}

fn skip_ows<'a>(mut text: &'a [u8], budget: &mut usize) -> &'a [u8] {
    while let [b' ' | b'\t', rest @ ..] = text
        && *budget > 0
    {
        text = rest;
        *budget -= 1;
    }
    text
}

/// What an echo of the lines would be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Echo {
    /// Nothing was asked for.
    Nothing,
    /// Safe to echo.
    Usable {
        /// An element is `authorization`, in whatever case.
        authorization: bool,
    },
    /// Not a list of tokens, or too long.
    Unusable,
}

/// Judges the lines for an echo: token characters, commas and blanks only (RFC 9110 §5.6.2), at most [`MAX_ECHO`] bytes.
pub(super) fn judge(lines: &[&[u8]]) -> Echo {
    let mut total = lines.len();
    let mut bad = 0;
    let mut named = false;
    for line in lines {
        total += line.len();
        if total > MAX_ECHO + 1 {
            return Echo::Unusable;
        }
        for &b in *line {
            let class = CLASS[usize::from(b)];
            bad |= class & BAD;
            named |= class & TOKEN != 0;
        }
    }
    if bad != 0 {
        Echo::Unusable
    } else if named {
        let authorization = lines.iter().any(|line| names_authorization(line));
        Echo::Usable { authorization }
    } else {
        Echo::Nothing
    }
}

fn names_authorization(line: &[u8]) -> bool {
    const NAME: &[u8] = b"authorization";
    line.len() >= NAME.len()
        && line.split(|&b| b == b',').any(|element| element.trim_ascii().eq_ignore_ascii_case(NAME))
}

/// Whether this is a token (RFC 9110 §5.6.2).
pub(crate) fn is_token(text: &[u8]) -> bool {
    !text.is_empty() && text.iter().all(|&b| CLASS[usize::from(b)] & TOKEN != 0)
}

const TOKEN: u8 = 1;
const BAD: u8 = 2;
const SEPARATOR: u8 = 0;
const CLASS: [u8; 256] = {
    let mut table = [BAD; 256];
    let mut b = 0;
    while b < 128 {
        let c = b as u8;
        if c.is_ascii_alphanumeric()
            || matches!(
                c,
                b'!' | b'#'
                    | b'$'
                    | b'%'
                    | b'&'
                    | b'\''
                    | b'*'
                    | b'+'
                    | b'-'
                    | b'.'
                    | b'^'
                    | b'_'
                    | b'`'
                    | b'|'
                    | b'~'
            )
        {
            table[b] = TOKEN;
        } else if matches!(c, b',' | b' ' | b'\t') {
            table[b] = SEPARATOR;
        }
        b += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_case_and_lengths() {
        let few = Names::new(["X-B", "x-a", "x-longer", "x-a"]);
        let others = (0..MERGED).map(|i| format!("x-c{i}"));
        let many = Names::new(others.chain(["X-B", "x-a", "x-longer", "x-a"].map(str::to_owned)));
        for (lines, expected) in [
            (&["x-a,x-b,x-longer"][..], true),
            (&["x-a", "x-b,x-longer"], true),
            (&["x-b"], true),
            (&["x-longer"], true),
            (&["x-long"], false),
            (&[], true),
            (&["", " , x-a ,\t,x-b", ","], true),
            (&["x-a,   x-b"], false),
            (&["   "], false),
            (&["x-b,x-a"], false),
            (&["x-a,x-a"], false),
            (&["x-a", "x-a"], false),
            (&["X-A"], false),
            (&["x-longer-still"], false),
            (&["x-a x-b"], false),
            (&["x-a;x-b"], false),
        ] {
            let lines: Vec<&[u8]> = lines.iter().map(|l| l.as_bytes()).collect();
            assert_eq!(few.allow(&lines), expected, "{lines:?}");
            assert_eq!(many.allow(&lines), expected, "{lines:?}");
        }
    }

    #[test]
    fn echoes() {
        let long = "a".repeat(MAX_ECHO);
        let longer = "a".repeat(MAX_ECHO + 1);
        for (lines, expected) in [
            (&[][..], Echo::Nothing),
            (&["", " ,\t"], Echo::Nothing),
            (&["x-a,x-b"], Echo::Usable { authorization: false }),
            (&["x-a", " Authorization ,x-b"], Echo::Usable { authorization: true }),
            (&["x-authorization"], Echo::Usable { authorization: false }),
            (&[&long], Echo::Usable { authorization: false }),
            (&[&longer], Echo::Unusable),
            (&[&long, ""], Echo::Unusable),
            (&["x-a\r\nx: y"], Echo::Unusable),
            (&["x-a:b"], Echo::Unusable),
            (&["x-\u{e9}"], Echo::Unusable),
            (&["\"x\""], Echo::Unusable),
        ] {
            let lines: Vec<&[u8]> = lines.iter().map(|l| l.as_bytes()).collect();
            assert_eq!(judge(&lines), expected, "{lines:?}");
        }
    }
}
