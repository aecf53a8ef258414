//! `preflightd import`.

use super::{Failure, Import, print};
use crate::{
    config::{Config, Diagnostic, Kubernetes},
    sources::kubernetes::{export, manifests, objects::World, resolve::Resolver},
};
use std::{io::Read as _, path::Path};

/// No more is read from standard input.
const MAX_INPUT: u64 = 1 << 30;

pub(super) fn import(args: &Import) -> Result<(), Failure> {
    let config = Config {
        kubernetes: Kubernetes {
            kubeconfig: args.kubeconfig.as_ref().map(|path| path.display().to_string()).unwrap_or_default(),
            context: args.context.clone().unwrap_or_default(),
            gateway_classes: args.manifests.gateway_class.clone(),
            ingress_classes: args.manifests.ingress_class.clone(),
            ..Kubernetes::default()
        },
        ..Config::of_listeners(Vec::new())
    };
    let (world, assume) = if args.from.is_some() {
        (of_cluster(&config.kubernetes)?, None)
    } else {
        (of_files(args)?, Some(args.manifests.gateway_dialect))
    };
    let import = Resolver::default().resolve(&world, &config.resolve_settings(assume));
    print(export::to_toml(&import.policies));
    let findings: Vec<_> = import.findings.iter().map(Diagnostic::of_object).collect();
    for finding in &findings {
        anstream::eprintln!("{finding}");
    }
    let passing = import.policies.iter().filter(|policy| policy.spec.passes.is_some()).count();
    let count = import.policies.len();
    anstream::eprintln!(
        "{} of {} {} answered here, {passing} left to the proxy",
        count - passing,
        count,
        if count == 1 { "policy" } else { "policies" },
    );
    if findings.iter().any(Diagnostic::is_error) { Err(Failure::Findings) } else { Ok(()) }
}

fn of_files(args: &Import) -> Result<World, Failure> {
    let mut world = World::default();
    let mut others = 0;
    for path in &args.files {
        let text = if path.as_os_str() == "-" {
            let mut text = String::new();
            std::io::stdin().take(MAX_INPUT).read_to_string(&mut text).map(|_| text)
        } else {
            std::fs::read_to_string(path)
        };
        let name = if path.as_os_str() == "-" { Path::new("standard input") } else { path };
        let text = text.map_err(|e| Failure::Usage(format!("cannot read {}: {e}", name.display())))?;
        let read = manifests::read(&text, &mut world)
            .map_err(|e| Failure::Usage(format!("cannot use {}: {e}", name.display())))?;
        others += read.others;
    }
    if world.is_empty() {
        return Err(Failure::Usage(format!(
            "no object says anything about preflights ({others} of other kinds): name manifests of HTTPRoutes, TrafficPolicies or \
             Ingresses"
        )));
    }
    Ok(world)
}

#[cfg(feature = "kubernetes")]
fn of_cluster(kubernetes: &Kubernetes) -> Result<World, Failure> {
    crate::sources::kubernetes::client::list(kubernetes).map_err(|e| Failure::Usage(e.to_string()))
}

#[cfg(not(feature = "kubernetes"))]
fn of_cluster(_: &Kubernetes) -> Result<World, Failure> {
    Err(Failure::Usage(
        "this preflightd was built without Kubernetes: build it with the feature `kubernetes`".to_owned(),
    ))
}
