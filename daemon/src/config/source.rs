//! A file's text: from byte offsets and key paths to lines, and from TOML to shapes with every error, not just the
//! first.

use super::diagnostic::{Diagnostic, Excerpt};
use crate::policy::Severity;
use serde::Deserialize;
use std::{borrow::Cow, ops::Range, sync::Arc};
use toml::{
    Spanned,
    de::{DeArray, DeTable, DeValue, ValueDeserializer},
};

/// More errors than this within one table are not looked for.
const MAX_SHAPE_ERRORS: usize = 50;
/// More findings than this in one file are counted only.
const MAX_FINDINGS: usize = 500;
/// More names than this are not searched for a similar one.
const MAX_SUGGESTIONS: usize = 1000;

/// One file's text.
#[derive(Clone, Debug)]
pub(super) struct Source {
    /// As it was named.
    pub(super) name: Arc<str>,
    text: Arc<str>,
    /// Offsets at which lines begin.
    lines: Vec<usize>,
}

/// Where in a file.
#[derive(Clone, Debug)]
pub(super) enum At {
    /// These bytes.
    Span(Range<usize>),
    /// The value at this path, or the deepest part of the path that exists.
    Path(Vec<Step>),
}

/// One step of a path.
#[derive(Clone, Debug)]
pub(super) enum Step {
    /// Into a table; a key with a prefix that ends in `/` is found by its last part too.
    Key(Cow<'static, str>),
    /// Into a table if the key is there, else no step.
    Maybe(&'static str),
    /// Into an array.
    Item(usize),
}

/// A finding whose line is not known yet.
#[derive(Clone, Debug)]
pub(super) struct Problem {
    pub(super) severity: Severity,
    pub(super) code: &'static str,
    pub(super) at: At,
    pub(super) message: String,
    pub(super) help: String,
}

impl Problem {
    pub(super) fn error(
        code: &'static str,
        at: At,
        message: impl Into<String>,
        help: impl Into<String>,
    ) -> Self {
        Self { severity: Severity::Error, code, at, message: message.into(), help: help.into() }
    }

    pub(super) fn warning(
        code: &'static str,
        at: At,
        message: impl Into<String>,
        help: impl Into<String>,
    ) -> Self {
        Self { severity: Severity::Warning, code, at, message: message.into(), help: help.into() }
    }
}

impl Source {
    pub(super) fn new(name: &str, text: impl Into<Arc<str>>) -> Self {
        let text = text.into();
        let lines = std::iter::once(0).chain(memchr::memchr_iter(b'\n', text.as_bytes()).map(|i| i + 1));
        Self { name: name.into(), lines: lines.collect(), text }
    }

    /// Line from 1 of a byte offset.
    pub(super) fn line(&self, offset: usize) -> u32 {
        self.lines.partition_point(|start| *start <= offset) as u32
    }

    /// Finds the places of problems; the text is parsed once, and only if a path is among them.
    pub(super) fn diagnostics(&self, mut problems: Vec<Problem>) -> Vec<Diagnostic> {
        let beyond = problems.split_off(problems.len().min(MAX_FINDINGS));
        if let Some(severity) = beyond.iter().map(|p| p.severity).max() {
            problems.push(Problem {
                severity,
                code: "too-many-findings",
                at: At::Span(self.text.len()..self.text.len()),
                message: format!("{} further findings are not shown", beyond.len()),
                help: "correct the others first".to_owned(),
            });
        }
        let by_path = problems.iter().any(|p| matches!(p.at, At::Path(_)));
        let root = by_path.then(|| DeTable::parse_recoverable(&self.text).0);
        problems
            .into_iter()
            .map(|p| {
                let span = match (&p.at, &root) {
                    (At::Span(span), _) => span.clone(),
                    (At::Path(path), Some(root)) => find(root.get_ref(), path),
                    (At::Path(_), None) => 0..0,
                };
                self.diagnostic(p, &span)
            })
            .collect()
    }

    fn diagnostic(&self, problem: Problem, span: &Range<usize>) -> Diagnostic {
        let start = floor(&self.text, span.start);
        let line = self.line(start).max(1);
        let begin = self.lines[line as usize - 1];
        let next = self.lines.get(line as usize).copied().unwrap_or(self.text.len());
        let text = self.text[begin..next].trim_end_matches(['\n', '\r']);
        let start_in_line = (start - begin).min(text.len());
        let end_in_line = floor(&self.text, span.end).saturating_sub(begin).clamp(start_in_line, text.len());
        Diagnostic {
            field: String::new(),
            severity: problem.severity,
            code: problem.code,
            file: self.name.clone(),
            line,
            column: text[..start_in_line].chars().count() as u32 + 1,
            message: problem.message,
            help: problem.help,
            excerpt: Some(Excerpt::new(text, start_in_line, end_in_line)),
        }
    }

    /// The text as a `T`. `problems` gets every syntax error, or else nothing here: shape errors are for
    /// [`Source::tables`] and [`shape`], which can go on after one.
    pub(super) fn root(&self, problems: &mut Vec<Problem>) -> Option<DeTable<'_>> {
        let (root, errors) = DeTable::parse_recoverable(&self.text);
        if errors.is_empty() {
            return Some(root.into_inner());
        }
        // One slip makes the recovering parser stumble over the rest of the line: one error a line is enough.
        let mut last = 0;
        for error in errors {
            let span = error.span().unwrap_or(0..0);
            let line = self.line(span.start);
            if line != last && problems.len() < MAX_SHAPE_ERRORS {
                last = line;
                let message = format!("not valid TOML: {}", error.message());
                problems.push(Problem::error("syntax", At::Span(span), message, ""));
            }
        }
        None
    }
}

/// Reads a table as a `T`. Each part that does not fit becomes a problem and is left out, then the rest is read, so
/// that one run finds all of them. `T` must read an empty table. The flag says whether all of it fitted.
pub(super) fn shape<'de, T: Deserialize<'de> + Default>(
    mut table: DeTable<'de>,
    span: &Range<usize>,
    problems: &mut Vec<Problem>,
) -> (T, bool) {
    let before = problems.len();
    for _ in 0..MAX_SHAPE_ERRORS {
        // The copy is what the next round goes on with if this one finds an error. It borrows the text.
        let whole = Spanned::new(span.clone(), DeValue::Table(table.clone()));
        let error = match T::deserialize(ValueDeserializer::from(whole)) {
            Ok(value) => return (value, problems.len() == before),
            Err(error) => error,
        };
        let at = error.span().unwrap_or_else(|| span.clone());
        problems.push(reword(error.message(), at.clone()));
        if !remove(&mut table, &at) {
            break;
        }
    }
    (T::default(), false)
}

/// Takes an array of tables out of a table, so that each can be read by itself. An entry of another type is left in
/// place for [`shape`] to complain of.
pub(super) fn take_tables<'de>(
    table: &mut DeTable<'de>,
    key: &str,
) -> Option<Vec<(Range<usize>, DeTable<'de>)>> {
    let all_tables = |a: &DeArray<'_>| a.iter().all(|v| v.get_ref().is_table());
    if !matches!(table.get(key)?.get_ref(), DeValue::Array(a) if all_tables(a)) {
        return None;
    }
    let DeValue::Array(array) = table.remove(key)?.into_inner() else { return None };
    let tables = array.into_iter().filter_map(|v| {
        let span = v.span();
        match v.into_inner() {
            DeValue::Table(table) => Some((span, table)),
            _ => None,
        }
    });
    Some(tables.collect())
}

