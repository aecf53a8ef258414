//! `preflightd check`.

use super::{Check, Failure, Format, print};
use crate::{
    config::{self, Diagnostic, Loaded},
    policy::RouteLabels,
    sources::kubernetes::manifests::is_manifest,
};
use std::{fmt::Write as _, path::PathBuf, time::Duration};

/// For each of the two questions to an upstream.
const UPSTREAM_TIMEOUT: Duration = Duration::from_secs(2);

pub(super) fn check(args: &Check) -> Result<(), Failure> {
    let mut policy_files = Vec::new();
    let mut findings = Vec::new();
    let mut policies = 0;
    for path in &args.files {
        let is_policy_file = std::fs::read(path)
            .map(|bytes| is_manifest(path) || config::is_policy_file(&String::from_utf8_lossy(&bytes)))
            .map_err(|e| Failure::Usage(format!("cannot read {}: {e}", path.display())))?;
        if is_policy_file {
            policy_files.push(path.clone());
        } else {
            let mut loaded = config::load(path).map_err(|e| Failure::Usage(e.to_string()))?;
            if args.ask_upstreams {
                loaded.ask_upstreams(UPSTREAM_TIMEOUT);
            }
            policies += compiled(loaded, &mut findings);
        }
    }
    if !policy_files.is_empty() {
        let loaded = config::load_policies_alone(&policy_files, args.manifests.manifests())
            .map_err(|e| Failure::Usage(e.to_string()))?;
        policies += compiled(loaded, &mut findings);
    }
    match args.format {
        Format::Json => print(json_lines(&findings)),
        Format::Text => print(text(&findings, policies, &args.files)),
    }
    let counts = |d: &Diagnostic| args.deny_warnings || d.is_error();
    if findings.iter().any(counts) { Err(Failure::Findings) } else { Ok(()) }
}

/// Compiles as `run` would, for what only the whole table shows. Returns the number of policies.
fn compiled(mut loaded: Loaded, findings: &mut Vec<Diagnostic>) -> usize {
    let specs = loaded.config.as_ref().map(config::Config::listener_specs).unwrap_or_default();
    loaded.compile(&specs, &mut RouteLabels::new(1), 1);
    findings.append(&mut loaded.diagnostics);
    loaded.config.map_or(0, |config| config.policies.len())
}

fn json_lines(findings: &[Diagnostic]) -> String {
    findings.iter().fold(String::new(), |mut out, finding| {
        if let Ok(line) = serde_json::to_string(finding) {
            let _ = writeln!(out, "{line}");
        }
        out
    })
}

fn text(findings: &[Diagnostic], policies: usize, files: &[PathBuf]) -> String {
    let mut out = String::new();
    for finding in findings {
        // Writing to a string cannot fail.
        let _ = writeln!(out, "{finding}");
    }
    let errors = findings.iter().filter(|d| d.is_error()).count();
    let warnings = findings.len() - errors;
    let plural = |n: usize, word: &str| format!("{n} {word}{}", if n == 1 { "" } else { "s" });
    let _ = if errors > 0 {
        writeln!(out, "{}, {}", plural(errors, "error"), plural(warnings, "warning"))
    } else {
        let good = anstyle::AnsiColor::Green.on_default().bold();
        let policies = if policies == 1 { "1 policy".to_owned() } else { format!("{policies} policies") };
        let files = plural(files.len(), "file");
        writeln!(out, "{good}ok{good:#}: {policies} in {files}, {}", plural(warnings, "warning"))
    };
    out
}
