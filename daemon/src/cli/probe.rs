//! `preflightd probe`.

use super::{Failure, Probe};

#[cfg(not(feature = "ebpf"))]
pub(super) fn probe(_: &Probe) -> Result<(), Failure> {
    Err(Failure::Failed(
        "this preflightd was built without its eBPF part (feature `ebpf`) and cannot steer: listeners with an upstream \
         work"
            .to_owned(),
    ))
}

#[cfg(feature = "ebpf")]
pub(super) use with_ebpf::probe;

#[cfg(feature = "ebpf")]
mod with_ebpf {
    use std::{
        fmt::Write as _,
        net::{Ipv4Addr, SocketAddr},
    };

    use anstyle::AnsiColor;
    use serde::Serialize;

    use super::{super::Format, Failure, Probe};
    use crate::{
        cli::print,
        config,
        steer::probe::{self, Check, Report, Status, Target},
    };

    pub(in crate::cli) fn probe(args: &Probe) -> Result<(), Failure> {
        let report = probe::probe(&target(args)?);
        match args.format {
            Format::Json => print(json(&report)),
            Format::Text => print(text(&report)),
        }
        if report.can_steer() { Ok(()) } else { Err(Failure::Findings) }
    }

    fn target(args: &Probe) -> Result<Target, Failure> {
        let mut target = Target::default();
        if let Some(path) = &args.config {
            let loaded = config::load(path).map_err(|e| Failure::Usage(e.to_string()))?;
            let Some(config) = loaded.config else {
                for finding in &loaded.diagnostics {
                    anstream::eprintln!("{finding}");
                }
                return Err(Failure::Failed(
                    "the configuration has errors: nothing was looked at".to_owned(),
                ));
            };
            let steered = config.listeners.iter().filter(|listener| listener.steer);
            target = Target {
                addresses: steered.map(|listener| listener.address).collect(),
                netns: config.steer.netns,
                interfaces: config.steer.interfaces,
                pin_dir: config.steer.pin_dir,
                ignore_firewall: config.steer.firewall == config::Firewall::Ignore,
            };
        }
        let any = |port: &u16| SocketAddr::from((Ipv4Addr::UNSPECIFIED, *port));
        target.addresses.extend(args.port.iter().map(any));
        if let Some(netns) = &args.netns {
            target.netns.clone_from(netns);
        }
        if !args.interface.is_empty() {
            target.interfaces.clone_from(&args.interface);
        }
        if let Some(pin_dir) = &args.pin_dir {
            target.pin_dir.clone_from(pin_dir);
        }
        Ok(target)
    }

    fn json(report: &Report) -> String {
        #[derive(Serialize)]
        struct Object<'a> {
            steer: bool,
            observe: bool,
            #[serde(flatten)]
            report: &'a Report,
        }
        let object = Object { steer: report.can_steer(), observe: report.can_observe(), report };
        serde_json::to_string(&object).map(|line| line + "\n").unwrap_or_default()
    }

    fn text(report: &Report) -> String {
        let mut out = String::new();
        let width = report.checks.iter().map(|check| check.name.chars().count()).max().unwrap_or(0);
        // Writing to a string cannot fail.
        for Check { name, status, found, costs, remedy, .. } in &report.checks {
            let (word, colour) = match status {
                Status::Ok => ("ok", AnsiColor::Green),
                Status::Limited => ("limited", AnsiColor::Yellow),
                Status::Missing => ("missing", AnsiColor::Red),
            };
            let style = colour.on_default().bold();
            let (name, found) = (config::escape(name), config::escape(found));
            let _ = writeln!(out, "{style}{word:<7}{style:#}  {name:<width$}  {found}");
            if *status != Status::Ok {
                let (costs, remedy) = (config::escape(costs), config::escape(remedy));
                let _ = writeln!(out, "         costs: {costs}\n         remedy: {remedy}");
            }
        }
        let (steer, observe) = (report.can_steer(), report.can_observe());
        let style = if steer { AnsiColor::Green } else { AnsiColor::Red }.on_default().bold();
        let conclusion = match (steer, observe) {
            (true, _) => "this node can steer",
            (false, true) => "this node can observe, but not steer",
            (false, false) => "this node can neither steer nor observe",
        };
        let _ = writeln!(out, "{style}{conclusion}{style:#}");
        out
    }
}