/// Serde's words in ours, with a remedy where one is known. A message of our own holds its help after a line feed.
fn reword(message: &str, span: Range<usize>) -> Problem {
    let at = At::Span(span);
    if let Some((message, help)) = message.split_once('\n') {
        return Problem::error("invalid-value", at, message, help);
    }
    let words =
        |text: &str| -> Vec<String> { text.split('`').skip(1).step_by(2).map(ToOwned::to_owned).collect() };
    if message.starts_with("unknown field") || message.starts_with("unknown variant") {
        let words = words(message);
        let (given, known) = words.split_first().map_or(("", &[][..]), |(g, k)| (g.as_str(), k));
        let (code, what) = if message.starts_with("unknown field") {
            ("unknown-key", "key")
        } else {
            ("invalid-value", "value")
        };
        let help = match did_you_mean(given, known.iter().map(String::as_str)) {
            Some(name) => format!("did you mean `{name}`?"),
            None => format!("known here: {}", known.join(", ")),
        };
        return Problem::error(code, at, format!("unknown {what} `{given}`"), help);
    }
    let mut text = message.to_owned();
    for (rust, plain) in [
        ("expected u16", "expected a whole number from 0 to 65535"),
        ("expected u32", "expected a whole number from 0 to 4294967295"),
        ("expected usize", "expected a whole number from 0"),
        ("expected i32", "expected a whole number of 32 bits"),
        ("expected i64", "expected a whole number"),
        ("a sequence", "a list"),
        ("sequence", "list"),
        ("map", "table"),
    ] {
        text = text.replace(rust, plain);
    }
    if let Some(known) = text.find("expected struct ") {
        text.truncate(known);
        text.push_str("expected a table");
    }
    let code = if text.starts_with("invalid type") { "wrong-type" } else { "invalid-value" };
    Problem::error(code, at, text, "")
}

