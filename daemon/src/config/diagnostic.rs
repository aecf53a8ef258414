//! Findings in files, shown as compilers show them: where, the line itself, and what to do about it.

use crate::{policy::Severity, sources::kubernetes::resolve::Noted};
use anstyle::{AnsiColor, Style};
use serde::Serialize;
use std::{fmt, sync::Arc};

/// Something wrong or doubtful in a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Diagnostic {
    /// Refused or only doubtful.
    #[serde(serialize_with = "severity_word")]
    pub severity: Severity,
    /// Stable kebab-case name, such as `unknown-key`.
    pub code: &'static str,
    /// The file as it was named.
    pub file: Arc<str>,
    /// Line from 1; 0 where the finding concerns no line (a file that cannot be read).
    pub line: u32,
    /// Column from 1 in characters; 0 where there is none.
    pub column: u32,
    /// The field of an object; empty of a file.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub field: String,
    /// What is wrong.
    pub message: String,
    /// What to do about it; may be empty.
    pub help: String,
    /// The line, or the part of it that matters.
    #[serde(skip)]
    pub(super) excerpt: Option<Excerpt>,
}

/// Part of a line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Excerpt {
    /// Each character is one column wide on screen.
    text: String,
    /// Characters before the underline, and its length.
    underline: (usize, usize),
}

impl Excerpt {
    /// What is around `start..end` (byte offsets on character boundaries) of a line.
    pub(super) fn new(line: &str, start: usize, end: usize) -> Self {
        /// Characters shown, and of these in front of a place far inside a line.
        const WIDTH: usize = 100;
        const BEFORE: usize = 20;
        let mut before = line[..start].char_indices().rev();
        let from = match before.clone().nth(WIDTH - BEFORE) {
            None => 0,
            Some(_) => before.nth(BEFORE).map_or(0, |(at, _)| at),
        };
        let shown = line[from..].chars().take(WIDTH);
        let text: String = shown.map(|c| if is_unsafe(c) { ' ' } else { c }).collect();
        let skip = line[from..start].chars().count();
        let rest = text.chars().count().saturating_sub(skip);
        let length = line[start..end].chars().take(WIDTH).count().clamp(1, rest.max(1));
        Self { text, underline: (skip, length) }
    }
}

impl Diagnostic {
    /// One without a place in a file's text.
    pub fn of_file(
        severity: Severity,
        code: &'static str,
        file: &str,
        message: String,
        help: String,
    ) -> Self {
        Self {
            severity,
            code,
            file: file.into(),
            line: 0,
            column: 0,
            field: String::new(),
            message,
            help,
            excerpt: None,
        }
    }

    /// One about an object of Kubernetes.
    pub fn of_object(noted: &Noted) -> Self {
        let (message, help) = (noted.message.clone(), noted.help.clone());
        let object = noted.object.to_string();
        Self {
            field: noted.field.clone(),
            ..Self::of_file(noted.severity, noted.code, &object, message, help)
        }
    }

    /// Refused.
    pub fn is_error(&self) -> bool {
        self.severity == Severity::Error
    }

    /// `file:line:column`, or `object: field`, as far as there is one.
    pub fn place(&self) -> String {
        if self.line == 0 && self.field.is_empty() {
            escape(&self.file)
        } else if self.line == 0 {
            format!("{}: {}", escape(&self.file), escape(&self.field))
        } else {
            format!("{}:{}:{}", escape(&self.file), self.line, self.column)
        }
    }
}

/// The whole finding with colours; print it through `anstream`, which takes them away where nobody sees them.
impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let loud = match self.severity {
            Severity::Error => AnsiColor::Red,
            Severity::Warning => AnsiColor::Yellow,
        }
        .on_default()
        .bold();
        let bold = Style::new().bold();
        let dim = AnsiColor::Blue.on_default().bold();
        writeln!(
            f,
            "{loud}{}[{}]{loud:#}{bold}: {}{bold:#}",
            self.severity.as_str(),
            self.code,
            escape(&self.message)
        )?;
        let gutter = self.line.to_string().len();
        writeln!(f, "{:gutter$}{dim}-->{dim:#} {}", "", self.place())?;
        if let Some(Excerpt { text, underline: (skip, length) }) = &self.excerpt {
            writeln!(f, "{:gutter$} {dim}|{dim:#}", "")?;
            writeln!(f, "{dim}{} |{dim:#} {text}", self.line)?;
            writeln!(f, "{:gutter$} {dim}|{dim:#} {:skip$}{loud}{:^<length$}{loud:#}", "", "", "")?;
        }
        for line in self.help.lines() {
            writeln!(f, "{:gutter$} {dim}={dim:#} {bold}help{bold:#}: {}", "", escape(line))?;
        }
        Ok(())
    }
}

/// Makes control characters visible, so that no file or request can steer a terminal.
pub fn escape(text: &str) -> String {
    if !text.chars().any(is_unsafe) {
        return text.to_owned();
    }
    text.chars().fold(String::with_capacity(text.len() + 8), |mut out, c| {
        if is_unsafe(c) {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
        out
    })
}

/// Controls (C0, DEL, C1) and the characters that reorder text on screen.
fn is_unsafe(c: char) -> bool {
    c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn severity_word<S: serde::Serializer>(severity: &Severity, s: S) -> Result<S::Ok, S::Error> {
    s.serialize_str(severity.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shows_the_place() {
        let d = Diagnostic {
            severity: Severity::Error,
            code: "unknown-key",
            file: "p.toml".into(),
            line: 12,
            column: 3,
            field: String::new(),
            message: "unknown key `orgins`".into(),
            help: "did you mean `origins`?".into(),
            excerpt: Some(Excerpt::new("  orgins = []", 2, 8)),
        };
        let text = anstream::adapter::strip_str(&d.to_string()).to_string();
        assert_eq!(
            text,
            "error[unknown-key]: unknown key `orgins`\n  --> p.toml:12:3\n   |\n12 |   orgins = []\n   |   \
             ^^^^^^\n   = help: did you mean `origins`?\n"
        );
    }

    #[test]
    fn never_steers_the_terminal() {
        assert_eq!(escape("a\u{1b}[2Jb\u{202e}\u{9b}"), "a\\u{1b}[2Jb\\u{202e}\\u{9b}");
    }

    #[test]
    fn long_lines_are_cut() {
        let line = format!("{}héllo\t{}", "é".repeat(500), "x".repeat(500));
        for (start, end, want) in [
            (0, 2, (0, 1)),
            (100, 104, (50, 2)),
            (1000, 1006, (21, 5)),
            (1006, line.len(), (21, 79)),
            (line.len(), line.len(), (21, 1)),
        ] {
            let excerpt = Excerpt::new(&line, start, end);
            assert_eq!(excerpt.underline, want, "{start}..{end}: {}", excerpt.text);
            assert!(excerpt.text.chars().count() <= 100 && !excerpt.text.contains('\t'));
        }
        assert_eq!(Excerpt::new("", 0, 0).underline, (0, 1));
    }
}