/// The known name most like the given one, if any is near.
pub(super) fn did_you_mean<'a>(given: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let given: String = given.chars().take(64).collect::<String>().to_ascii_lowercase().replace('-', "_");
    known
        .take(MAX_SUGGESTIONS)
        .map(|name| (strsim::damerau_levenshtein(&given, &name.to_ascii_lowercase().replace('-', "_")), name))
        .filter(|(distance, name)| *distance <= 1 + name.len() / 4)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, name)| name)
}

/// Removes the innermost entry whose key or value has this span.
fn remove(table: &mut DeTable<'_>, span: &Range<usize>) -> bool {
    if table.iter_mut().any(|(_, value)| remove_within(value.get_mut(), span)) {
        return true;
    }
    let found = table.iter().find(|(k, v)| k.span() == *span || v.span() == *span);
    let Some(key) = found.map(|(k, _)| k.get_ref().clone()) else { return false };
    table.remove(&*key).is_some()
}

fn remove_within(value: &mut DeValue<'_>, span: &Range<usize>) -> bool {
    match value {
        DeValue::Table(table) => remove(table, span),
        DeValue::Array(array) => {
            if array.iter_mut().any(|item| remove_within(item.get_mut(), span)) {
                return true;
            }
            let before = array.len();
            let old = std::mem::replace(array, DeArray::new());
            for item in old.into_iter().filter(|item| item.span() != *span) {
                array.push(item);
            }
            array.len() < before
        }
        _ => false,
    }
}

/// The span of the deepest part of the path that exists.
fn find(root: &DeTable<'_>, path: &[Step]) -> Range<usize> {
    let mut span = 0..0;
    let mut value: Option<&DeValue<'_>> = None;
    for step in path {
        let table = value.map_or(Some(root), |v| v.as_table());
        let next = match step {
            Step::Key(key) => table.and_then(|t| t.get(&**key).or_else(|| by_last_part(t, key))),
            Step::Maybe(key) => match table.and_then(|t| t.get(*key)) {
                Some(next) => Some(next),
                None => continue,
            },
            Step::Item(i) => value.and_then(|v| v.as_array()).and_then(|a| a.get(*i)),
        };
        let Some(next) = next else { break };
        span = next.span();
        value = Some(next.get_ref());
    }
    span
}

fn by_last_part<'t, 'i>(table: &'t DeTable<'i>, key: &str) -> Option<&'t Spanned<DeValue<'i>>> {
    table.iter().find(|(k, _)| k.get_ref().rsplit('/').next() == Some(key)).map(|(_, v)| v)
}

/// The offset, or the start of the character that it points into.
fn floor(text: &str, offset: usize) -> usize {
    text.floor_char_boundary(offset.min(text.len()))
}
